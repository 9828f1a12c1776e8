"""A client that nobody closed and nobody holds any more."""

from __future__ import annotations

import _thread
import weakref
from collections.abc import Sequence
from typing import Protocol

from ensembler.process import OwnProcess


class Closable(Protocol):
    """What has an end."""

    def close(self) -> None:
        """Ends it; may be called again."""


def closed_when_forgotten(
    client: object, process: OwnProcess, parts: Sequence[Closable]
) -> weakref.finalize[..., object]:
    """Has ``parts`` closed, in a thread of their own, once ``client`` is collected.

    Where a client ends in a reference cycle (the traceback of an error makes one), Python clears weak references first,
    and pyzmq knows the sockets of a context by such ones: the context would wait for open sockets for ever, in
    whichever thread collects. ``parts`` outlive the client by this, and must not refer to it.

    Returns:
        What is to be detached when the client is closed. It does nothing at the end of the program.
    """
    ending = weakref.finalize(client, _close, process, tuple(parts))
    ending.atexit = False
    return ending


def _close(process: OwnProcess, parts: Sequence[Closable]) -> None:
    # Not here: the collector interrupts any thread, perhaps one that holds a lock which closing takes, or the one with
    # which ``threading`` starts its threads.
    if process.here:
        _thread.start_new_thread(_close_here, (parts,))


def _close_here(parts: Sequence[Closable]) -> None:
    for part in parts:
        part.close()
