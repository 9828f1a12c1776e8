"""What tests share: a tiny data set, a tiny trained run, and its bundles, each made once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from ensembler.cloud_runtime.batcher import BatchPolicy
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.cloud_runtime.server import Server
from ensembler.protocol.integers import sum_exactly
from ensembler.transport.zmq_server import ServerSocket

# The nets here are so small that threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

with suppress(ImportError):  # the runtimes' own environments have none
    from hypothesis import settings as examples

    examples.register_profile("ensembler", deadline=None)  # a machine may be busy with anything
    examples.load_profile("ensembler")

# A shell starts what runs in the background with Ctrl-C ignored, and every process below inherits that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A server that a test stops and starts again finds its port free: each process of the suite has an address of its own.
LOOPBACK = f"127.0.{1 + int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0')[2:])}.1"

LABELS = ("red", "grün", "blue")  # one is not ASCII on purpose
SIZE = 16


@pytest.fixture(autouse=True)
def _empty_home(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's own configuration, keys or cache."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    for name in (
        "XDG_CONFIG_HOME",
        "XDG_CACHE_HOME",
        "ENSEMBLER_DEVICE_KEY",
        "ENSEMBLER_SERVER_KEY",
        "ENSEMBLER_BUNDLE_KEY",
    ):
        monkeypatch.delenv(name, raising=False)


def colour_images(count: int, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy images whose class is their strongest channel: (count, 3, size, size) uint8 and (count,)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    y = rng.integers(0, 3, count)
    x = rng.integers(0, 120, (count, 3, size, size), dtype=np.uint8)
    x[np.arange(count), y] += 100
    return x, y


@contextmanager
def process_of(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """A program whose output the test reads; killed at the end if it still runs."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


@dataclass(frozen=True)
class Tiny:
    """Paths of the tiny run and of what was exported from it."""

    data: str
    run: Path
    out: Path

    @property
    def client(self) -> Path:
        return self.out / "client"

    @property
    def server(self) -> Path:
        return self.out / "server"

    @property
    def keys(self) -> Path:
        return self.out / "keys"

    @cached_property
    def torch_out(self) -> Path:
        """The same client, and the bodies in the torch format, made when they are first asked for."""
        from ensembler.export.pipeline import export
        from ensembler.transport.keys import load_public

        out, keys = self.out.with_name(f"{self.out.name}-torch"), (load_public(self.keys / "server.key"),)
        export(self.run, out, open_export(server_public_keys=keys, server_format="torch"))
        return out

    @property
    def server_torch(self) -> Path:
        return self.torch_out / "server"


def open_export(**options):
    """Options of an export whose gates are open: the tiny run is hardly trained."""
    from ensembler.export.parity import Gates
    from ensembler.export.pipeline import ExportOptions

    return ExportOptions(gates=Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0), **options)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """A ``--data`` specification of 192 train and 96 test images of 16x16 pixels in three classes."""
    folder = tmp_path_factory.mktemp("data")
    for part, count, seed in (("train", 192, 1), ("test", 96, 2)):
        x, y = colour_images(count, seed)
        np.savez(folder / f"{part}.npz", x=x, y=y, label_names=np.array(LABELS))
    return f"npz:{folder / 'train.npz'},{folder / 'test.npz'}"


@pytest.fixture(scope="session")
def audit_images(tiny_data, tmp_path_factory) -> str:
    """A ``--data`` specification with the tiny train set and 400 held-out images, enough for an audit."""
    path = tmp_path_factory.mktemp("audit") / "test.npz"
    x, y = colour_images(400, 7)
    np.savez(path, x=x, y=y, label_names=np.array(LABELS))
    return f"{tiny_data.split(',')[0]},{path}"


def brief_plan():
    """An attack's plan of a handful of steps."""
    from ensembler.privacy.attacks.base import Plan
    from ensembler.privacy.decoder import Effort

    return Plan(effort=Effort(steps=4, check_every=2, width=4), steps=4, restarts=1)


@pytest.fixture
def shut_away(monkeypatch):
    """``shut_away(path)`` has a file lie in another user's folder, also for root, who may look everywhere."""
    is_file = Path.is_file

    def shut(closed):
        def asked(path):
            if path == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return is_file(path)

        monkeypatch.setattr(Path, "is_file", asked)

    return shut


