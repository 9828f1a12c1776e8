"""Which devices may use a server: a folder of public keys that is watched, or a function.

An allow-list is anything that says whether a public key is ``in`` it. It is asked at every handshake and for every
request, so a key that is taken away loses its open connections too.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from ensembler.protocol.errors import KeyFileError
from ensembler.transport.keys import PUBLIC_SUFFIX, load_authorized, load_public

log = logging.getLogger("ensembler.server")

# A withdrawn device is cut off within a second: the look around takes a quarter of it.
LOOK_EVERY_S = 0.25

Stamp = tuple[int, int, int]


class FolderAllowList:
    """The public keys in a folder (``*.key``), read again whenever a file changes.

    Args:
        folder: of the keys.
        look_every_s: how often it is looked at.

    Raises:
        KeyFileError: not a folder, one of the files is not a key, or there is none. Later on, when somebody may be in
            the middle of copying, a file that is no key is passed over with a line in the log, and a folder that cannot
            be read lets nobody in.
    """

    def __init__(self, folder: Path, *, look_every_s: float = LOOK_EVERY_S) -> None:
        self._folder = folder
        self._look_every_s = look_every_s
        self._read: dict[str, tuple[Stamp, str | None]] = {}
        self._keys: frozenset[str] = frozenset()
        self._stopped = threading.Event()
        if not load_authorized(folder):
            raise KeyFileError(
                f"{folder} holds no key, so no device could connect; copy the devices' {PUBLIC_SUFFIX} files into it"
            )
        self.look()
        self._thread = threading.Thread(target=self._watch, name="allow-list", daemon=True)
        self._thread.start()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def look(self) -> None:
        """Reads what changed since the last look."""
        found: dict[str, tuple[Stamp, str | None]] = {}
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.endswith(PUBLIC_SUFFIX):
                        self._note(entry, found)
        except OSError as error:
            if self._keys:
                log.error("%s cannot be read (%s): no device may connect", self._folder, error.strerror)
            found = {}
        keys = frozenset(key for _, key in found.values() if key is not None)
        if self._read and keys != self._keys:
            log.info("authorized devices: %d added, %d withdrawn", len(keys - self._keys), len(self._keys - keys))
        self._read, self._keys = found, keys

    def close(self) -> None:
        """Ends the looking."""
        self._stopped.set()
        self._thread.join()

    def _note(self, entry: os.DirEntry[str], found: dict[str, tuple[Stamp, str | None]]) -> None:
        try:
            status = entry.stat()
        except OSError:
            return  # it went away meanwhile
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = self._read.get(entry.name)
        if known is not None and known[0] == stamp:
            found[entry.name] = known
            return
        key = None
        try:
            key = load_public(Path(entry.path))
        except KeyFileError as error:
            log.warning("passed over: %s", error)
        found[entry.name] = (stamp, key)

    def _watch(self) -> None:
        while not self._stopped.wait(self._look_every_s):
            self.look()


class CallbackAllowList:
    """Asks a function, for instance one that looks into a database. It is called for every request, so be fast.

    Args:
        allowed: gets a public key (Z85, 40 characters). An exception counts as no, with a line in the log.
    """

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self._allowed = allowed

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and bool(self._allowed(key))
        except Exception:
            log.exception("the function that knows the devices failed; the device is refused")
            return False
