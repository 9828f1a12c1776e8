"""``ensembler watch``: processes, real servers over CURVE, kills; every image gets its line.

The camera is ``fake_picamera2``: the real one needs a Raspberry Pi and was not run here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SlowEngine, process_of
from PIL import Image

from ensembler import EdgeClient, Prediction
from ensembler.cli.console import Console
from ensembler.cli.journal import Journal
from ensembler.cli.watch import _Service
from ensembler.cloud_runtime.server import Server
from ensembler.protocol.errors import (
    AuthenticationError,
    BusyError,
    ConfigError,
    InternalError,
    ServerUnreachableError,
    UnknownBodiesError,
)
from ensembler.sources import Arrival
from ensembler.transport import keys
from ensembler.transport.zmq_server import ServerSocket

COMMAND = [sys.executable, "-m", "ensembler.cli", "watch"]
PATIENT = ("--timeout-ms", "60000")
HASTY = ("--timeout-ms", "1000")


@pytest.fixture(scope="module")
def running(tiny, serve):
    with serve(tiny.server) as (endpoint, _):
        yield endpoint


@pytest.fixture
def inbox(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def watching(bundle, endpoint, *arguments, **options):
    """The service as a process."""
    return process_of([*COMMAND, str(bundle), "--server", endpoint, *map(str, arguments)], **options)


def ended(*arguments):
    """Runs a service that ends by itself."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@contextmanager
def followed(path):
    """The lines of a file as they are written."""
    with subprocess.Popen(["tail", "-n", "+1", "-f", str(path)], stdout=subprocess.PIPE, text=True) as tail:
        try:
            yield tail.stdout
        finally:
            tail.kill()


