"""One server: several models and versions, workers that die, keys that come and go; no answer is wrong or lost."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import psutil
import pytest
import zmq
from conftest import HELD_MS, SlowEngine, forged_server
from test_network import client, raw

from ensembler import EdgeClient
from ensembler.cloud_runtime.batcher import BatchPolicy
from ensembler.cloud_runtime.engine import EngineLostError, EngineOptions, load
from ensembler.cloud_runtime.models import version_of
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.cloud_runtime.server import Server
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import (
    AuthenticationError,
    BundleMismatchError,
    BusyError,
    ConfigError,
    InternalError,
    KeyFileError,
    NotAuthorizedError,
    ProtocolError,
    ShuttingDownError,
    UnknownBodiesError,
)
from ensembler.protocol.manifest import load_server
from ensembler.protocol.messages import INFER, STATUS, Message, encode
from ensembler.transport import keys
from ensembler.transport.allow_list import CallbackAllowList, FolderAllowList
from ensembler.transport.zmq_server import ServerSocket

WAIT_S = 60


def asked(bundle, codes, **changes):
    """The frames of a request for the nets of a server bundle."""
    wire = load_server(bundle).wire
    fields = {
        "operation": INFER,
        "request_id": bytes(16),
        "bodies_id": bytes.fromhex(wire.bodies_id),
        "budget_ms": 60_000.0,
        "tensor": codes,
    }
    return encode(Message(**(fields | changes)))


def _until_queued(server, rows):
    """Asks the server's loop until so many rows wait."""
    for _ in range(100_000):
        if server.describe()["queued_rows"] >= rows:
            return
    raise AssertionError(f"{rows} rows never came to wait")


