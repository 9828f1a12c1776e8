"""The client for asyncio: an ``EdgeClient`` in a few threads, not a second copy of it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from ensembler.client import EdgeClient, checked_timeout
from ensembler.edge_runtime.images import ImageLike, several
from ensembler.info import ClientInfo
from ensembler.prediction import Prediction
from ensembler.process import OwnProcess
from ensembler.protocol.errors import ConfigError, DeadlineExceededError
from ensembler.protocol.options import whole
from ensembler.servers import Servers
from ensembler.statistics import ReplicaStatistics
from ensembler.streaming import Stream, checked_in_flight

T = TypeVar("T")


class AsyncEdgeClient:
    """``EdgeClient`` for asyncio: the same calls, to be awaited.

    The constructor reads the bundle and loads the models, which blocks for a moment; it needs no running loop.

    Cancelling a call (``task.cancel()``, ``asyncio.timeout``) returns at once. What had not begun never begins; a call
    that is under way goes on in its thread until its answer or its deadline, and its answer is dropped. The image may
    have reached the server.

    Args:
        bundle: as ``EdgeClient``.
        server: as ``EdgeClient``.
        max_calls: how many calls run at once, each in a thread. Further ones wait, and the wait counts against their
            deadline.
        options: the keyword arguments of ``EdgeClient``.

    Raises:
        ConfigError: an impossible option; otherwise errors as ``EdgeClient``.
    """

    def __init__(self, bundle: str | os.PathLike[str], server: Servers, *, max_calls: int = 8, **options: Any) -> None:
        self._max_calls = whole("max_calls", max_calls, 1)
        self._client = EdgeClient(bundle, server, **options)
        self._process = OwnProcess()
        self._threads = ThreadPoolExecutor(self._max_calls, thread_name_prefix="ensembler-async")
        self._closed = threading.Event()

    async def predict(self, image: ImageLike, *, timeout_ms: float | None = None) -> Prediction:
        """Classifies one image; see ``EdgeClient.predict``."""
        return await self._call(lambda left_ms: self._client.predict(image, timeout_ms=left_ms), timeout_ms)

    async def predict_batch(self, images: Sequence[ImageLike], *, timeout_ms: float | None = None) -> list[Prediction]:
        """Classifies several images, in order; see ``EdgeClient.predict_batch``."""
        return await self._call(lambda left_ms: self._client.predict_batch(images, timeout_ms=left_ms), timeout_ms)

    async def status(self, *, timeout_ms: float | None = None) -> dict[str, Any]:
        """Asks the server for its state; see ``EdgeClient.status``."""
        return await self._call(lambda left_ms: self._client.status(timeout_ms=left_ms), timeout_ms)

    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        in_flight: int = 4,
        newest: bool = False,
        timeout_ms: float | None = None,
    ) -> AsyncGenerator[tuple[int, Prediction], None]:
        """Yields ``(index, prediction)`` for the images of an iterable; see ``EdgeClient.stream``.

        An async iterable is read in this loop, another one in a thread of its own. Leaving the loop early stops
        reading; the calls in flight end in their threads, by their deadline. ``contextlib.aclosing`` makes that happen
        at the ``break`` instead of some time after it.
        """
        self._require_usable()
        timeout = self._client.timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        return self._answers(
            images if isinstance(images, AsyncIterable) else several(images),
            lambda image: self._client.predict(image, timeout_ms=timeout),
            in_flight=checked_in_flight(in_flight),
            newest=newest,
        )

    async def _answers(
        self,
        images: Iterator[ImageLike] | AsyncIterable[ImageLike],
        predict: Callable[[ImageLike], Prediction],
        *,
        in_flight: int,
        newest: bool,
    ) -> AsyncGenerator[tuple[int, Prediction], None]:
        bridge: _Bridge | None = None
        if isinstance(images, AsyncIterable):
            images = bridge = _Bridge(aiter(images))
        stream = Stream(predict, images, in_flight=in_flight, newest=newest)
        # A thread of its own: a stream that waits for its source must not take one from the calls.
        taker = ThreadPoolExecutor(1, thread_name_prefix="ensembler-async-stream")
        try:
            while (item := await asyncio.wrap_future(taker.submit(stream.take))) is not None:
                yield item
        finally:
            try:
                if bridge is not None:
                    await bridge.aclose()
            finally:  # also when that wait is cancelled
                stream.close(wait=False)
                taker.shutdown(wait=False)

    def info(self) -> ClientInfo:
        """Says what this client is; see ``EdgeClient.info``."""
        return self._client.info()

    def statistics(self) -> tuple[ReplicaStatistics, ...]:
        """Returns what was counted about each server; see ``EdgeClient.statistics``."""
        return self._client.statistics()

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, index = class."""
        return self._client.labels

    async def aclose(self) -> None:
        """Closes all connections; calls that are under way end with an error, streams at their next image.

        Waits for the threads of the calls, which end as soon as they notice: waiting for the server ends at once, a
        running head or tail is not interrupted.
        """
        self._closed.set()
        if self._process.here:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._client.close()
        self._threads.shutdown(wait=True)  # calls that still wait for a thread fail at once, in ``work``

    async def __aenter__(self) -> AsyncEdgeClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled; see ``EdgeClient``."""
        self._client.__reduce__()

    def __repr__(self) -> str:
        return f"Async{self._client!r}"

    def _require_usable(self) -> None:
        self._process.require()
        if self._closed.is_set():
            raise ConfigError("this AsyncEdgeClient is closed; make a new one")

    async def _call(self, call: Callable[[float], T], timeout_ms: float | None) -> T:
        """Runs ``call`` in a thread, with the milliseconds that are left of its deadline when a thread is free."""
        timeout = self._client.timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        deadline = time.monotonic() + timeout / 1000
        self._require_usable()

        def work() -> T:
            self._require_usable()
            left_ms = 1000 * (deadline - time.monotonic())
            if left_ms <= 0:
                raise DeadlineExceededError(
                    f"none of {self._max_calls} threads was free before the deadline; raise max_calls or timeout_ms, "
                    "or start fewer calls at once"
                )
            return call(left_ms)

        return await asyncio.wrap_future(self._threads.submit(work))


class _Bridge(Iterator[ImageLike]):
    """Gives the images of an async iterator to a thread; made and closed in the loop that runs the iterator."""

    def __init__(self, images: AsyncIterator[ImageLike]) -> None:
        self._images = images
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._next: Future[ImageLike] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._closed = False

    def __next__(self) -> ImageLike:
        with self._lock:
            if self._closed:
                raise StopIteration
            self._next = asyncio.run_coroutine_threadsafe(self._advance(), self._loop)
        try:
            return self._next.result()
        except StopAsyncIteration:
            raise StopIteration from None

    async def _advance(self) -> ImageLike:
        self._task = asyncio.current_task()
        return await anext(self._images)

    async def aclose(self) -> None:
        """Ends the wait of ``__next__``; when this returns, nothing runs in the iterator any more."""
        with self._lock:
            self._closed = True
        if self._next is not None:
            self._next.cancel()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
