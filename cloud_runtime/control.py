"""A socket in the file system by which its owner changes a running server; ``ensembler deploy`` speaks to it.

One line of JSON each way. Only the user who runs the server, and root, are heard, whatever the modes of the file say.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ensembler.protocol.errors import ConfigError, EnsemblerError, ServerUnreachableError
from ensembler.transport.unix_paths import refuse_taken

log = logging.getLogger("ensembler.server")

MAX_LINE_BYTES = 64 * 1024
# For the line to come; what it asks for may take longer.
LINE_S = 10.0

Handler = Callable[[dict[str, Any]], dict[str, Any]]


class ControlSocket:
    """Listens from its making on.

    Args:
        path: of the socket; made 0600, removed at the end. One that a dead server left is replaced.
        handle: gets a request, returns the reply; an ``EnsemblerError`` becomes ``{"error": text}``. Called by one
            thread for each connection.

    Raises:
        ConfigError: the socket cannot be made, or a living server listens on it.
    """

    def __init__(self, path: Path, handle: Handler) -> None:
        self._path = path
        self._handle = handle
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if refuse_taken(path, f"--control {path}"):
                path.unlink()
            before = os.umask(0o177)
            try:
                self._listening.bind(str(path))
            finally:
                os.umask(before)
            self._listening.listen()
        except OSError as error:
            self._listening.close()
            raise ConfigError(f"--control {path}: {error.strerror or error}; give a path that can be made") from error
        except BaseException:
            self._listening.close()
            raise
        self._thread = threading.Thread(target=self._listen, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening and removes the socket."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._listening.close()
        self._thread.join()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), name="control-line", daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            user = _user_of(connection)
            if user not in {0, os.geteuid()}:
                log.warning("the control socket was used by user %d and said nothing", user)
                return
            try:
                reply = self._handle(_read_line(connection))
            except EnsemblerError as error:
                log.warning("refused on the control socket: %s", error)
                reply = {"error": str(error)}
            except Exception as error:
                log.exception("a request on the control socket failed")
                reply = {"error": f"internal error ({type(error).__name__}); the server's log has the reason"}
            connection.sendall(json.dumps(reply).encode() + b"\n")


def ask(path: Path, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Sends one request to a server's control socket.

    Args:
        path: of the socket.
        request: what is wanted.
        timeout_s: for the reply.

    Returns:
        The reply.

    Raises:
        ServerUnreachableError: nobody listens there, may listen to this user, or answers in time.
        ConfigError: the server answered that it cannot.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            reply = _read_line(connection)
        except TimeoutError:
            raise ServerUnreachableError(f"the server behind {path} did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise ServerUnreachableError(
                f"{path}: {error.strerror or error}; is ensembler serve running with --control {path}?"
            ) from None
    if "error" in reply:
        raise ConfigError(str(reply["error"]))
    return reply


def _read_line(connection: socket.socket) -> dict[str, Any]:
    if connection.gettimeout() is None:
        connection.settimeout(LINE_S)
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(line) > MAX_LINE_BYTES:
            raise ConfigError("the other side of the control socket said nothing that ends, or too much")
        line += part
    connection.settimeout(None)
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError("the control socket takes one line of JSON, an object")
    return found


def _user_of(connection: socket.socket) -> int:
    """Who is at the other end, as the kernel says."""
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", said)[1])
