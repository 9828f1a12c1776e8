"""Which engine, and which arrangement of N nets, is faster: all of them side by side in one run.

    python benchmarks/engines.py --arch resnet10_slim --arch resnet18

Bodies of random weights are written as server bundles (ONNX in int8 and in float32, torch) and opened in every engine;
what weights say does not change the time. Every batch goes through all of them in turn, so that a noisy machine is
noisy for all:

* ``int8``, ``float32``: the onnxruntime engine on the ONNX bundles;
* ``separate``: the torch engine with every net by itself, as it computes on the CPU;
* ``stacked``: the torch engine with N nets as one computation, as it computes on CUDA.

A ratio is a way's time by that of ``separate`` in the same round, the median over the rounds. The engines of torch
share one setting, how many threads torch has for one net, which is set before each call.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import results
import torch
from overhead import timed

from ensembler.cloud_runtime.engine import DEVICES, Engine, usable_cores
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.cloud_runtime.torch_engine import TorchEngine
from ensembler.export import graphs, pipeline
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.manifest import WireSpec
from ensembler.training.models import ArchSpec, build_net

BATCHES = (1, 8, 64)
BASE = "separate"
CALIBRATION_ROWS = 256


@torch.inference_mode()
def write_bundles(folder: Path, arch: str, num_nets: int) -> None:
    """Writes ``int8``, ``float32`` and ``torch``: bundles of the same N bodies of random weights."""
    torch.manual_seed(0)
    nets = [build_net(ArchSpec(name=arch, image_size=(32, 32), num_classes=10)).eval() for _ in range(num_nets)]
    samples = nets[0].head(torch.randn(CALIBRATION_ROWS, 3, 32, 32))
    bodies = [net.body for net in nets]
    answers = [body(samples) for body in bodies]
    wire = WireSpec(
        bodies_id="0" * 64,
        feature_shape=tuple(samples.shape[1:]),
        feature_codec=AffineCodec.from_range(float(samples.min()), float(samples.max())),
        answer_width=answers[0].shape[1],
        answer_codecs=tuple(AffineCodec.from_range(float(each.min()), float(each.max())) for each in answers),
    )
    template = graphs.from_torch(bodies[0], [samples[:2]])
    for name, graph, precision in (
        ("int8", template, "int8"),
        ("float32", template, "float32"),
        ("torch", None, "float32"),
    ):
        pipeline.write_server(folder / name, graph, bodies, wire, samples, pipeline.Numbers(precision), name, print)


def measure(folder: Path, threads: int, device: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Returns the milliseconds of each round, for each way."""
    engines: dict[str, Engine] = {
        "int8": OnnxEngine(folder / "int8", threads=threads, device=device),
        "float32": OnnxEngine(folder / "float32", threads=threads, device=device),
        "separate": TorchEngine(folder / "torch", threads=threads, device=device, stacked=False),
        "stacked": TorchEngine(folder / "torch", threads=threads, device=device, stacked=True),
    }
    shape = (batch, *engines["int8"].manifest.wire.feature_shape)
    codes = np.random.Generator(np.random.PCG64(0)).integers(0, 256, shape, dtype=np.uint8)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(rounds + 3):
        for name, engine in engines.items():
            torch.set_num_threads(threads if name == "stacked" else 1)
            elapsed = timed(lambda engine=engine: engine.run(codes))  # type: ignore[misc]
            if index >= 3:
                times[name].append(elapsed)
    for engine in engines.values():
        engine.close()
    return times


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", action="append", help="of the bodies; may be repeated (default: resnet10_slim)")
    parser.add_argument("-N", "--num-nets", type=int, default=4)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--rounds", type=int, default=30, help="at batch 1 and 8; a third of it at batch 64")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    archs = options.arch or ["resnet10_slim"]
    figures = []
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            write_bundles(Path(folder), arch, options.num_nets)
            for batch in BATCHES:
                rounds = options.rounds if batch < BATCHES[-1] else max(3, options.rounds // 3)
                times = measure(Path(folder), options.threads, options.device, batch, rounds)
                print(f"{arch}, N = {options.num_nets}, batch {batch}, {options.threads} threads, {options.device}")
                base = times[BASE]
                for name, values in times.items():
                    ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
                    median = statistics.median(values)
                    print(f"  {name:9} {median:9.2f} ms   {ratio:6.2f} of {BASE}")
                    if name != BASE:
                        note = (
                            f"{arch}, N = {options.num_nets}, {options.threads} threads, {options.device}; median of "
                            f"{rounds} rounds, {median:.2f} ms against {statistics.median(base):.2f} ms"
                        )
                        figure = f"engine_{options.device}_{arch}_{name}_vs_torch_{BASE}_b{batch}"
                        figures.append(results.figure(figure, round(ratio, 3), "ratio", note=note))
    if not options.no_record:
        listed = " ".join(f"--arch {arch}" for arch in archs)
        command = f"python benchmarks/engines.py {listed} -N {options.num_nets} --threads {options.threads}"
        results.record("engines", figures, command=f"{command} --device {options.device}", seed=0)


if __name__ == "__main__":
    main()
