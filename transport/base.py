"""The seam between a client and whatever moves its frames.

A ``Transport`` opens connections; a ``Connection`` is used by one thread at a time and exchanges one request for its
reply. ZeroMQ with CURVE is the one that ships (``zmq_client``); ``inprocess`` calls a handler directly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

Frame: TypeAlias = "bytes | memoryview"
Frames: TypeAlias = Sequence[Frame]
T = TypeVar("T")


class Connection(Protocol):
    """One line to the server."""

    def exchange(self, request: Frames, accept: Callable[[Frames], T | None], deadline: float) -> T:
        """Sends ``request`` and waits for the reply that ``accept`` takes.

        Args:
            request: the frames; resent as they are if the connection was lost and restored meanwhile.
            accept: returns None for frames that do not answer this request (a late answer to an older one).
            deadline: on the clock of ``time.monotonic()``, in seconds.

        Returns:
            What ``accept`` made of the reply.

        Raises:
            ServerUnreachableError: no connection until the deadline.
            AuthenticationError: the handshake was refused.
            DeadlineExceededError: connected, but no reply until the deadline.
        """

    def close(self) -> None:
        """Closes the line; a request in flight is forgotten."""


class Transport(Protocol):
    """Opens lines to one server."""

    def connect(self) -> Connection:
        """Opens a line; returns at once, the handshake goes on in the background."""

    def close(self) -> None:
        """Frees what the transport holds; every connection must be closed."""
