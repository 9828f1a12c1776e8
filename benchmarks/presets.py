"""A preset under attack: what a server sees of several clients, and what that costs, into docs/results/privacy.json.

    python benchmarks/presets.py strong --server BUNDLE --undefended RUN... --victim RUN=CLIENT_BUNDLE...

Each victim is audited five times (``--kind`` takes some of them): by the oracle's decoders with the standard budget on
the very images that trained it, the most that an attacker could have; by the same with eight frames of each scene; and
with images that are disjoint from all others by a server that matches distributions, with the standard budget, by
servers alone, and by attackers who own a device, with the quick one. Reports are kept in ``out/presets`` and not made
again. Figures are means over the victims; the strongest attack is the one with the highest mean.

Accuracy is that of the exported client with the exported bodies, compared image by image with undefended nets in torch,
each victim with each of them; and one with one where there are as many of them.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import results
from product import audited, clearest_psnr_db, is_about, right_in_torch

from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.privacy.card import AUDIT, FLOOR
from ensembler.privacy.scene import Access
from ensembler.training import data as data_sets
from ensembler.training.data import Dataset
from ensembler.training.fit import EVALUATION_BATCH
from ensembler.training.presets import STRONG, head_share, net_macs
from ensembler.training.runs import RunFolder

KINDS: dict[str, dict[str, Any]] = {
    "oracle": {"budget": "standard", "attacks": (), "auxiliary": "train", "seeds": 1},
    "film": {"budget": "standard", "attacks": ("frames-8",), "auxiliary": "train", "seeds": 1},
    "devices": {
        "budget": "quick",
        "attacks": (
            *("misaligned-decoder", "other-device", "known-pairs-10", "known-pairs-100", "known-pairs-1000"),
            "mla-prior",
        ),
    },
    # By the quick budget it may end with a head that is the negative of the device's.
    "matching": {"budget": "standard", "attacks": ("distribution-matching",), "seeds": 1},
    "servers": {
        "budget": "quick",
        "attacks": (
            *("shadow-adaptive", "shadow-informed"),
            *("distribution-matching", "distribution-matching-critic", "generative-prior"),
        ),
    },
}
# The strong preset's have no first word.
UNPREFIXED = ("other_device_known_plaintext_gain_ssim", "selector_recovery_auc")
GOALS = {"oracle_ssim": "<= 0.30", "oracle_psnr_db": "<= 15", "worst_query_free_ssim": "<= 0.30"} | {
    "worst_query_free_psnr_db": "<= 15",
    "other_device_known_plaintext_gain_ssim": "<= 0.02",
    "bytes_up": "<= 64",
    "head_macs_share": f"<= {STRONG.head_share:g}",
    "accuracy_drop_points": "<= 2.5",
}

Row = dict[str, Any]


def attacked(
    victims: Sequence[tuple[Path, Path]], folder: Path, only: int | None, kinds: Sequence[str], make: bool
) -> list[list[Row]]:
    """Returns for each victim, or for one, the attacks' rows: of all audits, or of those of its that are there."""
    found = []
    for index, (run, bundle) in enumerate(victims):
        if only not in (None, index):
            continue
        other = victims[(index + 1) % len(victims)][1] if len(victims) > 1 else None
        rows: list[Row] = []
        for kind in kinds:
            options = KINDS[kind] | ({"other_device": other} if kind == "devices" else {})
            out = folder / f"{run.parent.name}-{run.name}-{kind}.html"
            if not make and not is_about(out.with_suffix(".json"), bundle, **options):
                continue
            document = audited(run, bundle, out, command=shlex.join(["benchmarks/presets.py", str(run)]), **options)
            for row in document["attacks"]:
                passed = all(gate["passed"] for gate in document["gates"] if gate["about"] in (row["name"], AUDIT))
                rows.append(row | {"doubted": not passed})
            rows += [{"name": f"selector, {way}", **facts} for way, facts in document["selector"].items()]
            rows.append({"name": "sent", **document["sent"]})
        if rows:
            found.append(rows)
    return found


