r"""The papers' tables and figures, measured here: cell by cell, in as many passes as it takes.

    python benchmarks/paper_tables.py --scale small --data cifar10=cifar10:PATH
    python benchmarks/paper_tables.py --scale small --data cifar10=cifar10:PATH --attack distribution-matching
    python benchmarks/paper_tables.py --list

Each cell is kept in ``docs/results/tables/``; what is there is not measured again. A later pass with ``--attack`` adds
attacks to the cells. ``docs/reproduction.md`` is written anew from all cells after each of them: the paper's figure,
ours, and the strongest attack beside. What was not measured reads "not run".

Scale ``small`` is for a processor, ``paper`` is the papers' own and wants a GPU:

    python benchmarks/paper_tables.py --scale paper --device cuda --data cifar10=cifar10:PATH \
        --data cifar100=cifar100:PATH --data faces=folder:PATH --attack shadow-single --attack shadow-adaptive \
        --attack distribution-matching
"""

from __future__ import annotations

import argparse
from pathlib import Path

import c2pi_tables
import ensembler_tables
from paper_cells import Cell, Group, Setting, table

GROUPS: tuple[Group, ...] = (ensembler_tables, c2pi_tables)
REPRODUCTION = Path(__file__).resolve().parent.parent / "docs" / "reproduction.md"
OPENING = """# The papers' tables, and ours

Written by `benchmarks/paper_tables.py` from `docs/results/tables/`, one file for each cell, with its options, seed,
seconds and machine. "Not run" was not measured; the script's first lines say how to."""


def main() -> None:
    """Lists or runs cells, and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--list", action="store_true", help="print the cells and what is missing; run nothing")
    parser.add_argument("--scale", choices=("small", "paper"), default="small")
    parser.add_argument("--table", "--figure", action="append", default=[], help="only these, for instance ensembler-2")
    parser.add_argument("--cell", action="append", default=[], help="only these, by name")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=SPEC", help="cifar10, cifar100, faces")
    parser.add_argument("--attack", action="append", default=[], help="of this pass (default: the paper's)")
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    setting = Setting(
        data=dict(part.split("=", 1) for part in options.data),
        runs=options.runs,
        attacks=tuple(options.attack) or ensembler_tables.PAPER_ATTACKS,
        device=options.device,
    )
    chosen = [
        cell
        for group in GROUPS
        for cell in group.cells()
        if cell.scale == options.scale
        and (not options.table or set(options.table) & set(cell.tables))
        and (not options.cell or cell.name in options.cell)
    ]
    if options.list:
        rows = [(cell.name, ", ".join(cell.tables), _state(cell, setting)) for cell in chosen]
        print("\n".join(table(("cell", "tables", "to do"), rows)))
        return
    for cell in chosen:
        state = _state(cell, setting)
        print(f"{cell.name}: {state}", flush=True)
        if cell.data in setting.data and state != "done":
            cell.run(setting, cell.read())
            _write_document()
    _write_document()


def _state(cell: Cell, setting: Setting) -> str:
    missing = cell.missing(setting, cell.read())
    if missing and cell.data not in setting.data:
        return f"{', '.join(missing)}; needs --data {cell.data}=SPEC"
    return ", ".join(missing) or "done"


def _write_document() -> None:
    lines = [OPENING]
    for group in GROUPS:
        lines += ["", *group.section({cell.name: document for cell in group.cells() if (document := cell.read())})]
    REPRODUCTION.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
