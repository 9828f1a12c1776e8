"""Pictures of a finished run, drawn from its own files: ``plan.png``, ``curves.png`` and ``confusion.png``.

They show losses, accuracies and class names; nothing in them depends on which nets the selector names.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import MissingExtraError
from ensembler.training.runs import CONFUSION_FILE, NOISE_STAGE, TAIL_STAGE, RunFolder

PLAN_PICTURE = "plan.png"
CURVES_FILE = "curves.png"
CONFUSION_PICTURE = "confusion.png"
COUNTED_CLASSES = 20  # more classes leave no room for numbers in the cells
NAMED_CLASSES = 100  # more classes leave no room for every name
NAME_CHARACTERS = 24
MEAN, ONE, HELD_OUT = "#1f4e79", "#9db7d1", "#c44e00"

log = logging.getLogger(__name__)


def draw(path: Path) -> list[Path]:
    """Draws what a finished run's files tell; a picture that fails costs a line in the log, never the run.

    Args:
        path: the run folder.

    Returns:
        The pictures that were written.
    """
    run = RunFolder(path)
    drawn = []
    for name, figure_of in ((PLAN_PICTURE, _plan), (CURVES_FILE, _curves), (CONFUSION_PICTURE, _confusion)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a class name in a script that the font does not have
                save_picture(figure_of(run), path / name)
            drawn.append(path / name)
        except Exception as error:
            log.warning("%s could not be drawn (%s); the run itself is complete", path / name, error)
    return drawn


def blank_figure(width: float, height: float) -> Any:
    """Returns an empty figure of the size in inches; no window, no global state of pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train", "drawing") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_picture(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all, for its owner alone."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format="png", dpi=150)
        temporary.chmod(0o600)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plan(run: RunFolder) -> Any:
    """A bar of training steps for each net, the client and its noise, in the order in which they were trained."""
    config, summary = run.config, run.read_json("summary.json")
    per_epoch = -(-int(summary["train_images"]) // config.batch_size)
    first, last = config.epochs_stage1 * per_epoch, config.epochs_stage3 * per_epoch
    nets, pieces = config.trained_nets, config.stage1_pieces
    rows = [f"net {index + 1}" for index in range(pieces)] if pieces == nets else [f"{nets} nets"]
    learned = ["noise"] if config.noise == "learned" else []
    client = ["head", "tail"] if config.epochs_of_tail else ["client"]
    late = [*client, *learned] if config.is_ensemble else []
    rows += [] if config.is_ensemble else learned
    steps = [first] * pieces + [last] * (len(rows) - pieces)
    fixed = sum(steps)
    steps += [config.epochs_of_tail * per_epoch if row == "tail" else last for row in late]
    figure = blank_figure(9.0, min(2.2 + 0.28 * (nets + 1), 12.0))
    axis = figure.subplots()
    for index, row in enumerate([*rows, *late]):
        axis.barh([row], [steps[index]], left=[sum(steps[:index])], color=ONE if index < pieces else MEAN)
    rows += late
    axis.axvline(fixed, color=HELD_OUT, linestyle="--")
    axis.text(fixed, -0.7, "wire fixed, then the selector drawn ", ha="right", color=HELD_OUT, fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -1.1)  # the first net on top, and room for the text above it
    axis.tick_params(axis="y", labelsize=9 if nets <= 32 else 4)
    long = [row for row in rows[pieces:] if row != "tail"]
    axis.set_xlabel(
        f"training steps of {config.batch_size} images: {config.epochs_stage1} epochs a net"
        + (f", {config.epochs_stage3} for {' and '.join(long)}" if long else "")
        + (f", {config.epochs_of_tail} for the tail" if "tail" in rows else "")
    )
    shape = "x".join(map(str, summary["feature_shape"]))
    cut = f" cut after {config.head_end}" if config.head_end else ""
    wire = run.read_wire().spec
    title = f"{config.arch}{cut}: {nets} net{'s' if nets > 1 else ''}"
    title += f", {summary['num_selected']} of them selected" if late else f" ({config.defense})"
    axis.set_title(f"{title}\nfeatures {shape} in {wire.feature_codec.bits} bits: {wire.bytes_up} bytes an image")
    return figure


def _curves(run: RunFolder) -> Any:
    """Loss above, accuracy below; stage 1 on the left, then stage 3, then learned noise."""
    records = run.read_metrics()
    after_head = run.config.epochs_of_tail > 0
    titles = {
        3: "stage 3: the client's head" if after_head else "stage 3: the client",
        TAIL_STAGE: "stage 3: the client's tail",
        NOISE_STAGE: "the noise",
    }
    stages = [stage for stage in (1, *titles) if any(r.get("stage") == stage and "epoch" in r for r in records)]
    figure = blank_figure(5.0 * len(stages), 6.0)
    axes = figure.subplots(2, len(stages), squeeze=False, sharex="col", sharey="row")
    for column, stage in enumerate(stages):
        epochs = [record for record in records if record.get("stage") == stage and "epoch" in record]
        nets = sorted({record.get("net", 0) for record in epochs})
        for row, key in enumerate(("loss", "train_accuracy")):
            lines = [_series(epochs, net, key) for net in nets]
            _lines(axes[row, column], lines, "each net" if stage == 1 else "")
        if stage == 1:
            held_out = [record["test_accuracy"] for record in records if "test_accuracy" in record]
            last = max(record["epoch"] for record in epochs)
            axes[1, column].plot([last] * len(held_out), held_out, "x", color=HELD_OUT, label="held-out images")
        else:
            summary: dict[str, Any] = next((record["summary"] for record in records if "summary" in record), {})
            if "accuracy_wire" in summary:
                axes[1, column].axhline(
                    summary["accuracy_wire"], color=HELD_OUT, linestyle="--", label="held-out images, through the wire"
                )
        count = run.config.trained_nets
        axes[0, column].set_title(titles.get(stage, f"stage 1: {count} net{'s' if count > 1 else ''}"))
        axes[1, column].set_xlabel("epoch")
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("accuracy, %")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, frameon=False)
    return figure