@contextmanager
def held(slow, endpoint, frames):
    """A request that an engine which can be held computes until it is let go; yields what will be its answer."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(raw, endpoint, frames)
        assert slow.entered.wait(WAIT_S)
        yield waiting


# --- several models ---


def test_a_server_answers_for_each_of_its_models(tiny, other, in_thread, codes, answers):
    server, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    for index in range(3):
        assert server.deploy(OnnxEngine(other / f"server_{index}", threads=1)).result(WAIT_S) is None
    np.testing.assert_array_equal(raw(endpoint, asked(tiny.server, codes[:4])).tensor, answers[:4])
    for index in range(3):
        bundle = other / f"server_{index}"
        found = raw(endpoint, asked(bundle, codes[:4]))
        assert found.bodies_id.hex() == load_server(bundle).wire.bodies_id
        engine = OnnxEngine(bundle, threads=1)
        np.testing.assert_array_equal(found.tensor, engine.run(codes[:4]))
        engine.close()


def test_a_device_is_told_of_its_own_nets_alone(tiny, other, in_thread):
    server, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    server.deploy(OnnxEngine(other / "server_1", threads=1)).result(WAIT_S)
    for bundle in (tiny.server, other / "server_1"):
        wanted = load_server(bundle).wire.bodies_id
        status = raw(endpoint, asked(bundle, None, operation=STATUS)).info
        assert status["bodies_id"] == wanted
        assert not any(isinstance(value, list) for value in status.values())


def test_a_removed_model_is_refused_and_the_other_goes_on(tiny, other, in_thread, codes):
    server, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    bundle = other / "server_0"
    server.deploy(OnnxEngine(bundle, threads=1)).result(WAIT_S)
    assert raw(endpoint, asked(bundle, codes[:1])).tensor is not None
    bodies_id = load_server(bundle).wire.bodies_id
    server.remove(bodies_id[:12]).result(WAIT_S).unloaded.result(WAIT_S)
    assert raw(endpoint, asked(bundle, codes[:1])).info["code"] == UnknownBodiesError.code
    assert raw(endpoint, asked(tiny.server, codes[:1])).tensor is not None
    with pytest.raises(ConfigError, match="exactly one bodies_id"):
        server.remove(bodies_id).result(WAIT_S)


def test_nets_that_are_removed_and_deployed_again_stay_when_their_last_old_batch_ends(tiny, in_thread, codes):
    slow = SlowEngine(tiny.server)
    server, endpoint = in_thread(slow)
    with held(slow, endpoint, asked(tiny.server, codes[:1])) as waiting:
        old = server.remove(load_server(tiny.server).wire.bodies_id).result(WAIT_S)
        server.deploy(OnnxEngine(tiny.server, threads=1)).result(WAIT_S)
        slow.release.set()
        assert waiting.result(WAIT_S).tensor is not None
    old.unloaded.result(WAIT_S)
    assert raw(endpoint, asked(tiny.server, codes[:1])).tensor is not None


def test_a_lost_batch_of_nets_that_are_being_removed_is_computed_again_first(tiny, in_thread, codes):
    class Lost(SlowEngine):
        def run(self, features):
            first = not self.entered.is_set()
            answers = super().run(features)
            if first:
                raise EngineLostError("gone")
            return answers

    slow = Lost(tiny.server)
    server, endpoint = in_thread(slow)
    with held(slow, endpoint, asked(tiny.server, codes[:1])) as waiting:
        version = server.remove(load_server(tiny.server).wire.bodies_id).result(WAIT_S)
        slow.release.set()
        assert waiting.result(WAIT_S).tensor is not None
    version.unloaded.result(WAIT_S)
    assert server.describe()["models"] == []


def test_what_waits_for_a_model_is_answered_before_it_is_removed(tiny, other, in_thread, codes):
    slow = SlowEngine(other / "server_0")
    server, endpoint = in_thread(slow)
    server.deploy(OnnxEngine(tiny.server, threads=1)).result(WAIT_S)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(raw, endpoint, asked(other / "server_0", codes[:1]))
        assert slow.entered.wait(WAIT_S)
        second = pool.submit(raw, endpoint, asked(other / "server_0", codes[:2]))
        _until_queued(server, 2)
        version = server.remove(load_server(other / "server_0").wire.bodies_id).result(WAIT_S)
        assert raw(endpoint, asked(other / "server_0", codes[:1])).info["code"] == UnknownBodiesError.code
        assert not version.unloaded.done()
        slow.release.set()
        assert (len(first.result(WAIT_S).tensor), len(second.result(WAIT_S).tensor)) == (1, 2)
    version.unloaded.result(WAIT_S)


def test_a_server_without_models_says_so(tiny, in_thread, codes):
    server, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    server.remove(load_server(tiny.server).wire.bodies_id).result(WAIT_S)
    assert raw(endpoint, asked(tiny.server, codes[:1])).info["code"] == UnknownBodiesError.code
    assert raw(endpoint, asked(tiny.server, None, operation=STATUS)).info["code"] == UnknownBodiesError.code
    assert server.describe()["ready"] is False


def test_the_same_nets_twice_are_refused_at_the_start(tiny, float_server, in_thread):
    server, _ = in_thread(OnnxEngine(tiny.server, threads=1))
    engine = OnnxEngine(float_server, threads=1)
    with pytest.raises(ConfigError, match="ensembler deploy"):
        server.add(engine)
    engine.close()


# --- several versions ---


def test_a_version_replaces_another_under_load_and_no_request_fails(
    tiny, float_server, in_thread, tiny_images, expected
):
    """Which version answered is told by its logits, which differ between int8 and float32."""
    server, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    runtime, engine = EdgeRuntime(tiny.client), OnnxEngine(float_server, threads=1)
    float_expected = runtime.finish(engine.run(runtime.encode(tiny_images)))
    assert not np.array_equal(float_expected, expected)
    stop, found = threading.Event(), []

    def predict(number):
        with client(tiny, endpoint, plaintext=True) as edge:
            while not stop.is_set():
                found.append((number, edge.predict(tiny_images[number]).logits))

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(predict, number) for number in range(4)]
        for bundle in (float_server, tiny.server, float_server):
            seen = len(found)
            while len(found) < seen + 20:
                for call in calls:
                    if call.done():
                        call.result()
            before = server.deploy(OnnxEngine(bundle, threads=1)).result(WAIT_S)
            before.unloaded.result(WAIT_S)
        seen = len(found)
        # Of each thread, what it asked after that: the first it notes may be an answer of before.
        while min(sum(number == one for one, _ in found[seen:]) for number in range(4)) < 3:
            pass
        stop.set()
        for call in calls:
            call.result(WAIT_S)
    answered = {"int8": 0, "float32": 0}
    for number, logits in found:
        is_float = np.array_equal(logits, float_expected[number])
        assert is_float or np.array_equal(logits, expected[number])
        answered["float32" if is_float else "int8"] += 1
    assert min(answered.values()) >= 20
    for number, logits in dict(found).items():  # the last of each
        np.testing.assert_array_equal(logits, float_expected[number])
    engine.close()


def test_the_replaced_version_finishes_what_it_computes(tiny, float_server, in_thread, codes, answers):
    slow = SlowEngine(tiny.server)
    server, endpoint = in_thread(slow)
    with held(slow, endpoint, asked(tiny.server, codes[:3])) as waiting:
        before = server.deploy(OnnxEngine(float_server, threads=1)).result(WAIT_S)
        assert raw(endpoint, asked(tiny.server, codes[:2])).tensor is not None  # by the new one, at once
        assert not before.unloaded.done()
        slow.release.set()
        np.testing.assert_array_equal(waiting.result(WAIT_S).tensor, answers[:3])
    before.unloaded.result(WAIT_S)


def test_a_bundle_whose_codecs_the_clients_do_not_have_replaces_nothing(tiny, in_thread, tmp_path, codes, answers):
    server, endpoint = in_thread(OnnxEngine(tiny.server, threads=1))
    folder = shutil.copytree(tiny.server, tmp_path / "server")
    manifest = load_server(folder)
    codecs = tuple(replace(codec, scale=2 * codec.scale) for codec in manifest.wire.answer_codecs)
    forged_server(manifest, folder, wire=replace(manifest.wire, answer_codecs=codecs))
    engine = OnnxEngine(folder, threads=1)
    with pytest.raises(BundleMismatchError, match="not the same codecs"):
        server.deploy(engine).result(WAIT_S)
    engine.close()
    np.testing.assert_array_equal(raw(endpoint, asked(tiny.server, codes[:2])).tensor, answers[:2])


def test_versions_are_told_apart_by_digest(tiny, float_server):
    assert load_server(float_server).wire == load_server(tiny.server).wire
    engines = [OnnxEngine(bundle, threads=1) for bundle in (tiny.server, tiny.server, float_server)]
    one, same, another = (version_of(engine).digest for engine in engines)
    assert one == same != another
    for engine in engines:
        engine.close()


def test_a_draining_server_takes_no_new_version(tiny, float_server, in_thread, codes):
    slow = SlowEngine(tiny.server)
    server, endpoint = in_thread(slow)
    with held(slow, endpoint, asked(tiny.server, codes[:1])) as waiting:
        server.stop()
        engine = OnnxEngine(float_server, threads=1)
        with pytest.raises(ShuttingDownError):
            server.deploy(engine).result(WAIT_S)
        engine.close()
        assert server.describe()["ready"] is False
        slow.release.set()
        assert waiting.result(WAIT_S).tensor is not None


# --- what computes is lost ---


class Fragile(OnnxEngine):
    """The real engine, which is lost whenever it meets the image that kills it."""

    def __init__(self, bundle, deadly):
        super().__init__(bundle, threads=1)
        self.deadly = deadly
        self.entered, self.release = threading.Event(), threading.Event()

    in_process = False

    def run(self, features):
        self.entered.set()
        self.release.wait(WAIT_S)
        if any(np.array_equal(row, self.deadly) for row in features):
            raise EngineLostError("it is gone")
        return super().run(features)


def test_a_request_that_kills_what_computes_it_fails_alone(tiny, in_thread, codes, answers):
    engine = Fragile(tiny.server, codes[2])
    server, endpoint = in_thread(engine, BatchPolicy(batch_wait_ms=0))
    frames = [asked(tiny.server, codes[row : row + 1]) for row in range(5)]
    # The first is held by the engine, so that the others are a batch.
    with held(engine, endpoint, frames[0]) as first, ThreadPoolExecutor(4) as pool:
        calls = [first, *(pool.submit(raw, endpoint, each) for each in frames[1:])]
        _until_queued(server, 4)
        engine.release.set()
        replies = [call.result(WAIT_S) for call in calls]
    for row, reply in enumerate(replies):
        if row == 2:
            assert reply.info["code"] == InternalError.code
        else:
            np.testing.assert_array_equal(reply.tensor, answers[row : row + 1])


@pytest.fixture
def workers(tiny):
    """An engine with two worker processes."""
    engine = load(tiny.server, EngineOptions(threads=2, workers=2))
    yield engine
    engine.close()


def test_workers_answer_like_the_engine_itself(workers, codes, answers):
    assert (workers.lanes, len(workers.pids)) == (2, 2)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(workers.run, [codes] * 6):
            np.testing.assert_array_equal(found, answers)
    assert "2 workers" in workers.describe()


def test_a_killed_workers_requests_are_answered_by_another_and_a_new_one_takes_over(
    tiny, workers, in_thread, tiny_images, expected
):
    server, endpoint = in_thread(workers)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            killed = set(workers.pids)
            calls = [pool.submit(_predict_often, tiny, endpoint, tiny_images, number) for number in range(4)]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            for number, call in enumerate(calls):
                for logits in call.result(WAIT_S):
                    np.testing.assert_array_equal(logits, expected[number])
            while len(workers.pids) < 2 or killed & set(workers.pids):
                pass
    assert server.describe()["ready"] is True


def _predict_often(tiny, endpoint, images, number):
    """Internal errors (a request whose worker was killed twice) are retried, as an application would."""
    found = []
    with client(tiny, endpoint, plaintext=True) as edge:
        while len(found) < 10:
            try:
                found.append(edge.predict(images[number]).logits)
            except InternalError:
                continue
    return found


def test_a_worker_that_does_not_answer_is_replaced(tiny, codes, answers):
    from ensembler.cloud_runtime.worker_engine import WorkerEngine

    engine = WorkerEngine(tiny.server, EngineOptions(threads=1, workers=1), answer_s=2.0)
    (pid,) = engine.pids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineLostError, match="did not answer"):
        engine.run(codes)
    while engine.pids in ([], [pid]):
        pass
    np.testing.assert_array_equal(engine.run(codes), answers)
    engine.close()


def test_workers_that_die_with_nothing_to_do_are_replaced_and_cost_no_request(workers, codes, answers):
    killed = set(workers.pids)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    for pid in killed:  # until all its threads have ended; a process is shown as a zombie when the first has
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    np.testing.assert_array_equal(workers.run(codes), answers)  # by a new one: nothing was lost
    while not workers.alive() or len(workers.pids) < 2 or killed & set(workers.pids):
        pass


def test_a_worker_that_dies_between_the_look_at_it_and_its_batch_costs_no_request(workers, codes, answers, monkeypatch):
    killed = set(workers.pids)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr("ensembler.cloud_runtime.worker_engine._Worker.is_alive", lambda _: True)
    np.testing.assert_array_equal(workers.run(codes), answers)


def test_workers_do_not_outlive_their_server(tiny, serve):
    with serve(tiny.server, "--workers", "2") as (_, process):
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
        process.wait(WAIT_S)
        _, alive = psutil.wait_procs(children, timeout=WAIT_S)
        assert not alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_drains_a_server_with_workers(tiny, serve, tiny_images, expected, number):
    """systemd and a terminal's Ctrl-C send it to the workers, too."""
    with serve(tiny.server, "--workers", "1") as (endpoint, process), client(tiny, endpoint) as edge:
        np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
        for one in (process, *psutil.Process(process.pid).children(recursive=True)):
            os.kill(one.pid, number)
        assert process.wait(WAIT_S) == 0


