"""The frontier: one lever at a time, what the oracle reads and what it costs, in docs/results/frontier.json, .md, .svg.

    python benchmarks/frontier.py --data cifar10:PATH [--only NAME]... [--epochs 4] [--thorough] [--films]

Every cell is one net that is trained with the lever (``--defense single``, taught by the undefended net), exported with
8-bit head, and attacked by the oracle of the standard budget on the very images that trained it. Stages 2 and 3 and the
other attacks are left out: no attack on a client of N nets reads more than an oracle on such a head. A cell takes about
ten minutes of two cores, and what is there is not made again. ``--thorough`` attacks the clients of cells that are
there once more, with the thorough budget: more than half an hour each. ``--films`` attacks them with the quick budget
by one picture of a scene and by eight, of a hand-held camera and of one that stands still.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import results
from product import audited, clearest_psnr_db, exported_once, is_exported, trained

from ensembler.privacy.card import FLOOR, ORACLE
from ensembler.privacy.parts import write_whole
from ensembler.protocol.text import aligned
from ensembler.training.plots import blank_figure
from ensembler.training.presets import head_share
from ensembler.training.runs import RunFolder

ARCH = "resnet10_half"
# Of the oracle's decoders: 1 painted at once, 2 in steps, 3 is both, the better of which counts.
DECODER = 3
FORMER_STEPS = 1200  # at most, of cells that do not say so
# Gates of no cell: a head that misses one is part of the result.
GATES = ("--min-sqnr-db", "0", "--max-accuracy-drop", "100", "--plaintext")
ENCODED = ("--encoder", "40,80", "--bottleneck")
WIDER = ("--encoder", "64,128", "--bottleneck")  # twice the work on the device
# Of one scene, eight pictures; beside the oracle of the same audit, which has one.
FILMS = ("frames-8", "still-8")
# C2PI's, Section IV-C: uniform in plus or minus 0.1, so with this standard deviation.
UNIFORM = ("--noise", "uniform", "--noise-mode", "fresh", "--noise-std", "0.0577")
STRONG = (*ENCODED, "16,1,2", "--information-weight", "0.05")
LEVERS: dict[str, dict[str, tuple[str, ...]]] = {
    "depth": {f"after {part}": ("--head-end", part) for part in ("stem", "layer1", "layer2", "layer3")},
    "bits": {f"encoder, 16 channels, {bits} bits": (*ENCODED, f"16,1,{bits}") for bits in (8, 4, 2, 1)},
    "channels": {f"encoder, {count} channels, 2 bits": (*ENCODED, f"{count},1,2") for count in (4, 8, 32)},
    "wider encoder": {
        f"encoder 64,128, {count} channels, 2 bits, information 0.05": (
            *(*WIDER, f"{count},1,2"),
            *("--information-weight", "0.05"),
        )
        for count in (16, 32)
    },
    "encoder": {"no encoder, 16 channels, 2 bits": ("--bottleneck", "16,4,2")},
    "information": {
        f"16 channels, 2 bits, information {weight}": (*ENCODED, "16,1,2", "--information-weight", weight)
        for weight in ("0.05", "0.2", "0.5")
    },
    "the paper's baselines": {
        "after stem, Single": ("--noise-std", "0.1"),
        "after stem, Shredder": ("--noise", "learned", "--noise-std", "1", "--epochs-stage3", "4"),
    },
    "NoPeek": {
        "after stem, NoPeek 1": ("--nopeek-weight", "1"),
        "16 channels, 2 bits, NoPeek 1": (*ENCODED, "16,1,2", "--nopeek-weight", "1"),
    },
    "decoder in the loop": {
        "after stem, decoder 1": ("--decoder-weight", "1"),
        "16 channels, 2 bits, decoder 1": (*ENCODED, "16,1,2", "--decoder-weight", "1"),
    },
    "fresh noise": {
        **{f"after stem, noise {std}": ("--noise-mode", "fresh", "--noise-std", std) for std in ("0.5", "2")},
        "after layer3, C2PI": ("--head-end", "layer3", *UNIFORM),
        "16 channels, 2 bits, noise 0.5": (*ENCODED, "16,1,2", "--noise-mode", "fresh", "--noise-std", "0.5"),
        "information 0.05, noise 0.5": (*STRONG, "--noise-mode", "fresh", "--noise-std", "0.5"),
    },
}
CELLS = {name: (lever, options) for lever, cells in LEVERS.items() for name, options in cells.items()}
# Of points, by the head's share of the work, at most; their size is that of the bytes.
MARKERS = {0.1: "o", 0.25: "s", 0.5: "^", 1.0: "D"}
COLOURS = ("#3b6ea8", "#c2562d", "#4f8a4c", "#8a5aa0", "#b0892b", "#3f8f93", "#a34765", "#6b737c", "#222222", "#d18fb5")


def cell(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains, exports and attacks one cell."""
    began = time.monotonic()
    lever, given = CELLS[name]
    folder = folder_of(name)
    common = ("--data", options.data, "--arch", ARCH, "--epochs-stage1", str(options.epochs))
    common += ("--precision", options.precision)
    teacher = trained(options.runs / "undefended", *common, "--defense", "none")
    noise = () if "--noise-std" in given else ("--noise-std", "0")
    run = trained(options.runs / folder, *common, "--defense", "single", *noise, *given, "--teacher", str(teacher))
    out = exported_once(run, options.out / folder, options.data, *GATES)
    rows, document = attacked(name, options, "audit", "standard")
    opened = RunFolder.open(run)
    undefended = json.loads((teacher / "summary.json").read_text(encoding="utf-8"))["accuracy_wire"]
    accuracy = json.loads((out / "parity.json").read_text(encoding="utf-8"))["accuracy_artifact"]
    return {
        "lever": lever,
        "decoder": DECODER,
        "options": " ".join(given),
        "accuracy": round(accuracy, 2),
        "undefended": round(undefended, 2),
        **read_by_the_oracle(rows[ORACLE]),
        "floor_ssim": rows[FLOOR]["ssim"]["mean"],
        "bytes_up": document["sent"]["bytes"],
        "bytes_of_entropy_at_most": document["sent"]["bytes_of_entropy_at_most"],
        "head_macs_share": round(head_share(opened.arch), 4),
        "epochs": opened.config.epochs_stage1,
        "seed": opened.config.seed,
        **here_and_today(),
        "seconds": round(time.monotonic() - began),
    }


