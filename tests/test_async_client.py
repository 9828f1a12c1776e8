"""``AsyncEdgeClient``: the same answers for asyncio, cancellation that returns at once, an end that does not hang."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np
import pytest

from ensembler import AsyncEdgeClient
from ensembler.protocol.errors import ConfigError, DeadlineExceededError, ImageError, ServerUnreachableError
from ensembler.streaming import Stream
from ensembler.transport.inprocess import InProcessTransport

LONG_MS = 60_000


@pytest.fixture(scope="module")
def running(tiny, serve):
    """A server process with CURVE; yields its endpoint."""
    with serve(tiny.server) as (endpoint, _):
        yield endpoint


@pytest.fixture(autouse=True)
def _no_thread_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert set(threading.enumerate()) <= before


def real(tiny, endpoint, **options):
    return AsyncEdgeClient(tiny.client, endpoint, timeout_ms=LONG_MS, **options)


def gated(tiny, gate, **options):
    """A client of a server in this process that the test can hold."""
    return AsyncEdgeClient(
        tiny.client, "in-process", **({"timeout_ms": LONG_MS} | options), transport=InProcessTransport(gate)
    )


async def arrived(gate, count):
    """Waits until ``count`` more requests are with the server."""
    for _ in range(count):
        assert await asyncio.to_thread(gate.arrived.acquire, timeout=30)


def test_many_requests_at_once_get_their_own_answers_from_a_real_server(tiny, running, tiny_images, expected):
    async def main():
        async with real(tiny, running) as client:
            return await asyncio.gather(*(client.predict(image) for image in tiny_images))

    found = asyncio.run(main())
    np.testing.assert_array_equal(np.stack([result.logits for result in found]), expected)


def test_batch_status_and_labels_are_those_of_the_client(tiny, running, tiny_images, expected):
    async def main():
        async with real(tiny, running) as client:
            assert client.labels == ("red", "grün", "blue")
            return await client.predict_batch(list(tiny_images[:5])), await client.status()

    found, status = asyncio.run(main())
    np.testing.assert_array_equal(np.stack([result.logits for result in found]), expected[:5])
    assert status["fits"] is True


@pytest.mark.parametrize("kind", ["list", "async"])
def test_a_stream_takes_iterables_of_both_kinds(tiny, running, tiny_images, expected, kind):
    async def camera():
        for image in tiny_images:
            await asyncio.sleep(0)
            yield image

    async def main():
        async with real(tiny, running) as client:
            source = camera() if kind == "async" else list(tiny_images)
            return [item async for item in client.stream(source)]

    found = asyncio.run(main())
    assert [index for index, _ in found] == list(range(len(tiny_images)))
    np.testing.assert_array_equal(np.stack([result.logits for _, result in found]), expected)


def test_the_loop_runs_on_while_calls_wait(tiny, gate, tiny_images):
    async def main():
        async with gated(tiny, gate) as client:
            gate.open.clear()
            call = asyncio.create_task(client.predict(tiny_images[0]))
            await arrived(gate, 1)
            assert not call.done()
            gate.open.set()
            return await call

    assert asyncio.run(main()).label


# --- cancellation ---


def test_cancelling_a_call_returns_at_once_and_the_next_one_gets_its_own_answer(tiny, gate, tiny_images, expected):
    async def main():
        async with gated(tiny, gate) as client:
            gate.open.clear()
            call = asyncio.create_task(client.predict(tiny_images[0]))
            await arrived(gate, 1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert gate.at_once == 1  # its thread still waits for the server
            gate.open.set()
            return await client.predict(tiny_images[1])

    np.testing.assert_array_equal(asyncio.run(main()).logits, expected[1])


def test_a_call_that_is_cancelled_before_a_thread_is_free_is_never_sent(tiny, gate, tiny_images):
    async def main():
        async with gated(tiny, gate, max_calls=1) as client:
            gate.open.clear()
            first = asyncio.create_task(client.predict(tiny_images[0]))
            await arrived(gate, 1)
            second = asyncio.create_task(client.predict(tiny_images[1]))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            gate.open.set()
            await first
            await client.predict(tiny_images[2])
            await arrived(gate, 1)

    asyncio.run(main())
    assert not gate.arrived.acquire(blocking=False)


def test_waiting_for_a_thread_counts_against_the_deadline(tiny, gate, tiny_images):
    async def main():
        async with gated(tiny, gate, max_calls=1) as client:
            gate.open.clear()
            first = asyncio.create_task(client.predict(tiny_images[0]))
            await arrived(gate, 1)
            late = asyncio.create_task(client.predict(tiny_images[1], timeout_ms=1))
            asyncio.get_running_loop().call_later(0.05, gate.open.set)
            with pytest.raises(DeadlineExceededError, match="none of 1 threads was free"):
                await late
            await first

    asyncio.run(main())


def test_a_stream_that_is_left_stops_reading(tiny, gate, tiny_images):
    ended = []

    async def camera():
        try:
            while True:
                for image in tiny_images:
                    yield image
                    await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def main():
        source = camera()
        async with (
            gated(tiny, gate) as client,
            contextlib.aclosing(source),
            contextlib.aclosing(client.stream(source, newest=True)) as answers,
        ):
            async for _ in answers:
                break

    asyncio.run(main())
    assert ended == [True]


def test_cancelling_a_stream_that_waits_for_its_source_returns_at_once(tiny, gate, tiny_images):
    waiting = threading.Event()

    async def camera():
        yield tiny_images[0]
        waiting.set()
        await asyncio.Event().wait()

    async def main():
        async with gated(tiny, gate) as client:

            async def watch():
                async for _ in client.stream(camera()):
                    pass

            task = asyncio.create_task(watch())
            assert await asyncio.to_thread(waiting.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_a_stream_whose_end_is_cancelled_is_closed_all_the_same(tiny, gate, tiny_images, monkeypatch):
    closed = []
    close = Stream.close
    monkeypatch.setattr(Stream, "close", lambda self, **options: (closed.append(True), close(self, **options)))

    async def main():
        waiting, ending, release = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def camera():
            yield tiny_images[0]
            try:
                waiting.set()
                await asyncio.Event().wait()
            finally:
                ending.set()
                await release.wait()

        async with gated(tiny, gate) as client:

            async def watch():
                async for _ in client.stream(camera()):
                    pass

            task = asyncio.create_task(watch())
            await waiting.wait()
            task.cancel()
            await ending.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert closed
            release.set()

    asyncio.run(asyncio.wait_for(main(), 30))


# --- errors and ends ---


def test_an_error_of_the_async_source_comes_after_the_answers_to_what_it_gave(tiny, gate, tiny_images):
    async def camera():
        yield tiny_images[0]
        raise OSError("the camera is gone")

    async def main():
        async with gated(tiny, gate) as client:
            stream = client.stream(camera())
            assert (await anext(stream))[0] == 0
            with pytest.raises(OSError, match="the camera is gone"):
                await anext(stream)

    asyncio.run(main())


def test_errors_are_those_of_the_client(tiny, gate, tiny_images):
    async def main():
        async with gated(tiny, gate) as client:
            with pytest.raises(ImageError, match="not a readable image"):
                await client.predict(b"not an image")
            with pytest.raises(ConfigError, match="timeout_ms"):
                await client.predict(tiny_images[0], timeout_ms=0)
            with pytest.raises(ConfigError, match="in_flight = 0"):
                client.stream([], in_flight=0)
            with pytest.raises(ImageError, match=r"for one give \[image\]"):
                client.stream("photo.jpg")

    asyncio.run(main())
    with pytest.raises(ConfigError, match="max_calls = 0"):
        gated(tiny, gate, max_calls=0)


def test_closing_ends_the_calls_that_are_under_way(tiny, tiny_images, tmp_path):
    """Nobody listens at the address, and the deadlines are a minute away."""

    async def main():
        client = real(tiny, f"ipc://{tmp_path}/nobody", plaintext=True, max_calls=3)
        calls = [asyncio.create_task(client.predict(image)) for image in tiny_images[:6]]
        await asyncio.sleep(0)
        await client.aclose()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends if not isinstance(end, ServerUnreachableError | ConfigError)] == []
        assert all("closed" in str(end) for end in ends)
        with pytest.raises(ConfigError, match="closed"):
            await client.predict(tiny_images[0])
        with pytest.raises(ConfigError, match="closed"):
            client.stream(tiny_images)
        await client.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_one_client_serves_several_loops_one_after_the_other(tiny, gate, tiny_images, expected):
    client = gated(tiny, gate)
    for index in range(2):
        np.testing.assert_array_equal(asyncio.run(client.predict(tiny_images[index])).logits, expected[index])
    asyncio.run(client.aclose())
