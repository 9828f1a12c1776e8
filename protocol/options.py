"""Options that a program gives: checked, since not every program is."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

from ensembler.protocol.errors import ConfigError


def expanded(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns ``path`` with its ``~`` resolved; ``name`` is what errors call it.

    Raises:
        ConfigError: no path, or the home of somebody this machine does not know.
    """
    if path == "":
        raise ConfigError(f"{name} is an empty text; give a path")
    try:
        return Path(path).expanduser()
    except TypeError:
        raise ConfigError(f"{name} is {type(path).__name__}; give a path, as str or pathlib.Path") from None
    except RuntimeError:
        raise ConfigError(f"{name} = {str(path)!r}: this machine knows no such home; give the whole path") from None


def config_folders() -> list[Path]:
    """Returns where configuration and keys are looked for: this user's folder, then the machine's.

    The machine's alone for a user without a home, as services have it, or with HOME at somebody else's.
    """
    machine = Path("/etc/ensembler")
    config = os.environ.get("XDG_CONFIG_HOME")
    try:
        users = (Path(config) if config else Path("~/.config").expanduser()) / "ensembler"
        users.exists()
    except (RuntimeError, PermissionError):
        return [machine]
    return [users, machine]


def is_visible_file(path: Path) -> bool:
    """Returns whether there is a file; what lies in a folder of another user's is not there."""
    try:
        return path.is_file()
    except PermissionError:
        return False


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """Returns a whole number from ``low`` to ``high``, both included.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, SupportsIndex) and low <= int(value) and (high is None or int(value) <= high):
        return int(value)
    most = "" if high is None else f" and at most {high}"
    raise ConfigError(f"{name} = {value!r}: give a whole number, at least {low}{most}")


def milliseconds(name: str, value: object, high: int) -> float:
    """Returns a time above 0, at most ``high``.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, SupportsFloat) and 0 < float(value) <= high:
        return float(value)
    raise ConfigError(f"{name} = {value!r}: give a number of milliseconds, more than 0 and at most {high:,}")


def require_milliseconds(option: str, time_ms: float) -> None:
    """Checks a time that may be 0, and is a number.

    Raises:
        ConfigError: it is not.
    """
    if not (math.isfinite(time_ms) and time_ms >= 0):
        raise ConfigError(f"{option} {time_ms}: a number of milliseconds, 0 or more")
