"""Several operators: each holds a part of the bodies, and a request needs them all."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from ensembler.cli import main
from ensembler.client import EdgeClient
from ensembler.party import Party, exchange_all
from ensembler.protocol.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineExceededError,
    ProtocolError,
    ServerUnreachableError,
    UnknownBodiesError,
)
from ensembler.protocol.manifest import PartySpec, load_client, load_server
from ensembler.protocol.messages import Message
from ensembler.replica import Replica, Reply
from ensembler.transport import keys
from ensembler.transport.inprocess import InProcessTransport

OPEN = ("--min-sqnr-db", "0", "--max-accuracy-drop", "100")
LONG_MS = 60_000.0


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Bundles of the tiny run for two operators, with new keys."""
    out = tmp_path_factory.mktemp("two")
    (out / "x").mkdir()
    assert main(["export", str(tiny.run), "--out", str(out / "x"), "--parties", "2", *OPEN]) == 0
    return out / "x"


def key(out, index):
    return ("--key", str(out / "keys" / f"server_{index}.key_secret"))


@pytest.fixture(scope="module")
def running(two, serve):
    """The addresses of both operators' servers, each a process of its own with its own key."""
    with (
        serve(two / "server_0", *key(two, 0)) as (first, _),
        serve(two / "server_1", *key(two, 1)) as (second, _),
    ):
        yield [first, second]


def test_each_operator_gets_a_part_of_the_bodies_and_no_body_twice(two, tiny):
    parts = [load_server(two / f"server_{index}") for index in range(2)]
    assert [part.wire.num_nets for part in parts] == [2, 1]
    whole = load_server(tiny.server)
    assert tuple(codec for part in parts for codec in part.wire.answer_codecs) == whole.wire.answer_codecs
    digests = [[part.files[name].sha256 for name in part.bodies] for part in parts]
    assert digests[0] + digests[1] == [whole.files[name].sha256 for name in whole.bodies]
    assert len({part.wire.bodies_id for part in parts} | {whole.wire.bodies_id}) == 3


def test_the_client_knows_every_operators_nets_and_key(two):
    manifest = load_client(two / "client")
    parts = [load_server(two / f"server_{index}").wire for index in range(2)]
    assert [(party.bodies_id, party.num_nets) for party in manifest.parties] == [
        (part.bodies_id, part.num_nets) for part in parts
    ]
    assert len({party.server_public_key for party in manifest.parties}) == 2


def test_the_joined_answers_are_those_of_one_server(two, running, tiny, tiny_images, expected):
    with EdgeClient(two / "client", running, timeout_ms=LONG_MS) as edge:
        found = edge.predict_batch(list(tiny_images[:20]))
        status = edge.status()
        info = edge.info()
    assert [p.logits.tolist() for p in found] == [logits.tolist() for logits in expected[:20]]
    assert status["fits"]
    assert [each["num_nets"] for each in status["parties"]] == [2, 1]
    assert info.servers == tuple(running)
    one = found[0]
    wire = load_client(two / "client").wire
    assert one.bytes_up > 2 * wire.bytes_up
    assert info.payload_bytes_up == 2 * wire.bytes_up


