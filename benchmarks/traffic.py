"""Clients for benchmarks, in one process and one thread, as lean as Python allows: they share the server's cores.

``Asked`` holds the images' codes and what the bodies answer to each; every reply is compared with it. A ``Line`` is one
connection with one request under way; ``closed_loop`` keeps many of them busy. Its three kinds, ZeroMQ, HTTP and gRPC,
send requests that were made beforehand and parse no more of a reply than they must, so that no system is measured
through a slower client than another. ``open_loop`` lets requests arrive by a clock whether or not answers come, with
any number under way on each connection; it speaks ZeroMQ only.
"""

from __future__ import annotations

import gc
import secrets
import select
import socket as sockets
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zmq
from bundles import Identities

from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.protocol.messages import ERROR, INFER, REQUEST_ID_BYTES, RESULT, Message, decode, encode

Floats = npt.NDArray[np.float64]

IMAGES = 32
MARK = bytes(range(REQUEST_ID_BYTES))
RESULT_CODE, NO_REPLY = 0, -1
WAIT_MS = 60_000


class Asked:
    """Images' codes, and what the bodies of a server bundle answer to each of them.

    Attributes:
        payloads: the codes of each image, as bytes.
        answers: the N answers of each image, as bytes.
        float_bodies: whether sums may round differently in batches of other sizes, so that a code may differ by one.
    """

    def __init__(self, bundle: Path) -> None:
        engine = OnnxEngine(bundle)
        self.wire = engine.manifest.wire
        self.float_bodies = engine.manifest.precision == "float32"
        rng = np.random.Generator(np.random.PCG64(0))
        codes_max = self.wire.feature_codec.code_max
        self.codes = rng.integers(0, codes_max + 1, (IMAGES, *self.wire.feature_shape), dtype=np.uint8)
        found = np.concatenate([engine.run(self.codes[i : i + 1]) for i in range(IMAGES)])
        engine.close()
        self.payloads = [image.tobytes() for image in self.codes]
        self.answers = [answer.tobytes() for answer in found]

    def check(self, image: int, answer: bytes) -> None:
        """Ends the benchmark where an answer is not the one to that image."""
        expected = self.answers[image % IMAGES]
        if answer == expected:
            return
        if self.float_bodies and len(answer) == len(expected):
            off = np.frombuffer(answer, np.uint8).astype(int) - np.frombuffer(expected, np.uint8)
            if abs(off).max() <= 1:
                return
        raise SystemExit(f"a wrong answer to image {image % IMAGES}: {answer[:80]!r}...")


class Requests:
    """Frames of Ensembler's protocol, made beforehand but for the request's id, which is the request's number."""

    def __init__(self, asked: Asked, budget_ms: float) -> None:
        self._nonce = secrets.token_bytes(REQUEST_ID_BYTES - 8)
        bodies_id = bytes.fromhex(asked.wire.bodies_id)
        message = Message(
            operation=INFER,
            request_id=MARK,
            bodies_id=bodies_id,
            budget_ms=budget_ms,
            tensor=asked.codes[:1],
            bits=asked.wire.feature_codec.bits,
        )
        self._before, _, self._after = bytes(encode(message)[0]).partition(MARK)
        self._payloads = [
            bytes(encode(Message(operation=INFER, request_id=MARK, tensor=image[None], bits=message.bits))[1])
            for image in asked.codes
        ]
        # The fields' order is the protocol's, so a result is known by its first bytes.
        self._result = bytes(encode(Message(operation=RESULT, request_id=MARK))[0]).partition(MARK)[0]

    def frames(self, number: int) -> list[bytes]:
        """Returns the request ``number``."""
        header = b"".join((self._before, self._nonce, number.to_bytes(8, "big"), self._after))
        return [header, self._payloads[number % IMAGES]]

    def read(self, frames: list[bytes]) -> tuple[int | None, int]:
        """Returns the number that a reply answers, and the code of its error or ``RESULT_CODE``.

        The number is None in a late reply to a request that was made elsewhere.
        The answers of a result are its second frame, as they are: 8-bit codes are not packed.
        """
        header = frames[0]
        if header.startswith(self._result):
            start = len(self._result)
            request_id, code = header[start : start + REQUEST_ID_BYTES], RESULT_CODE
        else:
            message = decode(frames)
            if message.operation != ERROR:
                raise SystemExit(f"an unexpected reply: {message}")
            request_id, code = message.request_id, int(message.info["code"])
        return (int.from_bytes(request_id[-8:], "big") if request_id[:-8] == self._nonce else None), code


