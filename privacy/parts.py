"""Long work that was killed goes on: what is done is kept in a folder, one file for each piece."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import ConfigError, DataError

Arrays = dict[str, npt.NDArray[Any]]


class Parts:
    """The pieces of exactly one piece of work, each stored whole or not at all.

    Args:
        folder: is made if need be.
        identity: all that the pieces depend on; those of another identity are not taken.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)  # reconstructions of private images lie here
        except OSError as error:
            raise ConfigError(f"--out {folder.parent}: cannot be written: {error.strerror}") from error

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def read(self, name: str) -> tuple[dict[str, Any], Arrays] | None:
        """Returns a piece's values and arrays; one that is missing, damaged or of another identity is None."""
        try:
            with self._path(name).open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                values = json.loads(str(stored["texts"]))
                if values.pop("identity") != self._identity:
                    return None
                return values, {key: stored[key] for key in stored.files if key != "texts"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def write(self, name: str, values: Mapping[str, Any], arrays: Arrays) -> None:
        """Stores a piece.

        Args:
            name: of the piece, part of a file's name.
            values: what JSON can hold.
            arrays: by names other than ``texts``.

        Raises:
            DataError: the disk is full, or the folder has gone.
        """
        path = self._path(name)
        temporary = path.with_suffix(".tmp")
        stored: dict[str, Any] = {"texts": np.array(json.dumps({**values, "identity": self._identity})), **arrays}
        try:
            with temporary.open("wb") as stream:
                np.savez(stream, **stored)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}; make room, then start again") from error

    def remove(self) -> None:
        """Removes the folder: nothing is left to do."""
        shutil.rmtree(self._folder, ignore_errors=True)


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a text file whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        text: its content.
        mode: who may read and write it, less the process's umask.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(mode)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