def served(bundle: Path, engine: OnnxEngine, data: Dataset) -> npt.NDArray[np.bool_]:
    """Returns which held-out images the exported client gets right with the exported bodies."""
    runtime = EdgeRuntime(bundle)
    right = []
    for chosen in _parts(len(data.test_x)):
        codes = runtime.encode(np.ascontiguousarray(data.test_x[chosen].transpose(0, 2, 3, 1)))
        right.append(runtime.finish(engine.run(codes)).argmax(1) == data.test_y[chosen])
    return np.concatenate(right)


def _parts(images: int) -> list[slice]:
    return [slice(start, start + EVALUATION_BATCH) for start in range(0, images, EVALUATION_BATCH)]


def figures_of(prefix: str, found: list[list[Row]], victims: list[RunFolder]) -> list[Row]:
    """Returns the figures of what is seen and sent."""

    def of(
        names: Sequence[str], read: Callable[[Row], float], among: Sequence[list[Row]] = tuple(found)
    ) -> list[float]:
        """For each victim that has rows of these names, the highest."""
        of_each = [[read(row) for row in rows if row["name"] in names] for rows in among]
        return [max(values) for values in of_each if values]

    def figure(name: str, values: Sequence[float], unit: str, words: str = "", digits: int = 4) -> Row:
        each = ", ".join(f"{round(value, digits):g}" for value in values)
        note = f"{words}; " if words else ""
        return results.figure(
            name if prefix == "strong" and name in UNPREFIXED else f"{prefix}_{name}",
            round(float(np.mean(values)), digits),
            unit,
            GOALS.get(name, "") if prefix.endswith("strong") else "",
            f"{note}{len(values)} victim{'s' * (len(values) > 1)}: {each}",
        )

    def strongest(access: Callable[[int], bool]) -> tuple[str, list[float]]:
        names = {row["name"] for row in every if "access" in row and access(row["access"]) and _frames(row) == 1}
        means = {name: of([name], _ssim) for name in names}
        best = max(means, key=lambda name: float(np.mean(means[name])))
        return best, means[best]

    def described(name: str) -> str:
        doubted = sum(any(row["doubted"] for row in rows if row["name"] == name) for rows in found)
        return name + (f" (its own check failed for {doubted})" if doubted else "")

    every = [row for rows in found for row in rows]
    floor = of([FLOOR], _ssim)
    # The bound is the best of all that know the device: decoders, the stolen head, pairs.
    bound, _ = strongest(lambda access: access >= Access.DEVICE)
    knowing = sorted({row["name"] for row in every if row.get("access", 0) >= Access.DEVICE and _frames(row) == 1})
    figures = [
        figure("floor_ssim", floor, "ssim", "the mean image"),
        figure(
            "oracle_ssim",
            of(knowing, _ssim),
            "ssim",
            f"the best of {', '.join(knowing)}; most often {described(bound)}",
        ),
        figure("oracle_psnr_db", of(knowing, clearest_psnr_db), "dB", "the clearest of the same", 2),
        figure("bytes_of_entropy_at_most", of(["sent"], lambda row: row["bytes_of_entropy_at_most"]), "bytes", "", 1),
        figure("bytes_up", [run.read_wire().spec.bytes_up for run in victims], "bytes", "codes of one image", 0),
        figure("head_macs_share", [head_share(run.arch) for run in victims], "of 1", "of the undefended net's"),
    ]
    if films := sorted({row["name"] for row in every if "access" in row and _frames(row) > 1}):
        words = f"{', '.join(films)}: of one scene, by a hand-held camera"
        figures.append(figure("frames_ssim", of(films, _ssim), "ssim", words))
        figures.append(figure("frames_psnr_db", of(films, clearest_psnr_db), "dB", words, 2))
    alone = {row["name"] for row in every if row.get("access") == Access.QUERY_FREE}
    if alone:
        name, _ = strongest(lambda access: access == Access.QUERY_FREE)
        figures += [
            figure("worst_query_free_ssim", of(sorted(alone), _ssim), "ssim", f"most often {described(name)}"),
            figure(
                "worst_query_free_psnr_db",
                of(sorted(alone), clearest_psnr_db),
                "dB",
                "the clearest of all query-free attacks",
                2,
            ),
        ]
    if prefix.endswith("strong"):
        name = "victim_seeds" if prefix == "strong" else f"{prefix}_victim_seeds"
        figures.append(results.figure(name, len(victims), "clients", ">= 3", f"of one server; {len(found)} attacked"))
    if pairs := [name for name in knowing if "pairs" in name]:
        figures.append(figure("same_device_known_plaintext_ssim", of(pairs, _ssim), "ssim", "up to 1,000 pairs"))
    if any(row["name"] == "other-device" for row in every):
        other = of(["other-device"], _ssim)
        floors = [of([FLOOR], _ssim, [rows])[0] for rows in found if of(["other-device"], _ssim, [rows])]
        gain = [a - b for a, b in zip(other, floors, strict=True)]
        words = "a decoder of all pairs of another client of the server"
        figures += [
            figure("other_device_known_plaintext_ssim", other, "ssim", words),
            figure("other_device_known_plaintext_gain_ssim", gain, "ssim", "the same, over the mean image"),
        ]
    ways = sorted({row["name"] for row in every if row["name"].startswith("selector, ")})
    if ways:
        each = {way: of([way], lambda row: row["auc"]) for way in ways}
        furthest = max(each, key=lambda way: abs(float(np.mean(each[way])) - 0.5))
        name = furthest.removeprefix("selector, ")
        nets, selected = victims[0].config.num_nets, victims[0].config.num_selected
        chance = chance_of(nets, selected, len(each[furthest]), len(ways), float(np.mean(each[furthest])))
        words = (
            f"ranking by {name}, of {len(ways)} the furthest from 0.5; by chance one is as far with p = {chance:.2f}"
        )
        figures.append(figure("selector_recovery_auc", each[furthest], "AUC", words))
    return figures


