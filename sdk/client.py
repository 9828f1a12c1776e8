"""The client: one call per image, and a right answer or one typed error before the deadline."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.edge_runtime.images import ImageLike, several, to_pixels
from ensembler.edge_runtime.runtime import EdgeRuntime, softmax
from ensembler.fallback import Fallback, answer_locally, cloud_is_away
from ensembler.info import ClientInfo, describe, payload_bytes
from ensembler.prediction import Prediction, Timings
from ensembler.process import OwnProcess
from ensembler.protocol.errors import (
    BusyError,
    ConfigError,
    DeadlineExceededError,
    EnsemblerError,
    ExpiredError,
    InternalError,
    KeyFileError,
    ProtocolError,
    ShuttingDownError,
    from_wire,
)
from ensembler.protocol.manifest import WireSpec
from ensembler.protocol.messages import (
    ERROR,
    INFER,
    LIMITS,
    REQUEST_ID_BYTES,
    RESULT,
    STATUS,
    Message,
    decode,
    encode,
)
from ensembler.streaming import answers, checked_in_flight
from ensembler.transport import keys as key_files
from ensembler.transport.base import Connection, Frames, Transport
from ensembler.transport.zmq_client import ZmqTransport

Codes = npt.NDArray[np.uint8]

KEY_VARIABLE = "ENSEMBLER_DEVICE_KEY"
KEY_NAME = "device.key_secret"
# One request of a long batch; the server batches further by itself.

MAX_REQUEST_ROWS = 128
SHUTDOWN_RETRY_MS = 100.0
MIN_RETRY_MS = 1.0


class EdgeClient:
    """Predicts images with a head and tail on this device and N nets on a server.

    Thread-safe: calls from several threads run side by side, each on its own connection.

    Belongs to the process that made it. In a forked child every call raises ``ConfigError``, ``close`` does nothing,
    and the parent's client goes on working; make a new client in the child.

    Args:
        bundle: the folder of a client bundle.
        server: ``tcp://host:port``.
        key: the device's secret key file. None looks at ``$ENSEMBLER_DEVICE_KEY``,
            ``BUNDLE/../keys/device.key_secret``, ``~/.config/ensembler/device.key_secret``,
            ``/etc/ensembler/device.key_secret``, in this order.
        plaintext: connect without encryption and authentication. Never the default, also when the bundle pins no key.
        timeout_ms: the deadline of a call that gives none itself.
        threads: of one run of head or tail.
        backend: a name of ``ensembler.edge_runtime.backends.BACKENDS``.
        top_k: how many classes ``Prediction.top_k`` holds.
        fallback: called with ``(image, error)`` when the cloud is away (``fallback.cloud_is_away``: no connection, no
            answer before the deadline, a full or a stopping server); its ``Prediction`` is the answer. See
            ``Prediction.local``. It may be called from several threads. None raises the error.
        transport: moves the frames instead of ZeroMQ; for tests.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        KeyFileError: no device key was found, or it is not one.
        ConfigError: an impossible option.
        MissingExtraError: no inference runtime is installed.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        server: str,
        *,
        key: str | os.PathLike[str] | None = None,
        plaintext: bool = False,
        timeout_ms: float = 5000.0,
        threads: int = 1,
        backend: str = "onnxruntime",
        top_k: int = 5,
        fallback: Fallback | None = None,
        transport: Transport | None = None,
    ) -> None:
        if fallback is not None and not callable(fallback):
            raise ConfigError(f"fallback is {type(fallback).__name__}; give a function of an image and an error")
        if top_k < 1:
            raise ConfigError(f"top_k = {top_k}: at least 1")
        self._process = OwnProcess()
        self._timeout_ms = checked_timeout(timeout_ms)
        folder = Path(bundle).expanduser()
        self._runtime = EdgeRuntime(folder, threads=threads, backend=backend)
        self._manifest = self._runtime.manifest
        self._bodies_id = bytes.fromhex(self._manifest.wire.bodies_id)
        self._request_rows = _rows_per_request(self._manifest.wire)
        self._top_k = min(top_k, len(self._manifest.labels))
        self._server = server
        self._describe = partial(
            describe,
            folder,
            self._manifest,
            backend=backend,
            servers=(server,),
            encrypted=transport is None and not plaintext,
        )
        self._fallback = fallback
        self._transport = transport or self._open_transport(folder, server, key, plaintext=plaintext)
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def _open_transport(
        self, folder: Path, server: str, key: str | os.PathLike[str] | None, *, plaintext: bool
    ) -> Transport:
        if plaintext:
            return ZmqTransport(server, server_key=None, keys=None)
        pinned = self._manifest.server_public_key
        if pinned is None:
            raise ConfigError(
                f"the bundle {folder} pins no server key, so the server cannot be known; export with --server-key, or "
                "pass plaintext=True (--plaintext) if nobody else can reach the network"
            )
        places = [folder.resolve().parent / "keys" / KEY_NAME, *key_files.standard_places(KEY_NAME)]
        path = key_files.find(key, KEY_VARIABLE, places)
        if path is None:
            raise KeyFileError(
                f"no device key: pass key=, set {KEY_VARIABLE}, or put {KEY_NAME} into {places[1].parent}; "
                "ensembler keys new makes a pair"
            )
        return ZmqTransport(server, server_key=pinned, keys=key_files.load_pair(path))

    # --- the public calls ---

    def predict(self, image: ImageLike, *, timeout_ms: float | None = None) -> Prediction:
        """Classifies one image.

        Args:
            image: a path, encoded bytes, a PIL image, or an array: ``(H, W, 3)`` RGB, ``(H, W, 4)`` RGBA, ``(H, W)`` or
                ``(H, W, 1)`` grey, uint8 or uint16.
            timeout_ms: this call's deadline in milliseconds, instead of the client's.

        Raises:
            ImageError: the image cannot be used.
            TransportError: no answer in time; see its subclasses.
            ServerError: the server refused.
            ProtocolError: the server answered with something that is not an answer.
        """
        return self.predict_batch([image], timeout_ms=timeout_ms)[0]

    def predict_batch(self, images: Sequence[ImageLike], *, timeout_ms: float | None = None) -> list[Prediction]:
        """Classifies several images, in order; arguments and errors as ``predict``, the deadline is for all of them.

        Either every image gets its answer or the call raises. With a ``fallback``: once the cloud is away, it answers
        the rest of the images.
        """
        begun = started = time.monotonic()
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        deadline = started + timeout / 1000
        given = list(several(images))
        pixels = [to_pixels(image, self._manifest.image) for image in given]
        predictions: list[Prediction] = []
        for start in range(0, len(pixels), self._request_rows):
            part = np.stack(pixels[start : start + self._request_rows])
            try:
                predictions += self._predict_part(part, started, deadline)
            except EnsemblerError as error:
                # A client that is closed has no server either, but nobody wants its answers any more.
                if self._fallback is None or self._closed.is_set() or not cloud_is_away(error):
                    raise
                fallback = self._fallback
                return predictions + [answer_locally(fallback, image, error, begun) for image in given[start:]]
            started = time.monotonic()
        return predictions

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        in_flight: int = 4,
        newest: bool = False,
        timeout_ms: float | None = None,
    ) -> Generator[tuple[int, Prediction], None, None]:
        """Classifies the images of an iterable, several at once, and yields ``(index, prediction)`` in their order.

        ``images`` is read in a thread of its own, never more than ``in_flight`` images ahead of what was taken from
        here. The first error of an image or of ``images`` itself is raised at its place in the order and ends the
        generator. However it ends (also by ``break`` or ``close()``), it first waits for the calls in flight, by their
        deadline at the latest, and leaves no thread behind. The one exception: ``images`` that block cannot be
        interrupted; after a second their thread is left, which does not keep the program alive.

        Args:
            images: any iterable of what ``predict`` takes; may be endless.
            in_flight: how many images may be on their way, or answered and not yet taken.
            newest: for cameras. ``images`` is read all the time, and an image that cannot start at once is replaced by
                the next, so what starts is always the newest; the index, its position in ``images``, then skips. With
                ``in_flight=1`` an answer waits for nobody but you.
            timeout_ms: the deadline of each image, from when it starts.

        Raises:
            ConfigError: an impossible option, at once; otherwise errors as ``predict``, from the generator.
            ImageError: one image was given instead of several, at once.
        """
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        return answers(
            lambda image: self.predict(image, timeout_ms=timeout),
            several(images),
            in_flight=checked_in_flight(in_flight),
            newest=newest,
        )

    def status(self, *, timeout_ms: float | None = None) -> dict[str, Any]:
        """Asks the server which nets it holds and whether it is ready; errors as ``predict``.

        Returns:
            ``bodies_id``, ``num_nets``, ``precision``, ``state``, ``queued_rows``, and ``fits``: whether the nets are
            those of this bundle.
        """
        self._process.require()
        timeout = self._timeout_ms if timeout_ms is None else checked_timeout(timeout_ms)
        request = Message(operation=STATUS, request_id=os.urandom(REQUEST_ID_BYTES))
        reply = self._exchange(request, time.monotonic() + timeout / 1000)
        return {
            **reply.message.info,
            "fits": reply.message.info.get("bodies_id") == self._manifest.wire.bodies_id,
        }

    def info(self) -> ClientInfo:
        """Says what this client is, without asking the server; nothing in it is secret.

        Raises:
            BundleError: the bundle's privacy card cannot be read.
        """
        return self._describe()

    @property
    def timeout_ms(self) -> float:
        """The deadline of a call that gives none itself, in milliseconds."""
        return self._timeout_ms

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, index = class."""
        return self._manifest.labels

    def close(self) -> None:
        """Closes all connections; calls in other threads end with an error. Further calls raise.

        Does nothing in a forked child: the connections are the parent's.
        """
        if not self._process.here:
            return
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._transport.close()

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EdgeClient(server={self._server!r}, bodies_id={self._manifest.wire.bodies_id[:12]!r})"

    # --- one request ---

    def _predict_part(self, pixels: Codes, started: float, deadline: float) -> list[Prediction]:
        codes = self._runtime.encode(pixels)
        sent = time.monotonic()
        request = Message(
            operation=INFER,
            request_id=os.urandom(REQUEST_ID_BYTES),
            bodies_id=self._bodies_id,
            budget_ms=max(0.0, 1000 * (deadline - sent)),
            tensor=codes,
            bits=self._manifest.wire.feature_codec.bits,
        )
        reply = self._exchange(request, deadline)
        received = time.monotonic()
        answers = self._validated(reply.message, len(pixels))
        logits = self._runtime.finish(answers)
        probabilities = softmax(logits)
        ended = time.monotonic()
        queue_ms, server_ms = (_number(reply.message.info.get(name)) for name in ("queue_ms", "compute_ms"))
        timings = Timings(
            head=1000 * (sent - started),
            queue=queue_ms,
            server=server_ms,
            network=max(0.0, 1000 * (received - sent) - queue_ms - server_ms),
            tail=1000 * (ended - received),
            total=1000 * (ended - started),
        )
        return [
            self._prediction(logits[i], probabilities[i], request.request_id.hex(), timings, reply)
            for i in range(len(pixels))
        ]

    def _validated(self, message: Message, rows: int) -> Codes:
        """Checks all N answers alike, before any of them is selected.

        A server that spoils one body's answer must not learn from the client's behaviour whether that body counts.
        """
        wire = self._manifest.wire
        expected = (rows, wire.num_nets, wire.answer_width)
        if message.tensor is None or message.tensor.shape != expected or message.bits != wire.answer_bits:
            shape = None if message.tensor is None else message.tensor.shape
            raise ProtocolError(
                f"the server answered with shape {shape} in {message.bits} bits, {expected} in {wire.answer_bits} "
                "was asked for; is it the right server?"
            )
        if message.bodies_id != self._bodies_id:
            raise ProtocolError("the server answered for other nets than were asked for")
        return message.tensor

    def _prediction(
        self,
        logits: npt.NDArray[np.float32],
        probabilities: npt.NDArray[np.float32],
        request_id: str,
        timings: Timings,
        reply: _Reply,
    ) -> Prediction:
        best = np.argsort(-probabilities, kind="stable")[: self._top_k]
        top = tuple((self._manifest.labels[i], float(probabilities[i])) for i in best)
        return Prediction(
            label=top[0][0],
            score=top[0][1],
            top_k=top,
            probabilities=probabilities,
            logits=logits,
            request_id=request_id,
            timings=timings,
            bytes_up=reply.bytes_up,
            bytes_down=reply.bytes_down,
        )

    def _exchange(self, request: Message, deadline: float) -> _Reply:
        """Sends a request until it is answered; every retry sends the same bytes.

        Encoding again would add new noise to the same image, which a server could average away.
        """
        frames = encode(request)

        def accept(reply: Frames) -> _Reply | None:
            message = decode(reply)
            if message.request_id != request.request_id:
                return None  # a late answer to an earlier request of this connection
            return _Reply(message, sum(map(len, frames)), sum(map(len, reply)))

        while True:
            connection = self._borrow()
            try:
                reply = connection.exchange(frames, accept, deadline)
            except BaseException:
                # Whatever it was, an answer may still come on this line: no later request shall meet it.
                connection.close()
                raise
            self._give_back(connection)
            if reply.message.operation == RESULT:
                return reply
            error = _error_of(reply.message)
            if isinstance(error, BusyError):
                self._pause(error.retry_after_ms, deadline, error)
            elif isinstance(error, ShuttingDownError):
                self._pause(SHUTDOWN_RETRY_MS, deadline, error)
            elif isinstance(error, ExpiredError):
                raise DeadlineExceededError(
                    f"{self._server}: {error}; raise timeout_ms, or look at the server's load"
                ) from None
            else:
                raise error

    def _pause(self, wait_ms: float, deadline: float, error: EnsemblerError) -> None:
        """Waits before a retry; raises ``error`` when that would be too late."""
        wait_s = max(MIN_RETRY_MS, wait_ms) / 1000  # a server cannot make the device spin
        if time.monotonic() + wait_s >= deadline:
            raise error
        self._closed.wait(wait_s)

    def _borrow(self) -> Connection:
        with self._lock:
            if self._closed.is_set():
                raise ConfigError("this EdgeClient is closed; make a new one")
            if self._idle:
                return self._idle.pop()
        return self._transport.connect()

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed.is_set():
                self._idle.append(connection)
                return
        connection.close()


@dataclass(frozen=True)
class _Reply:
    message: Message
    bytes_up: int
    bytes_down: int


def _rows_per_request(wire: WireSpec) -> int:
    """Returns how many images fit into one request and its reply."""
    return max(1, min(MAX_REQUEST_ROWS, LIMITS.tensor_bytes // max(payload_bytes(wire))))


def _error_of(message: Message) -> EnsemblerError:
    info = message.info
    code, text = info.get("code"), info.get("message")
    if message.operation != ERROR or not isinstance(code, int) or not isinstance(text, str):
        return InternalError("the server answered with neither a result nor an error")
    return from_wire(code, text, _number(info.get("retry_after_ms")))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def checked_timeout(timeout_ms: float) -> float:
    """Returns ``timeout_ms`` if it can be a deadline.

    Raises:
        ConfigError: not above 0, or more than a day.
    """
    if not 0 < timeout_ms <= 24 * 3600 * 1000:
        raise ConfigError(f"timeout_ms = {timeout_ms}: give more than 0 and at most a day (86,400,000)")
    return float(timeout_ms)
