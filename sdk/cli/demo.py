"""``ensembler demo``: the whole product on the built-in images, with a real server process and encryption."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ensembler.cli import export as export_verb
from ensembler.cli.console import Console, ProgressReporter, a_path, need_export
from ensembler.client import EdgeClient
from ensembler.protocol.errors import ConfigError, EnsemblerError

NAME = "demo"
HELP = "train, export, serve and predict on the built-in images, in minutes"

MARKER = ".ensembler-demo"
NUM_NETS, NUM_SELECTED = 4, 2
EPOCHS_STAGE1, EPOCHS_STAGE3 = 4, 6
SINGLE_PREDICTIONS = 100
# Of 1,200 test images 0.5 points are six: less than chance moves, so the demo's gate is wider than the default.
MAX_ACCURACY_DROP_POINTS = 2.0
REPORT = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--out", type=a_path, default=Path("ensembler-demo"), help="folder (default: ensembler-demo)")
    parser.add_argument("--epochs-stage1", type=int, default=EPOCHS_STAGE1, help=f"(default: {EPOCHS_STAGE1})")
    parser.add_argument("--epochs-stage3", type=int, default=EPOCHS_STAGE3, help=f"(default: {EPOCHS_STAGE3})")
    parser.add_argument("--train-limit", type=int, default=None, help="use fewer images, for a quick look")
    parser.add_argument("--no-gates", action="store_true", help="export whatever the parity report says")
    parser.add_argument("--no-audit", action="store_true", help="leave out the privacy audit, the longest part")


def run(options: argparse.Namespace, console: Console) -> int:
    """Runs the demo."""
    need_export()
    from ensembler.export.parity import Gates
    from ensembler.export.pipeline import ExportOptions, export
    from ensembler.training import data as data_sets
    from ensembler.training.config import TrainConfig
    from ensembler.training.stages import train

    started = time.monotonic()
    out: Path = options.out
    _fresh_folder(out)
    console.say(f"1/5  training {NUM_NETS} nets, then a client for a secret {NUM_SELECTED} of them")
    summary = train(
        TrainConfig(
            data="demo",
            arch="resnet10_slim",
            num_nets=NUM_NETS,
            num_selected=NUM_SELECTED,
            epochs_stage1=options.epochs_stage1,
            epochs_stage3=options.epochs_stage3,
            train_limit=options.train_limit,
        ),
        out / "run",
        reporter=ProgressReporter(console),
    )
    trained = time.monotonic()
    console.say("2/5  exporting: head and tail in int8; the bodies too, unless that misses the gate")
    server_keys = export_verb.new_keys(out / export_verb.KEYS_FOLDER)
    gates = Gates(max_accuracy_drop_points=MAX_ACCURACY_DROP_POINTS)
    if options.no_gates:
        gates = Gates(min_sqnr_db=-1000.0, max_accuracy_drop_points=100.0)
    export_options = ExportOptions(server_public_keys=server_keys, gates=gates)
    report = export(out / "run", out, export_options, progress=lambda text: console.say(f"     {text}"))
    console.say(report.table())
    exported = time.monotonic()
    console.say("3/5  starting the server: its own process, CURVE encryption, one authorised device")
    dataset = data_sets.load("demo")
    images = np.ascontiguousarray(dataset.test_x.transpose(0, 2, 3, 1))
    with server_process(out / "server") as endpoint:
        console.say(f"     {endpoint}")
        console.say(f"4/5  EdgeClient.predict() on {len(images)} held-out images")
        with EdgeClient(out / "client", endpoint, timeout_ms=60_000) as client:
            single = [client.predict(image) for image in images[:SINGLE_PREDICTIONS]]
            batch = client.predict_batch(list(images))
    labels = [dataset.labels[i] for i in dataset.test_y]
    hits = sum(p.label == label for p, label in zip(batch, labels, strict=True))
    one = single[0]
    document: dict[str, Any] = {
        "num_nets": NUM_NETS,
        "num_selected": NUM_SELECTED,
        "test_images": len(images),
        "accuracy_torch_percent": summary["accuracy_float"],
        "accuracy_split_quantised_percent": 100 * hits / len(images),
        "accuracy_drop_points": summary["accuracy_float"] - 100 * hits / len(images),
        "min_stage_sqnr_db": report.min_stage_sqnr_db,
        "image_bytes": int(images[0].nbytes),
        "bytes_up_per_image": one.bytes_up,
        "bytes_down_per_image": one.bytes_down,
        "predict_ms": {
            name: float(np.median([getattr(p.timings, name) for p in single]))
            for name in ("head", "queue", "server", "network", "tail", "total")
        },
        "train_s": trained - started,
        "export_s": exported - trained,
        "compute_s": time.monotonic() - started,
        "out": str(out),
    }
    _write(document, out)
    if not options.no_audit:
        console.say("5/5  the privacy audit: attacking the device that was just exported")
        document["audit"] = _audited(out, console)
        _write(document, out)
    console.result(document, _text(document, one.label, labels[0]))
    return 0


def _write(document: dict[str, Any], out: Path) -> None:
    (out / "demo.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _command(out: Path | str) -> str:
    return f"ensembler audit {out}/client --run {out}/run --budget quick --out {out}/{REPORT}"


def _audited(out: Path, console: Console) -> dict[str, Any]:
    """Returns the verdict of a quick audit of the demo's client; the report is left in ``out``."""
    from ensembler.privacy.audit import audit

    report = out / REPORT
    reporter = ProgressReporter(console)
    try:
        audited = audit(
            out / "run",
            out / "client",
            report,
            budget="quick",
            command=_command(out),
            reporter=reporter,
        )
    finally:
        reporter.close()
    return {"verdict": audited["verdict"], "seconds": audited["seconds"], "report": str(report)}


