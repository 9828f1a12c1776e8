"""The device's end: a DEALER socket per connection, CURVE, and a monitor that tells why no answer comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from ensembler.protocol.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineExceededError,
    ServerUnreachableError,
    TransportError,
)
from ensembler.protocol.messages import LIMITS
from ensembler.transport.base import Frames
from ensembler.transport.keys import KeyPair

T = TypeVar("T")

RECONNECT_MS = 50
RECONNECT_MAX_MS = 1000
HANDSHAKE_MS = 5000
# A peer that vanished without a word (power, cable) is noticed after the timeout.
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 6000

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


class ZmqTransport:
    """Connects to one server.

    Args:
        endpoint: ``tcp://host:port`` or ``ipc://path``.
        server_key: the server's public key, pinned; None for plaintext.
        keys: the device's pair; None for plaintext.

    Raises:
        ConfigError: the endpoint is malformed.
    """

    def __init__(self, endpoint: str, *, server_key: str | None, keys: KeyPair | None) -> None:
        _check(endpoint)
        self.endpoint = endpoint
        self._server_key = server_key
        self._keys = keys
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            # A malformed endpoint is refused now, not at the first image, whose handshake is done by then.
            self._first: ZmqConnection | None = self._open()
        except BaseException:
            self._context.term()
            raise

    def connect(self) -> ZmqConnection:
        """See ``Transport``."""
        with self._lock:
            first, self._first = self._first, None
        with mapped_errors(self.endpoint):  # the transport may be closed meanwhile, by another thread
            return first or self._open()

    def _open(self) -> ZmqConnection:
        socket = self._context.socket(zmq.DEALER)
        try:
            return self._connected(socket)
        except BaseException:
            socket.close(linger=0)  # one that is left open would keep the context from ending
            raise

    def _connected(self, socket: zmq.Socket[bytes]) -> ZmqConnection:
        set_limits(socket)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        if self._server_key is not None and self._keys is not None:
            socket.curve_serverkey = self._server_key.encode()
            socket.curve_publickey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
        connection = ZmqConnection(socket, socket.get_monitor_socket(_EVENTS), self.endpoint)
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            connection.close()
            raise ConfigError(
                f"the server address {self.endpoint!r} is not usable ({error.strerror}); give tcp://host:port"
            ) from None  # the cause's traceback would show the socket options
        except BaseException:
            connection.close()  # its monitor, left open, would keep the context from ending
            raise
        return connection

    def close(self) -> None:
        """See ``Transport``."""
        with self._lock:
            first, self._first = self._first, None
        if first is not None:
            first.close()
        self._context.term()


def _check(endpoint: str) -> None:
    """Refuses what libzmq would only fail to connect to, for ever and in silence."""
    scheme, _, address = endpoint.partition("://")
    if not endpoint.isprintable() or not (endpoint.isascii() or scheme == "ipc"):
        raise ConfigError(
            f"the server address {endpoint!r} is not usable: it has characters that no address has; give "
            "tcp://host:port, a host name beyond ASCII in its xn-- form"
        )
    host, _, port = address.rpartition(":")
    if scheme == "ipc" and address:
        return
    if scheme != "tcp" or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"the server address {endpoint!r} is not usable; give tcp://host:port with a port of 1 to 65535"
        )


def set_limits(socket: zmq.Socket[bytes]) -> None:
    """Sets what both ends of a connection share: no lingering, frames and handshakes bounded."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, LIMITS.frame_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


class ZmqConnection:
    """See ``Connection``. Made by ``ZmqTransport.connect``."""

    def __init__(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], endpoint: str) -> None:
        self._socket = socket
        self._monitor = monitor
        self._endpoint = endpoint
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        self._reached = False  # a TCP connection was made since the last loss
        self._ready = False  # the handshake succeeded, and the connection was not lost since
        self._ever_ready = False
        self._losses = 0  # connections that ended before their handshake did

    def exchange(self, request: Frames, accept: Callable[[Frames], T | None], deadline: float) -> T:
        """See ``Connection``."""
        with mapped_errors(self._endpoint):
            self._send(request, deadline)
            while True:
                # Whole milliseconds, rounded up: a poll of 0 would spin through the last one.
                remaining_ms = max(0, math.ceil(1000 * (deadline - time.monotonic())))
                events = dict(self._poller.poll(remaining_ms))
                if self._monitor in events and self._restored():
                    self._send(request, deadline)
                if self._socket in events:
                    accepted = accept(self._socket.recv_multipart())
                    if accepted is not None:
                        return accepted
                if time.monotonic() >= deadline:
                    raise self._too_late()

    def _send(self, request: Frames, deadline: float) -> None:
        """Sends, never for longer than until the deadline.

        A server that refuses the handshake takes the queue of this connection with it, also between ``connect`` and
        the first request; a send that waits for a queue would then wait for ever.
        """
        while True:
            try:
                self._socket.send_multipart(request, zmq.DONTWAIT, copy=False)
            except zmq.Again:
                self._restored()  # raises where the handshake was refused
                remaining_ms = math.ceil(1000 * (deadline - time.monotonic()))
                if remaining_ms <= 0:
                    raise self._too_late() from None
                poller = zmq.Poller()
                poller.register(self._socket, zmq.POLLOUT)
                poller.register(self._monitor, zmq.POLLIN)
                poller.poll(remaining_ms)
            else:
                return

    def close(self) -> None:
        """See ``Connection``."""
        with suppress(zmq.ContextTerminated):  # the transport is being closed, and waits for this
            self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _restored(self) -> bool:
        """Reads the monitor; returns whether the connection came back after a loss, so what was sent may be gone."""
        restored = False
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            kind = event["event"]
            if kind == zmq.EVENT_CONNECTED:
                self._reached = True
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                restored = self._ever_ready and not self._ready
                self._reached = self._ready = self._ever_ready = True
            elif kind == zmq.EVENT_DISCONNECTED:
                self._losses += not self._ready
                self._ready = False
            elif kind in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
                raise self._refused()
        return restored

    def _refused(self) -> AuthenticationError:
        return AuthenticationError(
            f"{self._endpoint} refused the encrypted handshake: either it does not know this device's public key "
            "(put the device's .key into the server's authorized folder), or it is another server than the bundle "
            "pins, or one of the two sides runs in plaintext"
        )

    def _too_late(self) -> TransportError:
        if self._ready:
            return DeadlineExceededError(
                f"{self._endpoint} gave no answer before the deadline; raise timeout_ms, or look at the server's load"
            )
        if self._losses and not self._ever_ready:
            return self._refused()
        if self._reached:
            return ServerUnreachableError(
                f"{self._endpoint} accepted the connection, but the encrypted handshake did not finish before the "
                "deadline; raise timeout_ms, or check that the address is an Ensembler server's"
            )
        return ServerUnreachableError(
            f"{self._endpoint} could not be reached before the deadline; is the server running, is the address right, "
            "does a firewall block it?"
        )


@contextmanager
def mapped_errors(endpoint: str) -> Iterator[None]:
    """Turns ZeroMQ's errors into this package's, in one place."""
    try:
        yield
    except zmq.ContextTerminated:
        raise ServerUnreachableError(f"the connection to {endpoint} was closed while it was in use") from None
    except zmq.ZMQError as error:
        raise ServerUnreachableError(f"the connection to {endpoint} failed: {error.strerror}") from None
