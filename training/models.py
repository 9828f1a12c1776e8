"""From an architecture's name to a net cut into head, body and tail: ``build_net``.

A net is one of ``architectures.ARCHITECTURES`` or a user's own, ``package.module:function``. ``splits`` cuts it by the
names of its parts; a bottleneck, if asked for, is put at the cut.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ensembler.protocol.codec import AffineCodec, known_bits
from ensembler.protocol.errors import ConfigError
from ensembler.training.architectures import ARCHITECTURES
from ensembler.training.operators import Channels, Hearing
from ensembler.training.splits import NodeFacts, TracedNet, traced, widened

M = TypeVar("M", bound=nn.Module)

# The device hands uint8 pixels to the head: x = (pixel - 128) / 64 is an exact 8-bit affine code (scale 2^-6, zero
# point 128), so the quantised head takes the pixels as they are, and zero padding is mid-grey.
PIXEL_SCALE = 1 / 64
PIXEL_ZERO_POINT = 128
# The step between two codes that loses least of a normal variable (J. Max, 1960), in standard deviations; for 8 bits
# the range is +-4, beyond which a step more precise gains nothing.
NORMAL_STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 8 / 255}


def normalise(pixels: Tensor) -> Tensor:
    """Returns the head's input ``(B, 3, H, W)`` float32 for uint8 pixels of the same shape."""
    return (pixels.float() - PIXEL_ZERO_POINT) * PIXEL_SCALE


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What a trained bottleneck at the cut leaves of the features.

    Attributes:
        channels: k.
        stride: of the last convolution.
        bits: of one code.
        encoder: channels of what comes before that convolution: for each number two 3x3 convolutions, the first of
            which halves the resolution. What few codes can say depends on how well they are chosen.
    """

    channels: int
    stride: int
    bits: int
    encoder: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.encoder) > 6 or not all(1 <= channels <= 4096 for channels in self.encoder):
            given = ",".join(map(str, self.encoder))
            raise ConfigError(f"--encoder {given}: give channels (1 to 4096), at most 6 numbers, for instance 40,80")
        if not 1 <= self.channels <= 4096 or not 1 <= self.stride <= 64 or self.bits not in NORMAL_STEP:
            raise ConfigError(
                f"--bottleneck {self.channels},{self.stride},{self.bits}: give channels (1 to 4096), stride (1 to 64) "
                f"and bits ({known_bits()}), for instance 8,4,2"
            )

    @property
    def shrinks(self) -> int:
        """By how much the resolution falls; the stride of the transposed convolution that opens each body."""
        return int(self.stride * 2 ** len(self.encoder))

    @property
    def codec(self) -> AffineCodec:
        """The codec of its output: fixed by construction, so it says nothing of anybody.

        Batch norm makes each channel a variable of about unit deviation around the middle of the codes.
        """
        return AffineCodec(
            scale=float(np.float32(NORMAL_STEP[self.bits])), zero_point=2 ** (self.bits - 1) - 1, bits=self.bits
        )


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """Which net, for which images, cut where.

    Attributes:
        name: a key of ``ARCHITECTURES``, or ``package.module:function``.
        image_size: height and width in pixels.
        num_classes: K.
        stem_pool: max-pool after a ResNet's first convolution; off in the paper's CIFAR-100 and face settings.
        head_end: the head's last part; None takes the architecture's.
        tail_start: the tail's first part; None takes the architecture's, or the last that is possible.
        bottleneck: at the cut, or None.
    """

    name: str
    image_size: tuple[int, int]
    num_classes: int
    stem_pool: bool = True
    head_end: str | None = None
    tail_start: str | None = None
    bottleneck: Bottleneck | None = None


# The nets that users' functions returned, as long as they live.
_OWN: dict[int, weakref.ref[nn.Module]] = {}
# What a net's first build told, so that the next N of the same kind need not be run.
_FACTS: dict[ArchSpec, tuple[NodeFacts, ...]] = {}


def placed(module: M, device: torch.device) -> M:
    """Moves a module to its device, channels last: a third faster on the CPU."""
    module.to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


class Net(nn.Module):
    """A net in its three parts.

    Attributes:
        head: ``(B, 3, H, W)`` -> features ``(B, C, h, w)``; on the device.
        body: features -> ``(B, F)``; in the cloud.
        tail: ``(B, F)`` -> logits ``(B, K)``; on the device.
        codec: of a bottleneck, whose quantiser is a part of the net; None without one.
    """

    def __init__(self, head: nn.Module, body: nn.Module, tail: nn.Module, codec: AffineCodec | None = None) -> None:
        super().__init__()
        self.codec = codec
        self.head = head
        self.body = body
        self.tail = tail


def build_net(spec: ArchSpec, num_selected: int = 1, channels: Channels | None = None) -> Net:
    """Builds a freshly initialised net from torch's global generator.

    Args:
        spec: which one.
        num_selected: how many answers the tail takes side by side: 1 in stage 1, P in stage 3.
        channels: of the bottleneck, which the body hears; None: all.

    Raises:
        ConfigError: an unknown name, images too small for the net, or a cut that cannot be made.
    """
    net = traced_net(spec)
    known = ARCHITECTURES.get(spec.name)
    head_end = spec.head_end or (known.head_end if known else None)
    if head_end is None:
        names = ", ".join(cut.names[0] for cut in net.cuts)
        raise ConfigError(f"--arch {spec.name} needs --head-end, the last part of the head; valid: {names}")
    tail_start = spec.tail_start or (known.tail_start if known else next(reversed(net.tail_starts), None))
    if tail_start is None:
        raise ConfigError(
            f"--arch {spec.name} has no tail that could be cut off: it must end in nn.Linear on one vector an image"
        )
    head, body, tail = net.split(head_end, tail_start)
    parts = Net(head, body, widened(tail, num_selected))
    return parts if spec.bottleneck is None else _squeezed(parts, spec, spec.bottleneck, channels)


def traced_net(spec: ArchSpec) -> TracedNet:
    """Builds the whole net, freshly initialised, and finds where it can be cut; errors as ``build_net``."""
    if min(spec.image_size) < 8 or max(spec.image_size) > 1024:
        raise ConfigError(f"images of {spec.image_size[0]}x{spec.image_size[1]} pixels: 8 to 1024 a side are supported")
    if spec.name in ARCHITECTURES:
        try:
            module = ARCHITECTURES[spec.name].build(spec.image_size, spec.num_classes, spec.stem_pool)
        except Exception as error:
            raise ConfigError(f"--arch {spec.name} cannot be built for such images: {error}") from error
    else:
        module = _own(spec)
    whole = replace(spec, head_end=None, tail_start=None, bottleneck=None)
    net = traced(module, f"--arch {spec.name}", spec.image_size, spec.num_classes, _FACTS.get(whole))
    _FACTS[whole] = net.facts
    return net


def feature_shape(spec: ArchSpec) -> tuple[int, ...]:
    """Returns the shape of one image's features at the cut, for instance ``(64, 16, 16)``."""
    head = build_net(spec).head.eval()
    with torch.no_grad():
        return tuple(head(torch.zeros(2, 3, *spec.image_size)).shape[1:])


