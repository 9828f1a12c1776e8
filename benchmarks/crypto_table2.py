"""C2PI's Table II with this project's engine: all layers under two parties against those up to a boundary.

    python benchmarks/crypto_table2.py vgg16=RUN vgg19=RUN [--found vgg16=BOUNDARY.json]... [--images 3]

A RUN is a net without a defence. Its boundaries are the paper's, for an SSIM of 0.2 and 0.3, and those of our own
search (``--found``, what ``ensembler boundary`` wrote). Each is exported without noise for both rings
(``ensembler-export --ring``), and asked from a real client of a real server with CURVE between them: over loopback, and
over links of the paper's rates (network namespaces, token buckets, and a relay for the round trip). Both parties share
this machine's cores. What was measured is kept in ``out/crypto/measured.json`` and not measured again. Figures go to
``docs/results/crypto.json``, the tables to ``docs/results/crypto-table2.md``, pictures of each layer's cost to
``docs/results/crypto-layers-NET.svg``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import bundles
import matplotlib as mpl
import numpy as np
import product
import results
import torch
from link import delayed, link, possible
from matplotlib.figure import Figure

from ensembler import EdgeClient
from ensembler.privacy.boundary_study import plain_net
from ensembler.privacy.parts import write_whole
from ensembler.training import data as data_sets
from ensembler.training.models import normalise
from ensembler.training.runs import RunFolder

FOLDER = Path("out/crypto")
RINGS = (64, 32)
ALL = "all"
LONG_MS = 900_000
MANY = 10  # images whose answers are compared at one boundary of each net
# Bytes a second, and milliseconds of a round trip (the paper's Section IV-E).
LINKS = {"loopback": None, "LAN": (384e6, 0.3), "WAN": (44e6, 40.0)}
# Table I: boundaries on CIFAR-10 for an SSIM of 0.2 and 0.3.
PAPER_BOUNDARIES = {"vgg16": ("13.5", "9"), "vgg19": ("11", "9")}
# Table II, Cheetah: seconds on LAN and WAN, MB.
PAPER = {
    "vgg16": {ALL: (13.72, 25.27, 179.64), "13.5": (14.38, 25.08, 163.8), "9": (9.38, 14.76, 71.89)},
    "vgg19": {ALL: (16.81, 27.67, 211.4), "11": (11.89, 18.23, 89.55), "9": (11.51, 15.23, 76.83)},
}

INTRODUCTION = (
    "Written by `benchmarks/crypto_table2.py` (`make bench-crypto`). Half of the usual channels, one 32x32 image at a "
    "time, medians, no noise; both parties on the same two cores. LAN: 384 MB/s and 0.3 ms; WAN: 44 MB/s and 40 ms. In "
    "brackets: how much faster than all layers with the same ring. The paper's figures are of Cheetah's own code on "
    "another machine, with nets of a size that it does not give."
)

Row = dict[str, Any]


# --- the device's end, a process of its own ---


def device(bundle: Path, endpoint: str, images: Path) -> None:
    """Asks for each image and prints what came and what it cost, as JSON."""
    with EdgeClient(bundle, endpoint, timeout_ms=LONG_MS) as client:
        answers = [client.predict(image) for image in np.load(images)]
    rows = []
    for answer in answers:
        cost = answer.crypto
        assert cost is not None
        rows.append(
            {
                "logits": answer.logits.tolist(),
                "seconds": (answer.timings.total - cost.setup_ms) / 1000,
                "setup_seconds": cost.setup_ms / 1000,
                "setup_bytes": cost.setup_bytes,
                "bytes": answer.bytes_up + answer.bytes_down,
                "cpu_s": cost.cpu_s,
                "peak_mb": cost.peak_mb,
                "layers": [[each.name, each.ms, each.bytes_up + each.bytes_down] for each in cost.layers],
            }
        )
    print(json.dumps(rows))


# --- measuring ---


def exported(net: str, run: Path, boundary: str, ring: int) -> Path:
    """Returns the folder of the bundles, made unless they are there."""
    out = FOLDER / f"{net}-{boundary}-{ring}"
    if not (out / "client").is_dir():
        noise = [] if boundary == ALL else ["--noise", "0"]
        given = ["--boundary", boundary, "--ring", str(ring), *noise, "--parity-images", "200"]
        product.checked("export", str(run), "--out", str(out), "--protocol", "c2pi", "--max-accuracy-drop", "2", *given)
    return out


def asked(out: Path, where: str, images: Path) -> list[Row]:
    """Serves the bundles over a link and asks for the images."""
    with contextlib.ExitStack() as stack:
        rate = LINKS[where]
        keys = bundles.Identities(out / "keys", "", [])
        options = {"log": FOLDER / "server.log"}
        before: tuple[str, ...] = ()
        if rate is None:
            endpoint = stack.enter_context(bundles.served(out / "server", keys, **options))
        else:
            ends = stack.enter_context(link(rate[0], rate[0]))
            before = ends.device
            served = bundles.served(out / "server", keys, **options, within=ends.server, host="127.0.0.1")
            target = stack.enter_context(served).removeprefix("tcp://")
            endpoint = f"tcp://{stack.enter_context(delayed(ends, target, rate[1] / 2))}"
        command = [*before, sys.executable, __file__, "--device", str(out / "client"), endpoint, str(images)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[Row] = json.loads(done.stdout)
    return rows


def measured(net: str, run: Path, boundary: str, ring: int, where: str, count: int) -> Row:
    """Returns one cell: medians over the images, and how far the answers are from torch's."""
    data = data_sets.load(RunFolder.open(run).config.data).test_x[:count]
    images = FOLDER / "images.npy"
    np.save(images, np.ascontiguousarray(data.transpose(0, 2, 3, 1)))
    rows = asked(exported(net, run, boundary, ring), where, images)
    with torch.inference_mode():
        expected = plain_net(RunFolder.open(run)).module(normalise(torch.from_numpy(data))).numpy()
    logits = np.array([row["logits"] for row in rows])
    middle = {name: statistics.median(row[name] for row in rows) for name in ("seconds", "bytes", "cpu_s")}
    return {
        **middle,
        "images": count,
        "setup_seconds": rows[0]["setup_seconds"],
        "setup_bytes": rows[0]["setup_bytes"],
        "peak_mb": max(row["peak_mb"] for row in rows),
        "agreement": float((logits.argmax(1) == expected.argmax(1)).mean()),
        "error": float(np.abs(logits - expected).max()),
        "layers": rows[-1]["layers"],
    }


