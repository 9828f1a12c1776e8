"""Distribution matching: a head whose features have the statistics of those that arrive, and its decoder.

The server knows the architecture of the head and owns images of the same kind. It searches for weights with which its
own images give features that are distributed as the observed ones (``moments``). It needs no query, no label, no server
net and never the selector. A head with the same statistics is nearly the client's own, and a decoder trained on it
reads the client's images.

Related: FORA (Xu et al., CVPR 2024), PCAT (Gao and Zhang, USENIX Security 2023), SDAR (Zhu et al., NDSS 2025).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ensembler.privacy.attacks.base import OWN_SSIM, AttackImpossibleError, Finding, Plan, decoder_of, needed
from ensembler.privacy.attacks.eye import train_eye
from ensembler.privacy.attacks.moments import BATCH, JUDGED, Cleaner, Moments
from ensembler.privacy.decoder import CHUNK, Decoder, Reconstruct, painted
from ensembler.privacy.scene import Access, View
from ensembler.training.models import normalise, placed

SEARCH_BATCH = 32  # images of a step: many small steps come nearer in the same time than few large ones
RATE, RATE_AGAIN, RATE_END = 0.05, 0.02, 0.001
MATCHED = 1.2  # times the distance between the halves of what arrives
GUESSED_KERNEL = 5
FITTED, LOOKED_AT = 1000, 512  # images, to see whether a head has the colours right
LOOKS = 2


class Matching:
    """See the module.

    Args:
        observed: use the features of so many images only.
        blind: the attacker does not know the head's architecture, and guesses one convolution.
    """

    ACCESS = Access.QUERY_FREE
    SOURCE = "ours; related: FORA, PCAT, SDAR"

    def __init__(self, observed: int | None = None, *, blind: bool = False) -> None:
        self.NAME = "distribution-matching" + ("" if observed is None else f"-{observed}") + ("-blind" if blind else "")
        seen = "" if observed is None else f" of {observed} images"
        guess = ", guessing its architecture" if blind else ""
        self.WORDS = (
            f"finds a head whose features are distributed as those{seen} that arrive{guess}, and trains a decoder on it"
        )
        self._limit = observed
        self._blind = blind

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return match_ticks(plan) + plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        return matched(view, plan, observed=self._limit, blind=self._blind).finding(view, plan)


@dataclass(frozen=True)
class Attempt:
    """What the attacker sees of one start.

    Attributes:
        distance: of the head that it ended at.
        turns: the reflection of colours that the eye asked for at each look, 0 for none.
    """

    distance: float
    turns: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A head that was searched for.

    Attributes:
        head: the nearest one, settled.
        cleaner: what it was cleaned with.
        target: what it was matched with.
        attempts: one for each start.
    """

    head: Shadow
    cleaner: Cleaner
    target: Moments
    attempts: tuple[Attempt, ...]

    def decoder(self, view: View, plan: Plan) -> Decoder:
        """Returns the decoder of the head."""
        return view.noted(("decoder", self.head, plan.identity), lambda: decoder_of(self.head.features, view, plan, 2))

    def finding(self, view: View, plan: Plan) -> Finding:
        """Returns what the decoder of the head makes of what arrives."""
        decoder = self.decoder(view, plan)
        return self.found(lambda features: painted(decoder, self.cleaner.clean(features)), decoder)

    def found(self, reconstruct: Reconstruct, decoder: Decoder, images: int | None = None) -> Finding:
        """Returns ``reconstruct`` with what the attacker sees of the match and of its decoder."""
        final = self.head.distance(self.target)
        return Finding(
            variants={"": reconstruct},
            images=images,
            seen={
                "distances": [round(attempt.distance, 4) for attempt in self.attempts],
                "turns": [list(attempt.turns) for attempt in self.attempts],
                "distance": round(final, 4),
                "chance": round(self.target.chance, 4),
                OWN_SSIM: [round(decoder.own_ssim, 4)],
            },
            gates={"the matched head has the statistics of what arrives": final <= MATCHED * self.target.chance},
        )


