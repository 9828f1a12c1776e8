"""An eye for negatives: whether images are photographs or the negatives of photographs.

Whoever looks at a negative sees what it is. The statistics of features hardly show it, so an attack that matches them
may end at a head that sees negatives. This small net looks for it: trained on the attacker's own images and their
negatives, it needs no ground truth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.decoder import BATCH, CHUNK, pixels
from ensembler.training.stage1 import placed

SIDE = 32  # larger images are looked at from further away
MAX_STEPS = 300
RATE = 2e-3
NOISE = 0.05  # on the images, at most: reconstructions are not clean


class Eye(nn.Module):
    """Images ``(B, 3, H, W)`` in [0, 1] -> how much each looks like a photograph ``(B,)``; its negative: minus that."""

    def __init__(self) -> None:
        super().__init__()
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
        """Returns the scores, above 0 for photographs."""
        if max(images.shape[-2:]) > SIDE:
            images = F.adaptive_avg_pool2d(images, SIDE)
        centred = 2 * images - 1
        scores: Tensor = self.layers(centred) - self.layers(-centred)
        return scores[:, 0]

    @torch.no_grad()
    def likes(self, images: Tensor) -> float:
        """Returns by how many more of ``images`` are taken for photographs than for negatives, -1 to 1."""
        signs = [self(part).sign() for part in torch.split(images, CHUNK)]
        return float(torch.cat(signs).mean())


def train_eye(images: Tensor, steps: int, generator: torch.Generator) -> Eye:
    """Returns an eye that has seen uint8 ``images`` ``(M, 3, H, W)`` and their negatives, for ``MAX_STEPS`` at most."""
    torch.manual_seed(generator.initial_seed())
    eye = placed(Eye(), images.device)
    optimizer = torch.optim.Adam(eye.parameters(), RATE)
    for _ in range(min(steps, MAX_STEPS)):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(images.device)
        shown = pixels(images[chosen])
        shown = shown + NOISE * torch.rand(len(shown), 1, 1, 1, device=shown.device) * torch.randn_like(shown)
        loss = F.softplus(-eye(shown)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return eye.eval()
