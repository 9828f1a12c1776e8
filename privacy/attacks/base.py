"""What every attack is: a name, a threat model, and a way from a view of the scene to reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from ensembler.privacy.decoder import Decoder, Effort, Features, Reconstruct, train_decoder
from ensembler.privacy.film import Film
from ensembler.privacy.scene import Access, View
from ensembler.protocol.errors import EnsemblerError
from ensembler.training.fit import derived_seed

T = TypeVar("T")

OWN_SSIM = "own_ssim"  # in ``Finding.seen``: how well a decoder inverts the head that it was trained on


class AttackImpossibleError(EnsemblerError):
    """The attack cannot be run on this scene; the message says why. The report lists it as not run."""


class DivergedError(EnsemblerError):
    """The attack ended in what is no number: nothing that it shows means anything."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How hard an attack tries, and with which randomness.

    Attributes:
        effort: of decoders.
        bound_length: times as many steps as that, at most, for the oracle's: one that was cut short bounds nothing.
        steps: of what an attack optimises itself: shadow nets, moments, images.
        restarts: at most, of attacks that may end in a wrong minimum.
        num_nets: N of the scene, for what an attack does once for each.
        seed: of everything that the attack draws.
        tick: called after every step of any kind, with what it belongs to.
    """

    effort: Effort = field(default_factory=Effort)
    bound_length: int = 1
    steps: int = 400
    restarts: int = 6
    num_nets: int = 1
    seed: int = 0
    tick: Callable[[str], None] = lambda _: None

    @property
    def identity(self) -> Hashable:
        """What tells the findings of two plans apart."""
        return self.effort, self.bound_length, self.steps, self.restarts, self.num_nets, self.seed

    @property
    def bound_effort(self) -> Effort:
        """Of the decoders that are the bound."""
        return replace(self.effort, steps=self.bound_length * self.effort.steps)

    def generator(self, *parts: int) -> torch.Generator:
        """Returns a generator on the CPU for one piece of the attack."""
        return torch.Generator().manual_seed(derived_seed(self.seed, 5, *parts))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an attack brings back.

    Attributes:
        variants: from features as they arrive ``(B, *feature_shape)`` to images ``(B, 3, H, W)`` in [0, 1]. Where there
            are several by name, the audit takes the best, chosen with ground truth, and says so.
        seen: what the attacker itself can see of its success, for instance the losses of its restarts.
        gates: sanity checks by what they say; one that is False makes a low score inconclusive.
        images: judge on so many images only; None takes all.
        film: of each scene that the variants take, ``(B, film.frames, *feature_shape)``; None is the image, without the
            axis.
    """

    variants: dict[str, Reconstruct]
    seen: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, bool] = field(default_factory=dict)
    images: int | None = None
    film: Film | None = None


class Attack(Protocol):
    """One attack.

    Attributes:
        NAME: as on the command line and in reports.
        ACCESS: its threat model.
        SOURCE: paper and section, or ours.
        WORDS: what it does, for people, in a sentence.
    """

    @property
    def NAME(self) -> str: ...  # noqa: N802, D102
    @property
    def ACCESS(self) -> Access: ...  # noqa: N802, D102
    @property
    def SOURCE(self) -> str: ...  # noqa: N802, D102
    @property
    def WORDS(self) -> str: ...  # noqa: N802, D102

    def ticks(self, plan: Plan) -> int:
        """Returns how often ``plan.tick`` will be called, at most."""

    def run(self, view: View, plan: Plan) -> Finding:
        """Attacks.

        Args:
            view: what its threat model grants.
            plan: how hard.

        Raises:
            AttackImpossibleError: not on this scene.
        """


def needed(value: T | None, what: str) -> T:
    """Returns what a view grants.

    Raises:
        AttackImpossibleError: the view does not grant it.
    """
    if value is None:
        raise AttackImpossibleError(f"this attack needs {what}")
    return value


def nets_name(nets: Sequence[int]) -> str:
    """Returns the name of a variant that goes through these of the server's nets."""
    return "nets " + ", ".join(str(index + 1) for index in sorted(nets))


def decoder_of(features_of: Features, view: View, plan: Plan, *part: int, stepwise: bool = False) -> Decoder:
    """Returns the decoder of a head, trained on the attacker's images; ``part`` tells its randomness apart."""
    return train_decoder(
        features_of,
        view.auxiliary,
        view.wire.feature_shape,
        plan.effort,
        plan.generator(*part),
        lambda: plan.tick("decoder"),
        stepwise=stepwise,
    )
