"""The N bodies behind mosec: ``python mosec_server.py BUNDLE --port PORT --threads N --batch ROWS --wait-ms MS``.

One worker process, since its engine uses all threads, with mosec's dynamic batching; bodies of requests and replies are
raw bytes, as its documentation has it for whoever overrides ``serialize`` and ``deserialize``. No TLS: mosec leaves
that to a proxy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from mosec import Server, Worker
from options import parse

from ensembler.cloud_runtime.onnx_engine import OnnxEngine


class Bodies(Worker):
    """All N bodies; made in the worker's process, which knows its options from the environment."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.engine = OnnxEngine(Path(os.environ["PEER_BUNDLE"]), threads=int(os.environ["PEER_THREADS"]))
        self.shape = self.engine.manifest.wire.feature_shape

    def deserialize(self, data: bytes) -> np.ndarray:
        """Returns one image's codes."""
        return np.frombuffer(data, np.uint8).reshape(self.shape)

    def forward(self, data: list[np.ndarray]) -> list[np.ndarray]:
        """Computes a batch."""
        return list(self.engine.run(np.stack(data)))

    def serialize(self, data: np.ndarray) -> bytes:
        """Returns one image's N answers."""
        return data.tobytes()


if __name__ == "__main__":
    options = parse()
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", str(options.port), "--log-level", "warning"]
    server = Server()
    # mosec waits at least a millisecond; 0 would be its default of 10.
    server.append_worker(
        Bodies,
        max_batch_size=options.batch,
        max_wait_time=max(1, options.wait_ms),
        env=[{"PEER_BUNDLE": str(options.bundle.resolve()), "PEER_THREADS": str(options.threads)}],
    )
    server.run()
