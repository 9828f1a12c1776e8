"""What any image scores with no attack at all, and what a decoder for the wrong head scores: the floors."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ensembler.privacy.attacks.base import Finding, Plan, decoder_of
from ensembler.privacy.decoder import painted, pixels
from ensembler.privacy.scene import Access, View
from ensembler.training.models import normalise


class MeanImage:
    """The mean of the attacker's own images, whatever arrives: the floor."""

    NAME = "mean-image"
    ACCESS = Access.NONE
    SOURCE = "control"
    WORDS = "shows the mean of the attacker's own images, whatever arrives: the floor"

    def ticks(self, plan: Plan) -> int:  # noqa: ARG002 (the protocol's)
        """See ``Attack``."""
        return 0

    def run(self, view: View, plan: Plan) -> Finding:  # noqa: ARG002 (the protocol's)
        """See ``Attack``."""
        mean = pixels(view.auxiliary).mean(0, keepdim=True)
        return Finding(variants={"": lambda features: mean.expand(len(features), -1, -1, -1)})


class Misaligned:
    """A decoder of some other head of the same architecture, fed with what arrives."""

    NAME = "misaligned-decoder"
    ACCESS = Access.NONE
    SOURCE = "control"
    WORDS = "decodes with a decoder trained for a random head of the same architecture"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        torch.manual_seed(plan.generator(0).initial_seed())
        head = view.new_head().to(view.device).train()
        with torch.no_grad():  # batch norm gets the statistics of real images
            for part in torch.split(view.auxiliary[:2048], 256):
                head(normalise(part))
        head.eval()

        @torch.no_grad()
        def features(images: Tensor) -> Tensor:
            out: Tensor = head(normalise(images))
            return out

        decoder = decoder_of(features, view, plan, 1)
        return Finding(variants={"": partial(painted, decoder)})
