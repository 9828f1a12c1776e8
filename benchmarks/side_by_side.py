"""Ensembler's server beside three others and beside the bodies alone: throughput and p99, in turn in one run.

    make peers && python benchmarks/bundles.py
    .venv-peers/bin/python benchmarks/side_by_side.py [--rounds 5] [--seconds 8]

Two bundles (benchmarks/bundles.py): tiny bodies, where a server's own work decides, and ResNet-18's, where the bodies
do. All systems get the same bodies in the same engine (``OnnxEngine``: sessions of one thread, as many pieces at once
as there are cores), the same limit of a batch, and 16 connections from one process with one image under way on each
(benchmarks/traffic.py); all answers are compared with the bodies' own.

First every system tries each of its settings, and the one with most answers a second goes on. Then all systems are
measured in rounds, each round in another order, every time in fresh processes, and the medians over the rounds are
compared. Encrypted: CURVE beside TLS 1.3, where the peer has TLS itself.

The ceiling is the best that the same sessions do when they are called in a loop, over sizes of batches and arrangements
of threads, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket as sockets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bundles
import numpy as np
import results
import zmq
from bundles import BUNDLES, Identities, served
from traffic import Asked, GrpcLine, HttpLine, Line, Measured, ZmqLine, closed_loop, first_answer

from ensembler.cloud_runtime.engine import usable_cores
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.protocol.integers import sum_exactly

CLIENTS = 16
# Nothing is gained by waiting for more images than there are clients, and a server that waits would always do so.
BATCH = CLIENTS
START_S = 120.0
PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class System:
    """A server that can be measured.

    Attributes:
        name: ``ensembler``, or of a file ``peers/NAME_server.py``.
        encrypted: with CURVE or TLS.
        settings: more options of its command line.
    """

    name: str
    encrypted: bool
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        security = ("CURVE" if self.name == "ensembler" else "TLS") if self.encrypted else "plaintext"
        return f"{self.name}, {security}"


# What each system may be tuned with. Its documentation says which option there is, the first round which value is best.
SETTINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ensembler": ((), ("--batch-wait-ms", "1"), ("--batch-wait-ms", "5")),
    "mosec": (("--wait-ms", "1"), ("--wait-ms", "5"), ("--wait-ms", "10")),
    "litserve": ((), ("--plain-queue",), ("--wait-ms", "1"), ("--wait-ms", "5")),
    "grpc": ((), ("--wait-ms", "1"), ("--wait-ms", "5")),
}
OTHERS = [name for name in SETTINGS if name != "ensembler"]
WITHOUT_TLS = ("mosec",)


@contextmanager
def connected(system: System, bundle: Path, asked: Asked, work: Path) -> Iterator[list[Line]]:
    """Runs a system and yields its clients."""
    log = work / f"{system.name}.log"
    lines: list[Line] = []
    if system.name == "ensembler":
        identities = Identities.new(Path(tempfile.mkdtemp(dir=work)), CLIENTS) if system.encrypted else None
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        limits = ("--max-batch-rows", str(BATCH), "--threads", str(usable_cores()), *system.settings)
        with served(bundle, identities, *limits, log=log) as endpoint:
            lines = [ZmqLine(context, endpoint, asked, identities, index) for index in range(CLIENTS)]
            try:
                yield lines
            finally:
                for line in lines:
                    line.close()
                context.term()
        return
    certificate = certified(work) if system.encrypted else None
    with _peer(system, bundle, certificate, log) as address:
        paths = {"mosec": "/inference", "litserve": "/predict", "grpc": "/Bodies/infer"}
        kind: Callable[..., Line] = GrpcLine if system.name == "grpc" else HttpLine
        connect = lambda: kind(address, paths[system.name], asked, certificate)  # noqa: E731
        _await_first_answer(connect, asked, log)
        try:
            lines += [connect() for _ in range(CLIENTS)]
            yield lines
        finally:
            for line in lines:
                line.close()


@contextmanager
def _peer(system: System, bundle: Path, certificate: Path | None, log: Path) -> Iterator[tuple[str, int]]:
    with sockets.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = PEERS / f"{system.name}_server.py"
    command = [sys.executable, str(script), str(bundle), "--port", str(port), "--batch", str(BATCH)]
    command += ["--threads", str(usable_cores()), *system.settings]
    if certificate is not None:
        command += ["--certificate", str(certificate)]
    with log.open("w", encoding="utf-8") as output:
        # A session of its own: mosec and LitServe have processes of their own, which have to end with them.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield "127.0.0.1", port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_session(process.pid)
            process.wait()


def _end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _await_first_answer(connect: Callable[[], Line], asked: Asked, log: Path) -> None:
    """Returns when the server answers rightly; its port may be open long before."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            line = connect()
        except OSError:
            time.sleep(0.05)
            continue
        try:
            first_answer(line, asked)
            return
        except (OSError, SystemExit):
            time.sleep(0.2)
        finally:
            line.close()
    raise SystemExit(f"no answer within {START_S:.0f} s; see {log}")


