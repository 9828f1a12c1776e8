"""The paper's attacks (Ensembler, Sections III-B, III-D and IV-A): a shadow head trained through the server's nets.

The shadow head has three convolutions, the first like the client's, the others for the noise. Before one server net
(or a set of them, or all of them behind learned weights, the adaptive attack) and a tail of its own it learns to
classify; a decoder of it is then fed with what arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, combinations, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.attacks.base import OWN_SSIM, AttackImpossibleError, Finding, Plan, decoder_of, needed, nets_name
from ensembler.privacy.decoder import Decoder, Reconstruct, painted
from ensembler.privacy.scene import Access, View
from ensembler.training.fit import augment
from ensembler.training.models import normalise, placed
from ensembler.training.perturbation import Perturbation
from ensembler.training.wire import fake_quantise

BATCH = 64
LEARNING_RATE = 1e-3
WIDTH = 64  # of the two further convolutions (Section IV-A)
MAX_SETS = 15  # of nets, that a shadow is trained for


class ShadowHead(nn.Module):
    """A fresh head of the known architecture and two more convolutions for the noise."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.head = view.new_head()
        self.codec = view.wire.feature_codec
        self._dropped = Perturbation(dropout=view.dropout)
        shape = view.wire.feature_shape
        self.noise: nn.Module = nn.Identity()
        if len(shape) == 3:
            self.noise = nn.Sequential(
                nn.Conv2d(shape[0], WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, shape[0], 3, padding=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns features as they would arrive."""
        sent = self.noise(self.head(x))
        return fake_quantise(self._dropped.draw(torch.zeros_like(sent[0]), len(sent)).applied(sent), self.codec)


class Through(nn.Module):
    """A shadow net: head, one server net or several, under learned weights or alike, tail.

    Args:
        head: from normalised images to features as they would arrive.
        view: of the attacker.
        bodies: of the server.
        weighted: learn a weight for each, as a softmax.
    """

    def __init__(self, head: nn.Module, view: View, bodies: Sequence[nn.Module], *, weighted: bool) -> None:
        super().__init__()
        self.head = head
        self._bodies = list(bodies)  # not parameters: they stay as they are
        self.weights = nn.Parameter(torch.zeros(len(bodies))) if weighted else None
        self.tail = nn.Linear(view.wire.answer_width * len(bodies), view.arch.num_classes)

    def forward(self, sent: Tensor) -> Tensor:
        """Returns logits for features as they would arrive."""
        answers = torch.stack([body(sent) for body in self._bodies], 1)
        share = torch.full((len(self._bodies),), 1 / len(self._bodies), device=sent.device)
        if self.weights is not None:
            share = self.weights.softmax(0)
        logits: Tensor = self.tail((answers * share[:, None]).flatten(1))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns what its head makes of uint8 images."""
        arrived: Tensor = self.head(normalise(images).to(memory_format=torch.channels_last))
        return arrived


class SingleShadow:
    """A shadow net through one server net, once for each of them; the best counts, as in the paper.

    Args:
        calibrated: bring what arrives to the mean and deviation that each channel has in the shadow's own features.
    """

    ACCESS = Access.QUERY_FREE

    def __init__(self, *, calibrated: bool = False) -> None:
        self.NAME = "shadow-calibrated" if calibrated else "shadow-single"
        self.SOURCE = "ours, after Ensembler III-B" if calibrated else "Ensembler III-B, IV-A"
        self.WORDS = "trains a head through one server net, and a decoder on it; the best over the N nets" + (
            "; what arrives is first scaled like the shadow's features" if calibrated else ""
        )
        self._calibrated = calibrated

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return plan.num_nets * (plan.steps + plan.effort.steps)

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        nets = [(index,) for index in range(len(needed(view.bodies, "the server's nets")))]
        return _best_of(nets, view, plan, calibrated=self._calibrated)


class Subsets:
    """A shadow net through each set of P nets: one of them is the client's, and nobody knows which."""

    NAME = "shadow-subsets"
    ACCESS = Access.QUERY_FREE
    SOURCE = "Ensembler III-D"
    WORDS = "trains a head through each set of P server nets, and a decoder on it; the best over all sets"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return MAX_SETS * (plan.steps + plan.effort.steps)

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        count = len(needed(view.bodies, "the server's nets"))
        if view.num_selected in (1, count):
            raise AttackImpossibleError("sets of one net or of all nets are what the other shadow attacks try")
        if math.comb(count, view.num_selected) > MAX_SETS:
            raise AttackImpossibleError(
                f"{math.comb(count, view.num_selected)} sets of {view.num_selected} of {count} nets are too many to "
                f"train a shadow for each; {MAX_SETS} at most"
            )
        return _best_of(list(combinations(range(count), view.num_selected)), view, plan)


class Colluding:
    """A shadow net through what some of the operators hold together, for each group of them (Section III-D)."""

    NAME = "shadow-colluding"
    ACCESS = Access.QUERY_FREE
    SOURCE = "Ensembler III-D"
    WORDS = "trains a head through the nets of each group of colluding operators, and a decoder on it; the best counts"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return MAX_SETS * (plan.steps + plan.effort.steps)

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        needed(view.bodies, "the server's nets")
        operators = len(view.party_nets)
        if operators == 1:
            raise AttackImpossibleError("one operator holds all the nets; nobody is there to collude with")
        if 2**operators - 1 > MAX_SETS:
            raise AttackImpossibleError(f"{2**operators - 1} groups of operators are too many; {MAX_SETS} at most")
        ends = list(accumulate(view.party_nets, initial=0))
        held = [tuple(range(*pair)) for pair in pairwise(ends)]
        groups = [group for size in range(1, operators + 1) for group in combinations(held, size)]
        return _best_of([tuple(chain(*group)) for group in groups], view, plan)


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
        nets = tuple(range(len(needed(view.bodies, "the server's nets"))))
        shadow = shadow_of(view, plan, nets, weighted=True)
        return Finding(variants={"": partial(painted, shadow.decoder)}, seen=_seen([shadow]))


@dataclass(frozen=True)
class ShadowFound:
    """What came of one shadow net.

    Attributes:
        decoder: of its head.
        accuracy: of the shadow net on the last batches that it was trained on, percent.
    """

    decoder: Decoder
    accuracy: float


def _best_of(sets: Sequence[tuple[int, ...]], view: View, plan: Plan, *, calibrated: bool = False) -> Finding:
    """Returns a variant for each set of nets."""
    shadows = {nets_name(nets): shadow_of(view, plan, nets) for nets in sets}
    observed = needed(view.observed, "observed features")
    variants: dict[str, Reconstruct] = {}
    for name, shadow in shadows.items():
        decoder = shadow.decoder.fed_with(observed) if calibrated else shadow.decoder
        variants[name] = partial(painted, decoder)
    return Finding(variants=variants, seen=_seen(list(shadows.values())))


def _seen(shadows: Sequence[ShadowFound]) -> dict[str, list[float]]:
    return {
        "train_accuracy": [round(shadow.accuracy, 1) for shadow in shadows],
        OWN_SSIM: [round(shadow.decoder.own_ssim, 4) for shadow in shadows],
    }


def shadow_of(view: View, plan: Plan, nets: tuple[int, ...], *, weighted: bool = False) -> ShadowFound:
    """Trains a shadow net and the decoder of its head: the loop that all these attacks are.

    Args:
        view: a query-free one; what was found is noted there.
        plan: how hard.
        nets: through which of the server's the head learns.
        weighted: learn a weight for each net, as a softmax.
    """
    return view.noted(("shadow", nets, weighted, plan.identity), lambda: _trained(view, plan, nets, weighted))


def _trained(view: View, plan: Plan, nets: tuple[int, ...], weighted: bool) -> ShadowFound:
    bodies = needed(view.bodies, "the server's nets")
    # Of the set alone, so that a shadow is the same whichever attack asks for it first.
    part = (int(weighted), *nets)
    torch.manual_seed(plan.generator(0, *part).initial_seed())
    net = placed(Through(ShadowHead(view), view, [bodies[i] for i in nets], weighted=weighted), view.device)
    hits = train_shadow(net, view, plan, plan.generator(1, *part))
    return ShadowFound(decoder_of(net.features, view, plan, 2, *part), 100 * hits)


def train_shadow(
    net: Through,
    view: View,
    plan: Plan,
    generator: torch.Generator,
    beside: Callable[[Tensor], Tensor | float] = lambda _: 0.0,
) -> float:
    """Trains a shadow net on the attacker's images for ``plan.steps`` steps; leaves it in ``eval()``.

    Args:
        net: in any mode.
        view: of the attacker.
        plan: how hard.
        generator: of shuffling and augmentation.
        beside: what is added to the cross-entropy, for the features as they would arrive.

    Returns:
        Its accuracy on the last batches that it was trained on, 0 to 1.
    """
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    images, labels = view.auxiliary, view.auxiliary_labels
    hits = 0.0
    for _ in range(plan.steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(images.device)
        sent = net.head(normalise(augment(images[chosen], generator)).to(memory_format=torch.channels_last))
        logits = net(sent)
        loss = F.cross_entropy(logits, labels[chosen]) + beside(sent)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        hits = 0.9 * hits + 0.1 * float((logits.argmax(1) == labels[chosen]).float().mean())
        plan.tick("shadow")
    net.eval()
    return hits
