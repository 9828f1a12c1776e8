"""Device and server over real sockets and processes: right answers, typed errors, no hang, nobody unknown."""

from __future__ import annotations

import asyncio
import copy
import errno
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import ContextVar
from itertools import groupby

import numpy as np
import pytest
import zmq
from conftest import LOOPBACK, SlowEngine

from ensembler import AsyncEdgeClient, EdgeClient
from ensembler.cloud_runtime.batcher import BatchPolicy
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import (
    AuthenticationError,
    BadRequestError,
    BusyError,
    ConfigError,
    DeadlineExceededError,
    EnsemblerError,
    ImageError,
    InternalError,
    KeyFileError,
    ProtocolError,
    ServerUnreachableError,
    ShuttingDownError,
    TransportError,
    UnknownBodiesError,
    UnsupportedVersionError,
)
from ensembler.protocol.messages import ERROR, INFER, RESULT, STATUS, Message, decode, encode
from ensembler.transport import keys
from ensembler.transport.inprocess import InProcessTransport
from ensembler.transport.zmq_client import ZmqTransport

LONG_MS = 60_000


@pytest.fixture(scope="module")
def running(tiny, serve):
    """A server process with CURVE that the tests of this module share; yields its endpoint."""
    with serve(tiny.server) as (endpoint, _):
        yield endpoint


def test_an_error_while_connecting_closes_what_was_opened(monkeypatch):
    connect = zmq.Socket.connect

    def broken(self, address):
        if address.startswith("inproc:"):  # the monitor's
            return connect(self, address)
        raise RuntimeError("not a ZMQError")

    monkeypatch.setattr(zmq.Socket, "connect", broken)
    found = []

    def make():
        try:
            ZmqTransport("tcp://127.0.0.1:9", server_key=None, keys=None)
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=make, daemon=True)  # without the fix it never ends
    thread.start()
    thread.join(30)
    assert found == ["not a ZMQError"]


def test_a_system_without_descriptors_is_an_error_of_this_package(monkeypatch):
    def full(self, kind):
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(zmq.Context, "socket", full)
    with pytest.raises(ServerUnreachableError, match="Too many open files"):
        ZmqTransport("tcp://127.0.0.1:9", server_key=None, keys=None)


RESOLVER = "127.83.71.9"
SILENT_S = 30
CLOSES = """
import time
from ensembler.transport.zmq_client import ZmqTransport
transport = ZmqTransport("tcp://cloud.example.org:5555", server_key=None, keys=None)
transport.connect().close()
begun = time.monotonic()
transport.close()
print(time.monotonic() - begun)
"""


