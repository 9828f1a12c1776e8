"""Named sets of options for ``ensembler train --preset``, each for one aim; what was measured of them is in the docs.

``obfuscate`` is the paper's client, whose images a determined server reads (docs/privacy-audit.md). ``strong`` and
``balanced`` let the device say little: an encoder as wide as a quarter, or a half, of the net's work allows, few codes
for an image, and a loss by which even those tell little more than the task needs (docs/privacy-presets.md). Start
reading at ``preset_options``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ensembler.protocol.errors import ConfigError
from ensembler.training.models import ArchSpec, Bottleneck, build_net

CELLS = 4  # the side of the map that is sent
BITS = 2
WIDTHS = range(8, 1025, 8)  # of an encoder's first convolutions


@dataclass(frozen=True, kw_only=True)
class Terse:
    """What a preset lets the device do and say.

    Attributes:
        head_share: of the net's multiply-accumulates, at most, on the device.
        channels: of the map that is sent.
        information_weight: of what the codes tell beyond the class.
    """

    head_share: float
    channels: int
    information_weight: float


STRONG = Terse(head_share=0.25, channels=16, information_weight=0.1)  # 64 bytes
BALANCED = Terse(head_share=0.5, channels=24, information_weight=0.1)  # 96 bytes


def preset_options(name: str, arch: ArchSpec) -> dict[str, Any]:
    """Returns the fields of ``TrainConfig`` that a preset sets.

    Args:
        name: of ``PRESETS``.
        arch: the net, cut where it is to be, without a bottleneck.

    Raises:
        ConfigError: an unknown name, or a net and a cut for which the preset cannot be made.
    """
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: choose {', '.join(PRESETS)}")
    return PRESETS[name](arch)


def _obfuscate(arch: ArchSpec) -> dict[str, Any]:
    del arch
    return {}


def _terse(arch: ArchSpec, *, name: str, terse: Terse) -> dict[str, Any]:
    shape = _shape(build_net(arch).head, arch)
    halvings = len(shape) == 3 and _halvings(shape[1], shape[2])
    if not halvings:
        raise ConfigError(
            f"--preset {name}: features of shape {shape} cannot be halved down to {CELLS}x{CELLS} cells, as those with "
            f"sides of {2 * CELLS}, {4 * CELLS} or {8 * CELLS} can; choose another --head-end (ensembler cuts lists "
            "them), resize the images, for instance to 32x32 or 64x64, or give --bottleneck, --encoder and "
            "--information-weight in place of the preset"
        )

    def encoder(width: int) -> tuple[int, ...]:
        return tuple(width * 2**level for level in range(halvings))

    def macs(width: int) -> int:
        bottleneck = Bottleneck(channels=terse.channels, stride=1, bits=BITS, encoder=encoder(width))
        return _macs(build_net(replace(arch, bottleneck=bottleneck)).head, _image(arch))

    widths = [width for width in WIDTHS if max(encoder(width)) <= WIDTHS[-1]]
    allowed = bisect_right(widths, terse.head_share * net_macs(arch), key=macs)
    if not allowed:
        raise ConfigError(
            f"--preset {name}: no encoder after this cut fits into {100 * terse.head_share:.0f}% of the net's work; "
            "choose an earlier --head-end, or give --bottleneck and --encoder"
        )
    return {
        "bottleneck": (terse.channels, 1, BITS),
        "encoder": encoder(widths[allowed - 1]),
        "information_weight": terse.information_weight,
        # Noise that never changes is undone by whoever sees a few messages, and heads unlike others keep nothing back.
        "noise_std": 0.0,
        "reg_weight": 0.0,
        "head_for": "all",
    }


PRESETS: dict[str, Callable[[ArchSpec], dict[str, Any]]] = {
    "obfuscate": _obfuscate,
    "balanced": partial(_terse, name="balanced", terse=BALANCED),
    "strong": partial(_terse, name="strong", terse=STRONG),
}


def head_share(arch: ArchSpec) -> float:
    """Returns the device's part of the undefended net's multiply-accumulates, 0 to 1, its tail not counted.

    Args:
        arch: with the bottleneck, if there is one; the net is compared without.
    """
    return _macs(build_net(arch).head, _image(arch)) / net_macs(arch)


def net_macs(arch: ArchSpec) -> int:
    """Returns the multiply-accumulates of a net without its tail and without a bottleneck, of one image."""
    plain = build_net(replace(arch, bottleneck=None))
    return _macs(plain.head, _image(arch)) + _macs(plain.body, _shape(plain.head, arch))


def _halvings(height: int, width: int) -> int:
    """Returns how often a map is halved until its shorter side has ``CELLS`` cells; 0 where that cannot be."""
    count = 0
    while min(height, width) > CELLS and height % 2 == width % 2 == 0:
        height, width, count = height // 2, width // 2, count + 1
    return count if min(height, width) == CELLS else 0


def _image(arch: ArchSpec) -> tuple[int, ...]:
    return (3, *arch.image_size)


@torch.no_grad()
def _shape(module: nn.Module, arch: ArchSpec) -> tuple[int, ...]:
    shape: torch.Size = module.eval()(torch.zeros(1, *_image(arch))).shape
    return tuple(shape[1:])


@torch.no_grad()
def _macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns the multiply-accumulates of one image."""
    with FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, *shape))
    return int(counter.get_total_flops()) // 2