@pytest.fixture
def tiny_budget(monkeypatch):
    """Every budget of the audit takes a handful of steps and one seed."""
    from ensembler.privacy.audit import BUDGETS

    for name, budget in BUDGETS.items():
        monkeypatch.setitem(BUDGETS, name, dataclasses.replace(budget, plan=brief_plan(), seeds=1))


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and another number of them may sum in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def configs():
    """``configs(**smallest)`` returns a function that builds that config of a small net, with changes."""
    from ensembler.training.config import TrainConfig

    def of(**smallest):
        common = {"arch": "resnet10_slim", "batch_size": 16, "device": "cpu"}
        return lambda **changes: TrainConfig(**(common | smallest | changes))

    return of


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory) -> Path:
    """A run folder: N = 3, P = 2, trained for a few seconds."""
    from ensembler.training.config import TrainConfig
    from ensembler.training.stages import train

    out = tmp_path_factory.mktemp("run") / "run"
    config = TrainConfig(
        data=tiny_data,
        arch="resnet10_slim",
        num_nets=3,
        num_selected=2,
        epochs_stage1=2,
        epochs_stage3=2,
        batch_size=16,
        learning_rate=0.05,
    )
    train(config, out)
    return out


@pytest.fixture(scope="session")
def tiny(tiny_data, tiny_run, tmp_path_factory) -> Tiny:
    """Client bundle, server bundle and keys of the tiny run."""
    from ensembler.cli.export import new_keys
    from ensembler.export.pipeline import export

    out = tmp_path_factory.mktemp("bundles")
    export(tiny_run, out, open_export(server_public_keys=new_keys(out / "keys")))
    return Tiny(tiny_data, tiny_run, out)


@pytest.fixture(scope="session")
def float_server(tiny_run, tmp_path_factory) -> Path:
    """The tiny run's bodies in float32: the same ``bodies_id`` as in int8."""
    from ensembler.export.parity import Gates
    from ensembler.export.pipeline import ExportOptions, export

    out = tmp_path_factory.mktemp("float")
    open_gates = Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0)
    export(tiny_run, out, ExportOptions(server_precision="float32", gates=open_gates))
    return out / "server"


@pytest.fixture(scope="session")
def other(tiny_run, tmp_path_factory) -> Path:
    """Other models: each of the tiny run's bodies for an operator of its own; yields the folder of bundles."""
    from ensembler.export.parity import Gates
    from ensembler.export.pipeline import ExportOptions, export

    out = tmp_path_factory.mktemp("other")
    export(tiny_run, out, ExportOptions(parties=3, gates=Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0)))
    return out


@pytest.fixture(scope="session")
def tiny_images(tiny_data) -> np.ndarray:
    """The held-out images as applications have them: (96, 16, 16, 3) uint8."""
    with np.load(tiny_data.split(",")[1]) as stored:
        return np.ascontiguousarray(stored["x"].transpose(0, 2, 3, 1))


@pytest.fixture(scope="session")
def serve():
    """``with serve(bundle, *options) as (endpoint, process)``: the server as a process of its own.

    ``process.ready`` is what it said when it was.
    """
    return _serving


@contextmanager
def _serving(
    bundle: Path, *arguments: str, bind: str = f"tcp://{LOOPBACK}:*"
) -> Iterator[tuple[str, subprocess.Popen]]:
    command = [sys.executable, "-m", "ensembler.cli", "serve", str(bundle), "--bind", bind, "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if not line:
                raise AssertionError(f"the server did not start: {process.communicate()[1]}")
            process.ready = json.loads(line)
            yield process.ready["endpoint"], process
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate()


@pytest.fixture(scope="session")
def expected(tiny, tiny_images) -> np.ndarray:
    """The logits that bundle and engine give without any network, one row per image."""
    from ensembler.edge_runtime.runtime import EdgeRuntime

    runtime, engine = EdgeRuntime(tiny.client), OnnxEngine(tiny.server, threads=1)
    logits = runtime.finish(engine.run(runtime.encode(tiny_images)))
    engine.close()
    return logits


@pytest.fixture(scope="session")
def codes(tiny) -> np.ndarray:
    """Wire codes for the tiny bundle's bodies: 21 rows."""
    from ensembler.protocol.manifest import load_server

    shape = load_server(tiny.server).wire.feature_shape
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, (21, *shape), dtype=np.uint8)


