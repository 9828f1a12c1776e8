"""From features back to images: the one decoder that every attack with a head of its own trains.

A linear map from each neighbourhood of features to the pixels under it, in closed form (ridge regression), and a
residual network that learns what the linear map misses, trained until images that it was not trained on no longer
improve. The warm start matters: a decoder that is not trained to its end makes a defence look better than it is.

The network paints all pixels under one number at once, or in steps of twice the size. Which of them reads more depends
on the client: in steps what a trained net's own features say, at once what a loss against information has left, which
the other learns too slowly. The oracle has both.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.metrics import ssim
from ensembler.training.models import placed

Features = Callable[[Tensor], Tensor]
Reconstruct = Callable[[Tensor], Tensor]

MAX_NEIGHBOURHOOD = 1600  # numbers that the linear map reads for one position
RIDGE = 1e-3
RIDGE_ROWS = 200_000
FITTED = 2000  # images that the linear map is made from
BATCH = 64
LEARNING_RATE = 1e-3
FLAT = 0.995  # a loss that is not below so much of the best one has not improved
CHUNK = 256
QUIET = 0.01  # of the channels' mean deviation: the least that a channel is scaled by
COOLING = 0.25  # the share of all steps, at their end, over which the learning rate falls, to COLD of what it was
COLD = 0.02
STEPWISE = 4  # pixels a side under one number of the map, from which on painting in steps is another way


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard attacks try.

    Attributes:
        steps: of a decoder's training, at most.
        patience: checks without progress after which its learning rate falls, and at the second time it ends.
        check_every: steps between checks on images that are not trained on.
        width: channels of the decoder's residual network.
        ssim_weight: of (1 - SSIM) beside the mean squared error.
    """

    steps: int = 1200
    patience: int = 3
    check_every: int = 100
    width: int = 48
    ssim_weight: float = 0.1


def as_map(features: Tensor) -> Tensor:
    """Returns features as ``(B, C, h, w)``; tokens ``(B, T, D)`` go on their square grid, a vector is one cell."""
    if features.dim() == 4:
        return features
    if features.dim() == 3:
        tokens = features[:, features.shape[1] - math.isqrt(features.shape[1]) ** 2 :]
        side = math.isqrt(tokens.shape[1])
        if side > 1:
            return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    return features.flatten(1)[..., None, None]


def pixels(images: Tensor) -> Tensor:
    """Returns uint8 images as float in [0, 1]."""
    return images.float() / 255


