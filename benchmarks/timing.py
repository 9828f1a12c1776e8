"""Whether times, sizes or the number of messages tell a server the selector; records ``timing_selector_auc``.

    python benchmarks/timing.py

Two clients are trained on one stage 1 (demo images, slim net, N = 4, P = 2) until their selectors differ, and exported
for one server bundle. A server process with the product's own ``Server`` writes down what a server can see of every
request: the sizes of the frames, when they came, and when the reply left. One process runs both clients on the same
images, closed loop, in turns of random order, so that a noisy machine is noisy for both.

* gap: from a reply to the same client's next request, within a turn: tail, the client's own work, and head;
* turnaround: from the request to the reply: the bodies;
* net: one body, timed alone on the features of a client that selects it, and of the one that does not. Bodies differ
  in their weights, so a body is compared with itself only.

The figure is the area under the ROC curve of telling the clients apart, 0.5 for a coin. It is taken within a session
(both clients opened anew) and averaged: where a session's buffers lie in memory makes one of two equal clients faster
for as long as it lives. The standard error comes from the spread between sessions.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import results

from ensembler import EdgeClient
from ensembler.cloud_runtime.engine import warm_up
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.cloud_runtime.server import Server
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.messages import peek_request_id
from ensembler.training import data as data_sets
from ensembler.training.runs import RunFolder
from ensembler.transport.base import Frame
from ensembler.transport.zmq_server import Incoming, ServerSocket

Floats = npt.NDArray[np.float64]

SETTING = "--data demo --arch resnet10_slim -N 4 -P 2 --epochs 1 --train-limit 1024 --device cpu"
TURN = 4  # predictions of one client before the other may come; the first has no gap within the turn
ROUNDS = 10  # turns of each client in a session
NET_BLOCKS, NET_BLOCK_IMAGES = 100, 40
GOAL, EDGE = "|x - 0.5| <= 0.03", 0.53


# --- two clients of one stage 1 ---


def make_clients(folder: Path) -> tuple[list[Path], Path, list[tuple[int, ...]]]:
    """Returns two client bundles, their server bundle, and the selectors."""
    first, out = folder / "run_0", folder / "out_0"
    _ensembler("train", *SETTING.split(), "--out", first)
    _ensembler("export", first, "--out", out, "--plaintext", "--min-sqnr-db=-1000", "--max-accuracy-drop=100")
    selectors = [RunFolder.open(first).read_secret().selector]
    attempt = 0
    while len(selectors) < 2:
        attempt += 1
        run = folder / f"run_{attempt}"
        _ensembler("train", *SETTING.split(), "--out", run, "--stage1", first)
        if RunFolder.open(run).read_secret().selector != selectors[0]:
            selectors.append(RunFolder.open(run).read_secret().selector)
    server, other = out / "server", folder / "out_1"
    _ensembler(
        *("export", run, "--out", other, "--plaintext", "--server-bundle", server),
        *("--min-sqnr-db=-1000", "--max-accuracy-drop=100"),
    )
    return [out / "client", other / "client"], server, selectors


def _ensembler(*arguments: object) -> None:
    command = [sys.executable, "-m", "ensembler.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# --- the server's side ---


class RecordingSocket(ServerSocket):
    """Writes down every message: (request id, whether it came in, seconds, bytes of each frame)."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, keys=None, authorized=frozenset())
        self.seen: list[tuple[str, bool, float, list[int]]] = []

    def receive(self) -> Incoming | None:
        """See ``ServerSocket``."""
        incoming = super().receive()
        if incoming is not None:
            self._note(incoming.frames, came_in=True)
        return incoming

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """See ``ServerSocket``."""
        sent = super().send(peer, frames)
        self._note(frames, came_in=False)
        return sent

    def _note(self, frames: Sequence[Frame], *, came_in: bool) -> None:
        now = time.perf_counter()
        self.seen.append(((peek_request_id(frames) or b"").hex(), came_in, now, [len(frame) for frame in frames]))