def test_a_worker_that_cannot_load_its_bundle_says_why(tiny, tmp_path):
    folder = shutil.copytree(tiny.server, tmp_path / "server")
    manifest = load_server(folder)
    (folder / manifest.bodies[1]).write_bytes(b"not a graph")
    forged_server(manifest, folder)
    with pytest.raises(Exception, match="cannot be loaded by onnxruntime"):
        load(folder, EngineOptions(workers=1))


# --- fairness ---


def test_a_device_that_floods_does_not_keep_another_waiting(tiny, in_thread, codes):
    """What the patient device asks for is in the next batch, though hundreds of rows wait before it."""
    slow = SlowEngine(tiny.server)
    server, endpoint = in_thread(slow, BatchPolicy(max_batch_rows=4, max_batch_ms=HELD_MS, max_queue_rows=400))
    with zmq.Context() as context, context.socket(zmq.DEALER) as flood, ThreadPoolExecutor(1) as pool:
        flood.setsockopt(zmq.LINGER, 0)
        flood.connect(endpoint)
        flood.send_multipart(asked(tiny.server, codes[:1]))
        assert slow.entered.wait(WAIT_S)  # alone in its batch: all that come now are in the queue
        for _ in range(99):
            flood.send_multipart(asked(tiny.server, codes[:1]))
        _until_queued(server, 99)
        patient = pool.submit(raw, endpoint, asked(tiny.server, codes[:3]))
        _until_queued(server, 102)
        slow.release.set()
        assert len(patient.result(WAIT_S).tensor) == 3
    patients = [any(np.array_equal(row, codes[2]) for row in batch) for batch in slow.features]
    assert patients.index(True) < 5  # of more than twenty


