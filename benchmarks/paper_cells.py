"""What the groups of ``paper_tables.py`` share: a cell, the setting of a pass over them, and where results are kept.

A cell is the smallest thing that is measured, kept and resumed by itself: a victim with its attacks, or a point of a
figure. Its result is one JSON file, written after each step, so a pass may be stopped anywhere and begun again.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import results

FOLDER = results.RESULTS / "tables"
Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One pass over the cells.

    Attributes:
        data: name of a data set to its ``--data`` specification; a cell whose data set is missing is not run.
        runs: where trained runs, bundles and reports are kept.
        attacks: names of the attacks that this pass is for.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    data: Mapping[str, str]
    runs: Path
    attacks: tuple[str, ...]
    device: str


@dataclass(frozen=True, kw_only=True)
class Cell(ABC):
    """What is measured by itself.

    Attributes:
        name: of its file, for instance ``ensembler-small-cifar10-single-0``.
        scale: ``small`` or ``paper``.
        tables: in which tables and figures of the papers it stands, by the names that ``--table`` takes.
        data: the name of its data set.
    """

    name: str
    scale: str
    tables: tuple[str, ...]
    data: str

    @abstractmethod
    def missing(self, setting: Setting, stored: Document) -> list[str]:
        """Returns what this pass would add to ``stored``, in words; nothing where there is nothing to do."""

    @abstractmethod
    def run(self, setting: Setting, stored: Document) -> None:
        """Measures what is missing, and calls ``store`` after each step."""

    def read(self) -> Document:
        """Returns what is known of this cell; empty where nothing is."""
        path = FOLDER / f"{self.name}.json"
        if not path.is_file():
            return {}
        document: Document = json.loads(path.read_text(encoding="utf-8"))
        return document

    def store(self, document: Document) -> None:
        """Writes the cell's file, with the machine and the date."""
        complete = {
            "cell": self.name,
            "scale": self.scale,
            "tables": list(self.tables),
            "data": self.data,
            **document,
            "machine": results.machine(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = FOLDER / f"{self.name}.json.tmp"
        temporary.write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")
        temporary.replace(FOLDER / f"{self.name}.json")


class Group(Protocol):
    """A module with the cells of one paper."""

    def cells(self) -> Sequence[Cell]:
        """Returns all cells, in the order in which they are best measured."""

    def section(self, found: Mapping[str, Document]) -> list[str]:
        """Returns the lines of ``docs/reproduction.md`` for what was found so far, by the names of cells."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
