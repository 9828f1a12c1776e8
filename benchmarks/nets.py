"""Nets that only the benchmarks train."""

from torch import nn

from ensembler.training.architectures import resnet


def resnet10(num_classes: int) -> nn.Module:
    """Returns ResNet-18 with one block a stage: its cut, its answers and its width for half of its work."""
    return resnet(64, (1, 1, 1, 1), (32, 32), num_classes, True)


def resnet10_22(num_classes: int) -> nn.Module:
    """Returns ``resnet10_half`` with 22 of its 32 channels: the work of ``balanced``'s head on 32x32 pixels."""
    return resnet(22, (1, 1, 1, 1), (32, 32), num_classes, True)
