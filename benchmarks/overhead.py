"""What predict() adds to its raw parts: p50 and p99 at batch 1 and 32, both measured in turn in one run.

    python benchmarks/overhead.py                              the paper's ResNet-18, N = 10, P = 4
    python benchmarks/overhead.py DEMO_OR_EXPORT_FOLDER --name demo

What predict() does in Python takes the same time whatever the nets are, so how much it adds depends on them. How fast a
net answers does not depend on what it has learned: the paper's are trained for one epoch of a few images, and kept.

Raw parts, on the same images and bytes:

* head and tail: the same onnxruntime sessions, called directly;
* the N nets: their sessions called directly, on as many threads as the server has (a plain thread pool), in the same
  parts as the server's engine;
* the link: a bare pyzmq CURVE echo in another process that answers as many bytes as the server does.

Beside their sum stand the same parts put together: a client of head, bare CURVE socket and tail, and a server of a bare
socket and the nets' sessions, each in a process as in the product. Alone, each part finds its data in the caches; put
together, or in predict(), it finds the others'.

All are interleaved call by call, so that a noisy machine is noisy for both. A round trip's time depends on which
cores the threads of a session happen to get (0.2 or 0.5 ms for the same echo on two cores), so several sessions are
measured and medians taken over them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bundles
import numpy as np
import results
import zmq
from product import exported, trained

from ensembler import EdgeClient
from ensembler.cli.demo import server_process
from ensembler.cloud_runtime.onnx_engine import PART_ROWS, OnnxEngine
from ensembler.edge_runtime.runtime import EdgeRuntime

ECHO = """
import sys, zmq
public, secret, size = sys.argv[1:]
context = zmq.Context()
router = context.socket(zmq.ROUTER)
router.curve_server = True
router.curve_publickey, router.curve_secretkey = public.encode(), secret.encode()
print(router.bind_to_random_port("tcp://127.0.0.1"), flush=True)
reply = bytes(int(size))
while True:
    peer, *frames = router.recv_multipart()
    router.send_multipart([peer, frames[0], reply])
"""


NETS = """
import sys, numpy as np, onnxruntime as ort, zmq
from concurrent.futures import ThreadPoolExecutor
public, secret, rows, threads, shape, in_turn, *files = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.add_session_config_entry("session.x64quantprecision", "1")
nets = [ort.InferenceSession(file, options) for file in files]
rows, shape = int(rows), [int(size) for size in shape.split("x")]
pool = ThreadPoolExecutor(int(threads))
context = zmq.Context()
router = context.socket(zmq.ROUTER)
router.curve_server = True
router.curve_publickey, router.curve_secretkey = public.encode(), secret.encode()
print(router.bind_to_random_port("tcp://127.0.0.1"), flush=True)
while True:
    peer, header, payload = router.recv_multipart()
    codes = np.frombuffer(payload, np.uint8).reshape(-1, *shape)
    pieces = [(net, start) for start in range(0, len(codes), rows) for net in nets]
    run = lambda piece: piece[0].run(None, {"features": codes[piece[1] : piece[1] + rows]})[0]
    found = list(map(run, pieces) if in_turn == "True" else pool.map(run, pieces))
    parts = [np.concatenate(found[index :: len(nets)]) for index in range(len(nets))]
    router.send_multipart([peer, header, np.stack(parts, 1).tobytes()])
