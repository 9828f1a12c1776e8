"""Inverse networks by depth: INA, EINA and DINA of C2PI (Zhang et al.), which read the output of any layer of a net.

The attacker owns the net and images of the same kind, and trains a decoder on (features, image) pairs. The three differ
in the decoder alone. INA has plain convolutions, EINA residual blocks (ResSFL, Li et al. 2022). DINA (C2PI, Section
III-B) undoes the net piece by piece: it has one inverse block for each sub-block of the layers before the cut, and what
goes into each block is pulled towards the feature map that the net has at that place, the distillation point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.attacks.base import AttackImpossibleError
from ensembler.privacy.decoder import CHUNK, Effort, as_map, painted, pixels, train_until_flat
from ensembler.protocol.errors import ConfigError
from ensembler.training.architectures import BasicBlock
from ensembler.training.models import normalise, placed
from ensembler.training.splits import TracedNet

KINDS = ("ina", "eina", "dina")
COEFFICIENTS = ("c1", "c2")
BATCH = 32

Shape = tuple[int, int, int]  # (C, h, w) of one image's map
# From uint8 images to the maps at the distillation points, from the image on, and last the features as they arrive.
Maps = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Front:
    """The layers of a net before a cut, in eval mode and frozen, as one or several pieces.

    Attributes:
        pieces: each takes what the one before it returns, the first normalised images ``(B, 3, H, W)``.
        shapes: of one image's maps: the image's, then what each piece returns.
    """

    pieces: tuple[nn.Module, ...]
    shapes: tuple[Shape, ...]

    def maps(self, x: Tensor) -> list[Tensor]:
        """Returns what each piece makes of normalised images, as maps ``(B, C, h, w)``."""
        found = []
        for piece in self.pieces:
            x = piece(x)
            found.append(as_map(x))
        return found

    def noisy(self, magnitude: float, generator: torch.Generator) -> Maps:
        """Returns the same of uint8 images, with noise on what the last piece returns, see ``noised``."""

        def maps_of(images: Tensor) -> list[Tensor]:
            found = self.maps(normalise(images).to(memory_format=torch.channels_last))
            return [*found[:-1], noised(found[-1], magnitude, generator)]

        return maps_of


def whole_front(net: TracedNet, cut: str) -> Front:
    """Returns the layers before ``cut`` in one piece.

    Raises:
        ConfigError: no valid cut.
    """
    return _front(net, [cut])


def sub_blocks(net: TracedNet, cut: str) -> Front:
    """Returns the layers before ``cut`` as DINA divides them: each piece ends with a ReLU (C2PI, Section III-B).

    What follows the last ReLU is a piece of its own. Inside a residual block more than one tensor crosses, so it is one
    piece, though it has two ReLUs.

    Raises:
        AttackImpossibleError: the net has no ReLU after which one tensor crosses.
        ConfigError: no valid cut.
    """
    cuts = net.cuts
    if not any(found.relu for found in cuts):
        raise AttackImpossibleError(
            "DINA divides a net at its ReLUs, and this one has none after which a single tensor crosses; eina and mla "
            "need none"
        )
    before = []
    for found in cuts:
        if cut in found.names:
            break
        if found.relu:
            before.append(found.names[0])
    return _front(net, [*before, cut])


def _front(net: TracedNet, ends: Sequence[str]) -> Front:
    named = {name: found.shape for found in net.cuts for name in found.names}
    pieces = [piece.eval().requires_grad_(False) for piece in net.chain(ends)[:-1]]
    shapes = [map_shape(named[end]) for end in ends]
    return Front(tuple(pieces), ((3, *net.image_size), *shapes))


def map_shape(shape: tuple[int, ...]) -> Shape:
    """Returns the shape of one image's features as a map, see ``as_map``."""
    _, channels, height, width = as_map(torch.empty(1, *shape)).shape
    return channels, height, width


def coefficients(points: int, scheme: str = "c1") -> tuple[float, ...]:
    """Returns the weights of Eq. 1 (C2PI): that of the image, then of each distillation point, from the image on.

    Args:
        points: how many distillation points there are.
        scheme: ``c1`` as in the paper's experiments: 1, 3, then doubling, so that every inverse block heeds its own
            point most; ``c2``: all 1.

    Raises:
        ConfigError: another scheme.
    """
    if scheme not in COEFFICIENTS:
        raise ConfigError(f"coefficients {scheme}: choose {' or '.join(COEFFICIENTS)}")
    if scheme == "c2":
        return (1.0,) * (points + 1)
    return (1.0, *(3.0 * 2**index for index in range(points)))


class Inverse(nn.Module):
    """A decoder in blocks, the deepest first; features ``(B, *feature_shape)`` -> images ``(B, 3, H, W)`` in [0, 1].

    Args:
        blocks: from the features to the image.
        distilled: whether what goes from block to block is compared with maps of the net.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, distilled: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.distilled = distilled

    def forward(self, features: Tensor) -> Tensor:
        """Returns images."""
        return self.stations(features)[0]

    def stations(self, features: Tensor) -> list[Tensor]:
        """Returns the images, and if ``distilled`` what goes into each block but the deepest, from the image on."""
        x = as_map(features)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        found[-1] = torch.sigmoid(found[-1])
        return found[::-1] if self.distilled else found[-1:]


class InverseBlock(nn.Module):
    """DINA's basic inverse block: a residual block, enlarging if need be, a 3x3 convolution with dilation 2.

    Args:
        given: the shape of the maps that it is given, what the sub-block returns.
        wanted: the shape that it returns, of what the sub-block is given.
    """

    def __init__(self, given: Shape, wanted: Shape) -> None:
        super().__init__()
        channels = max(given[0], wanted[0])
        self.size = wanted[1:] if wanted[1:] != given[1:] else None
        self.residual = BasicBlock(given[0], channels, 1)
        self.dilated = nn.Conv2d(channels, wanted[0], 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, *given)`` to ``(B, *wanted)``."""
        x = self.residual(x)
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="nearest")
        out: Tensor = self.dilated(x)
        return out


