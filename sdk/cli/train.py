"""``ensembler train``: the three stages, or a baseline, into a run folder; ``--resume`` goes on with one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.cli.console import Console, ProgressReporter, a_path, need_torch
from ensembler.protocol.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.training.ray_pool import RayPool

NAME = "train"
HELP = "train N nets, draw the secret selector, train the client (Ensembler, three stages)"

# What the parser adds for every verb, and what may stand beside --resume.
NOT_OF_THE_RUN = frozenset({"verb", "json", "resume", "device", "jobs", "engine", "ray_address"})
# Options that say of what kind something is, and how much there is of it.
KINDS_OF = {"noise": "noise_std", "noise_mode": "noise_std", "reg_kind": "reg_weight", "reg_over": "reg_weight"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options. None has a default here: those are ``TrainConfig``'s, and a given one is told apart."""
    parser.add_argument("--data", help="demo, cifar10:PATH, cifar100:PATH, folder:PATH or npz:TRAIN,TEST")
    parser.add_argument("--out", type=a_path, help="the run folder to make")
    parser.add_argument(
        "--resume",
        type=a_path,
        metavar="RUN",
        help="go on with an interrupted run; its options are those it began with",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=None,
        help="print the plan with time, memory and disk, from a few real steps; keep nothing",
    )
    parser.add_argument("--arch", help="resnet18, another name that ensembler cuts lists, or package.module:function")
    parser.add_argument("--head-end", help="the last part on the device; ensembler cuts ARCH lists them")
    parser.add_argument("--tail-start", help="the first part that is on the device again")
    parser.add_argument(
        "--preset",
        help="options for one aim: obfuscate (the paper's), balanced, strong; others that are given go before its own",
    )
    parser.add_argument("--bottleneck", type=_numbers, metavar="K,S,B", help="at the cut: channels,stride,bits")
    parser.add_argument(
        "--encoder",
        type=_numbers,
        metavar="C,...",
        help="convolutions before the bottleneck, each number halves the map",
    )
    parser.add_argument("-N", "--num-nets", type=int, help="server nets (default: 10)")
    parser.add_argument("-P", "--num-selected", type=int, help="nets that count (default: 4)")
    parser.add_argument(
        "--parties", type=int, help="operators, each of which is sent its own channels of the bottleneck (default: 1)"
    )
    parser.add_argument("--defense", help="ensembler, or a baseline: joint, single, none")
    parser.add_argument(
        "--no-stem-pool",
        dest="stem_pool",
        action="store_false",
        default=None,
        help="no max-pool in the head (the paper's CIFAR-100)",
    )
    parser.add_argument("--noise", help="the client's: gaussian, uniform or learned (default: gaussian)")
    parser.add_argument("--noise-std", type=float, help="standard deviation of the noise (default: 0.1)")
    parser.add_argument("--noise-mode", help="the client's: fixed as in the paper, or fresh for every image")
    parser.add_argument("--dropout", type=float, help="share of its features that the client drops (default: 0)")
    parser.add_argument("--reg-weight", type=float, help="lambda of Eq. 3 (default: 0.1)")
    parser.add_argument("--reg-kind", help="what Eq. 3 keeps low: cosine, or what a linear map of the channels gives")
    parser.add_argument("--reg-over", help="maximum of Eq. 3 over all heads, or the selected ones")
    parser.add_argument("--head-for", help="nets that the head learns from: selected (default), or all alike")
    parser.add_argument(
        "--information-weight", type=float, help="of what the features tell beyond the class (default: 0)"
    )
    parser.add_argument("--information-noise", type=float, help="the noise that it reckons with (default: 0.5)")
    parser.add_argument("--nopeek-weight", type=float, help="of NoPeek's distance correlation in the loss (default: 0)")
    parser.add_argument("--decoder-weight", type=float, help="of a decoder in the loop, as in ResSFL (default: 0)")
    parser.add_argument("--teacher", metavar="RUN", help="a run with --defense none, whose answers the nets learn too")
    parser.add_argument("--teacher-weight", type=float, help="of the teacher in the loss (default: 0.7)")
    parser.add_argument("--wire-bits", type=_bits, help="of a feature's code: 8, 4, 3, 2, 1 or auto (default: 8)")
    parser.add_argument("--answer-bits", type=_bits, help="of an answer's code: 8, 4 or auto (default: 8)")
    parser.add_argument("--epochs", type=int, help="of both stages")
    parser.add_argument("--epochs-stage1", type=int, help="(default: 30)")
    parser.add_argument("--epochs-stage3", type=int, help="(default: 30)")
    parser.add_argument("--batch-size", type=int, help="(default: 128)")
    parser.add_argument("--learning-rate", type=float, help="peak of the one-cycle schedule (default: 0.1)")
    parser.add_argument("--weight-decay", type=float, help="(default: 0.0005)")
    parser.add_argument("--seed", type=int, help="of stage 1; the selector has no seed (default: 0)")
    parser.add_argument("--train-limit", type=int, help="use only the first images of the data")
    parser.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", help="auto, fast, float32 or bfloat16 (default: auto)")
    parser.add_argument(
        "--jobs", type=int, help="stage-1 nets that train at once; --dry-run says if it is faster here (default: 1)"
    )
    parser.add_argument("--engine", choices=("local", "ray"), help="where stage 1 trains: here, or over Ray")
    parser.add_argument("--ray-address", help="HOST:PORT of Ray's head, or auto (default: a Ray of this machine alone)")
    parser.add_argument(
        "--stage1", type=a_path, default=None, help="reuse stage 1 of this run: a further client for its server"
    )