# --- what is told ---


def table(net: str, cells: dict[tuple[str, int, str], Row], boundaries: list[str]) -> list[str]:
    """Returns Markdown: seconds over each link, MB, and the speed-up over all layers; the paper's beside it."""
    lines = [
        f"## {net}",
        "",
        "| layers under two parties | ring | loopback s | LAN s | WAN s | MB an image | MB of set-up | device CPU s | "
        "device MiB | same class | logit error | paper: LAN s | WAN s | MB |",
        "|---" * 14 + "|",
    ]
    for boundary in boundaries:
        for ring in RINGS:
            found = {where: cells[boundary, ring, where] for where in LINKS}
            one = found["loopback"]
            shown = []
            for where, cell in found.items():
                ratio = cells[ALL, ring, where]["seconds"] / cell["seconds"]
                shown.append(f"{cell['seconds']:.2f}" + ("" if boundary == ALL else f" ({ratio:.2f}x)"))
            paper = PAPER.get(net, {}).get(boundary) if ring == RINGS[0] else None
            theirs = [f"{value:g}" for value in paper] if paper else ["", "", ""]
            values = [
                *(boundary if boundary == ALL else f"to {boundary}", str(ring), *shown),
                *(f"{one['bytes'] / 1e6:.1f}", f"{one['setup_bytes'] / 1e6:.1f}", f"{one['cpu_s']:.2f}"),
                *(f"{one['peak_mb']:.0f}", f"{100 * one['agreement']:.0f}% of {one['images']}", f"{one['error']:.4f}"),
                *theirs,
            ]
            lines.append(f"| {' | '.join(values)} |")
    return [*lines, ""]


