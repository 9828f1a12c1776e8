"""The parent's half of a party's process (``party``): it starts it, gives it orders, and ends it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from ensembler.crypto.party import MAX_ORDER_BYTES, OUT_OF_MEMORY
from ensembler.protocol import errors
from ensembler.protocol.errors import EnsemblerError, InternalError


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
        """
        ours: socket.socket | None = None
        theirs = link
        if theirs is None:
            ours, theirs = socket.socketpair()
        self.link = ours
        own, control = socket.socketpair()
        self._orders = Connection(own.detach())
        command = [sys.executable, "-m", "ensembler.crypto.party", str(theirs.fileno()), str(control.fileno())]
        try:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), control.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent, which decides
            )
        except BaseException:
            self._orders.close()
            if ours is not None:
                ours.close()
            raise
        finally:
            theirs.close()
            control.close()

    def fileno(self) -> int:
        """Returns what becomes readable when there is an answer, or the process has ended."""
        return self._orders.fileno()

    def order(self, do: str, **arguments: Any) -> None:
        """Gives an order; its answer comes from ``answer``.

        Raises:
            InternalError: the process has ended.
        """
        try:
            self._orders.send_bytes(msgpack.packb({"do": do, **arguments}))
        except OSError:
            raise self._ended() from None

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
