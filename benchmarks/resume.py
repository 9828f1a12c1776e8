"""Whether a run that was killed ends in the same bits as one that nobody interrupted; records ``resume_bit_identical``.

    python benchmarks/resume.py

One process trains on the demo's images. After every checkpoint it is stopped (SIGSTOP), its folder copied as a SIGKILL
at that moment would have left it, and set going again. Every copy is then resumed. Its stage-1 nets must be those of
the first process; where the copy was taken after the selector was drawn, every file must. A further process is really
killed, in stage 1, and resumed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results

from ensembler.training.runs import RunFolder

COMMAND = [sys.executable, "-m", "ensembler.cli", "train"]
SETTING = "--data demo --arch resnet10_slim -N 2 -P 1 --epochs 3 --train-limit 1024 --noise-mode fresh --device cpu"
NETS = 2
DEADLINE_S = 600


def main() -> None:
    """Runs and records."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        copies = _stopped_and_copied(whole)
        equal = []
        for copy in copies:
            same_client = RunFolder(copy).has(RunFolder.SECRET_FILE)
            _resume(copy)
            equal.append(_files(copy, everything=same_client) == _files(whole, everything=same_client))
        _killed(killed)
        _resume(killed)
        equal.append(_files(killed, everything=False) == _files(whole, everything=False))
    figure = results.figure(
        "resume_bit_identical",
        int(all(equal)),
        "1 = yes",
        ">= 1",
        f"{sum(equal)} of {len(equal)} interrupted runs: {len(copies)} folders copied from a stopped process, one a "
        f"checkpoint, and one SIGKILL; ensembler train {SETTING}",
    )
    results.record("core", [figure], command="python benchmarks/resume.py", seed=0)
    if not all(equal):
        raise SystemExit(1)


def _start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, *SETTING.split(), "--out", str(out)], stdout=subprocess.DEVNULL)


def _resume(run: Path) -> None:
    subprocess.run([*COMMAND, "--resume", str(run)], stdout=subprocess.DEVNULL, check=True)


def _checkpoints(run: Path) -> list[tuple[str, int]]:
    """Returns name and time of the checkpoints that are there."""
    found = []
    for path in run.glob("*/*.checkpoint.safetensors"):
        try:
            found.append((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # the piece was finished just now
            continue
    return found


def _stopped_and_copied(run: Path) -> list[Path]:
    """Trains ``run`` to its end; returns copies of it, one for each checkpoint that was seen."""
    copies: list[Path] = []
    seen: set[tuple[str, int]] = set()
    with _start(run) as process:
        deadline = time.monotonic() + DEADLINE_S
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"training did not end in {DEADLINE_S} s")
            if set(_checkpoints(run)) - seen:
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                seen |= set(_checkpoints(run))
                if process.poll() is None and not RunFolder(run).has("summary.json"):
                    copies.append(run.with_name(f"copy_{len(copies)}"))
                    shutil.copytree(run, copies[-1])
                process.send_signal(signal.SIGCONT)
            time.sleep(0.002)
    if process.returncode:
        raise SystemExit(process.returncode)
    return copies


def _killed(run: Path) -> None:
    with _start(run) as process:
        deadline = time.monotonic() + DEADLINE_S
        while not _checkpoints(run):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise SystemExit("no checkpoint came")
            time.sleep(0.002)
        process.kill()


def _files(run: Path, *, everything: bool) -> dict[str, bytes]:
    """Returns the content of the stage-1 nets, or of every file but the configuration."""
    names = [RunFolder(run).stage1_file(index) for index in range(NETS)]
    if everything:
        names += ["wire.json", RunFolder.SECRET_FILE, RunFolder.CLIENT_FILE, "metrics.jsonl", "summary.json"]
    return {name: (run / name).read_bytes() for name in names}


if __name__ == "__main__":
    main()
