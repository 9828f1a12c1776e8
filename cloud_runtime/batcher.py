"""Decides which requests are computed together; owns no socket, no thread and no clock.

Rows (images) are counted, not requests. Work whose deadline has passed is given back before it costs compute, and a
full queue refuses at once with a time to try again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BatchPolicy:
    """The bounds of the queue and of a batch.

    Attributes:
        max_batch_rows: rows computed together; a single larger request is computed alone.
        max_queue_rows: rows that may wait.
        max_queue_bytes: bytes that may wait.
        batch_wait_ms: how long the oldest request may wait for company while the engine is free. 0 computes at once:
            under load requests gather by themselves while the engine is busy.
    """

    max_batch_rows: int = 64
    max_queue_rows: int = 1024
    max_queue_bytes: int = 256 * 1024 * 1024
    batch_wait_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Queued(Generic[T]):
    """A request in the queue; times in milliseconds of the caller's clock."""

    item: T
    rows: int
    size_bytes: int
    arrived_ms: float
    deadline_ms: float


@dataclass
class Batcher(Generic[T]):
    """A first-in first-out queue that hands out batches.

    ``row_ms`` is the recent compute time per row, for retry-after; tell ``computed`` after each batch.
    """

    policy: BatchPolicy
    row_ms: float = 1.0
    _queue: deque[Queued[T]] = field(default_factory=deque)
    _rows: int = 0
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows

    def offer(self, request: Queued[T]) -> float | None:
        """Takes a request into the queue.

        Returns:
            None when it was taken; else the milliseconds after which to try again. A request that alone exceeds the
            queue is taken by an empty queue, so that it is not refused for ever.
        """
        full = (
            self._rows + request.rows > self.policy.max_queue_rows
            or self._bytes + request.size_bytes > self.policy.max_queue_bytes
        )
        if full and self._queue:
            return max(1.0, self._rows * self.row_ms)
        self._queue.append(request)
        self._rows += request.rows
        self._bytes += request.size_bytes
        return None

    def expired(self, now_ms: float) -> list[Queued[T]]:
        """Removes and returns the requests whose deadline has passed."""
        late = [request for request in self._queue if request.deadline_ms <= now_ms]
        if late:
            self._queue = deque(request for request in self._queue if request.deadline_ms > now_ms)
            self._rows -= sum(request.rows for request in late)
            self._bytes -= sum(request.size_bytes for request in late)
        return late

    def take(self, now_ms: float) -> list[Queued[T]]:
        """Removes and returns the next batch, in order of arrival; empty while nothing is due."""
        wait = self.wait_ms(now_ms)
        if wait is None or wait > 0:
            return []
        batch: list[Queued[T]] = []
        rows = 0
        while self._queue and (not batch or rows + self._queue[0].rows <= self.policy.max_batch_rows):
            request = self._queue.popleft()
            batch.append(request)
            rows += request.rows
            self._bytes -= request.size_bytes
        self._rows -= rows
        return batch

    def wait_ms(self, now_ms: float) -> float | None:
        """Returns after how many milliseconds a batch is due for a free engine: 0 for now, None with an empty queue."""
        if not self._queue:
            return None
        if self._rows >= self.policy.max_batch_rows:
            return 0.0
        return max(0.0, self._queue[0].arrived_ms + self.policy.batch_wait_ms - now_ms)

    def drop_all(self) -> list[Queued[T]]:
        """Empties the queue and returns what was in it."""
        dropped = list(self._queue)
        self._queue.clear()
        self._rows = self._bytes = 0
        return dropped

    def computed(self, rows: int, compute_ms: float) -> None:
        """Learns from a finished batch how long a row takes: a moving average, so one odd batch does not rule."""
        self.row_ms += 0.2 * (compute_ms / max(1, rows) - self.row_ms)
