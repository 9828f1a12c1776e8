"""``EdgeClient(fallback=...)``: who answers when the cloud is away, and what is raised all the same."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest

from ensembler import AsyncEdgeClient, EdgeClient, Prediction
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import (
    AuthenticationError,
    BusyError,
    ConfigError,
    DeadlineExceededError,
    ExpiredError,
    ImageError,
    InternalError,
    ServerUnreachableError,
    ShuttingDownError,
    UnknownBodiesError,
)
from ensembler.protocol.messages import ERROR, Message, decode, encode
from ensembler.transport import keys
from ensembler.transport.inprocess import InProcessTransport


class Local:
    """A fallback that remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, image, error):
        self.asked.append((image, error))
        return Prediction.local("unknown", 0.25)


@pytest.fixture
def nobody():
    """The address of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    return f"tcp://127.0.0.1:{port}"


def refusing(code, refused=lambda codes: True, otherwise=None):
    """A transport whose server refuses requests by what they carry; the others are answered by ``otherwise``."""

    def handler(frames):
        if not refused(decode(frames).tensor):
            return otherwise(frames)
        info = {"code": code, "message": "as the test says", "retry_after_ms": 1e6}
        return [encode(Message(operation=ERROR, request_id=decode(frames).request_id, info=info))]

    return InProcessTransport(handler)


def test_without_a_server_the_fallback_answers_and_knows_why(tiny, nobody, tiny_images):
    local = Local()
    with EdgeClient(tiny.client, nobody, timeout_ms=2000, fallback=local) as edge:
        result = edge.predict(tiny_images[0])
    assert (result.label, result.score, result.source) == ("unknown", 0.25, "fallback")
    assert result.top_k == (("unknown", 0.25),)
    assert result.timings.total >= 2000
    ((image, error),) = local.asked
    assert image is not None
    np.testing.assert_array_equal(image, tiny_images[0])
    assert isinstance(error, ServerUnreachableError)


def test_an_answer_of_the_cloud_is_marked_as_such(tiny, gate, tiny_images, expected):
    local = Local()
    with EdgeClient(tiny.client, "in-process", fallback=local, transport=InProcessTransport(gate)) as edge:
        result = edge.predict(tiny_images[0])
    assert result.source == "cloud"
    np.testing.assert_array_equal(result.logits, expected[0])
    assert local.asked == []


AWAY = [BusyError, ShuttingDownError, ExpiredError]
BROKEN = [UnknownBodiesError, InternalError]


@pytest.mark.parametrize("error", AWAY)
def test_a_server_that_has_no_time_is_away(tiny, tiny_images, error, monkeypatch):
    monkeypatch.setattr("ensembler.party.SHUTDOWN_RETRY_S", 3600.0)  # later than the deadline, as when busy
    local = Local()
    with EdgeClient(
        tiny.client, "in-process", timeout_ms=60_000, fallback=local, transport=refusing(error.code)
    ) as edge:
        assert edge.predict(tiny_images[0]).source == "fallback"
    assert type(local.asked[0][1]) is (DeadlineExceededError if error is ExpiredError else error)


@pytest.mark.parametrize("error", BROKEN)
def test_a_server_that_is_wrong_is_an_error_all_the_same(tiny, tiny_images, error):
    local = Local()
    with (
        EdgeClient(tiny.client, "in-process", fallback=local, transport=refusing(error.code)) as edge,
        pytest.raises(error),
    ):
        edge.predict(tiny_images[0])
    assert local.asked == []


def test_a_device_that_is_not_authorised_is_an_error_all_the_same(tiny, serve, tmp_path, tiny_images):
    _, stranger = keys.create(tmp_path, "stranger")
    local = Local()
    with (
        serve(tiny.server) as (endpoint, _),
        EdgeClient(tiny.client, endpoint, key=stranger, timeout_ms=60_000, fallback=local) as edge,
        pytest.raises(AuthenticationError),
    ):
        edge.predict(tiny_images[0])
    assert local.asked == []


def test_a_bad_image_is_an_error_all_the_same(tiny, nobody):
    local = Local()
    with EdgeClient(tiny.client, nobody, timeout_ms=200, fallback=local) as edge, pytest.raises(ImageError):
        edge.predict(b"not an image")
    assert local.asked == []


def test_in_a_batch_the_fallback_answers_the_images_that_the_cloud_did_not(tiny, gate, tiny_images, expected):
    second = EdgeRuntime(tiny.client).encode(tiny_images[32:64])  # of the three requests for 96 images
    local = Local()
    transport = refusing(BusyError.code, lambda codes: np.array_equal(codes, second), otherwise=gate)
    with EdgeClient(tiny.client, "in-process", timeout_ms=60_000, fallback=local, transport=transport) as edge:
        found = edge.predict_batch(list(tiny_images))
    assert [result.source for result in found] == ["cloud"] * 32 + ["fallback"] * 64
    np.testing.assert_array_equal(np.stack([r.logits for r in found[:32]]), expected[:32])
    np.testing.assert_array_equal(np.stack([image for image, _ in local.asked]), tiny_images[32:])


def test_a_stream_goes_on_with_the_fallback(tiny, nobody, tiny_images):
    local = Local()
    with EdgeClient(tiny.client, nobody, timeout_ms=200, fallback=local) as edge:
        found = list(edge.stream(tiny_images[:8], in_flight=8))
    assert [(index, result.source) for index, result in found] == [(index, "fallback") for index in range(8)]


def test_asyncio_has_the_fallback_too(tiny, nobody, tiny_images):
    async def main():
        async with AsyncEdgeClient(tiny.client, nobody, timeout_ms=200, fallback=Local()) as client:
            return await client.predict(tiny_images[0])

    assert asyncio.run(main()).source == "fallback"


def test_an_error_of_the_fallback_itself_reaches_the_caller_with_its_cause(tiny, nobody, tiny_images):
    def broken(image, error):
        raise RuntimeError("no local model")

    with (
        EdgeClient(tiny.client, nobody, timeout_ms=2000, fallback=broken) as edge,
        pytest.raises(RuntimeError, match="no local model") as caught,
    ):
        edge.predict(tiny_images[0])
    assert isinstance(caught.value.__context__, ServerUnreachableError)


def test_a_fallback_that_returns_no_prediction_is_told_what_to_return(tiny, nobody, tiny_images):
    with (
        EdgeClient(tiny.client, nobody, timeout_ms=200, fallback=lambda image, error: "cat") as edge,
        pytest.raises(ConfigError, match=r"fallback returned str; return Prediction\.local"),
    ):
        edge.predict(tiny_images[0])


def test_what_cannot_be_called_is_no_fallback(tiny, nobody):
    with pytest.raises(ConfigError, match="fallback is str"):
        EdgeClient(tiny.client, nobody, fallback="cat")


@pytest.mark.parametrize(
    ("label", "score", "message"), [(3, 0.5, "not int"), ("cat", 1.5, r"score = 1\.5"), ("cat", float("nan"), "nan")]
)
def test_a_local_prediction_needs_a_label_and_a_probability(label, score, message):
    with pytest.raises(ConfigError, match=message):
        Prediction.local(label, score)
