"""Crypto-clear inference: shares and steps, the relayed stream, two engines under one contract, a real server.

The engine without protection runs everywhere; SPU where it is installed (``make test-crypto``).
"""

from __future__ import annotations

import errno
import gc
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from probes import get, numbers
from torch import nn

from ensembler import EdgeClient
from ensembler.cli import main
from ensembler.cloud_runtime.http_port import HttpPort
from ensembler.crypto import bundle as bundles
from ensembler.crypto import shares
from ensembler.crypto import steps as layers
from ensembler.crypto.dividing import Divided
from ensembler.crypto.engine import CLIENT, SERVER, open_engine
from ensembler.crypto.exporting import CryptoOptions, export
from ensembler.crypto.link import StreamLink
from ensembler.crypto.metrics import CryptoMeter
from ensembler.crypto.process import PartyProcess
from ensembler.crypto.relay import PIECE_BYTES, WINDOW_BYTES, Relay
from ensembler.crypto.server import CryptoServer
from ensembler.crypto.steps import Step
from ensembler.crypto_client import CryptoEdgeClient
from ensembler.edge_runtime import sealing
from ensembler.privacy.boundary_study import plain_net
from ensembler.protocol.errors import (
    AuthenticationError,
    BadRequestError,
    BundleError,
    BundleTamperedError,
    BusyError,
    ConfigError,
    DeadlineExceededError,
    EnsemblerError,
    GateFailedError,
    InternalError,
    KeyFileError,
    NotAuthorizedError,
    ProtocolError,
    ServerUnreachableError,
    UnknownBodiesError,
)
from ensembler.protocol.manifest import load_client
from ensembler.protocol.messages import Message, encode
from ensembler.training.models import normalise
from ensembler.training.runs import RunFolder
from ensembler.training.stages import load_bodies, train
from ensembler.training.stages import load_client as trained_client
from ensembler.transport.zmq_server import ServerSocket

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_SPU = importlib.util.find_spec("spu") is not None
needs_spu = pytest.mark.skipif(not HAS_SPU, reason="spu is not installed; make test-crypto installs it")
ENGINES = [bundles.INSECURE, pytest.param(bundles.SPU, marks=needs_spu)]
BITS = 18
HEAD_END = "4"  # of own_nets:sequential, for the training alone
LONG_MS = 60_000


# --- shares ---

finite = st.floats(-4000, 4000, width=32)


@given(st.lists(finite, min_size=1, max_size=20), st.sampled_from([12, 18]), st.sampled_from([0.0, 0.1, 3.0]))
def test_what_the_server_sees_is_the_number_and_noise_within_the_magnitude(numbers, bits, magnitude):
    values = np.array(numbers, np.float32)
    theirs = shares.random_share(values.shape)
    own = shares.encode(values, bits) - theirs
    seen = shares.revealed(own, shares.noised(theirs, magnitude, bits), bits)
    assert np.abs(seen.astype(np.float64) - values).max() <= magnitude + 2.0**-bits + 4000 * 2.0**-24


