"""``ensembler keys new``: CURVE key pairs for devices and servers."""

from __future__ import annotations

import argparse
from pathlib import Path

from ensembler.cli.console import Console
from ensembler.transport import keys

NAME = "keys"
HELP = "make a CURVE key pair for a device or a server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("action", choices=["new"], help="what to do")
    parser.add_argument("--out", type=Path, default=Path("keys"), help="folder for the two files (default: keys)")
    parser.add_argument("--name", default="device", help="name of the files (default: device)")


def run(options: argparse.Namespace, console: Console) -> int:
    """Makes one pair."""
    public, secret = keys.create(options.out, options.name)
    text = f"{public}  public: give it to the other side\n{secret}  secret: stays here, readable by you alone"
    console.result({"public": str(public), "secret": str(secret)}, text)
    return 0
