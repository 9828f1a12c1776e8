"""``ensembler install-bundle``: put a client bundle into its place on this device, and take it back."""

from __future__ import annotations

import argparse
import pwd

from ensembler.cli.console import Console, a_path
from ensembler.edge_runtime import installing
from ensembler.protocol.errors import ConfigError

NAME = "install-bundle"
HELP = "put a client bundle into its place on this device; the one before is kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", nargs="?", type=a_path, help="the folder of a client bundle")
    parser.add_argument("--rollback", action="store_true", help="take the bundle before into use again")
    parser.add_argument(
        "--to", type=a_path, metavar="PLACE", help="default: /etc/ensembler for root, else ~/.config/ensembler"
    )
    parser.add_argument("--owner", metavar="USER", help="who shall own the files (root only)")


def run(options: argparse.Namespace, console: Console) -> int:
    """Installs or rolls back."""
    place = options.to or installing.standard_place()
    if options.rollback:
        if options.bundle is not None or options.owner is not None:
            raise ConfigError("--rollback takes neither a bundle nor --owner: it takes what is there")
        link = installing.roll_back(place)
        did = "the bundle before is in use again"
    else:
        if options.bundle is None:
            raise ConfigError("give the folder of a client bundle, or --rollback")
        link = installing.install(options.bundle, place, _owner(options.owner))
        did = "installed; its owner alone can read it"
    text = f"{link}: {did}; programs that run take it when they are started again"
    if (place / installing.BEFORE).exists():
        to = "" if options.to is None else f" --to {options.to}"
        text += f"\nthe one before comes back with: ensembler install-bundle --rollback{to}"
    console.result({"bundle": str(link), "is": str(link.resolve())}, text)
    return 0


def _owner(name: str | None) -> tuple[int, int] | None:
    if name is None:
        return None
    try:
        found = pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise ConfigError(f"--owner {name}: this machine has no such user") from None
    return found.pw_uid, found.pw_gid
