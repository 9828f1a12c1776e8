"""Total time of 128 images over a link like the paper's: Ensembler with N = 10 beside plain inference with N = 1.

    python benchmarks/table3.py [--rounds 7] [--images 128]      (as root: it makes network namespaces)

The paper's Ensembler (Table III) takes 0.66 s device + 1.02 s server + 2.45 s link for 128 images, 4.8 % more than
plain inference. Its bytes over its seconds imply 3.67 MB/s up and 15.7 MB/s down; both that link and 3.67 MB/s both
ways are made here, from namespaces (benchmarks/link.py). ResNet-18 cut after its stem (features 64x16x16, answers of
512), images of 32x32.

* ``standard``: collaborative inference as in the paper: float32 features up, one net, float32 answers down.
* ``ensembler_float``: the paper's Ensembler: the same with ten nets.
* ``image``: no privacy: the pixels go up, the server runs the whole net, float32.
* ``ours_features``: ``EdgeClient`` with ten int8 nets, 2-bit features (4,096 bytes), 4-bit answers, CURVE.
* ``ours_bottleneck``: the same with a trained bottleneck at the cut, 64 bytes up.
* ``ours_one_net``: as ``ours_features`` with a single net and no selector: what the ensemble costs in our own system.

The first three do one thing after the other, as the paper's sums say, and each as lean as it can be: float32
onnxruntime at both ends, bytes over a plain TCP connection, the net's work shared by all cores in parts of 16 images
(what was fastest), no encryption. Only ours overlaps link and nets. The link's bucket lets 64 KiB through unslowed
after a pause. All systems are measured in turn, in rounds; the medians count. Device and server share this machine's
cores, so what they do at once costs each. How fast a net is does not depend on what it has learned: the nets are
trained for one epoch of a few images.

The floors: bytes over the link's rate, and the nets' multiply-accumulates over the most that this machine's onnxruntime
does a second in one large matrix product, float32 and int8.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import socket as sockets
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import product
import results
from bundles import Identities
from link import link, possible

from ensembler import EdgeClient
from ensembler.cloud_runtime.crew import Crew
from ensembler.cloud_runtime.engine import usable_cores
from ensembler.protocol.integers import sum_exactly
from ensembler.training.plots import blank_figure

Floats = npt.NDArray[np.float32]

NETS, SELECTED = 10, 4
PART_ROWS = 16
PEAK_S = 4.0  # long enough for a moment in which nothing else is in the way
UP, DOWN = 3.67e6, 15.7e6
LINKS = {"": (UP, DOWN), "_both_ways": (UP, UP)}
ENSEMBLE = f"-N {NETS} -P {SELECTED} --answer-bits 4"
OURS = {
    "ours_features": f"{ENSEMBLE} --wire-bits 2",
    "ours_bottleneck": f"{ENSEMBLE} --bottleneck 16,4,2",
    "ours_one_net": "--defense single --answer-bits 4 --wire-bits 2",
}
PLAIN = {"standard": ("head", "body", 1), "ensembler_float": ("head", "body", NETS), "image": (None, "whole", 1)}
# Of the bars, from the top.
TITLES = {
    "ensembler_float": "Ensembler as in the paper:\nten float32 nets",
    "standard": "Standard CI: one float32 net,\nno protection",
    "ours_features": "ours: ten int8 nets,\n4,096 bytes up",
    "ours_bottleneck": "ours: ten int8 nets,\n64 bytes up",
    "image": "pixels to the cloud:\nno privacy",
    "ours_one_net": "ours, one int8 net",
}
COLOURS = ("#3b6ea8", "#9db8d6")
FOLDER = Path("out/table3")
SEED = 0


# --- the nets ---


def prepared(folder: Path) -> None:
    """Trains and exports what is not there yet."""
    data = bundles.images(folder, 32)
    training = f"--data {data} --arch resnet18 --epochs 1 --batch-size 16 --learning-rate 0.02".split()
    for name, options in OURS.items():
        if not (folder / name / "server" / "manifest.json").is_file():
            run = product.trained(folder / f"{name}_run", *training, *options.split())
            product.exported(run, folder / name, data, *bundles.OPEN_GATES.split())
    run = product.trained(folder / "plain_run", *training, "--defense", "none")
    if not (folder / "whole.onnx").is_file():
        _plain_graphs(run, folder)


def _plain_graphs(run: Path, folder: Path) -> None:
    import torch
    from torch import nn

    from ensembler.export.graphs import from_torch, optimised
    from ensembler.training.models import normalise
    from ensembler.training.runs import RunFolder
    from ensembler.training.stages import load_bodies, load_client

    class Pixels(nn.Module):
        """The device's images, ``(B, H, W, 3)`` uint8, as a net takes them."""

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return normalise(pixels.permute(0, 3, 1, 2))

    opened = RunFolder.open(run)
    client, body = load_client(opened), load_bodies(opened)[0]
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    head = nn.Sequential(Pixels(), client.head).eval()
    features = head(pixels)
    answers = body(features)
    parts: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "head": (head, pixels),
        "body": (body, features),
        "tail": (client.tail, answers),
        "whole": (nn.Sequential(head, body, client.tail).eval(), pixels),
    }
    for name, (module, example) in parts.items():
        graph = optimised(from_torch(module, [example.detach()]))
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())


