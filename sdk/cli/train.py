"""``ensembler train``: the three stages, or a baseline, into a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ensembler.cli.console import Console, ProgressReporter, need_torch

NAME = "train"
HELP = "train N nets, draw the secret selector, train the client (Ensembler, three stages)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; the defaults are ``TrainConfig``'s."""
    parser.add_argument(
        "--data", required=True, help="demo, cifar10:PATH, cifar100:PATH, folder:PATH or npz:TRAIN,TEST"
    )
    parser.add_argument("--out", type=Path, required=True, help="the run folder to make")
    parser.add_argument(
        "--arch",
        default="resnet18",
        help="resnet18, another name that ensembler cuts lists, or package.module:function",
    )
    parser.add_argument("--head-end", default=None, help="the last part on the device; ensembler cuts ARCH lists them")
    parser.add_argument("--tail-start", default=None, help="the first part that is on the device again")
    parser.add_argument(
        "--bottleneck", type=_bottleneck, default=None, metavar="K,S,B", help="at the cut: channels,stride,bits"
    )
    parser.add_argument("-N", "--num-nets", type=int, default=10, help="server nets (default: 10)")
    parser.add_argument("-P", "--num-selected", type=int, default=4, help="nets that count (default: 4)")
    parser.add_argument("--defense", default="ensembler", help="ensembler, or a baseline: single, none")
    parser.add_argument("--no-stem-pool", action="store_true", help="no max-pool in the head (the paper's CIFAR-100)")
    parser.add_argument("--noise-std", type=float, default=0.1, help="standard deviation of the noise (default: 0.1)")
    parser.add_argument("--noise-mode", default="fixed", help="fixed as in the paper, or fresh for every image")
    parser.add_argument("--reg-weight", type=float, default=0.1, help="lambda of Eq. 3 (default: 0.1)")
    parser.add_argument("--reg-over", default="all", help="maximum of Eq. 3 over all heads, or the selected ones")
    parser.add_argument(
        "--wire-bits", type=_bits, default=8, help="of a feature's code on the wire: 8, 4, 3, 2 or auto (default: 8)"
    )
    parser.add_argument("--answer-bits", type=int, default=8, help="of an answer's code: 8 or 4 (default: 8)")
    parser.add_argument("--epochs", type=int, default=None, help="of both stages")
    parser.add_argument("--epochs-stage1", type=int, default=30, help="(default: 30)")
    parser.add_argument("--epochs-stage3", type=int, default=30, help="(default: 30)")
    parser.add_argument("--batch-size", type=int, default=128, help="(default: 128)")
    parser.add_argument(
        "--learning-rate", type=float, default=0.1, help="peak of the one-cycle schedule (default: 0.1)"
    )
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="(default: 0.0005)")
    parser.add_argument("--seed", type=int, default=0, help="of stage 1; the selector has no seed (default: 0)")
    parser.add_argument("--train-limit", type=int, default=None, help="use only the first images of the data")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--stage1", type=Path, default=None, help="reuse stage 1 of this run: a further client for its server"
    )


def _bits(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _bottleneck(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(options: argparse.Namespace, console: Console) -> int:
    """Trains."""
    need_torch()
    from ensembler.training.config import TrainConfig
    from ensembler.training.stages import train

    config = TrainConfig(
        data=options.data,
        arch=options.arch,
        stem_pool=not options.no_stem_pool,
        head_end=options.head_end,
        tail_start=options.tail_start,
        bottleneck=options.bottleneck,
        defense=options.defense,
        num_nets=options.num_nets,
        num_selected=options.num_selected,
        noise_std=options.noise_std,
        noise_mode=options.noise_mode,
        reg_weight=options.reg_weight,
        reg_over=options.reg_over,
        wire_bits=options.wire_bits,
        answer_bits=options.answer_bits,
        epochs_stage1=options.epochs_stage1 if options.epochs is None else options.epochs,
        epochs_stage3=options.epochs_stage3 if options.epochs is None else options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        seed=options.seed,
        train_limit=options.train_limit,
        device=options.device,
    )
    summary = train(config, options.out, stage1_from=options.stage1, reporter=ProgressReporter(console))
    text = (
        f"{options.out}: accuracy {summary['accuracy_wire']:.2f}% through the quantised wire, "
        f"{summary['accuracy_float']:.2f}% in float, on {summary['test_images']} held-out images\n"
        f"next: ensembler-export {options.out} --out bundles"
    )
    console.result({"run": str(options.out), **summary}, text)
    return 0
