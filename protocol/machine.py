"""What stands beside a measured time: on which machine it was taken. No host name."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor(proc: Path = Path("/proc")) -> str:
    """Returns the usable cores in words: ``2 cores of ...``.

    Args:
        proc: where the kernel says it.
    """
    model = platform.machine()
    for line in _lines(proc / "cpuinfo"):
        if line.startswith(("model name", "Model")):
            model = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def machine(proc: Path = Path("/proc")) -> str:
    """Returns the machine in words: ``processor``, memory, Python.

    Args:
        proc: where the kernel says it.
    """
    memory = ""
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemTotal"):
            memory = f" {int(line.split()[1]) / 2**20:.0f} GiB,"
    return f"{processor(proc)},{memory} Python {platform.python_version()}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