def test_a_flood_of_refusals_is_one_line_a_second(tiny, in_thread, codes, caplog):
    clock = [0.0]
    _, endpoint = in_thread(OnnxEngine(tiny.server, threads=1), clock_ms=lambda: clock[0])
    wrong = asked(tiny.server, codes[:1], bodies_id=bytes(32))
    for _ in range(20):
        assert raw(endpoint, wrong).info["code"] == UnknownBodiesError.code
    assert raw(endpoint, [b"nonsense", b""]).info["code"] == ProtocolError.code
    clock[0] = 1500.0
    raw(endpoint, wrong)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 3
    assert "and 19 more" in lines[2]


def test_no_server_names_its_connections_like_another(tiny):
    names = []
    for _ in range(2):
        listening = ServerSocket("tcp://127.0.0.1:*", keys=None, authorized=())
        with zmq.Context() as context, context.socket(zmq.DEALER) as device:
            device.connect(listening.endpoint)
            device.send_multipart([b"", b""])
            listening.wait(1000 * WAIT_S)
            names.append(listening.receive().peer.name)
        listening.close()
    assert names[0] != names[1]


# --- keys that come and go ---


@pytest.fixture
def guarded(tiny, in_thread, tmp_path):
    """A server that watches a folder of keys; yields (the folder, the endpoint)."""
    folder = tmp_path / "authorized"
    shutil.copytree(tiny.keys / "authorized", folder)
    allowed = FolderAllowList(folder, look_every_s=0.02)
    pair = keys.load_pair(tiny.keys / "server.key_secret")
    _, endpoint = in_thread(OnnxEngine(tiny.server, threads=1), keys_pair=pair, authorized=allowed)
    yield folder, endpoint
    allowed.close()


