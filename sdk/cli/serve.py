"""``ensembler serve``: the N nets of a server bundle on a socket, until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from ensembler.cli.console import Console
from ensembler.protocol.errors import KeyFileError
from ensembler.transport import keys
from ensembler.transport.keys import KeyPair

NAME = "serve"
HELP = "run the N nets of a server bundle for many devices"

KEY_VARIABLE = "ENSEMBLER_SERVER_KEY"
KEY_NAME = "server.key_secret"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=Path, help="the folder of a server bundle")
    parser.add_argument(
        "--bind",
        default="tcp://127.0.0.1:5555",
        help="address (default: tcp://127.0.0.1:5555; port * lets the system choose)",
    )
    parser.add_argument(
        "--key",
        type=Path,
        default=None,
        help=f"the server's secret key (default: ${KEY_VARIABLE}, BUNDLE/../keys, ~/.config, /etc)",
    )
    parser.add_argument(
        "--authorized",
        type=Path,
        default=None,
        help="folder of the devices' public keys (default: authorized/ beside the key)",
    )
    parser.add_argument("--plaintext", action="store_true", help="no encryption, and everybody may connect")
    parser.add_argument(
        "--engine",
        default="onnxruntime",
        help="what computes (default: onnxruntime)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        help="computing threads for all nets together (default: the cores)",
    )
    parser.add_argument("--max-batch-rows", type=int, default=64, help="images computed together (default: 64)")
    parser.add_argument("--max-queue-rows", type=int, default=1024, help="images that may wait (default: 1024)")
    parser.add_argument(
        "--batch-wait-ms",
        type=float,
        default=0.0,
        help="wait of a free engine for company (default: 0; a busy one gathers anyway)",
    )
    parser.add_argument(
        "--grace-ms", type=float, default=10_000.0, help="time to finish after SIGTERM (default: 10000)"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Serves until SIGTERM or SIGINT, then drains and returns 0."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    from ensembler.cloud_runtime import engine as engines
    from ensembler.cloud_runtime.batcher import BatchPolicy
    from ensembler.cloud_runtime.server import Server
    from ensembler.transport.zmq_server import ServerSocket

    policy = BatchPolicy(
        max_batch_rows=options.max_batch_rows,
        max_queue_rows=options.max_queue_rows,
        batch_wait_ms=options.batch_wait_ms,
    )
    engine = engines.load(options.bundle, engines.EngineOptions(kind=options.engine, threads=options.threads))
    pair, authorized = (None, frozenset[str]()) if options.plaintext else _identity(options)
    socket = ServerSocket(options.bind, keys=pair, authorized=authorized)
    server = Server(engine, socket, policy)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        server.stop()

    # The handler runs between two bytecodes of this thread, which may be on its way into a poll that nothing else
    # would end: the byte that C code writes at the signal's arrival does.
    signal.set_wakeup_fd(socket.wake_fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    wire = engine.manifest.wire
    security = (
        "plaintext: anyone can connect and read" if pair is None else f"CURVE, {len(authorized)} devices may connect"
    )
    console.result(
        {
            "event": "ready",
            "endpoint": socket.endpoint,
            "bodies_id": wire.bodies_id,
            "num_nets": wire.num_nets,
        },
        f"ready on {socket.endpoint}: {wire.num_nets} nets in {engine.manifest.precision}, "
        f"{engine.describe()}, {security}",
    )
    try:
        server.run(options.grace_ms)
    finally:
        signal.set_wakeup_fd(-1)
        socket.close()
        engine.close()
    return 0


def _identity(options: argparse.Namespace) -> tuple[KeyPair, frozenset[str]]:
    places = [options.bundle.resolve().parent / "keys" / KEY_NAME, *keys.standard_places(KEY_NAME)]
    path = keys.find(options.key, KEY_VARIABLE, places)
    if path is None:
        raise KeyFileError(
            f"no server key: pass --key, set {KEY_VARIABLE}, or put {KEY_NAME} into {places[0].parent}; "
            "ensembler keys new --name server makes a pair"
        )
    folder = options.authorized or path.parent / "authorized"
    authorized = keys.load_authorized(folder)
    if not authorized:
        raise KeyFileError(f"{folder} holds no key, so no device could connect; copy the devices' .key files into it")
    return keys.load_pair(path), authorized