def _series(epochs: list[dict[str, Any]], net: int, key: str) -> tuple[list[int], list[float]]:
    mine = [record for record in epochs if record.get("net", 0) == net]
    return [record["epoch"] for record in mine], [record[key] for record in mine]


def _lines(axis: Any, lines: list[tuple[list[int], list[float]]], each: str) -> None:
    """One line for each net, thin, and their mean, thick."""
    if len(lines) > 1:
        for index, (x, y) in enumerate(lines):
            axis.plot(x, y, color=ONE, linewidth=1, label=each if index == 0 else None)
    x, mean = lines[0][0], np.mean([y for _, y in lines], axis=0)
    axis.plot(x, mean, "o-", color=MEAN, markersize=3, linewidth=2, label="mean" if len(lines) > 1 else "train images")


def _confusion(run: RunFolder) -> Any:
    """Rows are the true classes, in percent of their images."""
    counts: npt.NDArray[np.int64] = np.asarray(run.read_json(CONFUSION_FILE)["counts"], np.int64)
    classes = len(counts)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3.5 + 0.5 * classes, 9.0) if classes <= COUNTED_CLASSES else 14.0
    figure = blank_figure(side + 1, side)
    axis = figure.subplots()
    # The faint off-diagonal cells are what one looks for, so the colours rise fast from zero.
    picture = axis.imshow(np.sqrt(share / 100), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(picture, ax=axis, shrink=0.8, ticks=np.sqrt([0, 0.01, 0.05, 0.2, 0.5, 1]))
    bar.ax.set_yticklabels(["0", "1", "5", "20", "50", "100"])
    bar.set_label("% of the true class")
    every = -(-classes // NAMED_CLASSES)
    shown = list(range(0, classes, every))
    names = [run.labels[i][:NAME_CHARACTERS] for i in shown]
    size = 10 if classes <= COUNTED_CLASSES else 6
    axis.set_xticks(shown, names, rotation=90, fontsize=size)
    axis.set_yticks(shown, names, fontsize=size)
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        label.set_parse_math(False)  # a class may be called "$5"
    if classes <= COUNTED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 30 else "black"
                axis.text(column, row, str(count), ha="center", va="center", fontsize=9, color=colour)
    accuracy = 100 * np.trace(counts) / max(int(counts.sum()), 1)
    axis.set_title(f"{accuracy:.2f}% of {counts.sum()} held-out images, through the quantised wire")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    return figure
