"""The boundary of C2PI: the first layer of a net whose output tells an attack too little of the image.

Zhang et al., "C2PI", Algorithm 1. Layers before the boundary are to be computed in private (with cryptography in the
paper, on the device here), the others in the clear. The first phase goes from the tail to the head until an inference
data privacy attack (IDPA) reads the images; the second goes forward again until noise on the layer's output costs
little accuracy. Start reading at ``crypto_clear_boundary``; ``find_boundary`` has ``boundary_study`` measure what it
asks for.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ensembler.privacy.boundary_picture import draw
from ensembler.privacy.boundary_study import ATTACKS, STRONGEST, BoundaryOptions, Depth, Study
from ensembler.privacy.parts import write_whole
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.text import aligned
from ensembler.training.fit import Reporter, Silent
from ensembler.training.runs import RunFolder

VERSION = 1


@dataclass(frozen=True)
class Found:
    """What Algorithm 1 returns, as places among the layers; None is beyond the last.

    Attributes:
        potential: where the attack begins to fail for good.
        boundary: the first of those where noise costs little.
    """

    potential: int | None
    boundary: int | None


def crypto_clear_boundary(
    count: int,
    ssim_of: Callable[[int], float],
    drop_of: Callable[[int], float],
    ssim_threshold: float,
    max_drop: float,
) -> Found:
    """Algorithm 1 of C2PI, bounded at both ends, where the paper's may run off.

    Args:
        count: of the layers, from the image on.
        ssim_of: the attack's mean SSIM at a place; asked for from the last place on until the attack succeeds.
        drop_of: points of accuracy that noise costs there; asked for from the potential boundary on.
        ssim_threshold: an attack that reaches it succeeds.
        max_drop: a drop that is not above it is accepted.
    """
    succeeds = next((place for place in reversed(range(count)) if ssim_of(place) >= ssim_threshold), -1)
    potential = succeeds + 1
    if potential == count:
        return Found(None, None)
    return Found(potential, next((place for place in range(potential, count) if drop_of(place) <= max_drop), None))


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What ``find_boundary`` found.

    Attributes:
        boundary: the number of the last private layer, whose output may be sent; None: there is no boundary, all
            layers belong on the private side.
        potential: the number of the layer from which on the attack fails; None: it fails at none.
        words: the same in a sentence.
        accuracy: of the net without noise, in percent.
        noises: magnitudes of noise at the boundary and the accuracy with each, in percent; empty without a boundary.
        largest_noise: the largest of those up to which all keep the accuracy; None: none does, or no boundary.
        floor: SSIM of the attacker's mean image, which needs no features at all.
        depths: the layers from the image on.
        not_run: attacks that are impossible on this net, and why.
        options: as they were given.
        subject: the run, the net and the images.
        facts: command, date, machine.
    """

    boundary: float | None
    potential: float | None
    words: str
    accuracy: float
    noises: tuple[tuple[float, float], ...]
    largest_noise: float | None
    floor: float
    depths: tuple[Depth, ...]
    not_run: dict[str, str]
    options: BoundaryOptions
    subject: dict[str, Any]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns what the JSON file holds."""
        return {"version": VERSION, **asdict(self)}

    def _noise_words(self) -> list[str]:
        if self.largest_noise is None:
            return []
        words = (
            f"Noise of up to {self.largest_noise:g} there keeps the accuracy within "
            f"{self.options.max_accuracy_drop_points:g} points ({dict(self.noises)[self.largest_noise]:.2f}%)"
        )
        if self.largest_noise > self.options.noise_magnitude:
            words += f"; what attacks read then, --noise {self.largest_noise:g} measures"
        return [f"{words}."]

    def text(self) -> str:
        """Returns a table and the sentence, for people."""
        attacks = [name for name in ATTACKS if any(name in depth.ssim for depth in self.depths)]
        rows = [
            (
                "layer",
                "cut",
                "features",
                "bytes",
                "head MFLOPs",
                "share",
                "ms",
                *(f"{a} SSIM" for a in attacks),
                "acc. %",
            )
        ]
        for depth in self.depths:
            mark = " *" if depth.layer == self.boundary else ""
            rows.append(
                (
                    f"{depth.layer:g}{mark}",
                    depth.name,
                    "x".join(map(str, depth.feature_shape)),
                    str(depth.feature_bytes),
                    f"{depth.head_flops / 1e6:.2f}",
                    f"{100 * depth.head_share:.1f}%",
                    f"{depth.front_ms:.2f}",
                    *(f"{depth.ssim[a]:.3f}" if a in depth.ssim else "-" for a in attacks),
                    "-" if depth.accuracy is None else f"{depth.accuracy:.2f}",
                )
            )
        notes = [f"{name} was not run: {why}" for name, why in self.not_run.items()]
        return "\n".join(
            [
                *aligned(rows, left=3),
                "",
                f"without noise the accuracy is {self.accuracy:.2f}%; the mean image, with no features, reaches SSIM "
                f"{self.floor:.3f}",
                *notes,
                self.words,
                *self._noise_words(),
            ]
        )


def find_boundary(
    run_path: Path,
    out: Path,
    options: BoundaryOptions,
    *,
    data: str | None = None,
    device: torch.device | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> Boundary:
    """Searches the boundary of a plain net, and writes JSON and a picture.

    Args:
        run_path: a finished run with ``--defense none``.
        out: the JSON file; the picture is written beside it, ``.png``.
        options: see there.
        data: whose held-out images are used; None takes the run's.
        device: where the attacks compute.
        command: for the JSON.
        reporter: told of the progress.

    Raises:
        ConfigError: not a plain net, an unknown layer, or a place that cannot be written.
        DataError: too few images, other classes, or images of another size.
        AttackImpossibleError: the one attack that was asked for cannot be run on this net.
    """
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: give a name that ends in .json; the picture comes beside it")
    began = time.monotonic()
    run = RunFolder.open(run_path)
    study = Study(run, out, options, data, device or torch.device("cpu"), reporter or Silent())
    layers = study.layers
    found = crypto_clear_boundary(
        len(layers),
        study.highest_ssim,
        study.accuracy_drop,
        options.ssim_threshold,
        options.max_accuracy_drop_points,
    )
    if options.whole_curve:
        for place in range(len(layers)):
            study.highest_ssim(place)
            study.accuracy(place)
    boundary = Boundary(
        boundary=None if found.boundary is None else layers[found.boundary].number,
        potential=None if found.potential is None else layers[found.potential].number,
        words=_words(study, found),
        accuracy=study.plain_accuracy,
        noises=() if found.boundary is None else tuple(study.noise_curve(found.boundary)),
        largest_noise=None if found.boundary is None else study.largest_noise(found.boundary),
        floor=study.floor,
        depths=tuple(study.depth(place) for place in range(len(layers))),
        not_run=study.not_run,
        options=options,
        subject=study.subject,
        facts={
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} on "
            f"{torch.get_num_threads()} threads",
            "seconds": round(time.monotonic() - began, 1),
        },
    )
    write_whole(out, json.dumps(boundary.to_dict(), indent=1, ensure_ascii=False) + "\n")
    draw(boundary.to_dict(), out.with_suffix(".png"))
    return boundary


def _words(study: Study, found: Found) -> str:
    """Returns the outcome in a sentence or two."""
    options, layers = study.options, study.layers
    attack = "the strongest attack" if options.idpa == STRONGEST else options.idpa.upper()
    if found.potential is None:
        return (
            f"No boundary: {attack} reaches SSIM {study.highest_ssim(len(layers) - 1):.3f} at layer "
            f"{layers[-1].number:g}, the last one looked at, and {options.ssim_threshold:g} counts as read. All "
            "layers belong on the private side."
        )
    potential = layers[found.potential].number
    fails = f"{attack} stays below SSIM {options.ssim_threshold:g} from layer {potential:g} on"
    if found.potential == 0:
        fails += (
            ", the first one looked at; the attack may be too weak, so look at an earlier layer or give it more steps"
        )
    if found.boundary is None:
        return (
            f"No boundary: {fails}, but at each layer from there noise of {options.noise_magnitude:g} costs more "
            f"than {options.max_accuracy_drop_points:g} points of accuracy. All layers belong on the private side."
        )
    boundary = layers[found.boundary]
    return (
        f"Boundary: layer {boundary.number:g} ({boundary.cut.names[0]}). {fails[:1].upper()}{fails[1:]}; with "
        f"noise of {options.noise_magnitude:g} on the output of layer {boundary.number:g} the accuracy is "
        f"{study.accuracy(found.boundary):.2f}%, and {study.plain_accuracy:.2f}% without. Other attacks may see more."
    )
