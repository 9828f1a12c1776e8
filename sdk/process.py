"""A client belongs to the process that made it: what a forked child may not do with its parent's."""

from __future__ import annotations

import os

from ensembler.protocol.errors import ConfigError


class OwnProcess:
    """Remembers the process it was made in.

    A forked child has copies of its parent's sockets and locks, but none of its threads: to use or to close a copy may
    wait for ever. So every public call asks here first, before it takes a lock.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is still that process."""
        return os.getpid() == self._pid

    def require(self) -> None:
        """Refuses to go on in a forked child.

        Raises:
            ConfigError: another process.
        """
        if not self.here:
            raise ConfigError(
                f"this client was made in process {self._pid} and this is its forked child {os.getpid()}; connections "
                "are not shared between processes: make a new client in the child"
            )
