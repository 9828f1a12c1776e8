"""Kills and restarts a server under load: wrong answers, calls beyond their deadline, errors without a type.

    python benchmarks/kills.py DEMO_OR_EXPORT_FOLDER

Several threads share one client and call it without a pause, each call with a deadline of a few seconds. In every round
the server's process gets SIGKILL at a moment that is drawn, then a new one is started on the same port; the next round
begins when calls that began after that have been answered. Every answer is compared with the logits that head, nets and
tail give without a network.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import results

from ensembler import EdgeClient, EnsemblerError
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.edge_runtime.runtime import EdgeRuntime

IMAGES = 64
# A call that takes so much longer than its deadline counts as hung.
HUNG_S = 2.0
# A killed server's port is free again at once; a round that is longer than this says that something else is wrong.
START_S = 60.0
SEED = 0


@contextmanager
def server(bundle: Path, bind: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yields the address and the process of a server that is ready; kills it at the end if it still runs."""
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(bundle), "--bind", bind, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {process.communicate()[1]}")
            yield json.loads(line)["endpoint"], process
        finally:
            process.kill()
            process.communicate()


class Load:
    """Threads that call one client until ``stop``, and what came of it."""

    def __init__(
        self, client: EdgeClient, images: npt.NDArray[np.uint8], expected: npt.NDArray[np.float32], timeout_ms: float
    ) -> None:
        self.client, self.images, self.expected, self.timeout_ms = client, images, expected, timeout_ms
        self.stop = threading.Event()
        self.calls = self.wrong = self.hung = 0
        self.typed: Counter[str] = Counter()
        self.untyped: list[BaseException] = []
        self.slowest_s = 0.0
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        self._answers = 0

    def run(self, seed: int) -> None:
        """Calls without a pause; one thread's work."""
        draw = random.Random(seed)  # noqa: S311 (no secret)
        while not self.stop.is_set():
            index = draw.randrange(len(self.images))
            begun, right, error = time.monotonic(), False, None
            try:
                found = self.client.predict(self.images[index], timeout_ms=self.timeout_ms)
                right = np.array_equal(found.logits, self.expected[index])
            except Exception as caught:
                error = caught
            self._note(time.monotonic() - begun, error, right=right)

    def _note(self, took_s: float, error: Exception | None, *, right: bool) -> None:
        with self._lock:
            self.calls += 1
            self.slowest_s = max(self.slowest_s, took_s)
            self.hung += took_s > self.timeout_ms / 1000 + HUNG_S
            if isinstance(error, EnsemblerError):
                self.typed[type(error).__name__] += 1
            elif error is not None:
                self.untyped.append(error)
            else:
                self.wrong += not right
                self._answers += 1
                self._answered.notify_all()

    def some(self, answers: int) -> None:
        """Waits for so many more answers."""
        with self._lock:
            goal = self._answers + answers
            if not self._answered.wait_for(lambda: self._answers >= goal, START_S):
                raise SystemExit(f"no answers for {START_S:.0f} s after a restart; last errors: {dict(self.typed)}")


def measure(folder: Path, rounds: int, threads: int, timeout_ms: float) -> Load:
    """Runs the rounds and returns what was counted."""
    runtime, engine = EdgeRuntime(folder / "client"), OnnxEngine(folder / "server")
    rng = np.random.Generator(np.random.PCG64(SEED))
    shape = (IMAGES, runtime.manifest.image.height, runtime.manifest.image.width, 3)
    if runtime.manifest.noise_mode not in ("fixed", "none") or runtime.manifest.dropout:
        raise SystemExit(
            "this bundle draws for every image, so an answer cannot be compared; take one with fixed noise"
        )
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    expected = np.concatenate([runtime.finish(engine.run(runtime.encode(image[None]))) for image in images])
    engine.close()
    draw = random.Random(SEED)  # noqa: S311 (no secret)
    with server(folder / "server", "tcp://127.0.0.1:*") as (endpoint, process):
        client = EdgeClient(folder / "client", endpoint)
        load = Load(client, images, expected, timeout_ms)
        workers = [threading.Thread(target=load.run, args=(seed,), daemon=True) for seed in range(threads)]
        for worker in workers:
            worker.start()
        load.some(4 * threads)
        process.kill()
    try:
        for number in range(1, rounds + 1):
            with server(folder / "server", endpoint) as (_, process):
                # Of the first ones some began before the restart; and a kill shall not always find the same moment.
                load.some(2 * threads + draw.randrange(4 * threads))
                if number < rounds:
                    process.kill()
                else:
                    load.stop.set()
                    end = time.monotonic() + timeout_ms / 1000 + HUNG_S
                    for worker in workers:
                        worker.join(max(0.0, end - time.monotonic()))
            if number % 10 == 0 or number == rounds:
                failures = ", ".join(f"{count} {name}" for name, count in sorted(load.typed.items())) or "none"
                print(f"round {number}: {load.calls} calls, wrong {load.wrong}, hung {load.hung}, failures: {failures}")
    finally:
        load.stop.set()
    load.hung += sum(worker.is_alive() for worker in workers)  # these never came back to be counted
    client.close()
    return load


def main() -> int:
    """Measures and records; the exit status is 1 for an error without a type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path, help="what ensembler demo or ensembler-export made")
    parser.add_argument("--rounds", type=int, default=200, help="kills and restarts")
    parser.add_argument("--threads", type=int, default=4, help="threads that call")
    parser.add_argument("--timeout-ms", type=float, default=3000.0, help="deadline of a call")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    begun = time.monotonic()
    load = measure(options.folder, options.rounds, options.threads, options.timeout_ms)
    names = ", ".join(f"{name} {count}" for name, count in sorted(load.typed.items())) or "none"
    note = (
        f"{options.rounds} times SIGKILL and restart in {time.monotonic() - begun:.0f} s, {options.threads} threads, "
        f"deadline {options.timeout_ms:.0f} ms; {options.folder}; longest call {load.slowest_s:.2f} s; typed failures: "
        f"{names}; untyped: {len(load.untyped)}"
    )
    figures = [
        results.figure("kill_rounds", options.rounds, "rounds", ">= 200", note),
        results.figure("kill_wrong_answers", load.wrong, "answers", "0", note),
        results.figure("kill_hung_calls", load.hung, "calls", "0", f"{HUNG_S:.0f} s beyond the deadline; {note}"),
        results.figure("kill_calls", load.calls, "calls", "", note),
        results.figure("kill_typed_failures", sum(load.typed.values()), "calls", "", note),
    ]
    print(note)
    for error in load.untyped:
        print(f"without a type: {type(error).__name__}: {error}", file=sys.stderr)
    if not options.no_record:
        command = f"python benchmarks/kills.py {options.folder}"
        results.record("cloud", figures, command=command, seed=SEED)
    return 1 if load.untyped else 0


if __name__ == "__main__":
    sys.exit(main())
