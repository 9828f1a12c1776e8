"""A client in a forked child: refused with one typed error, closed without effect, and the parent's goes on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# The parent leaves a client with warm connections, a stream that is under way and a thread inside a call, then forks.
# The child's status is 0 if all went as stated; faulthandler ends a child that hangs.
SCRIPT = """
import asyncio, faulthandler, gc, itertools, json, os, sys, threading, traceback
import numpy as np
from ensembler import AsyncEdgeClient, EdgeClient
from ensembler.protocol.errors import ConfigError

bundle, endpoint, how = sys.argv[1:]
images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
client = EdgeClient(bundle, endpoint, timeout_ms=60_000)
other = AsyncEdgeClient(bundle, endpoint, timeout_ms=60_000)
before = client.predict(images[0]).logits.tolist()
asyncio.run(other.predict(images[0]))
stream = client.stream(itertools.cycle(images))
next(stream)
stop = threading.Event()

def busy():
    while not stop.is_set():
        client.predict(images[1])

worker = threading.Thread(target=busy, daemon=True)
worker.start()

def refused(call):
    try:
        call()
    except ConfigError as error:
        assert "make a new client in the child" in str(error), error
        return str(error)
    raise AssertionError("no error")

def child():
    global client, other, stream
    if how == "call":
        message = refused(lambda: client.predict(images[0]))
        refused(lambda: client.predict_batch([]))
        refused(client.status)
        refused(lambda: client.stream(images))
        refused(lambda: next(stream))
        refused(lambda: asyncio.run(other.predict(images[0])))
        refused(lambda: other.stream(images))
        print(json.dumps({"error": message}), flush=True)
        client.close()
        stream.close()
        asyncio.run(other.aclose())
    if how == "forget":
        del client, other, stream
        gc.collect()
    if how == "new":
        with EdgeClient(bundle, endpoint, timeout_ms=60_000) as mine:
            assert mine.predict(images[0]).logits.tolist() == before

for _ in range(3):
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(30, exit=True)
        try:
            child()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # as multiprocessing ends its children; onnxruntime 1.29 and later hangs in any other exit of one
    status = os.waitpid(pid, 0)[1]
    assert status == 0, status
    assert client.predict(images[0]).logits.tolist() == before
    next(stream)

stop.set()
worker.join()
stream.close()
client.close()
asyncio.run(other.aclose())
print(json.dumps({"parent": "closed"}), flush=True)
"""


@pytest.fixture(scope="module")
def running(tiny, serve):
    """A server process with CURVE; yields its endpoint."""
    with serve(tiny.server) as (endpoint, _):
        yield endpoint


@pytest.mark.parametrize("how", ["call", "forget", "new"])
def test_a_forked_child_neither_hangs_nor_disturbs_its_parent(how, tiny, running):
    command = [sys.executable, "-c", SCRIPT, str(tiny.client), running, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    *children, parent = [json.loads(line) for line in done.stdout.splitlines()]
    assert parent == {"parent": "closed"}
    assert len(children) == (3 if how == "call" else 0)
