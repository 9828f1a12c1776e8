"""Stage 1 of Ensembler (Section III-C): N nets, each trained alone, with its own fixed noise after the head (Eq. 2).

The nets have nothing in common but the data, so several may be trained at once, each in a process of its own: see
``together``, or on several machines: see ``ray_pool``. Baselines are trained here too; they do to their features what
the client will do. Start reading at ``stage1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError
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
    steps_per_epoch,
)
from ensembler.training.hiding import Hiding
from ensembler.training.losses import classification_loss
from ensembler.training.models import ArchSpec, Net, build_net, feature_shape, placed
from ensembler.training.perturbation import Perturbation
from ensembler.training.ray_pool import RayPool
from ensembler.training.runs import RunFolder, module_tensors, restore
from ensembler.training.shredder import learn
from ensembler.training.wire import fake_quantise


@dataclass(frozen=True)
class Stage1Net:
    """One stage-1 net.

    Attributes:
        net: its parts.
        noise: its fixed noise ``(C, h, w)``, or as ``Perturbation.start`` shapes it.
        perturbation: what it does to its features.
    """

    net: Net
    noise: Tensor
    perturbation: Perturbation

    def perturbed(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns what is sent for features ``(B, C, h, w)``; ``generator`` as for ``Perturbation.draw``."""
        return self.perturbation.draw(self.noise, len(features), generator).applied(features)

    def logits(self, x: Tensor, codec: AffineCodec | None = None) -> Tensor:
        """Returns logits ``(B, K)`` for normalised images, the features sent through ``codec`` if there is one."""
        return mean_logits([self], x, codec)


def mean_logits(items: Sequence[Stage1Net], x: Tensor, codec: AffineCodec | None = None) -> Tensor:
    """Returns the mean ``(B, K)`` of the logits of nets behind one head, whose features go to all of them."""
    return _answered(items, items[0].net.head(x), codec)


def _answered(items: Sequence[Stage1Net], features: Tensor, codec: AffineCodec | None) -> Tensor:
    """Returns the mean logits ``(B, K)`` for what the head made, ``(B, C, h, w)``."""
    sent = items[0].perturbed(features)
    if codec is not None:
        sent = fake_quantise(sent, codec)
    return torch.stack([item.net.tail(item.net.body(sent)) for item in items]).mean(0)


def stage1(
    run: RunFolder,
    config: TrainConfig,
    arch: ArchSpec,
    data: Tensors,
    reporter: Reporter,
    pool: RayPool | None = None,
) -> list[Stage1Net]:
    """Returns the N nets, frozen, in training order; a stored one is kept, the others are trained.

    Args:
        run: where they are stored.
        config: the options; with ``jobs`` above 1 as many processes train them.
        arch: which net.
        data: on the device that trains.
        reporter: told of the progress.
        pool: the machines that train an ensemble's nets; None is this one. A baseline is always trained here.
    """
    device = data.train_x.device
    everything = range(config.trained_nets)
    missing = [index for index in everything if not run.has(run.stage1_file(index))]
    if missing and config.stage1_pieces < config.trained_nets:
        return train_piece(run, config, arch, everything, data, reporter)
    steps = config.epochs_stage1 * steps_per_epoch(len(data.train_x), config.batch_size)
    if pool is not None and config.is_ensemble and missing:
        pool.train_nets(run, config, missing, data, steps, reporter)
        missing = []
    elif config.jobs > 1 and len(missing) > 1:
        together.train_nets(run, config, missing, device, steps, reporter)
        missing = []
    trained = []
    for index in everything:
        if index in missing:
            trained += train_piece(run, config, arch, [index], data, reporter)
        else:
            run.remove(run.stage1_checkpoint(index))
            stored = _stored(run, index)
            # In the layout that it was trained in: another one rounds differently.
            trained.append(replace(stored, net=placed(stored.net, device), noise=stored.noise.to(device)))
    return trained


