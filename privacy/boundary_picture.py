"""Pictures of boundaries: SSIM and accuracy over the layers; curves alone, no image.

Of one net they are as C2PI's Figures 4 and 8; of several searches beside each other, as its Figures 5 to 7.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ensembler.training.plots import HELD_OUT, MEAN, blank_figure, save_picture

STYLES = {"ina": "#9db7d1", "eina": "#4f8ad0", "dina": MEAN, "mla": "#6b737c"}

log = logging.getLogger(__name__)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draws a boundary; a picture that fails costs a line in the log, never the search.

    Args:
        document: of ``Boundary.to_dict``.
        path: a ``.png`` file.
    """
    _save(lambda: _picture(document), path)


def draw_side_by_side(documents: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws several boundaries, each with the highest SSIM of its attacks; fails as ``draw`` does.

    Args:
        documents: of ``Boundary.to_dict``, by what the legend calls them.
        path: a ``.png`` file.
    """
    _save(lambda: _compared(documents), path)


def _save(picture: Callable[[], Any], path: Path) -> None:
    try:
        save_picture(picture(), path)
    except Exception as error:
        log.warning("%s could not be drawn (%s); the boundary itself is written", path, error)


def _compared(documents: Mapping[str, Mapping[str, Any]]) -> Any:
    figure = blank_figure(8.0, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, document in documents.items():
        attacked = [(depth["layer"], max(depth["ssim"].values())) for depth in document["depths"] if depth["ssim"]]
        tested = [(depth["layer"], depth["accuracy"]) for depth in document["depths"] if depth["accuracy"] is not None]
        for axis, points in ((upper, attacked), (lower, tested)):
            axis.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=3, label=name)
    upper.set_ylabel("highest SSIM of the attacks")
    lower.set_ylabel("accuracy with noise, %")
    lower.set_xlabel("layer")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    upper.legend(fontsize=8, frameon=False)
    return figure


def _picture(document: Mapping[str, Any]) -> Any:
    depths, options = document["depths"], document["options"]
    figure = blank_figure(max(6.0, min(2.5 + 0.35 * len(depths), 16.0)), 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for attack, colour in STYLES.items():
        points = [(place, depth["ssim"][attack]) for place, depth in enumerate(depths) if attack in depth["ssim"]]
        if points:
            upper.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=attack)
    upper.axhline(options["ssim_threshold"], color=HELD_OUT, linestyle="--", label="threshold")
    upper.axhline(document["floor"], color="grey", linestyle=":", label="mean image")
    upper.set_ylabel("SSIM of the attack")
    points = [(place, depth["accuracy"]) for place, depth in enumerate(depths) if depth["accuracy"] is not None]
    if points:
        lower.plot(*zip(*points, strict=True), "o-", color=MEAN, markersize=3, label="with noise")
    lower.axhline(document["accuracy"], color="grey", linestyle=":", label="without noise")
    least = document["accuracy"] - options["max_accuracy_drop_points"]
    lower.axhline(least, color=HELD_OUT, linestyle="--", label="least accepted")
    lower.set_ylabel("accuracy, %")
    lower.set_xlabel("layer")
    numbers = [depth["layer"] for depth in depths]
    lower.set_xticks(range(len(depths)), [f"{number:g}" for number in numbers], fontsize=8)
    for axis in (upper, lower):
        if document["boundary"] is not None:
            axis.axvline(numbers.index(document["boundary"]), color=HELD_OUT, linewidth=1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    found = "no boundary" if document["boundary"] is None else f"boundary: layer {document['boundary']:g}"
    upper.set_title(f"{document['subject']['arch']}, {options['idpa']}; {found}")
    return figure
