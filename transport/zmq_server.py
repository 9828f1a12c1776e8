"""The cloud's end: ROUTER sockets, CURVE with an allow-list (ZAP), and a wake-up that any thread may call.

ZAP is asked at the handshake alone. So every message says by whose key its connection was made (ZeroMQ's User-Id, which
the peer cannot choose), and what a withdrawn key still sends or awaits can be refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket as sockets
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ensembler.protocol.errors import ConfigError
from ensembler.transport.base import Frame
from ensembler.transport.keys import KeyPair
from ensembler.transport.unix_paths import refuse_taken
from ensembler.transport.zmq_client import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, set_limits

MAX_PARTS = 2
# Of one connection so many are read ahead; the others wait at the device.
PEER_MESSAGES = 64
# A smaller frame is cheaper to copy than to share with ZeroMQ.
COPIED_BYTES = 65536
ZAP_DOMAIN = "ensembler"
_MORE = zmq.NOBLOCK | zmq.SNDMORE
# What bind() says of a name that does not resolve here, or an address of another machine.
_NOT_OURS = frozenset({errno.ENODEV, errno.EADDRNOTAVAIL})


class Peer(NamedTuple):
    """One connection: which address it came to, and ZeroMQ's name for it there."""

    socket: int
    name: bytes


class Incoming(NamedTuple):
    """One message.

    Attributes:
        peer: whom to answer.
        frames: at most ``MAX_PARTS + 1``; one too many says that more came.
        device: the public key of the connection's handshake; None in plaintext.
    """

    peer: Peer
    frames: list[Frame]
    device: str | None