def train_piece(
    run: RunFolder, config: TrainConfig, arch: ArchSpec, indices: Sequence[int], data: Tensors, reporter: Reporter
) -> list[Stage1Net]:
    """Trains, or goes on training, and stores the nets ``indices`` as one piece of work; returns them frozen.

    One net is trained alone (Eq. 2). Several share a head and are trained together, by the mean of their logits: that
    is the ensemble without stage 1 (Ensembler, Section IV-B, "DR-10").
    """
    device, first, shape = data.train_x.device, indices[0], feature_shape(arch)
    torch.manual_seed(derived_seed(config.seed, 1, first, 0))
    nets = [placed(build_net(arch, channels=config.heard_channels(index)), device) for index in indices]
    for net in nets[1:]:
        net.head = nets[0].head
    perturbation = config.stage1_perturbation
    is_learned = perturbation.noise == "learned"
    # Noise that is learned comes when the net is there.
    trained_with = Perturbation(dropout=perturbation.dropout) if is_learned else perturbation
    noise = trained_with.start(shape, derived_seed(config.seed, 1, first, 1)).to(device)
    items = [Stage1Net(net, noise, trained_with) for net in nets]
    codec = nets[0].codec  # of a bottleneck, from the first step on
    teacher = teacher_of(config, arch, run.labels, device)
    hiding = Hiding(config, arch, device)

    def step(x: Tensor, targets: Tensor) -> StepResult:
        features = nets[0].head(x)
        logits = _answered(items, features, codec)
        loss = classification_loss(logits, targets, teacher(x), config.teacher_weight)
        return StepResult(loss + hiding.loss(x, features, targets), logits)

    piece = {"stage": 1, "net": first}
    live = {**module_tensors("net", nets[0]), "noise": noise, **hiding.state()}
    for index, net in enumerate(nets[1:], 1):
        live |= module_tensors(f"body{index}", net.body) | module_tensors(f"tail{index}", net.tail)
    words = f"nets 1 to {len(nets)} together" if len(nets) > 1 else f"net {first + 1} of {config.trained_nets}"
    for metrics in fit(
        [*nn.ModuleList(nets).train().parameters(), *hiding.parameters()],
        step,
        data,
        config,
        epochs=config.epochs_stage1,
        seed=derived_seed(config.seed, 1, first, 2),
        reporter=reporter,
        label=f"stage 1, {words}",
        checkpoint=Checkpoint(run, run.stage1_checkpoint(first), live, piece),
    ):
        run.append_metrics({**piece, **asdict(metrics)})
    for net in nets:
        freeze(net)
    if is_learned:

        def with_noise(x: Tensor, noise: Tensor) -> Tensor:
            return mean_logits([Stage1Net(net, noise, perturbation) for net in nets], x, codec)

        seed = derived_seed(config.seed, 1, first, 3)
        noise = learn(run, config, perturbation, shape, with_noise, data, seed=seed, reporter=reporter)
        items = [Stage1Net(net, noise, perturbation) for net in nets]
    tested = accuracy(lambda x: mean_logits(items, x, codec), data.test_x, data.test_y)
    run.append_metrics({**piece, "test_accuracy": tested})
    for index, item in zip(indices, items, strict=True):
        _store(run, index, item)
    run.remove(run.stage1_checkpoint(first))
    return items


def teacher_of(
    config: TrainConfig, arch: ArchSpec, labels: Sequence[str], device: torch.device
) -> Callable[[Tensor], Tensor | None]:
    """Returns what gives a teacher's logits ``(B, K)`` for normalised images; None for each without a teacher.

    Raises:
        ConfigError: the teacher has a defence of its own, or was trained on other images or classes.
        DataError: the teacher's run cannot be read.
    """
    if config.teacher is None:
        return lambda _: None
    path = Path(config.teacher)
    source = RunFolder.open(path)
    if source.config.defense != "none":
        raise ConfigError(f"--teacher {path}: is a run with --defense {source.config.defense}; train one with none")
    if (source.labels, source.arch.image_size) != (tuple(labels), arch.image_size):
        raise ConfigError(f"--teacher {path}: was trained on images of other sizes or classes; give the same --data")
    (teacher,) = load_stage1(source)
    net = placed(teacher.net, device)

    @torch.no_grad()
    def taught(x: Tensor) -> Tensor:
        logits: Tensor = net.tail(net.body(net.head(x)))
        return logits

    return taught


def _store(run: RunFolder, index: int, item: Stage1Net) -> None:
    """Stores one stage-1 net."""
    tensors = {"noise": item.noise}
    for name, part in item.net.named_children():
        tensors |= module_tensors(name, part)
    run.save_tensors(run.stage1_file(index), tensors)


def load_stage1(run: RunFolder, device: torch.device | None = None) -> list[Stage1Net]:
    """Reads the N stage-1 nets, frozen, in training order."""
    nets = [_stored(run, index) for index in range(run.config.trained_nets)]
    place = device or torch.device("cpu")
    return [replace(item, net=item.net.to(place), noise=item.noise.to(place)) for item in nets]


def _stored(run: RunFolder, index: int) -> Stage1Net:
    """Reads one stage-1 net, frozen, on the CPU."""
    tensors = run.load_tensors(run.stage1_file(index))
    net = build_net(run.arch, channels=run.config.heard_channels(index))
    for name, module in (("head", net.head), ("body", net.body), ("tail", net.tail)):
        restore(module, name, tensors)
    return Stage1Net(freeze(net), tensors["noise"], run.config.stage1_perturbation)


def freeze(net: Net) -> Net:
    """Makes the net constant: eval() too, since batch-norm statistics updated in P bodies would name the selector."""
    return net.eval().requires_grad_(False)
