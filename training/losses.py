"""The losses of the task: cross-entropy, a teacher's answers, and stage 3's cosine term (Ensembler, Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 2.0


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


def stage3_loss(classification: Tensor, cosine: Tensor, reg_weight: float) -> Tensor:
    """Returns Eq. 3: the loss of the concatenated tail's answers plus ``reg_weight`` (lambda) times the cosine.

    The paper sums the cross-entropy over P; with one concatenated tail the terms are equal and the sum only rescales
    lambda, so one is taken.
    """
    return classification + reg_weight * cosine


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