def match_ticks(plan: Plan) -> int:
    """Returns how often ``matched`` ticks, at most."""
    return (1 + LOOKS) * plan.steps * plan.restarts


def matched(view: View, plan: Plan, *, observed: int | None = None, blind: bool = False) -> Match:
    """Searches for the client's head: the loop that all attacks by matching are.

    The statistics of natural images hardly change when light and dark change places, or the hues, so a start may end at
    a head that sees images so turned. An ``eye`` looks at what such a head makes of what arrives, and turns the head.

    Args:
        view: a query-free one. What was found is noted there, so that the next attack of the same plan has it at once.
        plan: how hard.
        observed: use the features of so many images only.
        blind: guess the architecture.

    Raises:
        AttackImpossibleError: the view has no observed features.
    """
    features = needed(view.observed, "observed features")[:observed]
    build = guessed_head if blind else known_head
    return view.noted(("match", observed, blind, plan.identity), lambda: _searched(view, plan, features, build))


def _searched(view: View, plan: Plan, features: Tensor, build: Callable[[View], nn.Module]) -> Match:
    eye = view.noted(("eye", plan.identity), lambda: train_eye(view.auxiliary, plan.effort.steps, plan.generator(3)))
    torch.manual_seed(plan.generator(0).initial_seed())
    cleaner = Cleaner(view, features)
    clean = cleaner.clean(features)
    target = Moments(clean)
    found: list[Shadow] = []
    attempts: list[Attempt] = []
    for restart in range(plan.restarts):
        head = Shadow(view, cleaner, build, plan.generator(1, restart))
        head.match(target, plan.steps, RATE, RATE_AGAIN, plan)
        head.settle()
        turns: list[int] = []
        for _ in range(LOOKS):
            turns.append(eye.turned(first_sight(head, view, clean)))
            if turns[-1]:
                head.reflect(eye.colours.reflections[turns[-1]])
                head.settle()
            if len(turns) == 1 or turns[-1]:
                head.match(target, plan.steps, RATE_AGAIN, RATE_END, plan)
        found.append(head)
        attempts.append(Attempt(head.distance(target), tuple(turns)))
        if attempts[-1].distance <= MATCHED * target.chance:
            break  # the attacker sees that it is there
    best = min(range(len(found)), key=lambda index: (math.isnan(attempts[index].distance), attempts[index].distance))
    return Match(head=found[best], cleaner=cleaner, target=target, attempts=tuple(attempts))


@torch.no_grad()
def first_sight(head: Shadow, view: View, clean: Tensor) -> Tensor:
    """Returns what a linear map, fitted to the head, makes of the first of what arrives: images in [0, 1]."""
    size = (view.auxiliary.shape[-2], view.auxiliary.shape[-1])
    linear = placed(Decoder(view.wire.feature_shape, size, 4), view.device).eval()
    images = view.auxiliary[:FITTED]
    linear.fit_linear(torch.cat([head.features(part) for part in torch.split(images, CHUNK)]), images)
    return painted(linear, clean[:LOOKED_AT])


def known_head(view: View) -> nn.Module:
    """Returns a fresh head of the client's architecture."""
    return view.new_head()


