"""Runs all N bodies on a batch under one budget of threads.

Ten onnxruntime sessions with a pool each steal each other's cores (measured: 8 times slower than one thread each), so
every session has one thread and the engine spreads (body, part of the batch) pieces over its own few threads. Parts are
small because an int8 body is faster per image on a few rows, whose activations stay in the cache, than on many.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ensembler.cloud_runtime.engine import Codes, usable_cores
from ensembler.protocol.codec import require_codes
from ensembler.protocol.errors import BundleError, ConfigError, MissingExtraError
from ensembler.protocol.manifest import ServerManifest, load_server

PART_ROWS = 8


class OnnxEngine:
    """The N bodies of one server bundle in onnxruntime, on the CPU.

    Args:
        bundle: the folder of a server bundle; every file is verified before it is loaded.
        threads: how many pieces run at once; None takes the machine's usable cores.
        part_rows: rows of one piece.

    Raises:
        BundleError: missing, damaged, of another version, or onnxruntime cannot load it.
        MissingExtraError: onnxruntime is not installed.
    """

    lanes = 1
    in_process = True

    def __init__(self, bundle: Path, *, threads: int | None = None, part_rows: int = PART_ROWS) -> None:
        self.manifest: ServerManifest = load_server(bundle)
        self.threads = usable_cores() if threads is None else threads
        if self.threads < 1 or part_rows < 1:
            raise ConfigError("an engine needs at least one thread and one row in a part")
        self._part_rows = part_rows
        self.sessions = [_session(bundle / name) for name in self.manifest.bodies]
        self._crew = _Crew(self.threads - 1)

    def run(self, features: Codes) -> Codes:
        """See ``Engine``."""
        wire = self.manifest.wire
        answers = np.empty((len(features), wire.num_nets, wire.answer_width), np.uint8)

        def piece(body: int, start: int) -> None:
            rows = slice(start, start + self._part_rows)
            # Every body gets every row, so time and order say nothing about a selection that is made elsewhere.
            answers[rows, body] = self.sessions[body].run(None, {"features": features[rows]})[0]

        starts = range(0, len(features), self._part_rows)
        self._crew.run(piece, [(body, start) for start in starts for body in range(wire.num_nets)])
        require_codes(answers, wire.answer_codecs[0], "a body")
        return answers

    def alive(self) -> bool:
        """See ``Engine``: it computes in this process, which is alive."""
        return True

    def describe(self) -> str:
        """See ``Engine``."""
        return f"onnxruntime on {self.threads} threads"

    def close(self) -> None:
        """Ends the engine's threads."""
        self._crew.close()


def _session(path: Path) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cloud", "serving") from error
    ort.disable_telemetry_events()  # from 1.29 on it reports to its maker, on Linux too
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own classes, which differ between versions
        raise BundleError(f"{path} cannot be loaded by onnxruntime {ort.__version__}; export it again") from error


class _Crew:
    """Threads that help the caller with a list of pieces. The caller works too, so one thread needs no hand-over."""

    def __init__(self, helpers: int) -> None:
        self._job: _Job | None = None
        self._generation = 0
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._help, name=f"engine-{i}", daemon=True) for i in range(helpers)]
        for thread in self._threads:
            thread.start()

    def run(self, work: Callable[..., None], pieces: list[tuple[int, int]]) -> None:
        """Calls ``work`` on every piece and returns when all are done; the first error is raised."""
        job = _Job(work, pieces)
        if self._threads and len(pieces) > 1:
            with self._changed:
                self._job = job
                self._generation += 1
                self._changed.notify_all()
        job.work()
        job.done.wait()
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _help(self) -> None:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._generation != seen)  # noqa: B023
                if self._closed:
                    return
                seen, job = self._generation, self._job
            if job is not None:
                job.work()


class _Job:
    """Pieces that several threads take one by one."""

    def __init__(self, work: Callable[..., None], pieces: list[tuple[int, int]]) -> None:
        self._work = work
        self._pieces = pieces
        self._next = itertools.count()  # next() is atomic in CPython
        self._left = len(pieces)
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.error: BaseException | None = None

    def work(self) -> None:
        while (index := next(self._next)) < len(self._pieces):
            try:
                if self.error is None:
                    self._work(*self._pieces[index])
            except BaseException as error:
                self.error = error
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    self.done.set()
