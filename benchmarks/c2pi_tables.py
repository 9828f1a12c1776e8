"""C2PI's Figures 4 to 8 and Table I, cell by cell: attacks by depth, coefficients, noise, and the boundary; recorded.

    python benchmarks/c2pi_tables.py --data cifar10=SPEC [--data cifar100=SPEC] [--scale small] [--cell NAME]...

A cell is one net on one data set under one noise and one kind of coefficients. Its net is trained unless a run is
there, and ``ensembler boundary`` measures it, stage by stage of its scale; a cell that was stopped goes on when the
same command is given again. The last stage's JSON and picture lie in ``out/c2pi/SCALE/``, and a picture that compares
cells where there are several. Figures are recorded after each stage, from the cells with the paper's own noise and
coefficients. Scale ``small`` is for one core; ``paper`` has all the paper's nets and data sets, and wants a GPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from product import trained

from ensembler.cli.console import Console, ProgressReporter
from ensembler.privacy.boundary import Boundary, find_boundary
from ensembler.privacy.boundary_picture import draw_side_by_side
from ensembler.privacy.boundary_study import STRONGEST, BoundaryOptions
from ensembler.privacy.decoder import Effort
from ensembler.training.fit import pick_device

THRESHOLDS = (0.2, 0.3)
NOISE = 0.1
SHOWN = 7.0  # the layer of which the paper gives differences
PAPER_BOUNDARIES = {  # Table I
    "cifar10": {"alexnet": (5, 4), "vgg16": (13.5, 9), "vgg19": (11, 9)},
    "cifar100": {"alexnet": (5, 5), "vgg16": (13.5, 10), "vgg19": (11, 9)},
}

Stage = tuple[str, tuple[float, ...] | None]  # attack, or the strongest; layers, or None for all


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of the paper is measured.

    Attributes:
        data: names of data sets.
        nets: architectures.
        training: options of ``ensembler train``.
        stages: of the cells with the paper's noise and coefficients, in this order.
        noises: further magnitudes of the noise, of VGG16 (Figs. 6, 7).
        coefficients: further kinds, of VGG16 (Fig. 5).
        images: judged.
        steps: of each attack, at most.
    """

    data: tuple[str, ...]
    nets: tuple[str, ...]
    training: tuple[str, ...]
    stages: tuple[Stage, ...]
    noises: tuple[float, ...]
    coefficients: tuple[str, ...]
    images: int
    steps: int


