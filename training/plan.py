"""What a run will cost, before it is started: a few real steps of stages 1 and 3, in a folder that goes away again."""

from __future__ import annotations

import itertools
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensembler.training import together
from ensembler.training.config import TrainConfig
from ensembler.training.fit import Tensors, pick_device, steps_per_epoch
from ensembler.training.fixing import CALIBRATION_IMAGES, fix_wire
from ensembler.training.models import build_net, feature_shape
from ensembler.training.runs import ClientSecret, RunFolder
from ensembler.training.stage1 import Stage1Net, stage1
from ensembler.training.stages import Client, load_data, stage3

MEASURED_STEPS = 4  # of each stage; the first one warms up and does not count
WIRE_IMAGES = 32
# A held-out image costs the forward pass alone: about a third of a training step's share for one image.
EVALUATION_SHARE = 1 / 3
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage that trains.

    Attributes:
        pieces: nets of stage 1 (1 where they train together), or the one client of stage 3, its tail, or its noise.
        trained_parameters: of one piece.
        epochs: passes over the data.
        steps_per_epoch: batches.
        step_ms: the median of a few real steps, in milliseconds.
        time_s: of the whole stage, in seconds.
        jobs: pieces that train at once; each step takes ``step_ms`` meanwhile.
    """

    pieces: int
    trained_parameters: int
    epochs: int
    steps_per_epoch: int
    step_ms: float
    time_s: float
    jobs: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``ensembler train --dry-run`` prints.

    Attributes:
        device: ``cpu`` or ``cuda``.
        train_images: how many.
        test_images: how many.
        image_size: height and width in pixels.
        num_classes: K.
        num_nets: N, or 1 for a baseline of one net.
        num_selected: P, or all nets of a baseline.
        parameters: of one net: head, body, tail.
        stages: by name, ``stage1``, ``stage3``, ``tail`` and ``noise``; the one that is not trained is absent.
        stage1_other: stage 1 with the ``jobs`` that were not asked for: 1, or as many as there are threads; None
            where there is no choice.
        time_s: all stages, in seconds.
        peak_memory_mib: the measured peak of this process, and an estimate of what a whole run adds.
        peak_memory_measured_mib: the measured part.
        disk_mib: the run folder at its largest, from the sizes of files that were really written.
    """

    device: str
    train_images: int
    test_images: int
    image_size: tuple[int, int]
    num_classes: int
    num_nets: int
    num_selected: int
    parameters: dict[str, int]
    stages: dict[str, StagePlan]
    stage1_other: StagePlan | None
    time_s: float
    peak_memory_mib: float
    peak_memory_measured_mib: float
    disk_mib: float

    def to_dict(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Returns it for people."""
        height, width = self.image_size
        lines = [
            f"data      {self.train_images} train and {self.test_images} held-out images of {height}x{width} pixels, "
            f"{self.num_classes} classes",
            "net       " + ", ".join(f"{name} {count:,}" for name, count in self.parameters.items()) + " parameters",
        ]
        for name, what in (("stage1", "nets"), ("stage3", "client")):
            stage = self.stages.get(name)
            if stage is None:
                lines.append(f"{name[:-1]} {name[-1]}   not trained")
            else:
                at_once = f", {stage.jobs} at a time" if stage.jobs > 1 else ""
                count = stage.pieces
                if what == "nets" and count < self.num_nets:
                    count, at_once = self.num_nets, ", together"
                lines.append(
                    f"{name[:-1]} {name[-1]}   {count} {what}{at_once}, each {stage.epochs} epochs of "
                    f"{stage.steps_per_epoch} steps of {stage.step_ms:.0f} ms: {duration(stage.time_s)}"
                )
            if name == "stage1":
                other = self.stage1_other
                if stage is not None and other is not None:
                    faster = "faster" if other.time_s < stage.time_s else "no faster"
                    lines.append(
                        f"          --jobs {other.jobs} is {faster} here: {duration(other.time_s)}, measured now"
                    )
                lines.append(f"stage 2   a secret {self.num_selected} of {self.num_nets}")
        tail = self.stages.get("tail")
        if tail is not None:
            lines.append(
                f"tail      after its head: {tail.epochs} epochs of {tail.steps_per_epoch} steps of "
                f"{tail.step_ms:.0f} ms: {duration(tail.time_s)}"
            )
        noise = self.stages.get("noise")
        if noise is not None:
            lines.append(
                f"noise     {noise.trained_parameters:,} values, learned with the net frozen: {noise.epochs} epochs of "
                f"{noise.steps_per_epoch} steps of {noise.step_ms:.0f} ms: {duration(noise.time_s)}"
            )
        return "\n".join(
            [
                *lines,
                f"time      {duration(self.time_s)} on {self.device}, from real steps on this machine, as busy "
                "as it is now",
                f"memory    {self.peak_memory_mib:,.0f} MiB at its peak: {self.peak_memory_measured_mib:,.0f} measured "
                "here, the rest estimated",
                f"disk      {self.disk_mib:,.1f} MiB, from the files of one net and one client",
                "nothing was kept; without --dry-run the run starts",
            ]
        )


def duration(seconds: float) -> str:
    """Returns a time for people, for instance ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class _Clock:
    """A Reporter that notes when the steps of each piece of work were done."""

    def __init__(self) -> None:
        self._pieces: list[list[float]] = []

    def begin(self, label: str, total: int) -> None:  # noqa: ARG002 (the protocol's)
        self._pieces.append([time.perf_counter()])

    def step(self, detail: str) -> None:  # noqa: ARG002
        self._pieces[-1].append(time.perf_counter())

    def end(self, summary: str) -> None:
        pass

    def step_s(self, piece: int) -> float:
        """The median of a piece's steps after the first, in seconds."""
        steps = [b - a for a, b in itertools.pairwise(self._pieces[piece])]
        return statistics.median(steps[1:] or steps)


def make_plan(config: TrainConfig, *, stage1_from: Path | None = None) -> Plan:
    """Measures a few steps of what ``config`` asks for; nothing of it stays.

    Args:
        config: the options.
        stage1_from: the run whose stage 1 is taken.

    Raises:
        ConfigError: an impossible option.
        DataError: the data, or the run ``stage1_from``.
    """
    device = pick_device(config.device)
    dataset, arch = load_data(config, stage1_from)
    net = build_net(arch)
    data = Tensors.of(dataset, device, config.train_limit)
    selected = config.used_nets
    pieces = config.stage1_pieces
    steps = steps_per_epoch(len(data.train_x), config.batch_size)
    few = MEASURED_STEPS * config.batch_size
    brief = Tensors(data.train_x[:few], data.train_y[:few], data.test_x[:2], data.test_y[:2])
    # One net stands for all N where each is a piece of its own: they cost the same.
    at_once = config.trained_nets // pieces
    tried = replace(config, epochs_stage1=1, epochs_stage3=1, num_nets=at_once, num_selected=1, parties=1)
    stages: dict[str, StagePlan] = {}
    other = None
    jobs = 1 if stage1_from is not None else min(config.jobs, pieces)
    with tempfile.TemporaryDirectory(prefix="ensembler-plan-") as folder:
        run = RunFolder.create(Path(folder) / "run", tried, arch, dataset.labels)
        clock = _Clock()
        nets = stage1(run, tried, arch, brief, clock) * pieces
        evaluation = len(data.test_x) / config.batch_size * EVALUATION_SHARE
        if stage1_from is None:
            trained = _parameters(net.head) + at_once * (_parameters(net.body) + _parameters(net.tail))
            stages["stage1"] = _stage1(config, trained, steps, evaluation, clock.step_s(0))
            several = jobs if jobs > 1 else min(torch.get_num_threads(), pieces)
            if several > 1:
                tried = replace(tried, num_nets=several, train_limit=few)
                shared = RunFolder.create(Path(folder) / "together", tried, arch, dataset.labels)
                step_s = together.step_s(shared, several, device)
                other = _stage1(config, trained, steps, evaluation, step_s, several)
                if jobs > 1:
                    stages["stage1"], other = other, stages["stage1"]
        if config.is_ensemble:
            wire = fix_wire(nets, brief.train_x[:WIRE_IMAGES])
            secret = ClientSecret(selector=tuple(range(selected)), seed=0)
            client = stage3(run, replace(config, epochs_stage3=1), arch, brief, nets, wire, secret, clock)
            stages |= _of_client(config, client, steps, evaluation, clock)
        if config.noise == "learned":
            values = config.perturbation.start(feature_shape(arch), 0).numel()
            stages["noise"] = _late(config.epochs_stage3, values, steps, 0, clock.step_s(-1))
        sizes = {path.name: path.stat().st_size for path in run.path.rglob("*") if path.is_file()}
        net_bytes = sizes[Path(run.stage1_file(0)).name]
        client_bytes = sizes.get(Path(run.CLIENT_CHECKPOINT).name, net_bytes)
        noise_bytes = sizes.get(Path(run.NOISE_CHECKPOINT).name, 0)
    measured = _peak_memory_mib(device)
    # What a whole run holds beside: the other nets; and while the wire is fixed, the features of all N heads, twice.
    others = (config.trained_nets - 1) * net_bytes
    features = 2 * config.trained_nets * min(CALIBRATION_IMAGES, len(data.train_x)) * _feature_bytes(nets[0])
    return Plan(
        device=device.type,
        train_images=len(data.train_x),
        test_images=len(data.test_x),
        image_size=arch.image_size,
        num_classes=arch.num_classes,
        num_nets=config.trained_nets,
        num_selected=selected,
        parameters={name: _parameters(part) for name, part in net.named_children()},
        stages=stages,
        stage1_other=other,
        time_s=sum(stage.time_s for stage in stages.values()),
        # Processes that train hold the data and a net each, like this one.
        peak_memory_mib=measured * (1 + jobs if jobs > 1 else 1) + (others + features) / MIB,
        peak_memory_measured_mib=measured,
        # At its largest: all nets, the client, and the checkpoint of one piece (weights and momentum).
        disk_mib=((config.trained_nets + 2 * at_once) * net_bytes + 2 * client_bytes + noise_bytes) / MIB,
    )


def _stage1(
    config: TrainConfig, trained: int, steps: int, evaluation: float, step_s: float, jobs: int = 1
) -> StagePlan:
    rounds = -(-config.stage1_pieces // jobs)
    return StagePlan(
        pieces=config.stage1_pieces,
        trained_parameters=trained,
        epochs=config.epochs_stage1,
        steps_per_epoch=steps,
        step_ms=1000 * step_s,
        time_s=(config.epochs_stage1 * steps + evaluation) * step_s * rounds,
        jobs=jobs,
    )


def _of_client(
    config: TrainConfig, client: Client, steps: int, evaluation: float, clock: _Clock
) -> dict[str, StagePlan]:
    # The summary evaluates twice: in float and through the wire.
    stages = {"stage3": _late(config.epochs_stage3, _parameters(client), steps, 2 * evaluation, clock.step_s(1))}
    if config.epochs_of_tail:
        stages["tail"] = _late(config.epochs_of_tail, _parameters(client.tail), steps, 0, clock.step_s(2))
    return stages


def _late(epochs: int, trained: int, steps: int, evaluation: float, step_s: float) -> StagePlan:
    return StagePlan(
        pieces=1,
        trained_parameters=trained,
        epochs=epochs,
        steps_per_epoch=steps,
        step_ms=1000 * step_s,
        time_s=(epochs * steps + evaluation) * step_s,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _feature_bytes(item: Stage1Net) -> int:
    return item.noise.numel() * item.noise.element_size()


def _peak_memory_mib(device: torch.device) -> float:
    """Returns the most that this process has held so far: on the GPU there, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