def serve(bundle: Path, log: Path) -> None:
    """Serves until SIGTERM, then writes what was seen to ``log``."""
    engine, socket = OnnxEngine(bundle, threads=1), RecordingSocket("tcp://127.0.0.1:*")
    warm_up(engine)
    server = Server(engine, socket)
    signal.set_wakeup_fd(socket.wake_fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    print(socket.endpoint, flush=True)
    server.run()
    log.write_text(json.dumps(socket.seen), encoding="utf-8")


@contextmanager
def recording_server(bundle: Path, log: Path) -> Iterator[str]:
    """Runs ``serve`` as a process of its own; the log is complete when the block ends."""
    command = [sys.executable, __file__, "--serve", str(bundle), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait()


# --- the requests ---


@dataclass(frozen=True)
class Asked:
    """One prediction, as the benchmark knows it and the server does not."""

    client: int
    session: int
    within_turn: bool


def ask(bundles: list[Path], endpoint: str, images: Any, sessions: int, rng: np.random.Generator) -> dict[str, Asked]:
    """Runs both clients in turns; returns the requests in their order, by id."""
    asked: dict[str, Asked] = {}
    for session in range(sessions):
        clients: dict[int, EdgeClient] = {}
        for which in rng.permutation(2).tolist():
            clients[which] = EdgeClient(bundles[which], endpoint, plaintext=True, timeout_ms=60_000)
        try:
            for turn in range(-1, ROUNDS):  # the first one warms up
                chosen = images[rng.integers(0, len(images), TURN)]
                for which in rng.permutation(2).tolist():
                    for index, image in enumerate(chosen):
                        request_id = clients[which].predict(image).request_id
                        asked[request_id] = Asked(which, session, turn >= 0 and index > 0)
        finally:
            for client in clients.values():
                client.close()
    return asked


@dataclass(frozen=True)
class Observed:
    """What the server saw of each client and session, and the messages' forms of each client."""

    gaps: dict[tuple[int, int], list[float]]
    turnarounds: dict[tuple[int, int], list[float]]
    forms: list[set[tuple[tuple[bool, tuple[int, ...]], ...]]]


def observe(log: Path, asked: dict[str, Asked]) -> Observed:
    """Reads the server's log: a form is direction and frame sizes of the messages of a request, in their order."""
    found = Observed({}, {}, [set(), set()])
    messages: dict[str, list[tuple[bool, float, tuple[int, ...]]]] = {}
    for request_id, came_in, at, sizes in json.loads(log.read_text(encoding="utf-8")):
        messages.setdefault(request_id, []).append((came_in, at, tuple(sizes)))
    assert list(messages) == list(asked), "the server saw other requests than were made"
    replied = 0.0
    for request_id, each in messages.items():
        request = asked[request_id]
        found.forms[request.client].add(tuple((came_in, sizes) for came_in, _, sizes in each))
        arrived, left = each[0][1], each[-1][1]
        if request.within_turn:
            key = (request.client, request.session)
            found.gaps.setdefault(key, []).append(arrived - replied)
            found.turnarounds.setdefault(key, []).append(left - arrived)
        replied = left
    return found


# --- one net alone ---


def net_times(bundles: list[Path], server: Path, selectors: list[tuple[int, ...]], images: Any, seed: int) -> Floats:
    """Returns one AUC for each block of images and each body that exactly one client selects: selected, or not."""
    rng = np.random.Generator(np.random.PCG64(seed))
    engine = OnnxEngine(server, threads=1)
    codes = [EdgeRuntime(bundle).encode(images) for bundle in bundles]
    bodies = sorted(set(selectors[0]) ^ set(selectors[1]))
    features = np.empty_like(codes[0][:1])  # one buffer for all: its place in memory has no say
    aucs = []
    for block in range(NET_BLOCKS + 1):  # the first one warms up
        times: dict[tuple[int, bool], list[float]] = {}
        for image in rng.integers(0, len(images), NET_BLOCK_IMAGES):
            jobs = [(body, client) for body in bodies for client in (0, 1)]
            for index in rng.permutation(len(jobs)):
                body, client = jobs[index]
                features[:] = codes[client][image : image + 1]
                start = time.perf_counter()
                engine.sessions[body].run(None, {"features": features})
                times.setdefault((body, body in selectors[client]), []).append(time.perf_counter() - start)
        if block:
            aucs += [[auc(times[body, True], times[body, False]) for body in bodies]]
    engine.close()
    return np.array(aucs).mean(axis=1)


# --- figures ---


def auc(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the probability that a value of ``first`` is above one of ``second``, ties half (Mann-Whitney)."""
    a, b = np.sort(first), np.array(second)
    below, up_to = np.searchsorted(a, b, "left"), np.searchsorted(a, b, "right")
    return float(1 - (below + up_to).sum() / (2 * len(a) * len(b)))


def session_aucs(values: dict[tuple[int, int], list[float]]) -> Floats:
    """Returns the AUC of client 0 against client 1 within each session."""
    sessions = sorted({session for _, session in values})
    return np.array([auc(values[0, session], values[1, session]) for session in sessions])


def mean_and_error(aucs: Floats) -> tuple[float, float]:
    """Returns the mean and its standard error, from the spread."""
    return float(aucs.mean()), float(aucs.std(ddof=1) / np.sqrt(len(aucs)))


def visible_us(values: dict[tuple[int, int], list[float]]) -> float:
    """Returns the delay of one client, in microseconds, that would have moved the AUC to the edge of its goal."""
    for delay_us in np.geomspace(0.1, 1e5, 121):
        late = {key: [v + delay_us / 1e6 * (key[0] == 0) for v in each] for key, each in values.items()}
        if session_aucs(late).mean() > EDGE:
            return float(delay_us)
    return float("inf")


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sessions", type=int, default=200, help="each opens both clients anew (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the images; a selector has none")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--serve", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    images = np.ascontiguousarray(data_sets.load("demo").test_x.transpose(0, 2, 3, 1))
    rng = np.random.Generator(np.random.PCG64(options.seed))
    with tempfile.TemporaryDirectory() as name:
        bundles, server, selectors = make_clients(Path(name))
        log = Path(name) / "seen.json"
        with recording_server(server, log) as endpoint:
            asked = ask(bundles, endpoint, images, options.sessions, rng)
        seen = observe(log, asked)
        net = mean_and_error(net_times(bundles, server, selectors, images, options.seed))
    if len(seen.forms[0] | seen.forms[1]) != 1:
        raise SystemExit(f"sizes, order or number of messages differ: {seen.forms}")
    gap, turn = (mean_and_error(session_aucs(values)) for values in (seen.gaps, seen.turnarounds))
    worst = max(gap, turn, key=lambda found: abs(found[0] - 0.5))
    shared = len(set(selectors[0]) & set(selectors[1]))
    middle = [1e6 * float(np.median(np.concatenate(list(values.values())))) for values in (seen.gaps, seen.turnarounds)]
    messages = "; ".join(f"{'up' if came_in else 'down'} {sizes} bytes" for came_in, sizes in min(seen.forms[0]))
    compared = sum(map(len, seen.gaps.values()))
    setting = f"2 clients of one stage 1 that share {shared} of 2 selected bodies (N = 4), ensembler train {SETTING}"
    figures = [
        results.figure(
            "timing_selector_auc",
            round(worst[0], 4),
            "AUC",
            GOAL,
            f"the one further from 0.5 of: gap {gap[0]:.4f} (standard error {gap[1]:.4f}), turnaround {turn[0]:.4f} "
            f"({turn[1]:.4f}); medians {middle[0]:.0f} and {middle[1]:.0f} us, and a client that were "
            f"{visible_us(seen.gaps):.1f} or {visible_us(seen.turnarounds):.1f} us slower would have shown as {EDGE}; "
            f"{compared} of {len(asked)} requests compared, {options.sessions} sessions; plaintext on "
            f"loopback, both clients in one process; sizes, order and number of messages equal in all: {messages}; "
            f"{setting}",
        ),
        results.figure(
            "net_time_selector_auc",
            round(net[0], 4),
            "AUC",
            GOAL,
            f"standard error {net[1]:.4f}; each body that one of the clients selects, alone on one thread, "
            f"{NET_BLOCKS * NET_BLOCK_IMAGES} images; {setting}",
        ),
    ]
    for each in figures:
        print(each["note"])
    if not options.no_record:
        results.record("core", figures, command="python benchmarks/timing.py", seed=options.seed)


if __name__ == "__main__":
    main()
