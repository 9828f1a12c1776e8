"""Replicas of one operator: another one answers when one fails, with the same bytes, before the same deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest
from relay import Relay

from ensembler import AsyncEdgeClient, EdgeClient, replica
from ensembler.cli import main
from ensembler.protocol.errors import (
    AuthenticationError,
    BadRequestError,
    BusyError,
    ConfigError,
    DeadlineExceededError,
    ExpiredError,
    InternalError,
    KeyFileError,
    ServerUnreachableError,
    ShuttingDownError,
    UnknownBodiesError,
)
from ensembler.protocol.manifest import is_curve_key
from ensembler.protocol.messages import ERROR, Message, decode, encode
from ensembler.transport import keys
from ensembler.transport.inprocess import InProcessTransport

LONG_MS = 60_000
SHORT_MS = 1500
NOT_AUTHORIZED = 401


@pytest.fixture(scope="module")
def new_key(tmp_path_factory):
    """A second server's key pair (public, secret). Like one in 82, its public key begins as an option does."""
    for _ in range(2000):
        pair = keys.create(tmp_path_factory.mktemp("second"), "server")
        if keys.load_public(pair[0]).startswith("-"):
            return pair
    raise AssertionError("no key of 2000 begins with a dash")


@pytest.fixture(scope="module")
def options(tiny, new_key):
    """Of ``serve``, for a server with the second key that knows the same device."""
    return ("--key", str(new_key[1]), "--authorized", str(tiny.keys / "authorized"))


@pytest.fixture(scope="module")
def running(tiny, serve, options):
    """Two replicas with keys of their own; yields their addresses."""
    with serve(tiny.server) as (first, _), serve(tiny.server, *options) as (second, _):
        yield first, second


@pytest.fixture
def lines(running):
    """A relay before each replica."""
    with Relay(running[0]) as first, Relay(running[1]) as second:
        yield first, second


@pytest.fixture
def edge(tiny, lines, new_key):
    """A client of both replicas over their relays."""
    first, second = (line.endpoint for line in lines)
    with EdgeClient(tiny.client, [(first, second)], server_key={second: new_key[0]}, timeout_ms=LONG_MS) as client:
        yield client


def right(client, images, expected, *indices, **options):
    for index in indices:
        np.testing.assert_array_equal(client.predict(images[index], **options).logits, expected[index])


def answers(client):
    return [each.answers for each in client.statistics()]


def both_made(client, images, expected):
    """Lets each replica answer once, so that its line is there, and the first one be preferred again."""
    (party,) = client._parties
    for each in party.replicas[::-1]:
        party.prefer(each)
        right(client, images, expected, 0)
    assert answers(client) == [1, 1]


def away(line):
    line.refuse()
    line.cut(reset=True)


# --- over real lines ---


def test_the_first_replica_answers_while_it_is_well(edge, tiny_images, expected):
    right(edge, tiny_images, expected, *range(5))
    assert answers(edge) == [5, 0]
    assert edge.info().servers == (",".join(each.server for each in edge.statistics()),)


def test_a_replica_that_is_away_costs_no_call_and_the_one_that_answered_stays(edge, lines, tiny_images, expected):
    right(edge, tiny_images, expected, 0)
    away(lines[0])
    right(edge, tiny_images, expected, 1, 2)
    lines[0].refuse(False)
    right(edge, tiny_images, expected, 3)
    assert answers(edge) == [1, 3]
    away(lines[1])
    right(edge, tiny_images, expected, 4)
    assert answers(edge) == [2, 3]


def test_a_request_whose_replica_is_lost_before_the_answer_goes_to_the_other(edge, lines, tiny_images, expected):
    right(edge, tiny_images, expected, 0)
    lines[0].hold("down")
    before = lines[0].arrived("down")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(edge.predict, tiny_images[1])
        lines[0].until(lambda: lines[0].arrived("down") > before + 300)
        away(lines[0])
        np.testing.assert_array_equal(waiting.result(60).logits, expected[1])
    assert answers(edge) == [1, 1]


