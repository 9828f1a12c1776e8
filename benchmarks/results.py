"""Where measured figures go: ``docs/results/NAME.json``, written by the benchmarks and never by hand."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ensembler.privacy.parts import write_whole
from ensembler.protocol.machine import machine

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def record(name: str, figures: list[dict[str, Any]], *, command: str, seed: int | None) -> None:
    """Writes figures into ``docs/results/NAME.json``; a figure of the same id is replaced, the others stay.

    Args:
        name: of the file.
        figures: each with ``figure``, ``value``, ``unit``, ``goal`` and ``note``.
        command: what anyone can run to measure them again.
        seed: of the run, or None where nothing is drawn.
    """
    path = RESULTS / f"{name}.json"
    known: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    date = datetime.now(UTC).date().isoformat()
    complete = [
        {
            "figure": figure["figure"],
            "value": figure["value"],
            "unit": figure["unit"],
            "goal": figure["goal"],
            "command": command,
            "seed": seed,
            "machine": machine(),
            "date": date,
            "note": figure["note"],
        }
        for figure in figures
    ]
    new = {figure["figure"] for figure in complete}
    merged = [figure for figure in known if figure["figure"] not in new] + complete
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(sorted(merged, key=lambda f: str(f["figure"])), indent=1) + "\n")
    for figure in complete:
        print(f"{figure['figure']}: {figure['value']} {figure['unit']} (goal {figure['goal'] or 'none'})")


def figure(name: str, value: float, unit: str, goal: str = "", note: str = "") -> dict[str, Any]:
    """Returns one figure; ``goal`` is a text like ``<= 1.15``, empty when there is none."""
    return {"figure": name, "value": value, "unit": unit, "goal": goal, "note": note}
