"""What a client counted about each server that it asks: for a screen, a log or an exporter of metrics."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ensembler.protocol.errors import BusyError, EnsemblerError


@dataclass(frozen=True, kw_only=True)
class ReplicaStatistics:
    """Numbers of one server since the client was made. No key, no image, no answer: they may be shown and logged.

    Attributes:
        party: which operator it belongs to: the position in the bundle's order.
        server: the address.
        preferred: whether the next request goes here first.
        resting: whether it failed a moment ago, so that the party's other replicas are asked first.
        requests: how often a request was sent here, repeated ones and status requests included.
        retries: how many of these had been sent before, to this replica or to another one.
        answers: how many of these were answered with a result.
        busy: how many of these were answered ``Busy``.
        failures: how many ended otherwise, by the name of the error's class.
        last_error: what was last said of a failure, or of being busy; None if nothing was.
        bytes_up: headers and payloads that were sent.
        bytes_down: headers and payloads of all replies.
        mean_ms: of the round trips of results, the server's time included; None before the first.
        max_ms: the longest of these; None before the first.
    """

    party: int
    server: str
    preferred: bool
    resting: bool
    requests: int
    retries: int
    answers: int
    busy: int
    failures: Mapping[str, int]
    last_error: str | None
    bytes_up: int
    bytes_down: int
    mean_ms: float | None
    max_ms: float | None


class Counts:
    """The numbers of one replica while they grow. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._retries = self._answers = self._busy = 0
        self._bytes_up = self._bytes_down = 0
        self._failures: Counter[str] = Counter()
        self._last_error: str | None = None
        self._sum_ms = self._max_ms = 0.0

    def sent(self, size: int, *, again: bool) -> None:
        """Counts a request of ``size`` bytes."""
        with self._lock:
            self._requests += 1
            self._retries += again
            self._bytes_up += size

    def received(self, size: int) -> None:
        """Counts a reply of ``size`` bytes, whatever it says."""
        with self._lock:
            self._bytes_down += size

    def answered(self, round_trip_ms: float) -> None:
        """Counts a result."""
        with self._lock:
            self._answers += 1
            self._sum_ms += round_trip_ms
            self._max_ms = max(self._max_ms, round_trip_ms)

    def failed(self, error: EnsemblerError) -> None:
        """Counts what came instead of a result."""
        with self._lock:
            if isinstance(error, BusyError):
                self._busy += 1
            else:
                self._failures[type(error).__name__] += 1
            self._last_error = str(error)

    def read(self, *, party: int, server: str, preferred: bool, resting: bool) -> ReplicaStatistics:
        """Returns the numbers as they are now, all of one moment."""
        with self._lock:
            return ReplicaStatistics(
                party=party,
                server=server,
                preferred=preferred,
                resting=resting,
                requests=self._requests,
                retries=self._retries,
                answers=self._answers,
                busy=self._busy,
                failures=dict(self._failures),
                last_error=self._last_error,
                bytes_up=self._bytes_up,
                bytes_down=self._bytes_down,
                mean_ms=self._sum_ms / self._answers if self._answers else None,
                max_ms=self._max_ms if self._answers else None,
            )
