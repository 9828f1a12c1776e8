"""What int8 nets gain on this processor, with sums that saturate, exact ones, and weights of 7 bits; into speed.json.

    python benchmarks/integers.py [--rounds 15]

One body of the paper's ResNet-18, on one thread, called with 16 images in turn: in float32, in int8 as onnxruntime
computes it unless told otherwise, in int8 as the product does (``protocol.integers``), and so with weights of 7 bits
(``ensembler-export --server-weight-bits 7``). On processors with VNNI, and on ARM, the three in int8 are alike.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

import numpy as np
import onnxruntime as ort
import results
import torch

from ensembler.export import graphs
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.integers import sum_exactly
from ensembler.training.models import ArchSpec, build_net

ROWS = 16


def session(model: bytes, *, exact: bool) -> ort.InferenceSession:
    """Opens a graph on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        sum_exactly(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    body = build_net(ArchSpec(name="resnet18", image_size=(32, 32), num_classes=10)).body.eval()
    graph = graphs.optimised(graphs.from_torch(body, [torch.zeros(2, 64, 16, 16)]))
    rng = np.random.Generator(np.random.PCG64(0))
    x = rng.random((ROWS, 64, 16, 16), np.float32)
    codec = AffineCodec.from_range(0.0, 1.0)
    whole, narrow = (
        graphs.quantised(graph, {graphs.INPUT: x}, input_codec=codec, weight_bits=bits).SerializeToString()
        for bits in (8, 7)
    )
    sessions = {
        "float32": session(graph.SerializeToString(), exact=False),
        "saturating": session(whole, exact=False),
        "exact": session(whole, exact=True),
        "exact, 7 bits": session(narrow, exact=True),
    }
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(options.rounds):
        for name, each in sessions.items():
            began = time.perf_counter()
            each.run(None, {graphs.INPUT: x})
            times[name].append(1000 * (time.perf_counter() - began))
    ms = {name: float(np.median(values)) for name, values in times.items()}
    answers = [sessions[name].run(None, {graphs.INPUT: x})[0] for name in ("exact", "saturating")]
    told = "alike" if np.array_equal(*answers) else "other answers"
    note = f"{ROWS} images through one body of ResNet-18, one thread, medians of {options.rounds}; ms: " + ", ".join(
        f"{name} {value:.1f}" for name, value in ms.items()
    )
    figures = [
        results.figure(f"int8_{name}_over_float32", round(ms[key] / ms["float32"], 4), "ratio", "", note)
        for name, key in (("saturating", "saturating"), ("exact", "exact"), ("exact_7_bits", "exact, 7 bits"))
    ]
    figures[0]["note"] += f"; against exact sums: {told}"
    results.record("speed", figures, command=shlex.join(["python", "benchmarks/integers.py", *sys.argv[1:]]), seed=0)


if __name__ == "__main__":
    main()
