"""Files that arrive in a folder and frames of a camera, as iterables for a client.

The camera is ``fake_picamera2``: the real one needs a Raspberry Pi and was not run here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import fake_picamera2
import numpy as np
import pytest

from ensembler import EdgeClient
from ensembler.protocol.errors import ConfigError, ImageError
from ensembler.sources import IMAGE_SUFFIXES, camera_frames, folder_images
from ensembler.transport.inprocess import InProcessTransport

SOON_S = 0.001


class Looks(threading.Event):
    """A stop event whose waits do something to the folder instead of passing time; the last one stops."""

    def __init__(self, *between):
        super().__init__()
        self._between = list(between)

    def wait(self, timeout=None):
        if self._between:
            self._between.pop(0)()
        else:
            self.set()
        return self.is_set()


def nothing():
    pass


def put(folder, name, content=b"image", mtime=None):
    path = folder / name
    path.write_bytes(content)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def names(folder, *between, **options):
    return [path.name for path in folder_images(folder, stop=Looks(nothing, *between), **options)]


# --- a folder ---


def test_files_that_are_there_come_once_each_oldest_first(tmp_path):
    put(tmp_path, "b.jpg", mtime=30)
    put(tmp_path, "c.png", mtime=10)
    put(tmp_path, "a.jpg", mtime=20)
    assert names(tmp_path, nothing, nothing) == ["c.png", "a.jpg", "b.jpg"]


def test_a_file_that_arrives_later_comes_too(tmp_path):
    put(tmp_path, "a.jpg")
    assert names(tmp_path, lambda: put(tmp_path, "b.jpg"), nothing) == ["a.jpg", "b.jpg"]


def test_a_path_is_the_whole_path(tmp_path):
    path = put(tmp_path, "a.jpg")
    assert list(folder_images(str(tmp_path), stop=Looks(nothing))) == [path]


def test_a_file_is_not_given_after_one_look(tmp_path):
    put(tmp_path, "a.jpg")
    assert list(folder_images(tmp_path, stop=Looks())) == []


def test_a_file_that_grows_is_waited_for(tmp_path):
    path = put(tmp_path, "a.jpg", b"1", mtime=10)
    sizes = []

    def grow():
        put(tmp_path, "a.jpg", path.read_bytes() + b"1", mtime=10)

    for found in folder_images(tmp_path, stop=Looks(grow, grow, nothing)):
        sizes.append(found.stat().st_size)
    assert sizes == [3]


def test_a_file_that_is_written_again_in_the_same_size_is_waited_for(tmp_path):
    put(tmp_path, "a.jpg", b"1", mtime=10)
    assert list(folder_images(tmp_path, stop=Looks(lambda: put(tmp_path, "a.jpg", b"2", mtime=20)))) == []


def test_an_empty_file_is_waited_for(tmp_path):
    put(tmp_path, "a.jpg", b"")
    assert names(tmp_path, nothing) == []
    assert names(tmp_path, nothing, lambda: put(tmp_path, "a.jpg", b"1"), nothing) == ["a.jpg"]


def test_a_file_that_is_replaced_arrives_again(tmp_path):
    put(tmp_path, "a.jpg", b"1", mtime=10)
    assert names(tmp_path, lambda: put(tmp_path, "a.jpg", b"2", mtime=20), nothing) == ["a.jpg", "a.jpg"]


@pytest.mark.parametrize(
    "name", [".hidden.jpg", "a.jpg.part", "a.jpg.tmp", "a.jpg.partial", "a.txt", "jpg", ".jpg", "results.jsonl"]
)
def test_other_names_are_passed_over(tmp_path, name):
    put(tmp_path, name)
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_the_case_of_a_suffix_does_not_matter(tmp_path, suffix):
    put(tmp_path, f"a{suffix}", mtime=1)
    put(tmp_path, f"B{suffix.upper()}", mtime=2)
    assert names(tmp_path) == [f"a{suffix}", f"B{suffix.upper()}"]


def test_only_regular_files_count(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    put(tmp_path, "a.jpg")
    assert names(tmp_path) == ["a.jpg"]


def test_what_was_seen_is_not_given_again_unless_it_was_replaced(tmp_path):
    old, new = put(tmp_path, "old.jpg", mtime=10), put(tmp_path, "new.jpg", mtime=20)
    seen = [(old.name, old.stat().st_mtime_ns), (new.name, 5)]
    assert names(tmp_path, seen=seen) == ["new.jpg"]


def test_a_file_that_vanishes_before_its_turn_is_no_error(tmp_path):
    put(tmp_path, "a.jpg", mtime=10)
    second = put(tmp_path, "b.jpg", mtime=20)
    found = folder_images(tmp_path, stop=Looks(nothing))
    assert next(found).name == "a.jpg"
    second.unlink()
    assert list(found) == []


def test_a_file_that_is_written_anew_before_its_turn_comes_later(tmp_path):
    put(tmp_path, "a.jpg", mtime=10)
    put(tmp_path, "b.jpg", mtime=20)
    found = folder_images(tmp_path, stop=Looks(nothing, nothing, nothing))
    assert next(found).name == "a.jpg"
    put(tmp_path, "b.jpg", b"longer than before", mtime=30)
    assert [path.name for path in found] == ["b.jpg"]


def test_a_missing_folder_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match="is it there, mounted"):
        folder_images(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="Not a directory"):
        folder_images(put(tmp_path, "a.jpg"))


def test_a_folder_that_vanishes_is_an_error(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    with pytest.raises(ConfigError, match="cannot be looked at"):
        list(folder_images(folder, stop=Looks(folder.rmdir, nothing)))


@pytest.mark.parametrize("poll_s", [0, -1, float("nan"), float("inf"), "1", None])
def test_an_impossible_pause_is_refused_at_once(tmp_path, poll_s):
    with pytest.raises(ConfigError, match="poll_s = "):
        folder_images(tmp_path, poll_s=poll_s)


def test_stop_ends_a_wait_and_the_files_that_have_not_come(tmp_path):
    stop = threading.Event()
    for index in range(3):
        put(tmp_path, f"{index}.jpg", mtime=index)
    found = folder_images(tmp_path, poll_s=SOON_S, stop=stop)
    assert next(found).name == "0.jpg"
    stop.set()
    assert list(found) == []
    waiting = threading.Event()
    stop = threading.Event()
    stop_wait = stop.wait

    def wait(timeout):
        waiting.set()
        return stop_wait(timeout)

    stop.wait = wait
    with ThreadPoolExecutor(1) as threads:
        rest = threads.submit(lambda: list(folder_images(tmp_path, poll_s=3600, stop=stop)))
        assert waiting.wait(30)
        stop.set()
        assert rest.result(30) == []


def test_a_stream_answers_the_files_of_a_folder_and_ends_when_it_is_stopped(tiny, gate, tiny_images, tmp_path):
    from PIL import Image

    for index in range(3):
        Image.fromarray(tiny_images[index]).save(tmp_path / f"{index}.png")
    stop, found = threading.Event(), []
    with EdgeClient(tiny.client, "in-process", timeout_ms=60_000, transport=InProcessTransport(gate)) as client:
        for _, result in client.stream(folder_images(tmp_path, poll_s=SOON_S, stop=stop)):
            found.append(result.label)
            if len(found) == 3:
                stop.set()
        assert found == [client.predict(image).label for image in tiny_images[:3]]


# --- a camera ---


@pytest.fixture
def camera(monkeypatch):
    """The stand-in as ``picamera2``, with no calls yet."""
    monkeypatch.setitem(sys.modules, "picamera2", fake_picamera2)
    monkeypatch.setattr(fake_picamera2, "calls", [])
    return fake_picamera2


def test_frames_are_rgb_arrays_of_the_size_that_was_asked_for(camera):
    frames = camera_frames((64, 48))
    frame = next(frames)
    frames.close()
    assert (frame.shape, frame.dtype) == ((48, 64, 3), np.uint8)
    assert tuple(frame[0, 0]) == camera.RED
    assert camera.calls == [("open",), ("configure", "BGR888", 64, 48), ("start",), ("close",)]


def test_the_camera_is_not_opened_before_the_first_frame(camera):
    camera_frames()
    assert camera.calls == []


def test_stop_ends_the_frames_and_closes_the_camera(camera):
    stop = threading.Event()
    frames = camera_frames(stop=stop)
    next(frames)
    stop.set()
    assert list(frames) == []
    assert camera.calls[-1] == ("close",)


@pytest.mark.parametrize(
    ("method", "error", "closed"),
    [
        ("open", ConfigError, False),
        ("configure", ConfigError, True),
        ("start", ConfigError, True),
        ("capture_array", ImageError, True),
    ],
)
def test_a_camera_that_fails_is_a_typed_error_and_is_closed(camera, monkeypatch, method, error, closed):
    monkeypatch.setattr(camera.Picamera2, "fails", (method,))
    with pytest.raises(error, match=f"{method} failed"):
        next(camera_frames())
    assert (camera.calls[-1] == ("close",)) == closed


def test_without_a_camera_the_error_says_what_to_look_at(camera, monkeypatch):
    monkeypatch.setattr(camera, "CAMERAS", [])
    with pytest.raises(ConfigError, match="no camera was found; look at its cable"):
        camera_frames()


def test_without_picamera2_the_error_is_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "picamera2", None)
    with pytest.raises(ConfigError, match="sudo apt install python3-picamera2"):
        camera_frames()


def test_a_picamera2_for_another_numpy_is_told(tmp_path, monkeypatch):
    (tmp_path / "picamera2.py").write_text("raise ValueError('numpy.dtype size changed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "picamera2", raising=False)
    with pytest.raises(ConfigError, match="does not go with this NumPy"):
        camera_frames()


@pytest.mark.parametrize("size", [(0, 1), (640, "480"), 640, (1, 2, 3), None])
def test_an_impossible_size_is_refused_at_once(camera, size):
    with pytest.raises(ConfigError):
        camera_frames(size)


def test_a_stream_of_the_newest_frames_ends_with_the_camera_closed(camera, tiny, gate):
    stop = threading.Event()
    with EdgeClient(tiny.client, "in-process", timeout_ms=60_000, transport=InProcessTransport(gate)) as client:
        for count, (_, result) in enumerate(client.stream(camera_frames(stop=stop), newest=True, in_flight=1)):
            assert result.label
            if count == 2:
                stop.set()
    assert camera.calls[-1] == ("close",)


def test_importing_the_sources_and_the_service_loads_none_of_their_packages():
    code = (
        "import sys, ensembler.sources, ensembler.cli.watch\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'torch', 'fastapi', 'picamera2', 'PIL'})"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("\n", "")
