"""The paper's attacks (Ensembler, Sections III-B, III-D and IV-A): a shadow head trained through the server's nets.

The shadow head has three convolutions, the first like the client's, the others for the noise. Before one server net
(or all of them behind learned weights, the adaptive attack) and a tail of its own it learns to classify; a decoder of
it is then fed with what arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.attacks.base import Finding, Plan, decoder_of, needed
from ensembler.privacy.decoder import Reconstruct, painted
from ensembler.privacy.scene import Access, View
from ensembler.training.fit import augment
from ensembler.training.models import build_net, normalise
from ensembler.training.stage1 import placed
from ensembler.training.wire import fake_quantise

BATCH = 128
LEARNING_RATE = 1e-3
WIDTH = 64  # of the two further convolutions (Section IV-A)


class ShadowHead(nn.Module):
    """A fresh head of the known architecture and two more convolutions for the noise."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.head = build_net(view.arch).head
        self.codec = view.wire.feature_codec
        shape = view.wire.feature_shape
        self.noise: nn.Module = nn.Identity()
        if len(shape) == 3:
            self.noise = nn.Sequential(
                nn.Conv2d(shape[0], WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, shape[0], 3, padding=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns features as they would arrive."""
        return fake_quantise(self.noise(self.head(x)), self.codec)


class _Through(nn.Module):
    """A shadow net: head, one server net or all of them under learned weights, tail."""

    def __init__(self, view: View, bodies: Sequence[nn.Module], *, weighted: bool) -> None:
        super().__init__()
        self.head = ShadowHead(view)
        self._bodies = list(bodies)  # not parameters: they stay as they are
        self.weights = nn.Parameter(torch.zeros(len(bodies))) if weighted else None
        self.tail = nn.Linear(view.wire.answer_width * len(bodies), view.arch.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        sent = self.head(x)
        answers = torch.stack([body(sent) for body in self._bodies], 1)
        share = torch.full((len(self._bodies),), 1 / len(self._bodies), device=x.device)
        if self.weights is not None:
            share = self.weights.softmax(0)
        logits: Tensor = self.tail((answers * share[:, None]).flatten(1))
        return logits


class SingleShadow:
    """A shadow net through one server net, once for each of them; the best counts, as in the paper."""

    NAME = "shadow-single"
    ACCESS = Access.QUERY_FREE
    SOURCE = "Ensembler III-B, IV-A"
    WORDS = "trains a head through one server net, and a decoder on it; the best over the N nets"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.num_nets * (plan.steps + plan.effort.steps)

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        bodies = needed(view.bodies, "the server's nets")
        variants, accuracy = {}, {}
        for index, body in enumerate(bodies):
            name = f"net {index + 1}"
            variants[name], accuracy[name] = shadow_decoder(view, plan, [body], index)
        return Finding(variants=variants, seen={"train_accuracy": accuracy})


class Adaptive:
    """A shadow net through all server nets, which learns a weight for each where the client has its selector."""

    NAME = "shadow-adaptive"
    ACCESS = Access.QUERY_FREE
    SOURCE = "Ensembler III-D, IV-A"
    WORDS = "trains a head through all server nets with learned weights in the selector's place, and a decoder on it"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.steps + plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        bodies = needed(view.bodies, "the server's nets")
        reconstruct, accuracy = shadow_decoder(view, plan, bodies, len(bodies), weighted=True)
        return Finding(variants={"all nets": reconstruct}, seen={"train_accuracy": accuracy})


def shadow_decoder(
    view: View, plan: Plan, bodies: Sequence[nn.Module], part: int, *, weighted: bool = False
) -> tuple[Reconstruct, float]:
    """Trains a shadow net and the decoder of its head: the loop that both of the paper's attacks are.

    Args:
        view: a query-free one.
        plan: how hard.
        bodies: through which the head learns.
        part: tells the randomness of several shadows apart.
        weighted: learn a weight for each net, as a softmax.

    Returns:
        The decoder, and the shadow net's accuracy on the last batches it was trained on.
    """
    torch.manual_seed(plan.generator(part).initial_seed())
    net = placed(_Through(view, bodies, weighted=weighted), view.device).train()
    generator = plan.generator(part, 1)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    images, labels = view.auxiliary, view.auxiliary_labels
    hits = 0.0
    for _ in range(plan.steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(images.device)
        logits = net(normalise(augment(images[chosen], generator)).to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        hits = 0.9 * hits + 0.1 * float((logits.argmax(1) == labels[chosen]).float().mean())
        plan.tick("shadow")
    net.eval()

    @torch.no_grad()
    def features(batch: Tensor) -> Tensor:
        arrived: Tensor = net.head(normalise(batch).to(memory_format=torch.channels_last))
        return arrived

    return partial(painted, decoder_of(features, view, plan, part, 2)), 100 * hits
