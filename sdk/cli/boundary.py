"""``ensembler boundary``: how many layers of a net must stay private, as C2PI finds out."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from ensembler.cli.console import Console, ProgressReporter, a_path, need_torch, positive
from ensembler.protocol.errors import ConfigError

NAME = "boundary"
HELP = "find the layer of a plain net after which attacks no longer read the images (C2PI)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("run", type=a_path, metavar="RUN", help="a run that was trained with --defense none")
    parser.add_argument("--out", type=a_path, default=Path("boundary.json"), help="(default: boundary.json)")
    parser.add_argument("--idpa", default="dina", help="dina, eina, ina, mla or strongest of them (default: dina)")
    parser.add_argument("--ssim", type=float, default=0.3, help="below it an attack has failed (default: 0.3)")
    parser.add_argument("--max-drop", type=float, default=2.5, help="points of accuracy at most (default: 2.5)")
    parser.add_argument("--noise", type=float, default=0.1, help="uniform in plus or minus this (default: 0.1)")
    parser.add_argument("--layers", help="look at these alone, for instance 3,3.5,7 (default: all)")
    parser.add_argument("--visited-only", action="store_true", help="attack only the layers that the search asks for")
    parser.add_argument("--steps", type=positive(int), help="of each attack, at most (default: 4000)")
    parser.add_argument("--images", type=positive(int), default=1000, help="judged at most (default: 1000)")
    parser.add_argument("--data", help="whose held-out images are used (default: the run's data)")
    parser.add_argument("--seed", type=int, default=0, help="of attacks and of dividing the images (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def run(options: argparse.Namespace, console: Console) -> int:
    """Searches."""
    need_torch()
    from ensembler.privacy.boundary import find_boundary
    from ensembler.privacy.boundary_study import BoundaryOptions
    from ensembler.training.fit import pick_device
    from ensembler.training.processor import keep_freed_memory

    keep_freed_memory()
    asked = BoundaryOptions(
        ssim_threshold=options.ssim,
        max_accuracy_drop_points=options.max_drop,
        noise_magnitude=options.noise,
        idpa=options.idpa,
        layers=None if options.layers is None else _numbers(options.layers),
        whole_curve=not options.visited_only,
        images=options.images,
        seed=options.seed,
    )
    if options.steps is not None:
        asked = replace(asked, effort=replace(asked.effort, steps=options.steps))
    reporter = ProgressReporter(console)
    try:
        boundary = find_boundary(
            options.run,
            options.out,
            asked,
            data=options.data,
            device=pick_device(options.device),
            command=shlex.join(["ensembler", *sys.argv[1:]]),
            reporter=reporter,
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("finished layers are kept; the same command goes on") from interrupt
    finally:
        reporter.close()
    picture = options.out.with_suffix(".png")
    console.result(boundary.to_dict(), f"{boundary.text()}\nthe curve: {options.out}, {picture}")
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--layers {text}: give numbers of layers with commas between, for instance 3,3.5,7"
        ) from error