def certified(work: Path) -> Path:
    """Returns a certificate for localhost, made once, with its key (P-256) beside it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    path = work / "localhost.pem"
    if path.exists():
        return path
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.with_suffix(".key").write_bytes(secret)
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def measure(system: System, bundle: Path, asked: Asked, work: Path, seconds: float) -> Measured:
    """Measures one system once, in fresh processes."""
    with connected(system, bundle, asked, work) as lines:
        return closed_loop(lines, asked, warm_s=min(2.0, seconds / 2), seconds=seconds)


# --- the bodies alone ---


@dataclass(frozen=True)
class Arrangement:
    """A way to call the sessions in a loop: ``at_once`` pieces of ``rows`` images, each on ``intra`` threads."""

    rows: int
    at_once: int
    intra: int

    def __str__(self) -> str:
        return f"{self.at_once} at once of {self.rows} images on {self.intra} threads"


def arrangements() -> list[Arrangement]:
    """Returns all that are tried."""
    cores = usable_cores()
    threads = [(cores, 1), (1, cores)] if cores > 1 else [(1, 1)]
    return [Arrangement(rows, *pair) for rows in (1, 2, 4, 8, 16, 32) for pair in threads]


def ceiling(bundle: Path, arrangement: Arrangement, seconds: float) -> float:
    """Returns the images a second of the bodies alone, on images that lie in memory."""
    import onnxruntime as ort

    engine = OnnxEngine(bundle, threads=1)
    manifest, sessions = engine.manifest, engine.sessions
    engine.close()
    if arrangement.intra > 1:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = arrangement.intra, 1
        sum_exactly(options)
        files = [str(bundle / name) for name in manifest.bodies]
        sessions = [ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files]
    rng = np.random.Generator(np.random.PCG64(0))
    features = rng.integers(0, 256, (arrangement.rows, *manifest.wire.feature_shape), dtype=np.uint8)

    turns = itertools.count()  # next() is atomic in CPython

    def calls() -> int:
        """Calls the sessions in turn until the time is over; returns how many calls it made."""
        made = 0
        while time.perf_counter() < end:
            sessions[next(turns) % len(sessions)].run(None, {"features": features})
            made += 1
        return made

    for session in sessions:
        session.run(None, {"features": features})
    with ThreadPoolExecutor(arrangement.at_once) as pool:
        start = time.perf_counter()
        end = start + seconds
        made = sum(thread.result() for thread in [pool.submit(calls) for _ in range(arrangement.at_once)])
        elapsed = time.perf_counter() - start
    return made * arrangement.rows / len(sessions) / elapsed


# --- the run ---


@dataclass
class Table:
    """What the rounds found for one bundle."""

    systems: list[System]
    rates: dict[System, list[float]]
    p50: dict[System, list[float]]
    p99: dict[System, list[float]]
    ceilings: dict[Arrangement, list[float]]

    def rate(self, system: System) -> float:
        """Returns the median of its answers a second."""
        return float(np.median(self.rates[system]))

    def tail(self, system: System) -> float:
        """Returns the median of its p99, in milliseconds."""
        return float(np.median(self.p99[system]))

    def best_ceiling(self) -> tuple[Arrangement, float]:
        """Returns the arrangement with the highest median, and that."""
        found = {arrangement: float(np.median(rates)) for arrangement, rates in self.ceilings.items()}
        best = max(found, key=found.__getitem__)
        return best, found[best]

    def ours(self, encrypted: bool) -> System:
        """Returns Ensembler's."""
        return next(s for s in self.systems if s.name == "ensembler" and s.encrypted == encrypted)

    def peers(self, encrypted: bool) -> list[System]:
        """Returns the others."""
        return [s for s in self.systems if s.name != "ensembler" and s.encrypted == encrypted]

    def lines(self) -> list[str]:
        """Returns the table as text."""
        arrangement, rate = self.best_ceiling()
        shown = [f"  {'bodies alone':24} {rate:9.1f} images/s  ({arrangement})"]
        for system in sorted(self.systems, key=self.rate, reverse=True):
            spread = f"{min(self.rates[system]):.1f} to {max(self.rates[system]):.1f}"
            shown.append(
                f"  {system!s:24} {self.rate(system):9.1f} images/s  p50 {np.median(self.p50[system]):8.2f} ms  "
                f"p99 {self.tail(system):8.2f} ms  ({spread}) {' '.join(system.settings)}"
            )
        return shown


