"""The loss of stage 3 (Ensembler, Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def max_cosine(features: Tensor, previous: Sequence[Tensor]) -> Tensor:
    """Returns the regularisation term of Eq. 3 without lambda.

    The paper writes ``max[CS(M_{c,h}(x), M^i_{c,h}(x))]``. The cosine is taken per sample over flattened, noise-free
    features; the maximum over the previous heads is per sample, then the batch is averaged.

    Args:
        features: of the new head, ``(B, C, H, W)``.
        previous: of the frozen stage-1 heads, each ``(B, C, H, W)``.

    Returns:
        A scalar in [-1, 1].
    """
    flat = features.flatten(1)
    cosines = torch.stack([F.cosine_similarity(flat, other.flatten(1), dim=1) for other in previous])  # (N, B)
    return cosines.max(dim=0).values.mean()


def stage3_loss(logits: Tensor, targets: Tensor, cosine: Tensor, reg_weight: float) -> Tensor:
    """Returns Eq. 3: cross-entropy on the concatenated tail plus ``reg_weight`` (the paper's lambda) times the cosine.

    The paper sums the cross-entropy over P; with one concatenated tail the terms are equal and the sum only rescales
    lambda, so one is taken.
    """
    return F.cross_entropy(logits, targets) + reg_weight * cosine