def test_a_client_and_its_process_end_while_the_systems_resolver_is_silent(tmp_path):
    settings = tmp_path / "resolv.conf"
    settings.write_text(f"nameserver {RESOLVER}\noptions timeout:{SILENT_S} attempts:1\n")
    shell = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
    alone = ["unshare", "--mount", "sh", "-c", shell, "sh", str(settings)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        try:
            silent.bind((RESOLVER, 53))
            subprocess.run([*alone, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs port 53 and a mount namespace")
        done = subprocess.run(
            [*alone, sys.executable, "-c", CLOSES], capture_output=True, text=True, timeout=SILENT_S / 2, check=True
        )
        silent.setblocking(False)
        assert silent.recv(512)  # the name was really looked up
    assert float(done.stdout) < SILENT_S / 2


@pytest.mark.parametrize(
    "address", ["tcp://\udcff:5555", "ipc://\udcff", "tcp://höst:5555", "tcp://a\0b:5555", "tcp://host:５５５５"]
)
def test_an_address_with_characters_that_no_address_has_is_refused(address):
    with pytest.raises(ConfigError, match="characters that no address has; give tcp://host:port"):
        ZmqTransport(address, server_key=None, keys=None)


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def client(tiny, endpoint, **options) -> EdgeClient:
    return EdgeClient(tiny.client, endpoint, timeout_ms=options.pop("timeout_ms", LONG_MS), **options)


# --- right answers ---


@pytest.mark.skipif(not has_ipv6(), reason="no ::1 on this machine")
def test_addresses_of_version_6_work_for_both_sides(tiny, serve, tiny_images, expected):
    # [::] takes clients of version 4 too.
    with serve(tiny.server, bind="tcp://[::]:*") as (endpoint, _):
        port = endpoint.rpartition(":")[2]
        for address in ("[::1]", "127.0.0.1", "localhost"):
            with client(tiny, f"tcp://{address}:{port}") as edge:
                np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])


def test_predict_gives_what_the_bundle_computes_without_a_network(tiny, running, tiny_images, expected):
    with client(tiny, running) as edge:
        for index in range(5):
            result = edge.predict(tiny_images[index])
            np.testing.assert_array_equal(result.logits, expected[index])
            assert result.label == edge.labels[int(expected[index].argmax())]
            assert result.probabilities.sum() == pytest.approx(1, abs=1e-5)
            assert result.score == pytest.approx(float(result.probabilities.max()))


def test_predict_batch_answers_every_image_in_order(tiny, running, tiny_images, expected):
    many = np.concatenate([tiny_images, tiny_images])  # more than one request's rows
    with client(tiny, running) as edge:
        results = edge.predict_batch(list(many))
        assert edge.predict_batch([]) == []
    np.testing.assert_array_equal(np.stack([r.logits for r in results]), np.concatenate([expected, expected]))
    assert [len(list(part)) for _, part in groupby(results, key=lambda one: one.request_id)] == [32] * 6


def test_a_bad_image_of_a_batch_is_told_by_its_place(tiny, running, tiny_images):
    with client(tiny, running) as edge, pytest.raises(ImageError, match=r"^images\[1\]: the image bytes: empty"):
        edge.predict_batch([tiny_images[0], b"", tiny_images[1]])
    with client(tiny, running) as edge, pytest.raises(ImageError, match=r"^the image bytes: empty"):
        edge.predict(b"")


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_client_is_not_copied_and_the_error_says_what_to_do(tiny, running, attempt):
    edge = client(tiny, running)
    edges = AsyncEdgeClient(tiny.client, running)
    for each in (edge, edges):
        with pytest.raises(ConfigError, match="cannot be copied or sent to another process: make a new one there"):
            attempt(each)
    edge.close()
    asyncio.run(edges.aclose())


def test_parts_of_a_batch_are_under_way_together_but_not_all_of_them(tiny, gate, tiny_images, expected):
    gate.open.clear()
    transport = InProcessTransport(gate)
    with (
        EdgeClient(tiny.client, "in-process", timeout_ms=LONG_MS, transport=transport) as edge,
        ThreadPoolExecutor(1) as pool,
    ):
        found = pool.submit(edge.predict_batch, [*tiny_images, *tiny_images])
        for _ in range(3):
            assert gate.arrived.acquire(timeout=30)
        gate.open.set()
        results = found.result(60)
    assert gate.most_at_once == 3
    np.testing.assert_array_equal(np.stack([r.logits for r in results]), np.concatenate([expected, expected]))


def test_parts_of_a_batch_have_the_callers_context_variables(tiny, gate, tiny_images, monkeypatch):
    variable, seen = ContextVar("trace", default=None), []
    monkeypatch.setattr("ensembler.client.trace_info", lambda: seen.append(variable.get()) or {})
    variable.set("a span")
    with EdgeClient(tiny.client, "in-process", timeout_ms=LONG_MS, transport=InProcessTransport(gate)) as edge:
        edge.predict_batch(list(tiny_images))
    assert seen == ["a span"] * 3


INTERRUPTED = """
import signal, sys, threading
import numpy as np
from ensembler import EdgeClient
client = EdgeClient(sys.argv[1], sys.argv[2], plaintext=True, timeout_ms=600_000)
print("asking", flush=True)
client.predict_batch(np.zeros((96, 16, 16, 3), np.uint8))
"""


def test_ctrl_c_ends_a_long_batch_and_the_program_at_once(tiny):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        command = [sys.executable, "-c", INTERRUPTED, str(tiny.client), endpoint]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "asking\n"
                mute.settimeout(60)
                connection, _ = mute.accept()  # so a part is under way
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=60)
                connection.close()
            finally:
                process.kill()
    assert "KeyboardInterrupt" in errors


