"""The client of crypto-clear inference: its session with a server, kept from one image to the next.

No torch and no weight is here: the client has the layers' names and shapes, and its own image. Start reading at
``CryptoSession.infer``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from ensembler.crypto import bundle as bundles
from ensembler.crypto.engine import CLIENT
from ensembler.crypto.process import PartyProcess
from ensembler.crypto.relay import Relay
from ensembler.protocol.errors import (
    BadRequestError,
    BusyError,
    ConfigError,
    DeadlineExceededError,
    EnsemblerError,
    ExpiredError,
    ProtocolError,
    ServerUnreachableError,
    from_wire,
)
from ensembler.protocol.messages import (
    END,
    ERROR,
    LINK,
    OPEN,
    REQUEST_ID_BYTES,
    RESULT,
    RUN,
    SHARE,
    Message,
    decode,
    encode,
)
from ensembler.transport.base import Frames
from ensembler.transport.zmq_client import ZmqConnection, ZmqTransport

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

# Of one wait; a deadline may lie beyond what a poll takes.
TICK_S = 60.0
# Messages that are read before anything else is done.
RECEIVE_BURST = 64


@dataclass(frozen=True, kw_only=True)
class CryptoAnswer:
    """What one image's inference gave, and cost.

    Attributes:
        logits: ``(K,)`` float32.
        request_id: of the request.
        setup_ms: opening the session; 0 where it was open.
        crypto_ms: the layers under two-party computation.
        clear_ms: reveal and the server's layers in the clear, with the network between.
        tail_ms: what the device computes after that: selector and tail, or the sum of two shares of the logits.
        server_clear_ms: of that, the server's own time.
        setup_bytes: that travelled to open the session, both ways.
        crypto_bytes_up: that the engines sent to the server for this image.
        crypto_bytes_down: from it.
        bytes_up: all that was sent for this image, without the session's opening.
        bytes_down: all that came.
        layers: seconds, bytes sent and bytes received of each of the parties' layers.
        cpu_s: of this device's engine.
        peak_mb: memory of this device's engine at most, so far.
    """

    logits: Floats
    request_id: str
    setup_ms: float
    crypto_ms: float
    clear_ms: float
    tail_ms: float
    server_clear_ms: float
    setup_bytes: int
    crypto_bytes_up: int
    crypto_bytes_down: int
    bytes_up: int
    bytes_down: int
    layers: tuple[tuple[float, int, int], ...]
    cpu_s: float
    peak_mb: float


class CryptoSession:
    """A session with one server; used by one thread at a time.

    Args:
        folder: the client's bundle.
        manifest: of it, loaded and verified.
        layers: how many the two parties compute.
        transport: opens the connection.
        tail: selector and tail where the bundle has them sealed; else empty.
    """

    def __init__(
        self,
        folder: Path,
        manifest: bundles.CryptoManifest,
        layers: int,
        transport: ZmqTransport,
        tail: bytes = b"",
    ) -> None:
        self._tail = tail
        self._folder, self._manifest, self._layers, self._transport = folder, manifest, layers, transport
        self._connection: ZmqConnection | None = None
        self._process: PartyProcess | None = None
        self._relay: Relay
        self._awaited = b""  # the request whose result is
        self._reply: Message | None = None
        self._abandoned = False
        self._up = self._down = 0
        self._shared = False  # whether the share of the image under way was sent
        self._told: list[tuple[float, int, int]] = []  # of its layers: seconds and bytes since the order

    def infer(self, pixels: Codes, until: float, progress: Progress | None = None) -> CryptoAnswer:
        """Answers one image.

        Args:
            pixels: ``(H, W, 3)`` uint8 of the bundle's size.
            until: on the clock of ``time.monotonic()``, in seconds.
            progress: called with the layers that are done under two-party computation, and how many there are.

        Raises:
            EnsemblerError: as ``EdgeClient.predict``; the session has ended then, and the next call opens another.
        """
        reused = self._process is not None
        try:
            return self._infer(pixels, until, progress)
        except (BadRequestError, BusyError, ServerUnreachableError):
            self.close()
            # The server may have ended a session that was idle. But no share is sent twice for one image: two of them
            # have different noise, and their mean has less.
            if not reused or self._shared:
                raise
        except BaseException:
            self.close()
            raise
        try:
            return self._infer(pixels, until, progress)
        except BaseException:
            self.close()
            raise

    def _infer(self, pixels: Codes, until: float, progress: Progress | None) -> CryptoAnswer:
        begun = time.monotonic()
        self._shared, self._told = False, []
        setup_bytes = 0
        if self._process is None or self._connection is None or not self._connection.usable():
            self.close()
            self._open(until)
            setup_bytes = self._relay.sent_bytes + self._relay.received_bytes
        opened = time.monotonic()
        process, relay = self._process, self._relay
        assert process is not None
        self._up = self._down = 0
        up, down = relay.sent_bytes, relay.received_bytes
        self._awaited = request_id = os.urandom(REQUEST_ID_BYTES)
        manifest = self._manifest
        image = (pixels.astype(np.float32) - manifest.pixel_zero_point) * np.float32(manifest.pixel_scale)
        self._send(Message(operation=RUN, request_id=request_id, budget_ms=1000 * max(0.0, until - opened)))
        process.order("run", image=np.ascontiguousarray(image.transpose(2, 0, 1)[None]).tobytes())
        done = self._answered(until, progress)
        computed = time.monotonic()
        share = np.frombuffer(done["share"], np.uint8).reshape(1, -1) if "share" in done else None
        self._shared = share is not None
        self._send(Message(operation=SHARE, request_id=request_id, tensor=share))
        reply = self._replied(until)
        size = 4 * math.prod(manifest.answer_shape)
        if reply.tensor is None or reply.tensor.size != size:
            raise ProtocolError(f"the server answered without the {size} bytes of {manifest.answer_shape} numbers")
        result = reply.tensor.tobytes()
        answered = time.monotonic()
        if manifest.mode != bundles.CLEAR:
            process.order("finish", content=result)
            result = self._answered(until, None)["result"]
        logits = np.frombuffer(result, "<f4").astype(np.float32)
        if logits.size != len(manifest.labels) or not np.isfinite(logits).all():
            raise ProtocolError(f"the server's answer does not give {len(manifest.labels)} finite logits")
        return CryptoAnswer(
            logits=logits,
            request_id=request_id.hex(),
            setup_ms=1000 * (opened - begun),
            crypto_ms=1000 * (computed - opened),
            clear_ms=1000 * (answered - computed),
            tail_ms=1000 * (time.monotonic() - answered),
            server_clear_ms=_number(reply.info.get("clear_ms")),
            setup_bytes=setup_bytes,
            crypto_bytes_up=relay.sent_bytes - up,
            crypto_bytes_down=relay.received_bytes - down,
            bytes_up=self._up,
            bytes_down=self._down,
            layers=_each(self._told),
            cpu_s=float(done["cpu_s"]),
            peak_mb=float(done["peak_mb"]),
        )

    def abandon(self) -> None:
        """Has the call that is under way in this very thread end with an error, as soon as it can."""
        self._abandoned = True

    def close(self) -> None:
        """Ends the session, whatever it does."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        self._reply = None
        if process is not None:
            process.close()
        if connection is not None:
            with suppress(EnsemblerError):  # so that the server need not find out
                connection.send(encode(Message(operation=END, request_id=bytes(REQUEST_ID_BYTES))))
            connection.close()

    def _open(self, until: float) -> None:
        self._connection = self._transport.connect()
        self._awaited = session = os.urandom(REQUEST_ID_BYTES)
        self._process = process = PartyProcess()
        assert process.link is not None
        self._relay = Relay(process.link, session)
        self._send(
            Message(
                operation=OPEN,
                request_id=session,
                bodies_id=bytes.fromhex(self._manifest.net_id),
                budget_ms=1000 * max(0.0, until - time.monotonic()),
                info={"steps": self._manifest.files[bundles.STEPS_FILE].sha256},
            )
        )
        process.order("open", folder=str(self._folder), rank=CLIENT, threads=1, tail=self._tail)
        self._answered(until, None)
        self._replied(until)

    # --- the loop ---

    def _answered(self, until: float, progress: Progress | None) -> Any:
        """Relays until this device's engine has done its order."""
        assert self._process is not None
        while True:
            while (answer := self._process.answer()) is not None:
                if "told" not in answer:
                    return answer
                done, seconds, sent, received = answer["told"]
                self._told.append((float(seconds), int(sent), int(received)))
                if progress is not None:
                    progress(int(done), self._layers)
            self._step(until)

    def _replied(self, until: float) -> Message:
        """Relays until the server has answered what is awaited."""
        while self._reply is None:
            self._step(until)
        reply, self._reply = self._reply, None
        return reply

    def _step(self, until: float) -> None:
        """Waits for anything, and relays what there is."""
        if self._abandoned:
            raise ConfigError("this EdgeClient was closed while it computed; make a new one")
        connection, process = self._connection, self._process
        assert connection is not None
        assert process is not None
        waited = [(process.fileno(), zmq.POLLIN), *self._relay.interest()]
        connection.wait(min(until, time.monotonic() + TICK_S), waited)
        for _ in range(RECEIVE_BURST):  # a server that floods does not keep this from its deadline
            message = connection.receive(self._decoded, 0.0)
            if message is None:
                break
            if message.operation == LINK:
                self._relay.take(message)
            elif message.operation == ERROR:
                raise self._error(message)
            elif message.operation == RESULT and message.request_id == self._awaited:
                self._reply = message
        # Last: that pieces were taken has to be told before the next wait, or the other side may wait for it.
        while (piece := self._relay.outgoing()) is not None:
            self._send(piece)
        if time.monotonic() >= until:
            silence = connection.silence()
            if isinstance(silence, DeadlineExceededError):
                silence = DeadlineExceededError(
                    "the two parties did not finish before the deadline; raise timeout_ms: crypto-clear inference "
                    "takes seconds an image, and more on the first"
                )
            raise silence

    def _decoded(self, frames: Frames) -> Message:
        self._down += sum(map(len, frames))
        return decode(frames)

    def _send(self, message: Message) -> None:
        assert self._connection is not None
        frames = encode(message)
        self._up += sum(map(len, frames))
        self._connection.send(frames)

    @staticmethod
    def _error(message: Message) -> EnsemblerError:
        code, text = message.info.get("code"), message.info.get("message")
        if not isinstance(code, int) or not isinstance(text, str):
            return ProtocolError("the server answered with an error that says nothing")
        error = from_wire(code, text, _number(message.info.get("retry_after_ms")))
        return DeadlineExceededError(f"{error}; raise timeout_ms") if isinstance(error, ExpiredError) else error


def _each(so_far: list[tuple[float, int, int]]) -> tuple[tuple[float, int, int], ...]:
    """Returns what each layer took, from what all took up to it."""
    before = [(0.0, 0, 0), *so_far[:-1]]
    return tuple((s - t, up - u, down - d) for (s, up, down), (t, u, d) in zip(so_far, before, strict=True))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
