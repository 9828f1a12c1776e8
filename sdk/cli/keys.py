"""``ensembler keys``: CURVE key pairs, keys that encrypt client bundles, and keys that sign privacy cards."""

from __future__ import annotations

import argparse
from pathlib import Path

from ensembler.cli.console import Console, a_path
from ensembler.edge_runtime import sealing, signing
from ensembler.protocol.errors import ConfigError
from ensembler.transport import keys

NAME = "keys"
HELP = "make a CURVE key pair for a device or a server, or a key that encrypts bundles or signs privacy cards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "action",
        choices=["new", "bundle", "signing"],
        help="new: a CURVE pair; bundle: a key for bundles; signing: a key for privacy cards",
    )
    parser.add_argument("file", nargs="?", type=a_path, help="bundle, signing: the key file to make")
    parser.add_argument("--out", type=a_path, default=None, help="new: folder for the two files (default: keys)")
    parser.add_argument("--name", default=None, help="new: name of the files (default: device)")


def run(options: argparse.Namespace, console: Console) -> int:
    """Makes one pair, or one key."""
    if options.action == "new":
        return _pair(options, console)
    if options.file is None or options.out is not None or options.name is not None:
        raise ConfigError(
            f"keys {options.action} needs the file to make, and nothing else: ensembler keys {options.action} FILE"
        )
    if options.action == "bundle":
        sealing.create_key(options.file)
        text = f"{options.file}  secret: encrypts bundles (ensembler-export --encrypt-key) and opens them on the device"
        console.result({"key": str(options.file)}, text)
        return 0
    public = signing.create_key(options.file)
    text = f"{options.file}  secret: signs privacy cards (--signing-key)\n{public}  public: applications may pin it"
    console.result({"key": str(options.file), "public": public}, text)
    return 0


def _pair(options: argparse.Namespace, console: Console) -> int:
    if options.file is not None:
        raise ConfigError(f"keys new takes no file, {options.file} was given; use --out and --name")
    public, secret = keys.create(options.out or Path("keys"), "device" if options.name is None else options.name)
    text = f"{public}  public: give it to the other side\n{secret}  secret: stays here, readable by you alone"
    console.result({"public": str(public), "secret": str(secret)}, text)
    return 0
