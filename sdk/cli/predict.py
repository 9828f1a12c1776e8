"""``ensembler predict``: classify images from the shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ensembler.cli.console import Console, a_path
from ensembler.client import BUNDLE_KEY_VARIABLE, EdgeClient
from ensembler.edge_runtime import sealing
from ensembler.edge_runtime.backends import BACKENDS
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import of_crypto

NAME = "predict"
HELP = "classify images with a client bundle and a server"

BAR = 30  # characters
ERASE = "\033[K"  # the terminal's line from here on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=a_path, help="the folder of a client bundle")
    parser.add_argument("images", nargs="+", help="image files")
    add_connection(parser)
    add_backend(parser)
    parser.add_argument("--top-k", type=int, default=3, help="classes to show (default: 3)")


def add_connection(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declares the options of a verb that asks a server: addresses, keys, deadline."""
    parser.add_argument(
        "--server",
        action="append",
        required=required,
        help="tcp://host:port; once for each operator, in the export's order; several addresses with commas are "
        "replicas of one operator",
    )
    parser.add_argument(
        "--server-key",
        action="append",
        metavar="[ADDRESS=]KEY",
        help="the server's public key instead of the pinned one, a file or its 40 characters; once for each ADDRESS",
    )
    parser.add_argument("--key", type=a_path, default=None, help="the device's secret key file")
    add_bundle_secret(parser)
    parser.add_argument("--plaintext", action="store_true", help="connect without encryption")
    parser.add_argument(
        "--timeout-ms",
        type=float,
        default=None,
        help="deadline of each answer (default: 5000; with a bundle of crypto-clear inference 120000)",
    )
    parser.add_argument(
        "--insecure-engine",
        action="store_true",
        help="take a bundle of crypto-clear inference whose engine protects nothing, for tests",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Declares the option of a verb that runs the models."""
    parser.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)}, or auto (default: auto)")


def add_bundle_secret(parser: argparse.ArgumentParser) -> None:
    """Declares the options that open an encrypted bundle."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--bundle-key", type=a_path, default=None, help="the key file of an encrypted bundle")
    group.add_argument(
        "--passphrase-file",
        type=a_path,
        default=None,
        help=f"a file with the passphrase of an encrypted bundle (default of both: ${BUNDLE_KEY_VARIABLE})",
    )


def bundle_secret(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of ``EdgeClient`` for those options."""
    if options.passphrase_file is None:
        return {"bundle_key": options.bundle_key}
    return {"passphrase": sealing.passphrase_of(options.passphrase_file)}


def client_of(options: argparse.Namespace, **more: Any) -> EdgeClient:
    """Returns a client as the options of a verb say that has the connection's; ``more`` are arguments beside those."""
    return EdgeClient(
        options.bundle,
        options.server,
        key=options.key,
        server_key=_server_key(options.server_key),
        **bundle_secret(options),
        plaintext=options.plaintext,
        timeout_ms=options.timeout_ms,
        insecure_engine=options.insecure_engine,
        **more,
    )


def _server_key(given: list[str] | None) -> str | dict[str, str] | None:
    """Returns the argument of ``EdgeClient`` for what ``--server-key`` said."""
    if not given:
        return None
    # A key may have the same signs in it as an address before it, and both together may look like a key.
    pairs = [_split(each) if each.startswith(("tcp://", "ipc://")) else ("", each) for each in given]
    if len(pairs) == 1 and not pairs[0][0]:
        return pairs[0][1]
    addresses = [address for address, _ in pairs]
    if "" in addresses or len(set(addresses)) < len(addresses):
        raise ConfigError("--server-key: give one key for all servers, or ADDRESS=KEY once for each address")
    return dict(pairs)


def _split(pair: str) -> tuple[str, str]:
    address, _, key = pair.partition("=")
    return address, key


def run(options: argparse.Namespace, console: Console) -> int:
    """Predicts one image after the other."""
    documents: list[dict[str, Any]] = []
    lines: list[str] = []
    with (
        _told(console, documents, lines),
        _bar(options.bundle) as more,
        client_of(options, backend=options.backend, top_k=options.top_k, **more) as client,
    ):
        for image in options.images:
            result = client.predict(image)
            best = ", ".join(f"{name} {100 * score:.1f}%" for name, score in result.top_k)
            times = result.timings
            lines.append(
                f"{image}: {best}  ({times.total:.1f} ms: head {times.head:.1f}, queue {times.queue:.1f}, "
                f"server {times.server:.1f}, network {times.network:.1f}, tail {times.tail:.1f}; "
                f"{result.bytes_up} bytes up, {result.bytes_down} down)"
            )
            documents.append(
                {
                    "image": image,
                    "label": result.label,
                    "score": result.score,
                    "top_k": [list(item) for item in result.top_k],
                    "timings_ms": asdict(times),
                    "bytes_up": result.bytes_up,
                    "bytes_down": result.bytes_down,
                }
            )
    return 0


@contextmanager
def _told(console: Console, documents: list[dict[str, Any]], lines: list[str]) -> Iterator[None]:
    """Gives the answers at the end; where that is an error, those that came before it."""
    try:
        yield
    finally:
        if documents:
            console.result({"predictions": documents}, "\n".join(lines))


@contextmanager
def _bar(bundle: Path) -> Iterator[dict[str, Any]]:
    """Gives the argument of ``EdgeClient`` that draws how far two parties are, where there are two, and a terminal."""
    if not (sys.stderr.isatty() and of_crypto(bundle)):
        yield {}
        return

    def shown(done: int, layers: int) -> None:
        bar = "#" * (BAR * done // layers)
        text = f"two-party computation: {bar:.<{BAR}} {done} of {layers} layers"
        print(f"\r{text}{ERASE}", end="", file=sys.stderr, flush=True)

    try:
        yield {"progress": shown}
    finally:
        print(f"\r{ERASE}", end="", file=sys.stderr, flush=True)
