"""``ensembler personalize``: a client of its own for one more device of the same server; ``--rotate`` renews it."""

from __future__ import annotations

import argparse

from ensembler.cli.console import Console, ProgressReporter, a_path, need_torch

NAME = "personalize"
HELP = "train a head, noise, selector and tail of its own for one device, for the server that a run has"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("run", type=a_path, help="a finished run folder of ensembler train")
    parser.add_argument("--device", required=True, metavar="NAME", help="whose; the client goes to RUN/devices/NAME")
    parser.add_argument(
        "--rotate", action="store_true", help="renew the client that the device has; the old one is removed"
    )
    parser.add_argument("--epochs", type=int, help="of stage 3 (default: the run's)")
    parser.add_argument("--data", help="where the run's data is now, if it moved")
    parser.add_argument("--teacher", type=a_path, metavar="RUN", help="where the run's teacher is now, or another one")


def run(options: argparse.Namespace, console: Console) -> int:
    """Trains the client."""
    need_torch()
    from ensembler.training.personal import personalize
    from ensembler.training.plots import draw
    from ensembler.training.processor import keep_freed_memory

    keep_freed_memory()
    reporter = ProgressReporter(console)
    again = f"ensembler personalize {options.run} --device {options.device}{' --rotate' if options.rotate else ''}"
    try:
        folder, summary = personalize(
            options.run,
            options.device,
            rotate=options.rotate,
            epochs=options.epochs,
            data=options.data,
            teacher=options.teacher,
            reporter=reporter,
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"to go on: {again}") from interrupt
    finally:
        reporter.close()
    draw(folder)
    text = (
        f"{folder}: accuracy {summary['accuracy_wire']:.2f}% through the quantised wire, on "
        f"{summary['test_images']} held-out images\n"
        f"next: ensembler-export {folder} --out {options.device} --server-bundle OUT/server --server-key "
        "OUT/keys/server.key, with the OUT of the first export;\n"
        f"      ensembler keys new --name {options.device} --out {options.device}/keys, and its public key into the "
        "server's authorized folder"
    )
    console.result({"run": str(folder), **summary}, text)
    return 0