def test_the_noise_is_uniform_and_differs_from_one_reveal_to_the_next():
    own = theirs = np.zeros(20_000, np.uint64)
    first, second = (shares.revealed(own, shares.noised(theirs, 0.5, BITS), BITS) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.abs(first).max() <= 0.5
    assert np.histogram(first, 10, (-0.5, 0.5))[0] == pytest.approx(2000, abs=250)


def test_a_share_of_another_size_is_refused():
    with pytest.raises(ProtocolError, match="8 bytes instead of 12"):
        shares.revealed(np.zeros(3, np.uint64), bytes(8), BITS)


def test_noise_beyond_the_revealed_bits_is_refused():
    with pytest.raises(ConfigError, match="does not fit into 13 integer bits"):
        shares.noised(np.zeros(3, np.uint64), 5000.0, BITS)


# --- steps ---

STEPS = (
    Step(name="1:Conv", operator="Conv", inputs=("image",), weights=(("w0", (4, 3, 3, 3)),), output="v1", shape=(1, 4)),
    Step(name="2:Relu", operator="Relu", inputs=("v1",), weights=(), output="v2", shape=(1, 4), code=b"code"),
)


def test_steps_survive_their_file():
    assert layers.parse(layers.to_bytes(STEPS), "steps.bin") == STEPS


@given(st.binary(max_size=200))
def test_bytes_that_are_no_steps_are_refused(data):
    with pytest.raises(BundleError, match=r"steps\.bin"):
        layers.parse(data, "steps.bin")


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_gives_steps_or_a_bundle_error(position, value):
    data = bytearray(layers.to_bytes(STEPS))
    data[position % len(data)] = value
    with suppress(BundleError):
        layers.parse(bytes(data), "steps.bin")


def test_a_step_that_uses_a_later_value_is_refused():
    with pytest.raises(BundleError, match="uses a value that is not there"):
        layers.parse(layers.to_bytes(STEPS[::-1]), "steps.bin")


# --- the relayed stream ---


class Ends:
    """Two relays, each between an engine's socket and the other relay, with the messages between them in a list."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.engines = [engine for engine, _ in pairs]
        self.relays = [Relay(stream, bytes(16)) for _, stream in pairs]
        self._sockets = [each for pair in pairs for each in pair]

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()

    def pump(self) -> None:
        moved = True
        while moved:
            moved = False
            for here, there in (self.relays, self.relays[::-1]):
                while (message := here.outgoing()) is not None:
                    moved = True
                    there.take(message)


@pytest.fixture
def ends():
    with Ends() as found:
        yield found


@given(st.lists(st.binary(min_size=1, max_size=300_000), min_size=1, max_size=4))
def test_a_stream_arrives_as_it_was_written(parts):
    received, total = bytearray(), b"".join(parts)
    left = memoryview(total)
    with Ends() as ends:
        for engine in ends.engines:
            engine.setblocking(False)
        while len(received) < len(total):
            with suppress(BlockingIOError):
                left = left[ends.engines[0].send(left) :]
            ends.pump()
            with suppress(BlockingIOError):
                received += ends.engines[1].recv(1 << 20)
    assert bytes(received) == total


def test_a_side_sends_no_more_than_a_window_until_it_is_taken(ends):
    writer = threading.Thread(target=ends.engines[0].sendall, args=(bytes(2 * WINDOW_BYTES),), daemon=True)
    writer.start()
    deadline = time.monotonic() + 30
    sent = []
    while sum(message.tensor.size for message in sent) < WINDOW_BYTES // 16 and time.monotonic() < deadline:
        if (message := ends.relays[0].outgoing()) is not None:
            sent.append(message)
    for _ in range(1000):
        if (message := ends.relays[0].outgoing()) is not None:
            sent.append(message)
    on_way = sum(message.tensor.size for message in sent)
    assert 0 < on_way <= WINDOW_BYTES + PIECE_BYTES
    assert len(sent) <= 48
    for message in sent:
        ends.relays[1].take(message)
    ends.engines[1].setblocking(False)
    received = 0
    while received < 2 * WINDOW_BYTES and time.monotonic() < deadline:
        ends.pump()
        with suppress(BlockingIOError):
            received += len(ends.engines[1].recv(1 << 20))
    assert received == 2 * WINDOW_BYTES
    writer.join(30)


def test_a_piece_that_came_twice_or_is_missing_is_refused(ends):
    ends.engines[0].sendall(b"first")
    piece = ends.relays[0].outgoing()
    ends.engines[0].sendall(b"second")
    later = ends.relays[0].outgoing()
    with pytest.raises(ProtocolError, match="missing, or came twice"):
        ends.relays[1].take(later)
    ends.relays[1].take(piece)
    with pytest.raises(ProtocolError, match="missing, or came twice"):
        ends.relays[1].take(piece)


def test_pieces_that_were_never_sent_cannot_be_taken(ends):
    lie = Message(operation="link", request_id=bytes(16), info={"at": 0, "pieces": 3, "taken": 100})
    with pytest.raises(ProtocolError, match="that were not sent"):
        ends.relays[0].take(lie)


# --- bundles ---


@pytest.fixture(scope="session")
def plain_run(tiny_data, configs, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    options = {"head_end": HEAD_END, "tail_start": "9", "defense": "none", "noise_std": 0.0}
    config = configs(data=tiny_data, num_nets=1, num_selected=1, epochs_stage1=2, epochs_stage3=1)
    train(config(arch="own_nets:sequential", **options), out)
    return out


def exported(run, out, *options, noise="0.1"):
    given = ["--boundary", "4", "--noise", noise, "--max-accuracy-drop", "100", *options]
    return main(["export", str(run), "--out", str(out), "--protocol", "c2pi", "--json", *given])


def made(out, prefix, suffix, size, **settings):
    """Exports a net of two classes in two parts, without any training."""
    parts = {"suffix": suffix, "tail": None, "boundary": "the front", "labels": ("a", "b")}
    options = CryptoOptions(
        settings=bundles.Settings(**settings),
        noise_magnitude=0.0,
        max_accuracy_drop_points=100.0,
        server_public_key=None,
    )
    images = torch.randint(0, 256, (8, 3, *size), dtype=torch.uint8)
    divided = Divided(mode=bundles.CLEAR, prefix=prefix, image_size=size, **parts)
    export(divided, images, torch.zeros(8, dtype=torch.int64), out, options)
    return out


@pytest.fixture(scope="session")
def out_of(plain_run, tmp_path_factory):
    """``out_of(engine)`` is the folder of an export without noise, and with keys."""
    made = {}

    def of(engine):
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp("crypto") / "out"
            options = ["--insecure-engine"] if engine == bundles.INSECURE else []
            assert exported(plain_run, made[engine], *options, noise="0") == 0
        return made[engine]

    return of


@pytest.fixture(scope="session")
def out(out_of):
    return out_of(bundles.INSECURE)


@pytest.fixture(scope="session")
def plain_logits(plain_run, tiny_images):
    net = plain_net(RunFolder.open(plain_run))
    with torch.inference_mode():
        return net.module(normalise(torch.from_numpy(tiny_images.transpose(0, 3, 1, 2)))).numpy()


@pytest.mark.parametrize("engine", ENGINES)
def test_no_weight_is_in_a_clients_bundle(out_of, plain_run, engine):
    stored = {name: value.numpy() for name, value in plain_net(RunFolder.open(plain_run)).module.state_dict().items()}
    content = b"".join(path.read_bytes() for path in sorted((out_of(engine) / "client").iterdir()))
    assert sorted(path.name for path in (out_of(engine) / "client").iterdir()) == ["manifest.json", "steps.bin"]
    for name, value in stored.items():
        if value.dtype == np.float32 and value.size >= 8:
            for piece in (value.tobytes()[:16], value.reshape(-1)[:4].astype("<f8").tobytes()):
                assert piece not in content, name
    assert str(Path.cwd()).encode() not in content


def test_a_damaged_file_and_a_bundle_of_another_kind_are_named(out, tiny, tmp_path):
    with pytest.raises(BundleError, match="belongs to a bundle of crypto-clear inference"):
        load_client(out / "client")
    with pytest.raises(BundleError, match="belongs to a bundle of split inference"):
        bundles.load_client(tiny.client)
    with pytest.raises(BundleError, match="belongs to a server bundle"):
        bundles.load_client(out / "server")
    damaged = shutil.copytree(out / "client", tmp_path / "client")
    (damaged / "steps.bin").write_bytes(b"x")
    with pytest.raises(BundleTamperedError, match=r"steps\.bin"):
        EdgeClient(damaged, "tcp://127.0.0.1:9", insecure_engine=True, plaintext=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("settings", {"engine": "none"}), ("noise_magnitude", -1), ("boundary_shape", [0]), ("files", {}), ("labels", [])],
)
def test_an_impossible_field_of_a_manifest_is_named(out, field, value):
    document = json.loads((out / "client" / "manifest.json").read_text()) | {field: value}
    with pytest.raises(BundleError, match=rf"m\.json: {field}"):
        bundles.parse_client(json.dumps(document).encode(), "m.json")


def test_an_export_says_what_it_needs(plain_run, tiny, tmp_path, capsys):
    plain = ["export", str(plain_run), "--out", str(tmp_path / "out"), "--protocol", "c2pi", "--insecure-engine"]
    assert main(plain) == 2
    assert "needs --boundary" in capsys.readouterr().err
    assert main([*plain, "--boundary", "99"]) == 2
    assert "99" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--format", "onnx"]) == 2
    assert "takes no --format" in capsys.readouterr().err
    assert main(["export", str(tiny.run), *plain[2:], "--boundary", "3"]) == 2
    assert "begin at its cut, so leave it out" in capsys.readouterr().err
    assert main(["export", str(tiny.run), *plain[2:]]) == 2
    assert "train with --noise uniform --noise-mode fresh, or with --noise-std 0" in capsys.readouterr().err
    assert main([*plain, "--boundary", "all", "--noise", "0.1"]) == 2
    assert "--noise is for what the server sees of a boundary" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--noise", "-1"]) == 2
    assert "--noise -1: from 0 to 1000" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--fraction-bits", "40"]) == 2
    assert "--fraction-bits 40: from 8 to 24 with --ring 64" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--parity-images", "0"]) == 2
    assert "--parity-images 0: at least one" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--parties", "2", "--quantize", "none"]) == 2
    assert "takes no --parties and no --quantize none" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--max-accuracy-drop", "nan"]) == 1
    assert "more than nan" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--ring", "32", "--fraction-bits", "14"]) == 2
    assert "--fraction-bits 14: from 8 to 13 with --ring 32" in capsys.readouterr().err
    assert main(["export", str(plain_run), "--out", str(tmp_path / "out"), "--noise", "0.1"]) == 2
    assert "--noise: with --protocol c2pi alone" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--noise", "900"]) == 1
    assert "lower --noise" in capsys.readouterr().err
    assert main([*plain, "--boundary", "3", "--noise", "900", "--fraction-bits", "22"]) == 1
    assert "must stay below 256" in capsys.readouterr().err
    assert not (tmp_path / "out" / "client").exists()
    assert not (tmp_path / "out" / "keys").exists()


# --- engines ---


@pytest.fixture
def links():
    """Two links with each other."""
    found = [StreamLink(end) for end in socket.socketpair()]
    yield found
    for link in found:
        link.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_engines_leave_shares_that_add_up_to_the_layers_result(out_of, plain_run, tiny_images, links, engine):
    client, steps = bundles.load_client(out_of(engine) / "client")
    bundles.load_server(out_of(engine) / "server")
    weights = out_of(engine) / "server" / bundles.weights_file(engine)
    image = normalise(torch.from_numpy(tiny_images[:1].transpose(0, 3, 1, 2)))
    told = []

    def party(rank, link):
        own = weights if rank == SERVER else None
        made = open_engine(client.settings, link, rank, steps, own, client.image_shape)
        given = image.numpy() if rank == CLIENT else None
        return [made.run(given, told.append if rank == CLIENT else lambda _: None) for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        sides = list(pool.map(party, (SERVER, CLIENT), links, timeout=200))
    net = plain_net(RunFolder.open(plain_run))
    front, _ = net.chain([client.boundary])
    with torch.inference_mode():
        expected = front.eval()(image).numpy()
    for own, theirs in zip(*sides, strict=True):
        total = (own + theirs).view(np.int64) / 2.0**BITS
        np.testing.assert_allclose(total, expected, atol=2e-3)
        for share in (own, theirs):  # alone it tells nothing: its bytes are uniform
            counts = np.bincount(share.view(np.uint8).reshape(-1), minlength=256)
            mean = counts.sum() / 256
            assert ((counts - mean) ** 2 / mean).sum() < 400
    assert not np.array_equal(sides[1][0], sides[1][1])
    assert told[-1] == len(steps)


def test_an_engine_of_no_such_name_is_refused():
    with pytest.raises(ConfigError, match="no engine 'magic'"):
        open_engine(bundles.Settings(engine="magic"), None, CLIENT, STEPS, None, (1, 3, 8, 8))


def test_a_name_that_is_too_long_is_refused(links):
    one, two = links
    with suppress(ServerUnreachableError):  # it may end while this is written
        one.send("x" * 600, b"")
    with pytest.raises(ProtocolError, match="more than any net needs"):
        two.receive("anything")


def test_messages_that_nobody_asks_for_are_counted_with_their_names(links, monkeypatch):
    monkeypatch.setattr("ensembler.crypto.link.MAX_WAITING_BYTES", 100_000)
    one, two = links
    for number in range(1000):
        with suppress(ServerUnreachableError):
            one.send(f"nobody asks for {number}", b"")
    with pytest.raises(ProtocolError, match="more than any net needs"):
        two.receive("anything")


def test_a_link_whose_other_end_has_gone_ends_a_wait(links):
    one, two = links
    two.close()
    with pytest.raises(ServerUnreachableError, match="has gone"):
        one.receive("anything")


def test_a_process_that_is_killed_is_an_error_that_names_the_signal():
    before = {*psutil.Process().children()}
    process = PartyProcess()
    try:
        (child,) = {*psutil.Process().children()} - before  # a moment after its start it has no command line yet
        child.kill()
        with pytest.raises(InternalError, match=r"SIGKILL.*memory"):
            process.result(30)
    finally:
        process.close()


def test_what_an_order_fails_with_comes_as_its_own_class(out, tmp_path):
    damaged = shutil.copytree(out / "server", tmp_path / "server")
    (damaged / "suffix.onnx").write_bytes(b"x")
    process = PartyProcess()
    try:
        process.order("open", folder=str(damaged), rank=SERVER, threads=1)
        with pytest.raises(BundleTamperedError, match=r"suffix\.onnx"):
            process.result(30)
    finally:
        process.close()


# --- a server ---


@pytest.fixture(scope="session")
def running(out, serve):
    with serve(out / "server", "--insecure-engine") as (endpoint, process):
        yield endpoint, process


never = threading.Event()  # is not set: a pause between two looks


@pytest.fixture
def in_process(out):
    """``in_process(**options)`` is the endpoint of a server in a thread of this process, in plaintext.

    ``in_process.servers`` are those that run.
    """
    started = []

    def start(**options):
        line = ServerSocket("tcp://127.0.0.1:*", keys=None, authorized=())
        server = CryptoServer(line, out / "server", allow_insecure=True, **options)
        thread = threading.Thread(target=server.run, args=(1000,))
        thread.start()
        started.append((line, server, thread))
        start.servers.append(server)
        return line.endpoint

    start.servers = []
    yield start
    for line, server, thread in started:
        server.stop()
        thread.join()
        line.close()


def client(out, endpoint, **options):
    return EdgeClient(out / "client", endpoint, **({"insecure_engine": True} | options))


@pytest.fixture
def watched(in_process):
    """A server with an HTTP port: (endpoint, server, HTTP address)."""
    meter = CryptoMeter()
    endpoint = in_process(meter=meter)
    (server,) = in_process.servers
    meter.watch(server.describe)
    http = HttpPort("127.0.0.1:0", server, meter)
    yield endpoint, server, http.address
    http.close()


def test_an_operator_sees_how_the_server_is_and_what_it_did(out, watched, tiny_images):
    endpoint, server, http = watched
    assert get(http, "/livez")[0] == 200
    status, kind, body = get(http, "/readyz")
    assert (status, kind) == (200, "application/json")
    assert json.loads(body) == {
        "ready": True,
        "bodies_id": server.manifest.net_id,
        "num_nets": 1,
        "precision": "float32",
        "state": "ready",
        "queued_rows": 0,
        "engine": bundles.INSECURE,
        "session": False,
        "sent_bytes": 0,
        "received_bytes": 0,
    }
    with client(out, endpoint, plaintext=True) as edge:
        answers = [edge.predict(tiny_images[0]) for _ in range(2)]
        with client(out, endpoint, plaintext=True) as second, pytest.raises(BusyError):
            second.predict(tiny_images[0], timeout_ms=1000)
        during = numbers(get(http, "/metrics")[2])
    while json.loads(get(http, "/readyz")[2])["session"]:
        never.wait(0.05)
    after = numbers(get(http, "/metrics")[2])
    assert during["ensembler_crypto_session", ()] == 1
    assert after["ensembler_crypto_session", ()] == 0
    assert after["ensembler_crypto_answered_images_total", ()] == len(answers)
    for stage, count in (("open", 1), ("crypto", len(answers)), ("clear", len(answers))):
        assert after["ensembler_crypto_stage_seconds_count", (("stage", stage),)] == count
    assert after["ensembler_refused_requests_total", (("error", "BusyError"),)] >= 1
    for direction in ("sent", "received"):  # nothing is lost when a session ends
        name = ("ensembler_crypto_relayed_bytes_total", (("direction", direction),))
        assert after[name] >= during[name] > 0


def test_the_command_opens_the_http_port(out, serve):
    with serve(out / "server", "--insecure-engine", "--plaintext", "--http", "127.0.0.1:0") as (_, process):
        assert "ensembler_ready 1.0" in get(process.ready["http"], "/metrics")[2]


def test_a_stopping_server_is_alive_and_not_ready(out, watched, tiny_images):
    endpoint, server, http = watched
    with client(out, endpoint, plaintext=True) as edge:
        edge.predict(tiny_images[0])
        server._stopping = True  # as after SIGTERM, of a loop that still has its order under way
        assert get(http, "/readyz")[0] == 503


def test_a_loop_that_hangs_is_not_alive(watched, monkeypatch):
    monkeypatch.setattr("ensembler.crypto.server.LIVE_S", 0.2)
    _, server, http = watched
    held = threading.Event()
    server._calls.ask(held.wait)
    assert get(http, "/livez")[0] == 503
    held.set()
    while get(http, "/livez")[0] != 200:
        pass


def test_a_client_answers_as_the_net_does(out, running, tiny_images, plain_logits):
    layers_done = []
    progress = {"progress": lambda done, count: layers_done.append((done, count))}
    with client(out, running[0], **progress) as edge:
        assert isinstance(edge, CryptoEdgeClient)
        first = edge.predict(tiny_images[0])
        rest = edge.predict_batch(list(tiny_images[1:5]))
        streamed = [result for _, result in edge.stream(tiny_images[5:8])]
        status = edge.status()
        (counted,) = edge.statistics()
    found = np.stack([result.logits for result in [first, *rest, *streamed]])
    np.testing.assert_allclose(found, plain_logits[:8], atol=1e-3)
    assert first.label == edge.labels[int(np.argmax(plain_logits[0]))]
    assert status["fits"]
    assert status["engine"] == "insecure-plain"
    assert counted.answers == 9  # with the status
    assert layers_done[0] == (1, 1)
    (layer,) = first.crypto.layers
    assert layer.name == "1:net"
    assert 4 * tiny_images[0].size <= layer.bytes_up <= first.crypto.crypto_bytes_up
    assert first.crypto.setup_ms > 0
    assert rest[0].crypto.setup_ms < first.crypto.setup_ms
    assert first.crypto.engine == "insecure-plain"
    assert first.crypto.crypto_bytes_up >= 4 * tiny_images[0].size
    assert edge.info().feature_shape == (8, 8, 8)


def test_noise_is_added_on_the_device_and_within_its_magnitude(plain_run, serve, tiny_images, tmp_path, plain_logits):
    assert exported(plain_run, tmp_path / "out", "--insecure-engine", "--plaintext", noise="0.5") == 0
    with (
        serve(tmp_path / "out" / "server", "--insecure-engine", "--plaintext") as (endpoint, _),
        client(tmp_path / "out", endpoint, plaintext=True) as edge,
    ):
        one, two = (edge.predict(tiny_images[0]).logits for _ in range(2))
    assert not np.array_equal(one, two)
    assert np.abs(one - plain_logits[0]).max() > 1e-4


def test_an_engine_without_protection_is_taken_only_where_it_is_asked_for(out, capsys):
    with pytest.raises(ConfigError, match=r"insecure-plain, which sends the image.*insecure_engine=True"):
        EdgeClient(out / "client", "tcp://127.0.0.1:9", plaintext=True)
    assert main(["serve", str(out / "server"), "--plaintext", "--bind", "tcp://127.0.0.1:*"]) == 2
    assert "insecure-plain" in capsys.readouterr().err


def test_an_option_that_a_bundle_of_this_kind_has_no_use_for_is_named(out, tiny):
    with pytest.raises(ConfigError, match="no use for backend"):
        client(out, "tcp://127.0.0.1:9", backend="onnxruntime")
    with pytest.raises(ConfigError, match="one address"):
        client(out, "tcp://127.0.0.1:9,tcp://127.0.0.1:10", plaintext=True)
    with pytest.raises(ConfigError, match="insecure_engine is for a bundle of crypto-clear"):
        EdgeClient(tiny.client, "tcp://127.0.0.1:9", plaintext=True, insecure_engine=True)


def test_a_client_of_another_export_is_told_so(plain_run, out, running, tiny_images, tmp_path):
    assert exported(plain_run, tmp_path / "out", "--insecure-engine", "--server-key", str(out / "keys/server.key")) == 0
    with (
        client(tmp_path / "out", running[0], key=out / "keys/device.key_secret") as edge,
        pytest.raises(UnknownBodiesError, match="another net"),
    ):
        edge.predict(tiny_images[0])


def test_a_client_of_split_inference_is_told_so_and_the_other_way_round(out, running, tiny, tiny_images, serve):
    keys = {"key": out / "keys/device.key_secret", "server_key": out / "keys/server.key"}
    with (
        EdgeClient(tiny.client, running[0], **keys) as edge,
        pytest.raises(BadRequestError, match="runs crypto-clear inference"),
    ):
        edge.predict(tiny_images[0])
    with (
        serve(tiny.server, "--plaintext") as (endpoint, _),
        client(out, endpoint, plaintext=True) as edge,
        pytest.raises(BadRequestError, match="'open'"),
    ):
        edge.predict(tiny_images[0])


def test_one_client_at_a_time_and_the_next_when_it_is_gone(out, running, tiny_images, plain_logits):
    with client(out, running[0]) as first:
        first.predict(tiny_images[0])
        with client(out, running[0]) as second:
            with pytest.raises(BusyError, match="one at a time") as refused:
                second.predict(tiny_images[1])
            assert refused.value.retry_after_ms >= 1000
            first.close()
            np.testing.assert_allclose(second.predict(tiny_images[1]).logits, plain_logits[1], atol=1e-3)


def test_a_session_whose_place_was_taken_opens_another_by_itself(out, in_process, tiny_images, plain_logits):
    endpoint = in_process(idle_s=0.0)
    with client(out, endpoint, plaintext=True) as first, client(out, endpoint, plaintext=True) as second:
        for edge, index in ((first, 0), (second, 1), (first, 2), (second, 3)):
            result = edge.predict(tiny_images[index])
            np.testing.assert_allclose(result.logits, plain_logits[index], atol=1e-3)
            assert result.crypto.setup_ms > 1


def test_a_session_that_is_idle_for_long_ends_and_its_client_notices_nothing(
    out, in_process, tiny_images, plain_logits, monkeypatch
):
    monkeypatch.setattr("ensembler.crypto.server.LONGEST_IDLE_S", 2.0)
    with client(out, in_process(), plaintext=True) as edge:
        edge.predict(tiny_images[0])
        assert len(parties_of(os.getpid())) == 2
        deadline = time.monotonic() + 30
        while len(parties_of(os.getpid())) == 2 and time.monotonic() < deadline:
            never.wait(0.05)
        assert len(parties_of(os.getpid())) == 1  # the client's own
        np.testing.assert_allclose(edge.predict(tiny_images[1]).logits, plain_logits[1], atol=1e-3)


def parties_of(process):
    found = []
    for each in psutil.Process(process if isinstance(process, int) else process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            found += [each] if "ensembler.crypto.party" in each.cmdline() else []
    return found


def test_a_servers_engine_that_dies_is_an_error_and_the_next_call_works(out, running, tiny_images, plain_logits):
    with client(out, running[0]) as edge:
        edge.predict(tiny_images[0])
        for party in parties_of(running[1]):
            party.kill()
        with pytest.raises((InternalError, BadRequestError)):
            edge.predict(tiny_images[1])
        np.testing.assert_allclose(edge.predict(tiny_images[2]).logits, plain_logits[2], atol=1e-3)
    assert not parties_of(os.getpid())


def test_a_clients_engine_that_dies_is_an_error_and_the_next_call_works(out, running, tiny_images, plain_logits):
    with client(out, running[0]) as edge:
        edge.predict(tiny_images[0])
        for party in parties_of(os.getpid()):
            party.kill()
        with pytest.raises(InternalError, match="SIGKILL"):
            edge.predict(tiny_images[1])
        np.testing.assert_allclose(edge.predict(tiny_images[2]).logits, plain_logits[2], atol=1e-3)


@needs_spu
def test_an_engine_without_memory_is_an_error_and_the_next_call_works(out_of, serve, tiny_images, plain_logits):
    out = out_of(bundles.SPU)
    with serve(out / "server") as (endpoint, process), EdgeClient(out / "client", endpoint) as edge:
        edge.predict(tiny_images[0])
        (party,) = parties_of(process.pid)
        party.rlimit(psutil.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        with pytest.raises(InternalError, match="the server's engine failed; its log has the reason"):
            edge.predict_batch(list(tiny_images[:20]), timeout_ms=LONG_MS)  # what it has freed may do for some
        np.testing.assert_allclose(edge.predict(tiny_images[2]).logits, plain_logits[2], atol=2e-3)


def test_a_person_at_a_terminal_sees_how_far_the_two_parties_are(out, running, tiny_images, tmp_path):
    Image.fromarray(tiny_images[0]).save(tmp_path / "image.png")
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "ensembler.cli", "predict", str(out / "client"), str(tmp_path / "image.png")]
    done = subprocess.run(
        [*command, "--server", running[0], "--insecure-engine"], stdout=subprocess.PIPE, stderr=theirs, check=True
    )
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "1 of 1 layers" in drawn
    assert drawn.endswith("\r\x1b[K")
    assert b"image.png: " in done.stdout


def test_an_engine_that_cannot_be_started_is_an_error_and_the_server_goes_on(
    out, in_process, tiny_images, plain_logits, monkeypatch
):
    started, begin = [], subprocess.Popen

    def limited(*arguments, **options):
        started.append(arguments)
        if len(started) == 2:  # the server's; the first is the client's
            raise OSError(errno.EMFILE, "Too many open files")
        return begin(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", limited)
    with client(out, in_process(), plaintext=True) as edge:
        with pytest.raises(InternalError, match="could not be started: Too many open files"):
            edge.predict(tiny_images[0])
        np.testing.assert_allclose(edge.predict(tiny_images[1]).logits, plain_logits[1], atol=1e-3)


def test_an_engine_takes_no_module_from_the_folder_that_it_is_called_in(out, tmp_path, monkeypatch):
    (tmp_path / "msgpack.py").write_text("import os; os._exit(7)")
    monkeypatch.chdir(tmp_path)
    process = PartyProcess()
    try:
        process.order("finish", content=b"")
        with pytest.raises(InternalError, match="AttributeError"):  # it is there, and has no bundle yet
            process.result(60)
    finally:
        process.close()


def test_an_order_to_an_engine_that_hangs_does_not_wait(out):
    process = PartyProcess()
    try:
        psutil.Process(process._process.pid).suspend()  # not by its command line, which comes a moment later
        process.order("run", image=bytes(8_000_000))
        assert process.answer() is None
    finally:
        process.close()


def test_a_client_that_goes_while_the_engine_waits_for_it_makes_room(out, in_process, tiny_images, monkeypatch):
    monkeypatch.setattr("ensembler.crypto.server.SILENT_S", 0.2)
    endpoint = in_process()
    manifest, _ = bundles.load_client(out / "client")
    with zmq.Context() as context, context.socket(zmq.DEALER) as gone:
        gone.connect(endpoint)
        info = {"steps": manifest.files[bundles.STEPS_FILE].sha256}
        net_id = bytes.fromhex(manifest.net_id)
        opening = Message(operation="open", request_id=bytes(16), bodies_id=net_id, budget_ms=3.6e6, info=info)
        gone.send_multipart(encode(opening))
        assert gone.poll(LONG_MS)
        running = Message(operation="run", request_id=bytes(16), budget_ms=3.6e6)
        gone.send_multipart(encode(running))
        gone.linger = 100
    with client(out, endpoint, plaintext=True) as edge:
        until = time.monotonic() + 30
        while True:
            try:
                edge.predict(tiny_images[0])
                break
            except BusyError:
                assert time.monotonic() < until


def test_a_server_that_floods_is_left_at_the_deadline(out, tiny_images):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        stop = threading.Event()

        def flood():
            peer, *_ = server.recv_multipart()
            lie = encode(Message(operation="result", request_id=os.urandom(16), tensor=np.zeros((1, 9), np.uint8)))
            while not stop.is_set():
                with suppress(zmq.Again):
                    server.send_multipart([peer, *lie], zmq.DONTWAIT)

        thread = threading.Thread(target=flood)
        thread.start()
        begun = time.monotonic()
        try:
            with (
                client(out, f"tcp://127.0.0.1:{port}", plaintext=True) as edge,
                pytest.raises((DeadlineExceededError, ServerUnreachableError)),
            ):
                edge.predict(tiny_images[0], timeout_ms=1500)
            taken = time.monotonic() - begun
        finally:
            stop.set()
            thread.join()
    assert taken < LONG_MS / 1000


def test_a_client_that_is_closed_while_it_computes_ends_its_call(out, running, tiny_images):
    edge = client(out, running[0], progress=lambda *_: edge.close())
    with pytest.raises(ConfigError, match="closed while it computed"):
        edge.predict(tiny_images[0])
    with pytest.raises(ConfigError, match="is closed"):
        edge.predict(tiny_images[0])
    edge.close()
    assert not parties_of(os.getpid())


def test_a_client_that_is_forgotten_in_a_cycle_ends_its_session(out, running, tiny_images):
    edge = client(out, running[0])
    edge.predict(tiny_images[0])
    assert len(parties_of(os.getpid())) == 1
    edge.itself = edge
    del edge
    gc.collect()
    deadline = time.monotonic() + 30
    while parties_of(os.getpid()):
        assert time.monotonic() < deadline
        never.wait(0.05)


def test_an_argument_of_another_type_is_refused(out):
    with pytest.raises(ConfigError, match="plaintext = 'false'"):
        client(out, "tcp://127.0.0.1:1", plaintext="false")
    with pytest.raises(ConfigError, match="progress is str"):
        client(out, "tcp://127.0.0.1:1", progress="x")


def test_an_answer_that_is_no_number_is_refused(serve, tiny_images, tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2] * float("nan")

    out = made(tmp_path / "out", nn.Conv2d(3, 4, 3), Broken(), (16, 16), engine=bundles.INSECURE)
    with (
        serve(out / "server", "--plaintext", "--insecure-engine") as (endpoint, _),
        client(out, endpoint, plaintext=True) as edge,
        pytest.raises(ProtocolError, match="does not give 2 finite logits"),
    ):
        edge.predict(tiny_images[0])


def test_an_engine_that_hangs_ends_at_the_deadline(out, running, tiny_images, plain_logits):
    with client(out, running[0]) as edge:
        edge.predict(tiny_images[0])
        (party,) = parties_of(running[1])
        party.suspend()
        with pytest.raises(DeadlineExceededError, match="raise timeout_ms"):
            edge.predict(tiny_images[1], timeout_ms=1000)
        np.testing.assert_allclose(edge.predict(tiny_images[2]).logits, plain_logits[2], atol=1e-3)


def test_a_server_that_is_not_there_is_an_error_within_the_deadline(out, tiny_images):
    with client(out, "tcp://127.0.0.1:9", timeout_ms=3000) as edge, pytest.raises(ServerUnreachableError):
        edge.predict(tiny_images[0])


def test_a_fallback_answers_while_the_server_is_away(out, tiny_images):
    from ensembler.prediction import Prediction

    options = {"timeout_ms": 3000, "fallback": lambda image, error: Prediction.local("red", 0.5)}
    with client(out, "tcp://127.0.0.1:9", **options) as edge:
        assert edge.predict(tiny_images[0]).source == "fallback"


def test_a_stranger_learns_nothing_and_a_device_that_is_withdrawn_is_cut_off(out, serve, tiny_images, tmp_path):
    keys = shutil.copytree(out / "keys", tmp_path / "keys")
    stranger = tmp_path / "stranger"
    assert main(["keys", "new", "--out", str(stranger), "--name", "device"]) == 0
    secret = ["--key", str(keys / "server.key_secret")]
    with serve(out / "server", "--insecure-engine", *secret) as (endpoint, _):
        with client(out, endpoint, key=stranger / "device.key_secret") as edge, pytest.raises(AuthenticationError):
            edge.predict(tiny_images[0])
        with client(out, endpoint, key=keys / "device.key_secret") as edge:
            edge.predict(tiny_images[0])
            (keys / "authorized" / "device.key").unlink()
            deadline, refused = time.monotonic() + 30, None
            while refused is None and time.monotonic() < deadline:
                try:
                    edge.predict(tiny_images[0])
                except EnsemblerError as error:
                    refused = error
            assert isinstance(refused, NotAuthorizedError | AuthenticationError)


def test_a_server_ends_at_sigterm_with_status_0_and_leaves_no_process(out, serve, tiny_images):
    with serve(out / "server", "--insecure-engine") as (endpoint, process), client(out, endpoint) as edge:
        edge.predict(tiny_images[0])
        parties = parties_of(process)
        assert parties
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        psutil.wait_procs(parties, timeout=30)
        assert not any(party.is_running() for party in parties)


def test_a_server_that_is_killed_takes_its_engine_with_it(out, serve, tiny_images):
    with serve(out / "server", "--insecure-engine") as (endpoint, process), client(out, endpoint) as edge:
        edge.predict(tiny_images[0])
        parties = parties_of(process)
        process.kill()
        psutil.wait_procs(parties, timeout=30)
        assert not any(party.is_running() for party in parties)


WITHOUT_TORCH = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "jax", "safetensors"):
            raise ImportError(name + " is not on a device")
sys.meta_path.insert(0, Blocker())
import numpy as np
from ensembler import EdgeClient
with EdgeClient(sys.argv[1], sys.argv[2], plaintext=True, insecure_engine=True) as client:
    print(client.predict(np.zeros((16, 16, 3), np.uint8)).crypto.engine)
"""


def test_a_device_needs_neither_torch_nor_onnx(out, in_process):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(out / "client"), in_process()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "insecure-plain\n", done.stderr


# --- SPU ---


# --- without an answer at the server ---


def unnoised(run, out, *options):
    given = ["--noise", "0", "--max-accuracy-drop", "100", "--plaintext", *options]
    assert main(["export", str(run), "--out", str(out), "--protocol", "c2pi", "--json", *given]) == 0
    return out


@pytest.fixture(scope="session")
def ensemble_run(tiny_data, configs, tmp_path_factory):
    out = tmp_path_factory.mktemp("ensemble") / "run"
    config = configs(data=tiny_data, num_nets=3, num_selected=2, epochs_stage1=1, epochs_stage3=1)
    train(config(noise_std=0.0), out)
    return out


@pytest.fixture(scope="session")
def ensemble_logits(ensemble_run, tiny_images):
    run = RunFolder.open(ensemble_run)
    trained, bodies = trained_client(run), load_bodies(run)
    with torch.inference_mode():
        features = trained.head(normalise(torch.from_numpy(tiny_images.transpose(0, 3, 1, 2))))
        return trained.finish(features, [bodies[i] for i in trained.selector], through_wire=False).numpy()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_ensemble_behind_the_boundary_answers_as_the_run_does(
    ensemble_run, ensemble_logits, serve, tiny_images, tmp_path, engine
):
    insecure = ["--insecure-engine"] if engine == bundles.INSECURE else []
    out = unnoised(ensemble_run, tmp_path / "out", *insecure)
    with (
        serve(out / "server", "--plaintext", *insecure) as (endpoint, _),
        client(out, endpoint, plaintext=True) as edge,
    ):
        answers = edge.predict_batch(list(tiny_images[:3]))
        told, status = edge.info(), edge.status()
    found = np.stack([answer.logits for answer in answers])
    np.testing.assert_allclose(found, ensemble_logits[:3], atol=5e-3)
    assert (told.num_nets, status["num_nets"]) == (3, 3)
    assert answers[0].timings.tail > 0


@pytest.fixture(scope="module")
def sealed(ensemble_run, tmp_path_factory):
    """Bundles of an Ensembler whose client is encrypted: their folder, and the key."""
    folder = tmp_path_factory.mktemp("sealed")
    sealing.create_key(folder / "bundle.key")
    key = ["--encrypt-key", str(folder / "bundle.key")]
    return unnoised(ensemble_run, folder / "out", "--insecure-engine", *key), folder / "bundle.key"


def test_an_encrypted_tail_opens_with_its_key_alone(
    ensemble_run, ensemble_logits, sealed, serve, tiny_images, tmp_path, monkeypatch
):
    out, key = sealed
    assert {path.name for path in (out / "client").iterdir()} == {"manifest.json", "steps.bin", "tail.onnx.sealed"}
    own = trained_client(RunFolder.open(ensemble_run))
    content = (out / "client" / "tail.onnx.sealed").read_bytes()
    stored = [value for value in own.tail.state_dict().values() if value.numel() >= 8]
    assert not any(value.numpy().tobytes()[:32] in content for value in stored)
    with (
        serve(out / "server", "--plaintext", "--insecure-engine") as (endpoint, _),
        client(out, endpoint, plaintext=True, bundle_key=key) as edge,
    ):
        np.testing.assert_allclose(edge.predict(tiny_images[0]).logits, ensemble_logits[0], atol=5e-3)
        monkeypatch.setenv("ENSEMBLER_BUNDLE_KEY", str(key))
        with client(out, endpoint, plaintext=True) as from_environment:
            assert from_environment.labels == edge.labels
        monkeypatch.delenv("ENSEMBLER_BUNDLE_KEY")
        sealing.create_key(tmp_path / "other.key")
        for options, message in (
            ({}, "is encrypted with a key file"),
            ({"bundle_key": tmp_path / "other.key"}, "does not open"),
            ({"passphrase": "twelve characters"}, "a passphrase was given"),
        ):
            with pytest.raises(KeyFileError, match=message):
                client(out, endpoint, plaintext=True, **options)


def test_a_manifest_of_another_client_does_not_open_the_tail(sealed, tmp_path):
    out, key = sealed
    shutil.copytree(out / "client", tmp_path / "client")
    path = tmp_path / "client" / "manifest.json"
    path.write_text(path.read_text().replace('"noise_magnitude": 0', '"noise_magnitude": 1'))
    with pytest.raises(KeyFileError, match="the bundle was changed after its export"):
        client(tmp_path, "tcp://127.0.0.1:9", plaintext=True, bundle_key=key)


def test_a_key_without_something_to_open_is_refused(out, ensemble_run, tmp_path, plain_run, capsys):
    with pytest.raises(ConfigError, match="is not encrypted, and a key or passphrase"):
        client(out, "tcp://127.0.0.1:9", plaintext=True, bundle_key=bytes(32))
    sealing.create_key(tmp_path / "bundle.key")
    options = ["--protocol", "c2pi", "--boundary", "3", "--insecure-engine", "--plaintext"]
    given = [*options, "--encrypt-key", str(tmp_path / "bundle.key")]
    assert main(["export", str(plain_run), "--out", str(tmp_path / "out"), *given]) == 2
    assert "has nothing secret to encrypt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_server_of_an_ensemble_has_neither_tail_nor_selector(ensemble_run, tmp_path):
    out = unnoised(ensemble_run, tmp_path / "out", "--insecure-engine")
    server = b"".join(path.read_bytes() for path in sorted((out / "server").iterdir()))
    own = trained_client(RunFolder.open(ensemble_run))
    stored = [value for value in own.tail.state_dict().values() if value.numel() >= 8]
    assert stored
    assert not any(value.numpy().tobytes()[:32] in server for value in stored)
    manifest, _ = bundles.load_server(out / "server")
    assert manifest.answer_shape == (3, stored[0].shape[1] // 2)
    assert "selector" not in (out / "server" / "manifest.json").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_all_layers_under_two_parties_tell_the_server_nothing_and_the_client_the_logits(
    plain_run, serve, tiny_images, tmp_path, plain_logits, engine
):
    insecure = ["--insecure-engine"] if engine == bundles.INSECURE else []
    given = ["--boundary", "all", "--plaintext", "--json", "--max-accuracy-drop", "100", *insecure]
    assert main(["export", str(plain_run), "--out", str(tmp_path / "out"), "--protocol", "c2pi", *given]) == 0
    assert not (tmp_path / "out" / "server" / "suffix.onnx").exists()
    with (
        serve(tmp_path / "out" / "server", "--plaintext", *insecure) as (endpoint, _),
        client(tmp_path / "out", endpoint, plaintext=True) as edge,
    ):
        answers = edge.predict_batch(list(tiny_images[:2]))
        assert edge.info().payload_bytes_up == 0
    found = np.stack([answer.logits for answer in answers])
    np.testing.assert_allclose(found, plain_logits[:2], atol=5e-3)


# --- SPU ---


@needs_spu
def test_two_processes_answer_as_the_net_does_under_cheetah(
    out_of, serve, tiny_images, plain_logits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = out_of(bundles.SPU)
    with serve(out / "server") as (endpoint, _), EdgeClient(out / "client", endpoint) as edge:
        results = edge.predict_batch(list(tiny_images[:3]))
    found = np.stack([result.logits for result in results])
    np.testing.assert_allclose(found, plain_logits[:3], atol=2e-3)
    assert results[0].crypto.engine == "spu-cheetah"
    image = tiny_images[0].astype(np.float32)
    assert results[1].crypto.crypto_bytes_up > image.nbytes
    assert not list(tmp_path.iterdir())  # of which SPU would write a log


@needs_spu
@pytest.mark.parametrize(("ring_bits", "bits", "error"), [(64, 18, 2e-3), (32, 12, 2e-2)])
@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU6(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    ],
    ids=["relu6 and average", "groups and padded pooling", "mean and linear"],
)
def test_layers_of_many_kinds_are_computed_as_torch_does(net, links, tmp_path, ring_bits, bits, error):
    from ensembler.crypto.layers import to_layers
    from ensembler.export import graphs

    torch.manual_seed(0)
    image = torch.randn(1, 3, 12, 12)
    graph = graphs.optimised(graphs.from_torch(net.eval(), [torch.randn(2, 3, 12, 12)]))
    made = to_layers(graph, (1, 3, 12, 12))
    np.savez(tmp_path / "weights.npz", **made.weights)

    settings = bundles.Settings(ring_bits=ring_bits, fraction_bits=bits)

    def party(rank, link):
        own = tmp_path / "weights.npz" if rank == SERVER else None
        engine = open_engine(settings, link, rank, made.steps, own, (1, 3, 12, 12))
        return engine.run(image.numpy() if rank == CLIENT else None, lambda _: None)

    with ThreadPoolExecutor(2) as pool:
        own, theirs = pool.map(party, (SERVER, CLIENT), links, timeout=200)
    with torch.inference_mode():
        expected = net(image).numpy()
    found = shares.revealed(own, shares.noised(theirs, 0.0, bits), bits)
    np.testing.assert_allclose(found, expected, atol=error)
    simulated, largest = made.in_fixed_point(bits)(image.numpy())
    np.testing.assert_allclose(simulated, expected, atol=error)
    assert np.abs(simulated - expected).max() > 0
    assert largest >= np.abs(expected).max() - error


@needs_spu
def test_an_operator_without_translation_is_named_with_the_last_layer_that_works():
    from ensembler.crypto.layers import to_layers
    from ensembler.export import graphs
    from ensembler.protocol.errors import ExportError

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Softplus())
    graph = graphs.optimised(graphs.from_torch(net.eval(), [torch.randn(2, 3, 8, 8)]))
    with pytest.raises(ExportError, match=r"Softplus cannot be computed by two parties; the last .* is 2:Relu"):
        to_layers(graph, (1, 3, 8, 8))


@needs_spu
def test_a_ring_that_is_too_small_for_a_nets_numbers_is_refused(tmp_path):
    torch.manual_seed(0)
    front = nn.Conv2d(3, 4, 3, bias=False)
    with torch.no_grad():
        front.weight.mul_(40)
    suffix = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(GateFailedError, match="with --ring 32 and 12 fraction bits they must stay below 64: take"):
        made(tmp_path / "out", front, suffix, (8, 8), ring_bits=32, fraction_bits=12)
    assert not (tmp_path / "out").exists()


@needs_spu
def test_weights_of_a_server_are_plain_arrays(out_of):
    content = (out_of(bundles.SPU) / "server" / "weights.npz").read_bytes()
    assert all(name.endswith(".npy") for name in zipfile.ZipFile(io.BytesIO(content)).namelist())
