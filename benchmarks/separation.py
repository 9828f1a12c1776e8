"""Whether it helps a head to be unlike the earlier ones, by cosine or after the best linear map; into privacy.json.

    python benchmarks/separation.py [--data demo] [--epochs 6] [--seeds 1] [--budget standard]

Clients of one stage 1 (``obfuscate``: one layer, fixed noise, N = 4, P = 2), each with another term in place of that of
Eq. 3, exported, and read by a server alone that matches distributions, by one that trains a head of the client's
architecture through its own nets, and by the oracle. Attacks that failed their own check are named. Runs and reports
that are there are used.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import results
from product import audited, exported_once, trained

from ensembler.privacy.card import FLOOR, ORACLE
from ensembler.training.runs import RunFolder

TERMS = (("cosine", "0"), ("cosine", "0.1"), ("cosine", "1"), ("linear", "0.1"), ("linear", "1"))
ATTACKS = ("distribution-matching", "shadow-informed")
GATES = ("--plaintext", "--max-accuracy-drop", "2")


def main() -> None:
    """Trains, attacks and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="demo")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1, help="of the attacks")
    parser.add_argument("--budget", default="standard", help="as in ensembler audit")
    parser.add_argument("--precision", default="auto", help="as in ensembler train")
    parser.add_argument("--runs", type=Path, default=Path("runs/separation"))
    parser.add_argument("--out", type=Path, default=Path("out/separation"))
    options = parser.parse_args()
    common = ("--data", options.data, "--arch", "resnet10_slim", "--preset", "obfuscate", "-N", "4", "-P", "2")
    common += ("--epochs", str(options.epochs), "--precision", options.precision)
    figures: list[dict[str, Any]] = []
    base: Path | None = None
    for kind, weight in TERMS:
        name = f"{kind}_{weight}"
        given = () if base is None else ("--stage1", str(base))
        run = trained(options.runs / name, *common, "--reg-kind", kind, "--reg-weight", weight, *given)
        base = base or run
        out, report = options.out / name, options.out / f"{name}.html"
        exported_once(run, out, options.data, *GATES)
        document = audited(run, out / "client", report, budget=options.budget, attacks=ATTACKS, seeds=options.seeds)
        rows = {row["name"]: row for row in document["attacks"]}
        doubted = sorted({gate["about"] for gate in document["gates"] if not gate["passed"]} & set(ATTACKS))
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        seen = {attack: rows[attack]["ssim"]["mean"] for attack in (*ATTACKS, ORACLE, FLOOR)}
        said = ", ".join(f"{attack} {ssim:.3f}" for attack, ssim in seen.items())
        likeness = ", ".join(f"{each} {summary[f'max_{each}']:.3f}" for each in ("cosine", "linear"))
        figures += [
            results.figure(
                f"separation_{name}_worst_query_free_ssim",
                round(max(seen[attack] for attack in ATTACKS), 4),
                "ssim",
                "",
                f"{options.data}, {options.budget} budget, Eq. 3 with {kind} and lambda {weight}: {said}; likeness to "
                f"the likest stage-1 head: {likeness}; accuracy {summary['accuracy_wire']:.2f}%; failed their own "
                f"check: {', '.join(doubted) or 'none'}",
            ),
            results.figure(
                f"separation_{name}_oracle_ssim", round(seen[ORACLE], 4), "ssim", "", "the oracle of the same audit"
            ),
        ]
    seed = RunFolder.open(options.runs / "cosine_0").config.seed
    results.record(
        "privacy", figures, command=shlex.join(["python", "benchmarks/separation.py", *sys.argv[1:]]), seed=seed
    )


if __name__ == "__main__":
    main()
