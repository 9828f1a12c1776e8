"""One operator's server, as a client sees it: connections, retries, and errors that name it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import (
    BusyError,
    ConfigError,
    DeadlineExceededError,
    EnsemblerError,
    ExpiredError,
    InternalError,
    ProtocolError,
    ShuttingDownError,
    from_wire,
)
from ensembler.protocol.manifest import PartySpec, WireSpec
from ensembler.protocol.messages import ERROR, RESULT, Message, decode, encode
from ensembler.transport.base import Connection, Frames, Transport

Codes = npt.NDArray[np.uint8]

SHUTDOWN_RETRY_MS = 100.0
MIN_RETRY_MS = 1.0


@dataclass(frozen=True)
class Reply:
    """A result, and what travelled for it, headers included."""

    message: Message
    bytes_up: int
    bytes_down: int

    def number(self, name: str) -> float:
        """Returns a number of the reply's info, 0 where there is none."""
        return _number(self.message.info.get(name))


class Party:
    """Asks one server. Thread-safe: every exchange has a connection of its own.

    Args:
        server: the address, for errors.
        spec: which of the N nets it holds.
        transport: moves the frames.
    """

    def __init__(self, server: str, spec: PartySpec, transport: Transport) -> None:
        self.server = server
        self.spec = spec
        self.bodies_id = bytes.fromhex(spec.bodies_id)
        self._transport = transport
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def exchange(self, request: Message, deadline: float) -> Reply:
        """Sends a request until it is answered; every retry sends the same bytes.

        Encoding again would add new noise to the same image, which a server could average away.

        Args:
            request: the message.
            deadline: on the clock of ``time.monotonic()``, in seconds.

        Raises:
            TransportError: no answer in time; see its subclasses.
            ServerError: the server refused.
            ProtocolError: the server answered with something that is not an answer.
            ConfigError: closed meanwhile.
        """
        frames = encode(request)

        def accept(reply: Frames) -> Reply | None:
            message = decode(reply)
            if message.request_id != request.request_id:
                return None  # a late answer to an earlier request of this connection
            return Reply(message, sum(map(len, frames)), sum(map(len, reply)))

        while True:
            connection = self._borrow()
            try:
                reply = connection.exchange(frames, accept, deadline)
            except BaseException:
                # Whatever it was, an answer may still come on this line: no later request shall meet it.
                connection.close()
                raise
            self._give_back(connection)
            if reply.message.operation == RESULT:
                return reply
            error = _error_of(reply.message)
            if isinstance(error, BusyError):
                self._pause(error.retry_after_ms, deadline, error)
            elif isinstance(error, ShuttingDownError):
                self._pause(SHUTDOWN_RETRY_MS, deadline, error)
            elif isinstance(error, ExpiredError):
                raise DeadlineExceededError(
                    f"{self.server}: {error}; raise timeout_ms, or look at the server's load"
                ) from None
            else:
                raise error

    def answers(self, reply: Reply, rows: int, wire: WireSpec) -> Codes:
        """Returns the codes ``(rows, n, F)`` of this party's n nets.

        All are checked alike, before any is selected: a server that spoils one body's answer must not learn from the
        client's behaviour whether that body counts.

        Raises:
            ProtocolError: another shape, codec or other nets than were asked for.
        """
        message = reply.message
        expected = (rows, self.spec.num_nets, wire.answer_width)
        if message.tensor is None or message.tensor.shape != expected or message.bits != wire.answer_bits:
            shape = None if message.tensor is None else message.tensor.shape
            raise ProtocolError(
                f"{self.server} answered with shape {shape} in {message.bits} bits, {expected} in {wire.answer_bits} "
                "was asked for; is it the right server?"
            )
        if message.bodies_id != self.bodies_id:
            raise ProtocolError(f"{self.server} answered for other nets than were asked for")
        return message.tensor

    def close(self) -> None:
        """Closes all connections; exchanges in other threads end with an error."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._transport.close()

    def _pause(self, wait_ms: float, deadline: float, error: EnsemblerError) -> None:
        """Waits before a retry; raises ``error`` when that would be too late."""
        wait_s = max(MIN_RETRY_MS, wait_ms) / 1000  # a server cannot make the device spin
        if time.monotonic() + wait_s >= deadline:
            raise error
        self._closed.wait(wait_s)

    def _borrow(self) -> Connection:
        with self._lock:
            if self._closed.is_set():
                raise ConfigError("this EdgeClient is closed; make a new one")
            if self._idle:
                return self._idle.pop()
        return self._transport.connect()

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed.is_set():
                self._idle.append(connection)
                return
        connection.close()


def exchange_all(parties: list[Party], requests: list[Message], deadline: float) -> list[Reply]:
    """Asks all parties at once and waits for all; one that fails, fails the call, whichever it is.

    Which nets are selected has no say in it: an answer that is not needed is waited for like any other. Ctrl-C ends the
    call at once; the other threads end by the deadline.

    Raises:
        EnsemblerError: the first party's that failed, in their order; see ``Party.exchange``.
    """
    if len(parties) == 1:
        return [parties[0].exchange(requests[0], deadline)]
    outcomes: list[Reply | Exception | None] = [None] * len(parties)

    def ask(index: int) -> None:
        try:
            outcomes[index] = parties[index].exchange(requests[index], deadline)
        except Exception as error:  # raised below, in the caller's thread
            outcomes[index] = error

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(1, len(parties))]
    for thread in threads:
        thread.start()
    ask(0)
    for thread in threads:
        thread.join()
    replies = []
    for party, outcome in zip(parties, outcomes, strict=True):
        if isinstance(outcome, EnsemblerError) and party.server not in str(outcome):
            outcome.args = (f"{party.server}: {outcome}",)
        if not isinstance(outcome, Reply):
            assert outcome is not None
            raise outcome
        replies.append(outcome)
    return replies


def _error_of(message: Message) -> EnsemblerError:
    info = message.info
    code, text = info.get("code"), info.get("message")
    if message.operation != ERROR or not isinstance(code, int) or not isinstance(text, str):
        return InternalError("the server answered with neither a result nor an error")
    return from_wire(code, text, _number(info.get("retry_after_ms")))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
