"""What few bits cost at the paper's cut: ResNet-18 of full width, 64x16x16 features, 512 answers; into speed.json.

    python benchmarks/paper_cut.py --data cifar10:PATH [--only UP,DOWN] [--epochs 6]

Clients of one stage 1 with the paper's noise, each trained through its own codes in stage 3, exported, served, and
asked for the whole test set. The reference is the client of 8-bit codes, in float, image by image. There is one net
(N = 1), so that no other answer makes up for a coarse one. Runs that are there are used.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import results
from product import exported, right_in_torch, served, trained

from ensembler.training import data as data_sets
from ensembler.training.runs import RunFolder

SETTING = ("--arch", "resnet18", "-N", "1", "-P", "1")
# Bits of a feature and of an answer; the first are the reference's, and stage 1's.
CODES = ((8, 8), (2, 8), (8, 4), (2, 4))
# A client that misses one is part of the result.
GATES = ("--max-accuracy-drop", "100", "--plaintext")


def main() -> None:
    """Trains what is missing, measures and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="cifar10:PATH, or an npz pair of the same images")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper_cut"))
    parser.add_argument("--out", type=Path, default=Path("out/paper_cut"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--precision", default="auto", help="as in ensembler train")
    parser.add_argument("--only", metavar="UP,DOWN", help="train the client of these codes, and record nothing")
    options = parser.parse_args()
    common = ("--data", options.data, *SETTING, "--epochs", str(options.epochs), "--precision", options.precision)
    runs = {codes: options.runs / f"bits_{codes[0]}_{codes[1]}" for codes in CODES}
    base = trained(runs[CODES[0]], *common)
    for (up, down), run in runs.items():
        if options.only in (None, f"{up},{down}"):
            trained(run, *common, "--stage1", str(base), "--wire-bits", str(up), "--answer-bits", str(down))
    if options.only:
        return
    data = data_sets.load(options.data)
    reference = right_in_torch(RunFolder.open(base), data, through_wire=False)
    figures = []
    for (up, down), run in runs.items():
        out = exported(run, options.out / run.name, options.data, *GATES)
        right = served(out, data).right
        lost = 100 * (reference.astype(float) - right)
        wire = RunFolder.open(run).read_wire().spec
        epochs, error = f"{options.epochs} + {options.epochs} epochs", lost.std() / np.sqrt(len(lost))
        note = (
            f"CIFAR-10, {len(right)} test images, {' '.join(SETTING)}, {epochs}, features {wire.feature_shape} in {up} "
            f"bits: {wire.bytes_up} bytes, answers of {wire.answer_width} in {down} bits; served "
            f"{100 * right.mean():.2f}%, the reference in float {100 * reference.mean():.2f}%; standard error "
            f"of the difference {error:.2f}"
        )
        name = "accuracy_drop_points" if (up, down) == (2, 8) else f"accuracy_drop_{up}_{down}_points"
        goal = {(2, 8): "<= 0.5", (8, 4): "<= 0.2"}.get((up, down), "")
        figures.append(results.figure(name, round(float(lost.mean()), 4), "points", goal, note))
    command = shlex.join(["python", "benchmarks/paper_cut.py", *sys.argv[1:]])
    results.record("speed", figures, command=command, seed=RunFolder.open(base).config.seed)


if __name__ == "__main__":
    main()
