"""Files of secrets: made readable by their owner alone, and read only if nobody else can read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from ensembler.protocol.errors import KeyFileError

Kind = Literal["bundle", "signing"]  # as ``ensembler keys`` calls them


def create(path: Path, content: bytes) -> None:
    """Writes a new file, readable by its owner alone.

    Raises:
        KeyFileError: the file exists, or cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # O_EXCL: made here, with these rights, or not at all.
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise KeyFileError(
                f"{path} exists; a key is never overwritten: choose another name, or remove it"
            ) from error
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
        except BaseException:
            path.unlink()  # half a key would be in the way of a whole one
            raise
    except OSError as error:
        raise KeyFileError(f"{path}: the key cannot be written: {error.strerror}") from error


def read(path: Path, limit: int, kind: Kind) -> bytes:
    """Returns the first ``limit`` bytes of a file that its owner alone can read.

    Raises:
        KeyFileError: missing, not a file, or readable by others.
    """
    try:
        # Without O_NONBLOCK, to open a pipe waits until somebody writes.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeyFileError(f"{path} is not a file; ensembler keys {kind} FILE makes a key")
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o077:
                raise KeyFileError(f"{path} can be read by others (mode {mode:04o}); chmod 600 {path}")
            return stream.read(limit)
    except OSError as error:
        raise KeyFileError(f"the {kind} key file {path} cannot be read: {error.strerror}") from error
