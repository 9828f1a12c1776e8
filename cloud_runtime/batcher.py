"""Decides which requests are computed together and whose turn it is; owns no socket, no thread and no clock.

Rows (images) are counted, not requests. Clients have their turns by start-time fair queueing (Goyal, Vin and Cheng,
1996): the more rows a client has had, the later its next request, whatever it sends at once. How many rows of one
client may wait depends on how many are free (dynamic thresholds, Choudhury and Hahne, 1998), so one that floods leaves
room. Work that cannot be done by its deadline is refused at once, and what is late in the queue is given back
uncomputed.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

from ensembler.protocol.errors import ConfigError
from ensembler.protocol.options import require_milliseconds

T = TypeVar("T")

# Of the time per row, the share of the newest batch: one odd batch does not rule.
NEWEST = 0.2
# And no batch counts as more than so many times what was known: a machine that stood still says nothing.
ODD = 10.0
# A queue takes longer than expected now and then: whoever would be done just in time behind it is refused.
WAIT_MARGIN = 1.5
# Of the longest batch, how much is filled whatever the deadlines.
SHORT = 0.1
# How many entries that no longer matter are kept, beyond as many as do, before they are swept out.
SPARE = 64


@dataclass(frozen=True, kw_only=True)
class BatchPolicy:
    """The bounds of the queue and of a batch.

    Attributes:
        max_batch_rows: rows computed together; a single larger request is computed alone.
        max_batch_ms: a batch is not filled beyond what is expected to take so long: large batches of slow nets gain
            nothing, and whoever comes meanwhile waits for all of one.
        max_queue_rows: rows that may wait, of all clients and models together.
        max_queue_bytes: bytes that may wait.
        max_client_rows: rows of one client that may wait; None for as many as are still free.
        batch_wait_ms: how long the oldest request may wait for company while the engine is free. 0 computes at once:
            under load requests gather by themselves while the engine is busy.

    Raises:
        ConfigError: a bound that would let nothing through, or a time that is none.
    """

    max_batch_rows: int = 64
    max_batch_ms: float = 200.0
    max_queue_rows: int = 1024
    max_queue_bytes: int = 256 * 1024 * 1024
    max_client_rows: int | None = None
    batch_wait_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_batch_rows", "max_queue_rows", "max_queue_bytes", "max_client_rows"):
            bound = getattr(self, name)
            if bound is not None and bound < 1:
                raise ConfigError(f"{_option(name)} {bound}: at least 1")
        for name in ("max_batch_ms", "batch_wait_ms"):
            require_milliseconds(_option(name), getattr(self, name))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(kw_only=True, slots=True, eq=False)
class Queued(Generic[T]):
    """A request in the queue; times in milliseconds of the caller's clock.

    Attributes:
        item: the caller's own.
        model: what computes it; requests of different models are never in one batch.
        client: who sent it.
        rows: images.
        size_bytes: of them.
        arrived_ms: when it came.
        deadline_ms: after which nobody waits for its answer.
        alone: computed in a batch of its own: after its batch was lost, so that a bad request spoils others only once.
    """

    item: T
    rows: int
    size_bytes: int
    arrived_ms: float
    deadline_ms: float
    model: Hashable = None
    client: Hashable = None
    alone: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a request was not taken.

    Attributes:
        reason: ``queue`` (it is full), ``share`` (of this client), or ``deadline`` (it could not be met).
        retry_after_ms: when to try again.
    """

    reason: str
    retry_after_ms: float


@dataclass(slots=True)
class _Client:
    rows: int = 0
    finish: float = 0.0  # the turn at which its last request ends, in rows of virtual time


@dataclass(slots=True)
class _Model:
    turns: list[tuple[float, int]] = field(default_factory=list)  # a heap of (start, ticket)
    rows: int = 0
    row_ms: float = 1.0
    measured: bool = False
    computing: int = 0  # rows that were taken and are not yet computed
    since_ms: float = 0.0  # when rows were taken last

    def remaining_ms(self, now_ms: float) -> float:
        """How long the rows that are being computed will still take."""
        return max(0.0, self.computing * self.row_ms - (now_ms - self.since_ms)) if self.computing else 0.0