def test_a_later_part_that_no_waiting_cures_ends_a_batch_whose_first_part_is_still_away(tiny, gate, tiny_images):
    second, held = EdgeRuntime(tiny.client).encode(tiny_images[32:64]), threading.Event()

    def handler(frames):
        message = decode(frames)
        if np.array_equal(message.tensor, second):
            info = {"code": InternalError.code, "message": "as the test says"}
            return [encode(Message(operation=ERROR, request_id=message.request_id, info=info))]
        assert held.wait(60)
        return gate(frames)

    def never(image, error):
        raise AssertionError("the fallback hides what somebody has to mend")

    transport = InProcessTransport(handler)
    with EdgeClient(tiny.client, "in-process", timeout_ms=LONG_MS, transport=transport, fallback=never) as edge:
        with pytest.raises(InternalError, match="as the test says"):
            edge.predict_batch(list(tiny_images))
        held.set()


def test_a_batch_fails_at_once_with_the_error_of_its_first_part_that_has_one(tiny, gate, tiny_images, expected):
    second = EdgeRuntime(tiny.client).encode(tiny_images[32:64])
    held = threading.Event()
    arrived, ended = threading.Event(), threading.Event()

    def handler(frames):
        message = decode(frames)
        if np.array_equal(message.tensor, second):
            assert arrived.wait(60)
            info = {"code": InternalError.code, "message": "as the test says"}
            return [encode(Message(operation=ERROR, request_id=message.request_id, info=info))]
        if np.array_equal(message.tensor, third):
            arrived.set()
            assert held.wait(60)
            ended.set()
        return gate(frames)

    third = EdgeRuntime(tiny.client).encode(tiny_images[64:])
    with EdgeClient(tiny.client, "in-process", timeout_ms=LONG_MS, transport=InProcessTransport(handler)) as edge:
        with pytest.raises(InternalError, match="as the test says"):
            edge.predict_batch(list(tiny_images))  # the third part is still held
        assert not ended.is_set()
        held.set()
        assert ended.wait(30)
        np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])


def test_a_prediction_says_what_the_call_cost(tiny, running, tiny_images):
    with client(tiny, running) as edge:
        result = edge.predict(tiny_images[0])
    times = result.timings
    parts = times.head + times.queue + times.server + times.network + times.tail
    assert parts == pytest.approx(times.total, rel=0.05)
    assert min(times.head, times.server, times.network, times.tail) > 0
    wire = EdgeRuntime(tiny.client).manifest.wire
    assert result.bytes_up >= np.prod(wire.feature_shape)
    assert result.bytes_down >= wire.num_nets * wire.answer_width
    assert len(result.request_id) == 32
    assert result.top_k[0] == (result.label, result.score)


def test_threads_share_one_client_and_each_gets_its_own_answer(tiny, running, tiny_images, expected):
    with client(tiny, running) as edge, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: edge.predict(tiny_images[i]).logits, range(len(tiny_images))))
    np.testing.assert_array_equal(np.stack(results), expected)


def test_requests_of_many_clients_are_computed_together_and_answered_apart(tiny, in_thread, tiny_images, expected):
    engine = SlowEngine(tiny.server)
    _, endpoint = in_thread(engine)
    with client(tiny, endpoint, plaintext=True) as edge, ThreadPoolExecutor(8) as pool:
        first = pool.submit(edge.predict, tiny_images[0])
        assert engine.entered.wait(30)
        rest = [pool.submit(edge.predict, tiny_images[i]) for i in range(1, 8)]
        _until_queued(edge, 7)
        engine.release.set()
        results = [future.result(60).logits for future in (first, *rest)]
    assert engine.rows == [1, 7]
    np.testing.assert_array_equal(np.stack(results), expected[:8])


