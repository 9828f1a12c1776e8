"""Nets that only the benchmarks train."""

from collections import OrderedDict

from torch import nn

from ensembler.training.architectures import BasicBlock, resnet


def resnet10_22(num_classes: int) -> nn.Module:
    """Returns ``resnet10_half`` with 22 of its 32 channels: the work of ``balanced``'s head on 32x32 pixels."""
    return resnet(22, (1, 1, 1, 1), (32, 32), num_classes, True)


def resnet10_ends(num_classes: int) -> nn.Module:
    """Returns a residual net with ResNet-18's stem, cut and 512 answers, and a fifth of its work between them."""
    net = resnet(64, (1, 1, 1, 1), (32, 32), num_classes, True)
    widths = (64, 32, 64, 128, 512)
    layers = [
        (f"layer{stage}", nn.Sequential(BasicBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)))
        for stage in (1, 2, 3, 4)
    ]
    kept = OrderedDict(net.named_children())
    return nn.Sequential(OrderedDict({**kept, **dict(layers)}))
