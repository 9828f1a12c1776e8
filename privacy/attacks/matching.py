"""Distribution matching: a head whose features have the statistics of those that arrive, and its decoder.

The server knows the architecture of the head and owns images of the same kind. It searches for weights with which its
own images give features that are distributed as the observed ones: means, covariances and third moments of
neighbouring values, and quantiles of each channel. It needs no query, no label, no server net and never the selector.
A head with the same statistics is nearly the client's own, and a decoder trained on it reads the client's images.

Related: FORA (Xu et al., CVPR 2024), PCAT (Gao and Zhang, USENIX Security 2023), SDAR (Zhu et al., NDSS 2025).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ensembler.privacy.attacks.base import Finding, Plan, decoder_of, needed
from ensembler.privacy.decoder import CHUNK, as_map, painted
from ensembler.privacy.scene import Access, View
from ensembler.training.models import build_net, normalise
from ensembler.training.wire import fake_quantise

BATCH = 128
MAX_MOMENTS = 800  # rows of the moment matrices: channels times neighbours
LEVELS = 17  # quantiles of each channel
SAMPLED = 4096  # values of a channel for its quantiles
FLOORS = (2e-3, 2e-2)  # of chance, in deviations: below, a statistic is as good as equal
RATE, RATE_AGAIN, RATE_END = 0.05, 0.02, 0.001
JUDGED_BATCHES = 10
MATCHED = 1.2  # times the distance that batches of the observed features themselves have
RELU_SHARE = 0.02  # of zeros, above which features are taken to end in a ReLU


class Matching:
    """See the module.

    Args:
        observed: use the features of so many images only.
    """

    ACCESS = Access.QUERY_FREE
    SOURCE = "ours; related: FORA, PCAT, SDAR"

    def __init__(self, observed: int | None = None) -> None:
        self.NAME = "distribution-matching" + ("" if observed is None else f"-{observed}")
        seen = "" if observed is None else f" of {observed} images"
        self.WORDS = (
            f"finds a head whose features are distributed as those{seen} that arrive, and trains a decoder on it"
        )
        self._limit = observed

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return 3 * plan.steps * plan.restarts + plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        observed = needed(view.observed, "observed features")[: self._limit]
        torch.manual_seed(plan.generator(0).initial_seed())
        cleaner = Cleaner(view, observed)
        clean = cleaner.clean(observed)
        target = Moments(clean)
        found: list[tuple[float, Shadow]] = []
        for restart in range(plan.restarts):
            found.append(self._attempt(Shadow(view, cleaner, plan.generator(1, restart)), target, plan))
            if found[-1][0] <= MATCHED * target.chance:
                break  # the attacker sees that it is there
        final, head = min(found, key=lambda attempt: attempt[0])
        head.settle(view.auxiliary)
        decoder = decoder_of(head.features, view, plan, 2)
        return Finding(
            variants={"": lambda features: painted(decoder, cleaner.clean(features))},
            seen={"distances": [round(distance, 4) for distance, _ in found], "chance": round(target.chance, 4)},
            gates={"the matched head has the statistics of what arrives": final <= MATCHED * target.chance},
        )

    @staticmethod
    def _attempt(head: Shadow, target: Moments, plan: Plan) -> tuple[float, Shadow]:
        """Searches from one start; returns how near it came, and the head."""
        head.match(target, plan.steps, RATE, RATE_AGAIN, plan)
        # The statistics of natural images hardly change with their sign, so a start may end at the negative.
        mirror = head.negated()
        for either in (head, mirror):  # both alike, or the one that had more steps would seem nearer
            either.match(target, plan.steps // 2, RATE_AGAIN, RATE_AGAIN, plan)
        best = min(head, mirror, key=lambda shadow: shadow.distance(target))
        best.match(target, plan.steps, RATE_AGAIN, RATE_END, plan)
        return best.distance(target), best


class Cleaner:
    """Takes what is constant out of the features: fixed noise, as far as it can be seen in them.

    After a ReLU the smallest value that ever arrives at a position is the noise there. Without one, the position's mean
    less that of its channel is the best guess.
    """

    def __init__(self, view: View, observed: Tensor) -> None:
        self.codec = view.wire.feature_codec
        self.fresh_std = view.noise_std if view.fresh_noise else 0.0
        probe = build_net(view.arch).head.to(view.device).train()
        with torch.no_grad():
            zeros = float((probe(normalise(view.auxiliary[:CHUNK])) == 0).float().mean())
        self.after_relu = zeros > RELU_SHARE
        self.offset = torch.zeros_like(observed[:1])
        if view.noise_std > 0 and not view.fresh_noise:
            if self.after_relu:
                self.offset = observed.amin(0, keepdim=True)
            else:
                mean = observed.mean(0, keepdim=True)
                self.offset = mean - mean.flatten(2).mean(2).reshape(mean.shape[:2] + (1,) * (mean.dim() - 2))

    def clean(self, features: Tensor) -> Tensor:
        """Returns features without the offset."""
        return features - self.offset

    def sent(self, features: Tensor) -> Tensor:
        """Returns what a head's own features become on the way: noise, the wire's codes, cleaned again."""
        noised = features + self.offset
        if self.fresh_std:
            noised = noised + self.fresh_std * torch.randn_like(features)
        return self.clean(fake_quantise(noised, self.codec))


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
        parts = [self._statistics(part) for part in torch.split(maps, BATCH) if len(part) == BATCH or len(maps) < BATCH]
        self._targets = [torch.stack(values).mean(0) for values in zip(*parts, strict=True)]
        if len(parts) > 2:
            self._chance = [torch.stack(values).std(0) for values in zip(*parts, strict=True)]
        else:
            self._chance = [value.abs().mean() * 0.1 for value in self._targets]
        self._chance = [chance.clamp_min(floor) for chance, floor in zip(self._chance, FLOORS, strict=True)]
        own = [self.distance(part) for part in torch.split(clean, BATCH)[:JUDGED_BATCHES]]
        self.chance = float(torch.stack(own).mean())  # the distance that is nobody's fault

    def _statistics(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns products of z and of z^2 with every neighbour ``(C, 2 C, k, k)``, and quantiles ``(levels, C)``."""
        z = (maps - self.mean) / self.scale
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
        """Returns how far the statistics of ``clean`` are from these."""
        total = torch.zeros((), device=clean.device)
        for value, target, chance in zip(self._statistics(as_map(clean)), self._targets, self._chance, strict=True):
            total = total + ((1 + ((value - target) / chance).square()).sqrt() - 1).mean()
        return total


