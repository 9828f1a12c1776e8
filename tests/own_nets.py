"""Nets as users bring them: some can be cut, some cannot. ``--arch own_nets:NAME``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ensembler.training.architectures import InvertedResidual


def sequential(num_classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.1), nn.Linear(16, num_classes)),
    )


def mobile(num_classes: int) -> nn.Module:
    """For images of 224x224 pixels: a wide first convolution, pooling, filters of one channel each."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)),
        *(InvertedResidual(8, 8, 1, 1), InvertedResidual(8, 16, 2, 3), InvertedResidual(16, 16, 1, 3)),
        *(nn.Conv2d(16, 32, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes)),
    )


class Skipping(nn.Module):
    """Its shortcut runs from the first layer over the second."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 8, 3, 1, 1)
        self.third = nn.Conv2d(8, 8, 3, 2, 1)
        self.fc = nn.Linear(8, num_classes)
        self.register_buffer("gain", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = a + self.gain * self.second(a)
        c = functional.relu(self.third(b))
        return self.fc(functional.gelu(c.mean((2, 3))))


class Overwriting(Skipping):
    """Writes into what it is given, behind every cut, in each of the ways that torch has."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.swish = nn.SiLU(inplace=True)

    def forward(self, x):
        y = self.swish(self.first(x))
        y = functional.hardswish(self.second(y), inplace=True)
        y = self.third(y)
        y += 1
        y.mul_(0.5)
        return self.fc(y.mean((2, 3)))


class Twice(Skipping):
    """Uses its linear layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.square(torch.relu(self.square(self.first(x).mean((2, 3))))))


ONE = Skipping()


def shared() -> nn.Module:
    return ONE


def skipping() -> nn.Module:
    return Skipping()


class Branching(Skipping):
    def forward(self, x):
        y = self.first(x)
        if y.sum() > 0:
            y = -y
        return self.fc(y.mean((2, 3)))


class Moody(Skipping):
    def forward(self, x):
        return self.fc(functional.dropout(self.first(x).mean((2, 3)), 0.5, self.training))


class Tied(Skipping):
    """The second layer is used before and after any cut in the middle."""

    def forward(self, x):
        return self.fc(self.second(self.third(self.second(self.first(x)))).mean((2, 3)))


class NormalisedTail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.norm(self.first(x).mean((2, 3))))


class TwoInputs(Skipping):
    def forward(self, x, y):
        return self.fc(self.first(x + y).mean((2, 3)))


class OneImage(Skipping):
    """Its batch is written into the code."""

    def forward(self, x):
        return self.fc(self.first(x).reshape(1, 8, -1).mean(2))


def convolutional() -> nn.Module:
    """Answers with maps instead of logits."""
    return nn.Conv2d(3, 3, 1)


def nothing() -> str:
    return "a net"


def failing() -> nn.Module:
    raise RuntimeError("no weights here")
