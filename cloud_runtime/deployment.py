"""Changes what a running server holds: load beside, warm up, switch, drain, unload."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from ensembler.cloud_runtime import engine as engines
from ensembler.cloud_runtime.engine import EngineOptions
from ensembler.cloud_runtime.models import Version, version_of
from ensembler.cloud_runtime.server import Server
from ensembler.protocol.errors import ConfigError

# For a replaced version to finish what it computes; after that the reply says that it still does.
UNLOAD_S = 60.0


class Deployment:
    """Does what comes over the control socket, one thing at a time.

    Args:
        server: running.
        options: of every engine that is loaded.
    """

    def __init__(self, server: Server, options: EngineOptions) -> None:
        self._server = server
        self._options = options
        self._lock = threading.Lock()

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does one request.

        Args:
            request: ``{"do": "models"}``, ``{"do": "deploy", "bundle": path}`` or ``{"do": "remove", "nets": id}``.

        Raises:
            EnsemblerError: it cannot be done; what was served is served on.
        """
        wanted, argument = request.get("do"), request.get("bundle") or request.get("nets")
        if wanted == "models":
            return self._server.describe()
        if wanted not in ("deploy", "remove") or not isinstance(argument, str):
            raise ConfigError("the control socket takes models, deploy with a bundle, and remove with nets")
        with self._lock:
            return self._deploy(Path(argument)) if wanted == "deploy" else self._remove(argument)

    def _deploy(self, bundle: Path) -> dict[str, Any]:
        engine = engines.load(bundle, self._options)
        try:
            before = self._server.deploy(engine).result()
        except BaseException:
            engine.close()
            raise
        return {
            "bodies_id": engine.manifest.wire.bodies_id,
            "version": version_of(engine).digest,
            "replaced": None if before is None else before.digest,
            "unloaded": before is None or _finished(before.unloaded),
        }

    def _remove(self, nets: str) -> dict[str, Any]:
        version: Version = self._server.remove(nets).result()
        return {"bodies_id": version.engine.manifest.wire.bodies_id, "unloaded": _finished(version.unloaded)}


def _finished(unloaded: Future[None]) -> bool:
    try:
        unloaded.result(UNLOAD_S)
    except FutureTimeoutError:
        return False
    return True
