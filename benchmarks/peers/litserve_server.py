"""The N bodies behind LitServe: ``python litserve_server.py BUNDLE --port PORT --threads N --batch ROWS --wait-ms MS``.

As its documentation advises for CPUs and hundreds of requests a second: ``fast_queue`` (ZeroMQ between its processes),
batching with a ``batch_timeout``, uvloop and httptools installed, warnings alone logged. One worker, since its engine
uses all threads. Bodies of requests and replies are raw bytes.
"""

# No postponed annotations: LitServe reads the type of decode_request's argument from the function itself.

from pathlib import Path
from typing import Annotated

import litserve as ls
import numpy as np
from fastapi import Body, Response
from options import parse

from ensembler.cloud_runtime.onnx_engine import OnnxEngine


class Bodies(ls.LitAPI):
    """All N bodies."""

    bundle: Path
    threads: int

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Opens them, in the worker's process."""
        self.engine = OnnxEngine(self.bundle, threads=self.threads)
        self.shape = self.engine.manifest.wire.feature_shape

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> np.ndarray:
        """Returns one image's codes."""
        return np.frombuffer(request, np.uint8).reshape(self.shape)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Puts the images of a batch together."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Computes a batch."""
        return self.engine.run(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """Takes a batch apart."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> Response:
        """Returns one image's N answers."""
        return Response(content=output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    options = parse()
    api = Bodies(max_batch_size=options.batch, batch_timeout=options.wait_ms / 1000)
    api.bundle, api.threads = options.bundle, options.threads
    tls = {}
    if options.certificate:
        tls = {"ssl_certfile": str(options.certificate), "ssl_keyfile": str(options.certificate.with_suffix(".key"))}
    server = ls.LitServer(api, accelerator="cpu", fast_queue=not options.plain_queue)
    server.run(
        host="127.0.0.1",
        port=options.port,
        log_level="warning",
        generate_client_file=False,
        num_api_servers=1,
        access_log=False,
        **tls,
    )
