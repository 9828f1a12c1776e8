"""Your own net: any torch module that takes images (B, 3, H, W) and returns logits (B, K).

    ensembler cuts examples.own_net:sequential --num-classes 6
    ensembler train --data demo --arch examples.own_net:sequential --head-end 2 -N 4 -P 2 --epochs 6 --out runs/own
    ensembler-export runs/own --out out/own

``num_classes`` is passed if the function takes it. Cut by the names that ``ensembler cuts`` lists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sequential(num_classes: int) -> nn.Module:
    """A plain stack of layers; its parts are called 0, 1, 2, ..."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, num_classes)),
    )


class Gated(nn.Module):
    """A net with a shortcut and squeeze-and-excitation; it cannot be cut where two tensors cross."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 24, 1), nn.Sigmoid())
        self.last = nn.Sequential(nn.Conv2d(24, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.classifier = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        x = self.stem(x)
        y = torch.relu(self.norm(self.depthwise(x)))
        x = x + y * self.gate(y)
        logits: Tensor = self.classifier(self.last(x).mean((2, 3)))
        return logits


def gated(num_classes: int) -> nn.Module:
    """The net above."""
    return Gated(num_classes)
