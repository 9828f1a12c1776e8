"""What other threads ask a server's loop for, between two of its requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class LoopCalls:
    """Calls that wait for a loop's thread.

    Args:
        wake: ends the loop's wait; for any thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[Callable[[], None]] = deque()
        self._ended = threading.Event()

    def ask(self, call: Callable[[], T]) -> Future[T]:
        """Has the loop's thread make a call; after the loop's end this one makes it."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._waiting.append(run)
        if self._ended.is_set():
            self.make()
        self._wake()
        return future

    def make(self) -> None:
        """Makes what waits; for the loop, and at its end for who asks, perhaps both at once."""
        while True:
            try:
                call = self._waiting.popleft()
            except IndexError:
                return
            call()

    def end(self) -> None:
        """Makes what waits, and lets whoever asks from now on do so itself; for the loop, when it ends."""
        self._ended.set()
        self.make()