def is_small(feature_shape: tuple[int, ...], image_size: tuple[int, int]) -> bool:
    """Returns whether a map is so small that a decoder may paint in steps."""
    height, width = as_map(torch.empty(1, *feature_shape)).shape[2:]
    return min(image_size[0] // height, image_size[1] // width) >= STEPWISE


class Decoder(nn.Module):
    """Linear map plus residual network; ``(B, *feature_shape)`` -> images ``(B, 3, H, W)`` in [0, 1].

    Args:
        feature_shape: of one image.
        image_size: height and width in pixels.
        width: channels of the residual network.
        stepwise: it paints in steps, where a number of the map stands for ``STEPWISE`` pixels a side or more.

    Attributes:
        own_ssim: on images that it was not trained on, from the head that it was trained for; NaN before training.
        steps: of its training; as many as were allowed, if it was not flat by then.
    """

    def __init__(
        self, feature_shape: tuple[int, ...], image_size: tuple[int, int], width: int, *, stepwise: bool = False
    ) -> None:
        super().__init__()
        channels, height, width_cells = as_map(torch.empty(1, *feature_shape)).shape[1:]
        self.own_ssim = math.nan
        self.steps = 0
        self.cell = (max(1, image_size[0] // height), max(1, image_size[1] // width_cells))
        self.image_size = image_size
        self.reach = next(
            (k for k in (5, 3) if channels * k * k <= MAX_NEIGHBOURHOOD and min(height, width_cells) > 1), 1
        )
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        painted = 3 * self.cell[0] * self.cell[1]
        self.linear = nn.Conv2d(channels, painted, self.reach, padding=self.reach // 2, bias=False)
        self.bias = nn.Parameter(torch.zeros(painted))
        doublings = int(math.log2(min(self.cell))) if stepwise and is_small(feature_shape, image_size) else 0
        self.upwards = _upwards(channels + painted, width, doublings) if doublings else None
        if self.upwards is None:
            self.enter = nn.Conv2d(channels + painted, width, 3, padding=1)
            self.blocks = nn.ModuleList(_Residual(width) for _ in range(3))
            self.leave = _silent(nn.Conv2d(width, painted, 3, padding=1))
            self.smooth = nn.Sequential(
                nn.Conv2d(6, 24, 3, padding=1), nn.ReLU(), _silent(nn.Conv2d(24, 3, 3, padding=1))
            )

    def forward(self, features: Tensor) -> Tensor:
        """Returns images; not clamped while training, so that gradients reach pixels that overshoot."""
        x = (as_map(features) - self.mean) / self.scale
        linear = self.linear(x) + self.bias[:, None, None]
        first = self._painted(linear)
        images: Tensor = first + self._missed(torch.cat([x, linear], 1), first)
        return images if self.training else images.clamp(0, 1)

    def _missed(self, read: Tensor, first: Tensor) -> Tensor:
        """Returns what the linear map's images ``first`` lack, from the features and the map's own numbers."""
        if self.upwards is not None:
            missed: Tensor = self.upwards(read)
            return missed if missed.shape == first.shape else F.interpolate(missed, first.shape[-2:], mode="nearest")
        hidden = self.enter(read)
        for block in self.blocks:
            hidden = block(hidden)
        second = self._painted(self.leave(hidden))
        smoothed: Tensor = second + self.smooth(torch.cat([first, first + second], 1))
        return smoothed

    def _painted(self, cells: Tensor) -> Tensor:
        """Lays out each position's pixels: ``(B, 3 r s, h, w)`` -> ``(B, 3, H, W)``."""
        r, s = self.cell
        batch, _, height, width = cells.shape
        laid = (
            cells.view(batch, 3, r, s, height, width).permute(0, 1, 4, 2, 5, 3).reshape(batch, 3, height * r, width * s)
        )
        if laid.shape[-2:] != self.image_size:
            laid = F.interpolate(laid, self.image_size, mode="nearest")
        return laid

    @torch.no_grad()
    def fit_linear(self, features: Tensor, images: Tensor, ridge: float = RIDGE, *, every: bool = False) -> None:
        """Solves for the linear map: ridge regression over positions of ``features``, uint8 ``images``.

        Of large maps the first images alone are read, as many as have ``RIDGE_ROWS`` positions, unless ``every``.
        """
        self._scale_of(features)
        part = max(1, RIDGE_ROWS // as_map(features[:1])[0, 0].numel())
        read = len(images) if every else min(part, len(images))
        columns, painted = self.linear.weight[0].numel() + 1, len(self.bias)
        gram, towards = (torch.zeros(columns, wide, device=features.device) for wide in (columns, painted))
        for start in range(0, read, part):
            rows, cells = self._positions(features[start : start + part], images[start : start + part])
            gram += rows.T @ rows
            towards += rows.T @ cells
        gram.diagonal().add_(ridge * read * as_map(features[:1])[0, 0].numel())
        solution = torch.linalg.solve(gram, towards)
        self.linear.weight.copy_(solution[:-1].T.reshape(self.linear.weight.shape))
        self.bias.copy_(solution[-1])

    def _positions(self, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns of every position its neighbourhood's numbers and a one, and the pixels under it, as rows."""
        maps = as_map(features)
        x = (maps - self.mean) / self.scale
        height, width = maps.shape[2] * self.cell[0], maps.shape[3] * self.cell[1]
        target = pixels(images)
        if target.shape[-2:] != (height, width):
            target = F.interpolate(target, (height, width), mode="nearest")
        r, s = self.cell
        cells = F.unfold(target, (r, s), stride=(r, s)).transpose(1, 2).flatten(0, 1)
        rows = F.unfold(x, self.reach, padding=self.reach // 2).transpose(1, 2).flatten(0, 1)
        return torch.cat([rows, torch.ones_like(rows[:, :1])], 1), cells

    def fed_with(self, features: Tensor) -> Decoder:
        """Returns one that takes each channel of ``features`` for the same channel of what it was trained on."""
        other = copy.deepcopy(self)
        other._scale_of(features)
        return other

    def _scale_of(self, features: Tensor) -> None:
        maps = as_map(features)
        self.mean.copy_(maps.mean((0, 2, 3), keepdim=True))
        scale = maps.std((0, 2, 3), keepdim=True)
        # A channel that is constant here may speak later, and would outshout the others in units of its own deviation.
        self.scale.copy_(scale.clamp_min(max(1e-6, QUIET * float(scale.mean()))))


def _upwards(channels: int, width: int, doublings: int) -> nn.Sequential:
    """Returns a network from a map ``(B, channels, h, w)`` to images of ``2 ** doublings`` times its size.

    It has twice ``width`` channels at first, and two thirds, then half and half again, as the maps grow.
    """
    widths = [2 * width, *(max(8, 4 * width // 3 // 2**level) for level in range(doublings))]
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), _Residual(widths[0]), _Residual(widths[0])]
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.Conv2d(wide, 4 * narrow, 3, padding=1), nn.PixelShuffle(2), _Residual(narrow)]
    return nn.Sequential(*layers, nn.ReLU(), _silent(nn.Conv2d(widths[-1], 3, 3, padding=1)))


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """Returns a layer that gives zeros until it has learned: at first the linear map alone speaks."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return out


def train_decoder(
    features_of: Features,
    images: Tensor,
    feature_shape: tuple[int, ...],
    effort: Effort,
    generator: torch.Generator,
    tick: Callable[[], None] = lambda: None,
    *,
    stepwise: bool = False,
) -> Decoder:
    """Returns a decoder for the head ``features_of``, trained on ``images`` until it is flat.

    Args:
        features_of: from uint8 images to features; called anew for each batch, so noise may differ each time.
        images: ``(M, 3, H, W)`` uint8; a tenth is kept to see when training is flat.
        feature_shape: of one image.
        effort: how hard.
        generator: of the beginning and of shuffling.
        tick: called after every step.
        stepwise: see ``Decoder``.
    """

    def of(chosen: Tensor) -> Tensor:
        return features_of(images[chosen])

    return _trained(of, images, feature_shape, RIDGE, effort, generator, tick, stepwise=stepwise)


def train_on_pairs(
    features: Tensor,
    images: Tensor,
    ridge: float,
    effort: Effort,
    generator: torch.Generator,
    tick: Callable[[], None] = lambda: None,
) -> Decoder:
    """Returns a decoder that was trained on these pairs and no others, until it is flat.

    Args:
        features: ``(M, *feature_shape)``, as they arrived.
        images: ``(M, 3, H, W)`` uint8, of which they are; a tenth is kept to see when training is flat.
        ridge: of the linear map that it begins with.
        effort: how hard.
        generator: of the beginning and of shuffling.
        tick: called after every step.
    """
    return _trained(features.__getitem__, images, tuple(features.shape[1:]), ridge, effort, generator, tick)


def _trained(
    of: Features,
    images: Tensor,
    feature_shape: tuple[int, ...],
    ridge: float,
    effort: Effort,
    generator: torch.Generator,
    tick: Callable[[], None],
    *,
    stepwise: bool = False,
) -> Decoder:
    """Returns the decoder of the pairs that ``of`` gives for positions of ``images``."""
    kept = max(1, min(500, len(images) // 10))
    size = (images.shape[-2], images.shape[-1])
    torch.manual_seed(generator.initial_seed())
    decoder = placed(Decoder(feature_shape, size, effort.width, stepwise=stepwise), images.device)

    @torch.no_grad()
    def features(first: int, last: int) -> Tensor:
        return torch.cat([of(part) for part in torch.split(torch.arange(first, last, device=images.device), CHUNK)])

    last = min(len(images), kept + FITTED)
    decoder.fit_linear(features(kept, last), images[kept:last], ridge)
    held, held_features = images[:kept], features(0, kept)

    def loss() -> Tensor:
        drawn = torch.randint(len(images) - kept, (min(BATCH, len(images) - kept),), generator=generator)
        chosen = kept + drawn.to(images.device)
        with torch.no_grad():
            arrived = of(chosen)
        return _objective(decoder(arrived), pixels(images[chosen]), effort)

    decoder.steps = train_until_flat(decoder, loss, lambda: [_loss(decoder, held_features, held, effort)], effort, tick)
    decoder.own_ssim = float(ssim(painted(decoder, held_features), pixels(held)).mean())
    return decoder


def train_until_flat(
    decoder: nn.Module,
    loss: Callable[[], Tensor],
    held: Callable[[], Sequence[float]],
    effort: Effort,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Trains with Adam until images that are not trained on no longer improve; leaves the best state, in ``eval()``.

    Args:
        decoder: what is trained.
        loss: of a fresh batch; called in training mode.
        held: the losses on images that are not trained on; called in ``eval()`` mode. Training goes on while any of
            them falls, and the state is kept in which the first was lowest.
        effort: how many steps at most, and when it is flat.
        tick: called after every step.

    Returns:
        The steps that were made.
    """
    optimizer = torch.optim.Adam(decoder.parameters(), LEARNING_RATE)
    best = list(_held(decoder, held))
    best_state = _copied(decoder)
    stale, falls, step, rate = 0, 0, 0, LEARNING_RATE
    for step in range(1, effort.steps + 1):
        # Who ends because there are no more steps ends with small ones, as who is flat does.
        left = (effort.steps - step + 1) / (COOLING * effort.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, max(COLD, left))
        decoder.train()
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tick()
        if step % effort.check_every == 0 or step == effort.steps:
            values = _held(decoder, held)
            falling = any(now < FLAT * before for now, before in zip(values, best, strict=True))
            stale = 0 if falling else stale + 1
            if values[0] < best[0]:
                best_state = _copied(decoder)
            best = [min(pair) for pair in zip(values, best, strict=True)]
            if stale >= effort.patience:
                falls, stale = falls + 1, 0
                if falls == 2:
                    break
                rate /= 4
    decoder.load_state_dict(best_state)
    decoder.eval()
    return step


@torch.no_grad()
def _held(decoder: nn.Module, held: Callable[[], Sequence[float]]) -> Sequence[float]:
    """Returns ``held()``, in ``eval()`` mode."""
    decoder.eval()
    return held()


def _copied(decoder: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in decoder.state_dict().items()}


def _objective(painted: Tensor, target: Tensor, effort: Effort) -> Tensor:
    loss = F.mse_loss(painted, target)
    if effort.ssim_weight:
        loss = loss + effort.ssim_weight * (1 - ssim(painted, target).mean())
    return loss


def _loss(decoder: Decoder, features: Tensor, images: Tensor, effort: Effort) -> float:
    parts = [decoder(part) for part in torch.split(features, CHUNK)]
    return float(_objective(torch.cat(parts), pixels(images), effort))


@torch.no_grad()
def painted(decoder: nn.Module, features: Tensor) -> Tensor:
    """Returns ``decoder``'s images for ``features``, in parts."""
    return torch.cat([decoder(part) for part in torch.split(features, CHUNK)])
