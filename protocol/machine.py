"""What stands beside a measured time: on which machine it was taken. No host name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# What int8 nets are fast by; processors of one name have it or not, also as a virtual machine shows them.
_DOT_PRODUCTS = {"avx512_vnni": "VNNI", "avx_vnni": "VNNI", "asimddp": "dot products"}


def processor(proc: Path = Path("/proc")) -> str:
    """Returns the usable cores in words: ``2 cores of ... with VNNI``.

    Args:
        proc: where the kernel says it.
    """
    model, dot_products = platform.machine(), ""
    for line in reversed(_lines(proc / "cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            known = [words for flag, words in _DOT_PRODUCTS.items() if flag in value.split()]
            dot_products = f" with {known[0]}" if known else ""
    return f"{len(os.sched_getaffinity(0))} cores of {model}{dot_products}"


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