class ServerSocket:
    """Receives requests and sends replies; used by one thread, except ``wake``.

    Args:
        endpoint: to bind, for instance ``tcp://0.0.0.0:5555``; a port ``*`` lets the system choose.
        keys: the server's pair; None for plaintext.
        authorized: public keys of the devices that may connect, asked at every handshake; not used in plaintext.

    Raises:
        ConfigError: the address is malformed or in use.
    """

    def __init__(self, endpoint: str, *, keys: KeyPair | None, authorized: Container[str]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._authorized = authorized
        self._sockets: list[zmq.Socket[bytes]] = []
        self._next = 0
        self._wake_in, self._wake_out = sockets.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_in.fileno(), zmq.POLLIN)
        self._woken = zmq.Poller()
        self._woken.register(self._wake_in.fileno(), zmq.POLLIN)
        try:
            if keys is not None:
                # ZAP must answer before the first handshake.
                self._authenticator = ThreadAuthenticator(self._context)
                self._authenticator.start()
                self._authenticator.configure_curve_callback(ZAP_DOMAIN, _Asked(authorized))
            self.endpoint = self.listen(endpoint, keys)
        except BaseException:
            self.close()
            raise

    def listen(self, endpoint: str, keys: KeyPair | None) -> str:
        """Binds another address, for instance with a new key while devices still come to the old one.

        Args:
            endpoint: to bind.
            keys: the pair that devices must pin to be let in here. None only where the first address has none, either.

        Returns:
            The address, with the port that the system chose.

        Raises:
            ConfigError: the address is malformed or in use.
        """
        _check(endpoint)
        _seed_names()
        socket = self._context.socket(zmq.ROUTER)
        try:
            set_limits(socket, endpoint)
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.RCVHWM, PEER_MESSAGES)
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            if keys is not None:
                socket.curve_server = True
                socket.zap_domain = ZAP_DOMAIN.encode()
                socket.curve_publickey = keys.public.encode()
                socket.curve_secretkey = keys.secret.encode()
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"--bind {endpoint}: the address is in use; stop the other server or choose another port"
                ) from None
            reason = "this machine has no such address" if error.errno in _NOT_OURS else error.strerror
            raise ConfigError(
                f"--bind {endpoint}: {reason}; give tcp://address:port with an address of this machine, "
                "0.0.0.0 or [::] for all of them"
            ) from None
        self._sockets.append(socket)
        self._poller.register(socket, zmq.POLLIN)
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def wait(self, timeout_ms: int | None, also: Iterable[tuple[int, int]] = ()) -> None:
        """Returns when a message is there, ``wake`` was called, or the time is over; None waits for ever.

        Args:
            timeout_ms: how long at most.
            also: other descriptors to wait for, and ZeroMQ's flags of what is awaited of each.
        """
        registered = []
        try:
            for descriptor, flags in also:
                self._poller.register(descriptor, flags)
                registered.append(descriptor)
            self._poller.poll(timeout_ms)
        finally:
            for descriptor in registered:
                self._poller.unregister(descriptor)
        self._awake()

    def pause(self, timeout_ms: int) -> None:
        """Returns when ``wake`` was called or the time is over, whatever messages come."""
        if self._woken.poll(timeout_ms):
            self._awake()

    def _awake(self) -> None:
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
        for _ in self._sockets:
            number, self._next = self._next, (self._next + 1) % len(self._sockets)
            socket = self._sockets[number]
            try:
                name = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                continue
            return Incoming(Peer(number, name.bytes), _rest(socket, name), self._device(name))
        return None

    def allows(self, device: str | None) -> bool:
        """Whether a device may still use the server: ZAP let it in, which may have been long ago."""
        return self._authenticator is None or device in self._authorized

    def send(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        """Sends a reply; returns False when the peer is gone or takes nothing, which is its own fault."""
        socket = self._sockets[peer.socket]
        try:
            # Whether the peer is there is decided with its name; what follows it is taken.
            socket.send(peer.name, _MORE)
            for frame in frames[:-1]:
                socket.send(frame, _MORE)
            socket.send(frames[-1], zmq.NOBLOCK, copy=len(frames[-1]) < COPIED_BYTES)
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
        for socket in self._sockets:
            socket.close(linger=1000)
        self._context.term()
        self._wake_in.close()
        self._wake_out.close()

    def _device(self, frame: zmq.Frame) -> str | None:
        return str(frame.get("User-Id")) if self._authenticator is not None else None


def _rest(socket: zmq.Socket[bytes], frame: zmq.Frame) -> list[Frame]:
    """Returns the frames after this one; a frame knows itself whether it is the last, and asking the socket is slow."""
    frames: list[Frame] = []
    while frame.more:
        frame = socket.recv(copy=False)
        if len(frames) <= MAX_PARTS:
            frames.append(frame.bytes if len(frame) < COPIED_BYTES else frame.buffer)
    return frames


def _seed_names() -> None:
    """Lets libzmq begin the names of its connections anywhere.

    A ROUTER counts them up from a number of C's ``rand()``, which nobody seeds: it would be the same in every server. A
    peer may ask for a name, and one that asked for the next connection's would end the process by libzmq's assertion,
    or get the answers of a connection that has gone.
    """
    ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))


def _check(endpoint: str) -> None:
    """Refuses a path that is taken, and a port beyond 65535, of which libzmq would take the lowest 16 bits."""
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if scheme == "ipc" and address:
        # libzmq would delete either to listen there. What else is wrong with the name, it says itself.
        with suppress(OSError, ValueError):
            refuse_taken(Path(address), f"--bind {endpoint}")
        return
    if scheme != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) <= 65535)):
        raise ConfigError(
            f"--bind {endpoint!r}: not an address; give tcp://address:port with a port of 1 to 65535, or *"
        )


class _Asked:
    """What pyzmq's authenticator asks about a device's public key."""

    def __init__(self, authorized: Container[str]) -> None:
        self._authorized = authorized

    def callback(self, domain: str, key: Any) -> bool:  # noqa: ARG002
        # The authenticator hands over the Z85 text as bytes.
        return bytes(key).decode("ascii", "replace") in self._authorized
