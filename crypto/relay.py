"""The stream between two engines, carried in messages of the connection that the client opened.

Each side reads what its engine writes, sends it on in pieces that say where in the stream they are, and tells how much
it has passed to its engine. No more than a window is on its way, so nothing fills up that nobody reads.
"""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import zmq

from ensembler.protocol.errors import ProtocolError
from ensembler.protocol.messages import LINK, Message

PIECE_BYTES = 512 * 1024
WINDOW_BYTES = 16 * 1024 * 1024
# Fewer than a server's socket reads ahead of one connection.
WINDOW_PIECES = 48
TOLD_AFTER_PIECES = 12
TOLD_AFTER_BYTES = WINDOW_BYTES // 4


class Relay:
    """One side's half, without the connection; used by one thread.

    Args:
        stream: to this side's engine.
        session: the 16 bytes that name the session.

    Attributes:
        sent_bytes: of the stream, so far.
        received_bytes: of the stream, so far.
    """

    def __init__(self, stream: socket.socket, session: bytes) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._session = session
        self._waiting = bytearray()  # for the engine
        self.sent_bytes = self.received_bytes = 0
        self._pieces = self._taken_pieces = 0  # sent; and taken by the other side
        self._taken_bytes = 0
        self._got_pieces = self._told_pieces = self._told_bytes = 0
        self._ended = False

    def interest(self) -> list[tuple[int, int]]:
        """Returns what is to be waited for."""
        flags = (zmq.POLLIN if self._open() else 0) | (zmq.POLLOUT if self._waiting else 0)
        return [(self._stream.fileno(), flags)] if flags else []

    def outgoing(self) -> Message | None:
        """Returns the next message to send, None if there is none now: a piece, or that pieces were taken."""
        self._pass_on()
        data = b""
        if self._open():
            try:
                data = self._stream.recv(PIECE_BYTES)
                self._ended = not data
            except BlockingIOError:
                pass
            except OSError:
                self._ended = True
        passed = self.received_bytes - len(self._waiting)
        told = (
            self._got_pieces - self._told_pieces >= TOLD_AFTER_PIECES or passed - self._told_bytes >= TOLD_AFTER_BYTES
        )
        if not data and not (told and not self._waiting):
            return None
        if not self._waiting:
            self._told_pieces, self._told_bytes = self._got_pieces, passed
        message = self.empty()
        if data:
            message.tensor = np.frombuffer(data, np.uint8).reshape(1, -1)
            self._pieces += 1
            self.sent_bytes += len(data)
        return message

    def empty(self) -> Message:
        """Returns a message without a piece: it may be sent at any time."""
        info: dict[str, Any] = {"at": self.sent_bytes, "pieces": self._told_pieces, "taken": self._told_bytes}
        return Message(operation=LINK, request_id=self._session, info=info)

    def take(self, message: Message) -> None:
        """Takes what the other side sent.

        Raises:
            ProtocolError: a piece that is missing, came twice, or is beyond the window; or counts that cannot be.
        """
        at, pieces, taken = (message.info.get(name) for name in ("at", "pieces", "taken"))
        if not isinstance(at, int) or not isinstance(pieces, int) or not isinstance(taken, int):
            raise ProtocolError("a piece of the engines' stream does not say where it belongs")
        if not (self._taken_pieces <= pieces <= self._pieces and self._taken_bytes <= taken <= self.sent_bytes):
            raise ProtocolError("the other side took pieces of the engines' stream that were not sent")
        self._taken_pieces, self._taken_bytes = pieces, taken
        if at != self.received_bytes:
            raise ProtocolError("a piece of the engines' stream is missing, or came twice")
        if message.tensor is None:
            return
        data = message.tensor.reshape(-1).tobytes()
        if len(self._waiting) + len(data) > WINDOW_BYTES + PIECE_BYTES:
            raise ProtocolError("the other side sent more of the engines' stream than it may")
        self._waiting += data
        self._got_pieces += 1
        self.received_bytes += len(data)
        self._pass_on()

    def _open(self) -> bool:
        """Whether more may be sent."""
        on_way = self.sent_bytes - self._taken_bytes
        return not self._ended and on_way < WINDOW_BYTES and self._pieces - self._taken_pieces < WINDOW_PIECES

    def _pass_on(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._stream.send(memoryview(self._waiting)[:PIECE_BYTES])]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # the engine has gone: whoever reads its answers finds out why
            self._waiting.clear()