def thorough(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Attacks the client of a cell that is there with the thorough budget."""
    rows, _ = attacked(name, options, "thorough", "thorough")
    return {**read_by_the_oracle(rows[ORACLE]), **here_and_today()}


def films(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Attacks the client of a cell that is there by one picture of each scene and by several."""
    rows, _ = attacked(name, options, "films", "quick", FILMS)
    seen = {
        attack: {"ssim": rows[attack]["ssim"]["mean"], "psnr_db": clearest_psnr_db(rows[attack])}
        for attack in (ORACLE, *FILMS)
    }
    return {**seen, **here_and_today()}


AGAIN = {"thorough": thorough, "films": films}  # of a cell that is there, by its name in the cell


def forget(name: str, options: argparse.Namespace) -> None:
    """Removes a cell's reports, which were made with a former oracle; its client stays."""
    for report in ("audit", *AGAIN):
        (options.out / folder_of(name) / f"{report}.json").unlink(missing_ok=True)


def without_client(names: Sequence[str], cells: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Returns which cells are made, while what would be attacked once more is not here, with where that would be."""
    folders = {name: folder_of(name) for name in names if is_current(cells.get(name, {}))}
    places = {name: (options.runs / folder, options.out / folder) for name, folder in folders.items()}
    return [f"{name} ({run}, {out})" for name, (run, out) in places.items() if not is_exported(run, out)]


def attacked(
    name: str, options: argparse.Namespace, report: str, budget: str, attacks: Sequence[str] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns an audit of a cell's exported client: the rows by attack, and the document.

    The attackers, the oracle and ``attacks``, own the very images that trained the client.
    """
    folder = folder_of(name)
    out = options.out / folder
    document = audited(
        options.runs / folder,
        out / "client",
        out / f"{report}.html",
        budget=budget,
        attacks=attacks,
        auxiliary="train",
        seeds=1,
    )
    return {row["name"]: row for row in document["attacks"]}, document


def here_and_today() -> dict[str, str]:
    """Returns where and when a figure was measured."""
    return {"machine": results.machine(), "date": datetime.now(UTC).date().isoformat()}


def read_by_the_oracle(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what stands in a cell of the oracle's row."""
    (seen,) = row["seen"].values()
    return {
        "oracle_ssim": row["ssim"]["mean"],
        "oracle_psnr_db": clearest_psnr_db(row),
        "steps": seen["steps"],
        "steps_at_most": seen["steps_at_most"],
    }


def folder_of(name: str) -> str:
    """Returns the name of a cell's folders."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def there(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the cells that are made."""
    cells: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return cells


PAGE = """# The frontier

Made by `python benchmarks/frontier.py --data cifar10:PATH`, a cell a net, the least readable first; options,
machine and date of each are in [frontier.json](frontier.json). {arch}, one net, one seed.

- accuracy: of the exported client, in percent
- lost: points of it, against the undefended net that taught it, which had {undefended}%
- SSIM, dB: of the oracle's decoders, the larger; the mean image has an SSIM of {floor:.3f}
- steps: of the decoders' training, at most
- thorough: the same with the thorough budget, of the cells where that was tried
- 1, hand, still: SSIM with the quick budget, of the cells where that was tried: of one picture of each scene, of eight
  by a hand-held camera, and of eight by one that stands still
- bytes, entropy: of an image, and how many of them can say anything at most
- head: its share of the undefended net's multiply-accumulates
- *: by decoders of one kind alone (`decoder` 2: that paint in steps, else at once); the oracle of today has both, and
  may read more where the map that is sent is small

```
{table}
```
"""


def page(cells: dict[str, dict[str, Any]]) -> str:
    """Returns the table with what its columns mean."""
    floor = sum(one["floor_ssim"] for one in cells.values()) / len(cells)
    teachers = sorted({one["undefended"] for one in cells.values()})
    undefended = " or ".join(f"{accuracy:.2f}" for accuracy in teachers)
    return PAGE.format(arch=ARCH, floor=floor, undefended=undefended, table=table(cells))


def is_current(cell: dict[str, Any]) -> bool:
    """Returns whether the oracle of a cell was today's; earlier ones did not say which they were."""
    return bool(cell.get("decoder") == DECODER)


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Returns the cells for people, the least readable first."""
    title = ("lever", "cell", "accuracy", "lost", "SSIM", "dB", "steps")
    rows = [(*title, "thorough", "1, hand, still", "bytes", "entropy", "head")]
    for name, one in sorted(cells.items(), key=lambda item: float(item[1]["oracle_ssim"])):
        longer, seen = one.get("thorough"), one.get("films")
        rows.append(
            (
                one["lever"],
                name if is_current(one) else f"{name} *",
                f"{one['accuracy']:.2f}",
                f"{one['undefended'] - one['accuracy']:.2f}",
                f"{one['oracle_ssim']:.3f}",
                f"{one['oracle_psnr_db']:.1f}",
                str(one.get("steps_at_most", FORMER_STEPS)),
                f"{longer['oracle_ssim']:.3f}, {longer['oracle_psnr_db']:.1f}" if longer else "",
                ", ".join(f"{seen[attack]['ssim']:.3f}" for attack in (ORACLE, *FILMS)) if seen else "",
                str(one["bytes_up"]),
                f"{one['bytes_of_entropy_at_most']:.0f}",
                f"{100 * one['head_macs_share']:.0f}%",
            )
        )
    return "\n".join(aligned(rows))


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws what the oracle reads over what the lever costs."""
    mpl.rcParams["svg.hashsalt"] = "frontier"  # the same cells give the same file
    figure = blank_figure(8.5, 6.0)
    axis = figure.subplots()
    for (lever, _), colour in zip(LEVERS.items(), COLOURS, strict=True):
        of = [one for one in cells.values() if one["lever"] == lever]
        for one in of:
            axis.scatter(
                one["undefended"] - one["accuracy"],
                one["oracle_ssim"],
                s=20 + 10 * one["bytes_up"] ** 0.3,
                edgecolors=colour,
                marker=next(marker for share, marker in MARKERS.items() if one["head_macs_share"] <= share),
                facecolors=colour if is_current(one) else "none",
                alpha=0.85,
            )
        if of:
            axis.scatter([], [], color=colour, label=lever)
    if cells:
        floor = sum(one["floor_ssim"] for one in cells.values()) / len(cells)
        axis.axhline(floor, color="#999999", linewidth=1, linestyle="--", label="the mean image")
    axis.axhline(0.3, color="#bbbbbb", linewidth=1, linestyle=":", label="the goal of strong")
    axis.axvline(2.5, color="#bbbbbb", linewidth=1, linestyle=":")
    for share, marker in MARKERS.items():
        axis.scatter([], [], color="#444444", marker=marker, label=f"up to {100 * share:.0f}% on the device")
    if not all(map(is_current, cells.values())):
        axis.scatter([], [], facecolors="none", edgecolors="#444444", label="by decoders of one kind")
    axis.set_xlabel("accuracy lost, points")
    axis.set_ylabel("SSIM of the oracle")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Makes the cells that are missing, one file after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", action="append", choices=list(CELLS), default=[])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="auto", help="as in ensembler train")
    parser.add_argument("--thorough", action="store_true", help="attack the clients of --only once more, for longer")
    parser.add_argument("--films", action="store_true", help="attack the clients of --only by several pictures, too")
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--out", type=Path, default=Path("out/frontier"))
    options = parser.parse_args()
    again = {what: attack for what, attack in AGAIN.items() if getattr(options, what)}
    if again and not options.only:
        parser.error(f"--{next(iter(again))}: name the cells with --only")
    path = results.RESULTS / "frontier.json"
    if again and (lacking := without_client(options.only, there(path), options)):
        raise SystemExit(
            f"{path} has figures of these cells, whose run or exported client is not here to be attacked once more: "
            f"{', '.join(lacking)}; put them back, or remove the cells from the file and they are made again"
        )
    for name in options.only or CELLS:
        known = there(path)
        if not is_current(known.get(name, {})):
            if name in known:
                forget(name, options)
            made = cell(name, options)
            known = there(path) | {name: made}  # another process may have made one meanwhile
            write_whole(path, json.dumps(known, indent=1) + "\n")
        for what, attack in again.items():
            found = attack(name, options)
            known = there(path)
            known[name][what] = found
            write_whole(path, json.dumps(known, indent=1) + "\n")
        draw(known, path.with_suffix(".svg"))
        write_whole(path.with_suffix(".md"), page(known))
        print(table(known))


if __name__ == "__main__":
    main()
