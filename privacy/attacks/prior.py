"""A generative prior: of all images that an autoencoder can paint, the one whose features are those that arrived.

Where the features say little, the autoencoder, trained on the attacker's own images, says what images look like. The
search runs in its code, from what the decoder of the matched head saw. GLASS and DRAG do so with larger priors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.attacks.base import Finding, Plan
from ensembler.privacy.attacks.likelihood import descend
from ensembler.privacy.attacks.matching import Shadow, match_ticks, matched
from ensembler.privacy.decoder import BATCH, painted, pixels
from ensembler.privacy.scene import Access, View
from ensembler.training.models import placed

CODE_CHANNELS = 16  # at a quarter of the image's height and width: a third of its numbers
WIDTH = 48
NOISE = 0.1  # on the code while training, in its deviations, so that near codes give near images
TRAIN_RATE, SEARCH_RATE = 2e-3, 0.02
KEPT = 1e-3  # weight of the code's size
IMAGES = 100


class GenerativePrior:
    """See the module."""

    NAME = "generative-prior"
    ACCESS = Access.QUERY_FREE
    SOURCE = "ours; related: GLASS, DRAG"
    WORDS = "searches, among the images that an autoencoder can paint, for one with the features that arrived"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return match_ticks(plan) + 2 * plan.effort.steps + plan.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        match = matched(view, plan)
        decoder = match.decoder(view, plan)
        prior = train_prior(view, plan)

        def reconstruct(features: Tensor) -> Tensor:
            clean = match.cleaner.clean(features)
            return search(prior, match.head, clean, painted(decoder, clean), plan)

        return match.found(reconstruct, decoder, IMAGES)


class Prior(nn.Module):
    """A convolutional autoencoder; images ``(B, 3, H, W)`` in [0, 1] -> code ``(B, 16, H/4, W/4)`` -> images."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size
        self.encoder = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, CODE_CHANNELS, 3, padding=1),
            nn.BatchNorm2d(CODE_CHANNELS, affine=False),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_CHANNELS, 4 * WIDTH, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 4 * WIDTH, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 3, 3, padding=1),
        )

    def paint(self, code: Tensor) -> Tensor:
        """Returns the images of codes, in [0, 1]."""
        images = torch.sigmoid(self.decoder(code))
        # A size that is no multiple of four comes out larger.
        return images[:, :, : self.image_size[0], : self.image_size[1]]

    def forward(self, images: Tensor) -> Tensor:
        """Returns what is left of images after a noisy code."""
        code = self.encoder(images)
        return self.paint(code + NOISE * torch.randn_like(code))


def train_prior(view: View, plan: Plan) -> Prior:
    """Returns an autoencoder of the attacker's images; it needs no feature."""
    generator = plan.generator(4)
    torch.manual_seed(generator.initial_seed())
    prior = placed(Prior(view.arch.image_size), view.device).train()
    optimizer = torch.optim.Adam(prior.parameters(), TRAIN_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.effort.steps)
    for _ in range(plan.effort.steps):
        chosen = torch.randint(len(view.auxiliary), (BATCH,), generator=generator).to(view.device)
        images = pixels(view.auxiliary[chosen])
        loss = F.mse_loss(prior(images), images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        plan.tick("prior")
    return prior.eval()


def search(prior: Prior, head: Shadow, clean: Tensor, start: Tensor, plan: Plan) -> Tensor:
    """Returns images that ``prior`` can paint and whose features, by ``head``, are ``clean``.

    Args:
        prior: trained.
        head: settled.
        clean: ``(B, *feature_shape)``.
        start: images ``(B, 3, H, W)`` in [0, 1] to begin with.
        plan: its steps are those of the search.
    """
    code = prior.encoder(start).detach().requires_grad_()
    return descend(
        code,
        prior.paint,
        lambda images: head.arriving(255 * images),
        clean,
        rate=SEARCH_RATE,
        steps=plan.steps,
        penalty=lambda _: KEPT * code.square().mean(),
        tick=lambda: plan.tick("prior"),
    )
