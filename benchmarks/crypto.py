"""What crypto-clear inference costs and whether it answers as the net does, on held-out images over loopback.

    python benchmarks/crypto.py RUN --boundary 4 --boundary 5 --boundary 12 [--images 100]

RUN is a net without a defence (``ensembler train --defense none``). For each boundary, as ``ensembler boundary``
numbers them: an export without noise, a real server and a real client with CURVE between them, on the same cores.
The figures are of the first boundary; the others get ``--few`` images and a line of the table in
``docs/results/crypto.md``. Needs the extra [crypto] beside [export].
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import product
import results
import torch

from ensembler import EdgeClient
from ensembler.cli.demo import server_process
from ensembler.privacy.boundary_study import plain_net
from ensembler.training import data as data_sets
from ensembler.training.models import normalise
from ensembler.training.runs import RunFolder

LONG_MS = 600_000


def measured(run: RunFolder, boundary: float, images: np.ndarray, folder: Path) -> dict[str, Any]:
    """Exports at a boundary, serves, predicts ``(M, H, W, 3)`` images, and compares with the whole net in torch."""
    out = folder / f"at_{boundary:g}"
    options = ["--protocol", "c2pi", "--boundary", f"{boundary:g}", "--noise", "0"]
    product.checked("export", str(run.path), "--out", str(out), *options)
    with server_process(out / "server") as endpoint, EdgeClient(out / "client", endpoint, timeout_ms=LONG_MS) as edge:
        shape = edge.info().feature_shape
        answers = [edge.predict(image) for image in images]
    with torch.inference_mode():
        expected = plain_net(run).module(normalise(torch.from_numpy(images.transpose(0, 3, 1, 2)))).numpy()
    found = np.stack([answer.logits for answer in answers])
    # The first one sets the oblivious transfers up.
    costs = [answer.crypto for answer in answers[1:] if answer.crypto is not None]
    first = answers[0].crypto
    assert first is not None
    return {
        "boundary": boundary,
        "shape": "x".join(map(str, shape)),
        "images": len(images),
        "agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
        "error": float(np.abs(found - expected).max()),
        "seconds": statistics.median(answer.timings.total for answer in answers[1:]) / 1000,
        "first_seconds": answers[0].timings.total / 1000,
        "megabytes": statistics.median(c.crypto_bytes_up + c.crypto_bytes_down for c in costs) / 1e6,
        "first_megabytes": (first.setup_bytes + first.crypto_bytes_up + first.crypto_bytes_down) / 1e6,
        "cpu_s": statistics.median(cost.cpu_s for cost in costs),
        "peak_mb": max(cost.peak_mb for cost in costs),
    }


def main() -> None:
    """Measures, records and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--boundary", type=float, action="append", required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--few", type=int, default=5, help="images at every boundary but the first (default: 5)")
    options = parser.parse_args()
    run = RunFolder.open(options.run)
    images = np.ascontiguousarray(data_sets.load(run.config.data).test_x[: options.images].transpose(0, 2, 3, 1))
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for place, boundary in enumerate(options.boundary):
            rows.append(measured(run, boundary, images if place == 0 else images[: options.few], Path(folder)))
            print(rows[-1])
    at = rows[0]
    named = f"{run.config.arch}, layers up to {at['boundary']:g} ({at['shape']}), {at['images']} held-out images"
    later = f"median without the first; {named}"
    values = {
        "c2pi_argmax_agreement": (at["agreement"], "of 1", ">= 0.99", f"no noise; {named}"),
        "c2pi_max_logit_error": (round(at["error"], 6), "", "", f"no noise; {named}"),
        "small_net_seconds_loopback": (round(at["seconds"], 3), "s", "", later),
        "small_net_megabytes": (round(at["megabytes"], 3), "MB", "", f"both ways; {later}"),
        "small_net_setup_megabytes": (round(at["first_megabytes"] - at["megabytes"], 3), "MB", "", f"once; {named}"),
        "small_net_client_cpu_s": (round(at["cpu_s"], 3), "s", "", f"the device; {later}"),
        "small_net_client_peak_mb": (round(at["peak_mb"], 1), "MiB", "", f"the device; {named}"),
    }
    results.record(
        "crypto",
        [results.figure(name, *facts) for name, facts in values.items()],
        command=f"python benchmarks/crypto.py RUN --boundary {' --boundary '.join(f'{b:g}' for b in options.boundary)}",
        seed=run.config.seed,
    )
    lines = [
        f"# Crypto-clear inference of {run.config.arch}",
        "",
        "Written by `benchmarks/crypto.py`; both parties on the same cores, over loopback, without noise.",
        "",
        "| layers up to | what is revealed | images | same class | logit error | s an image | s the first | "
        "MB an image | MB the first | device CPU s | device MiB |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = [
            f"{row['boundary']:g}",
            row["shape"],
            str(row["images"]),
            f"{100 * row['agreement']:.0f}%",
            f"{row['error']:.5f}",
            f"{row['seconds']:.2f}",
            f"{row['first_seconds']:.1f}",
            f"{row['megabytes']:.2f}",
            f"{row['first_megabytes']:.1f}",
            f"{row['cpu_s']:.2f}",
            f"{row['peak_mb']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    (results.RESULTS / "crypto.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
