"""What few bits cost at the paper's cut in full width, 64x16x16 features and 512 answers; into speed.json.

    python benchmarks/paper_cut.py --data cifar10:PATH [--arch benchmarks.nets:resnet10_ends] [--epochs 5]

An undefended net in float32, and a client whose features are 2-bit codes from the first step of its training on, 4,096
bytes of an image, taught by the undefended net and with the paper's noise. The client is exported with answers of 4
bits, served with its int8 body, and asked for the whole test set; it is compared with the undefended net image by
image. There is one net (N = 1), so that no other answer makes up for a coarse one. Runs that are there are used.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import results
from product import exported, right_in_torch, served, trained

from ensembler.training import data as data_sets
from ensembler.training.runs import RunFolder

UP, DOWN = 2, 4  # bits of a feature and of an answer
TERSE = ("--defense", "single", "--noise-std", "0.1", "--bottleneck", f"64,1,{UP}", "--answer-bits", str(DOWN))
# A client that misses one is part of the result.
GATES = ("--server-precision", "int8", "--min-sqnr-db", "0", "--max-accuracy-drop", "100")


def main() -> None:
    """Trains what is missing, measures and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="cifar10:PATH, or an npz pair of the same images")
    parser.add_argument("--arch", default="resnet18", help="of 64 channels after its stem, cut there")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper_cut"))
    parser.add_argument("--out", type=Path, default=Path("out/paper_cut"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--precision", default="auto", help="as in ensembler train")
    options = parser.parse_args()
    common = ("--data", options.data, "--arch", options.arch, "--head-end", "stem")
    common += ("--epochs-stage1", str(options.epochs), "--precision", options.precision)
    plain = RunFolder.open(trained(options.runs / "plain", *common, "--defense", "none"))
    coded = RunFolder.open(trained(options.runs / "coded", *common, *TERSE, "--teacher", str(plain.path)))
    data = data_sets.load(options.data)
    in_float, coded_in_float = (right_in_torch(run, data, through_wire=False) for run in (plain, coded))
    right = served(exported(coded.path, options.out, options.data, *GATES), data).right
    wire = coded.read_wire().spec
    words = (
        f"CIFAR-10, {len(right)} test images, {options.arch}, one net, {options.epochs} epochs, one seed; features "
        f"{wire.feature_shape} in {UP} bits: {wire.bytes_up} bytes, answers of {wire.answer_width} in {DOWN} bits"
    )
    figures = [
        _lost("accuracy_drop_points", in_float, right, "<= 0.5", f"{words}; the undefended net in float32, and served"),
        _lost(
            "accuracy_drop_answers_points",
            coded_in_float,
            right,
            "<= 0.2",
            f"{words}; the same client in torch with answers in float, and served with an int8 body",
        ),
    ]
    command = shlex.join(["python", "benchmarks/paper_cut.py", *sys.argv[1:]])
    results.record("speed", figures, command=command, seed=coded.config.seed)


def _lost(
    name: str, reference: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_], goal: str, words: str
) -> dict[str, object]:
    """Returns the figure of what is lost, image by image."""
    lost = 100 * (reference.astype(float) - right)
    error = lost.std() / np.sqrt(len(lost))
    percents = f"{100 * reference.mean():.2f}% and {100 * right.mean():.2f}%, standard error {error:.2f}"
    return results.figure(name, round(float(lost.mean()), 4), "points", goal, f"{words}: {percents}")


if __name__ == "__main__":
    main()
