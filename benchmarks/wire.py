"""CIFAR-10 with the slim net at 8, 4, 3 and 2 bits a feature, and with a bottleneck: bytes and accuracy, recorded.

    python benchmarks/wire.py --data cifar10:PATH [--runs FOLDER] [--seeds 2] [--epochs 4]

Clients of one stage 1 (N = 4, P = 2), each trained through its own wire; stage 3 is repeated, and every client is
served and asked for the whole test set. The reference is the mean accuracy of the 8-bit clients in float. The
bottleneck has a stage 1 of its own, since it is part of the net from there on. Runs that are there are used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import results
from product import Served, exported, served, trained

from ensembler.protocol.manifest import WireSpec, load_server
from ensembler.protocol.text import aligned
from ensembler.training import data as data_sets

SETTING = ("--arch", "resnet10_slim", "-N", "4", "-P", "2")
# int8 bodies miss the export's gate on this net at 8 bits; auto takes float32 there, and what fits elsewhere.
GATES = ("--max-accuracy-drop", "100")
BOTTLENECK, HEAD_END = "8,2,2", "layer2"


def main() -> None:
    """Trains what is missing, measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", required=True, help="cifar10:PATH, or an npz pair of the same images")
    parser.add_argument("--runs", type=Path, default=Path("runs/wire"))
    parser.add_argument("--out", type=Path, default=Path("out/wire"))
    parser.add_argument("--seeds", type=int, default=2, help="clients of 8, 4 and 2 bits")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    dataset = data_sets.load(options.data)
    common = ("--data", options.data, *SETTING, "--epochs", str(options.epochs))
    base = trained(options.runs / "bits_8_0", *common)
    found: dict[str, list[tuple[Served, float, WireSpec]]] = {}
    for bits, count in ((8, options.seeds), (4, options.seeds), (3, 1), (2, options.seeds)):
        for index in range(count):
            run = options.runs / f"bits_{bits}_{index}"
            trained(run, *common, "--stage1", str(base), "--wire-bits", str(bits))
            found.setdefault(f"{bits} bits", []).append(_measured(run, options, dataset))
    run = options.runs / "bottleneck"
    trained(run, *common, "--head-end", HEAD_END, "--bottleneck", BOTTLENECK)
    found["bottleneck"] = [_measured(run, options, dataset)]
    reference = mean(accuracy for _, accuracy, _ in found["8 bits"])
    rows = [("wire", "bytes up", "with header", "bytes down", "served, each client", "mean", "drop")]
    for name, clients in found.items():
        each = [one.percent for one, _, _ in clients]
        wire = clients[0][2]
        rows.append(
            (
                name,
                str(wire.bytes_up),
                str(clients[0][0].bytes_up),
                str(wire.bytes_down),
                ", ".join(f"{value:.2f}" for value in each),
                f"{mean(each):.2f}",
                f"{reference - mean(each):.2f}",
            )
        )
    print("\n".join(aligned(rows)))
    _record(found, reference, len(dataset.test_y), options.epochs)


def _measured(run: Path, options: argparse.Namespace, dataset: data_sets.Dataset) -> tuple[Served, float, WireSpec]:
    """Returns what is served, torch's accuracy in float, and the wire."""
    out = exported(run, options.out / run.name, options.data, *GATES)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return served(out, dataset), summary["accuracy_float"], load_server(out / "server").wire


def _record(found: dict[str, list[tuple[Served, float, WireSpec]]], reference: float, images: int, epochs: int) -> None:
    names = {"8 bits": "8bit", "4 bits": "4bit", "3 bits": "3bit", "2 bits": "2bit", "bottleneck": "bottleneck"}
    goals = {"4bit": "<= 0.5"}
    figures = []
    for name, clients in found.items():
        each = [one.percent for one, _, _ in clients]
        wire, short = clients[0][2], names[name]
        setting = (
            f"CIFAR-10, {images} test images, resnet10_slim, N = 4, P = 2, {epochs} + {epochs} epochs; served "
            f"{', '.join(f'{value:.2f}' for value in each)}% ({len(each)} clients), reference {reference:.2f}%: mean "
            "of the 8-bit clients in float"
        )
        if short == "bottleneck":
            setting += f"; --head-end {HEAD_END} --bottleneck {BOTTLENECK}, the reference is cut at stem"
        figures += [
            results.figure(
                f"bytes_up_{short}",
                wire.bytes_up,
                "bytes",
                "<= 64" if short == "bottleneck" else "",
                f"one image's features {wire.feature_shape}; the message has {clients[0][0].bytes_up} with its header",
            ),
            results.figure(
                f"accuracy_drop_{short}_points",
                round(reference - mean(each), 4),
                "points",
                goals.get(short, ""),
                setting,
            ),
        ]
    results.record("core", figures, command="python benchmarks/wire.py --data cifar10:PATH", seed=0)


if __name__ == "__main__":
    main()
