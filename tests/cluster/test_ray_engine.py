"""The Ray engine on two real nodes: right answers, machines and actors that die, and nothing strange let in."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from ensembler import EdgeClient, EnsemblerError
from ensembler.cloud_runtime import ray_cluster, ray_engine
from ensembler.cloud_runtime.engine import EngineLostError, EngineOptions, load
from ensembler.cloud_runtime.ray_engine import Group
from ensembler.cloud_runtime.server import Server
from ensembler.protocol.errors import BadRequestError, BundleTamperedError, ConfigError
from ensembler.protocol.manifest import MANIFEST_NAME, load_server
from ensembler.transport.zmq_server import ServerSocket

DEADLINE_S = 120
CLIENTS = 4

ray = pytest.importorskip("ray", reason="make test-ray runs it")
# The actors cannot import a test.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@contextmanager
def opened(tiny, nodes, **options):
    engine = load(tiny.server, EngineOptions(kind="ray", address=nodes.address, **options))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def engine(tiny, nodes):
    with opened(tiny, nodes) as made:
        yield made


def inside(copy, question):
    """Returns what ``question`` finds in an actor's own process."""
    return ray.get(copy.actor.__ray_call__.remote(question), timeout=DEADLINE_S)


def node_of(_):
    return ray.get_runtime_context().get_node_id()


def process_of(_):
    return os.getpid()