class Enlarge(nn.Module):
    """Enlarges maps to a height and width, by repeating values."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C, h, w)`` to ``(B, C, *size)``."""
        return F.interpolate(x, self.size, mode="nearest")


def build_inverse(kind: str, shapes: Sequence[Shape], width: int) -> Inverse:
    """Returns an untrained decoder, from torch's global generator.

    Args:
        kind: one of ``KINDS``.
        shapes: of a ``Front``; INA and EINA look at the first and the last.
        width: channels of INA and EINA, which do not know the net's own.

    Raises:
        ConfigError: another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"attack {kind}: choose {', '.join(KINDS)}")
    image, features = shapes[0], shapes[-1]
    if kind == "dina":
        steps = list(zip(shapes[1:], shapes, strict=False))
        return Inverse([InverseBlock(given, wanted) for given, wanted in reversed(steps)], distilled=True)
    unit: Callable[[int], nn.Module] = _residual if kind == "eina" else _plain
    blocks = [_convolved(features[0], width), unit(width)]
    size = features[1:]
    while size != image[1:]:
        size = (_doubled(size[0], image[1]), _doubled(size[1], image[2]))
        blocks += [Enlarge(size), unit(width)]
    return Inverse([*blocks, nn.Conv2d(width, 3, 3, padding=1)], distilled=False)


def _doubled(side: int, wanted: int) -> int:
    return min(2 * side, wanted) if side < wanted else wanted


def _convolved(given: int, wanted: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU())


def _plain(width: int) -> nn.Module:
    """INA's: as many convolutions as a residual block, without its shortcut."""
    return nn.Sequential(_convolved(width, width), _convolved(width, width))


def _residual(width: int) -> nn.Module:
    return BasicBlock(width, width, 1)


def noised(features: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Returns ``features`` with noise, uniform in [-magnitude, magnitude], fresh for every value (C2PI, Section III-A).

    Args:
        features: any shape.
        magnitude: 0 or more.
        generator: on the features' device.
    """
    if magnitude == 0:
        return features
    return features + torch.empty_like(features).uniform_(-magnitude, magnitude, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """A trained decoder.

    Attributes:
        decoder: in eval mode.
        steps: of its training.
        held_losses: on images that it was not trained on: of the image, then at each distillation point.
    """

    decoder: Inverse
    steps: int
    held_losses: tuple[float, ...]

    def reconstruct(self, features: Tensor) -> Tensor:
        """Returns images ``(B, 3, H, W)`` in [0, 1] for features as they arrive."""
        return painted(self.decoder, features)


def train_inversion(
    kind: str,
    shapes: Sequence[Shape],
    maps_of: Maps,
    images: Tensor,
    effort: Effort,
    *,
    seed: int,
    scheme: str = "c1",
    tick: Callable[[], None] = lambda: None,
) -> Inversion:
    """Trains a decoder of features until it is flat: the one loop of INA, EINA and DINA.

    The loss is Eq. 1 of C2PI, each distance as the mean squared error over its values. Without distillation points the
    image's term is all that is left of it, the loss of INA and EINA.

    Args:
        kind: one of ``KINDS``.
        shapes: the image's, then of each map of ``maps_of``; INA and EINA look at the first and the last.
        maps_of: called anew for each batch, so noise may differ each time. INA and EINA use the last map alone.
        images: the attacker's, ``(M, 3, H, W)`` uint8, on the device that trains; a tenth is kept to see when training
            is flat. It is flat when neither the image nor any distillation point improves on those.
        effort: how many steps, and the width of INA and EINA.
        seed: of the beginning and of shuffling.
        scheme: see ``coefficients``.
        tick: called after every step.
    """
    kept = max(1, min(500, len(images) // 10))
    held, train = images[:kept], images[kept:]
    torch.manual_seed(seed)
    decoder = placed(build_inverse(kind, shapes, effort.width), images.device)
    shuffling = torch.Generator().manual_seed(seed)
    weights = coefficients(len(shapes) - 2 if decoder.distilled else 0, scheme)

    @torch.no_grad()
    def known(chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the features, and what Eq. 1 compares with: the images, then the maps between."""
        *between, features = maps_of(chosen)
        return features, [pixels(chosen), *between]

    def errors(features: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """Returns the terms of Eq. 1 without their weights."""
        return [F.mse_loss(at, to) for at, to in zip(decoder.stations(features), targets, strict=False)]

    def loss() -> Tensor:
        chosen = torch.randint(len(train), (min(BATCH, len(train)),), generator=shuffling).to(images.device)
        terms = errors(*known(train[chosen]))
        return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()

    # The maps between are made anew each time: of a deep net they would fill the memory.
    held_parts = [(part, known(part)[0]) for part in torch.split(held, CHUNK)]

    def held_losses() -> list[float]:
        sums = [0.0] * len(weights)
        for part, features in held_parts:
            targets = known(part)[1] if decoder.distilled else [pixels(part)]
            for index, term in enumerate(errors(features, targets)):
                sums[index] += len(part) * float(term)
        return [total / kept for total in sums]

    steps = train_until_flat(decoder, loss, held_losses, effort, tick)
    with torch.no_grad():
        final = held_losses()
    return Inversion(decoder=decoder, steps=steps, held_losses=tuple(final))