def _session(path: Path, threads: int) -> Any:
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    sum_exactly(options)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- the plain server: a length, the bytes; back come the seconds of its nets, a length, the bytes ---


def serve(model: Path, nets: int, host: str) -> None:
    """Serves one client after the other; says its port first."""
    sessions = [_session(model, 1) for _ in range(nets)]
    crew = Crew(usable_cores() - 1)
    given = sessions[0].get_inputs()[0]
    dtype = np.dtype(np.uint8 if given.type == "tensor(uint8)" else np.float32)
    shape = tuple(given.shape[1:])

    def answered(x: npt.NDArray[Any]) -> Floats:
        found: dict[tuple[int, int], Floats] = {}

        def piece(net: int, start: int) -> None:
            found[net, start] = sessions[net].run(None, {given.name: x[start : start + PART_ROWS]})[0]

        starts = range(0, len(x), PART_ROWS)
        crew.run(piece, [(net, start) for start in starts for net in range(nets)])
        return np.stack([np.concatenate([found[net, start] for start in starts]) for net in range(nets)], axis=1)

    with sockets.create_server((host, 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
                while (size := _read(connection, 8)) is not None:
                    data = _read(connection, struct.unpack("<Q", size)[0])
                    assert data is not None
                    began = time.perf_counter()
                    answers = answered(np.frombuffer(data, dtype).reshape(-1, *shape))
                    seconds = time.perf_counter() - began
                    connection.sendall(struct.pack("<dQ", seconds, answers.nbytes) + answers.tobytes())


def _read(connection: sockets.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return data


class Plain:
    """The device's end of one of ``PLAIN``."""

    def __init__(self, name: str, folder: Path, host: str, port: int) -> None:
        head, _, self._nets = PLAIN[name]
        self._head = None if head is None else _session(folder / f"{head}.onnx", usable_cores())
        self._tail = None if head is None else _session(folder / "tail.onnx", 1)
        self._socket = sockets.create_connection((host, port))
        self._socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
        self.times: dict[str, float] = {}
        self.bytes_up = self.bytes_down = 0

    def __call__(self, images: npt.NDArray[np.uint8]) -> Floats:
        """Returns the logits, ``(B, K)``."""
        began = time.perf_counter()
        sent: npt.NDArray[Any] = images
        if self._head is not None:
            sent = self._head.run(None, {self._head.get_inputs()[0].name: images})[0]
        encoded = time.perf_counter()
        self._socket.sendall(struct.pack("<Q", sent.nbytes))
        self._socket.sendall(sent.data)
        head = _read(self._socket, 16)
        assert head is not None
        server_s, size = struct.unpack("<dQ", head)
        data = _read(self._socket, size)
        assert data is not None
        received = time.perf_counter()
        logits = np.frombuffer(data, np.float32).reshape(len(images), self._nets, -1)[:, 0]
        if self._tail is not None:
            logits = self._tail.run(None, {self._tail.get_inputs()[0].name: logits})[0]
        ended = time.perf_counter()
        self.times = {
            "device": encoded - began + ended - received,
            "server": server_s,
            "link": received - encoded - server_s,
        }
        self.bytes_up, self.bytes_down = sent.nbytes, size
        return logits


class Ours:
    """``EdgeClient``."""

    def __init__(self, client: EdgeClient) -> None:
        self._client = client
        self.times: dict[str, float] = {}
        self.bytes_up = self.bytes_down = 0

    def __call__(self, images: npt.NDArray[np.uint8]) -> Floats:
        """Returns the logits, ``(B, K)``."""
        found = self._client.predict_batch(list(images))
        requests = {one.request_id: one for one in found}.values()
        self.bytes_up = sum(one.bytes_up for one in requests)
        self.bytes_down = sum(one.bytes_down for one in requests)
        # Requests overlap, so these sums are more than the total.
        self.times = {
            "device": sum(one.timings.head + one.timings.tail for one in requests) / 1000,
            "server": sum(one.timings.server for one in requests) / 1000,
        }
        return np.stack([one.logits for one in found])


# --- what cannot be undercut ---


def peak_macs_s(dtype: type[np.generic]) -> float:
    """Returns the multiply-accumulates a second of a large matrix product on all cores, the best of some."""
    from onnx import TensorProto, helper

    size, operator = 1024, "MatMul" if dtype is np.float32 else "MatMulInteger"
    kind, out = (
        (TensorProto.FLOAT, TensorProto.FLOAT) if dtype is np.float32 else (TensorProto.UINT8, TensorProto.INT32)
    )
    weights = np.random.Generator(np.random.PCG64(SEED)).integers(0, 127, (size, size))
    constant = weights.astype(np.float32 if dtype is np.float32 else np.int8)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("x", kind, [size, size])],
        [helper.make_tensor_value_info("y", out, [size, size])],
        [
            helper.make_tensor(
                "w", TensorProto.FLOAT if dtype is np.float32 else TensorProto.INT8, [size, size], constant
            )
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    sum_exactly(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = weights.astype(dtype)
    times = []
    until = time.perf_counter() + PEAK_S
    while time.perf_counter() < until:
        began = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - began)
    return float(size**3 / min(times))


def floors(images: int) -> list[str]:
    """Returns how long the nets of the systems must take at the least, in words."""
    from ensembler.training.models import ArchSpec
    from ensembler.training.presets import net_macs

    macs = net_macs(ArchSpec(name="resnet18", num_classes=3, image_size=(32, 32)))
    lines = [f"ResNet-18 at 32x32: {macs / 1e6:.0f} million multiply-accumulates an image"]
    for words, dtype, nets in (("float32", np.float32, (1, NETS)), ("int8", np.uint8, (1, NETS))):
        peak = peak_macs_s(dtype)
        shown = ", ".join(f"{count} nets {images * count * macs / peak:.3f} s" for count in nets)
        lines.append(f"  {words}: at most {peak / 1e9:.0f} billion a second here: {images} images through {shown}")
    return lines


# --- the run: ``main`` makes the link and starts the servers, ``--device`` is the part at the device's end ---


@contextlib.contextmanager
def _plain_server(name: str, folder: Path, within: tuple[str, ...], host: str) -> Iterator[int]:
    _, model, nets = PLAIN[name]
    command = [*within, sys.executable, __file__, "--serve", str(folder / f"{model}.onnx"), str(nets), host]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)


def device(options: argparse.Namespace) -> None:
    """Asks every server in turn and prints the seconds of each as JSON."""
    with contextlib.ExitStack() as stack:
        systems: dict[str, Callable[[npt.NDArray[np.uint8]], Floats]] = {}
        for entry in options.device:
            name, address = entry.split("=", 1)
            if name in PLAIN:
                host, port = address.rsplit(":", 1)
                systems[name] = Plain(name, options.folder, host, int(port))
            else:
                key = options.keys / "devices" / "device000.key_secret"
                client = EdgeClient(
                    options.folder / name / "client",
                    address,
                    key=key,
                    server_key=options.keys / "server.key",
                    timeout_ms=60_000,
                )
                systems[name] = Ours(stack.enter_context(client))
        rng = np.random.Generator(np.random.PCG64(SEED))
        images = rng.integers(0, 256, (options.images, 32, 32, 3), dtype=np.uint8)
        found: dict[str, Any] = {name: {"total": [], "parts": []} for name in systems}
        first: dict[str, Floats] = {}
        for turn in range(options.rounds + 1):  # the first one warms up
            for name, system in systems.items():
                began = time.perf_counter()
                logits = system(images)
                total = time.perf_counter() - began
                if not np.allclose(logits, first.setdefault(name, logits), atol=1e-4):
                    raise SystemExit(f"{name} answered otherwise than the first time")
                if turn:
                    found[name]["total"].append(total)
                    found[name]["parts"].append(system.times)  # type: ignore[attr-defined]
                    found[name]["bytes"] = [system.bytes_up, system.bytes_down]  # type: ignore[attr-defined]
        if "image" in first and not np.allclose(first["image"], first["standard"], atol=1e-3):
            raise SystemExit("the whole net and its parts answer differently")
    print(json.dumps(found))


def measured(options: argparse.Namespace, up: float, down: float) -> dict[str, Any]:
    """Returns what ``device`` printed, over one link."""
    with contextlib.ExitStack() as stack:
        ends = stack.enter_context(link(up, down))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys = Identities.new(work / "keys", 1)
        asked = []
        for name in PLAIN:
            port = stack.enter_context(_plain_server(name, options.folder, ends.server, ends.address))
            asked.append(f"{name}={ends.address}:{port}")
        for name in OURS:
            served = bundles.served(
                options.folder / name / "server",
                keys,
                log=work / f"{name}.log",
                within=ends.server,
                host=ends.address,
            )
            asked.append(f"{name}={stack.enter_context(served)}")
        own = [sys.executable, __file__, "--folder", str(options.folder), "--keys", str(keys.folder)]
        own += ["--rounds", str(options.rounds), "--images", str(options.images), "--device", *asked]
        done = subprocess.run([*ends.device, *own], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def shown(found: dict[str, Any], up: float, down: float) -> list[str]:
    """Returns a table: medians in seconds, what the link alone must take, and the ratio to ``standard``."""
    base = float(np.median(found["standard"]["total"]))
    lines = [f"link {up / 1e6:.2f} MB/s up, {down / 1e6:.2f} MB/s down"]
    for name, one in found.items():
        parts = {part: np.median([each[part] for each in one["parts"]]) for part in one["parts"][0]}
        bytes_up, bytes_down = one["bytes"]
        total = float(np.median(one["total"]))
        lines.append(
            f"  {name:16} {total:6.3f} s ({min(one['total']):.3f} to {max(one['total']):.3f})  {total / base:5.3f} of "
            f"standard  bytes {bytes_up} up, {bytes_down} down: {bytes_up / up + bytes_down / down:.3f} s  "
            + "  ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
        )
    return lines


def figures(found: dict[str, Any], suffix: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what is recorded of one link."""
    median = {name: float(np.median(one["total"])) for name, one in found.items()}
    up, down = LINKS[suffix]
    note = (
        f"{options.images} images, ResNet-18, {up / 1e6:.2f} MB/s up and {down / 1e6:.2f} MB/s down; seconds: "
        + ", ".join(f"{name} {seconds:.3f}" for name, seconds in median.items())
    )
    made = []
    names = {
        "total_vs_standard_ci": ("ours_features", "<= 0.5"),
        "total_bottleneck_vs_standard_ci": ("ours_bottleneck", "<= 0.5"),
        "total_one_net_vs_standard_ci": ("ours_one_net", ""),
        "total_float_vs_standard_ci": ("ensembler_float", ""),
        "total_image_vs_standard_ci": ("image", ""),
    }
    for figure, (name, goal) in names.items():
        ratio = round(median[name] / median["standard"], 4)
        made.append(results.figure(figure + suffix, ratio, "ratio", goal, note))
    if not suffix:
        for figure, name in {"bytes_up_per_image": "ours_features", "bytes_up_bottleneck": "ours_bottleneck"}.items():
            goal = "<= 64" if figure.endswith("bottleneck") else "<= 4096"
            payload = _payload(options.folder / name / "client")
            made.append(results.figure(figure, payload[0], "bytes", goal, "codes of one image, without the header"))
        made.append(
            results.figure("bytes_down_per_image", payload[1], "bytes", "<= 2560", "10 x 512 answers of 4 bits")
        )
    return made


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the totals over every link, and in each bar what its bytes must take there."""
    figure = blank_figure(8.0, 4.6)
    axis = figure.subplots()
    height = 0.8 / len(found)
    names = list(TITLES)
    for row, (suffix, systems) in enumerate(found.items()):
        up, down = LINKS[suffix]
        places = [len(names) - 1 - index - row * height for index in range(len(names))]
        totals = [float(np.median(systems[name]["total"])) for name in names]
        carried = [systems[name]["bytes"][0] / up + systems[name]["bytes"][1] / down for name in names]
        words = f"{up / 1e6:.2f} MB/s up, {down / 1e6:.2f} MB/s down"
        axis.barh(places, totals, height * 0.92, color=COLOURS[row], label=words)
        axis.barh(places, carried, height * 0.3, color="#222222", label=None if row else "bytes over the link's rate")
        for place, total in zip(places, totals, strict=True):
            axis.text(total + 0.04, place, f"{total:.2f} s", va="center", fontsize=8)
    axis.set_yticks([len(names) - 1 - index - height * (len(found) - 1) / 2 for index in range(len(names))])
    axis.set_yticklabels([TITLES[name] for name in names], fontsize=9)
    axis.set_xlabel("seconds for a batch of images, the median of the rounds")
    axis.margins(x=0.12)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path)


def _payload(client: Path) -> tuple[int, int]:
    from ensembler.protocol.manifest import load_client

    wire = load_client(client).wire
    up = math.prod(wire.feature_shape) * wire.feature_codec.bits // 8
    return up, wire.num_nets * wire.answer_width * wire.answer_bits // 8


def main() -> None:
    """Makes both links, measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--device", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--keys", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), int(options.serve[1]), options.serve[2])
        return
    if options.device:
        device(options)
        return
    if reason := possible():
        raise SystemExit(f"no link can be made here: {reason}")
    prepared(options.folder)
    print("\n".join(floors(options.images)), flush=True)
    recorded, all_found = [], {}
    for suffix, (up, down) in LINKS.items():
        found = all_found[suffix] = measured(options, up, down)
        print("\n".join(shown(found, up, down)), flush=True)
        recorded += figures(found, suffix, options)
    if not options.no_record:
        draw(all_found, results.RESULTS / "table3.svg")
        results.record("speed", recorded, command="python benchmarks/table3.py", seed=SEED)


if __name__ == "__main__":
    main()
