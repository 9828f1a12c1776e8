"""C2PI, Table I and Figures 4 to 8: attacks by depth, DINA's coefficients, noise, and the boundary.

A cell is one net on one data set, under one noise and one kind of coefficients. The net is trained with the command
line, and measured by ``ensembler boundary`` stage by stage; a stage that was stopped goes on at the layer where it was.
Figures of the cells with the paper's noise and coefficients are recorded in ``docs/results/audit.json``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from paper_cells import Cell, Document, Setting, table
from product import trained

from ensembler.cli.console import Console, ProgressReporter
from ensembler.privacy.boundary import Boundary, find_boundary
from ensembler.privacy.boundary_picture import draw_side_by_side
from ensembler.privacy.boundary_study import STRONGEST, BoundaryOptions
from ensembler.privacy.decoder import Effort
from ensembler.training.fit import pick_device

THRESHOLDS = (0.2, 0.3)
NOISE, SCHEME = 0.1, "c1"
SHOWN = 7.0  # the layer of which the paper gives differences
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}

Stage = tuple[str, tuple[float, ...] | None]  # an attack, or the strongest of all; layers, or None for every one


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of the paper is measured.

    Attributes:
        data: names of data sets.
        nets: architectures.
        training: options of ``ensembler train``.
        stages: of the cells with the paper's noise and coefficients, in this order.
        noises: further magnitudes of the noise, for VGG16 (Figs. 6, 7).
        schemes: further kinds of coefficients, for VGG16 (Fig. 5).
        images: judged.
        steps: of each attack, at most.
        words: for the document.
    """

    data: tuple[str, ...]
    nets: tuple[str, ...]
    training: tuple[str, ...]
    stages: tuple[Stage, ...]
    noises: tuple[float, ...]
    schemes: tuple[str, ...]
    images: int
    steps: int
    words: str


