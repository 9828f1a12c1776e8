"""The two formats of one client on this machine: SQNR, what runtimes differ by, memory.

    .venv-tflite/bin/python benchmarks/edge.py RUN SERVER_BUNDLE --data SPEC --legacy .venv-legacy/bin/python

Needs the extra ``tflite``. ``--legacy`` is an interpreter with tflite-runtime, which goes with NumPy 1 alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import results
from product import exported

from ensembler.edge_runtime import probe
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.training import data as data_sets

IMAGES = 1000
# What the other interpreter runs: the same images and answers through the same files.
REMOTE = """
import sys
import numpy as np
from pathlib import Path
from ensembler.edge_runtime.runtime import EdgeRuntime
runtime = EdgeRuntime(Path(sys.argv[1]), backend="tflite-runtime")
given = np.load(sys.argv[2])
np.savez(sys.argv[3], codes=runtime.encode(given["images"]), logits=runtime.finish(given["answers"]))
"""


def main() -> None:
    """Exports, compares and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path)
    parser.add_argument("server_bundle", type=Path)
    parser.add_argument("--data", required=True, help="as for ensembler train")
    parser.add_argument("--legacy", help="an interpreter with tflite-runtime")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        formats = ("--format", "onnx", "--format", "tflite", "--plaintext")
        out = exported(
            options.run, folder / "out", options.data, *formats, "--server-bundle", str(options.server_bundle)
        )
        report = json.loads((out / "parity.json").read_text(encoding="utf-8"))
        rows = {row["runtime"]: row for row in report["runtimes"]}
        default = next(row["format"] for row in report["runtimes"] if row["default"])
        figures = []
        for backend, name, goal in (("ai-edge-litert", "tflite", ">= 35"), ("onnxruntime", "onnx", "")):
            row = rows[backend]
            note = f"{backend} {row['version']}, {report['images']} held-out images; the bundle's default is {default}"
            for part in ("head", "tail"):
                value = round(row[f"{part}_sqnr_db"], 1)
                figures.append(results.figure(f"{name}_{part}_sqnr_db", value, "dB", goal, note))
        if options.legacy:
            figures.append(_apart(out / "client", options.data, options.legacy, folder))
    for backend, name in (("onnxruntime", "onnxruntime"), ("ai-edge-litert", "litert")):
        seen = probe.run(backend)
        if seen.failure:
            raise SystemExit(f"{backend}: {seen.failure}")
        note = f"{backend} {seen.version}: numpy, this package and one tiny int8 inference; no sockets"
        figures.append(results.figure(f"{name}_rss_mb", seen.rss_mb, "MB", "", note))
        note = f"{backend} {seen.version}: its import, and the probe's model opened and run once, in a new process"
        figures.append(results.figure(f"{name}_import_to_answer_s", seen.seconds, "s", "", note))
    given = ["--data", options.data, *(["--legacy", options.legacy] if options.legacy else [])]
    command = shlex.join(["python", "benchmarks/edge.py", str(options.run), str(options.server_bundle), *given])
    results.record("edge", figures, command=command, seed=0)


def _apart(client: Path, data: str, legacy: str, folder: Path) -> dict[str, object]:
    """Returns by how many steps tflite-runtime differs from ai-edge-litert on the same files."""
    runtime = EdgeRuntime(client, backend="ai-edge-litert")
    wire = runtime.manifest.wire
    images = np.ascontiguousarray(data_sets.load(data).test_x[:IMAGES].transpose(0, 2, 3, 1))
    generator = np.random.Generator(np.random.PCG64(0))
    shape = (IMAGES, wire.num_nets, wire.answer_width)
    answers = generator.integers(0, 2**wire.answer_bits, shape, dtype=np.uint8)
    np.savez(folder / "given.npz", images=images, answers=answers)
    command = [legacy, "-c", REMOTE, str(client), str(folder / "given.npz"), str(folder / "found.npz")]
    subprocess.run(command, check=True)
    codes, logits = runtime.encode(images), runtime.finish(answers)
    with np.load(folder / "found.npz") as found:
        difference = np.abs(codes.astype(int) - found["codes"])
        step = np.diff(np.unique(logits)).min()
        of_tail = round(float(np.abs(logits - found["logits"]).max() / step))
    note = (
        f"ai-edge-litert against tflite-runtime, the same files, {IMAGES} images: head {difference.max()}, in "
        f"{100 * (difference > 0).mean():.3f}% of the codes; tail {of_tail}"
    )
    return results.figure("max_lsb_between_runtimes", max(int(difference.max()), of_tail), "steps", "<= 1", note)


if __name__ == "__main__":
    main()
