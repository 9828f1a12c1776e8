"""The loop that every stage shares: shuffled batches, augmentation, SGD with a one-cycle schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ensembler.protocol.errors import ConfigError
from ensembler.training.checkpoint import Checkpoint, Progress
from ensembler.training.config import TrainConfig
from ensembler.training.data import Dataset
from ensembler.training.models import PIXEL_ZERO_POINT, normalise
from ensembler.training.processor import computes_narrow

CROP_PADDING = 4
EVALUATION_BATCH = 500


class Reporter(Protocol):
    """Where training tells how far it is; the command line draws progress bars."""

    def begin(self, label: str, total: int) -> None:
        """A piece of work of ``total`` steps starts."""

    def step(self, detail: str) -> None:
        """One step is done."""

    def end(self, summary: str) -> None:
        """The piece of work is done."""


class Silent:
    """A Reporter that says nothing."""

    def begin(self, label: str, total: int) -> None:
        """Ignores it."""

    def step(self, detail: str) -> None:
        """Ignores it."""

    def end(self, summary: str) -> None:
        """Ignores it."""


@dataclass(frozen=True)
class Tensors:
    """A data set as tensors on one device: uint8 images ``(N, 3, H, W)``, int64 labels ``(N,)``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, data: Dataset, device: torch.device, train_limit: int | None = None) -> Tensors:
        """Moves ``data`` to ``device``, at most ``train_limit`` train images."""
        return cls(
            *(
                torch.from_numpy(np.ascontiguousarray(array)).to(device)
                for array in (
                    data.train_x[:train_limit],
                    data.train_y[:train_limit],
                    data.test_x,
                    data.test_y,
                )
            )
        )


def pick_device(name: str) -> torch.device:
    """Resolves ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: CUDA was asked for and is not there, or the name is unknown.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: choose auto, cpu or cuda")
    return torch.device(name)


def derived_seed(*parts: int) -> int:
    """Returns a seed for one piece of the work, from the run's seed and the piece's numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns randomly shifted (by up to 4 pixels) and mirrored copies of uint8 images ``(B, 3, H, W)``."""
    batch, _, height, width = images.shape
    padded = nn.functional.pad(images, [CROP_PADDING] * 4, value=PIXEL_ZERO_POINT)
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, batch), generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    rows = offsets[0, :, None] + torch.arange(height)  # (B, H)
    columns = offsets[1, :, None] + torch.arange(width)  # (B, W)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None, None]
    channel = torch.arange(3)[None, :, None, None]
    device = images.device
    return padded[
        index.to(device),
        channel.to(device),
        rows[:, None, :, None].to(device),
        columns[:, None, None, :].to(device),
    ]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Returns how many batches one pass over the data has."""
    return -(-images // batch_size)


def batches(data: Tensors, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields one epoch of augmented ``(images uint8 (B, 3, H, W), labels (B,))``; a last batch of one is left out."""
    order = torch.randperm(len(data.train_x), generator=generator).to(data.train_x.device)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        if len(chosen) > 1:  # batch norm cannot train on one image
            yield augment(data.train_x[chosen], generator), data.train_y[chosen]


@dataclass(frozen=True)
class StepResult:
    """What one step of a stage returns: the loss to descend, the logits ``(B, K)``, and the heads' ``overlap``."""

    loss: Tensor
    logits: Tensor
    overlap: Tensor | None = None


@dataclass(frozen=True)
class EpochMetrics:
    """Means over one epoch; accuracies in percent."""

    epoch: int
    loss: float
    train_accuracy: float
    overlap: float | None


def fit(
    parameters: Iterable[nn.Parameter],
    step: Callable[[Tensor, Tensor], StepResult],
    data: Tensors,
    config: TrainConfig,
    *,
    epochs: int,
    seed: int,
    reporter: Reporter,
    label: str,
    checkpoint: Checkpoint | None = None,
) -> Iterator[EpochMetrics]:
    """Trains ``parameters``, yielding after each epoch; the checkpoint is written once the caller asks for the next.

    Args:
        parameters: what is trained.
        step: from normalised images ``(B, 3, H, W)`` float32 and labels ``(B,)`` to the loss.
        data: what it is trained on.
        config: batch size, learning rate, weight decay.
        epochs: passes over the data.
        seed: of shuffling and augmentation.
        reporter: told of every step.
        label: what the reporter calls it.
        checkpoint: where this piece stands; what it knows is not trained again.

    Raises:
        ConfigError: the loss is no longer finite.
        DataError: the checkpoint is damaged.
    """
    device = data.train_x.device
    narrow = computes_narrow(config.precision, device)
    generator = torch.Generator().manual_seed(seed)
    steps = steps_per_epoch(len(data.train_x), config.batch_size)
    optimizer = torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=epochs * steps + 1, pct_start=0.3
    )
    done = checkpoint.restore(optimizer, schedule, generator) if checkpoint is not None else Progress()
    if done.epochs:
        label = f"{label}, resumed after epoch {done.epochs} of {epochs}"
    reporter.begin(label, (epochs - done.epochs) * steps)
    for epoch in range(done.epochs, epochs):
        seen, loss_sum, hits, overlap_sum = 0, 0.0, 0, 0.0
        has_overlap = False
        for images, targets in batches(data, config.batch_size, generator):
            with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
                result = step(normalise(images).to(memory_format=torch.channels_last), targets)
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            count = len(targets)
            seen += count
            loss_sum += float(result.loss.detach()) * count
            hits += int((result.logits.argmax(1) == targets).sum())
            if result.overlap is not None:
                has_overlap = True
                overlap_sum += float(result.overlap.detach()) * count
            reporter.step(f"loss {loss_sum / seen:.3f}, accuracy {100 * hits / seen:.1f}%")
        if not np.isfinite(loss_sum):
            raise ConfigError(f"{label}: the loss is no longer finite; lower --learning-rate")
        done = Progress(epoch + 1, 100 * hits / seen)
        yield EpochMetrics(epoch + 1, loss_sum / seen, 100 * hits / seen, overlap_sum / seen if has_overlap else None)
        if checkpoint is not None:
            checkpoint.save(done, optimizer, schedule, generator)
    reporter.end(f"train accuracy {done.train_accuracy:.1f}%")


@torch.inference_mode()
def accuracy(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Returns the top-1 accuracy in percent of ``predict`` (normalised images to logits) on uint8 ``images``."""
    hits = 0
    for start in range(0, len(images), EVALUATION_BATCH):
        chosen = slice(start, start + EVALUATION_BATCH)
        x = normalise(images[chosen]).to(memory_format=torch.channels_last)
        hits += int((predict(x).argmax(1) == labels[chosen]).sum())
    return 100 * hits / len(images)