@pytest.fixture(scope="session")
def answers(tiny, codes) -> np.ndarray:
    """What the tiny bundle's bodies answer when their sessions are called one by one."""
    import onnxruntime as ort

    from ensembler.protocol.manifest import load_server

    options = ort.SessionOptions()
    sum_exactly(options)
    nets = [ort.InferenceSession(str(tiny.server / name), options) for name in load_server(tiny.server).bodies]
    return np.stack([net.run(None, {"features": codes})[0] for net in nets], axis=1)


@pytest.fixture(scope="session")
def answers_in_float(tiny, codes) -> np.ndarray:
    """What torch answers to the same codes with the bodies of the run, in float32."""
    import torch

    from ensembler.protocol.manifest import load_server
    from ensembler.training.runs import RunFolder
    from ensembler.training.stages import load_bodies

    wire = load_server(tiny.server).wire
    features = torch.from_numpy(wire.feature_codec.decode(codes))
    with torch.inference_mode():
        nets = [body(features).numpy() for body in load_bodies(RunFolder.open(tiny.run))]
    return np.stack([codec.encode(net) for codec, net in zip(wire.answer_codecs, nets, strict=True)], axis=1)


def forged_server(manifest, folder: Path, **changes) -> None:
    """Writes a server bundle's manifest whose digests are right and whose contents are not."""
    from ensembler.protocol.manifest import MANIFEST_NAME, describe_file, to_json

    files = {name: describe_file(folder / name) for name in manifest.files}
    (folder / MANIFEST_NAME).write_bytes(to_json(replace(manifest, files=files, **changes)))


HELD_MS = 3_600_000.0


class SlowEngine(OnnxEngine):
    """The real engine, held until it is released: makes 'busy' and 'in flight' certain instead of likely."""

    in_process = False  # so that the loop goes on while it is held

    def __init__(self, bundle):
        super().__init__(bundle, threads=1)
        self.entered = threading.Event()
        self.release = threading.Event()
        self.features = []

    @property
    def rows(self):
        return [len(features) for features in self.features]

    def run(self, features):
        self.features.append(features.copy())
        self.entered.set()
        assert self.release.wait(60)
        return super().run(features)


@pytest.fixture
def in_thread(tiny):
    """Starts servers in threads of this process, with any engine and policy; stops them at the end."""
    started = []

    def start(engine, policy=None, keys_pair=None, authorized=frozenset(), **options):
        listening = ServerSocket("tcp://127.0.0.1:*", keys=keys_pair, authorized=authorized)
        # How long an engine was held says nothing about how long a row takes.
        server = Server(engine, listening, policy or BatchPolicy(max_batch_ms=HELD_MS), **options)
        thread = threading.Thread(target=server.run)
        thread.start()
        started.append((server, thread, listening, engine))
        return server, listening.endpoint

    yield start
    for server, thread, listening, engine in started:
        if isinstance(engine, SlowEngine):
            engine.release.set()
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
        listening.close()


class Gate:
    """A server in this process whose handler can be held: makes 'in flight' certain instead of likely.

    ``arrived`` counts requests; each then waits for ``open``.
    """

    def __init__(self, bundle: Path):
        self.engine = OnnxEngine(bundle, threads=1)
        self.open = threading.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __call__(self, frames):
        from ensembler.protocol.messages import RESULT, Message, decode, encode

        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.arrived.release()
        assert self.open.wait(60)
        message = decode(frames)
        with self._lock:
            self.at_once -= 1
            tensor = self.engine.run(message.tensor)
        info = {"queue_ms": 0.0, "compute_ms": 0.0}
        ids = {"request_id": message.request_id, "bodies_id": message.bodies_id}
        return [encode(Message(operation=RESULT, **ids, tensor=tensor, info=info))]


@pytest.fixture
def gate(tiny) -> Iterator[Gate]:
    """See ``Gate``; ``EdgeClient(..., transport=InProcessTransport(gate))`` uses it."""
    held = Gate(tiny.server)
    yield held
    held.open.set()
    held.engine.close()
