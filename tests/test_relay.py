"""Device and server over a line that a test spoils: a right answer or one typed error, and a client that goes on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from relay import Relay

from ensembler import EdgeClient
from ensembler.protocol.errors import (
    DeadlineExceededError,
    EnsemblerError,
    ServerUnreachableError,
    TransportError,
)

LONG_MS = 60_000
SHORT_MS = 1500


@pytest.fixture(scope="module")
def running(tiny, serve):
    """A server process with CURVE that the tests of this module share; yields its endpoint."""
    with serve(tiny.server) as (endpoint, _):
        yield endpoint


@pytest.fixture
def relay(running):
    with Relay(running) as between:
        yield between


@pytest.fixture
def edge(tiny, relay, tiny_images, expected):
    """A client whose line has carried a first answer."""
    with EdgeClient(tiny.client, relay.endpoint, timeout_ms=LONG_MS) as client:
        right(client, tiny_images, expected, 0)
        yield client


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def right(client, images, expected, index, **options):
    np.testing.assert_array_equal(client.predict(images[index], **options).logits, expected[index])


def sent(relay, pool, client, image):
    """Starts a call, and returns its future when its answer has reached the relay, which holds it."""
    relay.hold("down")
    before = relay.arrived("down")
    waiting = pool.submit(client.predict, image)
    relay.until(lambda: relay.arrived("down") >= before + 128 * 3)  # a heartbeat is far smaller
    return waiting


def test_a_line_with_a_delay_gives_the_right_answer(relay, edge, tiny_images, expected):
    relay.delay(0.03)
    right(edge, tiny_images, expected, 1)


def test_a_slow_line_gives_the_right_answer_and_a_slower_one_a_deadline_error(relay, edge, tiny_images, expected):
    relay.throttle(50_000)
    right(edge, tiny_images, expected, 1)
    relay.throttle(200)
    with pytest.raises(DeadlineExceededError):
        edge.predict(tiny_images[2], timeout_ms=SHORT_MS)
    relay.throttle(None)
    right(edge, tiny_images, expected, 3)


def test_a_handshake_over_a_line_that_is_too_slow_is_an_error_that_says_so(tiny, relay, tiny_images, expected):
    relay.throttle(100)
    with EdgeClient(tiny.client, relay.endpoint, timeout_ms=SHORT_MS) as client:
        with pytest.raises(ServerUnreachableError, match="handshake did not finish"):
            client.predict(tiny_images[0])
        relay.throttle(None)
        right(client, tiny_images, expected, 1, timeout_ms=LONG_MS)


@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
def test_a_request_whose_line_is_cut_before_the_answer_is_sent_again(relay, edge, pool, tiny_images, expected, reset):
    waiting = sent(relay, pool, edge, tiny_images[1])
    relay.cut(reset=reset)
    relay.release()
    np.testing.assert_array_equal(waiting.result(60).logits, expected[1])
    assert len(relay.links) == 2
    (counted,) = edge.statistics()
    assert (counted.requests, counted.retries, counted.answers) == (3, 1, 2)
    assert counted.failures == {"ServerUnreachableError": 1}


@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
def test_a_line_that_is_cut_within_a_request_loses_the_half_and_gets_the_whole_again(
    relay, edge, pool, tiny_images, expected, reset
):
    relay.throttle(300)
    (link,) = relay.links
    before = link.flows["up"].passed
    waiting = pool.submit(edge.predict, tiny_images[1])
    relay.until(lambda: link.flows["up"].passed > before + 100)
    assert link.flows["up"].passed < link.flows["up"].arrived
    relay.cut(reset=reset)
    relay.throttle(None)
    np.testing.assert_array_equal(waiting.result(60).logits, expected[1])


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_line_that_is_closed_in_one_direction_is_replaced(relay, edge, pool, tiny_images, expected, direction):
    waiting = sent(relay, pool, edge, tiny_images[1])
    relay.half_close(direction)
    if direction == "up":
        relay.release()  # else the relay would hold back that the server has closed its end, too
    else:
        relay.hold()  # new links pass everything; the half that is closed stays closed
    np.testing.assert_array_equal(waiting.result(60).logits, expected[1])
    right(edge, tiny_images, expected, 2)


@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
def test_an_idle_line_that_was_cut_does_not_cost_the_next_call_its_answer(relay, edge, tiny_images, expected, reset):
    relay.cut(reset=reset)
    right(edge, tiny_images, expected, 1)


def test_a_cut_line_that_stays_away_is_an_error_at_the_deadline(relay, edge, tiny_images, expected):
    relay.refuse()
    relay.cut(reset=True)
    with pytest.raises(TransportError):
        edge.predict(tiny_images[1], timeout_ms=SHORT_MS)
    relay.refuse(False)
    right(edge, tiny_images, expected, 2)


@pytest.mark.parametrize("directions", [("up",), ("down",), ("up", "down")], ids=" and ".join)
def test_a_silent_line_is_a_deadline_error_and_what_comes_late_reaches_nobody(
    relay, edge, tiny_images, expected, directions
):
    relay.hold(*directions)
    with pytest.raises(DeadlineExceededError):
        edge.predict(tiny_images[1], timeout_ms=SHORT_MS)
    relay.release()
    for index in (2, 3, 4):
        right(edge, tiny_images, expected, index)


def test_a_recorded_connection_that_is_played_again_gets_nothing_from_the_server(tiny, relay, tiny_images, expected):
    """CURVE: the second connection has other short-term keys, so the server ends it."""
    relay.duplicate()
    with EdgeClient(tiny.client, relay.endpoint, timeout_ms=LONG_MS) as client:
        for index in range(5):
            right(client, tiny_images, expected, index)
        (link,) = relay.links
        relay.until(lambda: link.twins_lost == 1)
        right(client, tiny_images, expected, 5)


def test_a_request_that_reaches_a_plaintext_server_twice_is_answered_once(tiny, serve, tiny_images, expected):
    with serve(tiny.server, "--plaintext") as (endpoint, _), Relay(endpoint) as relay:
        relay.duplicate()
        with EdgeClient(tiny.client, relay.endpoint, plaintext=True, timeout_ms=LONG_MS) as client:
            for index in range(5):
                right(client, tiny_images, expected, index)
            assert client.statistics()[0].answers == 5


def test_answers_that_overtake_each_other_reach_their_own_calls(relay, edge, pool, tiny_images, expected):
    (first,) = relay.links
    relay.hold_link(first, "up")
    before = first.flows["up"].arrived
    held = pool.submit(edge.predict, tiny_images[1])
    relay.until(lambda: first.flows["up"].arrived > before)
    others = list(pool.map(lambda index: edge.predict(tiny_images[index]).logits, range(2, 10)))
    np.testing.assert_array_equal(np.stack(others), expected[2:10])
    assert not held.done()
    relay.release()
    np.testing.assert_array_equal(held.result(60).logits, expected[1])


def test_a_server_that_is_killed_and_restarted_under_load_costs_errors_and_no_wrong_answer(
    tiny, serve, tiny_images, expected
):
    stop, answered, errors, wrong = threading.Event(), threading.Semaphore(0), [], []
    with serve(tiny.server) as (endpoint, first), Relay(endpoint) as relay:
        edge = EdgeClient(tiny.client, relay.endpoint, timeout_ms=1500)

        def load(seed):
            rng = np.random.Generator(np.random.PCG64(seed))
            while not stop.is_set():
                index = int(rng.integers(len(tiny_images)))
                try:
                    found = edge.predict(tiny_images[index]).logits
                except EnsemblerError as error:
                    errors.append(error)
                else:
                    if not np.array_equal(found, expected[index]):
                        wrong.append(index)
                    answered.release()

        threads = [threading.Thread(target=load, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        try:
            some(answered)
            first.kill()
            first.wait(30)
            with serve(tiny.server, bind=endpoint) as (_, second):
                some(answered)
                second.kill()
                second.wait(30)
                with serve(tiny.server, bind=endpoint):
                    some(answered)
                    stop.set()
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        edge.close()
    assert wrong == []
    assert all(isinstance(error, TransportError) for error in errors)


def some(answered):
    """Waits for answers to calls that began from now on: more of them than calls are under way."""
    while answered.acquire(blocking=False):
        pass
    for _ in range(20):
        assert answered.acquire(timeout=60)
