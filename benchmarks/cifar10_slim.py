"""CIFAR-10 with the slim net through the whole product, recorded: train (N = 10, P = 4), export, serve, predict.

    python benchmarks/cifar10_slim.py --data cifar10:PATH [--run RUN] [--out OUT]

With ``--run`` a finished run is used; else one is trained (an hour on two cores). Accuracies are those of the served
bundle, through ``EdgeClient``, on the whole test set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import results
from product import exported, served, trained

from ensembler.training import data as data_sets

EPOCHS = 4


def main() -> None:
    """Runs and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", required=True, help="cifar10:PATH, or an npz pair of the same images")
    parser.add_argument("--run", type=Path, default=Path("runs/cifar10_slim"))
    parser.add_argument("--out", type=Path, default=Path("out/cifar10_slim"))
    parser.add_argument("--none", type=Path, help="a run of ensembler train --defense none, to stand beside it")
    parser.add_argument("--single", type=Path, help="a run of --defense single")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    arguments = ["--data", options.data, "--arch", "resnet10_slim", "-N", "10", "-P", "4"]
    trained(options.run, *arguments, "--epochs", str(options.epochs))
    exported(options.run, options.out, options.data)
    # What int8 bodies would do, with the SQNR gate open: auto takes float32 where they miss it.
    int8_out = options.out.with_name(options.out.name + "_int8")
    exported(options.run, int8_out, options.data, "--server-precision", "int8", "--min-sqnr-db", "0")
    int8 = json.loads((int8_out / "parity.json").read_text(encoding="utf-8"))
    precision = json.loads((options.out / "server" / "manifest.json").read_text(encoding="utf-8"))["precision"]
    report = json.loads((options.out / "parity.json").read_text(encoding="utf-8"))
    config = json.loads((options.run / "config.json").read_text(encoding="utf-8"))["config"]
    dataset = data_sets.load(options.data)
    found = served(options.out, dataset)
    setting = (
        f"CIFAR-10, {len(dataset.test_y)} test images, resnet10_slim, "
        f"N = {config['num_nets']}, P = {config['num_selected']}, "
        f"{config['epochs_stage1']} + {config['epochs_stage3']} epochs, "
        f"int8 client, {precision} bodies (auto), over CURVE"
    )
    drop = report["accuracy_float"] - found.percent
    figures = [
        results.figure(
            "split_accuracy_drop_points",
            round(drop, 4),
            "points",
            "<= 0.5",
            f"{setting}; torch float {report['accuracy_float']:.2f}%, through EdgeClient {found.percent:.2f}%",
        ),
        results.figure("split_accuracy_percent", round(found.percent, 4), "%", "", setting),
        results.figure(
            "min_stage_sqnr_db",
            round(report["min_stage_sqnr_db"], 2),
            "dB",
            ">= 35",
            "worst of head, bodies on stage-1 features, tail; against torch with the same fake quantiser",
        ),
        results.figure("bytes_up_per_image", found.bytes_up, "bytes", "", "header included, batch of 1; 8-bit codes"),
        results.figure(
            "bytes_down_per_image", found.bytes_down, "bytes", "", "header included, batch of 1; 8-bit codes"
        ),
    ]
    bodies = next(stage for stage in int8["stages"] if stage["stage"] == "bodies")
    figures += [
        results.figure(
            "int8_bodies_sqnr_db", round(bodies["sqnr_db"], 2), "dB", ">= 35", "all N, held-out stage-1 features"
        ),
        results.figure(
            "int8_bodies_accuracy_drop_points",
            round(int8["accuracy_drop_points"], 4),
            "points",
            "<= 0.5",
            f"int8 client and bodies, {int8['images']} images; same top-1 as torch {int8['top1_agreement']:.2f}%",
        ),
    ]
    command = "python benchmarks/cifar10_slim.py --data cifar10:PATH"
    results.record("loop", figures, command=command, seed=config["seed"])
    for defense, run in (("none", options.none), ("single", options.single)):
        if run is not None:
            # A baseline is a run of its own: its seed stands beside its figure, not the ensemble's.
            own = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            note = f"baseline --defense {defense}, {own['epochs_stage1']} epochs, torch through the wire"
            value = round(summary["accuracy_wire"], 4)
            baseline = results.figure(f"accuracy_{defense}_percent", value, "%", "", note)
            results.record("loop", [baseline], command=f"{command} --{defense} RUN", seed=own["seed"])


if __name__ == "__main__":
    main()
