"""The N bodies behind a plain gRPC server: ``python grpc_server.py BUNDLE --port PORT --threads N --batch ROWS ...``.

gRPC's asyncio server, as its guide to performance advises for Python; a generic method that takes and returns bytes, so
no time goes into Protocol Buffers; and the simplest batching that there is: one thread computes whatever has gathered
while it computed before.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from options import parse

from ensembler.cloud_runtime.onnx_engine import OnnxEngine


class Bodies:
    """All N bodies, and the requests that wait for them."""

    def __init__(self, engine: OnnxEngine, batch: int, wait_s: float) -> None:
        self._engine, self._batch, self._wait_s = engine, batch, wait_s
        self._shape = engine.manifest.wire.feature_shape
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[bytes]]] = asyncio.Queue()
        self._pool = ThreadPoolExecutor(1)

    async def infer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:  # noqa: ARG002
        """Answers one image's codes with its N answers."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((np.frombuffer(request, np.uint8).reshape(self._shape), answer))
        return await answer

    async def compute(self) -> None:
        """Computes batch after batch."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            if self._wait_s:
                await asyncio.sleep(self._wait_s)
            while len(batch) < self._batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = np.stack([image for image, _ in batch])
            answers = await loop.run_in_executor(self._pool, self._engine.run, images)
            for (_, waiting), answer in zip(batch, answers, strict=True):
                if not waiting.done():
                    waiting.set_result(answer.tobytes())


async def main() -> None:
    """Serves until it is killed."""
    options = parse()
    bodies = Bodies(OnnxEngine(options.bundle, threads=options.threads), options.batch, options.wait_ms / 1000)
    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(bodies.infer)  # without serializers: bytes
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Bodies", {"infer": method})])
    address = f"127.0.0.1:{options.port}"
    if options.certificate:
        key = options.certificate.with_suffix(".key").read_bytes()
        pair = [(key, options.certificate.read_bytes())]
        server.add_secure_port(address, grpc.ssl_server_credentials(pair))
    else:
        server.add_insecure_port(address)
    await server.start()
    await bodies.compute()


if __name__ == "__main__":
    asyncio.run(main())
