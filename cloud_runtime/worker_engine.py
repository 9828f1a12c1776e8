"""Runs an engine in processes of its own, so that one that dies takes a batch with it and not the server.

A worker loads the bundle by itself and computes one batch at a time; batches cross a pipe. A worker that ends, is
killed or does not answer is replaced, and its batch is reported lost.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import queue
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ensembler.cloud_runtime.engine import Codes, EngineLostError, EngineOptions, load, usable_cores
from ensembler.protocol.errors import BundleError
from ensembler.protocol.manifest import ServerManifest, load_server

log = logging.getLogger("ensembler.server")

# A worker that computes longer is taken for stuck.
ANSWER_S = 60.0
# Loading and warming up, on a busy machine.
START_S = 120.0
# Between two tries to replace a worker that does not come up.
AGAIN_S = 1.0
END_S = 5.0

READY = b"ready"


class WorkerEngine:
    """Several processes with an engine each.

    Args:
        bundle: the folder of a server bundle; it must stay where it is while workers may have to be replaced.
        options: of each worker's engine; its threads are shared out among the workers.
        answer_s: after which a worker is taken for stuck.

    Raises:
        BundleError: missing or damaged, or a worker could not load it.
    """

    in_process = False

    def __init__(self, bundle: Path, options: EngineOptions, *, answer_s: float = ANSWER_S) -> None:
        self.manifest: ServerManifest = load_server(bundle)
        self.lanes = options.workers
        self._bundle = bundle
        self._answer_s = answer_s
        threads = max(1, (options.threads or usable_cores()) // options.workers)
        self._options = replace(options, workers=0, threads=threads)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._alive: set[_Worker] = set()
        self._busy: set[_Worker] = set()  # each belongs to the thread that took it
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._replacers: set[threading.Thread] = set()
        try:
            for worker in [_Worker(bundle, self._options) for _ in range(options.workers)]:
                self._alive.add(worker)
            for worker in self._alive:
                worker.wait_until_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Returns the process ids of the workers that are alive."""
        with self._lock:
            return [worker.pid for worker in self._alive]

    def run(self, features: Codes) -> Codes:
        """See ``Engine``.

        Raises:
            EngineLostError: the worker ended or did not answer; another one takes its place.
            BundleError: the worker's engine failed on this batch.
        """
        worker = self._take(features.shape)
        try:
            answers = worker.compute(features, self._answer_s)
        except (EOFError, OSError) as error:
            self._bury(worker)
            raise EngineLostError(f"the worker process {worker.pid} ended or did not answer") from error
        except BaseException:
            self._give_back(worker)
            raise
        self._give_back(worker)
        wire = self.manifest.wire
        if answers.shape != (len(features), wire.num_nets, wire.answer_width):
            raise BundleError(f"a worker answered with shape {answers.shape}")
        return answers

    def alive(self) -> bool:
        """See ``Engine``: at least one worker is there. Replaces those that ended while they had nothing to do."""
        with self._lock:
            ended = [worker for worker in self._alive - self._busy if not worker.is_alive()]
        for worker in ended:
            self._bury(worker)
        with self._lock:
            return any(worker.is_alive() for worker in self._alive)

    def describe(self) -> str:
        """See ``Engine``."""
        return f"{self.lanes} workers with {self._options.threads} threads each"

    def close(self) -> None:
        """Ends the workers."""
        self._closing.set()
        for thread in list(self._replacers):
            thread.join()
        with self._lock:
            workers, self._alive = self._alive, set()
        for worker in workers:
            worker.end()

    def _take(self, shape: tuple[int, ...]) -> _Worker:
        """Returns a worker that knows of the batch: one that ended while it had nothing to do is no batch's fault."""
        until = time.monotonic() + self._answer_s
        while True:
            try:
                worker = self._idle.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise EngineLostError("no worker is alive") from None
            with self._lock:
                self._busy.add(worker)
            if worker.is_alive() and worker.announce(shape):
                return worker
            self._bury(worker)

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
        self._idle.put(worker)

    def _bury(self, worker: _Worker) -> None:
        """Ends a worker for good and starts another in its place, once."""
        with self._lock:
            self._busy.discard(worker)
            if worker not in self._alive:
                return
            self._alive.discard(worker)
        worker.end()
        self._replace_later()

    def _replace_later(self) -> None:
        thread = threading.Thread(target=self._replace, name="replace-worker", daemon=True)
        self._replacers.add(thread)
        thread.start()

    def _replace(self) -> None:
        while not self._closing.is_set():
            worker = _Worker(self._bundle, self._options)
            try:
                worker.wait_until_ready()
            except Exception as error:
                worker.end()
                log.error("a worker could not be replaced, trying again: %s", error)
                self._closing.wait(AGAIN_S)
                continue
            with self._lock:
                self._alive.add(worker)
            log.info("the worker process %d takes over", worker.pid)
            self._idle.put(worker)
            break
        self._replacers.discard(threading.current_thread())


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, bundle: Path, options: EngineOptions) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy onnxruntime's state without its threads
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, bundle, options), name="worker", daemon=True)
        self._process.start()
        there.close()
        self.pid = int(self._process.pid or 0)
        # At exit multiprocessing waits for its children, and this one waits for the end of its pipe.
        atexit.register(self.end)

    def wait_until_ready(self) -> None:
        try:
            said = self._receive(START_S)
        except (EOFError, OSError) as error:
            raise BundleError(f"a worker process did not come up (exit code {self._process.exitcode})") from error
        if said != READY:
            raise BundleError(said.decode("utf-8", "replace"))

    def announce(self, shape: tuple[int, ...]) -> bool:
        """Tells the shape of the batch to come, or returns False: the process has ended, known as such or not yet."""
        try:
            self._pipe.send_bytes(np.asarray(shape, np.int64).tobytes())
        except OSError:
            return False
        return True

    def compute(self, features: Codes, timeout_s: float) -> Codes:
        """Sends the batch that was announced and returns its answers."""
        self._pipe.send_bytes(np.ascontiguousarray(features).reshape(-1).data)
        shape = tuple(np.frombuffer(self._receive(timeout_s), np.int64))
        data = self._receive(timeout_s)
        if not shape:
            raise BundleError(data.decode("utf-8", "replace"))
        return np.frombuffer(data, np.uint8).reshape(shape)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        atexit.unregister(self.end)
        with contextlib.suppress(OSError):
            self._pipe.close()  # tells it to end
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, timeout_s: float) -> bytes:
        if not self._pipe.poll(timeout_s):
            self._process.kill()
            raise TimeoutError("no answer")
        return self._pipe.recv_bytes()


def _serve(pipe: Connection, bundle: Path, options: EngineOptions) -> None:
    """The worker's main function; it ends with the pipe, so it does not outlive the server."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which will drain
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = load(bundle, options)
    except Exception as error:
        pipe.send_bytes(str(error).encode())
        return
    pipe.send_bytes(READY)
    with contextlib.suppress(EOFError, OSError):
        while True:
            shape = tuple(np.frombuffer(pipe.recv_bytes(), np.int64))
            features = np.frombuffer(pipe.recv_bytes(), np.uint8).reshape(shape)
            try:
                answers = engine.run(features)
            except Exception as error:
                pipe.send_bytes(b"")
                pipe.send_bytes((str(error) or type(error).__name__).encode())
                continue
            pipe.send_bytes(np.asarray(answers.shape, np.int64).tobytes())
            pipe.send_bytes(np.ascontiguousarray(answers).reshape(-1).data)