_COARSE = (5.0, SHOWN, 8.0, 9.0, 11.0)
_FINE = (1.0, 3.0, 5.0, SHOWN, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0, 10.5, 11.0, 13.0)
SCALES = {
    "small": Scale(
        data=("cifar10",),
        nets=("vgg16",),
        training=("--epochs", "4", "--batch-size", "64", "--learning-rate", "0.05"),
        stages=(
            (STRONGEST, (SHOWN,)),
            ("dina", _COARSE),
            ("eina", _COARSE),
            ("mla", _COARSE),
            *((attack, _FINE) for attack in ("dina", "eina", "mla", STRONGEST)),
        ),
        noises=(),
        schemes=(),
        images=300,
        steps=250,
        words="VGG16, half of the channels, 4 epochs; 250 steps of each attack, 300 images judged (MLA: 100)",
    ),
    "paper": Scale(
        data=("cifar10", "cifar100"),
        nets=("alexnet", "vgg16", "vgg19"),
        training=("--epochs", "150"),
        stages=((STRONGEST, None), ("dina", None), ("eina", None), ("mla", None)),
        noises=(0.0, 0.2, 0.3, 0.4, 0.5),
        schemes=("c2",),
        images=1000,
        steps=10_000,
        words="half of the channels, 150 epochs; 10,000 steps of each attack at most, 1,000 images judged (MLA: 100)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Curve(Cell):
    """One net on one data set, attacked at several depths under one noise.

    Attributes:
        net: its architecture.
        stages: what is measured.
        noise: its magnitude.
        scheme: of DINA's coefficients.
    """

    net: str
    stages: tuple[Stage, ...]
    noise: float = NOISE
    scheme: str = SCHEME

    def missing(self, setting: Setting, stored: Document) -> list[str]:  # noqa: ARG002 (the attacks are the stages')
        """See ``Cell``."""
        return [_words(stage) for stage in self.stages if _words(stage) not in stored.get("stages", {})]

    def run(self, setting: Setting, stored: Document) -> None:
        """See ``Cell``."""
        began = time.monotonic()
        data = ("--data", setting.data[self.data], "--device", setting.device)
        run = trained(
            setting.runs / f"c2pi-{self.scale}-{self.data}-{self.net}",
            *data,
            *("--arch", self.net, "--defense", "none", *SCALES[self.scale].training),
        )
        stored = {"stages": {}, "depths": {}, "boundaries": {}} | stored
        for stage in self.stages:
            if _words(stage) in stored["stages"]:
                continue
            for threshold in THRESHOLDS:
                found = self._found(stage, threshold, run, setting)
                _merge(stored, found)
                if self.noise == NOISE and self.scheme == SCHEME:
                    command = f"python benchmarks/paper_tables.py --scale {self.scale} --cell {self.name}"
                    given = f" --data {self.data}={setting.data[self.data]}"
                    results.record("audit", self._figures(found), command=command + given, seed=found.options.seed)
            now = time.monotonic()
            stored["stages"][_words(stage)] = round(now - began, 1)
            began = now
            self.store(stored)
        _compare(self.data, self.scale, setting)

    def _found(self, stage: Stage, threshold: float, run: Path, setting: Setting) -> Boundary:
        attack, layers = stage
        scale = SCALES[self.scale]
        reporter = ProgressReporter(Console(as_json=False))
        try:
            return find_boundary(
                run,
                setting.runs / f"{self.name}.json",
                BoundaryOptions(
                    ssim_threshold=threshold,
                    noise_magnitude=self.noise,
                    idpa=attack,
                    layers=layers,
                    images=scale.images,
                    effort=Effort(steps=scale.steps, ssim_weight=0.0),
                    scheme=self.scheme,
                ),
                device=pick_device(setting.device),
                reporter=reporter,
            )
        finally:
            reporter.close()

    def _figures(self, found: Boundary) -> list[dict[str, Any]]:
        """Returns what is recorded: each attack at the shown layer, and where DINA and the strongest fail."""
        mark = ("" if self.data == "cifar10" else f"_{self.data}") + ("" if self.scale == "small" else f"_{self.scale}")
        options = found.options
        how = (
            f"{DATA[self.data]}, {self.net} with half the channels, accuracy {found.accuracy:.2f}%; "
            f"{found.subject['judged']} images judged (MLA: 100), {options.effort.steps} steps at most, noise "
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
            layers = ", ".join(f"{depth.layer:g}" for depth in found.depths)
            name = f"boundary_{self.net}_ssim_{options.ssim_threshold:g}"
            figures.append(
                results.figure(
                    name + ("" if options.idpa == "dina" else f"_{STRONGEST}") + mark,
                    found.boundary,
                    "layer",
                    "",
                    f"{options.idpa}; looked at layers {layers}; {how}",
                )
            )
        return figures


def _words(stage: Stage) -> str:
    attack, layers = stage
    return f"{attack} at {'all layers' if layers is None else ', '.join(f'{layer:g}' for layer in layers)}"


def _merge(stored: Document, found: Boundary) -> None:
    """Adds to a cell's document what a search found."""
    options = found.options
    stored |= {"accuracy": found.accuracy, "floor": round(found.floor, 4), "seed": options.seed}
    stored |= {"options": {"noise": options.noise_magnitude, "scheme": options.scheme, "steps": options.effort.steps}}
    stored |= {"images": {name: found.subject[name] for name in ("judged", "auxiliary", "tested")}}
    for depth in found.depths:
        known = stored["depths"].setdefault(f"{depth.layer:g}", {"ssim": {}, "accuracy": None})
        known["ssim"] |= depth.ssim
        if depth.accuracy is not None:
            known["accuracy"] = depth.accuracy
    if len(found.depths) > 1:
        where = stored["boundaries"].setdefault(options.idpa, {})
        where[f"{options.ssim_threshold:g}"] = {"potential": found.potential, "boundary": found.boundary}


def _compare(data: str, scale: str, setting: Setting) -> None:
    """Draws the VGG16 cells of a data set beside each other, where there are several (Figs. 5 to 7)."""
    found = {
        f"noise {cell.noise:g}, {cell.scheme}": cell.read()
        for cell in cells()
        if (cell.scale, cell.data, cell.net) == (scale, data, "vgg16") and cell.read()
    }
    if len(found) > 1:
        documents = {
            name: {
                "depths": [{"layer": float(layer), **depth} for layer, depth in _by_layer(document)],
            }
            for name, document in found.items()
        }
        draw_side_by_side(documents, setting.runs / f"c2pi-{scale}-{data}-compared.png")


def _by_layer(document: Document) -> list[tuple[str, Document]]:
    return sorted(document["depths"].items(), key=lambda item: float(item[0]))


def cells() -> list[Curve]:
    """Returns all cells, the plain ones of a scale first."""
    found = []
    for name, scale in SCALES.items():
        dina: tuple[Stage, ...] = (("dina", None),)
        for data in scale.data:
            for net in scale.nets:
                tables = ("c2pi-1", "c2pi-8", *(("c2pi-4",) if net == "vgg16" else ()))
                found.append(_curve(name, data, net, scale.stages, tables=tables))
            for noise in scale.noises:
                found.append(_curve(name, data, "vgg16", dina, tables=("c2pi-6", "c2pi-7"), noise=noise))
            for scheme in scale.schemes:
                found.append(_curve(name, data, "vgg16", dina, tables=("c2pi-5",), scheme=scheme))
    return found


def _curve(
    scale: str,
    data: str,
    net: str,
    stages: tuple[Stage, ...],
    *,
    tables: tuple[str, ...],
    noise: float = NOISE,
    scheme: str = SCHEME,
) -> Curve:
    parts = ["c2pi", scale, data, net]
    parts += [f"noise_{noise:g}"] if noise != NOISE else []
    parts += [scheme] if scheme != SCHEME else []
    return Curve(
        name="-".join(parts),
        scale=scale,
        tables=tables,
        data=data,
        net=net,
        stages=stages,
        noise=noise,
        scheme=scheme,
    )


# --- the document ---

# Table I: accuracy of the whole net, then boundary and accuracy there for each threshold.
TABLE_1 = {
    "cifar10": {
        "alexnet": (81.56, (5, 81.97), (4, 79.32)),
        "vgg16": (92.33, (13.5, 92.61), (9, 92.49)),
        "vgg19": (92.38, (11, 92.66), (9, 92.42)),
    },
    "cifar100": {
        "alexnet": (45.66, (5, 45.36), (5, 45.36)),
        "vgg16": (68.44, (13.5, 68.44), (10, 66.53)),
        "vgg19": (69.54, (11, 67.3), (9, 67.06)),
    },
}
# Section IV-A, VGG16: DINA's SSIM above MLA's and EINA's at layer 7; from where each attack fails, threshold 0.3.
ABOVE = {"cifar10": {"mla": 0.229, "eina": 0.108}, "cifar100": {"mla": 0.205, "eina": 0.145}}
FAILS = {"cifar10": {"mla": 7.5, "eina": 8.5, "dina": 9.0}, "cifar100": {"mla": 7.5, "eina": 9.5, "dina": 10.0}}

NOTES = """
- Layer L is the L-th convolution, L.5 the ReLU after it. Ours are looked for among the layers of the curve below alone.
- "strongest" takes the best of DINA, EINA, INA and MLA at each layer. Where it lies later than DINA's, DINA's is not
  safe.
- The paper's curves are drawn, not printed: beside ours stand the numbers in its text (Section IV-A)."""


def section(found: Mapping[str, Document]) -> list[str]:
    """See ``paper_cells.Group``."""
    lines = ["## C2PI, Table I and Figures 4 to 8", NOTES]
    for scale, of in SCALES.items():
        lines += ["", f"### Scale {scale}", "", f"{of.words}.", ""]
        mine = {cell.name: cell for cell in cells() if cell.scale == scale}
        rows = [
            _row(cell, found.get(cell.name, {}))
            for cell in mine.values()
            if cell.noise == NOISE and cell.scheme == SCHEME
        ]
        lines += table(HEADER, rows)
        for name, cell in mine.items():
            lines += _curve_lines(cell, found[name]) if name in found else []
    return lines


HEADER = (
    *("net", "paper: accuracy %", "0.2: layer", "accuracy %", "0.3: layer", "accuracy %"),
    *("ours: accuracy %", "0.2: layer", "accuracy %", "strongest", "0.3: layer", "accuracy %", "strongest"),
)


def _row(cell: Curve, document: Document) -> list[str]:
    whole, *at = TABLE_1[cell.data][cell.net]
    paper = [f"{whole:.2f}", *(text for layer, accuracy in at for text in (f"{layer:g}", f"{accuracy:.2f}"))]
    ours = [f"{document['accuracy']:.2f}"] if document else ["not run"]
    for threshold in THRESHOLDS:
        layer = _boundary(document, "dina", threshold)
        accuracy = document["depths"][layer]["accuracy"] if document and layer in document["depths"] else None
        ours += [layer, "-" if accuracy is None else f"{accuracy:.2f}", _boundary(document, STRONGEST, threshold)]
    return [f"{DATA[cell.data]}, {cell.net}", *paper, *ours]


def _boundary(document: Document, attack: str, threshold: float, what: str = "boundary") -> str:
    searches = document.get("boundaries", {}).get(attack, {})
    if f"{threshold:g}" not in searches:
        return "not run"
    layer = searches[f"{threshold:g}"][what]
    return "none" if layer is None else f"{layer:g}"


def _curve_lines(cell: Curve, document: Document) -> Sequence[str]:
    attacks = [
        name for name in ("dina", "eina", "ina", "mla") if any(name in d["ssim"] for _, d in _by_layer(document))
    ]
    rows = [
        [
            layer,
            *(f"{depth['ssim'][name]:.3f}" if name in depth["ssim"] else "-" for name in attacks),
            "-" if depth["accuracy"] is None else f"{depth['accuracy']:.2f}",
        ]
        for layer, depth in _by_layer(document)
    ]
    words = f"{DATA[cell.data]}, {cell.net}, noise {cell.noise:g}, coefficients {cell.scheme}; SSIM by depth. "
    words += f"The mean image reaches {document['floor']:.3f}."
    lines = ["", words, "", *table(("layer", *attacks, "accuracy with noise %"), rows)]
    at = document["depths"].get(f"{SHOWN:g}", {"ssim": {}})["ssim"]
    if cell.net == "vgg16" and "dina" in at and len(attacks) > 1:
        compared = [
            [
                name,
                f"{ABOVE[cell.data][name]:.3f}" if name in ABOVE[cell.data] else "-",
                f"{at['dina'] - at[name]:.3f}" if name != "dina" and name in at else "-",
                f"{FAILS[cell.data][name]:g}",
                _boundary(document, name, 0.3, "potential"),
            ]
            for name in ("dina", "eina", "mla")
        ]
        lines += ["", *table(COMPARED, compared)]
    return lines


COMPARED = (
    "attack",
    "paper: DINA is above it at layer 7 by",
    "ours",
    "paper: fails from layer (0.3)",
    "ours",
)
