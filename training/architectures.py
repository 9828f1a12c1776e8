"""The nets that ship: whole, with named parts, so that ``training.splits`` can cut them like anybody's own.

``resnet18`` is the paper's (Section IV-A: the first convolution on the device, the last linear layer as the tail).
``alexnet``, ``vgg16`` and ``vgg19`` are C2PI's CIFAR variants: the authors' files are not available, so the channels
are half the usual ones, as their "reduced channel size" is read here, with batch norm and one linear classifier layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: expand, filter each channel, project; a shortcut where shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        expand = [nn.Conv2d(channels_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        self.layers = nn.Sequential(
            *(expand if expansion > 1 else []),
            *(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)),
        )
        self.has_shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, channels_in, H, W)`` to ``(B, channels_out, H / stride, W / stride)``."""
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class EncoderBlock(nn.Module):
    """The block of a vision transformer, normalisation first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``(B, T, D)`` to ``(B, T, D)``."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, d)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])  # (B, heads, T, d)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class VisionTransformer(nn.Module):
    """A small vision transformer whose answer is the mean of its tokens."""

    def __init__(self, image_size: tuple[int, int], num_classes: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        tokens = (image_size[0] // patch) * (image_size[1] // patch)
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``(B, 3, H, W)`` to logits ``(B, K)``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.fc(self.norm(self.blocks(tokens)).mean(1))
        return logits


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A net that ships, and where it is cut unless told otherwise.

    Attributes:
        build: from image size, K and whether the stem pools, to the whole net.
        head_end: the head's last part.
        tail_start: the tail's first part.
    """

    build: Callable[[tuple[int, int], int, bool], nn.Module]
    head_end: str
    tail_start: str = "fc"


def _named(*parts: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _ended(layers: list[tuple[str, nn.Module]], channels: int, num_classes: int) -> nn.Sequential:
    """Returns ``layers`` with average pooling and one linear layer after them."""
    return _named(
        *layers,
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(channels, num_classes)),
    )


def resnet(
    width: int, blocks: tuple[int, ...], image_size: tuple[int, int], num_classes: int, stem_pool: bool
) -> nn.Module:
    """Returns a residual net of basic blocks for images of any size.

    Args:
        width: channels of the stem and of the first stage; each further stage has twice as many.
        blocks: of each stage.
        image_size: of no use here; other nets need it.
        num_classes: answers of the last layer.
        stem_pool: whether the stem ends with a max-pool.
    """
    del image_size
    pool = [("pool", nn.MaxPool2d(3, 2, 1))] if stem_pool else []
    stem = _named(
        ("conv", nn.Conv2d(3, width, 3, 1, 1, bias=False)), ("bn", nn.BatchNorm2d(width)), ("relu", nn.ReLU()), *pool
    )
    layers: list[tuple[str, nn.Module]] = [("stem", stem)]
    channels = width
    for stage, count in enumerate(blocks):
        made = []
        for index in range(count):
            wider = width * 2**stage
            made.append(BasicBlock(channels, wider, 2 if stage > 0 and index == 0 else 1))
            channels = wider
        layers.append((f"layer{stage + 1}", nn.Sequential(*made)))
    return _ended(layers, channels, num_classes)


def _plain(
    plan: tuple[int | str, ...], stride: int, image_size: tuple[int, int], num_classes: int, stem_pool: bool
) -> nn.Module:
    """Builds a net without shortcuts: a number is a 3x3 convolution to so many channels, ``M`` a max-pooling."""
    del image_size, stem_pool
    layers: list[tuple[str, nn.Module]] = []
    channels, conv, pool = 3, 0, 0
    for step in plan:
        if isinstance(step, str):
            pool += 1
            layers.append((f"pool{pool}", nn.MaxPool2d(2)))
        else:
            conv += 1
            # C2PI's layer L is conv L, its layer L.5 the ReLU after it; batch norm has no number of its own.
            layers += [
                (f"conv{conv}", nn.Conv2d(channels, step, 3, stride if conv == 1 else 1, 1, bias=False)),
                (f"bn{conv}", nn.BatchNorm2d(step)),
                (f"relu{conv}", nn.ReLU()),
            ]
            channels = step
    return _ended(layers, channels, num_classes)


def _mobilenet(image_size: tuple[int, int], num_classes: int, stem_pool: bool) -> nn.Module:
    del image_size, stem_pool
    stem = _named(("conv", nn.Conv2d(3, 32, 3, 1, 1, bias=False)), ("bn", nn.BatchNorm2d(32)), ("relu", nn.ReLU6()))
    layers: list[tuple[str, nn.Module]] = [("stem", stem)]
    channels, block = 32, 0
    # Expansion, channels, blocks, stride; the strides are those of 32x32 images.
    for expansion, wider, count, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for index in range(count):
            block += 1
            layers.append((f"block{block}", InvertedResidual(channels, wider, stride if index == 0 else 1, expansion)))
            channels = wider
    last = _named(
        ("conv", nn.Conv2d(channels, 1280, 1, bias=False)), ("bn", nn.BatchNorm2d(1280)), ("relu", nn.ReLU6())
    )
    return _ended([*layers, ("last", last)], 1280, num_classes)


def _vit(image_size: tuple[int, int], num_classes: int, stem_pool: bool) -> nn.Module:
    del stem_pool
    return VisionTransformer(image_size, num_classes, patch=4, width=128, depth=6)


_VGG16 = (32, 32, "M", 64, 64, "M", 128, 128, 128, "M", 256, 256, 256, "M", 256, 256, 256, "M")
_VGG19 = (32, 32, "M", 64, 64, "M", *(128,) * 4, "M", *(256,) * 4, "M", *(256,) * 4, "M")
_ALEXNET = (32, "M", 96, "M", 192, 128, 128, "M")

ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(build=partial(resnet, 64, (2, 2, 2, 2)), head_end="stem"),
    "resnet34": Architecture(build=partial(resnet, 64, (3, 4, 6, 3)), head_end="stem"),
    # One block a stage and a quarter or half of the width: a laptop trains them in minutes, or in hours on real data.
    "resnet10_slim": Architecture(build=partial(resnet, 16, (1, 1, 1, 1)), head_end="stem"),
    "resnet10_half": Architecture(build=partial(resnet, 32, (1, 1, 1, 1)), head_end="stem"),
    "alexnet": Architecture(build=partial(_plain, _ALEXNET, 2), head_end="pool1"),
    "vgg16": Architecture(build=partial(_plain, _VGG16, 1), head_end="pool1"),
    "vgg19": Architecture(build=partial(_plain, _VGG19, 1), head_end="pool1"),
    "mobilenet_v2": Architecture(build=_mobilenet, head_end="block1"),
    "vit_small": Architecture(build=_vit, head_end="add"),
}