def _own(spec: ArchSpec) -> nn.Module:
    """Calls the user's function."""
    module_name, separator, function_name = spec.name.partition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(
            f"unknown architecture {spec.name!r}; known: {', '.join(sorted(ARCHITECTURES))}, or your own as "
            "package.module:function"
        )
    here = str(Path.cwd())
    if here not in sys.path:  # as python -m has it; a console script does not look here by itself
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        takes_classes = "num_classes" in inspect.signature(function).parameters
        module = function(num_classes=spec.num_classes) if takes_classes else function()
    except Exception as error:  # user code
        raise ConfigError(f"--arch {spec.name}: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"--arch {spec.name} returned {type(module).__name__}, not a torch nn.Module")
    if id(module) in _OWN and _OWN[id(module)]() is module:
        raise ConfigError(
            f"--arch {spec.name} returned the same net twice; N nets are trained, so it must build a new one every time"
        )
    _OWN[id(module)] = weakref.ref(module)
    return module


def _squeezed(net: Net, spec: ArchSpec, bottleneck: Bottleneck, heard: Channels | None) -> Net:
    """Puts the bottleneck at the cut: its layers in the head, expansion in the body."""
    with torch.no_grad():
        shape = tuple(net.head.eval()(torch.zeros(2, 3, *spec.image_size)).shape[1:])
    net.train()
    shrinks, channels = bottleneck.shrinks, bottleneck.channels
    if len(shape) != 3 or shape[1] % shrinks or shape[2] % shrinks:
        raise ConfigError(
            f"--bottleneck: features of shape {shape} cannot be cut by a stride of {shrinks}; (C, h, w) with h and w "
            "divisible by it is needed"
        )
    layers: list[nn.Module] = []
    width = shape[0]
    for wider in bottleneck.encoder:
        layers += _convolution(width, wider, 2) + _convolution(wider, wider, 1)
        width = wider
    norm = nn.BatchNorm2d(channels)
    # The codes' middle lies half a step above 0.0, whose code is a whole one.
    nn.init.constant_(norm.bias, bottleneck.codec.scale / 2)
    stride = bottleneck.stride
    squeeze = nn.Sequential(*layers, nn.Conv2d(width, channels, stride, stride, bias=False), norm)
    received = channels if heard is None else heard[1] - heard[0]
    expand = nn.Sequential(
        nn.ConvTranspose2d(received, shape[0], shrinks, shrinks, bias=False), nn.BatchNorm2d(shape[0]), nn.ReLU()
    )
    body: nn.Module = nn.Sequential(expand, net.body)
    if heard is not None:
        body = Hearing(body, heard)
    return Net(nn.Sequential(net.head, squeeze), body, net.tail, bottleneck.codec)


def _convolution(channels: int, wider: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
