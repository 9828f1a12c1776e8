"""An hour of half load: does the server's memory grow, does it keep descriptors, does it ever answer wrongly?

    make soak                                             # python benchmarks/soak.py out/demo
    python benchmarks/soak.py out/demo --minutes 2 --no-record

``ensembler serve`` runs as a process of its own, with CURVE. Its capacity is measured first, closed-loop: every device
has two requests on their way. Then requests arrive at half that rate, whether answers come or not, at random times.
Four in a hundred are no requests, have another shape, ask for other nets or have a deadline that is over on arrival.
Every few seconds a device leaves and comes back, and somebody unknown knocks. An ``EdgeClient`` asks for whole
predictions and is made anew every minute. Every answer is compared, code by code, with what the same nets say when they
are called here.

Memory (VmRSS), descriptors and threads of the server and its children are read every few seconds. Growth is the mean of
the last sixth of the run over the mean from the first twelfth to the first quarter: of an hour, the last ten minutes
over minutes 5 to 15.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import results
import zmq

from ensembler import EdgeClient
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import WIRE_ERRORS, EnsemblerError
from ensembler.protocol.messages import INFER, RESULT, Message, decode, encode
from ensembler.transport import keys

IMAGES = 32
UNANSWERED_AFTER_S = 30.0
REJOIN_EVERY_S = 5.0
CLIENT_EVERY_S = 2.0
NEW_CLIENT_EVERY_S = 60.0
SAMPLE_EVERY_S = 5.0
NO_ID = bytes(16)
# Sent in one go where this program comes late: replies must be read meanwhile.
SEND_BURST = 32

# What is sent, how often, and with which codes it may be answered; 0 is a result.
KINDS: dict[str, tuple[float, tuple[int, ...]]] = {
    "infer": (0.96, (0,)),
    "late": (0.01, (0, 302)),
    "shape": (0.01, (104,)),
    "nets": (0.01, (201,)),
    "noise": (0.01, (101,)),
}


@dataclass
class Device:
    """One raw DEALER socket with a device's key, and what it waits for: kind, image and time by request id."""

    key: keys.KeyPair
    socket: zmq.Socket[bytes]
    waiting: dict[bytes, tuple[str, int, float]] = field(default_factory=dict)
    leaving: bool = False


