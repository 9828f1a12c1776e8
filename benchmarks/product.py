"""What several benchmarks do with the product: train unless there is a run already, export, serve, predict."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ensembler import EdgeClient
from ensembler.cli import main as ensembler
from ensembler.cli.console import Console, ProgressReporter
from ensembler.cli.demo import server_process
from ensembler.cli.train import add_arguments, config_of
from ensembler.edge_runtime.card import file_digests
from ensembler.privacy.audit import NOT_ASKED, audit, chosen_attacks
from ensembler.protocol.manifest import MANIFEST_NAME
from ensembler.protocol.manifest import load_client as load_client_manifest
from ensembler.training.config import TrainConfig
from ensembler.training.data import Dataset
from ensembler.training.fit import EVALUATION_BATCH
from ensembler.training.models import normalise
from ensembler.training.runs import RunFolder
from ensembler.training.stages import load_bodies, load_client

# Of a run's options: how they were computed, and not what.
OF_THE_MACHINE = {"device", "jobs", "precision"}
# No option of the command line, so any will do; and a secret, which no message may hold.
UNSAID = {"client_seed"}


def checked(*arguments: str) -> None:
    """Runs a verb of the command line; ends the benchmark where it fails."""
    status = ensembler(list(arguments))
    if status:
        raise SystemExit(status)


def trained(run: Path, *arguments: str) -> Path:
    """Trains into ``run`` unless a finished run is there; goes on with one that was stopped.

    Ends the benchmark where the run that is there has other options than ``arguments`` gives: its figures would stand
    under a command that does not lead to them.
    """
    if not (run / "config.json").is_file():
        checked("train", *arguments, "--out", str(run))
        return run
    finished = (run / "summary.json").is_file()
    there = RunFolder.open(run) if finished else RunFolder.open_unfinished(run)
    if others := _other_options(there, arguments):
        raise SystemExit(f"{run} was trained with {others}; delete it, or keep this run in another folder")
    if not finished:
        checked("train", "--resume", str(run))
    return run


def _other_options(run: RunFolder, arguments: Sequence[str]) -> str:
    """Says which options of a run are not those that ``arguments`` lead to, but for those of the machine."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(arguments)
    source = None if options.stage1 is None else options.stage1.absolute()  # as a run notes it
    if run.stage1_source != source:
        return f"stage 1 of {run.stage1_source or 'its own'} and not of {source or 'its own'}"
    has, wanted = run.config, config_of(options)
    if wanted.teacher is not None:
        wanted = replace(wanted, teacher=str(Path(wanted.teacher).absolute()))  # as a run notes it
    names = sorted({field.name for field in fields(TrainConfig)} - OF_THE_MACHINE - UNSAID)
    return ", ".join(
        f"{name} {getattr(has, name)} and not {getattr(wanted, name)}"
        for name in names
        if getattr(has, name) != getattr(wanted, name)
    )


def exported(run: Path, out: Path, data: str, *arguments: str) -> Path:
    """Exports anew into ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    checked("export", str(run), "--out", str(out), "--data", data, *arguments)
    return out


def is_exported(run: Path, out: Path) -> bool:
    """Returns whether ``out`` has a whole export of a finished run: the client comes last, and after the run's end."""
    summary, client = run / "summary.json", out / "client" / MANIFEST_NAME
    return summary.is_file() and client.is_file() and client.stat().st_mtime >= summary.stat().st_mtime


def exported_once(run: Path, out: Path, data: str, *arguments: str) -> Path:
    """Exports into ``out`` unless the run's export is there: with it would go what lies beside it, such as reports."""
    return out if is_exported(run, out) else exported(run, out, data, *arguments)


def is_about(
    report: Path,
    bundle: Path,
    *,
    budget: str,
    attacks: Sequence[str] | None = None,
    auxiliary: str = "disjoint",
    other_device: Path | None = None,
    coalition: Sequence[int] | None = None,
    seeds: int | None = None,
) -> bool:
    """Returns whether the JSON is there of an audit as these arguments of ``audit`` ask for, and of the bundle's files.

    It may have more attacks. One that could not run counts as there: it could not run again.
    """
    if not report.is_file():
        return False
    document = json.loads(report.read_text(encoding="utf-8"))
    _, names, count = chosen_attacks(report.with_suffix(".html"), budget=budget, attacks=attacks, seeds=seeds)
    tried = {row["name"] for row in document["attacks"]}
    tried |= {each["name"] for each in document["not_run"] if not each["why"].startswith(NOT_ASKED)}
    subject = document["subject"]
    has = (
        document["budget"],
        document["seeds"],
        document["images"]["auxiliary_source"],
        subject["digests"],
        subject.get("other_device"),
        subject.get("operators", "").partition(" of ")[0],
    )
    wanted = (
        budget,
        list(range(count)),
        auxiliary,
        _digests(bundle),
        None if other_device is None else _digests(other_device),
        ", ".join(str(each + 1) for each in coalition or ()),
    )
    return has == wanted and tried.issuperset(names)


def _digests(bundle: Path) -> dict[str, str]:
    return file_digests(bundle, load_client_manifest(bundle))


def audited(run: Path, bundle: Path, report: Path, *, command: str = "", **asked: Any) -> dict[str, Any]:
    """Returns an audit's JSON, which is made if it is not there.

    Args:
        run: that trained the client.
        bundle: the client.
        report: the HTML, beside which the JSON is.
        command: for the report.
        asked: what is asked of ``audit``, as for ``is_about``.
    """
    document = report.with_suffix(".json")
    if not is_about(document, bundle, **asked):
        reporter = ProgressReporter(Console(as_json=False))
        audit(run, bundle, report, command=command, reporter=reporter, **asked)
    found: dict[str, Any] = json.loads(document.read_text(encoding="utf-8"))
    return found


def clearest_psnr_db(row: dict[str, Any]) -> float:
    """Returns the PSNR of an attack's row in a report: the clearest variant's, where it has several."""
    clearest = [seen["best_by_psnr"]["psnr_db"] for seen in row["seen"].values() if "best_by_psnr" in seen]
    return max([float(row["psnr_db"]["mean"]), *clearest])


@dataclass(frozen=True, eq=False)
class Served:
    """What an application sees: which held-out images are right, and one image's bytes with headers."""

    right: npt.NDArray[np.bool_]
    bytes_up: int
    bytes_down: int

    @property
    def percent(self) -> float:
        """The accuracy."""
        return 100 * float(self.right.mean())


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
    right = np.array([p.label == label for p, label in zip(predictions, truth, strict=True)])
    return Served(right, one.bytes_up, one.bytes_down)


@torch.inference_mode()
def right_in_torch(run: RunFolder, dataset: Dataset, *, through_wire: bool = True) -> npt.NDArray[np.bool_]:
    """Returns which held-out images a run's client gets right in torch, with what travels quantised or not."""
    client, bodies = load_client(run), load_bodies(run)
    selected = [bodies[position] for position in client.selector]
    right = []
    for start in range(0, len(dataset.test_x), EVALUATION_BATCH):
        chosen = slice(start, start + EVALUATION_BATCH)
        features = client.head(normalise(torch.from_numpy(dataset.test_x[chosen])))
        logits = client.finish(features, selected, through_wire=through_wire)
        right.append(logits.argmax(1).numpy() == dataset.test_y[chosen])
    return np.concatenate(right)
