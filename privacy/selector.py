"""Whether the server's own nets give away which of them the client selected.

Stage 3 trains the head on the P selected nets and on no other, so what arrives may fit those better. A server sees what
arrives and what its nets do with it, and may rank them by that. Each way of ranking is scored by its AUC: the share of
pairs of a selected and another net that it ranks rightly; 0.5 is chance, and 0 gives as much away as 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.privacy.decoder import CHUNK
from ensembler.privacy.scene import View

K_MEANS_STEPS = 20


@torch.no_grad()
def rankings(view: View, images: int = 1024) -> dict[str, list[float]]:
    """Returns a score for each net by each way of ranking, in the server's order; high means: probably selected.

    * ``batch norm``: how well the statistics of what arrives fit those that the net's batch norm remembers.
    * ``spectrum``: in how many directions the net's answers differ (the participation ratio of their covariance).
    * ``energy``: how large the answers are.
    * ``clipping``: the share of answers inside the range of the net's codec.
    * ``clusters``: how well the answers fall into as many groups as there are classes (a probe without labels).
    * ``gradient``: how little any scale or shift of the features' channels would part those groups better: the head was
      trained until its selected nets asked for nothing more.

    Args:
        view: a query-free one.
        images: how many observations to use.
    """
    assert view.observed is not None
    assert view.bodies is not None
    observed = view.observed[:images]
    ways = ("batch norm", "spectrum", "energy", "clipping", "clusters", "gradient")
    scores: dict[str, list[float]] = {way: [] for way in ways}
    for body, codec in zip(view.bodies, view.wire.answer_codecs, strict=True):
        answers, mismatch = _answers(body, observed)
        centred = answers - answers.mean(0)
        energies = torch.linalg.svdvals(centred).square()
        scores["batch norm"].append(-mismatch)
        scores["spectrum"].append(float(energies.sum() ** 2 / energies.square().sum()))
        scores["energy"].append(float(answers.square().mean()))
        scores["clipping"].append(float(((answers >= codec.low) & (answers <= codec.high)).float().mean()))
        groups = _groups(centred, view.arch.num_classes)
        scores["clusters"].append(float(_parted(answers, groups)))
        scores["gradient"].append(-_pull(body, observed[:CHUNK], groups[:CHUNK]))
    return scores


def _answers(body: nn.Module, features: Tensor) -> tuple[Tensor, float]:
    """Returns a net's answers, and how far what its batch norms get is from what they remember."""
    distances: list[float] = []

    def compare(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
            return
        x = inputs[0].transpose(0, 1).flatten(1)
        deviation = (norm.running_var + norm.eps).sqrt()
        shift = (x.mean(1) - norm.running_mean) / deviation
        stretch = (x.std(1) / deviation).clamp_min(1e-6).log()
        distances.append(float((shift.square() + stretch.square()).mean()))

    hooks = [m.register_forward_pre_hook(compare) for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        answers = torch.cat([body(part) for part in torch.split(features, CHUNK)])
    finally:
        for hook in hooks:
            hook.remove()
    return answers, sum(distances) / max(1, len(distances))


def _groups(points: Tensor, count: int) -> Tensor:
    """Returns to which of ``count`` groups each point ``(M, F)`` belongs: k-means from far apart points, ``(M,)``."""
    centres = points[points.square().sum(1).argmax()][None]
    while len(centres) < min(count, len(points)):
        centres = torch.cat([centres, points[torch.cdist(points, centres).amin(1).argmax()][None]])
    for _ in range(K_MEANS_STEPS):
        groups = torch.cdist(points, centres).argmin(1)
        members = F.one_hot(groups, len(centres)).to(points.dtype)
        counts = members.sum(0)[:, None]
        centres = torch.where(counts > 0, members.T @ points / counts.clamp_min(1), centres)
    return groups


def _parted(answers: Tensor, groups: Tensor) -> Tensor:
    """Returns the share of the answers' variance that lies between the groups, 0 to 1."""
    members = F.one_hot(groups).to(answers.dtype)
    centred = answers - answers.mean(0)
    counts = members.sum(0)[:, None]
    means = members.T @ centred / counts.clamp_min(1)
    return (counts * means.square()).sum() / centred.square().sum().clamp_min(1e-12)


@torch.enable_grad()
def _pull(body: nn.Module, features: Tensor, groups: Tensor) -> float:
    """Returns how much better the groups would part for a small scale and shift of each channel."""
    size = (1, features.shape[1]) + (1,) * (features.dim() - 2)
    scale, shift = (torch.zeros(size, device=features.device, requires_grad=True) for _ in range(2))
    moved = features * (1 + scale) + features.std() * shift
    slopes = torch.autograd.grad(_parted(body(moved), groups), (scale, shift))
    return math.sqrt(sum(float(slope.square().sum()) for slope in slopes))


def auc(scores: Sequence[float], selected: Sequence[int]) -> float:
    """Returns the share of (selected, other) pairs that ``scores`` rank rightly; ties count half.

    A client that selects all nets, or a single net of one, has no such pair: 0.5.
    """
    chosen = set(selected)
    others = [i for i in range(len(scores)) if i not in chosen]
    pairs = [(scores[i], scores[j]) for i in chosen for j in others]
    if not pairs:
        return 0.5
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def recovery(view: View, selected: Sequence[int]) -> dict[str, dict[str, float | bool]]:
    """Returns how well each way of ranking finds the selected nets, judged with the secret positions.

    For each way its ``auc``, and ``first``: whether the net that it ranks first is one of them.
    """
    return {
        name: {"auc": auc(scores, selected), "first": max(range(len(scores)), key=scores.__getitem__) in set(selected)}
        for name, scores in rankings(view).items()
    }
