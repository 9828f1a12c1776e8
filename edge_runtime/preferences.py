"""What this machine prefers: which runtime, how many threads. ``ensembler bench device --write`` stores it.

A file ``device.json`` in ``$XDG_CONFIG_HOME/ensembler`` (or ``~/.config/ensembler``), else in ``/etc/ensembler``. It
holds no secret. Whoever names a runtime or a number of threads is not overruled by it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ensembler.edge_runtime.backends import AUTO, BACKENDS, MAX_THREADS, installed
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import ModelFormat
from ensembler.protocol.options import config_folders, is_visible_file

NAME = "device.json"
MAX_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """What is taken where a program leaves it open; None leaves it to the defaults.

    Attributes:
        backend: a name of ``backends.BACKENDS``.
        threads: of one run of head or tail.
    """

    backend: str | None = None
    threads: int | None = None


def places() -> list[Path]:
    """Returns where the file is looked for; it is written to the first."""
    return [folder / NAME for folder in config_folders()]


def completed(backend: str, threads: int | None, formats: Sequence[ModelFormat]) -> tuple[str, int]:
    """Returns runtime and threads with what this machine prefers where a program leaves them open.

    Args:
        backend: a name, or ``auto``, which leaves it open.
        threads: None leaves them open; without a preference it is one.
        formats: of the bundle; a preferred runtime that is not installed or reads none of them is passed over.

    Raises:
        ConfigError: see ``load``; the file is read only if something is left open.
    """
    if backend != AUTO and threads is not None:
        return backend, threads
    prefer = load()
    if backend == AUTO and prefer.backend and installed(prefer.backend) and BACKENDS[prefer.backend].format in formats:
        backend = prefer.backend
    return backend, (prefer.threads or 1) if threads is None else threads


def load() -> Preferences:
    """Returns what the first file says that is there; nothing where there is none.

    Raises:
        ConfigError: the file cannot be read, or is not what ``save`` writes.
    """
    for path in places():
        try:
            if not is_visible_file(path):  # a pipe might never end to be read
                continue
            with path.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        return _parsed(path, data)
    return Preferences()


def save(preferences: Preferences) -> Path:
    """Writes the user's own file and returns its path.

    Raises:
        ConfigError: it cannot be written.
    """
    path = places()[0]
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(preferences), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _parsed(path: Path, data: bytes) -> Preferences:
    try:
        document = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        backend, threads = document.get("backend"), document.get("threads")
        known = backend is None or backend in list(BACKENDS)
        if known and (threads is None or (type(threads) is int and 1 <= threads <= MAX_THREADS)):
            return Preferences(backend=backend, threads=threads)
    raise ConfigError(f"{path} is not what ensembler bench device --write writes; remove it, or write it again")