def until(engine, codes, holds):
    """Keeps the engine at work until something holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        engine.run(codes)


# --- placement and answers ---


def test_the_nets_are_on_both_nodes_and_answer_as_on_one_machine(engine, codes, answers):
    assert sorted(engine.places().values()) == [[0], [1]]
    assert [inside(copy, node_of) for copy in engine._copies] == [copy.node for copy in engine._copies]
    for rows in (1, 7, 21):
        np.testing.assert_array_equal(engine.run(codes[:rows]), answers[:rows])
    assert engine.alive()
    assert engine.describe() == "Ray with 2 actors for 2 groups of nets on 2 machines"


def test_a_batch_too_large_to_travel_in_a_call_is_answered_alike(engine, codes, answers):
    times = ray_engine.INLINE_BYTES // codes.nbytes + 1
    found = engine.run(np.tile(codes, (times, 1, 1, 1)))
    np.testing.assert_array_equal(found, np.tile(answers, (times, 1, 1)))


def test_copies_of_a_group_are_on_different_nodes(tiny, nodes, codes, answers):
    with opened(tiny, nodes, replicas=2) as engine:
        assert list(engine.places().values()) == [[0, 1], [0, 1]]
        np.testing.assert_array_equal(engine.run(codes), answers)


# --- what dies ---


def test_a_killed_actor_is_replaced_and_the_nets_are_spread_again(engine, codes, answers, record_property, monkeypatch):
    monkeypatch.setattr(ray_engine, "REST_S", 2.0)
    (first, *_) = engine._copies
    killed = time.monotonic()
    os.kill(inside(first, process_of), signal.SIGKILL)
    until(engine, codes, lambda: first.is_lost)
    np.testing.assert_array_equal(engine.run(codes), answers)
    record_property("recovery_s", time.monotonic() - killed)
    assert engine.alive()
    until(engine, codes, lambda: sorted(engine.places().values()) == [[0], [1]])
    np.testing.assert_array_equal(engine.run(codes), answers)


def test_a_batch_does_not_wait_for_ever_for_nets_that_do_not_come_back(engine, codes, monkeypatch):
    monkeypatch.setattr(ray_engine, "RUN_S", 0.5)
    monkeypatch.setattr(engine, "_living", dict)  # every machine has left
    deadline = time.monotonic() + DEADLINE_S
    while engine.alive():
        assert time.monotonic() < deadline
    with pytest.raises(EngineLostError, match="no machine computes some of the nets"):
        engine.run(codes)
    assert not engine.alive()


def test_a_machine_that_falls_silent_costs_no_answer_where_there_is_a_copy(tiny, nodes, codes, answers, monkeypatch):
    monkeypatch.setattr(ray_engine, "PING_S", 2.0)
    with opened(tiny, nodes, replicas=2) as engine:
        silent = next(copy for copy in engine._copies if copy.node != engine._copies[0].node)
        process = inside(silent, process_of)
        os.kill(process, signal.SIGSTOP)  # as without power: nothing is refused, nothing is answered
        try:
            until(engine, codes, lambda: silent.is_lost)
            np.testing.assert_array_equal(engine.run(codes), answers)
        finally:
            os.kill(process, signal.SIGKILL)


class Load:
    """Devices that ask without a pause, each answer compared."""

    def __init__(self, tiny, endpoint, images, expected):
        self.right, self.wrong, self.failures, self.last_start = 0, 0, [], 0.0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(tiny, endpoint, images, expected)) for _ in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, tiny, endpoint, images, expected):
        with EdgeClient(tiny.client, endpoint, timeout_ms=30_000, plaintext=True) as edge:
            index = 0
            while not self._stop.is_set():
                index = (index + 1) % len(images)
                started = time.monotonic()
                try:
                    right = np.array_equal(edge.predict(images[index]).logits, expected[index])
                except Exception as error:
                    with self._changed:
                        self.failures.append(error)
                        self._changed.notify_all()
                    continue
                with self._changed:
                    self.right += right
                    self.wrong += not right
                    self.last_start = max(self.last_start, started) if right else self.last_start
                    self._changed.notify_all()

    def wait(self, holds):
        with self._changed:
            assert self._changed.wait_for(holds, DEADLINE_S)

    def end(self):
        """Stops the devices; how many hang."""
        self._stop.set()
        deadline = time.monotonic() + DEADLINE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_node_killed_under_load_costs_no_wrong_answer_and_no_hang(
    tiny, nodes, tiny_images, expected, codes, replicas, record_property, capfd
):
    capfd.readouterr()
    with opened(tiny, nodes, replicas=replicas) as engine:
        listening = ServerSocket("tcp://127.0.0.1:*", keys=None, authorized=frozenset())
        server = Server(engine, listening)
        serving = threading.Thread(target=server.run)
        serving.start()
        load = Load(tiny, listening.endpoint, tiny_images, expected)
        try:
            load.wait(lambda: load.right > 20)
            nodes.kill_other()
            killed = time.monotonic()
            load.wait(lambda: load.last_start > killed)
            record_property("recovery_s", load.last_start - killed)
            nodes.complete()  # the machine is back, and gets its share
            until(engine, codes, lambda: sorted(map(len, engine.places().values())) == [replicas] * 2)
            back = time.monotonic()
            load.wait(lambda: load.last_start > back)
        finally:
            hung = load.end()
            server.stop()
            serving.join(DEADLINE_S)
            listening.close()
    assert (load.wrong, hung) == (0, 0)
    assert capfd.readouterr().out == ""  # which is the server's; Ray prints there by itself
    assert not serving.is_alive()
    assert all(isinstance(failure, EnsemblerError) for failure in load.failures)
    if replicas == 2:
        assert load.failures == []


# --- what is refused ---


STRANGE = {
    "floats": lambda codes: codes.astype(np.float32),
    "objects": lambda codes: codes.astype(object),
    "another shape": lambda codes: codes[:, :, :1],
    "no axis of rows": lambda codes: codes[0],
    "a subclass": lambda codes: codes.view(np.recarray),
    "a list": lambda codes: codes.tolist(),
}


def test_what_are_no_codes_of_the_bundle_is_refused_before_it_reaches_ray(engine, codes, monkeypatch):
    def sent(*_):
        raise AssertionError("it was sent")

    monkeypatch.setattr(engine, "_take", sent)
    for made in STRANGE.values():
        with pytest.raises(BadRequestError, match="takes uint8 codes of shape"):
            engine.run(made(codes))


def test_a_machine_verifies_the_files_it_is_sent(tiny):
    manifest = load_server(tiny.server)
    files = {name: (tiny.server / name).read_bytes() for name in (MANIFEST_NAME, *manifest.bodies)}
    name = manifest.bodies[1]
    with pytest.raises(BundleTamperedError, match=name):
        Group().open(files | {name: files[name][:-1] + b"\x00"}, 1)


@pytest.mark.parametrize("address", ["host", "host:port", "ray://host:10001", "host:6379;rm", "höst:6379", ""])
def test_what_is_no_address_is_refused(tiny, address):
    with pytest.raises(ConfigError, match="give HOST:PORT of Ray's head, or auto"):
        load(tiny.server, EngineOptions(kind="ray", address=address))


def test_an_address_where_nothing_listens_is_refused(tiny):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"{address}: nothing listens there.*ray start --head"):
        load(tiny.server, EngineOptions(kind="ray", address=address))


def test_an_address_where_something_else_listens_is_refused_in_time(tiny, monkeypatch):
    monkeypatch.setattr(ray_cluster, "JOIN_S", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}: no Ray answered within 5 s"):
            load(tiny.server, EngineOptions(kind="ray", address=address))


def test_a_process_is_connected_to_one_cluster_at_a_time(tiny, engine):
    with pytest.raises(ConfigError, match="it cannot be to elsewhere:6379 as well"):
        load(tiny.server, EngineOptions(kind="ray", address="elsewhere:6379"))
