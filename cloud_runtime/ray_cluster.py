"""This process's connection to Ray, which there is one of: begun by whoever needs it first, ended by the last.

Ray trusts everybody on its network and unpickles what it is sent, so all of it lies inside the operator's boundary
(docs/operator.md). Its usage statistics and its dashboard stay off, and it logs into files of its own.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ensembler.cloud_runtime.engine import usable_cores
from ensembler.protocol.errors import ConfigError, MissingExtraError

log = logging.getLogger("ensembler.ray")

# Left to itself Ray tries an address for two minutes, then ends the process.
REACH_S = 5.0
JOIN_S = 40.0
# Of a Ray that is started here: for what is on its way. What does not fit goes to disk.
OBJECT_STORE_BYTES = 256 * 1024 * 1024

JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)"

_lock = threading.Lock()
_users: list[str | None] = []  # the addresses of those who are connected
_ours = False


@contextmanager
def connected(address: str | None, *, cores: int | None = None) -> Iterator[Any]:
    """Connects this process to Ray, unless it is already, and yields the module ``ray``.

    Args:
        address: ``HOST:PORT`` of the head, on a machine that is a node of the cluster itself, or ``auto`` for the
            cluster of this machine's node; None starts a Ray of one node here, which ends with the connection.
        cores: of a Ray that is started here; None takes the usable ones.

    Raises:
        ConfigError: the address is none, nothing answers there in time, or the process is connected elsewhere.
        MissingExtraError: Ray is not installed.
    """
    ray = _imported(address)
    with _lock:
        _begin(ray, address, cores)
        _users.append(address)
    try:
        yield ray
    finally:
        with _lock:
            _users.remove(address)
            if not _users and _ours:
                _end(ray)


def _imported(address: str | None) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Nobody else of this machine may use it; left to itself, Ray writes a token that others can read. It looks for
        # one when it is imported.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "work on several machines") from error
    from ray._private import worker

    # It prints what happens in the cluster on standard output, and has no option against it.
    worker.print_to_stdstream = _to_log
    return ray


def _to_log(data: dict[str, Any], ignore_prefix: bool) -> None:  # noqa: ARG001 (Ray's signature)
    """Takes what Ray would print; its first sentence says what happened, and pages of its own logs follow."""
    log.info("Ray: %s", "".join(data["lines"][:1]).strip().partition(". ")[0].partition("\n")[0])


def _begin(ray: Any, address: str | None, cores: int | None) -> None:
    global _ours  # noqa: PLW0603 (Ray's own connection is the process's)
    if ray.is_initialized():
        if _users and _users[0] != address:
            raise ConfigError(f"this process is connected to the Ray at {_users[0]}; it cannot be to {address} as well")
        return  # ours, or the application's own
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            cores = usable_cores() if cores is None else cores
            size = OBJECT_STORE_BYTES
            ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=size, **options)
        else:
            _require_reachable(address)
            ray.init(address=address, **options)
    except ConfigError:
        raise
    except Exception as error:  # Ray raises whatever it meets, Exception itself too
        ray.shutdown()
        raise ConfigError(
            f"Ray cannot be {'started' if address is None else f'reached at {address}'}: {error}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray takes it for itself
    _ours = True


def _end(ray: Any) -> None:
    global _ours  # noqa: PLW0603
    _ours = False
    ray.shutdown()


def _require_reachable(address: str) -> None:
    """Lets another process connect first, which may be ended when it takes too long or Ray ends it.

    Raises:
        ConfigError: it did not connect.
    """
    cure = (
        "this machine must be a node of the cluster: on the head's, ray start --head; on each other, "
        "ray start --address HEAD:PORT; with the same versions of Ray and Python, and the same token if there is one"
    )
    if address != "auto":
        found = re.fullmatch(r"([A-Za-z0-9_.-]+):([0-9]{1,5})", address)
        if found is None:
            raise ConfigError(f"--address {address!r}: give HOST:PORT of Ray's head, or auto for this machine's node")
        try:
            socket.create_connection((found[1], int(found[2])), timeout=REACH_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--address {address}: nothing listens there ({error}); {cure}") from error
    try:
        command = [sys.executable, "-c", JOIN, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=JOIN_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"--address {address}: no Ray answered within {JOIN_S:.0f} s; {cure}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError(f"--address {address}: Ray refused ({reason}); {cure}")
