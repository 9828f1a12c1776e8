"""Paths of sockets in the file system, looked at before one is bound there."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

from ensembler.protocol.errors import ConfigError


def refuse_taken(path: Path, said: str) -> bool:
    """Refuses a path where something is that a new socket must not replace.

    Args:
        path: where a socket shall be.
        said: how the user gave it, for the message.

    Returns:
        Whether a socket is there that nobody listens at.

    Raises:
        ConfigError: another server listens there, or what is there is no socket.
        OSError: the path cannot be looked at.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"{said}: {path} is there and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # who listens may have no room for one more, and never make any
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            pass
        except OSError as error:  # a socket of another kind, or not ours
            raise ConfigError(
                f"{said}: another program's socket is there ({error.strerror}); choose another path"
            ) from error
    raise ConfigError(f"{said}: another server listens there; stop it, or choose another path")
