"""The results of a service: one JSON object a line, on the disk or on standard output."""

from __future__ import annotations

import fcntl
import io
import json
import os
import stat
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ensembler.protocol.errors import ConfigError

# How every line of this service begins: what begins otherwise is somebody else's file, and stays as it is.
HEAD = b'{"time": "'


class Journal:
    """Lines in a file that its owner alone can read, or on standard output; every line is flushed.

    A file that ends in the middle of a line, as a kill leaves it, loses that piece when it is opened.

    Args:
        path: None is standard output.

    Raises:
        ConfigError: the file cannot be written, is no file of results, or another process writes it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is None:
            self._stream: io.BufferedIOBase | Any = sys.stdout.buffer
            return
        try:
            # Without O_NONBLOCK, to open a pipe waits until somebody reads.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(f"--results {path}: cannot be written: {error.strerror}") from error
        self._stream = os.fdopen(descriptor, "ab")
        try:
            self._own(path)
            self._repair(path)
        except BaseException:
            self._stream.close()
            raise

    def answered(self, names: Collection[str]) -> set[tuple[str, int]]:
        """Returns (name, ``mtime_ns``) of the lines about files that are among ``names``, answers and errors alike."""
        if self._path is None:
            return set()
        with self._path.open("rb") as stream:
            keys = map(_key, stream)
            return {key for key in keys if key is not None and key[0] in names}

    def add(self, document: dict[str, Any]) -> None:
        """Appends a line; ``document`` begins with ``time``."""
        try:
            line = json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a file's name that is no text
            line = json.dumps(document).encode()
        self._stream.write(line + b"\n")
        self._stream.flush()

    def sync(self) -> None:
        """Waits until the lines are on the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._path is not None:
            self._stream.close()

    def _own(self, path: Path) -> None:
        """Makes sure that this is a file, this user's, private, and this process's alone."""
        descriptor = self._stream.fileno()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"--results {path} is not a file")
        try:
            os.fchmod(descriptor, 0o600)
        except OSError as error:
            raise ConfigError(f"--results {path}: cannot be made private: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--results {path}: another process writes it; give this one a file of its own") from None
        except OSError:  # a file system without locks
            pass
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # a line is on the disk only if the file is
        finally:
            os.close(folder)

    def _repair(self, path: Path) -> None:
        kept = 0
        with path.open("rb") as stream:
            head = stream.read(len(HEAD))
            if not HEAD.startswith(head):
                raise ConfigError(f"--results {path} is a file of something else; it was left as it is")
            stream.seek(0)
            for line in stream:
                if line.endswith(b"\n"):
                    kept += len(line)
        os.ftruncate(self._stream.fileno(), kept)


def _key(line: bytes) -> tuple[str, int] | None:
    """Returns the name and time of a line; None for a damaged one, or one about a frame."""
    try:
        document = json.loads(line)
        name, mtime_ns = document["name"], document["mtime_ns"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return (name, mtime_ns) if isinstance(name, str) and isinstance(mtime_ns, int) else None