def test_the_command_line_takes_an_address_for_each_operator(two, running, tiny_images, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(tiny_images[0]).save(tmp_path / "image.png")
    servers = [word for address in running for word in ("--server", address)]
    assert main(["predict", str(two / "client"), str(tmp_path / "image.png"), *servers, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 1


def test_every_operator_is_sent_the_same_features_under_the_same_id(two, tiny_images, monkeypatch):
    from ensembler.protocol.messages import Message, decode, encode
    from ensembler.transport.inprocess import InProcessTransport

    seen = []

    def handler(index):
        wire = load_server(two / f"server_{index}").wire

        def handle(frames):
            import numpy as np

            message = decode(frames)
            seen.append((message.request_id, message.tensor.tobytes()))
            tensor = np.zeros((len(message.tensor), wire.num_nets, wire.answer_width), np.uint8)
            return [
                encode(
                    Message(
                        operation="result", request_id=message.request_id, bodies_id=message.bodies_id, tensor=tensor
                    )
                )
            ]

        return handle

    transports = [InProcessTransport(handler(index)) for index in range(2)]
    with EdgeClient(two / "client", ["a", "b"], transport=transports) as edge:
        edge.predict(tiny_images[0])
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_addresses_is_refused(two, count):
    with pytest.raises(ConfigError, match=f"exported for 2 operators, {count} server addresses"):
        EdgeClient(two / "client", ["tcp://127.0.0.1:9"] * count)


def test_swapped_addresses_are_refused_by_the_keys(two, running, tiny_images):
    with (
        EdgeClient(two / "client", running[::-1], timeout_ms=3000) as edge,
        pytest.raises(AuthenticationError, match=running[1].replace(".", r"\.")),
    ):
        edge.predict(tiny_images[0])


def test_swapped_servers_without_encryption_are_refused_by_their_nets(two, serve, tiny_images):
    with (
        serve(two / "server_0", "--plaintext") as (first, _),
        serve(two / "server_1", "--plaintext") as (second, _),
        EdgeClient(two / "client", [second, first], plaintext=True, timeout_ms=LONG_MS) as edge,
        pytest.raises(UnknownBodiesError, match=second.replace(".", r"\.")),
    ):
        edge.predict(tiny_images[0])


def test_each_operator_may_have_replicas_with_keys_of_their_own(two, running, serve, tmp_path, tiny_images, expected):
    public, secret = keys.create(tmp_path, "replica")
    options = ("--key", str(secret), "--authorized", str(two / "keys" / "authorized"))
    with serve(two / "server_1", *options) as (other, process):
        servers = [("tcp://127.0.0.1:9", running[0]), (other, running[1])]
        with EdgeClient(two / "client", servers, server_key={other: public}, timeout_ms=LONG_MS) as edge:
            np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
            process.kill()
            process.wait(30)
            np.testing.assert_array_equal(edge.predict(tiny_images[1]).logits, expected[1])
            counted = edge.statistics()
    assert [(each.party, each.server) for each in counted] == [
        *((0, address) for address in servers[0]),
        *((1, address) for address in servers[1]),
    ]
    assert [each.answers for each in counted] == [0, 2, 1, 1]


def test_ctrl_c_ends_a_call_without_waiting_for_the_other_operators():
    entered, release, ended = threading.Event(), threading.Event(), threading.Event()

    class Interrupted:
        servers = ("a",)

        def exchange(self, request, deadline):
            assert entered.wait(30)
            raise KeyboardInterrupt

    class Silent:
        servers = ("b",)

        def exchange(self, request, deadline):
            entered.set()
            release.wait(30)
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        exchange_all([Interrupted(), Silent()], [None, None], 0.0)
    assert not ended.is_set()
    release.set()
    assert ended.wait(30)


@pytest.mark.parametrize("change", [{"bodies_id": bytes(32)}, {"tensor": None}, {"bits": 4}])
def test_an_operator_that_answers_something_else_is_named(change, tiny):
    wire = load_client(tiny.client).wire
    spec = PartySpec(bodies_id="ab" * 32, num_nets=1, server_public_key=None)
    server = "tcp://second:5555"
    party = Party(spec, [Replica(server, InProcessTransport(lambda _: []))])
    tensor = np.zeros((2, 1, wire.answer_width), np.uint8)
    right = Message(operation="result", request_id=bytes(16), bodies_id=party.bodies_id, tensor=tensor)
    assert party.answers(Reply(right, server, 0, 0), 2, wire) is tensor
    with pytest.raises(ProtocolError, match=r"^tcp://second:5555 answered "):
        party.answers(Reply(replace(right, **change), server, 0, 0), 2, wire)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_operator_fails_the_request_whichever_it_is(missing, two, running, tiny_images):
    servers = list(running)
    servers[missing] = "tcp://127.0.0.1:9"
    with (
        EdgeClient(two / "client", servers, timeout_ms=1500) as edge,
        pytest.raises(ServerUnreachableError, match=r"tcp://127\.0\.0\.1:9"),
    ):
        edge.predict(tiny_images[0])


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_silent_operator_fails_the_request_at_its_deadline(stopped, two, serve, tiny_images):
    import signal

    with (
        serve(two / "server_0", *key(two, 0)) as (first, one),
        serve(two / "server_1", *key(two, 1)) as (second, other),
        EdgeClient(two / "client", [first, second], timeout_ms=LONG_MS) as edge,
    ):
        edge.predict(tiny_images[0])
        process = (one, other)[stopped]
        process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceededError, match=(first, second)[stopped].replace(".", r"\.")):
                edge.predict(tiny_images[0], timeout_ms=500)
        finally:
            process.send_signal(signal.SIGCONT)
        edge.predict(tiny_images[0])


def test_a_second_client_for_the_same_operators_is_made_from_their_bundles_in_order(tiny, two, tmp_path, capsys):
    bundles = [("--server-bundle", str(two / f"server_{i}"), "--server-key", str(two / "keys" / f"server_{i}.key"))
               for i in range(2)]  # fmt: skip
    command = ["export", str(tiny.run), "--json", *OPEN]
    assert main([*command, "--out", str(tmp_path / "ok"), *bundles[0], *bundles[1]]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"client", "parity"}
    assert load_client(tmp_path / "ok" / "client").parties == load_client(two / "client").parties
    assert main([*command, "--out", str(tmp_path / "swapped"), *bundles[1], *bundles[0]]) == 1
    assert "in the order in which they were exported" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "half"), *bundles[0]]) == 1
    assert "not all of them: 2 instead of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parties", "4"), "--parties 4: choose 1 to 3"),
        (("--parties", "0"), "--parties 0: choose 1 to 3"),
    ],
)
def test_an_impossible_number_of_operators_is_refused(arguments, message, tiny, tmp_path, capsys):
    assert main(["export", str(tiny.run), "--out", str(tmp_path / "out"), "--plaintext", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_key_for_each_operator_is_needed(tiny, two, tmp_path, capsys):
    one = ("--server-key", str(two / "keys" / "server_0.key"))
    assert main(["export", str(tiny.run), "--out", str(tmp_path / "out"), "--parties", "2", *one]) == 2
    assert "1 --server-key for 2 operators" in capsys.readouterr().err