def layers_table(cells: dict[tuple[str, int, str], Row]) -> list[str]:
    """Returns Markdown: time and bytes of each layer of the whole net, for both rings."""
    rings = {ring: cells[ALL, ring, "loopback"]["layers"] for ring in RINGS}
    lines = ["| layer | " + " | ".join(f"ring {ring}: s | MB" for ring in rings) + " |", "|---" * 5 + "|"]
    for rows in zip(*rings.values(), strict=True):
        shown = " | ".join(f"{ms / 1000:.2f} | {size / 1e6:.2f}" for _, ms, size in rows)
        lines.append(f"| {rows[0][0]} | {shown} |")
    return [*lines, ""]


def picture(net: str, cells: dict[tuple[str, int, str], Row], out: Path) -> None:
    """Draws time and bytes of each layer."""
    mpl.rcParams.update({"svg.hashsalt": "ensembler", "font.size": 8})
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    time, size = figure.subplots(2, sharex=True)
    width = 0.4
    for place, ring in enumerate(RINGS):
        rows = cells[ALL, ring, "loopback"]["layers"]
        at = np.arange(len(rows)) + (place - 0.5) * width
        time.bar(at, [row[1] / 1000 for row in rows], width, label=f"ring of {ring} bits")
        size.bar(at, [row[2] / 1e6 for row in rows], width)
    size.set_xticks(range(len(rows)), [row[0].split(":")[1] for row in rows], rotation=90)
    time.set_ylabel("seconds"), size.set_ylabel("MB both ways")
    time.set_title(f"{net}, one 32x32 image, all layers under two parties on two cores")
    time.legend()
    figure.savefig(out, metadata={"Date": None})


def figures(cells: dict[str, dict[tuple[str, int, str], Row]], chosen: str) -> list[Row]:
    """Returns what is recorded: VGG16 up to the boundary ``chosen`` against all layers, each at its best."""
    net = cells["vgg16"]

    def best(boundary: str, where: str, what: str) -> tuple[float, int]:
        return min((net[boundary, ring, where][what], ring) for ring in RINGS)

    made = []
    for where, goal in (("LAN", "1.46"), ("WAN", "1.71")):
        (full, of_full), (ours, of_ours) = best(ALL, where, "seconds"), best(chosen, where, "seconds")
        note = (
            f"VGG16 at half width, {where}: all layers {full:.2f} s (ring {of_full}), up to {chosen} {ours:.2f} s "
            f"(ring {of_ours}), each at its best; the paper's ratio is {goal}"
        )
        name = where.lower()
        made.append(results.figure(f"c2pi_speedup_vs_full_{name}", round(full / ours, 3), "ratio", "", note))
        made.append(results.figure(f"c2pi_seconds_{name}", round(ours, 2), "s", "", note))
        made.append(results.figure(f"full_seconds_{name}", round(full, 2), "s", "", note))
    (full, _), (ours, ring) = best(ALL, "loopback", "bytes"), best(chosen, "loopback", "bytes")
    note = f"VGG16 at half width, ring {ring}: all layers {full / 1e6:.1f} MB, up to {chosen} {ours / 1e6:.1f} MB"
    made.append(results.figure("c2pi_bytes_ratio_vs_full", round(full / ours, 3), "ratio", "", f"{note}; paper 2.5"))
    made.append(results.figure("c2pi_megabytes", round(ours / 1e6, 2), "MB", "", note))
    one = net[chosen, best(chosen, "LAN", "seconds")[1], "loopback"]
    note = f"VGG16 at half width up to {chosen}, the device's engine alone"
    made.append(results.figure("client_cpu_s_per_image", round(one["cpu_s"], 2), "s", "", note))
    made.append(results.figure("client_peak_mb", round(one["peak_mb"]), "MiB", "", note))
    worst = min(cell["agreement"] for each in cells.values() for cell in each.values())
    every = sum(cell["images"] for each in cells.values() for cell in each.values())
    note = f"the lowest of all cells of both nets, {every} answers in all, no noise"
    return [*made, results.figure("c2pi_vgg_argmax_agreement", worst, "of 1", ">= 0.99", note)]


