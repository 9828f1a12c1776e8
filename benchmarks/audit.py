"""What a server reads of an exported device: the audit's figures over several victims.

    python benchmarks/audit.py VICTIM... [--attack NAME]... [--prefix bottleneck_]

A victim is ``RUN=CLIENT_BUNDLE``. Each is attacked with what the quick budget has, or with the attacks that are asked
for, the floor and the oracle, all with that budget's effort; its report is kept in ``out/audit/`` and not made again.
Figures are means over the victims' means, with each of them in the note; a figure stands only where its attack ran.
``make privacy`` makes the recorded ones.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import results
from product import audited

from ensembler.privacy.audit import MISALIGNED, NEGATIVE
from ensembler.privacy.card import FLOOR

FIGURES = {  # attack, what of it, figure, unit, goal
    "floor_ssim": ("mean-image", "ssim", "ssim", ""),
    "misaligned_ssim": ("misaligned-decoder", "ssim", "ssim", ""),
    "oracle_ssim": ("oracle-decoder", "ssim", "ssim", ""),
    "oracle_psnr_db": ("oracle-decoder", "psnr_db", "dB", ""),
    "oracle_found_again": ("oracle-decoder", "reidentified", "of 1", ""),
    "paper_shadow_best_ssim": ("shadow-single", "ssim", "ssim", ""),
    "shadow_calibrated_ssim": ("shadow-calibrated", "ssim", "ssim", ""),
    "paper_adaptive_ssim": ("shadow-adaptive", "ssim", "ssim", ""),
    "shadow_subsets_ssim": ("shadow-subsets", "ssim", "ssim", ""),
    "dm_ssim": ("distribution-matching", "ssim", "ssim", ">= oracle_ssim - 0.05"),
    "dm_psnr_db": ("distribution-matching", "psnr_db", "dB", ""),
    "known_plaintext_100_psnr_db": ("known-pairs-100", "psnr_db", "dB", ""),
    "known_plaintext_100_found_again": ("known-pairs-100", "reidentified", "of 1", ""),
    "floor_psnr_db": ("mean-image", "psnr_db", "dB", ""),
    "floor_found_again": ("mean-image", "reidentified", "of 1", ""),
    "misaligned_psnr_db": ("misaligned-decoder", "psnr_db", "dB", ""),
    "misaligned_found_again": ("misaligned-decoder", "reidentified", "of 1", ""),
    "dm_found_again": ("distribution-matching", "reidentified", "of 1", ""),
    "dm_64_ssim": ("distribution-matching-64", "ssim", "ssim", ""),
    "dm_blind_ssim": ("distribution-matching-blind", "ssim", "ssim", ""),
    "dm_critic_ssim": ("distribution-matching-critic", "ssim", "ssim", ""),
    "generative_prior_ssim": ("generative-prior", "ssim", "ssim", ""),
    "other_device_ssim": ("other-device", "ssim", "ssim", ""),
    "known_plaintext_10_ssim": ("known-pairs-10", "ssim", "ssim", ""),
    "known_plaintext_100_ssim": ("known-pairs-100", "ssim", "ssim", ""),
    "known_plaintext_1000_ssim": ("known-pairs-1000", "ssim", "ssim", ""),
    "mla_ssim": ("mla", "ssim", "ssim", ""),
    "mla_prior_ssim": ("mla-prior", "ssim", "ssim", ""),
}


def attacked(victim: str, attacks: list[str], other_device: Path | None, folder: Path) -> dict[str, Any]:
    """Returns the audit's document of one victim, made now unless it is there."""
    run, bundle = (Path(part) for part in victim.split("=", 1))
    return audited(
        run,
        bundle,
        folder / f"{'-'.join([run.name, *attacks])}.html",
        command=f"benchmarks/audit.py {victim}",
        budget="quick",
        attacks=attacks or None,
        other_device=other_device,
    )


def figures_of(documents: list[dict[str, Any]], asked: list[str], prefix: str) -> list[dict[str, Any]]:
    """Returns the figures over all victims: of the attacks that were asked for, or of all."""
    figures = []
    for name, (attack, measure, unit, goal) in FIGURES.items():
        if asked and attack not in asked:
            continue
        found = [row for document in documents for row in document["attacks"] if row["name"] == attack]
        if not found:
            continue
        means = [row[measure]["mean"] for row in found]
        note = f"{len(means)} victims, each mean over {documents[0]['images']['evaluated']} images: " + ", ".join(
            f"{mean:.3f}" for mean in means
        )
        negatives = sum(row["ssim"]["mean"] < NEGATIVE for row in found)
        if negatives and attack not in (FLOOR, MISALIGNED):
            note += f"; of {negatives} it shows negatives, so that the low value proves nothing"
        figures.append(results.figure(prefix + name, round(sum(means) / len(means), 4), unit, goal, note))
    if asked:
        return figures
    matched = [_matched(document) for document in documents]
    note = f"of {len(matched)} victims; the matched head has the statistics of what arrives, which the attacker sees"
    figures.append(results.figure(f"{prefix}dm_passed_its_check", sum(matched), "victims", "", note))
    ranked = [document["selector"]["batch norm"] for document in documents if document["selector"]]
    if ranked:
        each = ", ".join(f"{way['auc']:.2f}" for way in ranked)
        mean = round(sum(way["auc"] for way in ranked) / len(ranked), 3)
        note = f"ranking by batch norm; {len(ranked)} victims: {each}; 0.5 is chance"
        figures.append(results.figure(f"{prefix}selector_recovery_auc", mean, "AUC", "", note))
        right = sum(way["first"] for way in ranked)
        note = f"of {len(ranked)} victims; the net ranked first is one of the P selected; chance is P/N"
        figures.append(results.figure(f"{prefix}selector_first_guess_right", right, "victims", "", note))
    subjects = ", ".join(sorted({Path(document["subject"]["run"]).name for document in documents}))
    figures.append(
        results.figure(f"{prefix}victim_seeds", len(documents), "clients", ">= 3" if not prefix else "", subjects)
    )
    return figures


def _matched(document: dict[str, Any]) -> bool:
    return all(gate["passed"] for gate in document["gates"] if gate["about"] == "distribution-matching")


def main() -> None:
    """Audits and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("victims", nargs="+", metavar="RUN=BUNDLE")
    parser.add_argument("--attack", action="append", default=[])
    parser.add_argument("--other-device", type=Path, metavar="BUNDLE", help="see ensembler audit")
    parser.add_argument("--prefix", default="", help="of the figures' names")
    options = parser.parse_args()
    folder = Path("out/audit")
    folder.mkdir(parents=True, exist_ok=True)
    documents = [attacked(victim, options.attack, options.other_device, folder) for victim in options.victims]
    asked = [part for attack in options.attack for part in ("--attack", attack)]
    if options.other_device:
        asked += ["--other-device", str(options.other_device)]
    prefix = ["--prefix", options.prefix] if options.prefix else []
    command = shlex.join(["python", "benchmarks/audit.py", *options.victims, *asked, *prefix])
    results.record("audit", figures_of(documents, options.attack, options.prefix), command=command, seed=0)


if __name__ == "__main__":
    main()