def test_a_silent_replica_is_left_for_the_other_within_the_deadline(edge, lines, tiny_images, expected):
    lines[0].hold("down")
    right(edge, tiny_images, expected, 0, timeout_ms=4000)
    right(edge, tiny_images, expected, 1, 2)
    first, second = edge.statistics()
    assert (first.requests, second.requests) == (1, 3)
    assert (first.resting, second.preferred) == (True, True)


def test_a_replica_that_answers_after_its_share_of_the_time_is_still_heard(edge, lines, tiny_images, expected):
    both_made(edge, tiny_images, expected)
    for line in lines:
        line.hold("down")
    before = lines[1].arrived("up")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(edge.predict, tiny_images[1], timeout_ms=6000)
        lines[1].until(lambda: lines[1].arrived("up") > before + 500)  # the second one has been asked
        lines[0].release()
        np.testing.assert_array_equal(waiting.result(60).logits, expected[1])
    assert [each.requests for each in edge.statistics()] == [2, 2]
    assert answers(edge) == [2, 1]


def test_replicas_that_are_all_silent_are_one_error_that_names_them(edge, lines, tiny_images, expected):
    for line in lines:
        line.hold("down")
    with pytest.raises((DeadlineExceededError, ServerUnreachableError), match="none of 2 replicas answered") as caught:
        edge.predict(tiny_images[0], timeout_ms=SHORT_MS)
    assert all(line.endpoint in str(caught.value) for line in lines)
    for line in lines:
        line.release()
    right(edge, tiny_images, expected, 1)


def test_replicas_that_all_come_back_before_the_deadline_answer(edge, lines, tiny_images, expected):
    for line in lines:
        away(line)
    tried = [len(line.links) for line in lines]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(edge.predict, tiny_images[0])
        for line, before in zip(lines, tried, strict=True):
            line.until(lambda line=line, before=before: len(line.links) > before + 2)
        lines[1].refuse(False)
        np.testing.assert_array_equal(waiting.result(60).logits, expected[0])


def test_closing_a_client_ends_calls_that_wait_for_several_replicas(edge, lines, tiny_images, expected):
    both_made(edge, tiny_images, expected)
    for line in lines:
        line.hold("down")
    before = lines[1].arrived("up")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(edge.predict, tiny_images[0], timeout_ms=4000)
        lines[1].until(lambda: lines[1].arrived("up") > before + 500)
        edge.close()
        with pytest.raises(ServerUnreachableError, match="closed"):
            waiting.result(30)


def test_closing_a_client_blames_no_server_whose_line_failed_at_that_moment(tiny, tiny_images):
    def fails(_):
        edge.close()
        raise ServerUnreachableError("in-process could not be reached")

    edge = EdgeClient(tiny.client, "in-process", timeout_ms=LONG_MS, transport=InProcessTransport(fails))
    with pytest.raises(ServerUnreachableError, match="the connection to in-process was closed while it was in use"):
        edge.predict(tiny_images[0])


def test_a_stream_and_an_asyncio_client_go_on_at_the_other_replica(edge, lines, tiny, new_key, tiny_images, expected):
    found = []
    for index, result in edge.stream(tiny_images[:20]):
        found.append(result.logits)
        if index == 5:
            away(lines[0])
    np.testing.assert_array_equal(np.stack(found), expected[:20])

    async def many():
        addresses = [tuple(line.endpoint for line in lines)]
        server_key = {lines[1].endpoint: new_key[0]}
        async with AsyncEdgeClient(tiny.client, addresses, server_key=server_key, timeout_ms=LONG_MS) as client:
            results = await asyncio.gather(*(client.predict(image) for image in tiny_images[:20]))
            return results, client.statistics()

    results, counted = asyncio.run(many())
    np.testing.assert_array_equal(np.stack([result.logits for result in results]), expected[:20])
    assert counted[1].answers == 20


