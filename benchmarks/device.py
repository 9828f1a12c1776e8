"""What the device pays: installed size, and the time from starting Python to the first prediction.

    python benchmarks/device.py DEMO_OR_EXPORT_FOLDER

Installs this package with [onnx] into an empty environment, as a device would, and runs a fresh process there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import results

from ensembler.cli.demo import server_process

ROOT = Path(__file__).resolve().parent.parent
RUNS = 7

# The clock starts before the first import; the interpreter's own start is in too, as a user would feel it.
FIRST = """
import time, os
started = float(os.environ["STARTED"])
import numpy as np
from ensembler import EdgeClient
with EdgeClient({bundle!r}, {endpoint!r}, timeout_ms=60000) as client:
    image = np.zeros((client._manifest.image.height, client._manifest.image.width, 3), np.uint8)
    client.predict(image)
    first = time.time() - started
import json, resource, sys
assert sys.prefix == {prefix!r}, sys.prefix
print(json.dumps([first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6]))
"""


def folder_mb(folder: Path) -> float:
    """Returns the size of all files below ``folder`` in megabytes (10^6 bytes), compiled bytecode left out."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.suffix != ".pyc")
    return sum(p.stat().st_size for p in files) / 1e6


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path, help="what ensembler demo or ensembler-export made")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        venv = Path(temporary) / "device"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        site = next((venv / "lib").glob("python3*")) / "site-packages"
        empty = folder_mb(site)
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"),
                *("--target", str(site), "--constraint", str(ROOT / "constraints" / "main.txt"), f"{ROOT}[onnx]"),
            ],
            check=True,
        )
        installed = folder_mb(site) - empty
        # pip compiles as it installs; here that comes after the size is taken, which leaves bytecode out.
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(site)], check=False)
        times, memory = [], []
        with server_process(options.folder / "server") as endpoint:
            script = FIRST.format(bundle=str(options.folder.resolve() / "client"), endpoint=endpoint, prefix=str(venv))
            for _ in range(RUNS):
                # exec keeps the clock: STARTED is read before the device's own interpreter starts. argv[0] is the whole
                # path: a bare name is looked up in PATH, and another environment would be measured.
                python = str(venv / "bin" / "python")
                launch = (
                    "import os, time; os.environ['STARTED'] = repr(time.time()); "
                    f"os.execv({python!r}, [{python!r}, '-c', {script!r}])"
                )
                out = subprocess.run(
                    [sys.executable, "-S", "-c", launch], check=True, stdout=subprocess.PIPE, text=True
                )
                first, rss = json.loads(out.stdout)
                times.append(first)
                memory.append(rss)
    print(
        f"installed {installed:.1f} MB; first answer after {np.median(times):.2f} s; {np.median(memory):.0f} MB at most"
    )
    if not options.no_record:
        runs = f"median of {RUNS} fresh processes, interpreter start included, onnxruntime"
        results.record(
            "speed",
            [
                results.figure(
                    "edge_install_mb",
                    round(installed, 1),
                    "MB",
                    "<= 175",
                    "base install with [onnx], without pip and bytecode",
                ),
                results.figure(
                    "edge_import_to_first_prediction_s", round(float(np.median(times)), 3), "s", "<= 1.5", runs
                ),
                results.figure(
                    "edge_rss_mb", round(float(np.median(memory)), 1), "MB", "<= 80", f"at its most; {runs}"
                ),
            ],
            command=f"python benchmarks/device.py {options.folder}",
            seed=None,
        )


if __name__ == "__main__":
    main()
