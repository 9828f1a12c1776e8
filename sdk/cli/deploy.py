"""``ensembler deploy``: another version, or other nets, on a server that goes on serving."""

from __future__ import annotations

import argparse

from ensembler.cli.console import Console, a_path, positive
from ensembler.protocol.errors import ConfigError

NAME = "deploy"
HELP = "load a server bundle into a running server, list or remove what it holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=a_path, nargs="?", help="the folder of a server bundle")
    parser.add_argument("--control", type=a_path, required=True, help="the socket that serve --control made")
    parser.add_argument("--list", action="store_true", help="say what the server holds")
    parser.add_argument(
        "--remove", metavar="BODIES_ID", default=None, help="serve these nets no more; its beginning does"
    )
    parser.add_argument(
        "--timeout-s", type=positive(float), default=300.0, help="for loading, warming up and draining (default: 300)"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Asks the server and says what it did."""
    from ensembler.cloud_runtime import control
    from ensembler.cloud_runtime.models import SHOWN_DIGITS as DIGITS

    if (options.bundle is not None) + options.list + (options.remove is not None) != 1:
        raise ConfigError("give a bundle to deploy, or --list, or --remove BODIES_ID")
    if options.list:
        found = control.ask(options.control, {"do": "models"}, options.timeout_s)
        lines = [
            f"{model['bodies_id'][:DIGITS]}  version {model['version'][:DIGITS]}  {model['num_nets']} nets in "
            f"{model['precision']}, {model['engine']}{'' if model['alive'] else ', which is not alive'}"
            for model in found["models"]
        ]
        console.result(found, "\n".join(lines) or "the server holds no nets")
        return 0
    if options.remove is not None:
        found = control.ask(options.control, {"do": "remove", "nets": options.remove}, options.timeout_s)
        console.result(found, f"removed {found['bodies_id'][:DIGITS]}{_left(found)}")
        return 0
    request = {"do": "deploy", "bundle": str(options.bundle.resolve())}
    found = control.ask(options.control, request, options.timeout_s)
    before = (
        f" in the place of {found['replaced'][:DIGITS]}{_left(found)}" if found["replaced"] else " beside the others"
    )
    console.result(found, f"{found['bodies_id'][:DIGITS]} is served in version {found['version'][:DIGITS]}{before}")
    return 0


def _left(found: dict[str, object]) -> str:
    return "" if found["unloaded"] else ", which still finishes what it had"
