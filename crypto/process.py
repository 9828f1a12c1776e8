"""The parent's half of a party's process (``party``): it starts it, gives it orders, and ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from ensembler.crypto.party import MAX_ORDER_BYTES, OUT_OF_MEMORY
from ensembler.protocol import errors
from ensembler.protocol.errors import EnsemblerError, InternalError

# Of an order, that a socket takes though nobody reads.
AT_ONCE_BYTES = 64 * 1024


class PartyProcess:
    """A process of ``ensembler.crypto.party``; used by one thread.

    Attributes:
        link: this side's end of the stream between the engines, or None where the process was given its own.
    """

    def __init__(self, link: socket.socket | None = None) -> None:
        """Starts it.

        Args:
            link: the stream to the other party's engine, which goes to the process; None makes a pair, of which the
                caller relays the other end.

        Raises:
            InternalError: the system has no room for a process or its files.
        """
        opened = [] if link is None else [link]
        try:
            ours: socket.socket | None = None
            if link is None:
                ours, link = socket.socketpair()
                opened += [ours, link]
            own, control = socket.socketpair()
            opened += [own, control]
            # -P: not from the folder where the application was called.
            module = ["-P", "-m", "ensembler.crypto.party", str(link.fileno()), str(control.fileno())]
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, *module],
                stdin=subprocess.DEVNULL,
                pass_fds=[link.fileno(), control.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # Ctrl-C is for the parent, which decides
            )
        except OSError as error:
            for each in opened:
                each.close()
            raise InternalError(f"the engine's process could not be started: {error.strerror or error}") from error
        link.close()
        control.close()
        self.link = ours
        self._orders = Connection(own.detach())
        self._writer: threading.Thread | None = None

    def fileno(self) -> int:
        """Returns what becomes readable when there is an answer, or the process has ended."""
        return self._orders.fileno()

    def order(self, do: str, **arguments: Any) -> None:
        """Gives an order; its answer comes from ``answer``.

        Raises:
            InternalError: the process has ended.
        """
        content = msgpack.packb({"do": do, **arguments})
        if len(content) > AT_ONCE_BYTES:  # a process that hangs does not read, and who gives the order has a deadline
            self._writer = threading.Thread(target=self._written, args=(content,), daemon=True)
            self._writer.start()
        elif not self._written(content):
            raise self._ended()

    def _written(self, content: bytes) -> bool:
        try:
            self._orders.send_bytes(content)
        except OSError:
            return False  # where nobody waits for this, the answer is an error
        return True

    def answer(self, timeout_s: float | None = 0.0) -> Mapping[str, Any] | None:
        """Returns the next message of the process, ``{"told": ...}`` or an order's answer; None: there is none yet.

        Raises:
            EnsemblerError: what the order failed with, of this package's own class where it is one.
            InternalError: the process has ended, or its engine failed.
        """
        try:
            if not self._orders.poll(timeout_s):
                return None
            message: dict[str, Any] = msgpack.unpackb(
                self._orders.recv_bytes(MAX_ORDER_BYTES), max_bin_len=MAX_ORDER_BYTES
            )
        except (EOFError, OSError):
            raise self._ended() from None
        if "error" in message:
            raise _failure(str(message["error"]), str(message["text"]))
        return message

    def result(self, timeout_s: float) -> Mapping[str, Any]:
        """Waits for an order's answer; errors as ``answer``, and InternalError if none comes in time."""
        while (message := self.answer(timeout_s)) is not None:
            if "told" not in message:
                return message
        raise InternalError(f"a party of the computation said nothing for {timeout_s:g} s")

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        if self._writer is not None:
            self._writer.join()  # nobody is at the other end any more
        self._orders.close()
        if self.link is not None:
            self.link.close()

    def _ended(self) -> InternalError:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return InternalError("a party of the computation closed its line")
        why = f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = "; if the system ended it for its memory, take an earlier boundary or a larger machine"
        return InternalError(f"the engine's process {why}{hint if code == -signal.SIGKILL else ''}")


def _failure(name: str, text: str) -> EnsemblerError:
    if name == OUT_OF_MEMORY:
        return InternalError("the engine ran out of memory; take an earlier boundary, or a machine with more")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, EnsemblerError) and kind is not errors.MissingExtraError:
        return kind(text)
    return InternalError(f"the engine failed: {name}: {text}")