def test_replicas_that_are_killed_and_restarted_in_turn_under_load_fail_no_call(
    tiny, serve, options, new_key, tiny_images, expected
):
    stop, answered, wrong = threading.Event(), threading.Semaphore(0), []
    with contextlib.ExitStack() as servers:
        first, one = servers.enter_context(serve(tiny.server))
        second, other = servers.enter_context(serve(tiny.server, *options))
        edge = servers.enter_context(
            EdgeClient(tiny.client, f"{first},{second}", server_key={second: new_key[0]}, timeout_ms=LONG_MS)
        )

        def load(seed):
            rng = np.random.Generator(np.random.PCG64(seed))
            while not stop.is_set():
                index = int(rng.integers(len(tiny_images)))
                if not np.array_equal(edge.predict(tiny_images[index]).logits, expected[index]):
                    wrong.append(index)
                answered.release()

        def some():
            while answered.acquire(blocking=False):
                pass
            for _ in range(20):
                assert answered.acquire(timeout=60)

        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(load, seed) for seed in range(3)]
            try:
                some()
                one.kill()
                some()
                one.wait(30)
                servers.enter_context(serve(tiny.server, bind=first))
                some()
                other.kill()
                some()
            finally:
                stop.set()
            for call in calls:
                call.result(60)
    assert wrong == []


# --- what a replica says ---


@pytest.fixture
def say(tiny, gate):
    """Returns a client whose replicas say what they are told to, then answer; and the requests they saw, in order."""
    made, seen = [], []

    def client(*scripts, **options):
        def handler(name, script):
            def handle(frames):
                seen.append((name, frames))
                message = decode(frames)
                if not script:
                    return gate(frames)
                error, *_ = said = script.pop(0)
                info = {"code": error, "message": "as told", "retry_after_ms": said[1] if said[1:] else 0.0}
                return [encode(Message(operation=ERROR, request_id=message.request_id, info=info))]

            return InProcessTransport(handle)

        names = ("one", "two", "three")[: len(scripts)]
        transports = [handler(name, list(script)) for name, script in zip(names, scripts, strict=True)]
        made.append(EdgeClient(tiny.client, [names], transport=transports, **({"timeout_ms": LONG_MS} | options)))
        return made[-1], seen

    yield client
    for each in made:
        each.close()


@pytest.mark.parametrize(
    "code",
    [
        *(UnknownBodiesError.code, BadRequestError.code, NOT_AUTHORIZED, InternalError.code, ShuttingDownError.code),
        *(BusyError.code, ExpiredError.code, 102, 999),
    ],
)
def test_another_replica_answers_whatever_one_says_and_gets_the_same_bytes(say, tiny_images, expected, code):
    client, seen = say([(code, 10_000.0)], [])
    right(client, tiny_images, expected, 0)
    assert [name for name, _ in seen] == ["one", "two"]
    assert seen[0][1] == seen[1][1]


def test_replicas_that_are_all_busy_are_asked_again_when_they_said(say, tiny_images, expected):
    client, seen = say([(BusyError.code, 20_000.0)], [(BusyError.code, 1.0), (BusyError.code, 2.0)])
    right(client, tiny_images, expected, 0)
    assert [name for name, _ in seen] == ["one", "two", "two", "two"]


def test_replicas_that_stay_busy_beyond_the_deadline_are_a_busy_error_with_the_shorter_wait(say, tiny_images):
    client, seen = say([(BusyError.code, 90_000.0)], [(BusyError.code, 80_000.0)])
    with pytest.raises(BusyError) as caught:
        client.predict(tiny_images[0])
    assert caught.value.retry_after_ms == 80_000.0
    assert len(seen) == 2


def test_replicas_that_all_refuse_are_one_error_at_once_that_says_what_each_said(say, tiny_images):
    client, seen = say([(UnknownBodiesError.code,)], [(BadRequestError.code,)], [(UnknownBodiesError.code,)])
    with pytest.raises(
        UnknownBodiesError, match="none of 3 replicas answered: one: as told; two: as told; three: as told"
    ):
        client.predict(tiny_images[0])
    assert len(seen) == 3


def test_the_error_of_several_is_the_one_that_passes_by_itself(say, tiny_images):
    client, _ = say([(UnknownBodiesError.code,)], [(BusyError.code, 90_000.0)])
    with pytest.raises(BusyError, match="one: as told; two: as told"):
        client.predict(tiny_images[0])


