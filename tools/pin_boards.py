"""Writes export/board/pins/: for each board and runtime, every wheel of its package and the digest of that very file.

    pip install uv && python tools/pin_boards.py

The versions are those of constraints/main.txt and legacy.txt where these have them. uv resolves, since pip reads the
markers of the machine it runs on; pip fetches the files, as ``ensembler-export --target`` does.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ensembler.export.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "export" / "board" / "pins"
COMMENT = "# Written by tools/pin_boards.py: what a package for {} with {} brings along.\n"


def main() -> None:
    """Writes them all."""
    for target in TARGETS.values():
        for runtime in target.runtimes:
            path = PINS / f"{target.name}.{runtime}.txt"
            with tempfile.TemporaryDirectory() as folder:
                lines = fetched(target, resolved(target, runtime, Path(folder)), Path(folder) / "wheels")
            path.write_text(COMMENT.format(target.name, runtime) + "\n".join(lines) + "\n", encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {len(lines)} wheels")


def resolved(target: Target, runtime: str, folder: Path) -> list[str]:
    """Returns ``name==version`` of everything that the target's wheels need."""
    known = "legacy" if runtime == "tflite-runtime" else "main"
    pinned = (ROOT / "constraints" / f"{known}.txt").read_text(encoding="utf-8").splitlines()
    if not target.wheels:  # the rest is Debian's
        return [line for line in pinned if line.startswith(f"{runtime}==")]
    own = {re.split(r"[<>=]", wheel, maxsplit=1)[0] for wheel in target.wheels if "<" in wheel}
    if own:
        own.add("ml_dtypes")  # whose newer versions want NumPy 2
    (folder / "in").write_text("\n".join([*target.wheels, runtime]), encoding="utf-8")
    constraints = [line for line in pinned if line.split("==")[0] not in own]
    (folder / "constraints").write_text("\n".join(constraints), encoding="utf-8")
    platform = f"{target.machine}-manylinux_2_{min(target.glibc_minor, 40)}"  # the newest that uv knows
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--python-version", target.python, "--python-platform", platform]
    command += ["--constraint", str(folder / "constraints"), str(folder / "in")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def fetched(target: Target, wanted: list[str], wheels: Path) -> list[str]:
    """Returns ``name==version --hash=sha256:...`` of the files that pip takes for the target."""
    lines = []
    for one in wanted:
        place = wheels / one
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--implementation", "cp", "--python-version", target.python, "--dest", str(place), one]
        for platform in target.pip_platforms:
            command += ["--platform", platform]
        subprocess.run(command, check=True)
        (wheel,) = place.iterdir()
        lines.append(f"{one} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}")
    return lines


if __name__ == "__main__":
    main()