def run(bundle: Path, options: argparse.Namespace, work: Path) -> Table:
    """Tunes all systems, then measures them in rounds."""
    asked = Asked(bundle)
    names = [(name, encrypted) for encrypted in (False, True) for name in ("ensembler", *options.peers)]
    systems = []
    for name, encrypted in names:
        if encrypted and name in WITHOUT_TLS:
            continue
        candidates = [System(name, encrypted, settings) for settings in SETTINGS[name]]
        tried = {c: measure(c, bundle, asked, work, options.tuning_seconds).rate for c in candidates}
        for candidate, rate in tried.items():
            print(f"  tried {candidate} {' '.join(candidate.settings) or 'defaults'}: {rate:.1f} images/s", flush=True)
        systems.append(max(tried, key=tried.__getitem__))
    table = Table(systems, *({s: [] for s in systems} for _ in range(3)), {a: [] for a in arrangements()})
    for turn in range(options.rounds):
        shift = turn * max(1, len(systems) // options.rounds) % len(systems)
        for system in (*systems[shift:], *systems[:shift]):
            found = measure(system, bundle, asked, work, options.seconds)
            table.rates[system].append(found.rate)
            table.p50[system].append(found.percentile(50))
            table.p99[system].append(found.percentile(99))
            print(f"  round {turn + 1}: {system!s:24} {found.rate:9.1f} images/s", flush=True)
        for arrangement, rates in table.ceilings.items():
            rates.append(ceiling(bundle, arrangement, options.seconds / 4))
    return table


def figures(name: str, table: Table) -> list[dict[str, object]]:
    """Returns what is recorded of one bundle."""
    found = []
    suffix = {"tiny": "", "resnet18": "_resnet18"}[name]
    worst_rate, worst_tail, notes = np.inf, 0.0, []
    for encrypted in (False, True):
        ours, peers = table.ours(encrypted), table.peers(encrypted)
        fastest = max(peers, key=table.rate)
        steadiest = min(peers, key=table.tail)
        worst_rate = min(worst_rate, table.rate(ours) / table.rate(fastest))
        worst_tail = max(worst_tail, table.tail(ours) / table.tail(steadiest))
        shown = [
            f"{s} {table.rate(s):.1f} images/s, p99 {table.tail(s):.2f} ms"
            + (f" ({' '.join(s.settings)})" if s.settings else "")
            for s in (ours, *peers)
        ]
        notes.append("; ".join(shown))
    note = f"{name} bodies, {CLIENTS} clients of one image, batches of at most {BATCH}; " + "; ".join(notes)
    note += "; the worse of plaintext and encrypted, each beside its best peer"
    goals = (">= 1.2", "<= 1.0") if name == "tiny" else (">= 1.0", "")
    found.append(results.figure(f"throughput_vs_best_peer{suffix}", round(worst_rate, 4), "ratio", goals[0], note))
    found.append(results.figure(f"p99_vs_best_peer{suffix}", round(worst_tail, 4), "ratio", goals[1], note))
    if name == "resnet18":
        arrangement, ceiling_rate = table.best_ceiling()
        ours = min((table.ours(False), table.ours(True)), key=table.rate)
        note = f"{ours} {table.rate(ours):.2f} images/s, the bodies alone {ceiling_rate:.2f} ({arrangement})"
        ratio = round(table.rate(ours) / ceiling_rate, 4)
        found.append(results.figure("throughput_vs_ort_ceiling", ratio, "ratio", ">= 0.95", note))
    return found


def main() -> None:
    """Measures both bundles and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--bundles", type=Path, default=bundles.FOLDER, help="what benchmarks/bundles.py made")
    parser.add_argument("--only", choices=BUNDLES, help="one of the bundles")
    parser.add_argument("--peers", nargs="+", default=OTHERS, choices=OTHERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--tuning-seconds", type=float, default=4.0, help="of each setting that is tried")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for name in [options.only] if options.only else BUNDLES:
            print(name, flush=True)
            table = run(options.bundles / name / "server", options, Path(work))
            print("\n".join((name, *table.lines())), flush=True)
            found = figures(name, table)
            if options.no_record:
                for figure in found:
                    print(f"{figure['figure']}: {figure['value']}")
                continue
            command = f"python benchmarks/side_by_side.py --rounds {options.rounds} --seconds {options.seconds:g}"
            results.record("cloud", found, command=command, seed=0)


if __name__ == "__main__":
    main()
