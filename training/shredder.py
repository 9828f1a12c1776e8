"""Learned noise (Shredder, Mireshghallah et al., ASPLOS 2020): the net is frozen and the noise is what trains.

The loss is the net's cross-entropy less a reward for the noise's mean magnitude. Shredder turns the reward down once
the noise is as large as was asked for; here it acts on a tensor while that one's standard deviation is below the asked
one. Each tensor starts from the Laplace law of that deviation. Start reading at ``learn``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.training.checkpoint import Checkpoint
from ensembler.training.config import TrainConfig
from ensembler.training.fit import Reporter, StepResult, Tensors, derived_seed, fit
from ensembler.training.perturbation import Perturbation
from ensembler.training.runs import NOISE_STAGE, RunFolder

REWARD = 0.1  # of one unit of the mean magnitude
# The noise is this share of the root of its size times what is trained. The loss hardly moves with one value of it, the
# less the more there are, so that with steps that suit a net's weights it would stay what it began as.
SCALE = 1 / 4


def learn(
    run: RunFolder,
    config: TrainConfig,
    perturbation: Perturbation,
    shape: tuple[int, ...],
    logits: Callable[[Tensor, Tensor], Tensor],
    data: Tensors,
    *,
    seed: int,
    reporter: Reporter,
) -> Tensor:
    """Learns the noise of a net that no longer changes.

    Args:
        run: where the checkpoint is kept, until the run is finished.
        config: the options; ``epochs_stage3`` passes over the data.
        perturbation: of the client.
        shape: of one image's features.
        logits: from normalised images and the noise tensor or tensors to logits ``(B, K)``; differentiable.
        data: on the device that trains.
        seed: of everything that is drawn.
        reporter: told of the progress.

    Returns:
        The noise, shaped as ``perturbation.start`` shapes it.
    """
    start = perturbation.start(shape, derived_seed(seed, 0)).to(data.train_x.device)
    scale = SCALE * math.sqrt(start.numel())
    trained = nn.Parameter(start / scale)
    count = perturbation.tensors or 1

    def step(x: Tensor, targets: Tensor) -> StepResult:
        noise = trained * scale
        found = logits(x, noise)
        tensors = noise.reshape(count, -1)
        small = tensors.detach().std(1) < perturbation.std
        reward = (tensors.abs().mean(1) * small).mean()
        return StepResult(F.cross_entropy(found, targets) - REWARD * reward, found)

    torch.manual_seed(derived_seed(seed, 1))
    piece = {"stage": NOISE_STAGE}
    for metrics in fit(
        [trained],
        step,
        data,
        config,
        epochs=config.epochs_stage3,
        seed=derived_seed(seed, 2),
        reporter=reporter,
        label="the noise" if count == 1 else f"the noise, {count} tensors",
        checkpoint=Checkpoint(run, run.NOISE_CHECKPOINT, {"trained": trained}, piece),
    ):
        run.append_metrics({**piece, **asdict(metrics)})
    return (trained * scale).detach()