def _until(edge, queued) -> None:
    """Asks the server until ``queued`` holds for the rows that wait; every question is a round trip to its loop."""
    for _ in range(100_000):
        if queued(edge.status()["queued_rows"]):
            return
    raise AssertionError("the queue never got there")


def _until_queued(edge, rows) -> None:
    _until(edge, lambda waiting: waiting >= rows)


def test_status_says_whether_the_server_fits(tiny, running):
    with client(tiny, running) as edge:
        status = edge.status()
    assert status["fits"] is True
    assert status["state"] == "ready"
    assert status["num_nets"] == 3


# --- who may connect ---


def test_a_device_that_the_server_does_not_know_is_refused_at_once(tiny, running, tmp_path, tiny_images):
    _, stranger = keys.create(tmp_path, "stranger")
    with client(tiny, running, key=stranger) as edge, pytest.raises(AuthenticationError, match="authorized"):
        edge.predict(tiny_images[0])


def test_a_device_that_was_refused_before_its_first_request_is_told_so_too(tiny, running, tmp_path, tiny_images):
    """The handshake runs from the moment that the client is made; a refusal takes the socket's queue along."""
    _, stranger = keys.create(tmp_path, "stranger")
    deadline = time.monotonic() + 60
    with client(tiny, running, key=stranger) as edge:
        (party,) = edge._parties
        first = party.replicas[0]._transport._first
        while first._socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT:
            assert time.monotonic() < deadline
            first._monitor.poll(100, zmq.POLLIN)
        with pytest.raises(AuthenticationError, match="authorized"):
            edge.predict(tiny_images[0])


def test_a_line_that_was_refused_says_so_again_and_takes_no_request(tiny, running, tmp_path):
    _, stranger = keys.create(tmp_path, "stranger")
    server_key = keys.load_public(tiny.keys / "server.key")
    transport = ZmqTransport(running, server_key=server_key, keys=keys.load_pair(stranger))
    connection = transport.connect()
    connection.send([b"x"])
    with pytest.raises(AuthenticationError):
        connection.receive(lambda _: None, time.monotonic() + 60)
    assert not connection.usable()
    with pytest.raises(AuthenticationError):
        connection.send([b"x"])
    connection.close()
    transport.close()


def test_a_transport_ends_while_other_threads_take_lines_of_it(tmp_path):
    """Each way of losing that race left a socket open, for which the context waited for ever, or killed the process."""
    for _ in range(300):
        errors = errors_of_taking_lines_while_it_ends(f"ipc://{tmp_path}/nobody")
        assert ["closed while it was in use" in str(error) for error in errors] == [True] * 3


