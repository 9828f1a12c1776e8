"""A machine of a Ray cluster is killed under load, again and again: what devices get meanwhile, and for how long.

    python benchmarks/ray_nodes.py DEMO_OR_EXPORT_FOLDER

Two Ray nodes on this machine, each with one CPU; the gateway is on the first one. Every net is on one node alone, so a
kill stops the service until its nets are started on the other node. Devices predict all the time through ``EdgeClient``
and compare every answer with what the bundle computes without a network. Each round kills all processes of the second
node with SIGKILL, waits until a call that began afterwards was answered, starts a node again and waits until it has its
share.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import results
from two_nodes import TwoNodes

from ensembler import EdgeClient, EnsemblerError
from ensembler.cloud_runtime.engine import EngineOptions, load
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.cloud_runtime.ray_engine import RayEngine
from ensembler.cloud_runtime.server import Server
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.transport.zmq_server import ServerSocket

DEVICES = 4
IMAGES = 64
TIMEOUT_MS = 30_000.0
# A call ends by its own deadline; what goes on longer hangs.
HUNG_S = TIMEOUT_MS / 1000 + 10
PATIENCE_S = 180.0


@dataclass
class Seen:
    """What the devices saw."""

    right: int = 0
    wrong: int = 0
    typed: dict[str, int] = field(default_factory=dict)
    untyped: int = 0
    last_begun: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds; asked after every call that ended."""
        with self.changed:
            if not self.changed.wait_for(holds, PATIENCE_S):
                raise TimeoutError("the cluster did not come back")


def ask(
    client: EdgeClient, images: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], seen: Seen, stop: threading.Event
) -> None:
    """One device: predicts until it is stopped."""
    index = 0
    while not stop.is_set():
        index = (index + 1) % len(images)
        begun = time.monotonic()
        right, failure = False, None
        try:
            right = np.array_equal(client.predict(images[index]).logits, wanted[index])
        except Exception as error:
            failure = error
        with seen.changed:
            if isinstance(failure, EnsemblerError):
                seen.typed[type(failure).__name__] = seen.typed.get(type(failure).__name__, 0) + 1
            elif failure is not None:
                seen.untyped += 1
            elif right:
                seen.right += 1
                seen.last_begun = max(seen.last_begun, begun)
            else:
                seen.wrong += 1
            seen.changed.notify_all()


def kill_rounds(
    cluster: TwoNodes, engine: RayEngine, codes: np.ndarray[Any, Any], seen: Seen, rounds: int
) -> list[float]:
    """Returns for each round the seconds from the kill to the beginning of the first call that was answered."""
    recovered = []
    for number in range(rounds):
        before = seen.right
        seen.wait(lambda: seen.right >= before + 10 * DEVICES)  # noqa: B023 (waited for here)
        cluster.kill_other()
        killed = time.monotonic()
        seen.wait(lambda: seen.last_begun > killed)  # noqa: B023
        recovered.append(time.monotonic() - killed)
        cluster.complete()
        until = time.monotonic() + PATIENCE_S
        while sorted(map(len, engine.places().values())) != [1, 1]:
            if time.monotonic() > until:
                raise TimeoutError("the new node got no nets")
            engine.run(codes)
        print(f"round {number + 1}: answered again after {recovered[-1]:.1f} s", flush=True)
    return recovered


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path, help="what ensembler demo or ensembler-export made")
    parser.add_argument("--rounds", type=int, default=20, help="kills (default: 20)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    runtime = EdgeRuntime(options.folder / "client")
    image = runtime.manifest.image
    rng = np.random.Generator(np.random.PCG64(0))
    images = rng.integers(0, 256, (IMAGES, image.height, image.width, 3), dtype=np.uint8)
    here = OnnxEngine(options.folder / "server", threads=1)
    codes = runtime.encode(images)
    wanted = runtime.finish(here.run(codes))
    here.close()

    cluster = TwoNodes()
    engine = load(options.folder / "server", EngineOptions(kind="ray", address=cluster.address))
    assert isinstance(engine, RayEngine)
    socket = ServerSocket("tcp://127.0.0.1:*", keys=None, authorized=frozenset())
    server = Server(engine, socket)
    serving = threading.Thread(target=server.run)
    serving.start()
    seen, stop = Seen(), threading.Event()
    clients = [
        EdgeClient(options.folder / "client", socket.endpoint, timeout_ms=TIMEOUT_MS, plaintext=True)
        for _ in range(DEVICES)
    ]
    devices = [
        threading.Thread(target=ask, args=(client, images, wanted, seen, stop), daemon=True) for client in clients
    ]
    for device in devices:
        device.start()
    try:
        recovered = kill_rounds(cluster, engine, codes[:1], seen, options.rounds)
    finally:
        stop.set()
        until = time.monotonic() + HUNG_S
        for device in devices:
            device.join(max(0.0, until - time.monotonic()))
        hung = sum(device.is_alive() for device in devices)
        server.stop()
        serving.join()
        socket.close()
        cluster.close()
    failed = ", ".join(f"{count} {name}" for name, count in sorted(seen.typed.items())) or "none"
    note = (
        f"{options.rounds} kills; {DEVICES} devices, {seen.right} right answers, failures: {failed}, untyped "
        f"{seen.untyped}; nets on one node each, deadline {TIMEOUT_MS / 1000:.0f} s"
    )
    spread = f"median of {options.rounds} kills, {min(recovered):.1f} to {max(recovered):.1f} s; {note}"
    figures = [
        results.figure("ray_node_kill_wrong_answers", seen.wrong, "answers", "0", note),
        results.figure("ray_node_kill_hung_calls", hung, "calls", "0", note),
        results.figure("ray_node_kill_untyped_failures", seen.untyped, "calls", "0", note),
        results.figure("ray_recovery_s", round(float(np.median(recovered)), 2), "s", "", spread),
    ]
    if options.no_record:
        for figure in figures:
            print(f"{figure['figure']}: {figure['value']} {figure['unit']}; {figure['note']}")
    else:
        command = f"python benchmarks/ray_nodes.py {options.folder} --rounds {options.rounds}"
        results.record("cloud", figures, command=command, seed=0)


if __name__ == "__main__":
    main()
