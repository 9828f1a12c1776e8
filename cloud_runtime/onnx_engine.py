"""Runs all N bodies on a batch under one budget of threads.

Ten onnxruntime sessions with a pool each steal each other's cores (measured: 8 times slower than one thread each), so
every session has one thread and the engine spreads (body, part of the batch) pieces over its own few threads. Parts are
small because an int8 body is faster per image on a few rows, whose activations stay in the cache, than on many.

Where onnxruntime has its CUDA provider (the package onnxruntime-gpu) the nets run there, a whole batch at once. That
path was written without a GPU at hand and has not been run.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ensembler.cloud_runtime.crew import Crew
from ensembler.cloud_runtime.engine import Codes, require_format, usable_cores
from ensembler.protocol.codec import require_codes
from ensembler.protocol.errors import BundleError, ConfigError, MissingExtraError
from ensembler.protocol.integers import sum_exactly
from ensembler.protocol.manifest import ServerManifest, load_server
from ensembler.protocol.messages import LIMITS

PART_ROWS = 16
# What a piece costs beside its rows, in rows.
PIECE_COST_ROWS = 1
CUDA = "CUDAExecutionProvider"


class OnnxEngine:
    """The N bodies of one server bundle in onnxruntime.

    Args:
        bundle: the folder of a server bundle; every file is verified before it is loaded.
        threads: how many pieces run at once; None takes the machine's usable cores.
        part_rows: rows of one piece, on the CPU.
        device: one of ``engine.DEVICES``.

    Raises:
        BundleError: missing, damaged, of another version or format, or onnxruntime cannot load it.
        ConfigError: this onnxruntime cannot compute on the device.
        MissingExtraError: onnxruntime is not installed.
    """

    lanes = 1
    in_process = True

    def __init__(
        self, bundle: Path, *, threads: int | None = None, part_rows: int = PART_ROWS, device: str = "auto"
    ) -> None:
        self.manifest: ServerManifest = load_server(bundle)
        require_format(self.manifest, "onnx", bundle)
        self.threads = usable_cores() if threads is None else threads
        if self.threads < 1 or part_rows < 1:
            raise ConfigError("an engine needs at least one thread and one row in a part")
        providers = _providers(device)
        self.sessions = [_session(bundle / name, providers) for name in self.manifest.bodies]
        self._on_cuda = CUDA in self.sessions[0].get_providers()
        self.part_rows = LIMITS.rows if self._on_cuda else part_rows
        self._crew = Crew(self.threads - 1)

    def run(self, features: Codes) -> Codes:
        """See ``Engine``."""
        wire = self.manifest.wire
        answers = np.empty((len(features), wire.num_nets, wire.answer_width), np.uint8)
        part_rows = rows_of_a_piece(len(features), wire.num_nets, self.threads, self.part_rows)

        def piece(body: int, start: int) -> None:
            rows = slice(start, start + part_rows)
            # Every body gets every row, so time and order say nothing about a selection that is made elsewhere.
            answer = self.sessions[body].run(None, {"features": features[rows]})[0]
            if answer.dtype != np.uint8 or answer.shape != answers[rows, body].shape:  # numpy would make it fit
                raise BundleError(f"a body answers with {answer.dtype} {answer.shape}, not with what its manifest says")
            answers[rows, body] = answer

        starts = range(0, len(features), part_rows)
        self._crew.run(piece, [(body, start) for start in starts for body in range(wire.num_nets)])
        require_codes(answers, wire.answer_codecs[0], "a body")
        return answers

    def alive(self) -> bool:
        """See ``Engine``: it computes in this process, which is alive."""
        return True

    def describe(self) -> str:
        """See ``Engine``."""
        return f"onnxruntime on {'CUDA' if self._on_cuda else f'{self.threads} threads'}"

    def close(self) -> None:
        """Ends the engine's threads and lets go of the nets."""
        self._crew.close()
        self.sessions = []


@lru_cache
def rows_of_a_piece(rows: int, num_nets: int, threads: int, most: int) -> int:
    """Returns how many rows of a batch one piece has, so that the threads have done all pieces soonest.

    Args:
        rows: of the batch.
        num_nets: N; a piece is of one net.
        threads: that share the pieces.
        most: no piece has more rows.
    """

    def time(parts: int) -> int:
        return -(-parts * num_nets // threads) * (-(-rows // parts) + PIECE_COST_ROWS)

    fewest = -(-rows // most)
    parts = min(range(fewest, min(rows, fewest + threads) + 1), key=time)  # of equal ones the fewest
    return -(-rows // parts)


def _onnxruntime() -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cloud", "serving") from error
    ort.disable_telemetry_events()  # see sdk/__init__.py
    return ort


def uses_cuda(device: str) -> bool:
    """Whether the nets run on a GPU: one of ``engine.DEVICES``, and what this onnxruntime finds.

    Raises:
        ConfigError: see ``OnnxEngine``.
        MissingExtraError: see ``OnnxEngine``.
    """
    return CUDA in _providers(device)


def _providers(device: str) -> list[str]:
    available = CUDA in _onnxruntime().get_available_providers()
    if device == "cuda" and not available:
        raise ConfigError(
            "--device cuda: this onnxruntime has no CUDA provider; install onnxruntime-gpu in the place of onnxruntime"
        )
    cpu = ["CPUExecutionProvider"]
    return [CUDA, *cpu] if available and device != "cpu" else cpu


def _session(path: Path, providers: list[str]) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    sum_exactly(options)
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime raises its own classes, which differ between versions
        raise BundleError(f"{path} cannot be loaded by onnxruntime {ort.__version__}; export it again") from error
