"""Stage 1 of Ensembler (Section III-C): N nets, each trained alone, with its own fixed noise after the head (Eq. 2).

The nets have nothing in common but the data, so several may be trained at once, each in a process of its own: see
``together``. Start reading at ``stage1``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.protocol.codec import AffineCodec
from ensembler.training import together
from ensembler.training.checkpoint import Checkpoint
from ensembler.training.config import TrainConfig
from ensembler.training.fit import (
    Reporter,
    StepResult,
    Tensors,
    accuracy,
    derived_seed,
    fit,
    gaussian_noise,
    steps_per_epoch,
)
from ensembler.training.models import ArchSpec, Net, build_net, feature_shape
from ensembler.training.runs import RunFolder, module_tensors, restore
from ensembler.training.wire import fake_quantise

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Stage1Net:
    """One stage-1 net with its fixed noise tensor ``(C, h, w)``."""

    net: Net
    noise: Tensor

    def logits(self, x: Tensor, codec: AffineCodec | None = None) -> Tensor:
        """Returns logits ``(B, K)`` for normalised images, the features sent through ``codec`` if there is one."""
        sent = self.net.head(x) + self.noise
        if codec is not None:
            sent = fake_quantise(sent, codec)
        logits: Tensor = self.net.tail(self.net.body(sent))
        return logits


def stage1(run: RunFolder, config: TrainConfig, arch: ArchSpec, data: Tensors, reporter: Reporter) -> list[Stage1Net]:
    """Returns the N nets, frozen, in training order; a stored one is kept, the others are trained.

    Args:
        run: where they are stored.
        config: the options; with ``jobs`` above 1 as many processes train them.
        arch: which net.
        data: on the device that trains.
        reporter: told of the progress.
    """
    device = data.train_x.device
    missing = [index for index in range(config.trained_nets) if not run.has(run.stage1_file(index))]
    if config.jobs > 1 and len(missing) > 1:
        steps = config.epochs_stage1 * steps_per_epoch(len(data.train_x), config.batch_size)
        together.train_nets(run, config, missing, device, steps, reporter)
        missing = []
    trained = []
    for index in range(config.trained_nets):
        if index in missing:
            trained.append(train_net(run, config, arch, index, data, reporter))
        else:
            run.remove(run.stage1_checkpoint(index))
            stored = _stored(run, index)
            # In the layout that it was trained in: another one rounds differently.
            trained.append(Stage1Net(placed(stored.net, device), stored.noise.to(device)))
    return trained


def train_net(
    run: RunFolder, config: TrainConfig, arch: ArchSpec, index: int, data: Tensors, reporter: Reporter
) -> Stage1Net:
    """Trains, or goes on training, and stores the net ``index``; returns it frozen."""
    torch.manual_seed(derived_seed(config.seed, 1, index, 0))
    net = placed(build_net(arch), data.train_x.device)
    noise = gaussian_noise(feature_shape(arch), config.stage1_noise_std, derived_seed(config.seed, 1, index, 1))
    noise = noise.to(data.train_x.device)
    item = Stage1Net(net, noise)
    bottleneck = config.squeezed
    # A bottleneck's quantiser is part of the net from the first step on.
    forward = partial(item.logits, codec=None if bottleneck is None else bottleneck.codec)

    def step(x: Tensor, targets: Tensor) -> StepResult:
        logits = forward(x)
        return StepResult(F.cross_entropy(logits, targets), logits)

    piece = {"stage": 1, "net": index}
    net.train()
    for metrics in fit(
        net.parameters(),
        step,
        data,
        config,
        epochs=config.epochs_stage1,
        seed=derived_seed(config.seed, 1, index, 2),
        reporter=reporter,
        label=f"stage 1, net {index + 1} of {config.trained_nets}",
        checkpoint=Checkpoint(run, run.stage1_checkpoint(index), {**module_tensors("net", net), "noise": noise}, piece),
    ):
        run.append_metrics({**piece, **asdict(metrics)})
    freeze(net)
    run.append_metrics({**piece, "test_accuracy": accuracy(forward, data.test_x, data.test_y)})
    parts = {**module_tensors("head", net.head), **module_tensors("body", net.body), **module_tensors("tail", net.tail)}
    run.save_tensors(run.stage1_file(index), {**parts, "noise": noise})
    run.remove(run.stage1_checkpoint(index))
    return item


def load_stage1(run: RunFolder, device: torch.device | None = None) -> list[Stage1Net]:
    """Reads the N stage-1 nets, frozen, in training order."""
    nets = [_stored(run, index) for index in range(run.config.trained_nets)]
    return [Stage1Net(item.net.to(device or "cpu"), item.noise.to(device or "cpu")) for item in nets]


def _stored(run: RunFolder, index: int) -> Stage1Net:
    """Reads one stage-1 net, frozen, on the CPU."""
    tensors = run.load_tensors(run.stage1_file(index))
    net = build_net(run.arch)
    for name, module in (("head", net.head), ("body", net.body), ("tail", net.tail)):
        restore(module, name, tensors)
    return Stage1Net(freeze(net), tensors["noise"])


def placed(module: M, device: torch.device) -> M:
    """Moves a module to its device, channels last: a third faster on the CPU."""
    module.to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def freeze(net: Net) -> Net:
    """Makes the net constant: eval() too, since batch-norm statistics updated in P bodies would name the selector."""
    return net.eval().requires_grad_(False)