def _predict_on_and_on(edge, image):
    for _ in range(100_000):
        edge.predict(image)


def test_a_withdrawn_key_loses_its_open_connection_and_gets_no_new_one(tiny, guarded, tiny_images):
    folder, endpoint = guarded
    with client(tiny, endpoint) as edge:
        edge.predict(tiny_images[0])
        (file,) = folder.glob("*.key")
        file.rename(folder.parent / "withdrawn.key")
        with pytest.raises(NotAuthorizedError, match="withdrawn"):
            _predict_on_and_on(edge, tiny_images[0])
    with client(tiny, endpoint) as edge, pytest.raises(AuthenticationError):
        edge.predict(tiny_images[0])


def test_a_key_that_is_added_is_let_in_without_a_restart(tiny, guarded, tiny_images, expected, tmp_path):
    folder, endpoint = guarded
    public, secret = keys.create(tmp_path / "new", "second")
    with client(tiny, endpoint, key=secret) as edge, pytest.raises(AuthenticationError):
        edge.predict(tiny_images[0], timeout_ms=5000)
    shutil.copy(public, folder / "second.key")
    for _ in range(100):
        try:
            with client(tiny, endpoint, key=secret) as edge:
                np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
            break
        except AuthenticationError:
            continue
    else:
        pytest.fail("the new key was never let in")


