"""The cloud's end: one ROUTER socket, CURVE with an allow-list (ZAP), and a wake-up that any thread may call."""

from __future__ import annotations

import errno
import socket as sockets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ensembler.protocol.errors import ConfigError
from ensembler.transport.base import Frame
from ensembler.transport.keys import KeyPair
from ensembler.transport.zmq_client import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, set_limits

MAX_PARTS = 2
ZAP_DOMAIN = "ensembler"
# What bind() says of a name that does not resolve here, or an address of another machine.
_NOT_OURS = frozenset({errno.ENODEV, errno.EADDRNOTAVAIL})


@dataclass(frozen=True)
class Incoming:
    """One message: whom to answer, and its frames (at most ``MAX_PARTS + 1``; one too many says that more came)."""

    peer: bytes
    frames: list[Frame]


class ServerSocket:
    """Receives requests and sends replies; used by one thread, except ``wake``.

    Args:
        endpoint: to bind, for instance ``tcp://0.0.0.0:5555``; a port ``*`` lets the system choose.
        keys: the server's pair; None for plaintext.
        authorized: public keys of the devices that may connect; not used in plaintext.

    Raises:
        ConfigError: the address is malformed or in use.
    """

    def __init__(self, endpoint: str, *, keys: KeyPair | None, authorized: frozenset[str]) -> None:
        _check(endpoint)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._wake_in, self._wake_out = sockets.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        try:
            set_limits(self._socket)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            if keys is not None:
                # ZAP must answer before the first handshake.
                self._authenticator = ThreadAuthenticator(self._context)
                self._authenticator.start()
                self._authenticator.configure_curve_callback(ZAP_DOMAIN, _AllowList(authorized))
                self._socket.curve_server = True
                self._socket.zap_domain = ZAP_DOMAIN.encode()
                self._socket.curve_publickey = keys.public.encode()
                self._socket.curve_secretkey = keys.secret.encode()
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"--bind {endpoint}: the address is in use; stop the other server or choose another port"
                ) from None
            reason = "this machine has no such address" if error.errno in _NOT_OURS else error.strerror
            raise ConfigError(
                f"--bind {endpoint}: {reason}; give tcp://address:port with an address of this machine, "
                "0.0.0.0 for all of them"
            ) from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_in.fileno(), zmq.POLLIN)

    def wait(self, timeout_ms: int | None) -> None:
        """Returns when a message is there, ``wake`` was called, or the time is over; None waits for ever."""
        self._poller.poll(timeout_ms)
        with suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass

    def wake(self) -> None:
        """Makes the current or next ``wait`` return; for other threads and signal handlers."""
        with suppress(OSError):  # full of wake-ups, or closed while a last batch was computed
            self._wake_out.send(b"\0")

    def wake_fileno(self) -> int:
        """Returns the file descriptor that wakes ``wait`` when a byte is written: for ``signal.set_wakeup_fd``."""
        return self._wake_out.fileno()

    def receive(self) -> Incoming | None:
        """Returns the next message, or None when there is none now. Frames beyond the limit are dropped unread."""
        try:
            peer = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        frames: list[Frame] = []
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv()
            if len(frames) <= MAX_PARTS:
                frames.append(frame)
        return Incoming(peer, frames)

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Sends a reply; returns False when the peer is gone or takes nothing, which is its own fault."""
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        """Closes everything; what was sent is given a second to leave."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._socket.close(linger=1000)
        self._context.term()
        self._wake_in.close()
        self._wake_out.close()


def _check(endpoint: str) -> None:
    """Refuses a port beyond 65535, of which libzmq would take the lowest 16 bits, and listen somewhere else."""
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if scheme == "ipc" and address:
        return
    if scheme != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) <= 65535)):
        raise ConfigError(
            f"--bind {endpoint!r}: not an address; give tcp://address:port with a port of 1 to 65535, or *"
        )


class _AllowList:
    """What pyzmq's authenticator asks about a device's public key."""

    def __init__(self, authorized: frozenset[str]) -> None:
        self._authorized = authorized

    def callback(self, domain: str, key: Any) -> bool:  # noqa: ARG002
        # The authenticator hands over the Z85 text as bytes.
        return bytes(key).decode("ascii", "replace") in self._authorized