class Shadow:
    """A head of the known architecture, to be matched; its first convolution is searched in whitened patches."""

    def __init__(self, view: View, cleaner: Cleaner, generator: torch.Generator) -> None:
        self._cleaner = cleaner
        self._images = view.auxiliary
        self._generator = generator
        torch.manual_seed(generator.initial_seed())
        self.head = build_net(view.arch).head.to(view.device).train()
        first = next((m for m in self.head.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None)
        if first is not None:
            parametrize.register_parametrization(first, "weight", _Whitened(view.auxiliary, first), unsafe=True)

    def negated(self) -> Shadow:
        """Returns a copy that sees the negatives of images."""
        other = copy.deepcopy(self)
        for name, weight in other.head.named_parameters():
            if name.endswith(".weight.original"):  # of the whitened convolution, the only one that is parametrised
                weight.data.neg_()
        return other

    def match(self, target: Moments, steps: int, rate: float, last_rate: float, plan: Plan) -> None:
        """Descends the distance to ``target`` for ``steps``, the learning rate falling along a cosine."""
        optimizer = torch.optim.Adam(self.head.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, last_rate)
        for _ in range(steps):
            loss = target.distance(self._sent())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            plan.tick("matching")

    @torch.no_grad()
    def distance(self, target: Moments) -> float:
        """Returns the distance that the attacker sees, over several batches."""
        return sum(float(target.distance(self._sent())) for _ in range(JUDGED_BATCHES)) / JUDGED_BATCHES

    def _sent(self) -> Tensor:
        chosen = torch.randint(len(self._images), (BATCH,), generator=self._generator).to(self._images.device)
        return self._cleaner.sent(self.head(normalise(self._images[chosen])))

    @torch.no_grad()
    def settle(self, images: Tensor) -> None:
        """Fixes the batch-norm statistics to those over all the images, and the head with them."""
        norms = [m for m in self.head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for part in torch.split(images, CHUNK):
            self.head(normalise(part))
        self.head.eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns what arrives for uint8 ``images``, cleaned."""
        clean: Tensor = self._cleaner.sent(self.head(normalise(images)))
        return clean


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
        self.register_buffer("forth", vectors @ torch.diag(shrink) @ vectors.T)

    def forward(self, whitened: Tensor) -> Tensor:
        weight: Tensor = (whitened.flatten(1) @ self.forth).reshape(whitened.shape)
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A fresh weight is as good a start in one space as in the other."""
        return weight.clone()
