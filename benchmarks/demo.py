"""How long the demo computes, and its quick audit: ``ensembler demo`` as a process of its own, without installation.

python benchmarks/demo.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import results


def main() -> None:
    """Runs the demo and records its time."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "ensembler.cli", "demo", "--json", "--out", str(Path(folder) / "demo")],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    document = json.loads(done.stdout)
    note = (
        f"N = {document['num_nets']}, P = {document['num_selected']}; training {document['train_s']:.0f} s, exporting "
        f"{document['export_s']:.0f} s; accuracy torch {document['accuracy_torch_percent']:.2f}%, served "
        f"{document['accuracy_split_quantised_percent']:.2f}% of {document['test_images']} images"
    )
    figure = results.figure("demo_compute_s", round(document["compute_s"], 1), "s", "<= 240", note)
    results.record("loop", [figure], command="python benchmarks/demo.py", seed=0)
    audited = document["audit"]
    figure = results.figure("quick_audit_s", audited["seconds"], "s", "<= 360", audited["verdict"]["sentence"])
    results.record("audit", [figure], command="python benchmarks/demo.py", seed=0)


if __name__ == "__main__":
    main()
