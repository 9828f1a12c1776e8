"""The server: receive, decode, queue, compute, encode, send. ``Server.run`` is the loop.

One thread does everything but the computing, so the queue needs no locks; a second one computes what takes longer than
a few milliseconds. A bad request gets a
typed error and nothing else happens; an error in the engine is logged whole and answered as "internal error".
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ensembler.cloud_runtime.batcher import Batcher, BatchPolicy, Queued
from ensembler.cloud_runtime.engine import Codes, Engine
from ensembler.protocol.errors import (
    BadRequestError,
    BusyError,
    ExpiredError,
    InternalError,
    ShuttingDownError,
    UnknownBodiesError,
    WireError,
)
from ensembler.protocol.messages import (
    ERROR,
    INFER,
    RESULT,
    STATUS,
    Message,
    decode,
    encode,
    peek_request_id,
)
from ensembler.transport.zmq_server import Incoming, ServerSocket

log = logging.getLogger("ensembler.server")

# How long a server that was told to stop goes on with the work it has.
GRACE_MS = 10_000.0
NO_ID = bytes(16)
INLINE_MS = 5.0
# Messages taken in one go: a flood must not keep the loop from replying.
RECEIVE_BURST = 64


@dataclass(frozen=True)
class _Request:
    peer: bytes
    message: Message


@dataclass(frozen=True)
class _Done:
    """A batch that left the engine: its answers, or the error."""

    batch: list[Queued[_Request]]
    answers: Codes | None
    started_ms: float
    compute_ms: float


class Server:
    """Serves one bundle on one socket.

    Args:
        engine: warmed up.
        socket: bound.
        policy: of the batcher.
        clock_ms: milliseconds that never go back.
        inline_ms: a batch that is expected to take no longer is computed by the loop's own thread.
    """

    def __init__(
        self,
        engine: Engine,
        socket: ServerSocket,
        policy: BatchPolicy | None = None,
        clock_ms: Callable[[], float] = lambda: 1000 * time.monotonic(),
        inline_ms: float = INLINE_MS,
    ) -> None:
        self._inline_ms = inline_ms
        self._engine = engine
        self._wire = engine.manifest.wire
        self._bodies_id = bytes.fromhex(self._wire.bodies_id)
        self._socket = socket
        self._batcher: Batcher[_Request] = Batcher(policy or BatchPolicy())
        self._now = clock_ms
        self._todo: queue.SimpleQueue[list[Queued[_Request]] | None] = queue.SimpleQueue()
        self._done: deque[_Done] = deque()
        self._computing: list[Queued[_Request]] = []
        self._measured = False
        self._stopping = threading.Event()
        self.served_requests = 0

    def stop(self) -> None:
        """Begins to drain: new requests are refused, queued ones finished, then ``run`` returns. From any thread."""
        self._stopping.set()
        self._socket.wake()

    def run(self, grace_ms: float = GRACE_MS) -> None:
        """Serves until ``stop``.

        What is not finished ``grace_ms`` after it is answered with an error.
        """
        worker = threading.Thread(target=self._compute, name="compute", daemon=True)
        worker.start()
        give_up_ms = math.inf
        while True:
            if self._stopping.is_set() and give_up_ms == math.inf:
                log.info("draining: %d requests queued", len(self._batcher))
                give_up_ms = self._now() + grace_ms
            self._receive()
            self._drop_expired()
            self._start_batch(here=True)
            self._reply_finished()
            idle = not self._computing and not len(self._batcher) and not self._done
            if give_up_ms != math.inf and (idle or self._now() >= give_up_ms):
                break
            self._socket.wait(self._timeout_ms(give_up_ms))
        for request in (*self._computing, *self._batcher.drop_all()):
            self._refuse(request.item, ShuttingDownError("the server stopped before the request was computed"))
        self._todo.put(None)
        if not self._computing:
            worker.join()
        log.info("stopped after %d requests", self.served_requests)

    # --- the loop's parts, in the order of a request's life ---

    def _receive(self) -> None:
        for _ in range(RECEIVE_BURST):
            incoming = self._socket.receive()
            if incoming is None:
                return
            try:
                self._accept(incoming)
            except WireError as error:
                log.warning("refused a request: %s", error)
                request_id = peek_request_id(incoming.frames) or NO_ID
                self._send_error(incoming.peer, request_id, error)

    def _accept(self, incoming: Incoming) -> None:
        message = decode(incoming.frames)
        if message.operation == STATUS:
            self._send(incoming.peer, Message(operation=RESULT, request_id=message.request_id, info=self._status()))
            return
        if message.operation != INFER:
            raise BadRequestError(f"the server does not take the operation {message.operation!r}")
        if message.bodies_id != self._bodies_id:
            raise UnknownBodiesError("this server holds other nets than the client bundle was exported for")
        tensor = message.tensor
        if tensor is None or tensor.shape[1:] != self._wire.feature_shape:
            shape = None if tensor is None else tensor.shape[1:]
            raise BadRequestError(f"the features have shape {shape}, the nets take {self._wire.feature_shape}")
        if message.bits != self._wire.feature_codec.bits:
            raise BadRequestError(
                f"the features have {message.bits} bits a code, the nets take {self._wire.feature_codec.bits}"
            )
        if self._stopping.is_set():
            raise ShuttingDownError("the server is draining and takes no new requests")
        now = self._now()
        retry_after_ms = self._batcher.offer(
            Queued(
                item=_Request(incoming.peer, message),
                rows=len(tensor),
                size_bytes=tensor.nbytes,
                arrived_ms=now,
                deadline_ms=now + message.budget_ms,
            )
        )
        if retry_after_ms is not None:
            raise BusyError("the server's queue is full", retry_after_ms)

    def _drop_expired(self) -> None:
        for request in self._batcher.expired(self._now()):
            self._refuse(request.item, ExpiredError("the deadline passed while the request was queued"))

    def _start_batch(self, *, here: bool) -> None:
        """Gives the free engine its next batch: to the computing thread, or ``here`` if it will be short.

        Two threads cost two hand-overs, a fifth of a small batch's time; a loop that is away for a few milliseconds
        costs nobody anything.
        """
        if self._computing:
            return
        batch = self._batcher.take(self._now())
        if not batch:
            return
        self._computing = batch
        expected_ms = sum(request.rows for request in batch) * self._batcher.row_ms
        if here and self._measured and expected_ms <= self._inline_ms:
            self._done.append(self._computed(batch))
        else:
            self._todo.put(batch)

    def _compute(self) -> None:
        """The second thread: computes batches until it is given None."""
        while (batch := self._todo.get()) is not None:
            self._done.append(self._computed(batch))
            self._socket.wake()

    def _computed(self, batch: list[Queued[_Request]]) -> _Done:
        started = self._now()
        answers = None
        try:
            tensors = [request.item.message.tensor for request in batch]
            features = [tensor for tensor in tensors if tensor is not None]
            answers = self._engine.run(features[0] if len(features) == 1 else np.concatenate(features))
        except Exception:
            log.exception("the engine failed on a batch of %d requests", len(batch))
        return _Done(batch, answers, started, self._now() - started)

    def _reply_finished(self) -> None:
        while self._done:
            done = self._done.popleft()
            self._computing = []
            # The engine need not wait for the replies to be written.
            self._start_batch(here=False)
            start = 0
            for request in done.batch:
                rows = slice(start, start + request.rows)
                start += request.rows
                if done.answers is None:
                    self._refuse(request.item, InternalError("internal error; the server's log has the reason"))
                    continue
                info = {"queue_ms": done.started_ms - request.arrived_ms, "compute_ms": done.compute_ms}
                self._send(
                    request.item.peer,
                    Message(
                        operation=RESULT,
                        request_id=request.item.message.request_id,
                        bodies_id=self._bodies_id,
                        tensor=done.answers[rows],
                        bits=self._wire.answer_bits,
                        info=info,
                    ),
                )
                self.served_requests += 1
            if done.answers is not None:
                self._batcher.computed(len(done.answers), done.compute_ms)
                self._measured = True

    # --- replies ---

    def _refuse(self, request: _Request, error: WireError) -> None:
        self._send_error(request.peer, request.message.request_id, error)

    def _send_error(self, peer: bytes, request_id: bytes, error: WireError) -> None:
        info = {
            "code": error.code,
            "message": str(error)[:500],
            "retry_after_ms": float(getattr(error, "retry_after_ms", 0.0)),
        }
        self._send(peer, Message(operation=ERROR, request_id=request_id, info=info))

    def _send(self, peer: bytes, message: Message) -> None:
        if not self._socket.send(peer, encode(message)):
            log.info("a client went away before its reply")

    def _status(self) -> dict[str, str | float | int]:
        return {
            "bodies_id": self._wire.bodies_id,
            "num_nets": self._wire.num_nets,
            "precision": self._engine.manifest.precision,
            "state": "draining" if self._stopping.is_set() else "ready",
            "queued_rows": self._batcher.rows,
        }

    def _timeout_ms(self, give_up_ms: float) -> int | None:
        """Until something is due without a message: a batch for the free engine, a deadline, the end of the grace."""
        waits = [give_up_ms - self._now()]
        wait = self._batcher.wait_ms(self._now())
        if wait is not None:
            # While the engine is busy its wake-up comes first; expired requests are swept at a human pace.
            waits.append(100.0 if self._computing else wait)
        least = min(waits)
        return None if least == math.inf else max(0, math.ceil(least))