def stopped(process, number=signal.SIGTERM):
    """Ends a service; returns exit status and what is left of its output."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def put(folder, name, pixels, mtime=None):
    """Moves an image into a folder, as careful programs do."""
    path = folder / name
    Image.fromarray(pixels).save(folder / ".new.png")
    if mtime is not None:
        os.utime(folder / ".new.png", (mtime, mtime))
    (folder / ".new.png").rename(path)
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- answers ---


def test_images_that_are_there_and_that_arrive_are_answered_once_each(tiny, running, inbox, tmp_path, tiny_images):
    results = tmp_path / "results.jsonl"
    old = put(inbox, "old.png", tiny_images[0], mtime=1000)
    with watching(tiny.client, running, "--folder", inbox, "--results", results, *PATIENT) as process:
        assert process.stdout.readline().startswith(f"ready: answering the images of {inbox}")
        with followed(results) as lines:
            first = json.loads(lines.readline())
            put(inbox, "new.png", tiny_images[1])
            second = json.loads(lines.readline())
        assert stopped(process) == (0, "", "")
    assert [first, second] == lines_of(results)
    assert (first["name"], first["mtime_ns"], second["name"]) == ("old.png", 1000 * 10**9, "new.png")
    assert list(first["timings_ms"]) == ["read", "head", "queue", "server", "network", "tail", "total"]
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)
    assert stat.S_IMODE(results.stat().st_mode) == 0o600
    assert old.exists()
    with EdgeClient(tiny.client, running, timeout_ms=60_000) as client:
        expected = client.predict(old)
    assert (first["label"], first["score"]) == (expected.label, expected.score)


def test_without_a_file_the_lines_are_all_that_is_on_standard_output(tiny, running, inbox, tiny_images):
    for index in range(5):
        put(inbox, f"{index}.png", tiny_images[index], mtime=1000 + index)
    with watching(tiny.client, running, "--folder", inbox, "--json", *PATIENT) as process:
        ready = json.loads(process.stderr.readline())
        found = [json.loads(process.stdout.readline()) for _ in range(5)]
        assert stopped(process) == (0, "", "")
    assert ready == {"event": "ready", "watching": str(inbox), "results": None}
    assert [line["name"] for line in found] == [f"{index}.png" for index in range(5)]


def test_an_image_that_cannot_be_read_gets_an_error_once_and_is_kept(tiny, running, inbox, tmp_path, tiny_images):
    results = tmp_path / "results.jsonl"
    (inbox / "broken.png").write_bytes(b"not an image")
    os.utime(inbox / "broken.png", (1000, 1000))
    put(inbox, "whole.png", tiny_images[0])
    arguments = ("--folder", inbox, "--results", results, "--after", "delete", *PATIENT)
    for _ in range(2):
        with watching(tiny.client, running, *arguments) as process:
            process.stdout.readline()
            with followed(results) as lines:
                broken, whole = json.loads(lines.readline()), json.loads(lines.readline())
            assert stopped(process)[0] == 0
    assert broken["error"]["type"] == "ImageError"
    assert "broken.png: not a readable image" in broken["error"]["message"]
    assert "label" in whole
    assert len(lines_of(results)) == 2
    assert [path.name for path in inbox.iterdir()] == ["broken.png"]


def test_a_frame_of_a_camera_is_answered_too(tiny, running, tmp_path):
    shutil.copy(Path(__file__).with_name("fake_picamera2.py"), tmp_path / "picamera2.py")
    log = tmp_path / "calls"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FAKE_CAMERA_LOG": str(log)}
    with watching(tiny.client, running, "--camera", *PATIENT, env=environment) as process:
        assert process.stderr.readline().startswith("ready: answering the images of a camera")
        line = json.loads(process.stdout.readline())
        assert stopped(process)[0] == 0
    assert line["name"] == "frame 0"
    assert "label" in line
    assert log.read_text().splitlines()[-1] == "close"


# --- moments without a server ---


def test_nothing_is_lost_while_there_is_no_server(tiny, serve, inbox, tiny_images):
    with serve(tiny.server) as (endpoint, _):
        pass
    for index in range(3):
        put(inbox, f"{index}.png", tiny_images[index], mtime=1000 + index)
    with watching(tiny.client, endpoint, "--folder", inbox, "--in-flight", 2, *HASTY) as process:
        process.stderr.readline()
        assert "trying again until there is an answer" in process.stderr.readline()
        for again in (False, True):
            with serve(tiny.server, bind=endpoint):
                names = ["3.png"] if again else ["0.png", "1.png", "2.png"]
                found = [json.loads(process.stdout.readline()) for _ in names]
                assert [line["name"] for line in found] == names
                assert all("label" in line for line in found)
                assert process.stderr.readline() == "ensembler: the server answers again\n"
            if not again:
                put(inbox, "3.png", tiny_images[3])
                assert "trying again" in process.stderr.readline()
        assert stopped(process) == (0, "", "")


def test_a_service_that_waits_for_a_server_ends_at_once_and_leaves_the_image_for_the_next_start(
    tiny, serve, inbox, tmp_path, tiny_images
):
    results = tmp_path / "results.jsonl"
    with serve(tiny.server) as (endpoint, _):
        pass
    put(inbox, "a.png", tiny_images[0])
    arguments = ("--folder", inbox, "--results", results, "--after", "delete")
    with watching(tiny.client, endpoint, *arguments, *HASTY) as process:
        assert "trying again" in process.stderr.readline()
        assert stopped(process)[0] == 0
    assert lines_of(results) == []
    assert (inbox / "a.png").exists()


class Waits(threading.Event):
    """A stop event whose waits are noted and pass no time."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return self.is_set()


class Moody:
    """A client whose server is away for as many calls as there are errors."""

    def __init__(self, *errors):
        self.errors, self.sent = list(errors), []

    def info(self):
        return SimpleNamespace(image_size=(16, 16))

    def predict(self, pixels):
        self.sent.append(pixels)
        if self.errors:
            raise self.errors.pop(0)
        return Prediction.local("red", 1.0)