def test_an_answer_that_was_being_computed_does_not_reach_a_withdrawn_device(tiny, in_thread, tiny_images):
    slow, allowed = SlowEngine(tiny.server), set(keys.load_authorized(tiny.keys / "authorized"))
    pair = keys.load_pair(tiny.keys / "server.key_secret")
    _, endpoint = in_thread(slow, keys_pair=pair, authorized=allowed)
    with client(tiny, endpoint) as edge, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(edge.predict, tiny_images[0])
        assert slow.entered.wait(WAIT_S)
        allowed.clear()
        slow.release.set()
        with pytest.raises(NotAuthorizedError):
            waiting.result(WAIT_S)


def test_a_function_may_say_who_is_let_in(tiny, in_thread, tiny_images, expected):
    asked_for, answer = [], [True]

    def allowed(key):
        asked_for.append(key)
        return answer[0]

    pair = keys.load_pair(tiny.keys / "server.key_secret")
    _, endpoint = in_thread(OnnxEngine(tiny.server, threads=1), keys_pair=pair, authorized=CallbackAllowList(allowed))
    with client(tiny, endpoint) as edge:
        np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
        answer[0] = False
        with pytest.raises(NotAuthorizedError):
            edge.predict(tiny_images[0])
    assert set(asked_for) == keys.load_authorized(tiny.keys / "authorized")


def test_a_function_that_fails_lets_nobody_in():
    def broken(key):
        raise RuntimeError("no database")

    assert "x" * 40 not in CallbackAllowList(broken)


def test_a_file_that_is_no_key_stops_the_start_and_later_is_passed_over(tmp_path, caplog):
    (tmp_path / "bad.key").write_text("nonsense")
    with pytest.raises(KeyFileError, match=r"bad\.key"):
        FolderAllowList(tmp_path)
    (tmp_path / "bad.key").unlink()
    with pytest.raises(KeyFileError, match="holds no key"):
        FolderAllowList(tmp_path)
    public, _ = keys.create(tmp_path, "device")
    allowed = FolderAllowList(tmp_path, look_every_s=3600)
    key = keys.load_public(public)
    assert key in allowed
    (tmp_path / "bad.key").write_text("nonsense")
    allowed.look()
    assert key in allowed
    assert "passed over" in caplog.text
    assert len(allowed) == 1
    allowed.close()


def test_a_folder_of_keys_that_is_gone_lets_nobody_in(tmp_path, caplog):
    folder = tmp_path / "authorized"
    keys.create(folder, "device")
    allowed = FolderAllowList(folder, look_every_s=3600)
    shutil.rmtree(folder)
    allowed.look()
    assert len(allowed) == 0
    assert "no device may connect" in caplog.text
    allowed.close()


def test_a_server_has_an_old_key_and_a_new_one_while_devices_move(tiny, tmp_path, tiny_images, expected):

    _, new = keys.create(tmp_path, "new")
    allowed = keys.load_authorized(tiny.keys / "authorized")
    socket = ServerSocket("tcp://127.0.0.1:*", keys=keys.load_pair(tiny.keys / "server.key_secret"), authorized=allowed)
    second = socket.listen("tcp://127.0.0.1:*", keys.load_pair(new))
    server = Server(OnnxEngine(tiny.server, threads=1), socket)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with client(tiny, socket.endpoint) as edge:
            np.testing.assert_array_equal(edge.predict(tiny_images[0]).logits, expected[0])
        with EdgeClient(tiny.client, second, timeout_ms=5000) as edge, pytest.raises(AuthenticationError):
            edge.predict(tiny_images[0])  # it pins the old key
    finally:
        server.stop()
        thread.join(WAIT_S)
        socket.close()


# --- a full queue ---


def test_what_comes_while_the_queue_is_full_is_refused_while_others_compute(tiny, in_thread, codes):
    slow = SlowEngine(tiny.server)
    server, endpoint = in_thread(slow, BatchPolicy(max_queue_rows=1), inline_ms=0.0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(raw, endpoint, asked(tiny.server, codes[:1]))
        assert slow.entered.wait(WAIT_S)
        second = pool.submit(raw, endpoint, asked(tiny.server, codes[:1]))
        _until_queued(server, 1)
        for _ in range(20):
            assert raw(endpoint, asked(tiny.server, codes[:1])).info["code"] == BusyError.code
        slow.release.set()
        assert first.result(WAIT_S).tensor is not None
        assert second.result(WAIT_S).tensor is not None