_SMALL_LAYERS = (1.0, 3.0, 5.0, SHOWN, 8.5, 9.0, 10.0, 11.0, 13.0)
SCALES = {
    "small": Scale(
        data=("cifar10",),
        nets=("vgg16",),
        training=("--epochs", "4", "--batch-size", "64", "--learning-rate", "0.05"),
        stages=((STRONGEST, (SHOWN,)), ("dina", _SMALL_LAYERS), ("eina", _SMALL_LAYERS), (STRONGEST, _SMALL_LAYERS)),
        noises=(),
        coefficients=(),
        images=300,
        steps=250,
    ),
    "paper": Scale(
        data=("cifar10", "cifar100"),
        nets=("alexnet", "vgg16", "vgg19"),
        training=("--epochs", "150"),
        stages=((STRONGEST, None),),
        noises=(0.0, 0.2, 0.3, 0.4, 0.5),
        coefficients=("c2",),
        images=1000,
        steps=10_000,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One net on one data set, attacked under one noise.

    Attributes:
        scale: a key of ``SCALES``.
        data: its name.
        net: its architecture.
        noise: its magnitude.
        scheme: of DINA's coefficients.
        stages: what is measured of it.
    """

    scale: str
    data: str
    net: str
    stages: tuple[Stage, ...]
    noise: float = NOISE
    scheme: str = "c1"

    @property
    def name(self) -> str:
        """As on the command line, and of its files."""
        parts = [self.data, self.net]
        if self.noise != NOISE:
            parts.append(f"noise_{self.noise:g}")
        if self.scheme != "c1":
            parts.append(self.scheme)
        return "-".join(parts)

    @property
    def is_main(self) -> bool:
        """Whether it has the noise and the coefficients of the paper's experiments."""
        return self.noise == NOISE and self.scheme == "c1"

    def measure(self, spec: str, options: argparse.Namespace) -> Iterator[Boundary]:
        """Yields what each stage finds at each threshold; the last one's files stay.

        Args:
            spec: of the data.
            options: of the command line.
        """
        scale = SCALES[self.scale]
        run = options.runs / self.scale / f"{self.data}-{self.net}"
        trained(
            run, "--data", spec, "--arch", self.net, "--defense", "none", "--device", options.device, *scale.training
        )
        for attack, layers in self.stages:
            for threshold in THRESHOLDS:
                yield find_boundary(
                    run,
                    folder(self.scale) / f"{self.name}.json",
                    BoundaryOptions(
                        ssim_threshold=threshold,
                        noise_magnitude=self.noise,
                        idpa=attack,
                        layers=layers,
                        images=scale.images,
                        effort=Effort(steps=scale.steps, ssim_weight=0.0),
                        scheme=self.scheme,
                    ),
                    device=pick_device(options.device),
                    command=command(),
                    reporter=ProgressReporter(Console(as_json=False)),
                )

    def figures(self, found: Boundary) -> list[dict[str, Any]]:
        """Returns what is recorded of a stage: each attack at the shown layer, DINA's and the strongest's boundary."""
        mark = ("" if self.data == "cifar10" else f"_{self.data}") + ("" if self.scale == "small" else f"_{self.scale}")
        options = found.options
        how = (
            f"{self.data}, {self.net} with half the channels, accuracy {found.accuracy:.2f}%; "
            f"{found.subject['judged']} images (MLA: at most 100), {options.effort.steps} steps at most, noise "
            f"{options.noise_magnitude:g}; the mean image reaches {found.floor:.3f}"
        )
        figures = [
            results.figure(f"{attack}_ssim_{self.net}_layer{depth.layer:g}{mark}", value, "ssim", "", how)
            for depth in found.depths
            if depth.layer == SHOWN
            for attack, value in depth.ssim.items()
        ]
        # Of a single layer a search says nothing.
        if options.idpa in ("dina", STRONGEST) and found.boundary is not None and len(found.depths) > 1:
            paper = PAPER_BOUNDARIES[self.data][self.net][THRESHOLDS.index(options.ssim_threshold)]
            layers = ", ".join(f"{depth.layer:g}" for depth in found.depths)
            accuracy = next(depth.accuracy for depth in found.depths if depth.layer == found.boundary)
            suffix = mark if options.idpa == "dina" else f"_{STRONGEST}{mark}"
            figures.append(
                results.figure(
                    f"boundary_{self.net}_ssim_{options.ssim_threshold:g}{suffix}",
                    found.boundary,
                    "layer",
                    "",
                    f"{options.idpa}; the paper: {paper:g}; looked at {layers}; accuracy there with noise "
                    f"{accuracy:.2f}%; {how}",
                )
            )
        return figures


def cells(name: str) -> list[Cell]:
    """Returns the cells of a scale."""
    scale = SCALES[name]
    found = []
    for data in scale.data:
        found += [Cell(scale=name, data=data, net=net, stages=scale.stages) for net in scale.nets]
        dina: tuple[Stage, ...] = (("dina", None),)
        found += [Cell(scale=name, data=data, net="vgg16", stages=dina, noise=noise) for noise in scale.noises]
        found += [Cell(scale=name, data=data, net="vgg16", stages=dina, scheme=kind) for kind in scale.coefficients]
    return found


def folder(scale: str) -> Path:
    """Returns where a scale's files lie."""
    return Path("out/c2pi") / scale


def command() -> str:
    """Returns what was typed."""
    return shlex.join(["python", "benchmarks/c2pi_tables.py", *sys.argv[1:]])


def pair(text: str) -> tuple[str, str]:
    """Reads ``NAME=SPEC``."""
    name, separator, spec = text.partition("=")
    if not separator or name not in PAPER_BOUNDARIES:
        raise argparse.ArgumentTypeError(f"{text}: give {' or '.join(f'{known}=SPEC' for known in PAPER_BOUNDARIES)}")
    return name, spec


def compare(documents: Mapping[str, dict[str, Any]], scale: str) -> None:
    """Draws the cells of each data set's VGG16 beside each other, where there are several (Figs. 5 to 7)."""
    for data in SCALES[scale].data:
        mine = {name: document for name, document in documents.items() if name.startswith(f"{data}-vgg16")}
        if len(mine) > 1:
            draw_side_by_side(mine, folder(scale) / f"{data}-compared.png")


def main() -> None:
    """Measures what is missing, and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", action="append", type=pair, required=True, metavar="NAME=SPEC")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--cell", action="append", help="these alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/c2pi"))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    specs = dict(options.data)
    folder(options.scale).mkdir(parents=True, exist_ok=True)
    documents = {}
    for cell in cells(options.scale):
        if cell.data not in specs or (options.cell and cell.name not in options.cell):
            continue
        print(cell.name)
        for found in cell.measure(specs[cell.data], options):
            print(found.text())
            documents[cell.name] = found.to_dict()
            if cell.is_main:
                results.record("audit", cell.figures(found), command=command(), seed=found.options.seed)
    compare(documents, options.scale)


if __name__ == "__main__":
    main()