def test_the_waits_grow_and_are_bounded_and_the_image_is_read_once(inbox, tiny_images, capfd):
    busy, away = BusyError("full", retry_after_ms=3000.0), ServerUnreachableError("no server")
    client, stop = Moody(busy, *[away] * 6), Waits()
    service = _Service(client, Console(as_json=False), stop)
    path = put(inbox, "a.png", tiny_images[0])
    outcome = service.answer(Arrival(path=path, mtime_ns=1))
    assert outcome.result.label == "red"
    assert stop.seconds == [3.0, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert all(pixels is client.sent[0] for pixels in client.sent)
    assert capfd.readouterr().err.splitlines() == [
        "ensembler: full; trying again until there is an answer",
        "ensembler: the server answers again",
    ]


def test_a_late_failure_of_a_call_from_before_the_last_answer_says_nothing(inbox, tiny_images, capfd):
    first, second = (Arrival(path=put(inbox, f"{n}.png", tiny_images[n]), mtime_ns=1) for n in range(2))

    class Slow(Moody):
        def predict(self, pixels):
            if self.errors:
                error = self.errors.pop()
                assert service.answer(second).result.label == "red"  # another thread's, while this one waits
                raise error
            return super().predict(pixels)

    service = _Service(Slow(ServerUnreachableError("no server")), Console(as_json=False), Waits())
    assert service.answer(first).result.label == "red"
    assert capfd.readouterr().err == ""


def test_what_trying_again_does_not_cure_stops_the_service(inbox, tiny_images):
    for error in (AuthenticationError("refused"), UnknownBodiesError("other nets"), InternalError("broken")):
        stop = Waits()
        service = _Service(Moody(error), Console(as_json=False), stop)
        with pytest.raises(type(error)):
            service.answer(Arrival(path=put(inbox, "a.png", tiny_images[0]), mtime_ns=1))
        assert stop.is_set()
        assert stop.seconds == []


def test_a_frame_without_an_answer_gets_its_error_and_is_not_tried_again(tiny_images):
    client = Moody(ServerUnreachableError("no server"))
    service = _Service(client, Console(as_json=False), Waits())
    assert isinstance(service.answer(tiny_images[0]).error, ServerUnreachableError)
    assert len(client.sent) == 1


# --- the end ---


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_what_is_in_flight(tiny, inbox, tiny_images, number, status):
    engine = SlowEngine(tiny.server)
    authorized = frozenset({keys.load_public(tiny.keys / "device.key")})
    pair = keys.load_pair(tiny.keys / "server.key_secret")
    listening = ServerSocket("tcp://127.0.0.1:*", keys=pair, authorized=authorized)
    server = Server(engine, listening, None, inline_ms=0.0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        put(inbox, "a.png", tiny_images[0])
        with watching(tiny.client, listening.endpoint, "--folder", inbox, *PATIENT) as process:
            process.stderr.readline()
            assert engine.entered.wait(60)
            process.send_signal(number)
            engine.release.set()
            out, _ = process.communicate(timeout=60)
            assert process.returncode == status
    finally:
        engine.release.set()
        server.stop()
        thread.join(60)
        listening.close()
    assert "label" in json.loads(out)


def test_a_key_that_the_server_does_not_know_ends_the_service(tiny, running, inbox, tiny_images, tmp_path):
    _, stranger = keys.create(tmp_path / "keys", "device")
    put(inbox, "a.png", tiny_images[0])
    done = ended(tiny.client, "--server", running, "--folder", inbox, "--key", stranger, *PATIENT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "refused the encrypted handshake" in done.stderr
    assert (inbox / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--folder", "nowhere", "--results", "r.jsonl"), 2, "is it there, mounted"),
        (("--folder", ".", "--results", "no/r.jsonl"), 2, "cannot be written"),
        (("--folder", ".", "--after", "delete"), 2, "--after delete needs --folder and --results"),
        (("--folder", ".", "--in-flight", "0"), 2, "in_flight = 0"),
        (("--folder", ".", "--camera"), 2, "not allowed with"),
        ((), 2, "--folder --camera is required"),
        (("--camera", "--results", "r.jsonl"), 2, "sudo apt install python3-picamera2"),
        (("--folder", ".", "--key", "nowhere"), 2, "nowhere"),
        (("--folder", ".", "--bundle-key", "nowhere"), 2, "is not encrypted"),
    ],
)
def test_a_wrong_option_ends_it_and_leaves_nothing(tiny, tmp_path, monkeypatch, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    done = ended(tiny.client, "--server", "tcp://127.0.0.1:9", *arguments)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_bundle_ends_it(tmp_path):
    done = ended(tmp_path, "--server", "tcp://127.0.0.1:9", "--folder", tmp_path)
    assert done.returncode == 1
    assert "manifest.json is missing" in done.stderr


def test_a_reader_that_goes_away_ends_it(tiny, running, inbox, tiny_images):
    put(inbox, "a.png", tiny_images[0])
    with watching(tiny.client, running, "--folder", inbox, *PATIENT) as process:
        process.stderr.readline()
        process.stdout.readline()
        process.stdout.close()
        put(inbox, "b.png", tiny_images[1])
        assert process.wait(60) == 1
        assert process.stderr.read() == ""


def test_a_folder_that_vanishes_ends_it(tiny, running, inbox):
    with watching(tiny.client, running, "--folder", inbox) as process:
        process.stderr.readline()
        inbox.rmdir()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot be looked at" in err


# --- a second start ---


def test_what_has_a_line_is_not_answered_again_unless_it_was_replaced(tiny, running, inbox, tmp_path, tiny_images):
    results = tmp_path / "results.jsonl"
    odd = os.fsdecode(b"caf\xe9.png")  # a name that is no text
    for mtime, name in enumerate((odd, "a.png", "b.png"), start=1000):
        put(inbox, name, tiny_images[0], mtime=mtime)
    arguments = ("--folder", inbox, "--results", results, *PATIENT)
    with watching(tiny.client, running, *arguments) as process:
        process.stdout.readline()
        with followed(results) as lines:
            assert [json.loads(lines.readline())["name"] for _ in range(3)] == [odd, "a.png", "b.png"]
        assert stopped(process)[0] == 0
    put(inbox, "b.png", tiny_images[1], mtime=2000)
    put(inbox, "c.png", tiny_images[1], mtime=2001)
    results.chmod(0o644)
    with results.open("a") as stream:
        stream.write('{"time": "2031-02-03T04:05:06+00:00", "name": "c.png", "mtime_ns": 20010')
    with watching(tiny.client, running, *arguments) as process:
        process.stdout.readline()
        with followed(results) as lines:
            found = [json.loads(lines.readline()) for _ in range(5)]
        assert stopped(process)[0] == 0
    assert [line["name"] for line in found] == [odd, "a.png", "b.png", "b.png", "c.png"]
    assert lines_of(results) == found
    assert stat.S_IMODE(results.stat().st_mode) == 0o600


def test_a_kill_loses_no_image_and_no_line(tiny, running, inbox, tmp_path, tiny_images):
    results = tmp_path / "results.jsonl"
    names = {put(inbox, f"{index}.png", tiny_images[index], mtime=1000 + index).name for index in range(24)}
    arguments = ("--folder", inbox, "--results", results, "--after", "delete", *PATIENT)
    with watching(tiny.client, running, *arguments) as process:
        process.stdout.readline()
        with followed(results) as lines:
            lines.readline()
            process.kill()
            process.wait(60)
    with watching(tiny.client, running, *arguments) as process:
        process.stdout.readline()
        with followed(results) as lines:
            found = set()
            while found != names:
                found.add(json.loads(lines.readline())["name"])
        assert stopped(process)[0] == 0
    assert len(lines_of(results)) == len(names)
    # A kill between the line and the removal leaves the one file that it was about.
    assert len(list(inbox.iterdir())) <= 1


# --- the file of results ---


def test_a_second_service_on_one_file_is_refused(tmp_path):
    first = Journal(tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="another process writes it"):
        Journal(tmp_path / "r.jsonl")
    first.close()
    Journal(tmp_path / "r.jsonl").close()


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 photo", b'{"other": 1}', b"x"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="a file of something else"):
        Journal(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_refused_and_does_not_block(tmp_path, make):
    make(tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match=r"r\.jsonl"):
        Journal(tmp_path / "r.jsonl")


def test_half_a_line_is_cut_off_and_a_damaged_one_is_ignored(tmp_path):
    path = tmp_path / "r.jsonl"
    whole = b'{"time": "t", "name": "a", "mtime_ns": 1}\n'
    path.write_bytes(whole + b"\0\0\0\n" + b'{"time": "t", "name": "b", "mtime_ns": 2}')
    journal = Journal(path)
    assert journal.answered({"a", "b"}) == {("a", 1)}
    assert journal.answered({"b"}) == set()
    journal.add({"time": "t", "name": "grün", "mtime_ns": 3})
    journal.close()
    assert path.read_bytes() == whole + b"\0\0\0\n" + '{"time": "t", "name": "grün", "mtime_ns": 3}\n'.encode()


def test_only_a_first_line_that_was_cut_short_is_a_file_of_results(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"ti')
    Journal(path).close()
    assert path.read_bytes() == b""
