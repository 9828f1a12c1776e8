"""A web application that classifies: POST /predict with an image as the body, JSON as the answer.

The server: ensembler serve out/demo/server --bind tcp://127.0.0.1:5555
This:       python examples/web_app.py out/demo/client tcp://127.0.0.1:5555
Its client: curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

It is a device: it holds the client bundle and sees the images, so it belongs to those whose images they are. Needs
pip install '.[examples]'.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from ensembler import AsyncEdgeClient
from ensembler.protocol.errors import (
    BusyError,
    DeadlineExceededError,
    ImageError,
    ServerUnreachableError,
    ShuttingDownError,
)

MAX_BODY_BYTES = 16 * 1024 * 1024
RETRY_AFTER_S = 1


def application(bundle: str, server: str, **options: Any) -> FastAPI:
    """Returns the application; ``options`` are those of ``AsyncEdgeClient``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncEdgeClient(bundle, server, **options) as client:
            app.state.client = client
            yield

    app = FastAPI(title="Ensembler", lifespan=lifespan)

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        result = await request.app.state.client.predict(await body_of(request))
        return {"label": result.label, "score": result.score, "timings_ms": asdict(result.timings)}

    # What is not in this table is ours to mend (a key, a bundle): the answer is 500, the reason is in the log.
    for kind, status in {
        ImageError: 400,
        DeadlineExceededError: 504,
        BusyError: 503,
        ServerUnreachableError: 503,
        ShuttingDownError: 503,
    }.items():
        app.add_exception_handler(kind, answer_with(status))
    return app


def answer_with(status: int) -> Any:
    """Returns what turns an error into an answer of this status."""

    async def answer(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
        headers = {}
        if status == 503:
            wait_s = error.retry_after_ms / 1000 if isinstance(error, BusyError) else RETRY_AFTER_S
            headers["Retry-After"] = str(max(RETRY_AFTER_S, math.ceil(wait_s)))
        return JSONResponse({"error": type(error).__name__, "message": str(error)}, status, headers)

    return answer


async def body_of(request: Request) -> bytes:
    """Returns the body; one that is too large is refused before all of it is in memory."""
    too_large = HTTPException(413, f"an image has at most {MAX_BODY_BYTES} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for part in request.stream():  # the length may not be said beforehand
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


def main() -> None:
    """Runs the application until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A web application that classifies images.")
    parser.add_argument("bundle")
    parser.add_argument("server")
    parser.add_argument("--port", type=int, default=8000, help="on the loopback address; 0 lets the system choose")
    parser.add_argument("--timeout-ms", type=float, default=5000.0)
    options = parser.parse_args()
    app = application(options.bundle, options.server, timeout_ms=options.timeout_ms)
    uvicorn.run(app, host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