class Batcher(Generic[T]):
    """The queue. Tell it ``computed`` after each batch: from that it knows how long a row takes."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self.rows = 0
        self.size_bytes = 0
        self._waiting: dict[int, Queued[T]] = {}  # by ticket, in order of arrival
        self._tickets = count()
        self._deadlines: list[tuple[float, int]] = []  # a heap; a ticket that no longer waits is skipped
        self._models: dict[Hashable, _Model] = {}
        self._clients: dict[Hashable, _Client] = {}
        self._active = 0  # clients with waiting rows
        self._turn = 0.0  # virtual time: the start of the request that was taken last

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, request: Queued[T], now_ms: float) -> Refusal | None:
        """Takes a request into the queue, or says why not.

        A request that alone exceeds the queue is taken by an empty one, so that it is not refused for ever.
        """
        model, client = self._model(request.model), self._clients.get(request.client) or _Client()
        wait_ms = self._expected_wait_ms(request, model, client, now_ms)
        if self._waiting:
            free = self.policy.max_queue_rows - self.rows
            if request.rows > free or self.size_bytes + request.size_bytes > self.policy.max_queue_bytes:
                return Refusal("queue", max(1.0, wait_ms))
            limit = free if self.policy.max_client_rows is None else min(free, self.policy.max_client_rows)
            if client.rows and client.rows + request.rows > limit:
                return Refusal("share", max(1.0, wait_ms))
        needed_ms = WAIT_MARGIN * wait_ms + request.rows * model.row_ms
        late = model.measured and now_ms + needed_ms > request.deadline_ms
        # With nothing before it, it is tried: only what is computed tells how long a row really takes.
        if late and (self._waiting or any(one.computing for one in self._models.values())):
            return Refusal("deadline", max(1.0, wait_ms))
        self._put(request)
        return None

    def put_back(self, request: Queued[T]) -> None:
        """Takes a request whose batch was lost, whatever the bounds: it was promised a place."""
        self.lost(request.model, request.rows)
        self._put(request)

    def expired(self, now_ms: float) -> list[Queued[T]]:
        """Removes and returns the requests whose deadline has passed."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, ticket = heapq.heappop(self._deadlines)
            if ticket in self._waiting:
                late.append(self._remove(ticket))
                self._sweep(self._model(late[-1].model))
        return late

    def take(self, now_ms: float, free: Collection[Hashable] | None = None) -> list[Queued[T]]:
        """Removes and returns the next batch; empty while nothing is due.

        Args:
            now_ms: the time.
            free: the models that can compute now; None for all.
        """
        due = [model for model in self._due(now_ms) if free is None or model in free]
        if not due:
            return []
        model = min((self._models[name] for name in due), key=lambda each: self._head(each.turns))
        turns = model.turns
        batch: list[Queued[T]] = []
        rows = 0
        until_ms = now_ms + self.policy.max_batch_ms
        while turns:
            start, ticket = turns[0]
            request = self._waiting.get(ticket)
            if request is None:
                heapq.heappop(turns)
                continue
            if batch and (request.alone or batch[0].alone or rows + request.rows > self.policy.max_batch_rows):
                break
            # Nor so many that it would end after a deadline, but for what costs next to nothing: else the smallest
            # batches, whose rows take longest, would be those of the busiest server.
            until_ms = max(now_ms + SHORT * self.policy.max_batch_ms, min(until_ms, request.deadline_ms))
            if batch and model.measured and now_ms + (rows + request.rows) * model.row_ms > until_ms:
                break
            heapq.heappop(turns)
            self._turn = max(self._turn, start)
            batch.append(self._remove(ticket))
            rows += request.rows
        model.computing += rows
        model.since_ms = now_ms
        self._sweep(model)
        return batch

    def wait_ms(self, now_ms: float) -> float | None:
        """Returns after how many milliseconds a batch is due for a free engine: 0 for now, None with an empty queue."""
        if not self._waiting:
            return None
        if self._due(now_ms):
            return 0.0
        return max(0.0, next(iter(self._waiting.values())).arrived_ms + self.policy.batch_wait_ms - now_ms)

    def next_deadline_ms(self) -> float | None:
        """Returns the earliest deadline in the queue."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def drop_all(self) -> list[Queued[T]]:
        """Empties the queue and returns what was in it, in order of arrival."""
        return [self._remove(ticket) for ticket in list(self._waiting)]

    def computed(self, model: Hashable, rows: int, elapsed_ms: float) -> None:
        """Learns from a finished batch how long a row of this model takes.

        Args:
            model: of the batch.
            rows: of the batch.
            elapsed_ms: since the batch before it was done, or since there was work again: what a row costs includes
                all that is done beside computing.
        """
        known = self._model(model)
        known.computing -= rows
        newest = elapsed_ms / max(1, rows)
        if known.measured:
            newest = min(newest, ODD * known.row_ms)
        known.row_ms += (NEWEST if known.measured else 1.0) * (newest - known.row_ms)
        known.measured = True

    def lost(self, model: Hashable, rows: int) -> None:
        """Takes back that rows are being computed."""
        self._model(model).computing -= rows

    def expected_ms(self, model: Hashable, rows: int) -> float | None:
        """Returns how long a batch will take; None before the first one."""
        known = self._model(model)
        return rows * known.row_ms if known.measured else None

    def waiting_rows(self, model: Hashable) -> int:
        """Returns the rows that wait for this model."""
        return self._model(model).rows

    def forget(self, model: Hashable) -> None:
        """Forgets a model for which nothing waits."""
        self._models.pop(model, None)

    # --- inside ---

    def _expected_wait_ms(self, request: Queued[T], model: _Model, client: _Client, now_ms: float) -> float:
        """At most until all is done that waits; and at most as many rows of each other client as of this one."""
        begun = everything = 0.0
        for one in self._models.values():
            begun += one.remaining_ms(now_ms)
            everything += one.rows * one.row_ms
        clients = self._active + (not client.rows)
        return begun + min(everything, (client.rows + request.rows) * clients * model.row_ms)

    def _put(self, request: Queued[T]) -> None:
        ticket = next(self._tickets)
        model, client = self._model(request.model), self._clients.get(request.client)
        if client is None:
            client = self._clients[request.client] = _Client()
        start = max(self._turn, client.finish)
        client.finish = start + request.rows
        if not client.rows:
            self._active += 1
        client.rows += request.rows
        model.rows += request.rows
        self.rows += request.rows
        self.size_bytes += request.size_bytes
        self._waiting[ticket] = request
        heapq.heappush(model.turns, (start, ticket))
        heapq.heappush(self._deadlines, (request.deadline_ms, ticket))

    def _remove(self, ticket: int) -> Queued[T]:
        request = self._waiting.pop(ticket)
        client = self._clients[request.client]
        client.rows -= request.rows
        if not client.rows:
            self._active -= 1
        self._models[request.model].rows -= request.rows
        self.rows -= request.rows
        self.size_bytes -= request.size_bytes
        return request

    def _due(self, now_ms: float) -> list[Hashable]:
        """The models with a batch to compute now: it is full, or its oldest request has waited long enough."""
        waiting = [(name, model) for name, model in self._models.items() if model.rows]
        if self.policy.batch_wait_ms <= 0:
            return [name for name, _ in waiting]
        oldest: dict[Hashable, float] = {}
        for request in self._waiting.values():
            oldest.setdefault(request.model, request.arrived_ms)
            if len(oldest) == len(waiting):
                break
        return [
            name
            for name, model in waiting
            if model.rows >= self.policy.max_batch_rows or oldest[name] + self.policy.batch_wait_ms <= now_ms
        ]

    def _head(self, turns: list[tuple[float, int]]) -> tuple[float, int]:
        while turns[0][1] not in self._waiting:
            heapq.heappop(turns)
        return turns[0]

    def _sweep(self, model: _Model) -> None:
        """Forgets what no longer matters, once there is more of it than of what does.

        Deadlines and turns of requests that left by the other way, and what clients had that have nothing waiting.
        """
        if not self._waiting:
            self._clients.clear()
            self._deadlines.clear()
            model.turns.clear()
            self._turn = 0.0
            return
        most = 2 * len(self._waiting) + SPARE
        for heap in (self._deadlines, model.turns):
            if len(heap) > most:
                heap[:] = [entry for entry in heap if entry[1] in self._waiting]
                heapq.heapify(heap)
        if len(self._clients) > 2 * self._active + SPARE:
            self._clients = {name: client for name, client in self._clients.items() if client.rows}

    def _model(self, name: Hashable) -> _Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = _Model()
        return model