def _text(document: dict[str, Any], label: str, truth: str) -> str:
    times = document["predict_ms"]
    return "\n".join(
        [
            "",
            f"accuracy        torch {document['accuracy_torch_percent']:.2f}%   "
            f"device + server, quantised {document['accuracy_split_quantised_percent']:.2f}%   "
            f"on {document['test_images']} held-out images",
            f"on the wire     {document['bytes_up_per_image']} bytes up, {document['bytes_down_per_image']} down for "
            f"an image of {document['image_bytes']} bytes, headers included",
            f"predict()       {times['total']:.2f} ms: head {times['head']:.2f}, queue {times['queue']:.2f}, server "
            f"{times['server']:.2f}, network {times['network']:.2f}, tail {times['tail']:.2f} (medians)",
            f"first image     {label} (it is {truth})",
            f"time            {document['compute_s']:.0f} s: training {document['train_s']:.0f}, exporting "
            f"{document['export_s']:.0f}",
            f"left in         {document['out']}: run/ client/ server/ keys/ parity.json demo.json"
            f"{'' if 'audit' not in document else ' ' + REPORT}",
            *_privacy(document),
        ]
    )


def _privacy(document: dict[str, Any]) -> list[str]:
    hint = "privacy         one layer on the device obfuscates, it does not hide; "
    if "audit" not in document:
        return [f"{hint}what a server reads of it:", f"                {_command(document['out'])}"]
    audited = document["audit"]
    return [
        f"{hint}a quick audit says, in {audited['seconds']:.0f} s:",
        f"                {audited['verdict']['sentence']}",
        f"                {audited['report']} shows the pictures",
    ]


def _fresh_folder(out: Path) -> None:
    """Makes ``out``; the folder of an earlier demo is replaced, anything else is left alone."""
    if out.exists():
        if not (out / MARKER).is_file():
            raise ConfigError(f"--out {out}: exists and was not made by the demo; choose another folder")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, mode=0o700)
        (out / MARKER).touch()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error


@contextmanager
def server_process(bundle: Path, *arguments: str) -> Iterator[str]:
    """Runs ``ensembler serve`` as a process of its own and yields its endpoint once it is ready.

    Raises:
        EnsemblerError: the server did not start; the message has what it said.
    """
    command = [
        sys.executable,
        "-m",
        "ensembler.cli",
        "serve",
        str(bundle),
        "--bind",
        "tcp://127.0.0.1:*",
        "--json",
    ]
    with subprocess.Popen(  # noqa: S603 (our own command line)
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                _, said = process.communicate()
                raise EnsemblerError(f"the server did not start: {said.strip()}")
            yield str(json.loads(line)["endpoint"])
        finally:
            process.terminate()
            process.communicate()
