"""Many images through one client: several calls at once, answers in order, never far ahead of who takes them.

A reader thread takes images from the source, worker threads predict them, and whoever wants the answers takes them in
the order of the images. Start reading at ``Stream.take``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from ensembler.edge_runtime.images import nth
from ensembler.process import OwnProcess
from ensembler.protocol.errors import ImageError
from ensembler.protocol.options import whole

Given = TypeVar("Given")  # an image, or what stands for one
Answer = TypeVar("Answer")

MAX_IN_FLIGHT = 64
# A source that is only slow ends its reader within this time; one that gives nothing more cannot be interrupted.
SOURCE_PATIENCE_S = 1.0


def checked_in_flight(in_flight: int) -> int:
    """Returns ``in_flight`` if that many calls can run at once.

    Raises:
        ConfigError: less than 1, or more than ``MAX_IN_FLIGHT``.
    """
    return whole("in_flight", in_flight, 1, MAX_IN_FLIGHT)


class Stream(Generic[Given, Answer]):
    """Predicts the images of one source; used by one consumer.

    Args:
        predict: called in the worker threads.
        images: read in a thread of its own.
        in_flight: how many images may be started and not yet taken.
        newest: False reads only as far as there are free places. True reads all the time; an image that finds no free
            place waits, and is replaced by the next.
    """

    def __init__(
        self, predict: Callable[[Given], Answer], images: Iterator[Given], *, in_flight: int, newest: bool
    ) -> None:
        self._predict = predict
        self._in_flight = in_flight
        self._newest = newest
        self._changed = threading.Condition()
        self._waiting: tuple[int, Given] | None = None  # only while all places are taken
        self._started: deque[tuple[int, Future[Answer]]] = deque()  # and not yet taken, in order
        self._ended = False
        self._failure: BaseException | None = None  # of the source
        self._closed = False
        self._process = OwnProcess()
        self._workers = ThreadPoolExecutor(in_flight, thread_name_prefix="ensembler-stream")
        # A daemon: a source may never give its next image, and the program shall end all the same.
        self._reader = threading.Thread(target=self._read, args=(images,), name="ensembler-stream-source", daemon=True)
        self._reader.start()

    def take(self) -> tuple[int, Answer] | None:
        """Waits for the next answer.

        Returns:
            The image's position in the source and its answer; None when the source has ended or the stream was closed.

        Raises:
            ConfigError: this is a forked child of the process that began the stream.
            Exception: what ``predict`` or the source raised, after the answers of the images before it.
        """
        self._process.require()
        with self._changed:
            self._changed.wait_for(lambda: self._started or self._ended or self._closed)
            if self._closed:
                return None
            if not self._started:
                if self._failure is not None:
                    raise self._failure
                return None
            index, future = self._started[0]
        try:
            answer = future.result()
        except ImageError as error:
            raise nth(index, error) from error
        with self._changed:
            self._started.popleft()
            self._start()
            self._changed.notify_all()
        return index, answer

    def close(self, *, wait: bool = True) -> None:
        """Stops reading and forgets what has not begun; does nothing in a forked child.

        Args:
            wait: until the calls in flight have ended, by their deadline at the latest. A source that does not give its
                next image within ``SOURCE_PATIENCE_S`` is left behind in its daemon thread.
        """
        if not self._process.here:
            return
        with self._changed:
            self._closed = True
            self._waiting = None
            self._changed.notify_all()
        self._workers.shutdown(wait=wait, cancel_futures=True)
        if wait:
            self._reader.join(SOURCE_PATIENCE_S)

    def _read(self, images: Iterator[Given]) -> None:
        failure: BaseException | None = None
        try:
            index = 0
            while self._may_read():
                try:
                    image = next(images)
                except StopIteration:
                    break
                with self._changed:
                    self._waiting = (index, image)
                    self._start()
                    self._changed.notify_all()
                index += 1
        except BaseException as error:  # raised where the answers are taken
            failure = error
        with self._changed:
            self._ended, self._failure = True, failure
            self._changed.notify_all()

    def _may_read(self) -> bool:
        """Waits for a free place, unless the newest image is wanted; returns False when the stream was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._closed or len(self._started) < self._in_flight)
            return not self._closed

    def _start(self) -> None:
        """Starts the waiting image if a place is free; the caller holds the lock."""
        if self._waiting is None or self._closed or len(self._started) >= self._in_flight:
            return
        index, image = self._waiting
        self._waiting = None
        self._started.append((index, self._workers.submit(self._predict, image)))


def answers(
    predict: Callable[[Given], Answer], images: Iterator[Given], *, in_flight: int, newest: bool
) -> Generator[tuple[int, Answer], None, None]:
    """Yields what a ``Stream`` gives, and closes it however the loop over it ends; arguments as ``Stream``."""
    stream = Stream(predict, images, in_flight=in_flight, newest=newest)
    try:
        while (item := stream.take()) is not None:
            yield item
    finally:
        stream.close()