class Fleet:
    """Several devices in one thread.

    Args:
        endpoint: the server's.
        server_key: its public key.
        pairs: the devices' key pairs.
        manifest: of the server bundle.
        codes: features ``(IMAGES, C, h, w)`` uint8 that are sent one by one.
        answers: what the nets say of them, ``(IMAGES, N, F)`` uint8.
        rng: for kinds, images and times.
    """

    def __init__(
        self,
        endpoint: str,
        server_key: str,
        pairs: list[keys.KeyPair],
        manifest: Any,
        codes: np.ndarray,
        answers: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        self._endpoint, self._server_key = endpoint, server_key
        self._wire = manifest.wire
        self._codes, self._answers, self._rng = codes, answers, rng
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self.devices = [Device(pair, self._connected(pair)) for pair in pairs]
        self.counts: Counter[str] = Counter()
        self._shares = np.array([share for share, _ in KINDS.values()])

    def close(self) -> None:
        """Closes all sockets."""
        for device in self.devices:
            device.socket.close(linger=0)
        self._context.term()

    def knock(self) -> None:
        """Connects with a key that the server does not know, for as long as a handshake takes."""
        public, secret = (key.decode() for key in zmq.curve_keypair())
        stranger = self._socket(keys.KeyPair(public=public, secret=secret))
        events = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        stranger.connect(self._endpoint)
        if events.poll(2000):
            self.counts["strangers"] += 1
            failed = int.from_bytes(events.recv_multipart()[0][:2], "little") == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            self.counts["strangers who got in"] += not failed
        stranger.disable_monitor()
        events.close(linger=0)
        stranger.close(linger=0)

    def send(self, device: Device, kind: str) -> None:
        """Sends one request of a kind."""
        index = int(self._rng.integers(IMAGES))
        request_id = os.urandom(16)
        bodies_id = bytes.fromhex(self._wire.bodies_id)
        tensor = self._codes[index : index + 1]
        if kind == "shape":
            tensor = tensor.reshape(1, -1)
        message = Message(
            operation=INFER,
            request_id=request_id,
            bodies_id=bytes(32) if kind == "nets" else bodies_id,
            budget_ms=0.0 if kind == "late" else 5000.0,
            tensor=tensor,
            bits=self._wire.feature_codec.bits,
        )
        frames = encode(message)
        if kind == "noise":
            frames, request_id = [b"\xc1" * 40, b""], NO_ID
        device.waiting[request_id] = (kind, index, time.monotonic())
        device.socket.send_multipart(frames)
        self.counts["requests"] += 1

    def send_any(self) -> None:
        """Sends a request of a random kind from a random device."""
        staying = [device for device in self.devices if not device.leaving]
        device = staying[int(self._rng.integers(len(staying)))]
        kind = str(self._rng.choice(list(KINDS), p=self._shares))
        if kind == "noise" and NO_ID in device.waiting:  # replies to noise have no id to tell them apart
            kind = "infer"
        self.send(device, kind)

    def receive(self, timeout_ms: float) -> list[Device]:
        """Waits for replies, checks them, and returns who got one, once for each."""
        got = []
        by_socket = {device.socket: device for device in self.devices}
        for socket, _ in self._poller.poll(max(0.0, timeout_ms)):
            device = by_socket[socket]
            while socket.poll(0):
                self._check(device, decode(socket.recv_multipart()))
                got.append(device)
        return got

    def give_up(self) -> None:
        """Counts and forgets requests that nobody answers any more."""
        now = time.monotonic()
        for device in self.devices:
            late = [key for key, (_, _, sent) in device.waiting.items() if now - sent > UNANSWERED_AFTER_S]
            for key in late:
                self.counts["unanswered"] += 1
                del device.waiting[key]

    def rejoin(self) -> None:
        """Lets devices that wait for nothing leave and come back."""
        for device in self.devices:
            if device.leaving and not device.waiting:
                self._poller.unregister(device.socket)
                device.socket.close(linger=0)
                device.socket, device.leaving = self._connected(device.key), False
                self.counts["reconnects"] += 1

    def _check(self, device: Device, reply: Message) -> None:
        kind, index, sent = device.waiting.pop(reply.request_id, ("", 0, 0.0))
        if not kind:
            self.counts["stray"] += 1  # of another request, or once more
            return
        self.counts["longest_ms"] = max(self.counts["longest_ms"], round(1000 * (time.monotonic() - sent)))
        if reply.operation == RESULT:
            right = 0 in KINDS[kind][1] and np.array_equal(reply.tensor, self._answers[index : index + 1])
            self.counts["right" if right else "wrong"] += 1
            return
        code = reply.info["code"]
        self.counts[WIRE_ERRORS[code].__name__] += 1
        if code not in KINDS[kind][1]:
            self.counts["refused"] += 1

    def _socket(self, pair: keys.KeyPair) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.curve_serverkey = self._server_key.encode()
        socket.curve_publickey, socket.curve_secretkey = pair.public.encode(), pair.secret.encode()
        return socket

    def _connected(self, pair: keys.KeyPair) -> zmq.Socket[bytes]:
        socket = self._socket(pair)
        socket.connect(self._endpoint)
        self._poller.register(socket, zmq.POLLIN)
        return socket


def capacity(fleet: Fleet, seconds: float) -> float:
    """Returns requests a second, closed-loop: every device has two on their way."""
    for device in fleet.devices:
        fleet.send(device, "infer")
        fleet.send(device, "infer")
    start, answered = time.monotonic(), 0
    while time.monotonic() < start + seconds:
        for device in fleet.receive(100):
            answered += 1
            fleet.send(device, "infer")
    rate = answered / (time.monotonic() - start)
    end = time.monotonic() + UNANSWERED_AFTER_S
    while any(device.waiting for device in fleet.devices) and time.monotonic() < end:
        fleet.receive(100)
    return rate


def sample(server: psutil.Process, start: float, requests: int) -> dict[str, float]:
    """Returns what the server and its children hold now."""
    members = [server, *server.children(recursive=True)]
    return {
        "minutes": (time.monotonic() - start) / 60,
        "rss_mib": sum(member.memory_info().rss for member in members) / 2**20,
        "descriptors": sum(member.num_fds() for member in members),
        "threads": sum(member.num_threads() for member in members),
        "requests": requests,
    }


class WholeClient:
    """An ``EdgeClient`` in a thread of its own that predicts an image now and then, and is made anew every minute."""

    def __init__(self, folder: Path, endpoint: str, key: Path, image: np.ndarray, label: str) -> None:
        self._made = lambda: EdgeClient(folder / "client", endpoint, key=key, timeout_ms=10_000)
        self._image, self._label = image, label
        self.counts: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client")
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            born = time.monotonic()
            with self._made() as client:
                while time.monotonic() < born + NEW_CLIENT_EVERY_S and not self._ended.wait(CLIENT_EVERY_S):
                    try:
                        right = client.predict(self._image).label == self._label
                        self.counts["right predictions" if right else "wrong predictions"] += 1
                    except EnsemblerError as error:
                        self.counts[f"predictions that ended in {type(error).__name__}"] += 1

    def close(self) -> None:
        """Ends it."""
        self._ended.set()
        self._thread.join()


def soak(fleet: Fleet, server: psutil.Process, rate: float, minutes: float) -> list[dict[str, float]]:
    """Sends at ``rate`` requests a second for so long; returns the samples."""
    rng = np.random.Generator(np.random.PCG64(1))
    start = time.monotonic()
    due = dict.fromkeys(("send", "sample", "rejoin"), start)
    samples: list[dict[str, float]] = []
    while (now := time.monotonic()) < start + 60 * minutes:
        for _ in range(SEND_BURST):
            if due["send"] > now:
                break
            fleet.send_any()
            due["send"] += rng.exponential(1 / rate)
        if due["sample"] <= now:
            samples.append(sample(server, start, fleet.counts["requests"]))
            fleet.give_up()
            due["sample"] += SAMPLE_EVERY_S
        if due["rejoin"] <= now:
            fleet.devices[int(rng.integers(len(fleet.devices)))].leaving = True
            fleet.knock()
            due["rejoin"] += REJOIN_EVERY_S
        fleet.rejoin()
        fleet.receive(1000 * (min(due.values()) - time.monotonic()))
    end = time.monotonic() + UNANSWERED_AFTER_S
    while any(device.waiting for device in fleet.devices) and time.monotonic() < end:
        fleet.receive(100)
    fleet.counts["unanswered"] += sum(len(device.waiting) for device in fleet.devices)
    return samples


def growth(samples: list[dict[str, float]], minutes: float) -> dict[str, float]:
    """Returns the mean memory and the median descriptors of both ends of the run, and how they grew."""
    early = [each for each in samples if minutes / 12 <= each["minutes"] < minutes / 4]
    late = [each for each in samples if each["minutes"] >= minutes * 5 / 6]
    before, after = (float(np.mean([each["rss_mib"] for each in part])) for part in (early, late))
    descriptors = [float(np.median([each["descriptors"] for each in part])) for part in (early, late)]
    return {
        "rss_before_mib": before,
        "rss_after_mib": after,
        "rss_percent": 100 * (after / before - 1),
        "fd_before": descriptors[0],
        "fd_after": descriptors[1],
        "fd_growth": descriptors[1] - descriptors[0],
    }


def draw(samples: list[dict[str, float]], path: Path) -> None:
    """Draws memory, descriptors and threads over time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "soak"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, sharex=True, figsize=(7, 5), layout="constrained")
    curves = {"rss_mib": "memory, MiB", "descriptors": "descriptors", "threads": "threads"}
    for axis, (name, label) in zip(axes, curves.items(), strict=True):
        axis.plot([each["minutes"] for each in samples], [each[name] for each in samples], linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes at half load")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs the server and the devices, records and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path, help="what ensembler demo or ensembler-export made, with its keys")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/soak"), help="the server's log and the samples")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(0))
    runtime, engine = EdgeRuntime(options.folder / "client"), OnnxEngine(options.folder / "server")
    size = runtime.manifest.image
    images = rng.integers(0, 256, (IMAGES, size.height, size.width, 3), dtype=np.uint8)
    codes = runtime.encode(images)
    answers = np.concatenate([engine.run(codes[i : i + 1]) for i in range(IMAGES)])
    server_secret = options.folder / "keys" / "server.key_secret"
    with tempfile.TemporaryDirectory() as temporary:
        made = [keys.create(Path(temporary), f"device{i}") for i in range(options.devices)]
        pairs = [keys.load_pair(secret) for _, secret in made]
        command = [sys.executable, "-m", "ensembler.cli", "serve", str(options.folder / "server"), "--json"]
        command += ["--bind", "tcp://127.0.0.1:*", "--key", str(server_secret), "--authorized", temporary]
        log = options.out / "server.log"
        # Its log goes to a file: a pipe that nobody reads would fill up and stop it.
        with (
            log.open("w") as stream,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True) as run,
        ):
            assert run.stdout is not None
            try:
                line = run.stdout.readline()
                if not line:
                    raise SystemExit(f"the server did not start; {log} says why")
                endpoint = json.loads(line)["endpoint"]
                fleet = Fleet(endpoint, keys.load_public(server_secret), pairs, engine.manifest, codes, answers, rng)
                peak = capacity(fleet, min(20.0, 10 * options.minutes))
                print(f"capacity {peak:.0f} requests/s with {options.devices} devices", flush=True)
                with EdgeClient(options.folder / "client", endpoint, key=made[0][1]) as first:
                    label = first.predict(images[0]).label
                local = runtime.finish(answers[:1])
                assert label == runtime.manifest.labels[int(np.argmax(local))]
                with closing(WholeClient(options.folder, endpoint, made[0][1], images[0], label)) as client:
                    samples = soak(fleet, psutil.Process(run.pid), peak / 2, options.minutes)
                fleet.close()
            finally:
                run.terminate()
            status = run.wait(60)
    (options.out / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    report(options, samples, fleet.counts + client.counts, peak, status)


def report(
    options: argparse.Namespace, samples: list[dict[str, float]], counts: Counter[str], peak: float, status: int
) -> None:
    """Prints, records and draws what was found."""
    found = growth(samples, options.minutes)
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    load = f"{options.minutes:g} minutes at {peak / 2:.0f} requests/s, half of the closed-loop {peak:.0f}"
    print(f"{load}; {told}; exit status {status}; {len(samples)} samples")
    windows = (
        f"from {options.minutes / 12:g} to {options.minutes / 4:g} minutes, and of the last {options.minutes / 6:g}"
    )
    figures = [
        results.figure(
            "soak_rss_growth_percent",
            round(found["rss_percent"], 2),
            "percent",
            "<= 2",
            f"mean VmRSS {windows}: {found['rss_before_mib']:.1f} and {found['rss_after_mib']:.1f} MiB; {load}",
        ),
        results.figure(
            "soak_fd_growth",
            found["fd_growth"],
            "descriptors",
            "0",
            f"medians {windows}: {found['fd_before']:g} and {found['fd_after']:g}",
        ),
        results.figure("soak_requests", counts["requests"], "requests", "", told),
        results.figure(
            "soak_wrong_answers",
            counts["wrong"] + counts["wrong predictions"] + counts["stray"],
            "answers",
            "0",
            f"other codes {counts['wrong']}, other labels {counts['wrong predictions']}, replies nobody waits for "
            f"{counts['stray']}; requests without an answer: {counts['unanswered']}",
        ),
    ]
    if options.no_record:
        for figure in figures:
            print(figure["figure"], figure["value"], figure["note"])
        draw(samples, options.out / "soak.svg")
        return
    command = f"python benchmarks/soak.py {options.folder} --minutes {options.minutes:g} --devices {options.devices}"
    results.record("cloud", figures, command=command, seed=0)
    draw(samples, results.RESULTS / "soak.svg")


if __name__ == "__main__":
    main()