def searched(net: str, path: Path) -> tuple[str, Row]:
    """Returns the boundary that ``ensembler boundary`` found, and its figure."""
    found = json.loads(path.read_text(encoding="utf-8"))
    threshold, effort = found["options"]["ssim_threshold"], found["options"]["effort"]["steps"]
    judged = {f"{one['layer']:g}": one["ssim"]["dina"] for one in found["depths"] if "dina" in one["ssim"]}
    seen = ", ".join(f"{layer} {value:.3f}" for layer, value in judged.items())
    note = (
        f"half width, accuracy {found['accuracy']:.2f}%; DINA with {effort} steps on {found['options']['images']} "
        f"images, SSIM by layer: {seen}; {found['facts']['command']}"
    )
    name = f"own_boundary_{net}_ssim_{threshold:g}"
    return f"{found['boundary']:g}", results.figure(name, found["boundary"], "layer", "", note)


def main() -> None:
    """Measures what is missing, records, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", metavar="NET=RUN")
    parser.add_argument("--found", action="append", default=[], metavar="NET=JSON", help="of our own search")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--device", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device:
        device(Path(options.device[0]), options.device[1], Path(options.device[2]))
        return
    if reason := possible():
        raise SystemExit(f"no link can be made here: {reason}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "measured.json"
    kept: dict[str, Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = [(net, *searched(net, Path(file))) for net, file in (each.split("=", 1) for each in options.found)]
    cells: dict[str, dict[tuple[str, int, str], Row]] = {}
    lines = ["# C2PI's Table II with SPU", "", INTRODUCTION, ""]
    for entry in options.nets:
        net, run = entry.split("=", 1)
        numbers = {*PAPER_BOUNDARIES.get(net, ()), *(layer for of, layer, _ in found if of == net)}
        boundaries = [ALL, *sorted(numbers, key=float, reverse=True)]
        cells[net] = {}
        for where in LINKS:
            for boundary in boundaries:
                for ring in RINGS:
                    name = f"{net} {boundary} {ring} {where}"
                    if name not in kept:
                        many = where == "loopback" and boundary == PAPER_BOUNDARIES.get(net, ("", ""))[1]
                        count = max(options.images, MANY if many else 0)
                        kept[name] = measured(net, Path(run), boundary, ring, where, count)
                        write_whole(path, json.dumps(kept))
                        print(name, {key: value for key, value in kept[name].items() if key != "layers"}, flush=True)
                    cells[net][boundary, ring, where] = kept[name]
        lines += table(net, cells[net], boundaries)
        lines += layers_table(cells[net])
        picture(net, cells[net], results.RESULTS / f"crypto-layers-{net}.svg")
    (results.RESULTS / "crypto-table2.md").write_text("\n".join(lines), encoding="utf-8")
    given = [*options.nets, *(part for each in options.found for part in ("--found", each))]
    command = shlex.join(["python", "benchmarks/crypto_table2.py", *given, "--images", str(options.images)])
    if "vgg16" in cells:
        made = figures(cells, PAPER_BOUNDARIES["vgg16"][1]) + [figure for _, _, figure in found]
        results.record("crypto", made, command=command, seed=0)


if __name__ == "__main__":
    main()
