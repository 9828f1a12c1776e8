"""Nets, already cut into head, body and tail.

The paper (Section IV-A) keeps h = 1 and t = 1 layers of a ResNet-18 on the device: the first convolution (with its
batch norm, ReLU and, for CIFAR-10, max-pooling) and the last linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensembler.protocol.errors import ConfigError

# The device hands uint8 pixels to the head: x = (pixel - 128) / 64 is an exact 8-bit affine code (scale 2^-6, zero
# point 128), so the quantised head takes the pixels as they are, and zero padding is mid-grey.
PIXEL_SCALE = 1 / 64
PIXEL_ZERO_POINT = 128


def normalise(pixels: Tensor) -> Tensor:
    """Returns the head's input ``(B, 3, H, W)`` float32 for uint8 pixels of the same shape."""
    return (pixels.float() - PIXEL_ZERO_POINT) * PIXEL_SCALE


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """Which net, for which images.

    Attributes:
        name: a key of ``ARCHS``.
        image_size: height and width in pixels.
        num_classes: K.
        stem_pool: max-pool after the first convolution; off in the paper's CIFAR-100 and face settings.
    """

    name: str
    image_size: tuple[int, int]
    num_classes: int
    stem_pool: bool = True


class Net(nn.Module):
    """A net in its three parts.

    Attributes:
        head: ``(B, 3, H, W)`` -> features ``(B, C, h, w)``; on the device.
        body: features -> ``(B, F)``; in the cloud.
        tail: ``(B, F)`` -> logits ``(B, K)``; on the device.
    """

    def __init__(self, head: nn.Module, body: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.body = body
        self.tail = tail


class BasicBlock(nn.Module):
    """The residual block of ResNet-18: two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, channels_in, H, W)`` to ``(B, channels_out, H / stride, W / stride)``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _resnet(width: int, blocks: tuple[int, ...]) -> Callable[[ArchSpec, int], Net]:
    def build(spec: ArchSpec, num_selected: int) -> Net:
        head = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *([nn.MaxPool2d(3, 2, 1)] if spec.stem_pool else []),
        )
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                wider = width * 2**stage
                layers.append(BasicBlock(channels, wider, 2 if stage > 0 and index == 0 else 1))
                channels = wider
        body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Net(head, body, nn.Linear(num_selected * channels, spec.num_classes))

    return build


# name -> (spec, number of concatenated answers) -> net. The paper's ResNet-18, and a slim ResNet-10 (one block per
# stage, a quarter of the width) that a laptop trains in minutes.
ARCHS: dict[str, Callable[[ArchSpec, int], Net]] = {
    "resnet18": _resnet(64, (2, 2, 2, 2)),
    "resnet10_slim": _resnet(16, (1, 1, 1, 1)),
}


def build_net(spec: ArchSpec, num_selected: int = 1) -> Net:
    """Builds a freshly initialised net from torch's global generator.

    Args:
        spec: which one.
        num_selected: how many answers the tail takes side by side: 1 in stage 1, P in stage 3.

    Raises:
        ConfigError: an unknown name, or images too small for the net.
    """
    if spec.name not in ARCHS:
        raise ConfigError(f"unknown architecture {spec.name!r}; known: {', '.join(sorted(ARCHS))}")
    if min(spec.image_size) < 8 or max(spec.image_size) > 1024:
        raise ConfigError(f"images of {spec.image_size[0]}x{spec.image_size[1]} pixels: 8 to 1024 a side are supported")
    return ARCHS[spec.name](spec, num_selected)


def feature_shape(spec: ArchSpec) -> tuple[int, ...]:
    """Returns the shape of one image's features at the cut, for instance ``(64, 16, 16)``."""
    head = build_net(spec).head.eval()
    with torch.no_grad():
        return tuple(head(torch.zeros(1, 3, *spec.image_size)).shape[1:])
