"""Operators who are each sent other channels: what one of them reads, and what all do, into docs/results/privacy.json.

    python benchmarks/operators.py --data cifar10:PATH [--operators 2] [--epochs 8]

The slim net with ``--preset strong``, N = 4 and P = 2, once for operators who are each sent channels of their own and
once for one operator who is sent all. The oracle of the standard budget attacks what the first operator sees, what the
last one does, and what all of them do. What is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results
from product import audited, clearest_psnr_db, exported_once, trained

from ensembler.privacy.card import FLOOR, ORACLE
from ensembler.training.runs import RunFolder

GATES = ("--plaintext", "--max-accuracy-drop", "1")


def attacked(run: Path, bundle: Path, report: Path, coalition: Sequence[int] | None) -> dict[str, dict[str, Any]]:
    """Returns the oracle's row and the mean image's, by name."""
    given: dict[str, Any] = {"attacks": (), "auxiliary": "train", "seeds": 1, "coalition": coalition}
    document = audited(run, bundle, report, budget="standard", **given)
    return {row["name"]: row for row in document["attacks"]} | {"sent": document["sent"]}


def main() -> None:
    """Trains, attacks and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--operators", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--precision", default="auto", help="as in ensembler train")
    parser.add_argument("--runs", type=Path, default=Path("runs/operators"))
    parser.add_argument("--out", type=Path, default=Path("out/operators"))
    options = parser.parse_args()
    percent, rows = {}, {}
    for operators in (1, options.operators):
        name = f"by_{operators}"
        run = trained(
            options.runs / name,
            *("--data", options.data, "--arch", "resnet10_slim", "--preset", "strong", "-N", "4", "-P", "2"),
            *("--epochs", str(options.epochs), "--precision", options.precision, "--parties", str(operators)),
        )
        out = options.out / name
        exported_once(run, out, options.data, *GATES)
        percent[operators] = float(json.loads((out / "parity.json").read_text(encoding="utf-8"))["accuracy_artifact"])
        coalitions: dict[str, Sequence[int] | None] = {"together": None}
        if operators > 1:
            coalitions |= {"first": [0], "last": [operators - 1]}
        for who, coalition in coalitions.items():
            rows[name, who] = attacked(run, out / "client", out / f"{who}.html", coalition)

    def seen(figure: str, name: str, whos: Sequence[str], words: str) -> list[dict[str, Any]]:
        of = [rows[name, who] for who in whos]
        ssim = [one[ORACLE]["ssim"]["mean"] for one in of]
        psnr = [clearest_psnr_db(one[ORACLE]) for one in of]
        said = f"{words}; {', '.join(f'{value:.3f}' for value in ssim)}; mean image {of[0][FLOOR]['ssim']['mean']:.3f}"
        return [
            results.figure(f"{figure}_oracle_ssim", round(float(np.mean(ssim)), 4), "ssim", "", said),
            results.figure(f"{figure}_oracle_psnr_db", round(float(np.mean(psnr)), 2), "dB", "", words),
        ]

    divided = f"by_{options.operators}"
    drop = percent[1] - percent[options.operators]
    results.record(
        "privacy",
        [
            *seen("operators_one", "by_1", ["together"], "one operator who is sent all channels"),
            *seen("operators_alone", divided, ["first", "last"], f"one of {options.operators}, sent a part"),
            *seen("operators_together", divided, ["together"], f"all {options.operators} of them"),
            results.figure(
                "operators_accuracy_drop_points",
                round(drop, 2),
                "points",
                "",
                f"one operator {percent[1]:.2f}%, {options.operators} operators {percent[options.operators]:.2f}%",
            ),
        ],
        command=shlex.join(["python", "benchmarks/operators.py", *sys.argv[1:]]),
        seed=RunFolder.open(options.runs / divided).config.seed,
    )


if __name__ == "__main__":
    main()
