"""``ensembler watch``: a service for a device that answers every image that arrives in a folder, or a camera's."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from ensembler.cli.console import EXIT_INTERRUPTED, Console, a_path
from ensembler.cli.journal import Journal
from ensembler.cli.predict import add_backend, add_connection, client_of
from ensembler.client import EdgeClient
from ensembler.edge_runtime.images import ImageLike, to_pixels
from ensembler.fallback import cloud_is_away
from ensembler.prediction import Prediction
from ensembler.protocol.errors import BusyError, ConfigError, EnsemblerError, ImageError
from ensembler.protocol.manifest import ImageSpec
from ensembler.sources import Arrival, Frame, arrivals, camera_frames
from ensembler.streaming import answers, checked_in_flight

NAME = "watch"
HELP = "answer every image that arrives in a folder, or a camera's, until SIGTERM"

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=a_path, help="the folder of a client bundle")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=a_path, help="answer the image files that are in it and that arrive")
    source.add_argument("--camera", action="store_true", help="answer the newest frame of a Raspberry Pi's camera")
    add_connection(parser)
    add_backend(parser)
    parser.add_argument("--results", type=a_path, help="append the lines to this file (default: standard output)")
    parser.add_argument(
        "--after",
        choices=["keep", "delete"],
        default="keep",
        help="what becomes of an image that was answered; delete needs --results (default: keep)",
    )
    parser.add_argument("--in-flight", type=int, default=4, help="images under way at once (default: 4)")


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """An answer or an error; ``read_ms`` is what reading and decoding took."""

    image: Arrival | Frame
    read_ms: float
    result: Prediction | None = None
    error: EnsemblerError | None = None


class _Service:
    """Answers one image after the other, in several threads, with patience for the server."""

    def __init__(self, client: EdgeClient, console: Console, stop: threading.Event) -> None:
        height, width = client.info().image_size
        self._spec = ImageSpec(height=height, width=width)
        self._client, self._console, self._stop = client, console, stop
        self._lock = threading.Lock()
        self._away = False
        self._answered = 0.0

    def answer(self, image: Arrival | Frame) -> _Outcome | None:
        """Returns what becomes of an image; None if the service was stopped before the server answered.

        Raises:
            EnsemblerError: what trying again does not cure; the service is stopping then.
        """
        try:
            return self._answer(image)
        except BaseException:
            self._stop.set()  # the source would wait for its next image
            raise

    def _answer(self, image: Arrival | Frame) -> _Outcome | None:
        begun = time.monotonic()
        given: ImageLike = image.path if isinstance(image, Arrival) else image
        # Read once, however often it is sent; and not within a deadline that a large file would always miss.
        try:
            pixels = to_pixels(given, self._spec)
        except ImageError as error:
            return _Outcome(image=image, read_ms=1000 * (time.monotonic() - begun), error=error)
        read_ms = 1000 * (time.monotonic() - begun)
        wait_s = FIRST_WAIT_S
        while True:
            asked = time.monotonic()
            try:
                result = self._client.predict(pixels)
            except EnsemblerError as error:
                if not cloud_is_away(error):
                    raise
                self._tell(error, asked)
                busy_s = error.retry_after_ms / 1000 if isinstance(error, BusyError) else 0.0
                stopped = self._stop.wait(min(max(wait_s, busy_s), LONGEST_WAIT_S))
                if not isinstance(image, Arrival):  # the next frame is worth more than another try
                    return _Outcome(image=image, read_ms=read_ms, error=error)
                if stopped:
                    return None
                wait_s *= 2
            else:
                self._tell(None, asked)
                return _Outcome(image=image, read_ms=read_ms, result=result)

    def _tell(self, error: EnsemblerError | None, asked: float) -> None:
        """Says on standard error that the server went or came back, once for each.

        Args:
            error: of a call that failed; None for one that was answered.
            asked: when the call began. One that began before another was answered says nothing of the server any more.
        """
        with self._lock:
            if error is None:
                self._answered = time.monotonic()
            elif asked < self._answered:
                return
            if self._away == (error is not None):
                return
            self._away = error is not None
            text = "the server answers again" if error is None else f"{error}; trying again until there is an answer"
            _note(self._console, {"event": "away" if error else "back", "message": text}, f"ensembler: {text}")


def run(options: argparse.Namespace, console: Console) -> int:
    """Answers until SIGTERM (status 0) or Ctrl-C (130), then finishes what is in flight."""
    in_flight = checked_in_flight(options.in_flight)
    if options.after == "delete" and (options.results is None or options.folder is None):
        raise ConfigError("--after delete needs --folder and --results: an image goes when its line is on the disk")
    stop = threading.Event()
    signals: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        signals.append(number)
        stop.set()

    with ExitStack() as stack:
        client = stack.enter_context(client_of(options, backend=options.backend))
        service = _Service(client, console, stop)
        _source(options, stop)  # asked before a file of results is made: whether there is such a folder or camera
        journal = stack.enter_context(closing(Journal(options.results)))
        names = set() if options.camera else {path.name for path in options.folder.iterdir()}
        source = _source(options, stop, journal.answered(names))
        # What ``EdgeClient.stream`` is made of, and not ``stream`` itself: that ends at the first error and drops what
        # is in flight, where here every image is tried again in its own place.
        outcomes = stack.enter_context(
            closing(answers(service.answer, source, in_flight=in_flight, newest=options.camera))
        )
        stack.callback(stop.set)  # first of all, so that nothing waits any more when the rest is closed
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        _ready(options, console)
        for index, outcome in outcomes:
            if outcome is not None:
                journal.add(_line(index, outcome))
                if options.after == "delete" and outcome.result is not None:
                    journal.sync()
                    _remove(outcome.image)
    return EXIT_INTERRUPTED if signals[:1] == [signal.SIGINT] else 0


def _source(
    options: argparse.Namespace, stop: threading.Event, seen: Iterable[tuple[str, int]] = ()
) -> Iterator[Arrival | Frame]:
    return camera_frames(stop=stop) if options.camera else arrivals(options.folder, seen=seen, stop=stop)


def _line(index: int, outcome: _Outcome) -> dict[str, Any]:
    """Returns a line of the results; ``time`` comes first, see ``journal.HEAD``."""
    image = outcome.image
    line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
    if isinstance(image, Arrival):
        line |= {"name": image.path.name, "mtime_ns": image.mtime_ns}
    else:
        line |= {"name": f"frame {index}"}
    if outcome.result is not None:
        result = outcome.result
        times = {"read": outcome.read_ms, **asdict(result.timings)}
        return line | {"label": result.label, "score": result.score, "timings_ms": times}
    return line | {"error": {"type": type(outcome.error).__name__, "message": str(outcome.error)}}


def _remove(image: Arrival | Frame) -> None:
    """Removes a file that was answered, unless another one has taken its name meanwhile."""
    if not isinstance(image, Arrival):
        return
    try:
        if image.path.stat().st_mtime_ns == image.mtime_ns:
            image.path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{image.path} was answered and cannot be removed: {error.strerror}; --after keep") from error


def _ready(options: argparse.Namespace, console: Console) -> None:
    watched = "a camera" if options.camera else str(options.folder)
    results = None if options.results is None else str(options.results)
    document = {"event": "ready", "watching": watched, "results": results}
    text = f"ready: answering the images of {watched}, asking {', '.join(options.server)}"
    if results is None:
        _note(console, document, text)
    else:
        console.result(document, f"{text}, results in {results}")


def _note(console: Console, document: dict[str, Any], text: str) -> None:
    """Tells on standard error: standard output may be the results'."""
    print(json.dumps(document, ensure_ascii=False) if console.as_json else text, file=sys.stderr, flush=True)
