"""A client on emulated boards: whether it computes as here bit for bit, and the sizes of its packages.

    .venv-tflite/bin/python benchmarks/arm.py RUN SERVER_BUNDLE --data SPEC --legacy .venv-legacy/bin/python

As root on Debian or its like, with what ``make test-arm`` needs; ``--legacy`` is an interpreter with tflite-runtime.
With ``--test`` it times ``make test-arm``, from no root of a board at all, and keeps its log. Nothing here is a board's
speed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import results
from product import exported

from ensembler.export import packages
from ensembler.export.packages import Package
from ensembler.export.targets import TARGETS, Target
from ensembler.training import data as data_sets

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "arm"))

from boards import BOARDS, CACHE, boot, why_not  # noqa: E402

IMAGES = 1000
DIGESTS = ROOT / "tests" / "arm" / "digests.py"
PLACES = {"pi4": "rpi-arm64-bookworm", "pi5": "rpi-arm64-trixie", "pi2": "rpi-armhf-bookworm"}
FIGURES = {
    "pi4": "arm64_pi4_bit_identical",
    "pi5": "arm64_pi5_bit_identical",
    "pi2": "armhf_bit_identical_tflite",
}
SHORT = {"onnxruntime": "", "ai-edge-litert": "_litert", "tflite-runtime": ""}


def main() -> None:
    """Exports, packs, compares and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path)
    parser.add_argument("server_bundle", type=Path)
    parser.add_argument("--data", required=True, help="as for ensembler train")
    parser.add_argument("--legacy", required=True, help="an interpreter with tflite-runtime")
    parser.add_argument("--test", action="store_true", help="time make test-arm, too")
    options = parser.parse_args()
    if why_not() is not None:
        raise SystemExit(why_not())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        formats = ("--format", "onnx", "--format", "tflite", "--plaintext")
        given = ("--server-bundle", str(options.server_bundle))
        client = exported(options.run, folder / "out", options.data, *formats, *given) / "client"
        images = np.ascontiguousarray(data_sets.load(options.data).test_x[:IMAGES].transpose(0, 2, 3, 1))
        np.save(folder / "images.npy", images)
        figures = []
        for name, place in PLACES.items():
            figures += _board(name, TARGETS[place], client, folder, options.legacy)
    if options.test:
        shutil.rmtree(CACHE, ignore_errors=True)
        began = time.monotonic()
        command = ["make", "--silent", "test-arm"]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines(keepends=True) if not line.startswith("rootdir")]
        (results.RESULTS / "test_arm.log").write_text("".join(lines), encoding="utf-8")
        note = "packages built, three boards made from nothing, installed offline, tested; emulated"
        figures.append(results.figure("test_arm_s", round(time.monotonic() - began), "s", "<= 300", note))
    said = ["--data", options.data, "--legacy", options.legacy, *(["--test"] if options.test else [])]
    again = shlex.join(["python", "benchmarks/arm.py", str(options.run), str(options.server_bundle), *said])
    results.record("edge", figures, command=again, seed=0)


def _board(name: str, target: Target, client: Path, folder: Path, legacy: str) -> list[dict[str, object]]:
    """Returns a board's figures: the sizes of its packages, and whether every runtime computes as here."""
    figures, same, notes = [], True, []
    place = folder / name
    for runtime in target.runtimes:
        package = packages.build(target, client, place / runtime, runtime=runtime)
        figure = f"deb_{target.architecture}{SHORT[runtime]}_{target.release}_mb"
        goal = ""
        if (target.release, SHORT[runtime]) == ("bookworm", ""):
            figure = f"deb_{target.architecture}_mb"
            goal = "<= 40" if target.architecture == "arm64" else "<= 4"
        note = f"{target.name} with {runtime} and {len(package.licences) - 2} wheels of others; without a bundle"
        figures.append(results.figure(figure, round(package.megabytes, 1), "MB", goal, note))
        said = subprocess.run(
            ["dpkg-deb", "--field", str(package.path), "Installed-Size"], check=True, stdout=subprocess.PIPE, text=True
        )
        unpacked = round(int(said.stdout) * 1024 / 1e6)
        figures.append(results.figure(figure.replace("deb_", "installed_"), unpacked, "MB", "", f"{note}; unpacked"))
        wanted = _here(legacy if runtime == "tflite-runtime" else sys.executable, client, runtime, folder)
        found = _on(name, package, client, folder)
        same = same and found == wanted
        notes.append(f"{runtime}: {', '.join(f'{part} {found[part] == wanted[part]}' for part in wanted)}")
    kind = BOARDS[name]
    note = f"{kind.model}, {kind.cpu}, emulated; {IMAGES} held-out images; as on x86-64? {'; '.join(notes)}"
    return [*figures, results.figure(FIGURES[name], int(same), "", "1", note)]


def _on(name: str, package: Package, client: Path, folder: Path) -> dict[str, str]:
    """Returns the digests of an emulated board, computed by what its package holds."""
    unpacked = folder / f"unpacked-{name}-{package.runtime}"
    subprocess.run(["dpkg-deb", "--extract", str(package.path), str(unpacked)], check=True)
    with boot(BOARDS[name], folder / f"board-{name}-{package.runtime}") as board:
        shutil.copytree(unpacked / "opt", board.root / "opt", dirs_exist_ok=True)
        shutil.copytree(client, board.root / "srv/client")
        for file in (DIGESTS, folder / "images.npy"):
            shutil.copy(file, board.root / "srv")
        command = ("/srv/digests.py", "/srv/client", package.runtime, "/srv/images.npy")
        python = "/opt/ensembler-edge/bin/ensembler-python"
        done = board.run(python, *command, network=False, check=True, timeout_s=600)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _here(python: str, client: Path, runtime: str, folder: Path) -> dict[str, str]:
    """Returns the digests of this machine."""
    command = [python, str(DIGESTS), str(client), runtime, str(folder / "images.npy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