def test_a_replica_that_failed_is_asked_after_the_others_until_it_has_rested(say, tiny_images, expected, monkeypatch):
    broken = (InternalError.code,)
    monkeypatch.setattr(replica, "REST_S", 3600.0)
    client, seen = say([broken], [broken], [])
    right(client, tiny_images, expected, 0, 1)
    assert [name for name, _ in seen] == ["one", "two", "three", "three"]
    monkeypatch.setattr(replica, "REST_S", 0.0)
    client, seen = say([broken], [(UnknownBodiesError.code,), (UnknownBodiesError.code,)])
    del seen[:]
    with pytest.raises(InternalError):
        client.predict(tiny_images[0])
    right(client, tiny_images, expected, 1)  # nobody rests: in the order in which they were given
    assert [name for name, _ in seen] == ["one", "two", "one"]


class Refusing:
    """A transport whose first line ends in its handshake; later ones are still in theirs at the deadline."""

    def __init__(self):
        self.asked = 0

    def connect(self):
        return self

    def usable(self):
        return True

    def send(self, request):
        self.asked += 1

    def receive(self, accept, until):
        if self.asked == 1:
            raise AuthenticationError("refused", certain=False)
        threading.Event().wait(until - time.monotonic())

    def silence(self):
        return ServerUnreachableError("unfinished")

    def close(self):
        pass


def test_a_refused_handshake_is_the_error_though_the_deadline_cut_the_next_one_short(tiny, tiny_images):
    with EdgeClient(tiny.client, "one", transport=(line := Refusing()), timeout_ms=SHORT_MS) as client:
        with pytest.raises(AuthenticationError, match="refused"):
            client.predict(tiny_images[0])
        assert line.asked > 1


# --- numbers ---


def test_statistics_say_what_became_of_the_requests_to_each_replica(say, tiny_images):
    client, seen = say([(BusyError.code, 30_000.0), (InternalError.code,)], [])
    assert [
        (each.party, each.server, each.requests, each.mean_ms, each.last_error) for each in client.statistics()
    ] == [
        (0, "one", 0, None, None),
        (0, "two", 0, None, None),
    ]
    client.predict(tiny_images[0])
    client.predict(tiny_images[1])
    first, second = client.statistics()
    assert (first.requests, first.retries, first.answers, first.busy, first.failures) == (1, 0, 0, 1, {})
    assert (second.requests, second.retries, second.answers, second.busy, second.failures) == (2, 1, 2, 0, {})
    assert (first.last_error, second.last_error) == ("one: as told", None)
    assert (first.preferred, second.preferred) == (False, True)
    assert first.bytes_up == sum(map(len, seen[0][1]))
    assert second.bytes_up == sum(map(len, seen[1][1])) + sum(map(len, seen[2][1]))
    assert 0 < second.mean_ms <= second.max_ms
    assert first.max_ms is None
    with pytest.raises(FrozenInstanceError):
        first.busy = 0
    assert json.loads(json.dumps([asdict(each) for each in client.statistics()]))[1]["answers"] == 2


def test_statistics_count_failures_by_the_error(say, tiny_images):
    client, _ = say([(InternalError.code,), (UnknownBodiesError.code,), (InternalError.code,)])
    for error in (InternalError, UnknownBodiesError, InternalError):
        with pytest.raises(error):
            client.predict(tiny_images[0])
    (counted,) = client.statistics()
    assert counted.failures == {"InternalError": 2, "UnknownBodiesError": 1}
    assert (counted.requests, counted.answers, counted.bytes_down > 0) == (3, 0, True)


# --- addresses and keys ---


@pytest.mark.parametrize(
    "server",
    [[()], [("tcp://127.0.0.1:9", 5)], [5], 5, [["tcp://127.0.0.1:9", "tcp://127.0.0.1:9"]], "tcp://127.0.0.1:9,"],
    ids=["none", "a number", "no sequence", "no address", "twice", "a comma too many"],
)
def test_impossible_replicas_are_refused(tiny, server):
    with pytest.raises(ConfigError, match="server"):
        EdgeClient(tiny.client, server)