"""


class Bare:
    """A bare CURVE socket to another process, which runs ``program``."""

    def __init__(self, program: str, *arguments: str) -> None:
        public, secret = (key.decode() for key in zmq.curve_keypair())
        mine_public, mine_secret = zmq.curve_keypair()
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, public, secret, *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.curve_serverkey = public.encode()
        self._socket.curve_publickey, self._socket.curve_secretkey = mine_public, mine_secret
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def round_trip(self, header: bytes, payload: memoryview) -> bytes:
        """Sends two frames, waits for the two that come back, and returns the second."""
        self._socket.send_multipart([header, payload], copy=False)
        return self._socket.recv_multipart()[1]

    def close(self) -> None:
        """Ends the other process."""
        self._socket.close(linger=0)
        self._process.kill()
        self._process.communicate()


def paper_nets(folder: Path) -> Path:
    """Makes ten int8 nets of ResNet-18 and a client of 8-bit codes with its keys, unless they are there."""
    if not (folder / "out" / "parity.json").is_file():
        data = bundles.images(folder, 32)
        options = f"--data {data} --arch resnet18 -N 10 -P 4 --epochs 1 --batch-size 16 --learning-rate 0.02"
        run = trained(folder / "run", *options.split())
        exported(run, folder / "out", data, *bundles.OPEN_GATES.removeprefix("--plaintext ").split())
    return folder / "out"


def timed(work: Callable[[], object]) -> float:
    """Returns the milliseconds of one call."""
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def measure(folder: Path, endpoint: str, batch: int, rounds: int) -> dict[str, float]:
    """Returns percentiles of predict() and of its raw parts, in milliseconds."""
    runtime = EdgeRuntime(folder / "client")
    wire = runtime.manifest.wire
    rng = np.random.Generator(np.random.PCG64(0))
    shape = (batch, runtime.manifest.image.height, runtime.manifest.image.width, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    codes = runtime.encode(images)
    engine = OnnxEngine(folder / "server")
    answers = engine.run(codes)
    head, tail = runtime._head._session, runtime._tail._session
    pieces = [(net, start) for start in range(0, batch, PART_ROWS) for net in engine.sessions]
    echo = Bare(ECHO, str(answers.nbytes))
    files = [str(folder / "server" / name) for name in engine.manifest.bodies]
    shape_text = "x".join(map(str, wire.feature_shape))
    header = bytes(120)
    warm_up = max(1, rounds // 4)
    with (
        EdgeClient(folder / "client", endpoint, timeout_ms=60_000) as client,
        ThreadPoolExecutor(engine.threads) as pool,
    ):

        def nets() -> None:
            list(pool.map(lambda p: p[0].run(None, {"features": codes[p[1] : p[1] + PART_ROWS]}), pieces))

        def nets_in_turn() -> None:
            for net, start in pieces:
                net.run(None, {"features": codes[start : start + PART_ROWS]})

        # Nets of a fraction of a millisecond are sooner done by one thread.
        in_turn = min(timed(nets_in_turn) for _ in range(warm_up)) < min(timed(nets) for _ in range(warm_up))
        other = Bare(NETS, str(PART_ROWS), str(engine.threads), shape_text, str(in_turn), *files)

        def together() -> None:
            sent = head.run(None, {"image": images})[0]
            reply = np.frombuffer(other.round_trip(header, sent.reshape(-1).data), np.uint8)
            tail.run(None, {"answers": reply.reshape(answers.shape)})

        together()
        parts: dict[str, Callable[[], object]] = {
            "head": lambda: head.run(None, {"image": images}),
            "link": lambda: echo.round_trip(header, codes.reshape(-1).data),
            "nets": nets,
            "nets_in_turn": nets_in_turn,
            "tail": lambda: tail.run(None, {"answers": answers}),
            "together": together,
        }
        listed = list(images)
        calls: dict[str, Callable[[], object]] = {"predict": lambda: client.predict_batch(listed), **parts}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(rounds + warm_up):
            for name, call in calls.items():
                elapsed = timed(call)
                if index >= warm_up:
                    times[name].append(elapsed)
    echo.close()
    other.close()
    engine.close()
    found = {f"{name}_p{p}": float(np.percentile(values, p)) for name, values in times.items() for p in (50, 99)}
    # Of the two ways to call the nets directly, the faster one is the fair opponent.
    found["raw_nets_p50"] = min(found["nets_p50"], found["nets_in_turn_p50"])
    found["raw_p50"] = found["head_p50"] + found["link_p50"] + found["raw_nets_p50"] + found["tail_p50"]
    found["ratio"] = found["predict_p50"] / found["raw_p50"]
    found["ratio_together"] = found["predict_p50"] / found["together_p50"]
    found["bytes_up"], found["bytes_down"] = codes.nbytes / batch, answers.nbytes / batch
    found["num_nets"] = wire.num_nets
    return found


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path, nargs="?", help="what ensembler demo or ensembler-export made")
    parser.add_argument("--name", help="goes into the figures' names; without it they are those of the paper's nets")
    parser.add_argument("--rounds", type=int, default=90, help="calls of each session; a third of it at batch 32")
    parser.add_argument("--sessions", type=int, default=9, help="fresh server and echo processes")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    folder = options.folder or paper_nets(Path("out/overhead"))
    prefix = f"sdk_overhead_{options.name}" if options.name else "sdk_overhead"
    figures = []
    for batch in (1, 32):
        rounds = options.rounds if batch == 1 else options.rounds // 3
        sessions = []
        for _ in range(options.sessions):
            with server_process(folder / "server") as endpoint:
                sessions.append(measure(folder, endpoint, batch, rounds))
        found = {name: float(np.median([session[name] for session in sessions])) for name in sessions[0]}
        ratios = sorted(session["ratio"] for session in sessions)
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        print(f"batch {batch}, N = {found['num_nets']:.0f}, milliseconds, medians of {options.sessions} sessions")
        for name in ("predict", "head", "link", "nets", "nets_in_turn", "tail", "together"):
            print(f"  {name:13} p50 {found[f'{name}_p50']:8.3f}   p99 {found[f'{name}_p99']:8.3f}")
        print(f"  raw parts     p50 {found['raw_p50']:8.3f}   ratio {found['ratio']:.3f} ({spread})")
        parts = (
            f"median of {options.sessions} sessions ({spread}) of {rounds} calls; "
            f"{folder}; predict {found['predict_p50']:.3f} ms p50, {found['predict_p99']:.3f} p99; raw "
            f"{found['raw_p50']:.3f} = head {found['head_p50']:.3f} + CURVE echo {found['link_p50']:.3f} + "
            f"{found['num_nets']:.0f} nets {found['raw_nets_p50']:.3f} + tail {found['tail_p50']:.3f}"
        )
        print(f"  the same put together: ratio {found['ratio_together']:.3f}")
        name = f"{prefix}_ratio_b{batch}"
        figures.append(results.figure(name, round(found["ratio"], 4), "ratio", "<= 1.10", parts))
        words = f"the same parts put together, bare: {found['together_p50']:.3f} ms; same sessions"
        together = round(found["ratio_together"], 4)
        figures.append(results.figure(f"{prefix}_together_b{batch}", together, "ratio", "", words))
    if not options.no_record:
        command = shlex.join(["python", "benchmarks/overhead.py", *sys.argv[1:]])
        results.record("speed", figures, command=command, seed=0)


if __name__ == "__main__":
    main()
