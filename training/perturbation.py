"""What a device does to its features before it sends them: noise, and dropout that stays on.

The order is head, noise, dropout, wire. Start reading at ``Perturbation``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NoiseKind = Literal["gaussian", "uniform", "learned"]

LEARNED_TENSORS = 8  # of learned noise, where every image gets one of several


@dataclass(frozen=True)
class Draw:
    """What one batch gets.

    Attributes:
        noise: ``(B, C, h, w)``, or ``(C, h, w)`` for every image the same.
        which: ``(B,)`` int64, where an image's noise is one of several tensors.
        keep: ``(B, C, h, w)`` bool: False where a feature is dropped; None keeps all.
    """

    noise: Tensor
    which: Tensor | None
    keep: Tensor | None

    def applied(self, features: Tensor) -> Tensor:
        """Returns what is sent for ``features`` ``(B, C, h, w)``."""
        sent = features + self.noise
        return sent if self.keep is None else sent * self.keep


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """A kind of noise and of dropout; everything about them but the secret values.

    Attributes:
        noise: ``gaussian`` (Ensembler, Section III-A); ``uniform`` in ``[-m, m]``, as C2PI adds it (Section III-A),
            with ``m = std * sqrt(3)``; or ``learned`` against a frozen net (Shredder), see ``shredder``.
        fresh: every image gets noise of its own: drawn anew, or one of ``LEARNED_TENSORS`` learned tensors. Else there
            is one tensor, broadcast over the batch.
        std: the standard deviation of the noise; for learned noise the one that it starts from and keeps up.
        dropout: the share of the features that is sent as 0.0. Which ones is drawn anew for every image, at inference
            too. The others are not scaled up, since training and inference drop alike.
    """

    noise: NoiseKind = "gaussian"
    fresh: bool = False
    std: float = 0.0
    dropout: float = 0.0

    @property
    def tensors(self) -> int:
        """How many learned tensors an image's noise is one of; 0 where there is no such choice."""
        return LEARNED_TENSORS if self.noise == "learned" and self.fresh else 0

    def start(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Returns the fixed noise for features of ``shape``, or what learned noise starts from.

        Returns:
            ``shape``; with several learned tensors ``(tensors, *shape)``; zeros where every image's is drawn anew.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.noise == "learned":
            size = (self.tensors, *shape) if self.tensors else shape
            # The Laplace law, from which Shredder starts: the difference of two exponential ones.
            exponential = -torch.log1p(-torch.rand((2, *size), generator=generator))
            return (exponential[0] - exponential[1]) * (self.std / math.sqrt(2))
        if self.fresh:
            return torch.zeros(shape)
        return self._values(shape, generator)

    def draw(self, fixed: Tensor, count: int, generator: torch.Generator | None = None) -> Draw:
        """Draws what ``count`` images get.

        Args:
            fixed: the noise tensor or tensors, as ``start`` shapes them.
            count: B.
            generator: on the CPU; None takes the device's own.
        """
        device = fixed.device
        drawn_on = device if generator is None else generator.device
        shape = fixed.shape[1:] if self.tensors else fixed.shape
        noise, which, keep = fixed, None, None
        if self.tensors:
            which = torch.randint(len(fixed), (count,), generator=generator, device=drawn_on).to(device)
            noise = fixed[which]
        elif self.fresh and self.std > 0:
            noise = self._values((count, *shape), generator, drawn_on).to(device)
        if self.dropout > 0:
            keep = (torch.rand((count, *shape), generator=generator, device=drawn_on) >= self.dropout).to(device)
        return Draw(noise, which, keep)

    def _values(
        self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | None = None
    ) -> Tensor:
        if self.noise == "uniform":
            return (2 * torch.rand(shape, generator=generator, device=device) - 1) * (self.std * math.sqrt(3))
        return torch.randn(shape, generator=generator, device=device) * self.std
