"""Serves crypto-clear inference: one client's session at a time, its engine in a process of its own.

The loop relays the engines' bytes, and gives orders to the process. It never sees a weight, a share or an activation:
those are in the process, and end with it. Start reading at ``CryptoServer.run``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zmq

from ensembler.crypto import bundle as bundles
from ensembler.crypto.engine import SERVER, require_installed
from ensembler.crypto.metrics import Meter, NoMeter
from ensembler.crypto.process import PartyProcess
from ensembler.crypto.relay import Relay
from ensembler.crypto.shares import REVEALED
from ensembler.protocol.errors import (
    BadRequestError,
    BusyError,
    EnsemblerError,
    ExpiredError,
    InternalError,
    NotAuthorizedError,
    ProtocolError,
    ShuttingDownError,
    UnknownBodiesError,
    WireError,
)
from ensembler.protocol.messages import (
    END,
    ERROR,
    LINK,
    OPEN,
    RESULT,
    RUN,
    SHARE,
    STATUS,
    Message,
    decode,
    encode,
    peek_request_id,
)
from ensembler.transport.loop_calls import LoopCalls
from ensembler.transport.zmq_server import Incoming, Peer, ServerSocket

_log = logging.getLogger("ensembler.server")

IDLE_S = 60.0
# Then it ends also if nobody asks: a device that was switched off says nothing, and its engine holds a gigabyte.
LONGEST_IDLE_S = 600.0
LONGEST_ORDER_S = 3600.0
RETRY_AFTER_MS = 1000.0
TICK_MS = 1000
# After it a loop that says nothing counts as hanging.
LIVE_S = 2.0
# Messages that are read before anything else is done.
RECEIVE_BURST = 64
# A client that said nothing for so long is sent an empty piece: whether it has gone is seen in sending alone.
SILENT_S = 5.0
NO_ID = bytes(16)
STAGES = {"open": "open", "run": "crypto", "finish": "clear"}  # what metrics call the process' orders

T = TypeVar("T")


class _Session:
    """A client, its engine's process, and what the process is doing."""

    def __init__(self, peer: Peer, session: bytes, folder: Path, threads: int, until: float) -> None:
        self.peer = peer
        self.process = PartyProcess()
        assert self.process.link is not None
        self.relay = Relay(self.process.link, session)
        self.order: str | None = "open"
        self.request_id = session  # of what the client waits for
        self.until = until
        self.share: bytes | None = None  # the client's, which may come before this side has computed its own
        self.own: bytes | None = None  # this side's, where it is the one that reveals
        self.used = time.monotonic()
        self.times: dict[str, float] = {}
        self.heard = time.monotonic()  # of its client
        try:
            self.process.order("open", folder=str(folder), rank=SERVER, threads=threads)
        except BaseException:
            self.process.close()
            raise

    def give(self, order: str, **arguments: Any) -> None:
        """Gives the process an order."""
        self.order = order
        self.process.order(order, **arguments)


