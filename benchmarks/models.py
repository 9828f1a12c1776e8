"""Every architecture, and two nets of our own, at several cuts: trained briefly, exported in int8, compared with torch.

    python benchmarks/models.py [--out FOLDER]

Half an hour; cases that are in the folder already are not run again. Writes docs/results/models.md and the figure
``byo_models_exported``. Accuracy is not the point: the nets see 768 of the demo's images four times. The point is that
the parts are cut, exported and compute what torch computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import results

from ensembler.privacy.parts import write_whole
from ensembler.protocol.text import aligned

# One net: what is looked at is the cut. Enough steps at a low rate for batch norm to settle; where its statistics had
# not (12 steps at 0.1), heads put out values far beyond the wire's range, and int8 and torch saturated apart.
TRAINING = "--data demo -N 1 -P 1 --epochs 4 --train-limit 768 --batch-size 64 --learning-rate 0.02"
# A stage passes with the export's own gate: 35 dB, or what a wire of few bits keeps by itself.
EXPORTING = "--server-precision int8 --min-sqnr-db 0 --max-accuracy-drop 100 --plaintext --parity-images 600"
MIN_SQNR_DB = 35.0
OUT = results.RESULTS / "models.md"


@dataclass(frozen=True)
class Case:
    """One net, cut somewhere."""

    arch: str
    head_end: str
    more: str = ""


CASES = (
    Case("examples.own_net:sequential", "2"),
    Case("examples.own_net:sequential", "6", "--wire-bits 4 --answer-bits 4"),
    Case("examples.own_net:gated", "stem"),
    Case("examples.own_net:gated", "add"),
    Case("resnet10_slim", "stem"),
    Case("resnet10_slim", "layer2"),
    Case("resnet10_slim", "layer2", "--bottleneck 8,2,2"),
    Case("alexnet", "relu1"),
    Case("vit_small", "add"),
    Case("vit_small", "blocks.1"),
    Case("vgg16", "pool2"),
    Case("vgg19", "relu4"),
    Case("mobilenet_v2", "block3"),
    Case("resnet18", "stem"),
    Case("resnet18", "layer2"),
    Case("resnet34", "layer1"),
)


def main() -> None:
    """Runs all cases; records and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("out/models"))
    options = parser.parse_args()
    rows = [
        ("architecture", "head end", "options", "features", "bytes up", "head share", "head", "bodies", "tail", "top-1")
    ]
    failed = set()
    options.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        name = "_".join((case.arch, case.head_end, *case.more.split())).translate(str.maketrans(":.,-", "____"))
        kept = options.out / f"{name}.json"
        if not kept.is_file():
            row, good = _measured(case)
            write_whole(kept, json.dumps({"row": row, "good": good}) + "\n")
        found = json.loads(kept.read_text(encoding="utf-8"))
        rows.append(tuple(found["row"]))
        print("  ".join(found["row"]), flush=True)
        if not found["good"]:
            failed.add(case.arch)
    lines = aligned(rows, left=3)
    OUT.write_text(
        "# Models, cuts and parity\n\n"
        "Made by `python benchmarks/models.py`. Columns head, bodies, tail: SQNR in dB of the int8 artifact against\n"
        "torch through the same quantised wire, on held-out images (bodies: all nets together, on stage-1 features;\n"
        "`inf` is bit-identical). top-1: same answer as torch through the wire, in percent of 600 images. An `f`\n"
        "after a number: int8 misses the export's gate there. Bodies are then served in float32 by default\n"
        "(`--server-precision auto`); for a head the export says so, and `--quantize none` is the way. One net each,\n"
        f"4 epochs of 768 demo images; {results.machine()}.\n\n"
        "```\n" + "\n".join(lines) + "\n```\n",
        encoding="utf-8",
    )
    print("\n".join(lines))
    results.record(
        "core",
        [
            results.figure(
                "byo_models_exported",
                len({case.arch for case in CASES} - failed),
                "models",
                ">= 5",
                f"of {len({case.arch for case in CASES})} architectures, two of them own nets: those that export with "
                "the default options at every cut tried, head and tail in int8 within the gates, bodies in int8 or "
                "float32 (auto); the others need --quantize none at a cut; docs/results/models.md",
            )
        ],
        command="python benchmarks/models.py",
        seed=0,
    )


def _measured(case: Case) -> tuple[tuple[str, ...], bool]:
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "out"
        cut = ["--arch", case.arch, "--head-end", case.head_end, *case.more.split()]
        _ensembler("train", *TRAINING.split(), *cut, "--out", str(run))
        _ensembler("export", str(run), "--out", str(out), *EXPORTING.split())
        report = json.loads((out / "parity.json").read_text(encoding="utf-8"))
        wire = json.loads((out / "client" / "manifest.json").read_text(encoding="utf-8"))["wire"]
    (listed,) = [
        found
        for found in json.loads(_ensembler("cuts", case.arch, "--num-classes", "6"))["cuts"]
        if case.head_end in found["names"]
    ]
    stages = {stage["stage"]: stage for stage in report["stages"]}
    good = {}
    shown = []
    for name in ("head", "bodies", "tail"):
        stage = stages[name]
        sqnr = float("inf") if stage["sqnr_db"] is None else stage["sqnr_db"]
        wire_sqnr = float("inf") if stage["wire_sqnr_db"] is None else stage["wire_sqnr_db"]
        good[name] = sqnr >= min(MIN_SQNR_DB, wire_sqnr)
        shown.append(f"{sqnr:.1f}{'' if good[name] else ' f'}")
    bits = int(wire["feature_codec"]["codec"][1:])
    values = 1
    for axis in wire["feature_shape"]:
        values *= axis
    row = (
        *(case.arch, case.head_end, case.more.replace("--", "")),
        "x".join(map(str, wire["feature_shape"])),
        str(-(-values * bits // 8)),
        f"{100 * listed['head_share']:.0f}%",
        *shown,
        f"{report['top1_agreement']:.1f}",
    )
    return row, good["head"] and good["tail"]


def _ensembler(verb: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "ensembler.cli", verb, *arguments, "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
