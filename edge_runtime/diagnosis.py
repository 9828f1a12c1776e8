"""What may be wrong with a device, found before an application finds it: the checks of ``ensembler doctor``.

Each check is a function that returns findings; none raises, and none computes more than a tiny inference. ``root`` is
where ``/proc``, ``/sys`` and ``/etc`` are looked for.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np

from ensembler.edge_runtime import probe
from ensembler.edge_runtime.backends import BACKENDS, installed
from ensembler.protocol.errors import BundleError
from ensembler.protocol.manifest import MANIFEST_NAME, ClientManifest, load_client

Level = Literal["ok", "warning", "error"]

ROOT = Path("/")
OLDEST_PYTHON = (3, 11)
HOT_CELSIUS = 80.0  # where a Raspberry Pi begins to slow down
SCARCE_MB = 100.0
CLOCK_SLACK_S = 86_400.0
# Of ``vcgencmd get_throttled``: now, and since the board was started.
THROTTLED = {
    0: "the supply gives too little voltage",
    1: "the processor is held back",
    2: "the processor is slowed down",
    16: "the supply gave too little voltage before",
    17: "the processor was held back before",
    18: "the processor was slowed down before",
}
INSTEAD = {
    "onnxruntime": "pip install ai-edge-litert, and export the bundle with --format tflite",
    "ai-edge-litert": "pip install onnxruntime, and export the bundle with --format onnx",
    "tflite-runtime": "pip install ai-edge-litert, where it has a wheel for this board",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what was looked at.
        level: ``ok``; ``warning``: works, but not as it might; ``error``: predictions fail.
        words: what was found.
        cure: what to do; empty where nothing is to be done.
    """

    check: str
    level: Level
    words: str
    cure: str = ""


def _ok(check: str, words: str) -> list[Finding]:
    return [Finding(check=check, level="ok", words=words)]


def board(root: Path = ROOT) -> list[Finding]:
    """Which board this is, and for which machine Python was compiled."""
    model = _text(root / "proc/device-tree/model").strip("\0\n ") or platform.machine()
    return _ok("board", f"{model}, {platform.machine()}, Python of {8 * struct.calcsize('P')} bits")


def system(root: Path = ROOT) -> list[Finding]:
    """Which Linux, which C library."""
    names = dict(line.split("=", 1) for line in _text(root / "etc/os-release").splitlines() if "=" in line)
    library = " ".join(platform.libc_ver()) or "an unknown C library"
    found = names.get("PRETTY_NAME", platform.system()).strip('"')
    if "musl" in library or not platform.libc_ver()[0]:
        return [
            Finding(
                check="system",
                level="warning",
                words=f"{found}, {library}",
                cure="the inference runtimes have wheels for glibc: use Debian or Raspberry Pi OS",
            )
        ]
    return _ok("system", f"{found}, {library}")


def python() -> list[Finding]:
    """Whether Python is new enough."""
    found = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        cure = f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer: Raspberry Pi OS 12 (bookworm) has it"
        return [Finding(check="python", level="error", words=f"Python {found}", cure=cure)]
    return _ok("python", f"Python {found}, NumPy {np.__version__}, ensembler-edge {metadata.version('ensembler-edge')}")


def runtimes(look: Callable[[str], probe.Probe] = probe.run) -> list[Finding]:
    """Whether each runtime that is installed can be imported and runs, in a process of its own."""
    there = [backend for backend in BACKENDS if installed(backend)]
    if not there:
        cure = "pip install 'ensembler-edge[onnx]', or 'ensembler-edge[litert]' for TFLite bundles"
        return [Finding(check="runtimes", level="error", words="no inference runtime is installed", cure=cure)]
    found = []
    probes = {backend: look(backend) for backend in there}
    for backend, seen in probes.items():
        if seen.failure:
            # Another runtime may do; whether it does for a bundle says the bundle's own check.
            found.append(Finding(check=backend, level="warning", words=seen.failure, cure=INSTEAD[backend]))
            continue
        words = f"{seen.version}, {seen.seconds:.2f} s from import to answer, {seen.rss_mb:.0f} MB"
        if seen.as_on_x86_64:
            found += _ok(backend, f"{words}, int8 as on x86-64")
        else:
            cure = "compare parity with the version that exported the bundle; a step of difference does no harm"
            found.append(Finding(check=backend, level="warning", words=f"{words}, int8 differs from x86-64", cure=cure))
    if all(seen.failure for seen in probes.values()):
        found.append(
            Finding(check="runtimes", level="error", words="no inference runtime works", cure=INSTEAD[there[0]])
        )
    return found