# --- one request under way on each connection ---


class Line(Protocol):
    """One connection to a server, with one request under way."""

    polled: Any

    def ask(self, image: int) -> None:
        """Sends one image's codes."""

    def answer(self) -> bytes | None:
        """Returns the N answers' codes; None while the reply is not whole. Called when ``polled`` can be read."""

    def close(self) -> None:
        """Ends the connection."""


class ZmqLine:
    """Ensembler's protocol."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, asked: Asked, security: Identities | None, device: int
    ):
        self._requests = Requests(asked, WAIT_MS)
        self._number = 0
        self.polled = dealer(context, endpoint, security, device)

    def ask(self, image: int) -> None:
        """See ``Line``."""
        self._number += IMAGES + (image - self._number) % IMAGES  # a new one, of that image
        self.polled.send_multipart(self._requests.frames(self._number))

    def answer(self) -> bytes | None:
        """See ``Line``."""
        frames = self.polled.recv_multipart()
        number, code = self._requests.read(frames)
        if code != RESULT_CODE or number != self._number:
            raise SystemExit(f"not the result of request {self._number}: {decode(frames)}")
        return frames[1]

    def close(self) -> None:
        """See ``Line``."""
        self.polled.close(linger=0)


class _TcpLine:
    """Bytes over TCP, or TLS where a certificate is given."""

    def __init__(self, address: tuple[str, int], certificate: Path | None) -> None:
        plain = sockets.create_connection(address)
        plain.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
        self._socket = plain
        if certificate is not None:
            context = ssl.create_default_context(cafile=str(certificate))
            context.set_alpn_protocols(self._alpn)
            self._socket = context.wrap_socket(plain, server_hostname="localhost")
        self._socket.setblocking(False)
        self.polled = self._socket.fileno()
        self._received = bytearray()

    _alpn: tuple[str, ...] = ()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                select.select([], [self._socket], [])

    def _receive(self) -> None:
        try:
            while data := self._socket.recv(65536):
                self._received += data
                if len(data) < 16384:  # TLS hands out a record at a time, and has more without the socket's knowing
                    return
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        raise SystemExit("the server closed a connection")

    def close(self) -> None:
        self._socket.close()


class HttpLine(_TcpLine):
    """HTTP/1.1 with keep-alive: one image's codes are the body of a POST, the N answers the body of its reply."""

    _alpn = ("http/1.1",)

    def __init__(self, address: tuple[str, int], path: str, asked: Asked, certificate: Path | None) -> None:
        super().__init__(address, certificate)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\nContent-Length: "
        self._requests = [f"{head}{len(payload)}\r\n\r\n".encode() + payload for payload in asked.payloads]

    def ask(self, image: int) -> None:
        """See ``Line``."""
        self._send(self._requests[image % IMAGES])

    def answer(self) -> bytes | None:
        """See ``Line``."""
        self._receive()
        head, separator, body = bytes(self._received).partition(b"\r\n\r\n")
        if not separator:
            return None
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server refused a request: {bytes(self._received)[:300]!r}")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return None
        self._received.clear()
        return body