class CryptoServer:
    """Answers on a socket until ``stop``.

    Args:
        socket: bound; closed by the caller.
        folder: a server's bundle.
        allow_insecure: whether a bundle of the engine without protection may be served.
        threads: of the layers after the boundary.
        idle_s: how long a session may do nothing before another client may have its place.
        meter: told what happens.

    Raises:
        BundleError: see ``bundle.load_server``.
        ConfigError: an engine without protection that nobody asked for.
        MissingExtraError: the bundle's engine is not installed.
    """

    def __init__(
        self,
        socket: ServerSocket,
        folder: Path,
        *,
        allow_insecure: bool = False,
        threads: int = 1,
        idle_s: float = IDLE_S,
        meter: Meter | None = None,
    ) -> None:
        self.manifest, _ = bundles.load_server(folder)
        bundles.require_protection(self.manifest, folder, allow_insecure)
        require_installed(self.manifest.settings)
        self._net_id = bytes.fromhex(self.manifest.net_id)
        self._steps = self.manifest.files[bundles.STEPS_FILE].sha256
        # Where all layers are under two parties, the server reveals its share and the client none.
        self._reveals = self.manifest.mode == bundles.FULL
        self._share_bytes = REVEALED.itemsize * math.prod(self.manifest.boundary_shape)
        self._socket, self._folder, self._threads, self._idle_s = socket, folder, threads, idle_s
        self._session: _Session | None = None
        self._meter: Meter = meter or NoMeter()
        self._calls = LoopCalls(socket.wake)
        self._sent_bytes = self._received_bytes = 0  # of the sessions that have ended
        self._stopping = False

    def stop(self) -> None:
        """Takes no new session and ends ``run`` when the order under way is done; for other threads and handlers."""
        self._stopping = True
        self._socket.wake()

    def run(self, grace_ms: float) -> None:
        """Serves.

        Args:
            grace_ms: after ``stop``, for the order that is under way.
        """
        stopped_at: float | None = None
        try:
            while True:
                self._calls.make()
                now = time.monotonic()
                if self._stopping:
                    stopped_at = now if stopped_at is None else stopped_at
                    if self._session is None or self._session.order is None or now - stopped_at > grace_ms / 1000:
                        return
                self._socket.wait(TICK_MS, self._interest())
                for _ in range(RECEIVE_BURST):  # a flood keeps the loop from nothing
                    if (incoming := self._socket.receive()) is None:
                        break
                    self._handle(incoming)
                self._serve_session()
        finally:
            self._end_session("the server stopped", ShuttingDownError("the server stopped; ask again later"))
            self._calls.end()

    def describe(self) -> dict[str, Any]:
        """Says how the server is; asks the loop, so that an answer means it lives.

        Raises:
            TimeoutError: the loop does not answer.
        """
        return self._calls.ask(self._described).result(timeout=LIVE_S)

    def _described(self) -> dict[str, Any]:
        session = self._session
        relay = None if session is None else session.relay
        return {
            "ready": not self._stopping,
            **self._status(),
            "session": session is not None,
            "sent_bytes": self._sent_bytes + (relay.sent_bytes if relay else 0),
            "received_bytes": self._received_bytes + (relay.received_bytes if relay else 0),
        }

    def _interest(self) -> list[tuple[int, int]]:
        session = self._session
        if session is None:
            return []
        return [(session.process.fileno(), zmq.POLLIN), *session.relay.interest()]

    # --- what clients send ---

    def _handle(self, incoming: Incoming) -> None:
        peer = incoming.peer
        request_id = NO_ID
        try:
            message = decode(incoming.frames)
            request_id = message.request_id
            if not self._socket.allows(incoming.device):
                raise NotAuthorizedError("this device's key was withdrawn; ask the server's operator")
            self._take(peer, message)
        except WireError as error:
            if isinstance(error, ProtocolError):
                request_id = peek_request_id(incoming.frames) or NO_ID
            if self._session is not None and self._session.peer == peer:
                self._end_session(str(error), None)
            self._refuse(peer, request_id, error)

    def _take(self, peer: Peer, message: Message) -> None:
        if message.operation == STATUS:
            return self._answer(peer, message.request_id, self._status())
        if message.operation == OPEN:
            return self._open(peer, message)
        session = self._session
        if message.operation not in (LINK, RUN, SHARE, END):
            raise BadRequestError(
                f"this server runs crypto-clear inference and takes no {message.operation!r}; the client's bundle is "
                "of another kind"
            )
        if session is None or session.peer != peer:
            if message.operation in (LINK, END):
                return None  # of a session that has ended; its client was told
            raise BadRequestError("there is no session on this connection; it ended, open one again")
        session.heard = time.monotonic()
        if message.operation == LINK:
            session.relay.take(message)
        elif message.operation == END:
            self._end_session("its client ended it", None)
        elif message.operation == RUN:
            if session.order is not None:
                raise BadRequestError("the session is computing; one image after the other")
            session.used = session.heard
            session.request_id, session.until, session.times = message.request_id, _until(message), {}
            try:
                _of_engine(lambda: session.give("run", image=b""))
            except _EngineFailed as failed:
                _log.error("the engine failed: %s", failed)
                raise InternalError("the server's engine failed; its log has the reason") from None
        elif session.order not in ("run", "shared") or session.share is not None:
            raise BadRequestError("no share is awaited")
        elif self._reveals:
            session.share = b""
        elif message.tensor is None or message.tensor.size != self._share_bytes:
            raise BadRequestError(f"a share of this net has {self._share_bytes} bytes")
        else:
            session.share = message.tensor.tobytes()
        return None

    def _open(self, peer: Peer, message: Message) -> None:
        if self._stopping:
            raise ShuttingDownError("the server is stopping; ask again later, or another server")
        if message.bodies_id != self._net_id:
            raise UnknownBodiesError("the server holds another net than this client's bundle was exported with")
        if message.info.get("steps") != self._steps:
            raise UnknownBodiesError(
                "client and server hold other layers before the boundary; bring both bundles of one export"
            )
        session = self._session
        if session is not None and session.peer != peer:
            idle_s = time.monotonic() - session.used
            if session.order is not None or idle_s < self._idle_s:
                wait_s = max(RETRY_AFTER_MS / 1000, 0 if session.order else self._idle_s - idle_s)
                raise BusyError("another client's session has the server; one at a time", 1000 * wait_s)
        self._end_session("another one took its place", BusyError("the session was idle and ended; ask again"))
        self._session = _Session(peer, message.request_id, self._folder, self._threads, _until(message))
        _log.info("a session began")

    # --- what the engine's process says ---

    def _serve_session(self) -> None:
        session = self._session
        if session is None:
            return None
        try:
            while (piece := session.relay.outgoing()) is not None:
                if not self._socket.send(session.peer, encode(piece)):
                    return self._end_session("its client has gone", None)
            now = time.monotonic()
            if session.order is not None and now - session.heard > SILENT_S:
                session.heard = now
                if not self._socket.send(session.peer, encode(session.relay.empty())):
                    return self._end_session("its client has gone", None)
            while (answer := _of_engine(session.process.answer)) is not None:
                if "told" not in answer:
                    self._advance(session, answer)
            if session.share is not None and session.order == "shared":
                share, session.share = session.share, None
                if session.own is None:
                    _of_engine(lambda: session.give("finish", content=share))
                else:
                    session.order = None
                    self._finished(session, session.own, 0.0)
            if session.order is not None and time.monotonic() > session.until:
                raise ExpiredError("the deadline passed while the two parties computed")
            if session.order is None and time.monotonic() - session.used > LONGEST_IDLE_S:
                raise BusyError("the session was idle and ended; ask again")
        except WireError as error:
            self._end_session(str(error), error)
        except _EngineFailed as failed:
            # What it says is of the operator's machine; the log has it.
            _log.error("the engine failed: %s", failed)
            self._end_session("the engine failed", InternalError("the server's engine failed; its log has the reason"))

    def _advance(self, session: _Session, answer: Any) -> None:
        order, session.order = session.order or "", None
        session.times[f"{order}_ms"] = 1000.0 * answer["wall_s"]
        self._meter.stage(STAGES[order], answer["wall_s"])
        if order == "open":
            self._answer(session.peer, session.request_id, {})
        elif order == "run":
            session.order, session.own = "shared", answer.get("share")  # what the client sends is awaited
        else:
            self._finished(session, answer["result"], session.times["finish_ms"])
        session.used = time.monotonic()

    def _finished(self, session: _Session, result: bytes, clear_ms: float) -> None:
        """Sends the client what an image's computation gave."""
        info = {"crypto_ms": session.times["run_ms"], "clear_ms": clear_ms}
        self._answer(session.peer, session.request_id, info, np.frombuffer(result, np.uint8).reshape(1, -1))
        self._meter.answered()

    def _status(self) -> dict[str, Any]:
        """Returns what ``status`` answers."""
        session = self._session
        return {
            "bodies_id": self.manifest.net_id,
            "num_nets": self.manifest.num_nets,
            "precision": "float32",
            "state": "draining" if self._stopping else "ready",
            "queued_rows": int(session is not None and session.order is not None),
            "engine": self.manifest.settings.engine,
        }

    # --- parts ---

    def _answer(self, peer: Peer, request_id: bytes, info: dict[str, Any], tensor: Any = None) -> None:
        self._socket.send(peer, encode(Message(operation=RESULT, request_id=request_id, info=info, tensor=tensor)))

    def _refuse(self, peer: Peer, request_id: bytes, error: WireError) -> None:
        self._meter.refused(error)
        info: dict[str, Any] = {"code": error.code, "message": str(error)[:900]}
        if isinstance(error, BusyError):
            info["retry_after_ms"] = float(error.retry_after_ms)
        self._socket.send(peer, encode(Message(operation=ERROR, request_id=request_id, info=info)))

    def _end_session(self, why: str, error: WireError | None) -> None:
        """Ends the session, if there is one, and tells its client if ``error`` says what."""
        session, self._session = self._session, None
        if session is None:
            return
        session.process.close()
        self._sent_bytes += session.relay.sent_bytes
        self._received_bytes += session.relay.received_bytes
        _log.info("a session ended: %s", why)
        if error is not None:
            self._refuse(session.peer, session.request_id, error)


class _EngineFailed(Exception):  # noqa: N818
    """What this side's engine failed with."""


def _of_engine(do: Callable[[], T]) -> T:
    try:
        return do()
    except EnsemblerError as error:
        raise _EngineFailed(str(error)) from error


def _until(message: Message) -> float:
    return time.monotonic() + min(message.budget_ms / 1000, LONGEST_ORDER_S)
