"""A shadow head that is told all there is to tell: the client's own architecture, the server's nets, what arrives.

The paper's shadow has three convolutions whatever the client's head is, and looks at nothing that arrives. Matching
looks at what arrives and at no net, which suffices for one layer and not for a deep head. Here a head of the client's
own architecture, with its quantiser, learns to classify through all the server's nets, and to have the statistics of
what arrives. The frozen nets make it speak the client's language, which was learned to be understood by some of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensembler.privacy.attacks.base import OWN_SSIM, Finding, Plan, decoder_of, needed
from ensembler.privacy.attacks.matching import MATCHED
from ensembler.privacy.attacks.moments import Cleaner, Moments
from ensembler.privacy.attacks.shadow import Through, train_shadow
from ensembler.privacy.decoder import CHUNK, painted
from ensembler.privacy.scene import Access, View
from ensembler.training.models import placed

STATISTICS_WEIGHT = 0.1  # beside the cross-entropy


class Informed:
    """See the module."""

    NAME = "shadow-informed"
    ACCESS = Access.QUERY_FREE
    SOURCE = "ours; related: FORA, SDAR"
    WORDS = (
        "trains a head of the client's own architecture through all server nets under learned weights, towards the "
        "statistics of what arrives, and a decoder on it"
    )

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.steps + plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        bodies, observed = needed(view.bodies, "the server's nets"), needed(view.observed, "observed features")
        cleaner = Cleaner(view, observed)
        target = Moments(cleaner.clean(observed))
        torch.manual_seed(plan.generator(0).initial_seed())
        net = placed(Through(_KnownHead(view, cleaner), view, bodies, weighted=True), view.device)

        def unlike(sent: Tensor) -> Tensor:
            return STATISTICS_WEIGHT * target.distance(cleaner.clean(sent))

        accuracy = train_shadow(net, view, plan, plan.generator(1), unlike)
        decoder = decoder_of(lambda images: cleaner.clean(net.features(images)), view, plan, 2)
        own = [cleaner.clean(net.features(part)) for part in torch.split(view.auxiliary, CHUNK)]
        distance = target.distance_of_all(own)
        return Finding(
            variants={"": lambda arrived: painted(decoder, cleaner.clean(arrived))},
            seen={
                "train_accuracy": [round(100 * accuracy, 1)],
                "distance": round(distance, 4),
                "chance": round(target.chance, 4),
                OWN_SSIM: [round(decoder.own_ssim, 4)],
            },
            gates={"the head has the statistics of what arrives": distance <= MATCHED * target.chance},
        )


class _KnownHead(nn.Module):
    """A fresh head of the client's architecture, with the offset that was seen in what arrives."""

    def __init__(self, view: View, cleaner: Cleaner) -> None:
        super().__init__()
        self.head = view.new_head()
        self._cleaner = cleaner

    def forward(self, x: Tensor) -> Tensor:
        """Returns features as they would arrive."""
        return self._cleaner.sent(self.head(x)) + self._cleaner.offset
