"""A critic after matching: what statistics chosen by hand do not see, a small network may learn to see (PCAT, SDAR).

The critic looks at neighbourhoods of features and learns to tell what arrives from what the matched head gives; the
head learns to pass, and to keep its statistics meanwhile.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ensembler.privacy.attacks.base import Finding, Plan, needed
from ensembler.privacy.attacks.matching import Match, Shadow, match_ticks, matched
from ensembler.privacy.attacks.moments import BATCH
from ensembler.privacy.decoder import as_map
from ensembler.privacy.scene import Access, View
from ensembler.training.models import placed

WIDTH = 64
RATE = 1e-3
BETAS = (0.5, 0.9)
WEIGHT = 0.1  # of the critic's word beside the distance, which is near its least already


class MatchingCritic:
    """See the module."""

    NAME = "distribution-matching-critic"
    ACCESS = Access.QUERY_FREE
    SOURCE = "ours; related: PCAT, SDAR"
    WORDS = "refines the matched head until a network cannot tell its features from those that arrive"

    def ticks(self, plan: Plan) -> int:
        """See ``Attack``."""
        return match_ticks(plan) + plan.steps + plan.effort.steps

    def run(self, view: View, plan: Plan) -> Finding:
        """See ``Attack``."""
        match = matched(view, plan)
        return replace(match, head=refined(match, view, plan)).finding(view, plan)


class Critic(nn.Module):
    """``(B, C, h, w)`` in units of each channel's deviation -> a score for each neighbourhood ``(B, 1, h', w')``."""

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        kernel = 3 if min(size) > 2 else 1
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(channels, WIDTH, kernel)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(WIDTH, 1, 1)),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Returns the scores: high for what arrives."""
        scores: Tensor = self.layers(z)
        return scores


def refined(match: Match, view: View, plan: Plan) -> Shadow:
    """Returns a copy of the matched head that a critic has taught; hinge losses, one step of each in turn."""
    head = match.head.copied()
    clean = match.cleaner.clean(needed(view.observed, "observed features"))
    generator = plan.generator(3)
    torch.manual_seed(generator.initial_seed())
    maps = as_map(clean)
    critic = placed(Critic(maps.shape[1], (maps.shape[2], maps.shape[3])), view.device)
    of_critic = torch.optim.Adam(critic.parameters(), RATE, BETAS)
    of_head = torch.optim.Adam(head.head.parameters(), RATE, BETAS)
    for _ in range(plan.steps):
        chosen = torch.randint(len(maps), (min(BATCH, len(maps)),), generator=generator).to(maps.device)
        real, sent = match.target.units(maps[chosen]), head.sent()
        fake = match.target.units(as_map(sent))
        doubt = F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake.detach())).mean()
        of_critic.zero_grad(set_to_none=True)
        doubt.backward()  # type: ignore[no-untyped-call]
        of_critic.step()
        loss = match.target.distance(sent) - WEIGHT * critic(fake).mean()
        of_head.zero_grad(set_to_none=True)
        loss.backward()
        of_head.step()
        plan.tick("critic")
    return head
