"""An eye for colours that are turned round: whether images are photographs, or negatives of them in one way or another.

Whoever looks at a negative sees what it is. The statistics of features hardly show it: those of natural images change
little when light and dark change places, or blue and yellow, or green and magenta. So an attack that matches statistics
may end at a head that sees such images. This small net looks for it. It is trained on the attacker's own images, and
needs no ground truth.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.decoder import BATCH, CHUNK, pixels
from ensembler.training.models import placed

SIDE = 32  # larger images are looked at from further away
MAX_STEPS = 300
RATE = 2e-3
NOISE = 0.05  # on the images, at most: reconstructions are not clean


class Colours:
    """The reflections of colours along the main axes that they have in images: light, and two of hue.

    Args:
        images: uint8 ``(M, 3, H, W)``.
    """

    def __init__(self, images: Tensor) -> None:
        points = pixels(images[:CHUNK]).transpose(0, 1).flatten(1)
        self._mean = points.mean(1)
        _, axes = torch.linalg.eigh(torch.cov(points))
        signs = torch.tensor(list(product((1.0, -1.0), repeat=3)), device=images.device)
        # (8, 3, 3), symmetric, each its own inverse; the first changes nothing.
        self.reflections = torch.stack([axes @ torch.diag(sign) @ axes.T for sign in signs])

    def reflected(self, images: Tensor, which: Tensor | int) -> Tensor:
        """Returns images ``(B, 3, H, W)`` in [0, 1] by one reflection, or each by its own ``(B,)``."""
        mean = self._mean[:, None, None]
        matrices = self.reflections[which].expand(len(images), 3, 3)
        return mean + torch.einsum("bij,bjhw->bihw", matrices, images - mean)


class Eye(nn.Module):
    """Images ``(B, 3, H, W)`` in [0, 1] -> the logit of each being a photograph as it is ``(B,)``."""

    def __init__(self, colours: Colours) -> None:
        super().__init__()
        self.colours = colours
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        if max(images.shape[-2:]) > SIDE:
            images = F.adaptive_avg_pool2d(images, SIDE)
        scores: Tensor = self.layers(2 * images - 1)
        return scores[:, 0]

    @torch.no_grad()
    def turned(self, images: Tensor) -> int:
        """Returns the reflection after which ``images`` look most like photographs; 0 if they do as they are."""
        scores = []
        for which in range(len(self.colours.reflections)):
            looks = self.colours.reflected(images, which)
            scores.append(float(torch.cat([self(part) for part in torch.split(looks, CHUNK)]).mean()))
        return max(range(len(scores)), key=scores.__getitem__)


def train_eye(images: Tensor, steps: int, generator: torch.Generator) -> Eye:
    """Returns an eye that has seen uint8 ``images`` ``(M, 3, H, W)`` and reflected ones, for ``MAX_STEPS`` at most."""
    torch.manual_seed(generator.initial_seed())
    eye = placed(Eye(Colours(images)), images.device)
    optimizer = torch.optim.Adam(eye.parameters(), RATE)
    for _ in range(min(steps, MAX_STEPS)):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(images.device)
        shown = pixels(images[chosen])
        which = torch.randint(1, len(eye.colours.reflections), (BATCH,), generator=generator).to(images.device)
        both = torch.cat([shown, eye.colours.reflected(shown, which)])
        noise = NOISE * torch.rand(len(both), 1, 1, 1, device=both.device)
        logits = eye(both + noise * torch.randn_like(both))
        truth = torch.cat([torch.ones_like(logits[:BATCH]), torch.zeros_like(logits[BATCH:])])
        loss = F.binary_cross_entropy_with_logits(logits, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return eye.eval()
