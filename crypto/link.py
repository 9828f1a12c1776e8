"""A ``Link`` over a stream of bytes: each message is its name's length, its own, the name and the data."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress

from ensembler.protocol.errors import ProtocolError, ServerUnreachableError

_HEAD = struct.Struct("<HQ")
MAX_MESSAGE_BYTES = 1 << 28
MAX_NAME_BYTES = 512
# Of what has come and nobody has asked for. The parties go in step, so an honest one stays far below it.
MAX_WAITING_BYTES = 1 << 30
KEPT_BYTES = 256  # beside name and data of each


class StreamLink:
    """See ``engine.Link``. A thread reads whatever comes, so that neither party ever waits for the other to read.

    Args:
        stream: a connected socket, whose other end is another ``StreamLink``, with anything in between.

    Attributes:
        sent_bytes: so far, of the stream.
        received_bytes: so far, of messages that were asked for.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: dict[str, bytes] = {}
        self._waiting_bytes = 0
        self.sent_bytes = self.received_bytes = 0
        self._ended: Exception | None = None
        self._reader = threading.Thread(target=self._read, name="ensembler-link", daemon=True)
        self._reader.start()

    def send(self, key: str, data: bytes) -> None:
        """See ``Link``."""
        name = key.encode()
        try:
            with self._sending:
                self._stream.sendall(_HEAD.pack(len(name), len(data)) + name)
                self._stream.sendall(data)
                self.sent_bytes += _HEAD.size + len(name) + len(data)
        except OSError as error:
            raise _gone() from error

    def receive(self, key: str) -> bytes:
        """See ``Link``."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._waiting or self._ended is not None)
            if key not in self._waiting:
                assert self._ended is not None
                raise self._ended
            data = self._waiting.pop(key)
            size = len(key.encode()) + len(data)
            self._waiting_bytes -= size + KEPT_BYTES
            self.received_bytes += _HEAD.size + size
            return data

    def close(self) -> None:
        """Ends the stream, for both ends."""
        with suppress(OSError):  # the other end was first
            self._stream.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._stream.close()

    def _read(self) -> None:
        try:
            with self._stream.makefile("rb") as source:
                while head := source.read(_HEAD.size):
                    name_bytes, data_bytes = _HEAD.unpack(head)
                    size = name_bytes + data_bytes + KEPT_BYTES
                    if (
                        name_bytes > MAX_NAME_BYTES
                        or data_bytes > MAX_MESSAGE_BYTES
                        or self._waiting_bytes + size > MAX_WAITING_BYTES
                    ):
                        raise ProtocolError("the other party sends more than any net needs")
                    name, data = source.read(name_bytes).decode(), source.read(data_bytes)
                    if len(data) != data_bytes:
                        break
                    with self._changed:
                        if name in self._waiting:
                            raise ProtocolError("the other party sent a message twice")
                        self._waiting[name] = data
                        self._waiting_bytes += size
                        self._changed.notify_all()
            ended: Exception = _gone()
        except ProtocolError as error:
            ended = error
        except Exception as error:  # whatever it is, nobody may wait for a thread that has ended
            ended = _gone()
            ended.__cause__ = error
        with suppress(OSError):  # who sends to this end is not left waiting
            self._stream.shutdown(socket.SHUT_RDWR)
        with self._changed:
            self._ended = ended
            self._changed.notify_all()


def _gone() -> ServerUnreachableError:
    return ServerUnreachableError("the other party of the computation has gone")
