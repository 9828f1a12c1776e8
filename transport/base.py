"""The seam between a client and whatever moves its frames.

A ``Transport`` opens connections to one server; a ``Connection`` is used by one thread at a time and carries one
request after the other. It says at once when it cannot be made or was lost, and never repairs itself: who asks decides
whether to ask again, and whom (``ensembler.party``). ZeroMQ with CURVE is the one that ships (``zmq_client``);
``inprocess`` calls a handler directly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

from ensembler.protocol.errors import ServerUnreachableError, TransportError

Frame: TypeAlias = "bytes | memoryview"
Frames: TypeAlias = Sequence[Frame]
T = TypeVar("T")


class Connection(Protocol):
    """One line to the server."""

    def usable(self) -> bool:
        """Returns whether the line is there or still being made; False: it was lost, or could not be made."""

    def send(self, request: Frames) -> None:
        """Sends ``request``, or leaves it to be sent when the line is there; returns at once.

        Raises:
            ServerUnreachableError: the line was lost, or could not be made.
            AuthenticationError: the handshake was refused.
        """

    def receive(self, accept: Callable[[Frames], T | None], until: float) -> T | None:
        """Waits for the reply that ``accept`` takes.

        Args:
            accept: returns None for frames that do not answer this request (a late answer to an older one).
            until: on the clock of ``time.monotonic()``, in seconds.

        Returns:
            What ``accept`` made of the reply; None: nothing came until then, and may still come.

        Raises:
            ServerUnreachableError: the line was lost, or could not be made; at once.
            AuthenticationError: the handshake was refused; or the line ended during it, and it is not certain.
            DeadlineExceededError: no reply will come.
        """

    def silence(self) -> TransportError:
        """Returns the error that says why nothing came until the deadline."""

    def close(self) -> None:
        """Closes the line; a request in flight is forgotten."""


class Transport(Protocol):
    """Opens lines to one server."""

    def connect(self) -> Connection:
        """Opens a line; returns at once, the handshake goes on in the background."""

    def close(self) -> None:
        """Frees what the transport holds; every connection must be closed."""


def closed_in_use(endpoint: str) -> ServerUnreachableError:
    """Returns the error of a request whose client was closed while it waited for the server at ``endpoint``."""
    return ServerUnreachableError(f"the connection to {endpoint} was closed while it was in use")