def test_two_addresses_for_one_operator_are_refused_with_how_to_give_replicas(tiny):
    with pytest.raises(ConfigError, match="replicas of one operator as one entry"):
        EdgeClient(tiny.client, ["tcp://127.0.0.1:9", "tcp://127.0.0.1:8"])


@pytest.mark.parametrize("form", ["path", "text", "mapping"])
def test_a_server_with_another_key_than_the_pinned_one_is_known_by_the_given_key(
    tiny, running, new_key, tiny_images, expected, form
):
    public = {
        "path": new_key[0],
        "text": keys.load_public(new_key[0]),
        "mapping": {running[1]: str(new_key[0])},
    }[form]
    with EdgeClient(tiny.client, running[1], server_key=public, timeout_ms=LONG_MS) as client:
        right(client, tiny_images, expected, 0)


def test_the_given_key_holds_and_the_pinned_one_no_more(tiny, running, new_key, tiny_images):
    with (
        EdgeClient(tiny.client, running[0], server_key=new_key[0], timeout_ms=3000) as client,
        pytest.raises(AuthenticationError, match="another server than the one whose key is pinned"),
    ):
        client.predict(tiny_images[0])


def test_a_replica_with_a_wrong_key_costs_no_call_and_is_in_the_numbers(tiny, running, tiny_images, expected):
    with EdgeClient(tiny.client, [running[::-1]], timeout_ms=LONG_MS) as client:
        right(client, tiny_images, expected, 0, 1)
        assert client.statistics()[0].failures == {"AuthenticationError": 1}


@pytest.mark.parametrize(
    ("server_key", "error"),
    [
        ({"tcp://127.0.0.1:8": "a" * 40}, ConfigError),
        (5, ConfigError),
        ("no_such_file.key", KeyFileError),
        ("x" * 39, KeyFileError),
        (b"\x00", (ConfigError, KeyFileError)),
    ],
    ids=["another address", "a number", "no file", "too short", "bytes"],
)
def test_an_impossible_server_key_is_refused(tiny, server_key, error):
    with pytest.raises(error):
        EdgeClient(tiny.client, "tcp://127.0.0.1:9", server_key=server_key)


def test_a_server_key_without_encryption_is_refused(tiny, new_key):
    with pytest.raises(ConfigError, match="server_key and plaintext"):
        EdgeClient(tiny.client, "tcp://127.0.0.1:9", server_key=new_key[0], plaintext=True)


@pytest.mark.parametrize("form", ["file", "text"])
def test_the_command_line_takes_replicas_and_their_keys(tiny, running, new_key, tiny_images, tmp_path, capsys, form):
    from PIL import Image

    Image.fromarray(tiny_images[0]).save(tmp_path / "image.png")
    key = str(new_key[0]) if form == "file" else keys.load_public(new_key[0])
    server = ("--server", f"tcp://127.0.0.1:9,{running[1]}", "--server-key", f"{running[1]}={key}")
    assert main(["predict", str(tiny.client), str(tmp_path / "image.png"), *server, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 1
    only = ("--server", running[1], "--server-key", key)
    assert main(["predict", str(tiny.client), str(tmp_path / "image.png"), *only]) == 0


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ("tcp://192.168.1.20:5555=keys/server1.key", "keys/server1.key"),
        ("/home/pi/ensembler/keys/server/porch.key", "/home/pi/ensembler/keys/server/porch.key"),
    ],
)
def test_a_file_whose_name_has_the_length_and_signs_of_a_key_is_a_file(tiny, capsys, given, file):
    assert is_curve_key(given)
    server = ("--server", "tcp://192.168.1.20:5555", "--server-key", given)
    assert main(["predict", str(tiny.client), "image.png", *server]) == 2
    assert f"the key file {file} cannot be read" in capsys.readouterr().err


def test_server_keys_that_contradict_each_other_are_refused(tiny, new_key, tmp_path, capsys):
    again = ("--server-key", str(new_key[0])) * 2
    assert main(["predict", str(tiny.client), "image.png", "--server", "tcp://127.0.0.1:9", *again]) == 2
    assert "one key for all servers, or ADDRESS=KEY" in capsys.readouterr().err
