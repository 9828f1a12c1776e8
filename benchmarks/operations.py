"""What an operator does to a server under load: new versions, withdrawn keys. Counts what fails, and for how long.

    python benchmarks/operations.py DEMO_OR_EXPORT_FOLDER RUN

The folder has ``client``, ``server`` and ``keys``; from its run the bodies are exported once more in the other
precision, which is another version of the same nets. Several devices predict all the time through ``EdgeClient`` and
CURVE, and every answer is compared with what either version computes without a network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import results

from ensembler import EdgeClient
from ensembler.cloud_runtime.control import ask
from ensembler.cloud_runtime.engine import EngineOptions, load
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.export.parity import Gates
from ensembler.export.pipeline import ExportOptions, export
from ensembler.protocol.errors import EnsemblerError, NotAuthorizedError
from ensembler.protocol.manifest import load_server
from ensembler.transport import keys

DEVICES = 4
ANSWER_MS = 30_000.0


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[str]:
    """A server of its own process; its log is left to standard error."""
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(bundle), "--bind", "tcp://127.0.0.1:*", "--json"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield str(json.loads(process.stdout.readline())["endpoint"])
        finally:
            process.terminate()


def swaps(folder: Path, other: Path, image: np.ndarray, rounds: int, scratch: Path) -> dict[str, float]:
    """Replaces the version back and forth while devices predict."""
    runtime = EdgeRuntime(folder / "client")
    codes = runtime.encode(image[None])
    wanted = []
    for bundle in (folder / "server", other):
        engine = load(bundle, EngineOptions())
        wanted.append(runtime.finish(engine.run(codes))[0])
        engine.close()
    counts = {"calls": 0, "failed": 0, "wrong": 0, "first": 0, "second": 0}
    lock, stop = threading.Lock(), threading.Event()

    def predict(endpoint: str) -> None:
        with EdgeClient(folder / "client", endpoint, timeout_ms=ANSWER_MS) as client:
            while not stop.is_set():
                try:
                    logits = client.predict(image).logits
                    outcome = next((i for i, one in enumerate(wanted) if np.array_equal(one, logits)), None)
                    kind = "wrong" if outcome is None else ("first", "second")[outcome]
                except EnsemblerError as error:
                    print(f"failed: {error}")
                    kind = "failed"
                with lock:
                    counts["calls"] += 1
                    counts[kind] += 1

    control = scratch / "control"
    with serving(folder / "server", "--control", str(control)) as endpoint, ThreadPoolExecutor(DEVICES) as pool:
        devices = [pool.submit(predict, endpoint) for _ in range(DEVICES)]
        for number in range(rounds):
            bundle = (other, folder / "server")[number % 2]
            reply = ask(control, {"do": "deploy", "bundle": str(bundle.resolve())}, 300)
            assert reply["unloaded"]
            _until(lambda seen=counts["calls"]: counts["calls"] >= seen + 20)
        stop.set()
        for device in devices:
            device.result()
    return counts


def revocations(folder: Path, image: np.ndarray, rounds: int, scratch: Path) -> list[float]:
    """Withdraws a device's key while it predicts, and returns the seconds until its open connection is refused."""
    authorized = shutil.copytree(folder / "keys" / "authorized", scratch / "authorized")
    found = []
    with serving(folder / "server", "--authorized", str(authorized)) as endpoint:
        for number in range(rounds):
            public, secret = keys.create(scratch / "devices", f"device{number}")
            shutil.copy(public, authorized)
            with EdgeClient(folder / "client", endpoint, timeout_ms=ANSWER_MS, key=secret) as client:
                _until(lambda client=client: _answered(client, image))
                (authorized / public.name).unlink()
                began = time.monotonic()
                while _answered(client, image):
                    pass
                found.append(time.monotonic() - began)
    return found


def _answered(client: EdgeClient, image: np.ndarray) -> bool:
    try:
        client.predict(image)
    except NotAuthorizedError:
        return False
    except EnsemblerError:  # the handshake, before the key is there
        return False
    return True


def _until(holds: object, deadline_s: float = 120.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit("it never came to that")
        time.sleep(0.01)


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", default=None, help="where the run's data is now, if it moved")
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--revocations", type=int, default=20)
    options = parser.parse_args()
    shape = EdgeRuntime(options.folder / "client").manifest.image
    rng = np.random.Generator(np.random.PCG64(0))
    image = rng.integers(0, 256, (shape.height, shape.width, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        first = load_server(options.folder / "server")
        precision = "float32" if first.precision == "int8" else "int8"
        # What is shown is the swap, so a demo's few images pass too.
        gates = Gates(min_sqnr_db=-1000.0, max_accuracy_drop_points=100.0)
        export(
            options.run, scratch / "other", ExportOptions(server_precision=precision, data=options.data, gates=gates)
        )
        counts = swaps(options.folder, scratch / "other" / "server", image, options.swaps, scratch)
        seconds = revocations(options.folder, image, options.revocations, scratch)
    note = (
        f"{options.swaps} replacements of {first.precision} by the other precision and back, {DEVICES} devices: "
        f"{counts['calls']} calls, {counts['first']} answered by the one and {counts['second']} by the other version"
    )
    figures = [
        results.figure("hot_swap_failed_requests", counts["failed"], "requests", "0", note),
        results.figure("hot_swap_wrong_answers", counts["wrong"], "answers", "0", note),
        results.figure(
            "revocation_s",
            round(max(seconds), 3),
            "s",
            "<= 1",
            f"the longest of {len(seconds)}, median {np.median(seconds):.3f}: from the removal of its file to the "
            "refusal on the open connection of a device that predicts all the time",
        ),
    ]
    command = f"python benchmarks/operations.py {options.folder} {options.run}"
    results.record("cloud", figures, command=command, seed=0)


if __name__ == "__main__":
    main()
