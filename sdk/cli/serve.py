"""``ensembler serve``: the N nets of server bundles on a socket, until SIGTERM."""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ensembler.cli.console import Console, a_path, need
from ensembler.protocol.errors import ConfigError, KeyFileError
from ensembler.protocol.manifest import of_crypto
from ensembler.protocol.options import require_milliseconds, whole
from ensembler.transport import keys
from ensembler.transport.keys import KeyPair

if TYPE_CHECKING:
    from ensembler.cloud_runtime.http_port import HttpPort
    from ensembler.transport.zmq_server import ServerSocket

NAME = "serve"
HELP = "run the N nets of a server bundle for many devices"

KEY_VARIABLE = "ENSEMBLER_SERVER_KEY"
KEY_NAME = "server.key_secret"
QUEUE_ROWS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundles", metavar="BUNDLE", type=a_path, nargs="+", help="folders of server bundles")
    parser.add_argument(
        "--bind",
        action="append",
        help="address (default: tcp://127.0.0.1:5555; port * lets the system choose); again for another one",
    )
    parser.add_argument(
        "--key",
        type=a_path,
        action="append",
        help=f"the server's secret key (default: ${KEY_VARIABLE}, BUNDLE/../keys, ~/.config, /etc); again for the key "
        "of the next --bind, while devices move from one to the other",
    )
    parser.add_argument(
        "--authorized",
        type=a_path,
        default=None,
        help="folder of the devices' public keys, watched for changes (default: authorized/ beside the first key)",
    )
    parser.add_argument("--plaintext", action="store_true", help="no encryption, and everybody may connect")
    parser.add_argument(
        "--engine",
        default="auto",
        help="what computes: onnxruntime, torch or ray (default: what reads the bundle's format)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=None,
        help="ray: of the cluster's head (default: a Ray of this machine)",
    )
    parser.add_argument(
        "--replicas", type=int, default=1, help="ray: on how many machines each group of nets is (default: 1)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda or auto (default: a GPU where the engine finds one)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        help="computing threads for all nets together (default: what ensembler bench server --tune found, else the "
        "cores)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that compute, replaced when one dies (default: 0, the server itself computes)",
    )
    parser.add_argument(
        "--max-batch-rows",
        type=int,
        default=None,
        help="images computed together (default: what ensembler bench server --tune found, else 64)",
    )
    parser.add_argument(
        "--max-batch-ms", type=float, default=200.0, help="longest time a batch is filled to (default: 200)"
    )
    parser.add_argument(
        "--max-queue-rows", type=int, default=QUEUE_ROWS, help=f"images that may wait (default: {QUEUE_ROWS})"
    )
    parser.add_argument(
        "--max-client-rows",
        type=int,
        default=None,
        help="images of one device that may wait (default: as many as are still free)",
    )
    parser.add_argument(
        "--batch-wait-ms",
        type=float,
        default=0.0,
        help="wait of a free engine for company (default: 0; a busy one gathers anyway)",
    )
    parser.add_argument(
        "--grace-ms", type=float, default=10_000.0, help="time to finish after SIGTERM (default: 10000)"
    )

    parser.add_argument(
        "--http", metavar="HOST:PORT", default=None, help="plain HTTP with /livez, /readyz and /metrics (default: none)"
    )
    parser.add_argument(
        "--control", metavar="PATH", type=a_path, default=None, help="socket for ensembler deploy (default: none)"
    )
    parser.add_argument(
        "--insecure-engine",
        action="store_true",
        help="serve a bundle of crypto-clear inference whose engine protects nothing, for tests",
    )
    parser.add_argument("--log", choices=["text", "json"], default="text", help="of the log (default: text)")
    parser.add_argument("--log-requests", action="store_true", help="a line for every answered request, too")


def run(options: argparse.Namespace, console: Console) -> int:
    """Serves until SIGTERM or SIGINT, then drains and returns 0."""
    _start_log(options)
    if any(of_crypto(bundle) for bundle in options.bundles):
        return _serve_crypto(options, console)
    if options.insecure_engine:
        raise ConfigError("--insecure-engine is for a bundle of crypto-clear inference, and this is none")
    from ensembler.cloud_runtime import engine as engines
    from ensembler.cloud_runtime.batcher import BatchPolicy
    from ensembler.cloud_runtime.control import ControlSocket
    from ensembler.cloud_runtime.deployment import Deployment
    from ensembler.cloud_runtime.http_port import HttpPort
    from ensembler.cloud_runtime.metrics import PrometheusMeter
    from ensembler.cloud_runtime.server import Server
    from ensembler.transport.allow_list import FolderAllowList
    from ensembler.transport.zmq_server import ServerSocket

    policy = BatchPolicy(
        max_batch_rows=BatchPolicy.max_batch_rows if options.max_batch_rows is None else options.max_batch_rows,
        max_batch_ms=options.max_batch_ms,
        max_queue_rows=options.max_queue_rows,
        max_client_rows=options.max_client_rows,
        batch_wait_ms=options.batch_wait_ms,
    )
    require_milliseconds("--grace-ms", options.grace_ms)
    engine_options = engines.EngineOptions(
        kind=options.engine,
        device=options.device,
        threads=options.threads,
        workers=options.workers,
        address=options.address,
        replicas=options.replicas,
    )
    meter = PrometheusMeter() if options.http else None
    with ExitStack() as opened:
        loading = opened.enter_context(ExitStack())
        loaded = []
        for bundle in options.bundles:
            loaded.append(engines.load(bundle, engine_options))
            loading.callback(loaded[-1].close)
        if options.max_batch_rows is None and (rows := engines.tuned_rows(options.bundles, engine_options)):
            policy = replace(policy, max_batch_rows=rows)
        pairs, folder = _identity(options)
        allowed = frozenset[str]() if folder is None else opened.enter_context(closing(FolderAllowList(folder)))
        binds = options.bind or ["tcp://127.0.0.1:5555"]
        socket = opened.enter_context(closing(ServerSocket(binds[0], keys=pairs[0], authorized=allowed)))
        endpoints = [socket.endpoint, *(socket.listen(*more) for more in zip(binds[1:], pairs[1:], strict=True))]
        server = Server(loaded[0], socket, policy, meter=meter)
        for index in range(1, len(loaded)):
            server.add(loaded[index])
        http = None
        if meter is not None:
            meter.watch(server.describe)
            http = opened.enter_context(closing(HttpPort(options.http, server, meter)))
        if options.control is not None:
            deployment = Deployment(server, engine_options)
            opened.enter_context(closing(ControlSocket(options.control, deployment.handle)))

        _stop_at_signals(opened, socket, server.stop)
        first = loaded[0].manifest
        security = "plaintext: anyone can connect and read"
        if folder is not None:
            security = f"CURVE, {len(allowed)} devices may connect"
        console.result(
            {
                "event": "ready",
                "endpoint": socket.endpoint,
                "endpoints": endpoints,
                "bodies_id": first.wire.bodies_id,
                "num_nets": first.wire.num_nets,
                "http": None if http is None else http.address,
            },
            f"ready on {', '.join(endpoints)}: "
            + "; ".join(f"{one.manifest.wire.num_nets} nets in {one.manifest.precision}" for one in loaded)
            + f", {loaded[0].describe()}, {security}{_told(http)}",
        )
        loading.pop_all()  # the server closes them, unless one is stuck
        loaded.clear()  # a version that is replaced shall be gone
        # What is here now stays: the collector need not look through all libraries' objects while requests wait.
        gc.freeze()
        server.run(options.grace_ms)
    return 0


def _serve_crypto(options: argparse.Namespace, console: Console) -> int:
    """Serves one bundle of crypto-clear inference."""
    need(["ensembler.crypto.server"], "crypto", "serving crypto-clear inference")
    from ensembler.cloud_runtime.engine import MAX_THREADS
    from ensembler.cloud_runtime.http_port import HttpPort
    from ensembler.crypto.metrics import CryptoMeter
    from ensembler.crypto.server import CryptoServer
    from ensembler.transport.allow_list import FolderAllowList
    from ensembler.transport.zmq_server import ServerSocket

    if len(options.bundles) > 1 or len(options.bind or []) > 1:
        raise ConfigError("a server of crypto-clear inference has one bundle and one --bind")
    given = {
        "--control": options.control,
        "--workers": options.workers,
        "--max-batch-rows": options.max_batch_rows,
        "--max-client-rows": options.max_client_rows,
        "--address": options.address,
        "--engine": options.engine != "auto",
        "--device": options.device != "auto",
        "--replicas": options.replicas != 1,
        "--max-queue-rows": options.max_queue_rows != QUEUE_ROWS,
        "--batch-wait-ms": options.batch_wait_ms,
    }
    if unused := [name for name, value in given.items() if value]:
        raise ConfigError(f"a server of crypto-clear inference has no {' and no '.join(unused)}: one image at a time")
    require_milliseconds("--grace-ms", options.grace_ms)
    meter = CryptoMeter() if options.http else None
    with ExitStack() as opened:
        (pair,), folder = _identity(options)
        allowed = frozenset[str]() if folder is None else opened.enter_context(closing(FolderAllowList(folder)))
        bind = (options.bind or ["tcp://127.0.0.1:5555"])[0]
        socket = opened.enter_context(closing(ServerSocket(bind, keys=pair, authorized=allowed)))
        server = CryptoServer(
            socket,
            options.bundles[0],
            allow_insecure=options.insecure_engine,
            threads=whole("--threads", 1 if options.threads is None else options.threads, 1, MAX_THREADS),
            meter=meter,
        )
        http = None
        if meter is not None:
            meter.watch(server.describe)
            http = opened.enter_context(closing(HttpPort(options.http, server, meter)))
        _stop_at_signals(opened, socket, server.stop)
        manifest = server.manifest
        security = "plaintext: anyone can connect" if folder is None else f"CURVE, {len(allowed)} devices may connect"
        shape = "x".join(map(str, manifest.boundary_shape))
        console.result(
            {
                "event": "ready",
                "endpoint": socket.endpoint,
                "endpoints": [socket.endpoint],
                "bodies_id": manifest.net_id,
                "engine": manifest.settings.engine,
                "boundary": manifest.boundary,
                "http": None if http is None else http.address,
            },
            f"ready on {socket.endpoint}: crypto-clear inference by {manifest.settings.engine} up to "
            f"{manifest.boundary} ({shape}), {security}{_told(http)}",
        )
        server.run(options.grace_ms)
    return 0


def _told(http: HttpPort | None) -> str:
    """The end of the ready line: where probes come, whose port the system may have chosen."""
    return "" if http is None else f", HTTP on {http.address}"


def _stop_at_signals(opened: ExitStack, socket: ServerSocket, stop: Callable[[], None]) -> None:
    """Has SIGTERM and SIGINT end the server."""

    def ended(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop()

    # The handler runs between two bytecodes of this thread, which may be on its way into a poll that nothing else
    # would end: the byte that C code writes at the signal's arrival does.
    signal.set_wakeup_fd(socket.wake_fileno(), warn_on_full_buffer=False)
    opened.callback(signal.set_wakeup_fd, -1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ended)


def _start_log(options: argparse.Namespace) -> None:
    from ensembler.cloud_runtime.logs import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if options.log == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if options.log_requests:
        logging.getLogger("ensembler.server").setLevel(logging.DEBUG)
        logging.getLogger("ensembler.server.http").setLevel(logging.INFO)  # probes are no requests of devices


def _identity(options: argparse.Namespace) -> tuple[list[KeyPair | None], Path | None]:
    """The key pair of every address, and the folder of the devices' keys; None without encryption."""
    count = len(options.bind or [""])
    if options.plaintext:
        given = [name for name, value in (("--key", options.key), ("--authorized", options.authorized)) if value]
        if given:
            raise ConfigError(f"--plaintext takes no {' and no '.join(given)}: without encryption nobody is told apart")
        return [None] * count, None
    given = options.key or [None]
    if len(given) not in (1, count):
        raise ConfigError(
            f"--key is given {len(given)} times and --bind {count} times; give one key, or one for every address in "
            "the same order"
        )
    places = [options.bundles[0].resolve().parent / "keys" / KEY_NAME, *keys.standard_places(KEY_NAME)]
    paths = [keys.find(one, KEY_VARIABLE, places) for one in given]
    found = [path for path in paths if path is not None]
    if not found:
        raise KeyFileError(
            f"no server key: pass --key, set {KEY_VARIABLE}, or put {KEY_NAME} into {places[0].parent}; "
            "ensembler keys new --name server makes a pair"
        )
    pairs: list[KeyPair | None] = [keys.load_pair(path) for path in found]
    return (pairs if len(pairs) == count else pairs * count), options.authorized or found[0].parent / "authorized"
