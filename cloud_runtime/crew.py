"""Threads that share a list of pieces: one budget for all nets, whatever library computes them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable


class Crew:
    """Threads that help the caller with a list of pieces. The caller works too, so one thread needs no hand-over."""

    def __init__(self, helpers: int) -> None:
        self._job: _Job | None = None
        self._generation = 0
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._help, name=f"engine-{i}", daemon=True) for i in range(helpers)]
        for thread in self._threads:
            thread.start()

    def run(self, work: Callable[..., None], pieces: list[tuple[int, int]]) -> None:
        """Calls ``work`` on every piece and returns when all are done; the first error is raised."""
        job = _Job(work, pieces)
        if self._threads and len(pieces) > 1:
            with self._changed:
                self._job = job
                self._generation += 1
                self._changed.notify_all()
        job.work()
        job.done.wait()
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _help(self) -> None:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._generation != seen)  # noqa: B023
                if self._closed:
                    return
                seen, job = self._generation, self._job
            if job is not None:
                job.work()


class _Job:
    """Pieces that several threads take one by one."""

    def __init__(self, work: Callable[..., None], pieces: list[tuple[int, int]]) -> None:
        self._work = work
        self._pieces = pieces
        self._next = itertools.count()  # next() is atomic in CPython
        self._left = len(pieces)
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.error: BaseException | None = None

    def work(self) -> None:
        while (index := next(self._next)) < len(self._pieces):
            try:
                if self.error is None:
                    self._work(*self._pieces[index])
            except BaseException as error:
                self.error = error
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    self.done.set()
