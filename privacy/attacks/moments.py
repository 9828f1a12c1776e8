"""Statistics of features that a server sees arrive, and the way of a shadow's own features to them.

What is constant in the features (fixed noise) is taken out first. What is left is compared by products of neighbouring
values and of their squares, and by each channel's quantiles; each in units of what chance makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ensembler.privacy.decoder import as_map
from ensembler.privacy.scene import View
from ensembler.training.perturbation import NoiseKind, Perturbation
from ensembler.training.wire import fake_quantise

BATCH = 128
MAX_MOMENTS = 800  # rows of the moment matrices: channels times neighbours
LEVELS = 17  # quantiles of each channel
SAMPLED = 4096  # values of a channel for its quantiles
FLOORS = (2e-3, 2e-2)  # of chance, in deviations: below, a statistic is as good as equal
JUDGED = 4096  # images, for the distance that an attempt is judged by
SILENT = 0.25  # of a code's step: a channel whose deviation is below says next to nothing
TIED_SHARE = 0.02  # of values that are the smallest at their position, above which features end in a ReLU


class Cleaner:
    """Takes what is constant out of the features: fixed noise, as far as it can be seen in them.

    After a ReLU the smallest value that ever arrives at a position is the noise there, and it arrives often. Without
    one, the position's mean less that of its channel is the best guess. What a device drops arrives as 0.0 and is left
    out of both.

    A channel in which next to nothing else is left (a ReLU that never fires) is silenced, in what arrives and in what a
    shadow makes: in units of its own deviation any shadow would be millions away, and no other channel would count.
    """

    def __init__(self, view: View, observed: Tensor) -> None:
        self.codec = view.wire.feature_codec
        # What is drawn anew for every image is drawn for the shadow, too; of several learned tensors only the size
        # is known.
        law: NoiseKind = "gaussian" if view.noise == "learned" else view.noise
        std = view.noise_std if view.fresh_noise else 0.0
        self._drawn = Perturbation(noise=law, fresh=view.fresh_noise, std=std, dropout=view.dropout)
        there = torch.ones_like(observed, dtype=torch.bool)
        if view.dropout:
            there = observed.abs() > self.codec.scale / 2
        smallest = torch.where(there, observed, torch.inf).amin(0, keepdim=True).nan_to_num(posinf=0)
        tied = float(((observed <= smallest + self.codec.scale / 2) & there).sum() / there.sum().clamp_min(1))
        self.after_relu = tied > TIED_SHARE
        self.offset = torch.zeros_like(smallest)
        if view.noise_std > 0 and not view.fresh_noise:
            if self.after_relu:
                self.offset = smallest
            else:
                mean = (observed * there).sum(0, keepdim=True) / there.sum(0, keepdim=True).clamp_min(1)
                self.offset = mean - mean.flatten(2).mean(2).reshape(mean.shape[:2] + (1,) * (mean.dim() - 2))
        across = (0, 2, 3) if observed.dim() == 4 else tuple(range(observed.dim() - 1))  # tokens end in their channels
        heard = (observed - self.offset).std(across, keepdim=True) > SILENT * self.codec.scale
        self.heard = heard if heard.any() else torch.ones_like(heard)

    def clean(self, features: Tensor) -> Tensor:
        """Returns features without the offset, and nothing of the channels that are silent."""
        return torch.where(self.heard, features - self.offset, 0.0)

    def sent(self, features: Tensor) -> Tensor:
        """Returns what a head's own features become on the way: noise, dropout, the wire's codes, cleaned again."""
        drawn = self._drawn.draw(torch.zeros_like(self.offset[0]), len(features))
        return self.clean(fake_quantise(drawn.applied(features + self.offset), self.codec))


class Moments:
    """What features are compared by, in units of each channel's deviation."""

    def __init__(self, clean: Tensor) -> None:
        maps = as_map(clean)
        self.mean = maps.mean((0, 2, 3), keepdim=True)
        self.scale = maps.std((0, 2, 3), keepdim=True).clamp_min(1e-4)
        channels = maps.shape[1]
        widest = min(maps.shape[2:])
        self.reach = next((k for k in (5, 3) if channels * k * k <= MAX_MOMENTS and k <= widest), 1)
        self.levels = torch.linspace(0.02, 0.98, LEVELS, device=clean.device)
        batch = min(BATCH, max(1, len(maps) // 2))
        parts = [self._statistics(part) for part in torch.split(maps, batch) if len(part) == batch]
        self._targets = _mean_of(parts)
        if len(parts) > 2:
            self._chance = [torch.stack(values).std(0) for values in zip(*parts, strict=True)]
        else:
            self._chance = [value.abs().mean() * 0.1 for value in self._targets]
        self._chance = [chance.clamp_min(floor) for chance, floor in zip(self._chance, FLOORS, strict=True)]
        # What is nobody's fault: how far both halves of the same features are from each other.
        half = max(1, len(parts) // 2)
        self.chance = float(self._between(_mean_of(parts[:half]), _mean_of(parts[half:] or parts)))

    def units(self, maps: Tensor) -> Tensor:
        """Returns ``(B, C, h, w)`` with the mean 0 and the deviation 1 that each channel of what arrives has."""
        return (maps - self.mean) / self.scale

    def _statistics(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns products of z and of z^2 with every neighbour ``(C, 2 C, k, k)``, and quantiles ``(levels, C)``."""
        z = self.units(maps)
        edge = self.reach // 2
        inner = z[:, :, edge : z.shape[2] - edge, edge : z.shape[3] - edge] if edge else z
        powers = torch.cat([inner, inner.square()], 1).transpose(0, 1)
        # A correlation over images and positions at once, for every shift by up to ``edge``.
        products = F.conv2d(z.transpose(0, 1), powers) / (inner.shape[0] * inner.shape[2] * inner.shape[3])
        return products, self._quantiles(z.transpose(0, 1).flatten(1))

    def _quantiles(self, values: Tensor) -> Tensor:
        step = max(1, values.shape[1] // SAMPLED) | 1
        return torch.quantile(values[:, ::step][:, : 4 * SAMPLED], self.levels, dim=1)

    def distance(self, clean: Tensor) -> Tensor:
        """Returns how far the statistics of one batch ``clean`` are from these; differentiable."""
        return self._between(self._statistics(as_map(clean)), self._targets)

    def distance_of_all(self, parts: Sequence[Tensor]) -> float:
        """Returns how far the mean statistics of several batches are from these; the last may be smaller, and waits."""
        whole = [part for part in parts if len(part) == len(parts[0])]
        return float(self._between(_mean_of([self._statistics(as_map(part)) for part in whole]), self._targets))

    def _between(self, some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=some[0].device)
        for value, other, chance in zip(some, others, self._chance, strict=True):
            total = total + ((1 + ((value - other) / chance).square()).sqrt() - 1).mean()
        return total


def _mean_of(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the means of each statistic over several batches."""
    return [torch.stack(values).mean(0) for values in zip(*parts, strict=True)]