def threads() -> list[Finding]:
    """How many cores this process may use."""
    return _ok("threads", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores; head and tail use one")


def memory(root: Path = ROOT) -> list[Finding]:
    """Whether there is memory left."""
    fields = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    try:
        free_mb = int(fields["MemAvailable"].split()[0]) / 1024
    except (KeyError, ValueError, IndexError):
        return []
    if free_mb < SCARCE_MB:
        cure = f"end other programs: a device needs about {SCARCE_MB:.0f} MB"
        return [Finding(check="memory", level="warning", words=f"{free_mb:.0f} MB available", cure=cure)]
    return _ok("memory", f"{free_mb:.0f} MB available")


def heat(root: Path = ROOT, throttled: Callable[[], str] | None = None) -> list[Finding]:
    """Temperature and throttling, where the board tells."""
    found = []
    degrees = _text(root / "sys/class/thermal/thermal_zone0/temp").strip()
    if degrees.isdigit():
        celsius = int(degrees) / 1000
        if celsius >= HOT_CELSIUS:
            cure = "a heat sink or a fan; from here on the board slows down"
            found.append(Finding(check="temperature", level="warning", words=f"{celsius:.0f} degrees", cure=cure))
        else:
            found += _ok("temperature", f"{celsius:.0f} degrees")
    answer = (throttled or _throttled)()  # throttled=0x50005
    try:
        bits = int(answer.strip().partition("=")[2], 16)
    except ValueError:
        return found
    said = [words for bit, words in THROTTLED.items() if bits >> bit & 1]
    if said:
        cure = "a supply of 5 V and 3 A (Pi 5: 5 A) with a short cable, and cooling"
        found.append(Finding(check="throttling", level="warning", words="; ".join(said), cure=cure))
    else:
        found += _ok("throttling", "none since the start")
    return found


def clock(bundle: Path | None, now: Callable[[], float] = time.time) -> list[Finding]:
    """Whether the clock is plausible: a board without a battery starts in the past."""
    files = [Path(__file__)] + ([bundle / MANIFEST_NAME] if bundle is not None else [])
    newest = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    if now() < newest - CLOCK_SLACK_S:
        shown = time.strftime("%Y-%m-%d %H:%M", time.gmtime(now()))
        cure = "timedatectl set-ntp true; logs and privacy cards carry dates"
        return [
            Finding(check="clock", level="warning", words=f"{shown} UTC is before files of this install", cure=cure)
        ]
    return _ok("clock", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now())))


def bundle(folder: Path) -> list[Finding]:
    """Whether a client bundle is whole, private, and readable by a runtime that is installed."""
    try:
        manifest = load_client(folder)
    except BundleError as error:
        return [Finding(check="bundle", level="error", words=str(error))]
    found = []
    formats = [pair.format for pair in manifest.models]
    able = [backend for backend, known in BACKENDS.items() if known.format in formats and installed(backend)]
    if not able:
        wanted = next(known.extra for known in BACKENDS.values() if known.format == formats[0])
        cure = f"pip install 'ensembler-edge[{wanted}]'"
        words = f"no runtime for its {' and '.join(formats)} models is installed"
        found.append(Finding(check="bundle", level="error", words=words, cure=cure))
    names = [MANIFEST_NAME, *manifest.files]
    exposed = [name for name in names if (folder / name).stat().st_mode & 0o077]
    if exposed and manifest.encryption is None:
        words = f"others can read {', '.join(exposed)}: head, noise and selector are secrets"
        cure = f"chmod 700 {folder}; chmod 600 {folder}/*"
        found.append(Finding(check="bundle", level="warning", words=words, cure=cure))
    return found or _ok("bundle", _described(manifest, able[0]))


def _described(manifest: ClientManifest, backend: str) -> str:
    size = sum(entry.size_bytes for entry in manifest.files.values()) / 1024
    formats = " and ".join(pair.format for pair in manifest.models)
    sealed = ", encrypted" if manifest.encryption is not None else ""
    return f"whole: {formats}, {size:.0f} KiB{sealed}; runs in {backend}"


def _text(path: Path) -> str:
    """Returns what a file of the system says; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _throttled() -> str:
    tool = shutil.which("vcgencmd")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