def guessed_head(view: View) -> nn.Module:
    """Returns a head that gives features of the right shape: all that one knows who sees only what arrives.

    Raises:
        AttackImpossibleError: the features are no maps.
    """
    if len(view.wire.feature_shape) != 3:
        raise AttackImpossibleError("guesses convolutions only, and these features are no maps")
    channels, height, width = view.wire.feature_shape
    stride = (max(1, view.arch.image_size[0] // height), max(1, view.arch.image_size[1] // width))
    kernel = (GUESSED_KERNEL + stride[0] - 1, GUESSED_KERNEL + stride[1] - 1)
    return nn.Sequential(
        nn.Conv2d(3, channels, kernel, stride, (GUESSED_KERNEL // 2, GUESSED_KERNEL // 2), bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((height, width)),
    )


class Shadow:
    """A head of the known architecture, to be matched; its first convolution is searched in whitened patches."""

    def __init__(
        self, view: View, cleaner: Cleaner, build: Callable[[View], nn.Module], generator: torch.Generator
    ) -> None:
        self._cleaner = cleaner
        self._images = view.auxiliary
        self._generator = generator
        torch.manual_seed(generator.initial_seed())
        self.head = build(view).to(view.device).train()
        first = _first(self.head)
        if first is not None:
            fresh = first.weight.detach().clone()  # as good a start in whitened patches as in others
            parametrize.register_parametrization(first, "weight", _Whitened(view.auxiliary, first), unsafe=True)
            with torch.no_grad():
                first.get_parameter("parametrizations.weight.original").copy_(fresh)

    def copied(self) -> Shadow:
        """Returns one that goes on from here by itself."""
        other = copy.copy(self)
        other.head = copy.deepcopy(self.head)
        other._generator = torch.Generator()
        other._generator.set_state(self._generator.get_state())
        return other

    @torch.no_grad()
    def reflect(self, colours: Tensor) -> None:
        """Makes the head see of an image what it saw of the image with reflected ``colours``, ``(3, 3)``.

        Batch norm takes out what the mean colour adds. A head whose first layer is no convolution stays as it is.
        """
        first = _first(self.head)
        if first is not None:
            first.weight = torch.einsum("oihw,ij->ojhw", first.weight, colours)

    def match(self, target: Moments, steps: int, rate: float, last_rate: float, plan: Plan) -> None:
        """Descends the distance to ``target`` for ``steps``, the learning rate falling along a cosine."""
        optimizer = torch.optim.Adam(self.head.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, last_rate)
        for _ in range(steps):
            loss = target.distance(self.sent(SEARCH_BATCH))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            plan.tick("matching")

    @torch.no_grad()
    def distance(self, target: Moments) -> float:
        """Returns how far the statistics of all the attacker's images are from those of all that arrived."""
        return target.distance_of_all([self.arriving(part) for part in torch.split(self._images[:JUDGED], BATCH)])

    def sent(self, count: int = BATCH) -> Tensor:
        """Returns what would arrive of ``count`` of the attacker's images, cleaned; differentiable."""
        chosen = torch.randint(len(self._images), (count,), generator=self._generator).to(self._images.device)
        return self.arriving(self._images[chosen])

    @torch.no_grad()
    def settle(self) -> None:
        """Goes on in ``eval()`` mode, with the batch-norm statistics of all the images, as the client's head does."""
        self.head.train()
        for norm in (m for m in self.head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.reset_running_stats()
            norm.momentum = None
        for part in torch.split(self._images, CHUNK):
            self.head(normalise(part))
        self.head.eval()

    def arriving(self, images: Tensor) -> Tensor:
        """Returns what would arrive of ``images``, in 0 to 255, cleaned; differentiable."""
        return self._cleaner.sent(self.head(normalise(images)))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns what would arrive of ``images``, cleaned, for a decoder to learn from."""
        return self.arriving(images)


def _first(head: nn.Module) -> nn.Conv2d | None:
    """Returns the convolution that sees the image's colours, if there is one."""
    return next((m for m in head.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None)


class _Whitened(nn.Module):
    """A convolution's weight, expressed for patches whose pixels are uncorrelated and of unit deviation."""

    def __init__(self, images: Tensor, convolution: nn.Conv2d) -> None:
        super().__init__()
        size, stride = convolution.kernel_size, convolution.stride
        patches = F.unfold(normalise(images[:512]), size, stride=stride).transpose(1, 2).flatten(0, 1)
        patches = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        shrink = 1 / (values.clamp_min(0) + 1e-3 * values.max()).sqrt()
        self.forth: Tensor
        self.back: Tensor
        self.register_buffer("forth", vectors @ torch.diag(shrink) @ vectors.T)
        self.register_buffer("back", vectors @ torch.diag(1 / shrink) @ vectors.T)

    def forward(self, whitened: Tensor) -> Tensor:
        weight: Tensor = (whitened.flatten(1) @ self.forth).reshape(whitened.shape)
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Returns what ``forward`` makes ``weight`` of."""
        whitened: Tensor = (weight.flatten(1) @ self.back).reshape(weight.shape)
        return whitened
