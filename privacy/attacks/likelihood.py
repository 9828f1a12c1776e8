"""MLA: the image whose features are those that arrived, by gradient descent (He et al. 2019; C2PI, Section II).

White box: the attacker has the head and the noise, as after the theft of a device. With a total-variation prior the
images stay smooth where the features say nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensembler.privacy.attacks.base import Finding, Plan, needed
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
        client = needed(view.client, "the device's weights")
        # Of several tensors, of which the device draws one for each image, nobody else knows which: their mean.
        noise = client.noise.mean(0) if client.perturbation.tensors else client.noise

        def features(images: Tensor) -> Tensor:
            return fake_quantise(client.head(normalise(images * 255)) + noise, view.wire.feature_codec)

        def reconstruct(arrived: Tensor) -> Tensor:
            return search(
                features,
                arrived,
                view.arch.image_size,
                steps=plan.steps,
                generator=plan.generator(0),
                prior=self._weight,
                tick=lambda: plan.tick("likelihood"),
            )

        return Finding(variants={"": reconstruct}, images=IMAGES)


def search(
    features_of: Callable[[Tensor], Tensor],
    arrived: Tensor,
    image_size: tuple[int, int],
    *,
    steps: int,
    generator: torch.Generator,
    prior: float = 0.0,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Returns images ``(B, 3, H, W)`` in [0, 1] whose features are close to those that arrived.

    Args:
        features_of: from such images to features; differentiable.
        arrived: ``(B, *feature_shape)``.
        image_size: H and W.
        steps: of gradient descent, from random images.
        generator: of the random images, on the CPU.
        prior: weight of the total variation.
        tick: called after every step.
    """
    start = torch.rand((len(arrived), 3, *image_size), generator=generator).to(arrived.device)
    # A logit, so that the images stay in [0, 1].
    free = torch.logit(0.25 + 0.5 * start).requires_grad_()
    return descend(
        free,
        torch.sigmoid,
        features_of,
        arrived,
        rate=LEARNING_RATE,
        steps=steps,
        penalty=lambda images: prior * variation(images),
        tick=tick,
    )


def descend(
    free: Tensor,
    paint: Callable[[Tensor], Tensor],
    features_of: Callable[[Tensor], Tensor],
    arrived: Tensor,
    *,
    rate: float,
    steps: int,
    penalty: Callable[[Tensor], Tensor],
    tick: Callable[[], None],
) -> Tensor:
    """Moves ``free`` until what it paints has the features that arrived; the loop of every search for images.

    Args:
        free: what is optimised, in place; requires a gradient.
        paint: from it to images ``(B, 3, H, W)`` in [0, 1]; differentiable.
        features_of: from such images to features; differentiable.
        arrived: ``(B, *feature_shape)``.
        rate: of Adam at first; it falls along a cosine.
        steps: of gradient descent.
        penalty: of images, beside the distance of their features, which is in units of what arrived.
        tick: called after every step.

    Returns:
        The images.
    """
    optimizer = torch.optim.Adam([free], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scale = arrived.std().clamp_min(1e-6)
    with torch.enable_grad():
        for _ in range(steps):
            images = paint(free)
            loss = ((features_of(images) - arrived) / scale).square().mean() + penalty(images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=[free])  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            tick()
    return paint(free.detach()).detach()


def variation(images: Tensor) -> Tensor:
    """Returns the mean absolute difference of neighbouring pixels of ``(B, 3, H, W)``."""
    rows = (images[:, :, 1:] - images[:, :, :-1]).abs().mean()
    columns = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean()
    return rows + columns
