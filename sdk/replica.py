"""One server of a party, as a client sees it: its connections, what it replies, and what is counted about it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from ensembler.protocol.errors import (
    ConfigError,
    DeadlineExceededError,
    EnsemblerError,
    ExpiredError,
    InternalError,
    from_wire,
)
from ensembler.protocol.messages import ERROR, RESULT, Message, decode
from ensembler.statistics import Counts
from ensembler.transport.base import Connection, Frames, Transport

# A replica that failed is asked after the others for this long; then it counts as one of them again.
REST_S = 5.0


@dataclass(frozen=True)
class Reply:
    """A result, whose it is, and what travelled for it, headers included."""

    message: Message
    server: str
    bytes_up: int
    bytes_down: int

    def number(self, name: str) -> float:
        """Returns a number of the reply's info, 0 where there is none."""
        return _number(self.message.info.get(name))


@dataclass(frozen=True)
class Request:
    """A message's bytes, which every replica gets as they are, and its id."""

    frames: Frames
    request_id: bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(map(len, self.frames))


class Replica:
    """Thread-safe: every request that is under way has a connection of its own.

    Args:
        server: the address.
        transport: moves the frames.
    """

    def __init__(self, server: str, transport: Transport) -> None:
        self.server = server
        self.counts = Counts()
        self._transport = transport
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._rests_until = 0.0

    @property
    def resting(self) -> bool:
        """Whether it failed a moment ago."""
        return time.monotonic() < self._rests_until

    def rest(self) -> None:
        """Notes a failure."""
        self._rests_until = time.monotonic() + REST_S

    def wake(self) -> None:
        """Notes that it is well."""
        self._rests_until = 0.0

    def ask(self, request: Request, *, again: bool) -> Asked:
        """Sends a request and returns at once; ``again`` says, for the counts, that it was sent before.

        Raises:
            TransportError: no line, see ``Connection.send``.
            ConfigError: closed meanwhile.
        """
        connection = self._borrow()
        try:
            self.counts.sent(request.size, again=again)
            begun = time.monotonic()
            connection.send(request.frames)
        except BaseException:
            connection.close()
            raise
        return Asked(self, connection, request, begun)

    def give_back(self, connection: Connection) -> None:
        """Takes a line back whose request was answered."""
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Closes all lines; requests under way in other threads end with an error."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._transport.close()

    def _borrow(self) -> Connection:
        """Returns a line that nobody uses; one that was lost while it was idle is dropped."""
        while True:
            with self._lock:
                if self._closed:
                    raise ConfigError("this EdgeClient is closed; make a new one")
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._transport.connect()
            if connection.usable():
                return connection
            connection.close()


class Asked:
    """A request that was sent to a replica and has no reply yet. Whoever has it calls ``close`` in the end."""

    def __init__(self, replica: Replica, connection: Connection, request: Request, begun: float) -> None:
        self.replica = replica
        self._connection = connection
        self._request = request
        self._begun = begun
        self._open = True

    def reply(self, until: float) -> Reply | None:
        """Waits for the reply.

        Returns:
            The result; None: nothing came until then, and may still come.

        Raises:
            EnsemblerError: there will be no result.
        """
        try:
            reply = self._connection.receive(self._accepted, until)
        except EnsemblerError:
            self.close()
            raise
        if reply is None:
            return None
        self._open = False
        self.replica.give_back(self._connection)
        self.replica.counts.received(reply.bytes_down)
        if reply.message.operation == RESULT:
            self.replica.counts.answered(1000 * (time.monotonic() - self._begun))
            return reply
        raise _error_of(reply.message, self.replica.server)

    def silence(self) -> EnsemblerError:
        """Returns what there is to say when the time is over."""
        return self._connection.silence()

    def close(self) -> None:
        """Closes a line that still waits: a late answer shall meet no later request."""
        if self._open:
            self._open = False
            self._connection.close()

    def _accepted(self, frames: Frames) -> Reply | None:
        message = decode(frames)
        if message.request_id != self._request.request_id:
            return None  # a late answer to an earlier request of this connection
        return Reply(message, self.replica.server, self._request.size, sum(map(len, frames)))


def _error_of(message: Message, server: str) -> EnsemblerError:
    info = message.info
    code, text = info.get("code"), info.get("message")
    if message.operation != ERROR or not isinstance(code, int) or not isinstance(text, str):
        return InternalError(f"{server} answered with neither a result nor an error")
    error = from_wire(code, f"{server}: {text}", _number(info.get("retry_after_ms")))
    if isinstance(error, ExpiredError):
        return DeadlineExceededError(f"{error}; raise timeout_ms, or look at the server's load")
    return error


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
