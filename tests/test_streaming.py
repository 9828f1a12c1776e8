"""``EdgeClient.stream``: answers in order, bounded, errors at their place, and no thread left behind."""

from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest

from ensembler import EdgeClient
from ensembler.protocol.errors import ConfigError, ImageError
from ensembler.streaming import MAX_IN_FLIGHT
from ensembler.transport.inprocess import InProcessTransport

LONG_MS = 60_000


@pytest.fixture
def edge(tiny, gate):
    """A client of the gated server in this process."""
    with EdgeClient(tiny.client, "in-process", timeout_ms=LONG_MS, transport=InProcessTransport(gate)) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_thread_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert set(threading.enumerate()) <= before


def logits(items):
    return np.stack([prediction.logits for _, prediction in items])


def test_a_stream_over_a_real_server_answers_every_image_in_order(tiny, serve, tiny_images, expected):
    with serve(tiny.server) as (endpoint, _), EdgeClient(tiny.client, endpoint, timeout_ms=LONG_MS) as client:
        found = list(client.stream(iter(tiny_images), in_flight=8))
    assert [index for index, _ in found] == list(range(len(tiny_images)))
    np.testing.assert_array_equal(logits(found), expected)


@pytest.mark.parametrize("newest", [False, True])
def test_no_images_give_no_answers(edge, newest):
    assert list(edge.stream([], newest=newest)) == []


def test_calls_run_side_by_side_as_many_as_asked_for(edge, gate, tiny_images):
    gate.open.clear()
    found = []
    worker = threading.Thread(target=lambda: found.extend(edge.stream(tiny_images[:9], in_flight=3)))
    worker.start()
    for _ in range(3):
        assert gate.arrived.acquire(timeout=30)
    gate.open.set()
    worker.join(60)
    assert len(found) == 9
    assert gate.most_at_once == 3


def test_no_more_images_are_read_than_in_flight_ahead_of_what_was_taken(edge, tiny_images):
    read = 0

    def source():
        nonlocal read
        for image in itertools.cycle(tiny_images):
            read += 1
            assert read - taken <= 5  # the loop below notes what it took a little later
            yield image

    taken = 0
    for position, (index, _) in enumerate(edge.stream(source(), in_flight=4)):
        assert index == position
        taken = position + 1
        if taken == 50:
            break
    assert read <= 54


def test_an_answer_is_given_before_the_source_has_its_next_image(edge, tiny_images, expected):
    answered = threading.Event()

    def source():
        yield tiny_images[0]
        assert answered.wait(30)
        yield tiny_images[1]

    found = []
    for item in edge.stream(source()):
        found.append(item)
        answered.set()
    np.testing.assert_array_equal(logits(found), expected[:2])


# --- newest ---


def test_newest_replaces_the_image_that_waits(edge, gate, tiny_images, expected):
    def camera():
        yield tiny_images[0]
        assert gate.arrived.acquire(timeout=30)
        yield from tiny_images[1:5]
        gate.open.set()

    gate.open.clear()
    found = list(edge.stream(camera(), in_flight=1, newest=True))
    assert [index for index, _ in found] == [0, 4]
    np.testing.assert_array_equal(logits(found), expected[[0, 4]])


def test_newest_fills_all_places_before_it_skips(edge, gate, tiny_images):
    def camera():
        yield from tiny_images[:3]
        for _ in range(3):
            assert gate.arrived.acquire(timeout=30)
        yield from tiny_images[3:8]
        gate.open.set()

    gate.open.clear()
    assert [index for index, _ in edge.stream(camera(), in_flight=3, newest=True)] == [0, 1, 2, 7]


def test_a_camera_that_never_ends_can_be_left(edge, tiny_images):
    indices = []
    for index, _ in edge.stream(itertools.cycle(tiny_images), in_flight=2, newest=True):
        indices.append(index)
        if len(indices) == 5:
            break
    assert indices == sorted(set(indices))


@pytest.mark.parametrize("newest", [False, True])
def test_a_source_that_blocks_for_ever_does_not_keep_the_stream_from_closing(edge, tiny_images, newest):
    stuck, unplugged = threading.Event(), threading.Event()
    reader = []

    def camera():
        reader.append(threading.current_thread())
        yield tiny_images[0]
        stuck.set()
        assert unplugged.wait(60)

    for _ in edge.stream(camera(), newest=newest):
        assert stuck.wait(30)
        break
    assert reader[0].is_alive()
    assert reader[0].daemon
    unplugged.set()
    reader[0].join(30)


# --- errors and ends ---


@pytest.mark.parametrize("newest", [False, True])
def test_an_error_of_an_image_comes_at_its_place_and_ends_the_stream(edge, tiny_images, newest):
    images = [tiny_images[0], tiny_images[1], b"not an image", tiny_images[3]]
    stream = edge.stream(images, newest=newest)
    assert [next(stream)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(ImageError, match=r"images\[2\]: .*not a readable image"):
        next(stream)
    assert list(stream) == []


@pytest.mark.parametrize("newest", [False, True])
def test_an_error_of_the_source_comes_after_the_answers_to_what_it_gave(edge, tiny_images, newest):
    def source():
        yield from tiny_images[:2]
        raise OSError("the camera is gone")

    stream = edge.stream(source(), newest=newest)
    assert [next(stream)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the camera is gone"):
        next(stream)
    assert list(stream) == []


def test_a_stream_that_is_forgotten_cleans_up(edge, tiny_images):
    stream = edge.stream(itertools.cycle(tiny_images))
    next(stream)
    del stream
    gc.collect()


def test_a_stream_that_was_never_begun_starts_nothing(edge, tiny_images):
    before = threading.active_count()
    edge.stream(tiny_images).close()
    edge.stream(tiny_images)
    assert threading.active_count() == before


def test_closing_the_client_ends_its_streams(edge, tiny_images):
    stream = edge.stream(itertools.cycle(tiny_images))
    next(stream)
    edge.close()
    with pytest.raises(ConfigError, match="closed"):
        list(stream)


def test_two_streams_of_one_client_do_not_disturb_each_other(edge, tiny_images, expected):
    both = list(zip(edge.stream(tiny_images[:20]), edge.stream(tiny_images[20:40]), strict=True))
    np.testing.assert_array_equal(logits(a for a, _ in both), expected[:20])
    np.testing.assert_array_equal(logits(b for _, b in both), expected[20:40])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_flight": 0}, "in_flight = 0"),
        ({"in_flight": MAX_IN_FLIGHT + 1}, "at least 1 and at most 64"),
        ({"timeout_ms": 0}, "timeout_ms = 0"),
    ],
)
def test_an_impossible_option_is_refused_at_once(edge, options, message):
    with pytest.raises(ConfigError, match=message):
        edge.stream([], **options)


@pytest.mark.parametrize(
    "image",
    ["photo.jpg", b"bytes", np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8), 3, None],
    ids=["path", "bytes", "array", "grey array", "number", "None"],
)
def test_one_image_instead_of_several_is_refused_at_once(edge, image):
    for call in (edge.stream, edge.predict_batch):
        with pytest.raises(ImageError, match=r"for one give \[image\]"):
            call(image)