def _bits(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a number of bits, or auto")
    return text if text == "auto" else int(text)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers with commas between them, for instance 8,4,2")
    return tuple(int(part) for part in parts)


def run(options: argparse.Namespace, console: Console) -> int:
    """Trains."""
    need_torch()
    from ensembler.training.plan import make_plan
    from ensembler.training.plots import draw
    from ensembler.training.processor import keep_freed_memory
    from ensembler.training.stages import resume, train

    keep_freed_memory()
    if options.ray_address is not None and options.engine != "ray":
        raise ConfigError("--ray-address is of --engine ray")
    if options.dry_run and options.resume is None:
        if options.engine == "ray":
            raise ConfigError("train --dry-run measures this machine alone; leave --engine ray away")
        if options.data is None:
            raise ConfigError("train --dry-run needs --data")
        plan = make_plan(config_of(options), stage1_from=options.stage1)
        console.result(plan.to_dict(), plan.text())
        return 0
    out: Path | None = options.resume or options.out
    reporter = ProgressReporter(console)
    try:
        if options.resume is not None:
            _refuse_beside_resume(options)
            with _pool(options) as pool:
                summary = resume(options.resume, device=options.device, jobs=options.jobs, reporter=reporter, pool=pool)
        else:
            if options.data is None or options.out is None:
                raise ConfigError("train needs --data and --out for a new run, or --resume RUN for an interrupted one")
            config = config_of(options)
            with _pool(options) as pool:
                summary = train(config, options.out, stage1_from=options.stage1, reporter=reporter, pool=pool)
    except KeyboardInterrupt as interrupt:
        if out is not None and (out / "config.json").is_file() and not (out / "summary.json").is_file():
            raise KeyboardInterrupt(f"to go on: ensembler train --resume {out}") from interrupt
        raise
    finally:
        reporter.close()
    assert out is not None  # one of the two was given, or ConfigError raised
    draw(out)
    text = (
        f"{out}: accuracy {summary['accuracy_wire']:.2f}% through the quantised wire, "
        f"{summary['accuracy_float']:.2f}% in float, on {summary['test_images']} held-out images\n"
        f"next: ensembler-export {out} --out bundles"
    )
    console.result({"run": str(out), **summary}, text)
    return 0


@contextmanager
def _pool(options: argparse.Namespace) -> Iterator[RayPool | None]:
    """Connects to the machines that train, if there are any but this one."""
    if options.engine != "ray":
        yield None
        return
    from ensembler.cloud_runtime.ray_cluster import connected
    from ensembler.training.ray_pool import RayPool

    with connected(options.ray_address) as ray:
        yield RayPool(ray)


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ``TrainConfig`` that the options give, without those of their preset."""
    from ensembler.training.config import TrainConfig

    given = {name: value for name, value in vars(options).items() if value is not None}
    if "epochs" in given:
        given["epochs_stage1"] = given["epochs_stage3"] = given["epochs"]
    fields = TrainConfig.__dataclass_fields__.keys()
    return {name: value for name, value in given.items() if name in fields}


def config_of(options: argparse.Namespace) -> Any:
    """Returns the ``TrainConfig`` of the given options."""
    from ensembler.training.config import TrainConfig

    given = given_fields(options)
    if options.preset is not None:
        from ensembler.training import data
        from ensembler.training.presets import preset_options

        # What needs a bottleneck may be given without: that is then the preset's.
        squeezed = ("bottleneck", "encoder", "parties")
        plain = TrainConfig(**{name: value for name, value in given.items() if name not in squeezed})
        dataset = data.load(plain.data)
        chosen = preset_options(options.preset, plain.arch_spec(dataset.image_size, len(dataset.labels)))
        if plain.defense != "ensembler":
            chosen.pop("head_for", None)  # it has no place there, and nobody named it
        _refuse_idle(options.preset, chosen, given)
        given = chosen | given
    return TrainConfig(**given)


def _refuse_idle(preset: str, chosen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses an option that would do nothing, since the preset sets to 0 what it is a kind of."""
    for name, weight in KINDS_OF.items():
        if name in given and weight not in given and chosen.get(weight) == 0:
            option, missing = ("--" + each.replace("_", "-") for each in (name, weight))
            raise ConfigError(f"{option} does nothing here: --preset {preset} has {missing} 0; give {missing}, too")


def _refuse_beside_resume(options: argparse.Namespace) -> None:
    flags = {"stem_pool": "--no-stem-pool"}
    given = [
        flags.get(name, "--" + name.replace("_", "-"))
        for name, value in vars(options).items()
        if name not in NOT_OF_THE_RUN and value is not None
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: not with --resume, where every option comes from {options.resume / 'config.json'}; "
            "only --device, --jobs, --engine and --ray-address may be given"
        )