def errors_of_taking_lines_while_it_ends(endpoint):
    transport = ZmqTransport(endpoint, server_key=None, keys=None)
    start, errors = threading.Barrier(4, timeout=60), []

    def take():
        start.wait()
        try:
            while True:
                transport.connect().close()
        except TransportError as error:
            errors.append(error)  # with its traceback, which keeps what its frames hold

    def end():
        start.wait()
        transport.close()

    threads = [threading.Thread(target=each, daemon=True) for each in (take, take, take, end)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_a_line_of_a_transport_that_is_being_closed_is_not_usable():
    with socket.create_server((LOOPBACK, 0)) as silent:  # where nobody listens, the line would soon be lost by itself
        transport = ZmqTransport(f"tcp://{LOOPBACK}:{silent.getsockname()[1]}", server_key=None, keys=None)
        connection = transport.connect()
        closing = threading.Thread(target=transport.close, daemon=True)
        closing.start()
        deadline = time.monotonic() + 60
        with pytest.raises(TransportError, match="closed while it was in use"):
            connection.receive(lambda _: None, deadline)
        while connection.usable():  # its two sockets are told one after the other
            assert time.monotonic() < deadline
        connection.close()
        closing.join(60)
        assert not closing.is_alive()


def test_plaintext_gets_no_answer_from_an_encrypted_server(tiny, running, tiny_images):
    with client(tiny, running, plaintext=True, timeout_ms=1500) as edge, pytest.raises(TransportError):
        edge.predict(tiny_images[0])


def test_a_client_does_not_talk_to_a_server_with_another_key(tiny, serve, tmp_path, tiny_images):
    _, other = keys.create(tmp_path, "server")
    arguments = ("--key", str(other), "--authorized", str(tiny.keys / "authorized"))
    with (
        serve(tiny.server, *arguments) as (endpoint, _),
        client(tiny, endpoint, timeout_ms=1500) as edge,
        pytest.raises(TransportError),
    ):
        edge.predict(tiny_images[0])


def test_plaintext_works_only_when_both_sides_ask_for_it(tiny, serve, tiny_images, expected):
    with serve(tiny.server, "--plaintext") as (endpoint, _):
        with client(tiny, endpoint, plaintext=True) as edge:
            np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
        with client(tiny, endpoint, timeout_ms=1500) as edge, pytest.raises(TransportError):
            edge.predict(tiny_images[0])


def test_without_a_device_key_the_error_says_where_it_was_looked_for(tiny, tmp_path, running):
    alone = tmp_path / "alone" / "client"
    alone.mkdir(parents=True)
    for path in tiny.client.iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    with pytest.raises(KeyFileError, match="ENSEMBLER_DEVICE_KEY"):
        EdgeClient(alone, running)


def test_nothing_of_the_image_features_or_keys_is_in_the_clear_on_the_wire(tiny, running, tiny_images):
    """A relay between client and server sees neither the codes nor a secret key."""
    codes = EdgeRuntime(tiny.client).encode(tiny_images[:1]).tobytes()
    seen, relay = bytearray(), socket.create_server(("127.0.0.1", 0))
    host, port = running.removeprefix("tcp://").rsplit(":", 1)

    def pump(source, target):
        while data := source.recv(65536):
            seen.extend(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    def accept():
        near, _ = relay.accept()
        far = socket.create_connection((host, int(port)))
        threads = [threading.Thread(target=pump, args=pair) for pair in ((near, far), (far, near))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        near.close()
        far.close()

    worker = threading.Thread(target=accept)
    worker.start()
    with client(tiny, f"tcp://127.0.0.1:{relay.getsockname()[1]}") as edge:
        edge.predict(tiny_images[0])
    worker.join(30)
    relay.close()
    assert len(seen) > len(codes)
    assert codes[:64] not in seen
    assert b"bodies" not in seen
    secret = keys.load_pair(tiny.keys / "device.key_secret").secret
    assert secret.encode() not in seen


# --- deadlines, losses, restarts ---


def test_no_server_is_an_error_at_the_deadline(tiny, tiny_images):
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with client(tiny, f"tcp://127.0.0.1:{port}", timeout_ms=2000) as edge, pytest.raises(ServerUnreachableError):
        edge.predict(tiny_images[0])


def test_a_server_that_accepts_and_says_nothing_is_an_error_at_the_deadline(tiny, tiny_images):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with client(tiny, endpoint, timeout_ms=400) as edge, pytest.raises(TransportError):
            edge.predict(tiny_images[0])


def test_a_slow_server_is_a_deadline_error_and_its_late_answer_reaches_nobody(tiny, in_thread, tiny_images, expected):
    engine = SlowEngine(tiny.server)
    _, endpoint = in_thread(engine)
    with client(tiny, endpoint, plaintext=True) as edge:
        with pytest.raises(DeadlineExceededError, match="timeout_ms"):
            edge.predict(tiny_images[0], timeout_ms=2000)
        engine.release.set()
        np.testing.assert_array_equal(edge.predict(tiny_images[1]).logits, expected[1])


def test_a_request_that_expires_in_the_queue_is_not_computed(tiny, in_thread, tiny_images):
    engine = SlowEngine(tiny.server)
    _, endpoint = in_thread(engine)
    with client(tiny, endpoint, plaintext=True) as edge, ThreadPoolExecutor(2) as pool:
        first = pool.submit(edge.predict, tiny_images[0])
        assert engine.entered.wait(30)
        with pytest.raises(DeadlineExceededError):
            edge.predict_batch(list(tiny_images[:5]), timeout_ms=2000)
        _until(edge, lambda rows: rows == 0)
        engine.release.set()
        first.result(60)
    assert 5 not in engine.rows


def test_a_restarted_server_is_picked_up_again(tiny, serve, tiny_images, expected):
    with ExitStack() as stack:
        with serve(tiny.server) as (endpoint, process):
            edge = stack.enter_context(client(tiny, endpoint))
            np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
            process.kill()
            process.wait(30)
            with pytest.raises(ServerUnreachableError):
                edge.predict(tiny_images[1], timeout_ms=2000)
        with serve(tiny.server, bind=endpoint):
            np.testing.assert_array_equal(edge.predict(tiny_images[2]).logits, expected[2])


def test_a_request_in_flight_when_the_server_dies_is_sent_again_to_the_restarted_one(
    tiny, serve, tiny_images, expected
):
    """The first server is stopped (not ended) so that the request is certainly lost with it."""
    with serve(tiny.server) as (endpoint, process), client(tiny, endpoint) as edge, ThreadPoolExecutor(1) as pool:
        edge.predict(tiny_images[0])
        os.kill(process.pid, signal.SIGSTOP)
        waiting = pool.submit(edge.predict, tiny_images[1])
        process.kill()
        process.wait(30)
        with serve(tiny.server, bind=endpoint):
            np.testing.assert_array_equal(waiting.result(60).logits, expected[1])


def test_retries_send_the_same_bytes(tiny, tiny_images):
    """Fresh noise on a retry could be averaged away; the server here is busy twice."""
    engine = OnnxEngine(tiny.server, threads=1)
    received = []

    def handler(frames):
        received.append(frames)
        message = decode(frames)
        if len(received) < 3:
            info = {"code": BusyError.code, "message": "full", "retry_after_ms": 1.0}
            return [encode(Message(operation=ERROR, request_id=message.request_id, info=info))]
        return [_answer(engine, message)]

    with client(tiny, "in-process", transport=InProcessTransport(handler)) as edge:
        edge.predict(tiny_images[0])
    assert len(received) == 3
    assert received[0] == received[1] == received[2]
    engine.close()


def _answer(engine, message, **changes):
    fields = {
        "operation": RESULT,
        "request_id": message.request_id,
        "bodies_id": message.bodies_id,
        "tensor": engine.run(message.tensor),
        "info": {"queue_ms": 0.0, "compute_ms": 0.0},
    }
    return encode(Message(**(fields | changes)))


@pytest.mark.parametrize("position", [0, 1, 2], ids=["first body", "second body", "third body"])
def test_a_missing_answer_fails_the_request_whichever_body_it_is(tiny, tiny_images, position):
    engine = OnnxEngine(tiny.server, threads=1)

    def handler(frames):
        message = decode(frames)
        return [_answer(engine, message, tensor=np.delete(engine.run(message.tensor), position, axis=1))]

    with client(tiny, "in-process", transport=InProcessTransport(handler)) as edge, pytest.raises(ProtocolError):
        edge.predict(tiny_images[0])
    engine.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor": None},
        {"tensor": np.zeros((1, 3, 5), np.uint8)},
        {"tensor": np.zeros((2, 3, 128), np.uint8)},
        {"bodies_id": bytes(32)},
        {"operation": STATUS, "tensor": None},
    ],
    ids=["no tensor", "wrong width", "too many rows", "other nets", "not a result"],
)
def test_an_answer_that_is_none_is_a_typed_error(tiny, tiny_images, changes):
    engine = OnnxEngine(tiny.server, threads=1)
    transport = InProcessTransport(lambda frames: [_answer(engine, decode(frames), **changes)])
    with client(tiny, "in-process", transport=transport) as edge, pytest.raises((ProtocolError, InternalError)):
        edge.predict(tiny_images[0])
    engine.close()


def test_an_answer_to_another_request_is_never_taken(tiny, tiny_images):
    engine = OnnxEngine(tiny.server, threads=1)

    def handler(frames):
        return [_answer(engine, decode(frames), request_id=os.urandom(16))]

    with (
        client(tiny, "in-process", transport=InProcessTransport(handler)) as edge,
        pytest.raises(DeadlineExceededError),
    ):
        edge.predict(tiny_images[0])
    engine.close()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_server_sends_the_client_answers_with_an_error_of_ours(tiny, tiny_images, seed):
    rng = np.random.Generator(np.random.PCG64(seed))
    engine = OnnxEngine(tiny.server, threads=1)

    def handler(frames):
        header, payload = (bytearray(frame) for frame in _answer(engine, decode(frames)))
        for _ in range(int(rng.integers(1, 6))):
            header[int(rng.integers(len(header)))] = int(rng.integers(256))
        return [[bytes(header), bytes(payload[: int(rng.integers(len(payload) + 1))])]]

    with client(tiny, "in-process", transport=InProcessTransport(handler)) as edge, pytest.raises(EnsemblerError):
        edge.predict(tiny_images[0])
    engine.close()


def test_closing_a_client_ends_the_calls_of_other_threads(tiny, in_thread, tiny_images):
    engine = SlowEngine(tiny.server)
    _, endpoint = in_thread(engine)
    with ThreadPoolExecutor(1) as pool:
        edge = client(tiny, endpoint, plaintext=True)
        waiting = pool.submit(edge.predict, tiny_images[0])
        assert engine.entered.wait(30)
        edge.close()
        with pytest.raises(ServerUnreachableError, match="closed"):
            waiting.result(30)
    with pytest.raises(ConfigError, match="closed"):
        edge.predict(tiny_images[0])


# --- the server's side of errors ---


def raw(endpoint, frames, keys_of=None):
    """Sends frames as they are, in plaintext, and returns the decoded reply."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(endpoint)
        dealer.send_multipart(frames)
        assert dealer.poll(30_000)
        return decode(dealer.recv_multipart())


def good_request(tiny, tiny_images, **changes):
    runtime = EdgeRuntime(tiny.client)
    fields = {
        "operation": INFER,
        "request_id": bytes(range(16)),
        "bodies_id": bytes.fromhex(runtime.manifest.wire.bodies_id),
        "budget_ms": 30_000.0,
        "tensor": runtime.encode(tiny_images[:1]),
    }
    return encode(Message(**(fields | changes)))


@pytest.fixture
def plain(tiny, in_thread):
    """A plaintext server in a thread; yields its endpoint."""
    return in_thread(OnnxEngine(tiny.server, threads=1))[1]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"bodies_id": bytes(32)}, UnknownBodiesError),
        ({"tensor": np.zeros((1, 2, 2), np.uint8)}, BadRequestError),
        ({"tensor": None}, BadRequestError),
        ({"operation": RESULT}, BadRequestError),
    ],
    ids=["other nets", "wrong shape", "no tensor", "not a request"],
)
def test_a_request_for_nonsense_gets_a_typed_error_and_the_server_lives_on(
    tiny, plain, tiny_images, expected, changes, error
):
    reply = raw(plain, good_request(tiny, tiny_images, **changes))
    assert (reply.operation, reply.info["code"]) == (ERROR, error.code)
    assert reply.request_id == bytes(range(16))
    with client(tiny, plain, plaintext=True) as edge:
        np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1", b""],
        [b"x" * 5000, b""],
        [b"\x80", b"payload"],
        [b"\x80", b"", b"", b"", b""],
        [b"\x93" * 1000, b""],
    ],
    ids=["one frame", "not msgpack", "long header", "empty map", "many frames", "deep nesting"],
)
def test_bytes_that_are_no_message_get_a_protocol_error_and_the_server_lives_on(
    tiny, plain, tiny_images, expected, frames
):
    reply = raw(plain, frames)
    assert reply.operation == ERROR
    assert reply.info["code"] in (101, 102)
    with client(tiny, plain, plaintext=True) as edge:
        np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])


def test_another_protocol_version_is_named_in_the_reply(tiny, plain, tiny_images):
    header, payload = good_request(tiny, tiny_images)
    other = header.replace(b"\xa1v\x01", b"\xa1v\x02")
    assert other != header
    reply = raw(plain, [other, bytes(payload)])
    assert reply.info["code"] == UnsupportedVersionError.code
    assert "version 2" in reply.info["message"]


def test_a_full_queue_answers_busy_at_once_with_a_time_to_retry(tiny, in_thread, tiny_images):
    engine = SlowEngine(tiny.server)
    _, endpoint = in_thread(engine, BatchPolicy(max_queue_rows=1))
    with client(tiny, endpoint, plaintext=True) as edge, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(edge.predict, tiny_images[0])]
        assert engine.entered.wait(30)
        futures.append(pool.submit(edge.predict, tiny_images[1]))
        _until_queued(edge, 1)
        reply = raw(endpoint, good_request(tiny, tiny_images))
        assert reply.info["code"] == BusyError.code
        assert reply.info["retry_after_ms"] > 0
        # A client retries by itself, as long as its deadline allows.
        futures.append(pool.submit(edge.predict, tiny_images[2]))
        engine.release.set()
        for future in futures:
            future.result(60)


def test_an_error_in_the_engine_is_logged_and_answered_without_its_reason(tiny, in_thread, tiny_images, caplog):
    class Broken(SlowEngine):
        def run(self, features):
            raise RuntimeError("the secret reason")

    _, endpoint = in_thread(Broken(tiny.server))
    with (
        caplog.at_level(logging.ERROR, "ensembler.server"),
        client(tiny, endpoint, plaintext=True) as edge,
        pytest.raises(InternalError) as caught,
    ):
        edge.predict(tiny_images[0])
    assert "secret reason" not in str(caught.value)
    assert "secret reason" in caplog.text


def test_sigterm_finishes_what_is_queued_refuses_what_comes_and_exits_0(tiny, serve, tiny_images, expected):
    with serve(tiny.server) as (endpoint, process), client(tiny, endpoint) as edge:
        np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_draining_server_finishes_the_work_it_has(tiny, in_thread, tiny_images, expected, monkeypatch):
    monkeypatch.setattr("ensembler.party.SHUTDOWN_RETRY_S", 3600.0)  # so that the first refusal ends the call
    engine = SlowEngine(tiny.server)
    server, endpoint = in_thread(engine)
    with client(tiny, endpoint, plaintext=True) as edge, ThreadPoolExecutor(2) as pool:
        first = pool.submit(edge.predict, tiny_images[0])
        assert engine.entered.wait(30)
        queued = pool.submit(edge.predict, tiny_images[1])
        _until_queued(edge, 1)
        server.stop()
        with pytest.raises(ShuttingDownError):
            edge.predict(tiny_images[2])
        engine.release.set()
        np.testing.assert_array_equal(first.result(60).logits, expected[0])
        np.testing.assert_array_equal(queued.result(60).logits, expected[1])


# --- wrong starts ---


def test_a_port_in_use_is_an_error_that_says_so(tiny, serve, running):
    with (
        pytest.raises(AssertionError, match="address is in use"),
        serve(tiny.server, bind=running),
    ):
        pass


@pytest.mark.parametrize(
    "endpoint", ["", "host:5555", "tcp://", "tcp://host", "http://host:1", "tcp://127.0.0.1:99999"]
)
def test_a_malformed_server_address_is_refused_when_the_client_is_made(tiny, endpoint):
    with pytest.raises(ConfigError, match="tcp://"):
        EdgeClient(tiny.client, endpoint)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_an_impossible_timeout_is_refused(tiny, running, timeout):
    with pytest.raises(ConfigError, match="timeout_ms"):
        EdgeClient(tiny.client, running, timeout_ms=timeout)


def test_a_server_bundle_is_not_a_client_bundle(tiny, running):
    with pytest.raises(EnsemblerError, match="client bundle is needed"):
        EdgeClient(tiny.server, running)