class GrpcLine(_TcpLine):
    """The few frames of HTTP/2 that a unary gRPC call needs (RFC 9113; gRPC over HTTP2).

    gRPC's own Python client costs more than some servers here; this one sends the same bytes for every call but for the
    stream's number. Headers go as literals that no side needs to remember (RFC 7541, 6.2.2), and the server's are not
    read: a call that failed has no message.
    """

    _alpn = ("h2",)
    _DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
    _END_STREAM, _END_HEADERS, _ACK = 0x1, 0x4, 0x1
    _WINDOW_BYTES = 1 << 30
    _FRAME_BYTES = 16384  # the largest that a side must take

    def __init__(self, address: tuple[str, int], path: str, asked: Asked, certificate: Path | None) -> None:
        super().__init__(address, certificate)
        scheme = "http" if certificate is None else "https"
        headers = {":method": "POST", ":scheme": scheme, ":path": path, ":authority": "localhost"}
        headers |= {"te": "trailers", "content-type": "application/grpc"}
        texts = [text.encode() for pair in headers.items() for text in pair]
        literals = [bytes([len(text)]) + text for text in texts]
        self._headers = b"".join(
            b"\0" + name + value for name, value in zip(literals[::2], literals[1::2], strict=True)
        )
        self._messages = [struct.pack(">BI", 0, len(payload)) + payload for payload in asked.payloads]
        self._stream = -1
        self._answer = bytearray()
        self._taken = 0
        settings = struct.pack(">HI", 0x4, self._WINDOW_BYTES)
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        self._send(preface + self._frame(self._SETTINGS, 0, 0, settings) + self._window())

    def ask(self, image: int) -> None:
        """See ``Line``."""
        self._stream += 2
        self._answer.clear()
        message = self._messages[image % IMAGES]
        frames = [self._frame(self._HEADERS, self._END_HEADERS, self._stream, self._headers)]
        for start in range(0, len(message), self._FRAME_BYTES):
            part = message[start : start + self._FRAME_BYTES]
            last = start + len(part) == len(message)
            frames.append(self._frame(self._DATA, self._END_STREAM if last else 0, self._stream, part))
        self._send(b"".join(frames))

    def answer(self) -> bytes | None:
        """See ``Line``."""
        self._receive()
        while len(self._received) >= 9:
            length = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + length:
                return None
            kind, flags = self._received[3], self._received[4]
            payload = bytes(self._received[9 : 9 + length])
            del self._received[: 9 + length]
            if kind in (self._RST, self._GOAWAY):
                raise SystemExit(f"the server ended a call: frame {kind}, {payload!r}")
            if kind == self._SETTINGS and not flags & self._ACK:
                self._send(self._frame(self._SETTINGS, self._ACK, 0, b""))
            elif kind == self._PING and not flags & self._ACK:
                self._send(self._frame(self._PING, self._ACK, 0, payload))
            elif kind == self._DATA:
                self._answer += payload
                self._taken += length
            if kind in (self._DATA, self._HEADERS) and flags & self._END_STREAM:
                if self._taken > self._WINDOW_BYTES // 2:
                    self._send(self._window())
                    self._taken = 0
                return self._message()
        return None

    def _message(self) -> bytes:
        if len(self._answer) < 5 or len(self._answer) != 5 + int.from_bytes(self._answer[1:5], "big"):
            raise SystemExit("the server refused a call")
        return bytes(self._answer[5:])

    def _window(self) -> bytes:
        """Returns the frame that lets the server send half a window's bytes more on this connection."""
        return self._frame(self._WINDOW, 0, 0, struct.pack(">I", self._WINDOW_BYTES // 2))

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@dataclass(frozen=True)
class Measured:
    """What a closed loop saw.

    Attributes:
        rate: answers a second.
        latencies_ms: of each answer.
    """

    rate: float
    latencies_ms: Floats

    def percentile(self, percent: float) -> float:
        """Returns a percentile of the latencies."""
        return float(np.percentile(self.latencies_ms, percent))


def first_answer(line: Line, asked: Asked) -> None:
    """Asks once and waits for the answer."""
    poller = zmq.Poller()
    poller.register(line.polled, zmq.POLLIN)
    line.ask(0)
    while poller.poll(WAIT_MS):
        answer = line.answer()
        if answer is not None:
            asked.check(0, answer)
            return
    raise SystemExit(f"no answer in {WAIT_MS} ms")


def closed_loop(lines: Sequence[Line], asked: Asked, *, warm_s: float, seconds: float) -> Measured:
    """Keeps one request under way on each line; every answer is compared with the bodies' own."""
    poller = zmq.Poller()
    for line in lines:
        poller.register(line.polled, zmq.POLLIN)
    by_polled = {line.polled: index for index, line in enumerate(lines)}
    images = list(range(len(lines)))
    started = [0.0] * len(lines)
    latencies: list[float] = []
    clock = time.perf_counter
    with _no_garbage_collection():
        for index, line in enumerate(lines):
            started[index] = clock()
            line.ask(images[index])
        begin = clock() + warm_s
        end = begin + seconds
        while (now := clock()) < end:
            ready = poller.poll(WAIT_MS)
            if not ready:
                raise SystemExit(f"no answer in {WAIT_MS} ms")
            for polled, _ in ready:
                index = by_polled[polled]
                answer = lines[index].answer()
                if answer is None:
                    continue
                now = clock()
                if now >= begin:
                    latencies.append(now - started[index])
                asked.check(images[index], answer)
                images[index] += len(lines)
                started[index] = clock()
                lines[index].ask(images[index])
        elapsed = now - begin
    return Measured(len(latencies) / elapsed, 1000 * np.array(latencies))


# --- any number under way ---


@dataclass(frozen=True)
class Offered:
    """What became of requests that arrived by a clock, one array element each.

    Attributes:
        rate: arrivals a second.
        seconds: of arrivals.
        latencies_ms: from the scheduled arrival to the reply, so that a late sender hides nothing.
        codes: ``RESULT_CODE``, the code of an error, or ``NO_REPLY``.
        behind_ms: how late each was sent.
    """

    rate: float
    seconds: float
    latencies_ms: Floats
    codes: npt.NDArray[np.int64]
    behind_ms: Floats

    def of(self, code: int) -> Floats:
        """Returns the latencies of the requests that were answered with ``code``."""
        return self.latencies_ms[self.codes == code]


def open_loop(
    lines: Sequence[zmq.Socket[bytes]], asked: Asked, *, rate: float, seconds: float, deadline_ms: float, seed: int
) -> Offered:
    """Sends requests at the times of a Poisson process, whatever the server does.

    Args:
        lines: connected; requests go to them in turn.
        asked: the images; every answer is compared with the bodies' own.
        rate: arrivals a second.
        seconds: how long requests arrive; replies are awaited for two deadlines more.
        deadline_ms: the budget that each request states.
        seed: of the arrivals.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 1.2) + 20))
    due = due[due < seconds]
    count = len(due)
    schedule = due.tolist()
    sent, done = np.zeros(count), np.full(count, np.nan)
    codes = np.full(count, NO_REPLY)
    requests = Requests(asked, deadline_ms)
    files = [int(line.fd) for line in lines]
    by_file = dict(zip(files, lines, strict=True))
    clock = time.perf_counter
    number = left = 0
    with _no_garbage_collection():
        start = clock()
        give_up = seconds + 2 * deadline_ms / 1000
        while left < count:
            now = clock() - start
            if now > give_up:
                break
            # The file descriptor of a ZeroMQ socket tells of changes, not of states: whoever used the socket looks.
            touched = set()
            while number < count and schedule[number] <= now and len(touched) < len(lines):
                file = files[number % len(files)]
                by_file[file].send_multipart(requests.frames(number), zmq.NOBLOCK)
                sent[number] = clock() - start
                touched.add(file)
                number += 1
            wait = 0.0 if touched else (schedule[number] if number < count else give_up) - now
            touched.update(select.select(files, [], [], max(0.0, wait))[0])
            for file in touched:
                line = by_file[file]
                while line.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                    frames = line.recv_multipart()
                    answered, code = requests.read(frames)
                    if answered is None:
                        continue
                    done[answered], codes[answered] = clock() - start, code
                    left += 1
                    if code == RESULT_CODE:
                        asked.check(answered, frames[1])
    return Offered(rate, seconds, 1000 * (done - due), codes, 1000 * (sent - due))


def dealer(context: zmq.Context[Any], endpoint: str, security: Identities | None, device: int) -> zmq.Socket[bytes]:
    """Connects one device without a limit on what it may have under way."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if security is not None:
        security.apply(socket, device)
    socket.connect(endpoint)
    return socket


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keeps the collector's pauses out of the latencies; nothing here makes cycles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
