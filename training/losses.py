"""The losses: cross-entropy, a teacher's answers, and what stage 3 asks of the new head (Ensembler, Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 2.0
RIDGE = 1e-4  # of the channels' mean variance: channels that are each other's sums leave no map undefined


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


def max_linear_overlap(features: Tensor, previous: Sequence[Tensor]) -> Tensor:
    """Returns how much of a previous head a linear map of the new one's channels gives, of the head with the most.

    A cosine is lowered by changing the order of the channels, or their signs, which hides nothing: whoever can read one
    head reads the other through one matrix. This is what is left of Eq. 3's idea after the best such matrix: the share
    of a previous head's variance, over all images and places of the batch, that the least-squares map from the new
    head's channels explains.

    Args:
        features: of the new head, ``(B, C, h, w)``, tokens ``(B, T, D)`` or ``(B, F)``.
        previous: of the frozen stage-1 heads, each of the same shape.

    Returns:
        A scalar from 0, nothing is shared, to 1.
    """
    # Covariances are differences of large numbers: not in bfloat16.
    with torch.autocast(features.device.type, enabled=False):
        mine = _rows(features)
        inner = mine.T @ mine
        inner = inner + (RIDGE * inner.diagonal().mean() + 1e-12) * torch.eye(len(inner), device=inner.device)
        shares = []
        for other in previous:
            theirs = _rows(other)
            across = mine.T @ theirs
            explained = (across * torch.linalg.solve(inner, across)).sum()
            shares.append(explained / theirs.square().sum().clamp_min(1e-12))
    return torch.stack(shares).max()


def _rows(features: Tensor) -> Tensor:
    """Returns one centred row for each place of each image, ``(rows, channels)``."""
    rows = features.float()
    if rows.dim() > 3:
        rows = rows.flatten(2).transpose(1, 2)
    rows = rows.flatten(0, -2)
    return rows - rows.mean(0)


# What ``--reg-kind`` chooses from: the term of Eq. 3 without lambda, by its name.
OVERLAPS: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "cosine": max_cosine,
    "linear": max_linear_overlap,
}


def stage3_loss(classification: Tensor, overlap: Tensor, reg_weight: float) -> Tensor:
    """Returns Eq. 3: the loss of the concatenated tail's answers plus ``reg_weight`` (lambda) times the overlap.

    The paper sums the cross-entropy over P; with one concatenated tail the terms are equal and the sum only rescales
    lambda, so one is taken.
    """
    return classification + reg_weight * overlap


def classification_loss(logits: Tensor, targets: Tensor, taught: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """Returns the cross-entropy, or a part of it and for the rest the distance from a teacher's answers.

    Distillation (Hinton et al., 2015): the Kullback-Leibler divergence of both nets' softened answers.

    Args:
        logits: ``(B, K)``.
        targets: ``(B,)`` int64.
        taught: the teacher's logits ``(B, K)``; None without one.
        weight: of the teacher, 0 to 1.
    """
    loss = F.cross_entropy(logits, targets)
    if taught is None:
        return loss
    softened = F.log_softmax(logits.float() / TEMPERATURE, 1)
    wanted = F.log_softmax(taught.float() / TEMPERATURE, 1)
    distance = F.kl_div(softened, wanted, reduction="batchmean", log_target=True)
    # The square keeps the gradients of both parts in proportion, whatever the temperature.
    return (1 - weight) * loss + weight * TEMPERATURE**2 * distance
