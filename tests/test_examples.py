"""Every program in ``examples/`` runs, against a real server over CURVE.

``predict.py`` is run from the documents (test_docs.py). The camera is ``fake_picamera2``: the real
one needs a Raspberry Pi and was not run here.
"""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import process_of
from PIL import Image

from ensembler import EdgeClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HERE = Path(__file__).resolve()


@pytest.fixture(scope="module")
def running(tiny, serve):
    with serve(tiny.server) as (endpoint, _):
        yield endpoint


@pytest.fixture(scope="module")
def labels(tiny, running, tiny_images):
    """What the client says to the first images, one by one."""
    with EdgeClient(tiny.client, running, timeout_ms=60_000) as client:
        return [client.predict(image).label for image in tiny_images[:3]]


def example(name, *arguments, **options):
    """An example as a process."""
    return process_of([sys.executable, "-u", str(EXAMPLES / name), *map(str, arguments)], **options)


def interrupted(process):
    """Ends an example with Ctrl-C; returns its exit status and what it said on standard error."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_every_example_is_run_by_a_test_and_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = HERE.read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in table
        assert path.name in tests


@pytest.mark.parametrize("net", ["sequential", "gated"])
def test_the_nets_of_own_net_can_be_cut(net):  # own_net.py
    command = [sys.executable, "-m", "ensembler.cli", "cuts", f"examples.own_net:{net}", "--num-classes", "6", "--json"]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cuts"]


# --- a folder ---


def test_watch_folder_answers_what_is_there_and_what_arrives(tiny, running, labels, tiny_images, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    Image.fromarray(tiny_images[0]).save(inbox / "a.png")
    with example("watch_folder.py", tiny.client, running, inbox) as process:
        assert process.stdout.readline() == f"watching {inbox}\n"
        assert process.stdout.readline().startswith(f"0: {labels[0]} ")
        Image.fromarray(tiny_images[1]).save(inbox / "b.png")
        assert process.stdout.readline().startswith(f"1: {labels[1]} ")
        assert interrupted(process) == (0, "")


def test_watch_folder_tells_an_error_and_ends(tiny, running, tmp_path):
    with example("watch_folder.py", tiny.client, running, tmp_path / "nowhere") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is it there, mounted" in err
    assert len(err.splitlines()) == 1


# --- a camera ---


def test_camera_classifies_the_newest_frames_until_ctrl_c_and_closes_the_camera(tiny, running, tmp_path):
    shutil.copy(HERE.with_name("fake_picamera2.py"), tmp_path / "picamera2.py")
    log = tmp_path / "calls"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FAKE_CAMERA_LOG": str(log)}
    with example("camera.py", tiny.client, running, env=environment) as process:
        numbers = [int(re.match(r"frame (\d+): ", process.stdout.readline())[1]) for _ in range(3)]
        assert interrupted(process) == (0, "")
    assert numbers[0] == 0
    assert numbers == sorted(set(numbers))
    assert log.read_text().splitlines() == ["open", "configure BGR888 640 480", "start", "close"]


def test_camera_skips_in_one_sentence_where_there_is_none(tiny, running):
    with example("camera.py", tiny.client, running) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("skipped: a camera needs picamera2")
    assert "sudo apt install python3-picamera2" in out
    assert len(out.splitlines()) == 1


# --- a web application ---


@contextmanager
def web_app(tiny, server, *arguments):
    """The address of the web application, once it is ready."""
    with example("web_app.py", tiny.client, server, "--port", 0, *arguments) as process:
        for line in process.stderr:
            if found := re.search(r"running on http://([\d.]+:\d+)", line):
                break
        else:
            raise AssertionError("the application did not start")
        yield found[1]
        assert interrupted(process)[0] in (0, -signal.SIGINT)


def posted(address, body, path="/predict"):
    """Returns status, headers and document."""
    request = urllib.request.Request(f"http://{address}{path}", data=body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_web_app_answers_images_and_refuses_the_rest(tiny, running, labels, tiny_images):
    with web_app(tiny, running, "--timeout-ms", 60_000) as address:
        for label, pixels in zip(labels, tiny_images, strict=False):
            status, _, document = posted(address, encoded(pixels))
            assert (status, document["label"]) == (200, label)
            assert 0 < document["score"] <= 1
            assert document["timings_ms"]["total"] > 0
        status, _, document = posted(address, b"not an image")
        assert (status, document["error"]) == (400, "ImageError")
        assert posted(address, b"")[0] == 400
        assert posted(address, b"", path="/")[0] == 404
        assert refused_early(address) == 413
        assert refused_while_it_comes(address) == 413
        assert posted(address, encoded(tiny_images[0]))[0] == 200


def refused_early(address):
    """Says that a large body will come, and sends none."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def refused_while_it_comes(address):
    """Sends a body in parts, without saying how much, until the answer comes."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    part = bytes(1 << 20)
    for _ in range(17):
        connection.send(b"%x\r\n%b\r\n" % (len(part), part))
    status = connection.getresponse().status
    connection.close()
    return status


def test_web_app_says_when_to_come_back_while_there_is_no_server(tiny, serve, tiny_images):
    with serve(tiny.server) as (endpoint, _):
        pass
    with web_app(tiny, endpoint, "--timeout-ms", 3000) as address:
        status, headers, document = posted(address, encoded(tiny_images[0]))
        assert (status, document["error"]) == (503, "ServerUnreachableError")
        assert int(headers["Retry-After"]) >= 1
        with serve(tiny.server, bind=endpoint):
            while posted(address, encoded(tiny_images[0]))[0] != 200:  # each waits for the connection
                pass


def test_web_app_tells_a_deadline_from_a_missing_server(tiny, serve, tiny_images):
    with serve(tiny.server) as (endpoint, server), web_app(tiny, endpoint, "--timeout-ms", 2000) as address:
        while posted(address, encoded(tiny_images[0]))[0] != 200:
            pass
        server.send_signal(signal.SIGSTOP)
        try:
            status, _, document = posted(address, encoded(tiny_images[0]))
        finally:
            server.send_signal(signal.SIGCONT)
    assert (status, document["error"]) == (504, "DeadlineExceededError")


# --- the ladder ---


@pytest.mark.slow
def test_security_ladder_climbs_every_rung(tiny, tiny_run, tiny_images, audit_images, tiny_budget, tmp_path, capfd):
    """In this process, so that its audit takes seconds; its servers are processes of their own."""
    photo = tmp_path / "photo.png"
    Image.fromarray(tiny_images[0]).save(photo)
    spec = importlib.util.spec_from_file_location("security_ladder", EXAMPLES / "security_ladder.py")
    ladder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ladder)
    out = tmp_path / "ladder"
    arguments = [str(tiny_run), str(photo), "--out", str(out), "--audit-data", audit_images]
    ladder.main([*arguments, "--min-sqnr-db", "0", "--max-accuracy-drop", "100"])
    said, errors = capfd.readouterr()
    assert re.findall(r"^([A-E])[:,]", said, flags=re.MULTILINE) == list("ABCDE")
    assert len(re.findall(r"photo.png: .*% .* ms", said)) == 4  # rungs A to D
    assert said.count("refused: ") == 2
    assert "by a client of which the card says: " in said
    assert "refused the encrypted handshake" in errors
    assert "is encrypted" in errors
