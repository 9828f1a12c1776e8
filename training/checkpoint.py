"""Checkpoints: a run that was killed goes on at its last finished epoch and ends in the same bits.

Each piece of work (a stage-1 net, the client) has one file while it is trained, written after every epoch and removed
when the piece is stored. It is a safetensors file: nothing in it can run. Start reading at ``Checkpoint``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training.data import Dataset
from ensembler.training.runs import RunFolder

# Bookkeeping of the schedule and of the optimizer's one group that moves while training.
SCHEDULE_STATE = ("last_epoch", "_step_count", "_last_lr")
GROUP_STATE = ("lr", "momentum")


@dataclass(frozen=True)
class Progress:
    """How far a piece is: epochs done, and the train accuracy of the last one in percent."""

    epochs: int = 0
    train_accuracy: float = 0.0


class Checkpoint:
    """Where one piece of work stands, so that it can go on after a SIGKILL.

    It holds weights and buffers, noise, momentum, the schedule's position, the state of the generator that shuffles and
    augments, torch's global generator (fresh noise draws from it).

    Attributes:
        run: the run folder.
        name: the file, relative to the folder.
    """

    def __init__(self, run: RunFolder, name: str, live: Mapping[str, Tensor], piece: Mapping[str, Any]) -> None:
        """Names the piece.

        Args:
            run: the run folder.
            name: the file, relative to the folder.
            live: the piece's own tensors: read by ``save``, written in place by ``restore``.
            piece: what its lines in ``metrics.jsonl`` have in common.
        """
        self.run = run
        self.name = name
        self._live = live
        self._piece = piece

    def restore(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        generator: torch.Generator,
    ) -> Progress:
        """Puts everything back to the last finished epoch, ``metrics.jsonl`` too; without a file, to the start.

        Raises:
            DataError: the file is damaged, or belongs to another net.
        """
        if not self.run.has(self.name):
            self._keep_metrics(0)
            return Progress()
        tensors, position = self._read()
        with self._intact():
            with torch.no_grad():
                for name, value in self._live.items():
                    value.copy_(_of_shape(tensors[f"live.{name}"], value))
            (group,) = optimizer.param_groups
            for index, parameter in enumerate(group["params"]):
                stored = tensors.get(f"momentum.{index}")
                if stored is not None:
                    # In the parameter's own memory layout, since another one may round differently.
                    momentum = torch.empty_like(parameter).copy_(_of_shape(stored, parameter))
                    optimizer.state[parameter]["momentum_buffer"] = momentum
            group.update({key: position["group"][key] for key in GROUP_STATE})
            schedule.load_state_dict({key: position["schedule"][key] for key in SCHEDULE_STATE})
            generator.set_state(tensors["generator"])
            torch.set_rng_state(tensors["global_generator"])
            if "cuda_generator" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["cuda_generator"])
            progress = Progress(int(position["epochs"]), float(position["train_accuracy"]))
        self._keep_metrics(progress.epochs)
        return progress

    def save(
        self,
        progress: Progress,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        generator: torch.Generator,
    ) -> None:
        """Writes the file whole, in place of the one before; only its owner can read it."""
        (group,) = optimizer.param_groups
        tensors = {f"live.{name}": value for name, value in self._live.items()}
        for index, parameter in enumerate(group["params"]):
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{index}"] = momentum
        tensors["generator"] = generator.get_state()
        tensors["global_generator"] = torch.get_rng_state()
        if group["params"][0].is_cuda:
            tensors["cuda_generator"] = torch.cuda.get_rng_state()
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        moved = schedule.state_dict()
        position = {
            "epochs": progress.epochs,
            "train_accuracy": progress.train_accuracy,
            "group": {key: group[key] for key in GROUP_STATE},
            "schedule": {key: moved[key] for key in SCHEDULE_STATE},
        }
        text = json.dumps(position)
        self.run.save_tensors(self.name, tensors, {"position": text, "digest": _digest(text, tensors)})

    def _keep_metrics(self, epochs: int) -> None:
        """Drops the piece's own lines of ``metrics.jsonl`` from beyond its first ``epochs``."""
        beyond = math.inf  # where the held-out accuracy stands, after the last epoch
        self.run.keep_metrics(
            lambda record: not self._piece.items() <= record.items() or record.get("epoch", beyond) <= epochs
        )

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with self._intact():
            with safe_open(self.run.path / self.name, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            if metadata["digest"] != _digest(metadata["position"], tensors):
                raise ValueError("its digest does not fit its content")
            position: dict[str, Any] = json.loads(metadata["position"])
        return tensors, position

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """Turns whatever is wrong with the file into one error that names it and the cure."""
        try:
            yield
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{self.run.path / self.name} is no intact checkpoint of this run ({error}); remove it, then "
                f"ensembler train --resume {self.run.path} starts this piece anew"
            ) from error


def _of_shape(stored: Tensor, live: Tensor) -> Tensor:
    """Returns ``stored``, which ``copy_`` would otherwise broadcast."""
    if stored.shape != live.shape:
        raise ValueError(f"a tensor of shape {tuple(stored.shape)} in place of {tuple(live.shape)}")
    return stored


def _digest(position: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(position.encode(), digest_size=32)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_digest(data: Dataset) -> str:
    """Returns a digest of images, labels and class names: a run goes on with the data it began with."""
    digest = hashlib.blake2b(json.dumps(data.labels).encode(), digest_size=32)
    for array in (data.train_x, data.train_y, data.test_x, data.test_y):
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def training_lock(run: RunFolder) -> Iterator[None]:
    """Holds the run for this process; the system lets go of it however the process ends.

    Raises:
        ConfigError: another process trains this run.
    """
    with (run.path / "config.json").open("r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{run.path}: another process is training this run; wait for it, or stop it") from error
        except OSError:
            pass  # a file system without locks: nothing is known of another process, and training must be possible
        run.lock = stream.fileno()
        try:
            yield
        finally:
            run.lock = None
