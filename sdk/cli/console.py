"""What all verbs share: the parser, exit statuses, output for people and for scripts, progress bars."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO

from ensembler import __version__
from ensembler.protocol.errors import EnsemblerError, InvalidInputError, MissingExtraError
from ensembler.protocol.manifest import is_curve_key

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class Verb(Protocol):
    """A module of this package: one verb."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the options."""

    def run(self, options: argparse.Namespace, console: Console) -> int:
        """Does the work; returns the exit status."""


class Console:
    """Where a verb writes. With ``--json`` standard output gets exactly one JSON document per ``result``."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, text: str) -> None:
        """Tells a person; goes to standard error when a script reads standard output."""
        _print(text, sys.stderr if self.as_json else sys.stdout)

    def result(self, document: dict[str, Any], text: str) -> None:
        """Gives the outcome, as JSON or as text."""
        if self.as_json:
            text = json.dumps(document, ensure_ascii=False)
            if _escaped(text, sys.stdout) != text:
                text = json.dumps(document)
        _print(text, sys.stdout)

    def error(self, kind: str, message: str) -> None:
        """Tells what went wrong, on standard error."""
        text = f"ensembler: {message}"
        if self.as_json:
            text = json.dumps({"error": {"type": kind, "message": message}}, ensure_ascii=False)
        print(text, file=sys.stderr, flush=True)


def _escaped(text: str, stream: TextIO) -> str:
    """Returns ``text`` with what the stream's encoding lacks as escapes: a file's name may be no text at all."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _print(text: str, stream: TextIO) -> None:
    print(_escaped(text, stream), file=stream, flush=True)


class _Parser(argparse.ArgumentParser):
    """Tells a wrong use as JSON where a script asked for that, though the options are not parsed yet."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """See ``argparse``; the exit status is the same."""
        if not _Parser.as_json:
            super().error(message)
        Console(as_json=True).error("ConfigError", f"{message}; {self.prog} --help lists what there is")
        self.exit(EXIT_BAD_INPUT)


def run_command(program: str, verbs: Sequence[Any], arguments: list[str] | None) -> int:
    """Parses, runs and turns errors into exit statuses: 2 for what the user gave, 1 for the rest, 130 for Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    _Parser.as_json = "--json" in given
    parser = _Parser(prog=program, description="Private collaborative inference.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ensembler-edge {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    by_name = {}
    for verb in verbs:
        sub = subparsers.add_parser(verb.NAME, help=verb.HELP, description=verb.HELP, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="one JSON document on standard output, for scripts")
        verb.add_arguments(sub)
        by_name[verb.NAME] = verb
    options = parser.parse_args(_keys_joined(given))
    console = Console(as_json=options.json)
    try:
        status: int = by_name[options.verb].run(options, console)
    except EnsemblerError as error:
        console.error(type(error).__name__, str(error))
        return EXIT_BAD_INPUT if isinstance(error, InvalidInputError) else EXIT_FAILED
    except BrokenPipeError:
        # Whoever read the output has gone, as head does; at its end Python would try to write the rest once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:  # of the system, at a place that no package maps: a disk that fills up, a file that goes
        where = f"{error.filename}: " if error.filename is not None else ""
        console.error(type(error).__name__, f"{where}{error.strerror or error}")
        return EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        console.error("KeyboardInterrupt", "; ".join(["interrupted", *map(str, interrupt.args)]))
        return EXIT_INTERRUPTED
    return status


def _keys_joined(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with each key as ``--server-key=KEY``: one in 82 begins with a dash, as options do."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--server-key" and is_curve_key(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def need(packages: Sequence[str], extra: str, purpose: str) -> None:
    """Raises ``MissingExtraError`` unless all ``packages`` can be imported."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, extra, purpose) from error


def need_torch() -> None:
    """Raises ``MissingExtraError`` unless the training packages are installed."""
    need(("torch", "safetensors", "rich"), "train", "training")


def need_export() -> None:
    """Raises ``MissingExtraError`` unless the exporting packages are installed."""
    need(("torch", "safetensors", "rich", "onnx", "onnxscript", "onnxruntime"), "export", "exporting")


class ProgressReporter:
    """Draws training progress: a bar on a terminal, a line per finished piece elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.console import Console as RichConsole

        self._rich = RichConsole(stderr=console.as_json, highlight=False)
        self._progress: Any = None
        self._task: Any = None
        self._label = ""

    def begin(self, label: str, total: int) -> None:
        """See ``training.fit.Reporter``."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._label = label
        if self._rich.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
                console=self._rich,
                transient=True,
            )
            self._task = self._progress.add_task(label, total=total, detail="")
            self._progress.start()

    def step(self, detail: str) -> None:
        """See ``training.fit.Reporter``."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, detail=detail)

    def end(self, summary: str) -> None:
        """See ``training.fit.Reporter``."""
        self.close()
        self._rich.print(f"{self._label}: {summary}")

    def close(self) -> None:
        """Takes an unfinished bar off the terminal, so that an error begins a line of its own."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def a_path(text: str) -> Path:
    """An argparse type: an empty text, as of a variable that a script forgot to set, is no folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is no path")
    return Path(text)


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Returns an argparse type for numbers above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse
