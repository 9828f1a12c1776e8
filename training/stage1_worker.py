"""What a process of ``together`` or of ``ray_pool`` does: ``python -m ensembler.training.stage1_worker RUN ORDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from ensembler.protocol.errors import DataError
from ensembler.training import data as data_sets
from ensembler.training.checkpoint import data_digest
from ensembler.training.config import TrainConfig
from ensembler.training.fit import Tensors
from ensembler.training.processor import keep_freed_memory
from ensembler.training.runs import RunFolder
from ensembler.training.stage1 import train_piece
from ensembler.training.together import ERRORS


class _Telling:
    """A Reporter that writes to the parent."""

    def __init__(self, index: int, *, hold: bool) -> None:
        self._index = index
        self._hold = hold

    def _tell(self, event: str, detail: object) -> None:
        _say(event, self._index, detail)

    def begin(self, label: str, total: int) -> None:  # noqa: ARG002 (the parent has its own)
        self._tell("begin", total)
        if self._hold:
            sys.stdin.readline()

    def step(self, detail: str) -> None:
        self._tell("step", detail)

    def end(self, summary: str) -> None:
        self._tell("end", summary)


def _say(*event: object) -> None:
    print(json.dumps(event), flush=True)


def _data(run: RunFolder, config: TrainConfig, sent: str | None) -> Tensors:
    """Loads what the run trains on, or what was sent here: a file of the fields of ``Tensors``."""
    device = torch.device(config.device)
    if sent is not None:
        with np.load(sent) as arrays:
            return Tensors(*(torch.from_numpy(arrays[field.name]).to(device) for field in fields(Tensors)))
    dataset = data_sets.load(config.data)
    if run.data_digest and data_digest(dataset) != run.data_digest:
        raise DataError(f"--data {config.data}: was changed while the run was training")
    return Tensors.of(dataset, device, config.train_limit)


def main(arguments: Sequence[str]) -> int:
    """Trains the nets of one process; ``arguments`` are the run folder and the order, as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its processes
    run, order = RunFolder(Path(arguments[0])), json.loads(arguments[1])
    keep_freed_memory()
    torch.set_num_threads(order["threads"])
    try:
        config = replace(run.config, device=order["device"])
        data = _data(run, config, order.get("data"))
        for index in order["nets"]:
            train_piece(run, config, run.arch, [index], data, _Telling(index, hold=order["hold"]))
    except tuple(ERRORS.values()) as error:
        _say("error", type(error).__name__, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the parent is gone
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
