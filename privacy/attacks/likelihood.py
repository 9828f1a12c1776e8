"""MLA: the image whose features are those that arrived, by gradient descent (He et al. 2019; C2PI, Section II).

White box: the attacker has the head and the noise, as after the theft of a device. With a total-variation prior the
images stay smooth where the features say nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensembler.privacy.attacks.base import AttackImpossibleError, Finding, Plan
from ensembler.privacy.scene import Access, View
from ensembler.training.models import normalise
from ensembler.training.wire import fake_quantise

LEARNING_RATE = 0.05
TOTAL_VARIATION = 1e-2
IMAGES = 100


class Likelihood:
    """See the module.

    Args:
        prior: add a total-variation prior.
    """

    ACCESS = Access.WHITE_BOX
    SOURCE = "He et al. 2019; C2PI, Section II"

    def __init__(self, *, prior: bool) -> None:
        self.NAME = "mla-prior" if prior else "mla"
        how = " and stay smooth" if prior else ""
        self.WORDS = f"searches with the stolen head for images that give the features that arrived{how}"
        self._weight = TOTAL_VARIATION if prior else 0.0

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        client = view.client
        if client is None:
            raise AttackImpossibleError("this attack needs the device's weights")

        def search(arrived: Tensor) -> Tensor:
            height, width = view.arch.image_size
            start = torch.rand((len(arrived), 3, height, width), generator=plan.generator(0)).to(arrived.device)
            # A logit, so that the images stay in [0, 1].
            free = torch.logit(0.25 + 0.5 * start).requires_grad_()
            optimizer = torch.optim.Adam([free], LEARNING_RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
            scale = arrived.std().clamp_min(1e-6)
            with torch.enable_grad():
                for _ in range(plan.steps):
                    images = torch.sigmoid(free)
                    features = client.head(normalise(images * 255)) + client.noise
                    error = ((fake_quantise(features, view.wire.feature_codec) - arrived) / scale).square().mean()
                    loss = error + self._weight * variation(images)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    plan.tick("likelihood")
            return torch.sigmoid(free.detach())

        return Finding(variants={"": search}, images=IMAGES)


def variation(images: Tensor) -> Tensor:
    """Returns the mean absolute difference of neighbouring pixels of ``(B, 3, H, W)``."""
    rows = (images[:, :, 1:] - images[:, :, :-1]).abs().mean()
    columns = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean()
    return rows + columns
