"""``ensembler doctor``: what may be wrong with this device, its bundle, its key and its server."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from ensembler.cli.console import Console, a_path
from ensembler.cli.predict import add_connection, client_of
from ensembler.edge_runtime import diagnosis
from ensembler.edge_runtime.diagnosis import Finding
from ensembler.protocol.errors import ConfigError, EnsemblerError, KeyFileError

NAME = "doctor"
HELP = "look at this device: board, runtimes, clock, key, bundle and server"

# In the order of severity.
EXITS = {"ok": 0, "warning": 3, "error": 1}
SIGNS = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", nargs="?", type=a_path, help="a client bundle, to look at that too")
    add_connection(parser, required=False)


def run(options: argparse.Namespace, console: Console) -> int:
    """Looks at everything; the exit status is 1 for an error, 3 for a warning, else 0."""
    if options.server and options.bundle is None:
        raise ConfigError("--server needs the client bundle too: it has the server's public key")
    found = []
    for finding in _findings(options):
        found.append(finding)
        if not console.as_json:
            console.say(_line(finding))
    worst = max(found, key=lambda finding: list(EXITS).index(finding.level)).level
    if console.as_json:
        console.result({"worst": worst, "findings": [asdict(finding) for finding in found]}, "")
    return EXITS[worst]


def _findings(options: argparse.Namespace) -> Iterator[Finding]:
    yield from diagnosis.board()
    yield from diagnosis.system()
    yield from diagnosis.python()
    yield from diagnosis.threads()
    yield from diagnosis.memory()
    yield from diagnosis.heat()
    yield from diagnosis.clock(options.bundle)
    yield from diagnosis.runtimes()
    if options.bundle is not None:
        seen = diagnosis.bundle(options.bundle)
        yield from seen
        if options.server and all(finding.level != "error" for finding in seen):
            yield from _server(options)


def _server(options: argparse.Namespace) -> Iterator[Finding]:
    """Whether the key is there and private, and the server answers with the bundle's nets."""
    try:
        with client_of(options) as client:
            if not options.plaintext:
                yield Finding(check="key", level="ok", words="there, and readable by its owner alone")
            status = client.status()
    except KeyFileError as error:
        yield Finding(check="key", level="error", words=str(error))
        return
    except EnsemblerError as error:
        yield Finding(check="server", level="error", words=str(error))
        return
    if not status["fits"]:
        cure = "ask its operator for the server bundle of the same export"
        yield Finding(check="server", level="error", words="answers, and holds the nets of another bundle", cure=cure)
        return
    words = f"answers: {status['state']}, {status['num_nets']} nets in {status['precision']}"
    yield Finding(check="server", level="ok", words=words)


def _line(finding: Finding) -> str:
    cure = f"\n{'':23}{finding.cure}" if finding.cure else ""
    return f"{SIGNS[finding.level]:8}{finding.check:15}{finding.words}{cure}"
