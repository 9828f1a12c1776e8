"""``ensembler export`` and ``ensembler-export``: a run folder to bundles, with keys and the parity report."""

from __future__ import annotations

import argparse
import shutil
from contextlib import suppress
from pathlib import Path

from ensembler.cli.console import Console, need_export
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import Precision
from ensembler.transport import keys

NAME = "export"
HELP = "turn a run into a quantised client bundle and a server bundle"

KEYS_FOLDER = "keys"
AUTHORIZED_FOLDER = "authorized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("run", type=Path, help="the run folder of ensembler train")
    parser.add_argument("--out", type=Path, required=True, help="gets client/, server/, keys/ and parity.json")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="of the client's models (default: onnx)")
    parser.add_argument("--quantize", choices=["int8", "none"], default="int8", help="head and tail (default: int8)")
    parser.add_argument(
        "--server-precision",
        choices=["auto", "int8", "float32"],
        default="auto",
        help="bodies; auto: int8 where that reaches the gate, else float32 (default: auto)",
    )
    parser.add_argument("--server-bundle", type=Path, default=None, help="make only a client, for this server bundle")
    parser.add_argument(
        "--server-key", type=Path, default=None, help="the server's public key file, to pin in the client"
    )
    parser.add_argument(
        "--plaintext", action="store_true", help="pin no key and make none: unencrypted connections only"
    )
    parser.add_argument("--data", default=None, help="where the run's data is now, if it moved")
    parser.add_argument(
        "--parity-images", type=int, default=10_000, help="held-out images in the report (default: 10000)"
    )
    parser.add_argument("--min-sqnr-db", type=float, default=35.0, help="gate (default: 35)")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.5, help="gate, in points (default: 0.5)")


def run(options: argparse.Namespace, console: Console) -> int:
    """Exports."""
    need_export()
    from ensembler.export.parity import Gates
    from ensembler.export.pipeline import ExportOptions, export

    if options.parity_images < 1:
        raise ConfigError(f"--parity-images {options.parity_images}: at least one")
    if options.server_bundle is not None and options.server_key is None and not options.plaintext:
        raise ConfigError("--server-bundle needs --server-key: the public key of the server that serves it")
    made_keys, server_key = None, None
    made_folder = not options.out.exists()
    if options.server_key is not None:
        server_key = keys.load_public(options.server_key)
    elif not options.plaintext:
        made_keys = options.out / KEYS_FOLDER
        server_key = new_keys(made_keys)
    precision: Precision = "int8" if options.quantize == "int8" else "float32"
    try:
        report = export(
            options.run,
            options.out,
            ExportOptions(
                client_precision=precision,
                server_precision=options.server_precision,
                server_bundle=options.server_bundle,
                server_public_key=server_key,
                data=options.data,
                parity_images=options.parity_images,
                gates=Gates(min_sqnr_db=options.min_sqnr_db, max_accuracy_drop_points=options.max_accuracy_drop),
            ),
            progress=console.say,
        )
    except BaseException:
        if made_keys is not None:
            shutil.rmtree(made_keys, ignore_errors=True)
        if made_folder:
            with suppress(OSError):  # not there, or not empty
                options.out.rmdir()
        raise
    document = {"client": str(options.out / "client"), "parity": str(options.out / "parity.json")}
    lines = [report.table(), "", f"{options.out / 'client'}: the client bundle, secret: for the device only"]
    if options.server_bundle is None:
        document["server"] = str(options.out / "server")
        lines.append(f"{options.out / 'server'}: the server bundle, for the operator")
    if made_keys is not None:
        document["keys"] = str(made_keys)
        lines.append(
            f"{made_keys}: new keys; the server needs server.key_secret and authorized/, the device device.key_secret"
        )
    lines.append(f"next: ensembler serve {options.server_bundle or options.out / 'server'} --bind tcp://0.0.0.0:5555")
    console.result(document, "\n".join(lines))
    return 0


def new_keys(folder: Path) -> str:
    """Makes a server's and a device's pair, the device authorised; returns the server's public key."""
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another --out, or pass --server-key with the key to pin")
    public, _ = keys.create(folder, "server")
    device, _ = keys.create(folder, "device")
    authorized = folder / AUTHORIZED_FOLDER
    authorized.mkdir(mode=0o700)
    shutil.copy(device, authorized / device.name)
    return keys.load_public(public)
