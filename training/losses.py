"""The loss of stage 3 (Ensembler, Eq. 3), and what makes features tell less."""

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


def information_bits(features: Tensor, targets: Tensor, noise_std: float) -> Tensor:
    """Returns how much features tell of an image beyond its class, in bits for each number.

    The mean over numbers of ``log2(1 + var / noise_std^2) / 2``, with the variance within a class: if noise of that
    deviation is added, no more than so much passes (a Gaussian channel). It is the idea of CEM (Xia et al., CVPR 2025:
    conditional entropy maximisation), with the classes as the mixture's parts.

    Args:
        features: ``(B, ...)``, before noise and codes.
        targets: classes ``(B,)`` int64.
        noise_std: of the noise that is added, or in its place a fraction of the features' own deviation.

    Returns:
        A scalar, at least 0.
    """
    # Variances are differences of large numbers: not in bfloat16.
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(1)
        members = F.one_hot(targets).to(flat.dtype)  # (B, K)
        counts = members.sum(0)  # (K,)
        means = (members.T @ flat) / counts.clamp_min(1)[:, None]
        spread = (members.T @ (flat - means[targets]).square()) / counts.clamp_min(1)[:, None]
        bits = torch.log2(1 + spread / noise_std**2).mean(1) / 2  # (K,)
        return (bits * counts).sum() / counts.sum()