def chance_of(nets: int, selected: int, victims: int, ways: int, auc: float) -> float:
    """Returns the probability that one of several random rankings is as far from 0.5 as ``auc``, in the victims' mean.

    The rankings are taken as independent, which those of one audit are not quite.
    """
    pairs = selected * (nets - selected)
    one = np.zeros(pairs + 1)  # in how many rankings so many pairs of nets are in order
    for places in itertools.combinations(range(nets), selected):
        others = [place for place in range(nets) if place not in places]
        one[sum(mine < other for mine in places for other in others)] += 1
    sums = np.ones(1)
    for _ in range(victims):
        sums = np.convolve(sums, one / one.sum())
    aucs = np.arange(len(sums)) / (pairs * victims)
    far = float(sums[np.abs(aucs - 0.5) >= abs(auc - 0.5) - 1e-9].sum())
    return 1 - (1 - far) ** ways


def accuracy(
    prefix: str, mine: Sequence[npt.NDArray[np.bool_]], theirs: Sequence[npt.NDArray[np.bool_]], trained: str
) -> list[Row]:
    """Returns the figures of what is right, with the defence and without; ``trained`` says for how long."""
    pairs = [100 * (b.astype(float) - a) for a, b in itertools.product(mine, theirs)]
    drops = [float(pair.mean()) for pair in pairs]
    error = float(np.mean([pair.std() / np.sqrt(len(pair)) for pair in pairs]))
    accuracies = ", ".join(f"{100 * right.mean():.2f}" for right in mine)
    reference = ", ".join(f"{100 * right.mean():.2f}" for right in theirs)
    words = (
        f"{trained}; clients {accuracies}; undefended {reference}; each with each: {min(drops):.2f} to "
        f"{max(drops):.2f}, standard error of one comparison {error:.2f}"
    )
    if len(mine) == len(theirs) > 1:
        by_seed = [100 * float(np.mean(b) - np.mean(a)) for a, b in zip(mine, theirs, strict=True)]
        words += (
            f"; one with one: {', '.join(f'{drop:.2f}' for drop in by_seed)}, as far from 0 by chance with "
            f"p = {flipped(by_seed):.3f}"
        )
    goal = GOALS["accuracy_drop_points"] if prefix.endswith("strong") else ""
    return [
        results.figure(f"{prefix}_accuracy_drop_points", round(float(np.mean(drops)), 2), "points", goal, words),
        results.figure(
            f"{prefix}_accuracy", round(float(np.mean([100 * r.mean() for r in mine])), 2), "%", "", accuracies
        ),
    ]


