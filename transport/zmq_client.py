"""The device's end: a DEALER socket per connection, CURVE, and a monitor that tells why no answer comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

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
from ensembler.transport.base import Frames, closed_in_use
from ensembler.transport.keys import KeyPair

T = TypeVar("T")

# A line that is lost is replaced, not repaired: an idle device leaves a server alone that has gone. Libzmq reports that
# an attempt failed by saying when it tries again, so it is told to try, in an hour.
RECONNECT_MS = 3_600_000
HANDSHAKE_MS = 5000
CLOSE_S = 1.0  # that a transport's end is waited for at most
# A peer that vanished without a word (power, cable) is noticed after the timeout.
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 6000

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)


class ZmqTransport:
    """Connects to one server.

    Args:
        endpoint: ``tcp://host:port`` or ``ipc://path``.
        server_key: the server's public key, pinned; None for plaintext.
        keys: the device's pair; None for plaintext.

    Raises:
        ConfigError: the endpoint is malformed.
        ServerUnreachableError: the system has no descriptors left.
    """

    def __init__(self, endpoint: str, *, server_key: str | None, keys: KeyPair | None) -> None:
        _check(endpoint)
        self.endpoint = endpoint
        self._server_key = server_key
        self._keys = keys
        self._lock = threading.Lock()
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            # A malformed endpoint is refused now, not at the first image, whose handshake is done by then.
            with mapped_errors(endpoint):
                self._first: ZmqConnection | None = self._open()
        except BaseException:
            self._context.term()
            raise

    def connect(self) -> ZmqConnection:
        """See ``Transport``."""
        with self._lock:
            first, self._first = self._first, None
        with mapped_errors(self.endpoint):  # the transport may be closed meanwhile, by another thread
            if first is not None:
                if first.usable():
                    return first
                first.close()
            return self._open()

    def _open(self) -> ZmqConnection:
        # Libzmq may crash when a socket is made while its context ends. Of one that ends later, the context waits for
        # every socket, so that none may be left open in an error, which lives on in whoever holds its traceback.
        with self._lock:
            if self._closed:
                raise zmq.ContextTerminated
            socket = self._context.socket(zmq.DEALER)
        try:
            return self._connected(socket)
        except BaseException:
            socket.close(linger=0)
            raise

    def _connected(self, socket: zmq.Socket[bytes]) -> ZmqConnection:
        set_limits(socket, self.endpoint)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        if self._server_key is not None and self._keys is not None:
            socket.curve_serverkey = self._server_key.encode()
            socket.curve_publickey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
        monitor = self._context.socket(zmq.PAIR)
        connection = ZmqConnection(socket, monitor, self.endpoint)
        try:
            events = f"inproc://monitor.{socket.FD}"
            socket.monitor(events, _EVENTS)
            monitor.connect(events)
            _dial(socket, self.endpoint)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """See ``Transport``."""
        with self._lock:
            self._closed = True
            first, self._first = self._first, None
        if first is not None:
            first.close()
        # Where a resolver is silent, libzmq's thread sits in the look-up of the name for as long as the system lets it,
        # and the context waits for that thread; nobody need wait for the context.
        ending = threading.Thread(target=self._context.term, name=f"closing {self.endpoint}", daemon=True)
        ending.start()
        ending.join(CLOSE_S)


def _dial(socket: zmq.Socket[bytes], endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ContextTerminated:
        raise
    except zmq.ZMQError as error:
        raise ConfigError(
            f"the server address {endpoint!r} is not usable ({error.strerror}); give tcp://host:port"
        ) from None  # the cause's traceback would show the socket options


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


def set_limits(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Sets what both ends of a connection share: no lingering, frames and handshakes bounded, the address's family."""
    # Not for names: of one that has addresses of both families, libzmq would try the first of version 6 alone.
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
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
        self._reached_s: float | None = None  # when the TCP connection was there
        self._ready = False  # the handshake succeeded
        self._lost: TransportError | None = None  # why this line carries nothing any more

    def usable(self) -> bool:
        """See ``Connection``."""
        try:
            self._look()
        except zmq.ZMQError:  # the transport is being closed, and waits until this line is
            return False
        return self._lost is None

    def send(self, request: Frames) -> None:
        """See ``Connection``."""
        with mapped_errors(self._endpoint):
            self._look()
            if self._lost is not None:
                raise self._lost
            try:
                self._socket.send_multipart(request, zmq.DONTWAIT, copy=False)
            except zmq.Again:  # a line that ends takes its queue along, maybe before its monitor says so
                raise self._gone() from None

    def receive(self, accept: Callable[[Frames], T | None], until: float) -> T | None:
        """See ``Connection``."""
        with mapped_errors(self._endpoint):
            while True:
                # Whole milliseconds, rounded up: a poll of 0 would spin through the last one.
                remaining_ms = max(0, math.ceil(1000 * (until - time.monotonic()))) if self._lost is None else 0
                events = dict(self._poller.poll(remaining_ms))
                if self._monitor in events:
                    self._look()
                if self._socket in events:  # also of a line that was lost since: what came, came
                    accepted = accept(self._socket.recv_multipart())
                    if accepted is not None:
                        return accepted
                elif self._lost is not None:
                    raise self._lost
                if time.monotonic() >= until:
                    return None

    def wait(self, until: float, also: Iterable[tuple[int, int]]) -> None:
        """Returns when a frame came, the line was lost, a descriptor is ready, or the time is over.

        Args:
            until: on the clock of ``time.monotonic()``, in seconds.
            also: descriptors, and ZeroMQ's flags of what is awaited of each.
        """
        with mapped_errors(self._endpoint):
            registered = []
            try:
                for descriptor, flags in also:
                    self._poller.register(descriptor, flags)
                    registered.append(descriptor)
                self._poller.poll(max(0, math.ceil(1000 * (until - time.monotonic()))))
            finally:
                for descriptor in registered:
                    self._poller.unregister(descriptor)

    def silence(self) -> TransportError:
        """See ``Connection``."""
        if self._lost is not None:
            return self._lost
        if self._ready:
            return DeadlineExceededError(
                f"{self._endpoint} gave no answer before the deadline; raise timeout_ms, or look at the server's load"
            )
        return self._unfinished() if self._reached_s is not None else self._unreachable()

    def close(self) -> None:
        """See ``Connection``."""
        with suppress(zmq.ContextTerminated):  # the transport is being closed, and waits for this
            self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _look(self) -> None:
        """Reads what became of the line from the monitor."""
        while cast(int, self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # a poll is ten times slower
            kind = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if kind == zmq.EVENT_CONNECTED:
                self._reached_s = time.monotonic()
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._ready = True
            elif self._lost is not None:
                pass  # what follows a loss says less than the loss
            elif kind == zmq.EVENT_DISCONNECTED:
                self._lost = self._gone() if self._ready else self._lost_in_handshake()
            elif kind == zmq.EVENT_CONNECT_RETRIED:
                self._lost = self._unreachable()
            else:
                self._lost = AuthenticationError(self._refusal())

    def _lost_in_handshake(self) -> TransportError:
        # After its full time it is libzmq of this side that ends a handshake, and nobody refused anything.
        if self._reached_s is not None and time.monotonic() - self._reached_s > 0.9 * HANDSHAKE_MS / 1000:
            return self._unfinished()
        return AuthenticationError(self._refusal(), certain=False)

    def _refusal(self) -> str:
        return (
            f"{self._endpoint} refused the encrypted handshake: either it does not know this device's public key "
            "(put the device's .key into the server's authorized folder), or it is another server than the one whose "
            "key is pinned, or one of the two sides runs in plaintext"
        )

    def _unfinished(self) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"{self._endpoint} accepted the connection, but the encrypted handshake did not finish before the "
            "deadline; raise timeout_ms, or check that the address is an Ensembler server's"
        )

    def _gone(self) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"the connection to {self._endpoint} was lost and not restored before the deadline; was the server stopped?"
        )

    def _unreachable(self) -> ServerUnreachableError:
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
        raise closed_in_use(endpoint) from None
    except zmq.ZMQError as error:
        raise ServerUnreachableError(f"the connection to {endpoint} failed: {error.strerror}") from None
