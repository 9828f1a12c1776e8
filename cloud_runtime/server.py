"""The server: receive, decode, queue, compute, encode, send. ``Server.run`` is the loop.

One thread does everything but the computing, so the queue needs no locks; others compute what takes longer than a few
milliseconds. A bad request gets a typed error and nothing else happens; an error in the engine is logged whole and
answered as "internal error". Other threads have the loop do things for them: see ``Server.deploy``.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ensembler.cloud_runtime import models
from ensembler.cloud_runtime.batcher import Batcher, BatchPolicy, Queued
from ensembler.cloud_runtime.engine import Codes, Engine, EngineLostError
from ensembler.cloud_runtime.metrics import Meter, NoMeter
from ensembler.cloud_runtime.models import SHOWN_DIGITS, Model, Version
from ensembler.cloud_runtime.tracing import TRACEPARENT, tracer
from ensembler.protocol.errors import (
    BadRequestError,
    BusyError,
    ConfigError,
    ExpiredError,
    InternalError,
    NotAuthorizedError,
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
from ensembler.transport.base import Frames
from ensembler.transport.loop_calls import LoopCalls
from ensembler.transport.zmq_server import Incoming, Peer, ServerSocket

log = logging.getLogger("ensembler.server")

# How long a server that was told to stop goes on with the work it has.
GRACE_MS = 10_000.0
# Of each kind of refusal one is logged in so long.
LOGGED_MS = 1000.0
# How long the loop may take to answer before it counts as dead.
LIVE_S = 2.0
NO_ID = bytes(16)
INLINE_MS = 5.0
# Messages taken in one go: a flood must not keep the loop from replying.
RECEIVE_BURST = 64
# While the queue is full and others compute, messages are left to gather for so long: being woken by each costs the
# computing more than reading them does.
CROWDED_MS = 10
# What a poll can take; a deadline may lie beyond it.
LONGEST_WAIT_MS = 3_600_000
WITHDRAWN = "this device's key was withdrawn; ask the server's operator"
BUSY = {
    "queue": "the server's queue is full",
    "share": "this device has as much waiting as it may",
    "deadline": "the server has more to do than it could finish by the deadline",
}


class _Request(NamedTuple):
    peer: Peer
    device: str | None
    message: Message


@dataclass(eq=False)
class _Work:
    """A batch on its way through an engine.

    Attributes:
        batch: the requests.
        rows: of them together.
        model: of all of them.
        version: that computes it.
        elsewhere: not computed by the loop's thread.
        answers: None until it is computed, and if that failed.
        lost: what computed it is gone.
        started_ms: when its computing began.
        ended_ms: when it ended.
    """

    batch: list[Queued[_Request]]
    rows: int
    model: Model
    version: Version
    elsewhere: bool = False
    answers: Codes | None = None
    lost: bool = False
    started_ms: float = 0.0
    ended_ms: float = 0.0


class Server:
    """Serves bundles on one socket.

    Args:
        engine: of the first bundle, warmed up. ``run`` closes what it served.
        socket: bound; not closed.
        policy: of the batcher.
        meter: counts and times what happens.
        clock_ms: milliseconds that never go back.
        inline_ms: a batch that is expected to take no longer is computed by the loop's own thread, if its engine
            computes in this process.
    """

    def __init__(
        self,
        engine: Engine,
        socket: ServerSocket,
        policy: BatchPolicy | None = None,
        *,
        meter: Meter | None = None,
        clock_ms: Callable[[], float] = lambda: 1000 * time.monotonic(),
        inline_ms: float = INLINE_MS,
    ) -> None:
        self._inline_ms = inline_ms
        self._socket = socket
        self._meter = meter or NoMeter()
        self._tracer = tracer()
        self._batcher: Batcher[_Request] = Batcher(policy or BatchPolicy())
        self._now = clock_ms
        first = Model(engine)
        self._models: dict[bytes, Model] = {first.key: first}
        self._computing: set[_Work] = set()  # by all engines
        self._todo: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._done: deque[_Work] = deque()
        self._threads: list[threading.Thread] = []
        self._elsewhere = 0  # batches that the threads have
        self._busy_since_ms = 0.0
        self._behind = False  # more messages may be there than were read
        self._crowded = False  # the last request found no place
        self._unsaid: dict[str, tuple[float, int]] = {}  # by kind: when one was logged, and how many were not since
        self._calls = LoopCalls(socket.wake)
        self._stopping = threading.Event()
        self.served_requests = 0

    def add(self, engine: Engine) -> None:
        """Holds another bundle from the beginning; see ``deploy`` for later.

        Raises:
            ConfigError: it has the nets of one that is held.
        """
        model = Model(engine)
        if model.key in self._models:
            raise ConfigError(
                f"two bundles have the nets {_shown(model.bodies_id)}; give one of them, and let ensembler deploy "
                "replace it by the other"
            )
        self._models[model.key] = model

    # --- for other threads ---

    def stop(self) -> None:
        """Begins to drain: new requests are refused, queued ones finished, then ``run`` returns."""
        self._stopping.set()
        self._socket.wake()

    def deploy(self, engine: Engine) -> Future[Version | None]:
        """Lets a warmed-up engine serve from the next batch on.

        The one that served the same ``bodies_id`` finishes what it has and is closed. A new ``bodies_id`` is served
        beside the others.

        Returns:
            When it serves: the version that it replaced, whose ``unloaded`` tells when that is closed; None without
            one. The future raises ``BundleMismatchError`` where the clients of the old one would misread the new one.
        """
        return self._calls.ask(lambda: self._deploy(engine))

    def remove(self, bodies_id: str) -> Future[Version]:
        """Serves a model no more: new requests for it are refused, those that wait are finished, then it is closed.

        Args:
            bodies_id: or as much of its beginning as tells it from others. The future raises ``ConfigError`` otherwise.
        """
        return self._calls.ask(lambda: self._remove(bodies_id))

    def describe(self) -> dict[str, Any]:
        """Says what the server holds and whether it is ready; asks the loop, so that an answer means it lives.

        Raises:
            TimeoutError: the loop does not answer.
        """
        return self._calls.ask(self._described).result(timeout=LIVE_S)

    # --- the loop ---

    def run(self, grace_ms: float = GRACE_MS) -> None:
        """Serves until ``stop``.

        What is not finished ``grace_ms`` after it is answered with an error.
        """
        give_up_ms = math.inf
        while True:
            if self._stopping.is_set() and give_up_ms == math.inf:
                log.info("draining: %d requests queued", len(self._batcher))
                give_up_ms = self._now() + grace_ms
            self._calls.make()
            self._receive()
            self._drop_expired()
            self._start_batches(here=True)
            self._reply_finished()
            idle = not self._computing and not len(self._batcher) and not self._done
            if give_up_ms != math.inf and (idle or self._now() >= give_up_ms):
                break
            timeout_ms = self._timeout_ms(give_up_ms)
            if self._crowded and self._elsewhere and not self._behind:
                self._socket.pause(CROWDED_MS if timeout_ms is None else min(CROWDED_MS, timeout_ms))
            else:
                self._socket.wait(timeout_ms)
        unfinished = [request for work in self._computing for request in work.batch]
        for request in (*unfinished, *self._batcher.drop_all()):
            self._refuse(request.item, ShuttingDownError("the server stopped before the request was computed"))
        self._end_threads()
        self._calls.end()
        log.info("stopped after %d requests", self.served_requests)

    def _end_threads(self) -> None:
        for _ in self._threads:
            self._todo.put(None)
        if self._elsewhere:
            return  # one is stuck in its engine, which therefore cannot be closed
        for thread in self._threads:
            thread.join()
        for model in self._models.values():
            model.version.engine.close()

    # --- the loop's parts, in the order of a request's life ---

    def _receive(self) -> None:
        refused: list[tuple[Peer, Frames]] = []
        self._behind = self._receive_burst(refused)
        # One right after the other, as in ``_reply``: a flood's refusals cost the computing half as much.
        for peer, frames in refused:
            self._send(peer, frames)

    def _receive_burst(self, refused: list[tuple[Peer, Frames]]) -> bool:
        """Takes messages, adds the replies to those that it refuses, and says whether more may be there."""
        for _ in range(RECEIVE_BURST):
            incoming = self._socket.receive()
            if incoming is None:
                return False
            request_id = None
            try:
                if not self._socket.allows(incoming.device):
                    raise NotAuthorizedError(WITHDRAWN)
                began = time.perf_counter()
                message = decode(incoming.frames)
                request_id = message.request_id
                self._accept(incoming, message)
                if message.operation == INFER:
                    self._meter.decoded(time.perf_counter() - began)
            except WireError as error:
                self._note_refusal(error, incoming.device)
                request_id = request_id or peek_request_id(incoming.frames) or NO_ID
                refused.append((incoming.peer, _error(request_id, error)))
        return True

    def _accept(self, incoming: Incoming, message: Message) -> None:
        if message.operation == STATUS:
            info = self._status(message.bodies_id)
            status = Message(operation=RESULT, request_id=message.request_id, info=info)
            self._send(incoming.peer, encode(status))
            return
        if message.operation != INFER:
            raise BadRequestError(f"the server does not take the operation {message.operation!r}")
        model = self._models.get(message.bodies_id)
        if model is None or model.leaving:
            raise UnknownBodiesError(
                "this server holds other nets than the client bundle was exported for; serve the server bundle that "
                "was exported with it, or ask the server that has them"
            )
        wire, tensor = model.wire, message.tensor
        if tensor is None or tensor.shape[1:] != wire.feature_shape:
            shape = None if tensor is None else tensor.shape[1:]
            raise BadRequestError(f"the features have shape {shape}, the nets take {wire.feature_shape}")
        bits = wire.feature_codec.bits
        if message.bits != bits:
            raise BadRequestError(f"the features have {message.bits} bits a code, the nets take {bits}")
        if self._stopping.is_set():
            raise ShuttingDownError("the server is draining and takes no new requests")
        now = self._now()
        if not self._computing and not len(self._batcher):
            self._busy_since_ms = now
        refusal = self._batcher.offer(
            Queued(
                item=_Request(incoming.peer, incoming.device, message),
                rows=len(tensor),
                size_bytes=tensor.nbytes,
                arrived_ms=now,
                deadline_ms=now + message.budget_ms,
                model=model.key,
                client=incoming.device or incoming.peer,
            ),
            now,
        )
        self._crowded = refusal is not None
        if refusal is not None:
            raise BusyError(BUSY[refusal.reason], refusal.retry_after_ms)

    def _drop_expired(self) -> None:
        late = self._batcher.expired(self._now())
        for request in late:
            self._refuse(request.item, ExpiredError("the deadline passed while the request was queued"))
        for model in list(self._models.values()) if late else ():
            self._tidy(model, model.version)

    def _start_batches(self, *, here: bool) -> None:
        """Gives free engines their next batches: to a computing thread, or ``here`` if it will be short.

        Two threads cost two hand-overs, a fifth of a small batch's time; a loop that is away for a few milliseconds
        costs nobody anything.
        """
        while len(self._batcher):
            batch = self._batcher.take(self._now(), self._free())
            if not batch:
                return
            model = self._models[batch[0].model]  # type: ignore[index]
            work = _Work(batch, sum(request.rows for request in batch), model, model.version)
            work.version.computing += 1
            self._computing.add(work)
            expected_ms = self._batcher.expected_ms(model.key, work.rows)
            if here and work.version.engine.in_process and expected_ms is not None and expected_ms <= self._inline_ms:
                self._compute(work)
                self._done.append(work)
                return
            self._hand_over(work)

    def _free(self) -> list[bytes]:
        return [key for key, model in self._models.items() if model.version.free]

    def _hand_over(self, work: _Work) -> None:
        if self._elsewhere == len(self._threads):
            thread = threading.Thread(target=self._compute_elsewhere, name="compute", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._elsewhere += 1
        work.elsewhere = True
        self._todo.put(work)

    def _compute_elsewhere(self) -> None:
        """The other threads: each computes batches until it is given None."""
        while (work := self._todo.get()) is not None:
            self._compute(work)
            self._done.append(work)
            self._socket.wake()

    def _compute(self, work: _Work) -> None:
        work.started_ms = self._now()
        try:
            tensors = [request.item.message.tensor for request in work.batch]
            features = [tensor for tensor in tensors if tensor is not None]
            work.answers = work.version.engine.run(features[0] if len(features) == 1 else np.concatenate(features))
        except EngineLostError as error:
            log.error("a batch of %d requests was lost: %s", len(work.batch), error)
            work.lost = True
        except Exception:
            log.exception("the engine failed on a batch of %d requests", len(work.batch))
        work.ended_ms = self._now()

    def _reply_finished(self) -> None:
        while self._done:
            work = self._done.popleft()
            self._computing.remove(work)
            self._elsewhere -= work.elsewhere
            work.version.computing -= 1
            # From the end of the batch before it, or from when there was work again: all that a row costs.
            elapsed_ms, self._busy_since_ms = work.ended_ms - self._busy_since_ms, work.ended_ms
            if work.lost:
                self._try_again(work)
            elif work.answers is None:
                self._batcher.lost(work.model.key, work.rows)
            else:
                self._batcher.computed(work.model.key, work.rows, elapsed_ms)
            # The engine need not wait for the replies to be written.
            self._start_batches(here=False)
            if not work.lost:
                self._reply(work)
            self._tidy(work.model, work.version)

    def _reply(self, work: _Work) -> None:
        if work.answers is None:
            for request in work.batch:
                self._refuse(request.item, InternalError("internal error; the server's log has the reason"))
            return
        began = time.perf_counter()
        wire = work.model.wire
        compute_ms = work.ended_ms - work.started_ms
        written = []
        start = 0
        for request in work.batch:
            rows = slice(start, start + request.rows)
            start += request.rows
            item = request.item
            if not self._socket.allows(item.device):
                self._refuse(item, NotAuthorizedError(WITHDRAWN))
                continue
            queue_ms = work.started_ms - request.arrived_ms
            result = Message(
                operation=RESULT,
                request_id=item.message.request_id,
                bodies_id=work.model.key,
                tensor=work.answers[rows],
                bits=wire.answer_bits,
                info={"queue_ms": queue_ms, "compute_ms": compute_ms},
            )
            written.append((request, queue_ms, encode(result)))
        # One right after the other: ZeroMQ's thread, which each would wake, is awake after the first.
        for request, _, frames in written:
            self._send(request.item.peer, frames)
        self._meter.encoded((time.perf_counter() - began) / len(work.batch))
        self._meter.computed(work.model, work.version, work.rows, compute_ms / 1000)
        for request, queue_ms, _ in written:
            self.served_requests += 1
            self._meter.answered(work.model, queue_ms / 1000)
            self._note_answer(work, request, queue_ms, compute_ms)

    def _try_again(self, work: _Work) -> None:
        """A lost batch's requests are computed once more, each alone: one of them may be what killed the worker."""
        for request in work.batch:
            if request.alone:
                self._batcher.lost(work.model.key, request.rows)
                self._refuse(request.item, InternalError("what computed the request was lost twice; the log says more"))
            else:
                self._batcher.put_back(replace(request, alone=True))

    # --- models ---

    def _deploy(self, engine: Engine) -> Version | None:
        if self._stopping.is_set():
            raise ShuttingDownError("the server is draining")
        model = self._models.get(bytes.fromhex(engine.manifest.wire.bodies_id))
        if model is None:
            model = Model(engine)
            self._models[model.key] = model
            log.info("serving the nets %s in version %s", _shown(model.bodies_id), _shown(model.version.digest))
            return None
        before = model.replace(engine)
        digests = _shown(before.digest), _shown(model.version.digest)
        log.info("serving the nets %s: version %s is replaced by %s", _shown(model.bodies_id), *digests)
        before.retired = True
        self._tidy(model, before)
        return before

    def _remove(self, bodies_id: str) -> Version:
        model = models.find(self._models, bodies_id)
        log.info("serving the nets %s no more", _shown(model.bodies_id))
        model.leaving = model.version.retired = True
        self._tidy(model, model.version)
        return model.version

    def _tidy(self, model: Model, version: Version) -> None:
        """Lets go of a model that leaves when nothing waits for it, and of a version when it computes nothing."""
        held = self._models.get(model.key) is model
        if model.leaving and held and not self._batcher.waiting_rows(model.key) and not model.version.computing:
            del self._models[model.key]
            self._batcher.forget(model.key)
            held = False
        if held and version is model.version:
            return  # it has, or may get, something to compute
        if version.retired and not version.computing and version.unloaded.set_running_or_notify_cancel():
            # In a thread of its own: it may have processes to wait for.
            threading.Thread(target=_close, args=(version,), name="unload").start()

    def _described(self) -> dict[str, Any]:
        held = [
            {
                "bodies_id": model.bodies_id,
                "version": model.version.digest,
                "num_nets": model.wire.num_nets,
                "precision": model.version.engine.manifest.precision,
                "engine": model.version.engine.describe(),
                "alive": model.version.engine.alive(),
                "queued_rows": self._batcher.waiting_rows(model.key),
            }
            for model in self._models.values()
        ]
        ready = bool(held) and all(one["alive"] for one in held) and not self._stopping.is_set()
        return {"ready": ready, "draining": self._stopping.is_set(), "queued_rows": self._batcher.rows, "models": held}

    # --- replies ---

    def _note_refusal(self, error: WireError, device: str | None) -> None:
        """Counts it; logs one of a kind in a second, since under a flood the log would cost more than the refusing."""
        self._meter.refused(error)
        kind = type(error).__name__
        fields = {"event": "refused", "error": kind, "device": _shown(device)}
        self._log_seldom(kind, logging.WARNING, f"refused a request: {error}", fields)

    def _log_seldom(self, kind: str, level: int, text: str, fields: dict[str, Any]) -> None:
        now = self._now()
        logged_ms, unsaid = self._unsaid.get(kind, (-math.inf, 0))
        if now < logged_ms + LOGGED_MS:
            self._unsaid[kind] = (logged_ms, unsaid + 1)
            return
        self._unsaid[kind] = (now, 0)
        more = f" (and {unsaid} more since the last such line)" if unsaid else ""
        log.log(level, "%s%s", text, more, extra={"fields": fields | {"unsaid": unsaid}})

    def _note_answer(self, work: _Work, request: Queued[_Request], queue_ms: float, compute_ms: float) -> None:
        trace = request.item.message.info.get(TRACEPARENT) if self._tracer is not None else None
        if trace is None and not log.isEnabledFor(logging.DEBUG):
            return
        facts: dict[str, str | float | int] = {"nets": _shown(work.model.bodies_id), "rows": request.rows}
        facts |= {"queue_ms": queue_ms, "compute_ms": compute_ms}
        if trace is not None and self._tracer is not None:
            self._tracer.answered(str(trace), since_ms=self._now() - request.arrived_ms, attributes=facts)
        device = {"event": "answered", "device": _shown(request.item.device)}
        log.debug(
            "answered %d images of device %s after %.1f ms in the queue and %.1f ms of computing",
            request.rows,
            device["device"] or "unknown",
            queue_ms,
            compute_ms,
            extra={"fields": facts | device},
        )

    def _refuse(self, request: _Request, error: WireError) -> None:
        self._meter.refused(error)
        self._send(request.peer, _error(request.message.request_id, error))

    def _send(self, peer: Peer, frames: Frames) -> None:
        if not self._socket.send(peer, frames):
            self._log_seldom("away", logging.INFO, "a client was away, or read nothing, when its reply was there", {})

    def _status(self, bodies_id: bytes) -> dict[str, str | float | int]:
        """Of the nets that the asker has, or else of the first ones; a device need not know what else is served."""
        model = self._models.get(bodies_id) or next(iter(self._models.values()), None)
        if model is None:
            raise UnknownBodiesError("this server holds no nets")
        state = "ready" if model.version.engine.alive() else "waiting"
        return {
            "bodies_id": model.bodies_id,
            "num_nets": model.wire.num_nets,
            "precision": model.version.engine.manifest.precision,
            "state": "draining" if self._stopping.is_set() else state,
            "queued_rows": self._batcher.rows,
        }

    def _timeout_ms(self, give_up_ms: float) -> int | None:
        """Until something is due without a message: a batch for a free engine, a deadline, the end of the grace."""
        now = self._now()
        waits = [give_up_ms - now]
        deadline_ms = self._batcher.next_deadline_ms()
        if deadline_ms is not None:
            waits.append(deadline_ms - now)
            if any(self._batcher.waiting_rows(key) for key in self._free()):
                waits.append(self._batcher.wait_ms(now) or 0.0)
        least = min(waits)
        return None if least == math.inf else max(0, min(math.ceil(least), LONGEST_WAIT_MS))


def _error(request_id: bytes, error: WireError) -> Frames:
    info = {
        "code": error.code,
        "message": str(error)[:500],
        "retry_after_ms": float(getattr(error, "retry_after_ms", 0.0)),
    }
    return encode(Message(operation=ERROR, request_id=request_id, info=info))


def _close(version: Version) -> None:
    try:
        version.engine.close()
    except Exception:
        log.exception("version %s could not be unloaded", _shown(version.digest))
    log.info("version %s is unloaded", _shown(version.digest))
    version.unloaded.set_result(None)


def _shown(name: str | None) -> str:
    """The beginning of a digest or a public key: enough for people to tell them apart."""
    return "" if name is None else name[:SHOWN_DIGITS]
