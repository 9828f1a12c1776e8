"""Prints every figure of ``docs/results/`` as one table."""

from __future__ import annotations

import json
from pathlib import Path

COLUMNS = ("figure", "value", "unit", "goal", "date", "machine", "command")


def main() -> None:
    """Reads the files and prints them."""
    folder = Path(__file__).resolve().parent.parent / "docs" / "results"
    rows = [COLUMNS]
    for path in sorted(folder.glob("*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            value = entry["value"]
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append(tuple(shown if name == "value" else str(entry[name]) for name in COLUMNS))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
