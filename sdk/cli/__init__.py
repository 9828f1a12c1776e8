"""The command line: one module per verb, composed here. Start reading at ``main``.

It is the only place that joins packages which must not know each other.
"""

from __future__ import annotations

import sys

from ensembler.cli.console import EXIT_INTERRUPTED, Console, run_command

if __name__ != "ensembler.cli":
    raise ImportError(f"import ensembler.cli, not {__name__}")

__all__ = ["export_main", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Runs ``ensembler VERB ...``; returns the exit status."""
    try:
        from ensembler.cli import (
            audit,
            bench,
            boundary,
            card,
            cuts,
            demo,
            deploy,
            doctor,
            export,
            install_bundle,
            keys,
            personalize,
            predict,
            serve,
            train,
            watch,
        )
    except KeyboardInterrupt:
        Console(as_json="--json" in (arguments or sys.argv)).error("KeyboardInterrupt", "interrupted")
        return EXIT_INTERRUPTED
    verbs = (
        *(demo, cuts, train, personalize, audit, boundary, card, export, serve, deploy),
        *(predict, watch, keys, install_bundle, doctor, bench),
    )
    return run_command("ensembler", verbs, arguments)


def export_main() -> int:
    """Runs ``ensembler-export ...``, the same as ``ensembler export ...``."""
    return main(["export", *sys.argv[1:]])