def flipped(differences: Sequence[float]) -> float:
    """Returns the p-value, two-sided and exact, of a mean of pairs whose signs could as well have been the other."""
    given = np.array(differences)
    means = [float(np.mean(given * signs)) for signs in itertools.product((1, -1), repeat=len(given))]
    return float(np.mean(np.abs(means) >= abs(given.mean()) - 1e-9))


def local(prefix: str, run: RunFolder, victim: RunFolder, data: Dataset) -> list[Row]:
    """Returns what the device would get right without any server, with a net of about its head's work."""
    share = net_macs(run.arch) / net_macs(victim.arch)
    words = f"{run.config.arch}, on the device alone: {share:.3f} of the undefended net's multiply-accumulates"
    percent = round(float(100 * right_in_torch(run, data).mean()), 2)
    return [results.figure(f"{prefix}_local_net_accuracy", percent, "%", "", words)]


def _frames(row: Row) -> int:
    """How many frames of a scene the attack had; reports of before do not say."""
    return int(row.get("frames", 1))


def _ssim(row: Row) -> float:
    return float(row["ssim"]["mean"])


def main() -> None:
    """Audits and records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("preset", help="the first word of the figures' names")
    parser.add_argument("--victim", action="append", required=True, metavar="RUN=CLIENT_BUNDLE")
    parser.add_argument("--server", required=True, type=Path, metavar="BUNDLE", help="of all the victims")
    parser.add_argument("--undefended", action="append", required=True, type=Path, metavar="RUN", help="--defense none")
    parser.add_argument(
        "--local", type=Path, metavar="RUN", help="--defense none, of a net that the device could run alone"
    )
    parser.add_argument("--kind", action="append", default=[], choices=list(KINDS), help="again for another one")
    parser.add_argument(
        "--only", type=int, metavar="I", help="audit the victim of this number alone, and record nothing"
    )
    parser.add_argument("--there", action="store_true", help="audit nothing: record of the reports that are there")
    options = parser.parse_args()
    folder = Path("out/presets")
    folder.mkdir(parents=True, exist_ok=True)
    victims = [(Path(run), Path(bundle)) for run, bundle in (each.split("=", 1) for each in options.victim)]
    found = attacked(victims, folder, options.only, options.kind or list(KINDS), not options.there)
    if options.only is not None:
        return
    if not found:
        raise SystemExit(f"{folder} has no report of these victims")
    runs = [RunFolder.open(run) for run, _ in victims]
    data, engine = data_sets.load(runs[0].config.data), OnnxEngine(options.server)
    mine = [served(bundle, engine, data) for _, bundle in victims]
    engine.close()
    undefended = [RunFolder.open(run) for run in options.undefended]
    theirs = [right_in_torch(run, data) for run in undefended]
    stages = sorted({f"{run.config.epochs_stage1} + {run.config.epochs_stage3}" for run in runs})
    epochs = sorted({str(run.config.epochs_stage1) for run in undefended})
    trained = f"epochs of the clients' stages {', '.join(stages)}, of the undefended nets {', '.join(epochs)}"
    figures = [*figures_of(options.preset, found, runs), *accuracy(options.preset, mine, theirs, trained)]
    if options.local is not None:
        figures += local(options.preset, RunFolder.open(options.local), runs[0], data)
    given = [part for each in options.victim for part in ("--victim", each)]
    given += ["--local", str(options.local)] if options.local else []
    given += [part for kind in options.kind for part in ("--kind", kind)]
    given += ["--there"] if options.there else []
    given += ["--server", str(options.server)]
    given += [part for each in options.undefended for part in ("--undefended", str(each))]
    command = shlex.join(["python", "benchmarks/presets.py", options.preset, *given])
    results.record("privacy", figures, command=command, seed=runs[0].config.seed)


if __name__ == "__main__":
    main()
