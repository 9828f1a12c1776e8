"""What several benchmarks do with the product: train unless there is a run already, export, serve, predict."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensembler import EdgeClient
from ensembler.cli import main as ensembler
from ensembler.cli.demo import server_process
from ensembler.training.data import Dataset


def checked(*arguments: str) -> None:
    """Runs a verb of the command line; ends the benchmark where it fails."""
    status = ensembler(list(arguments))
    if status:
        raise SystemExit(status)


def trained(run: Path, *arguments: str) -> Path:
    """Trains into ``run`` unless a finished run is there; goes on with one that was stopped."""
    if (run / "summary.json").is_file():
        return run
    if (run / "config.json").is_file():
        checked("train", "--resume", str(run))
    else:
        checked("train", *arguments, "--out", str(run))
    return run


def exported(run: Path, out: Path, data: str, *arguments: str) -> Path:
    """Exports anew into ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    checked("export", str(run), "--out", str(out), "--data", data, *arguments)
    return out


@dataclass(frozen=True)
class Served:
    """What an application sees: accuracy in percent over the whole test set, and one image's bytes with headers."""

    percent: float
    bytes_up: int
    bytes_down: int


def served(out: Path, dataset: Dataset) -> Served:
    """Serves the bundles in ``out`` with encryption and predicts the held-out images."""
    images = np.ascontiguousarray(dataset.test_x.transpose(0, 2, 3, 1))
    with (
        server_process(out / "server") as endpoint,
        EdgeClient(out / "client", endpoint, timeout_ms=600_000) as client,
    ):
        one = client.predict(images[0])
        predictions = client.predict_batch(list(images))
    truth = [dataset.labels[i] for i in dataset.test_y]
    hits = sum(p.label == label for p, label in zip(predictions, truth, strict=True))
    return Served(100 * hits / len(truth), one.bytes_up, one.bytes_down)
