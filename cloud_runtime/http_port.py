"""A plain HTTP port for whoever runs the server: ``/livez``, ``/readyz``, ``/metrics``.

It has no authentication and tells no secret; bind it where only the operator's own probes come.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Protocol

from ensembler.protocol.errors import ConfigError

log = logging.getLogger("ensembler.server.http")

# A connection that says nothing is closed after it.
REQUEST_S = 5.0
TEXT = "text/plain; charset=utf-8"


class Asked(Protocol):
    """A server that says how it is."""

    def describe(self) -> dict[str, Any]:
        """Returns what ``/readyz`` shows, with ``ready``; raises ``TimeoutError`` when its loop does not answer."""


class Told(Protocol):
    """What counts for it."""

    def exposition(self) -> tuple[bytes, str]:
        """Returns what ``/metrics`` shows, and its content type."""


class HttpPort:
    """Listens from its making on.

    - ``/livez``: 200 while the server's loop answers; 503 means that a restart is due.
    - ``/readyz``: 200 while the server can answer; the body says what it holds, in JSON.
    - ``/metrics``: Prometheus.

    Args:
        address: ``host:port``; a port 0 lets the system choose.
        server: running, or about to.
        meter: of the server.

    Raises:
        ConfigError: the address is malformed or in use.
    """

    def __init__(self, address: str, server: Asked, meter: Told) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"--http {address!r}: give host:port, the port from 0 to 65535: 127.0.0.1:8080")

        class Handler(_Handler):
            asked = server
            told = meter

        try:
            listening = _Listening6 if host.startswith("[") else _Listening
            self._http = listening((host.strip("[]"), int(port)), Handler)
        except OSError as error:
            raise ConfigError(f"--http {address}: {error.strerror or error}; choose another address or port") from error
        self._http.daemon_threads = True
        self.address = f"{host}:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Listening(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (the library's)
        """One line; the library's own is a traceback on stderr, and a probe that hangs up early is no error of ours."""
        log.info("http: a connection ended early: %s", sys.exc_info()[1])


class _Listening6(_Listening):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    asked: ClassVar[Asked]
    told: ClassVar[Told]
    timeout = REQUEST_S
    server_version = "ensembler"
    sys_version = ""

    def do_GET(self) -> None:
        try:
            status, body, kind = self._answer(self.path.partition("?")[0])
        except Exception as error:  # above all TimeoutError: the loop does not answer
            status, body, kind = 503, f"not alive: {type(error).__name__}\n".encode(), TEXT
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, path: str) -> tuple[int, bytes, str]:
        if path == "/livez":
            self.asked.describe()
            return 200, b"alive\n", TEXT
        if path == "/readyz":
            found = self.asked.describe()
            return (200 if found["ready"] else 503), json.dumps(found).encode() + b"\n", "application/json"
        if path == "/metrics":
            body, kind = self.told.exposition()
            return 200, body, kind
        return 404, b"there are /livez, /readyz and /metrics\n", TEXT

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http: " + format, *args)
