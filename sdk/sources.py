"""Where images come from on a device: files that arrive in a folder, frames of a camera.

Both are endless generators for ``EdgeClient.stream``, a loop over ``predict``, or a service. Start reading at
``folder_images``.
"""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import ConfigError, ImageError
from ensembler.protocol.options import expanded, whole

Frame = npt.NDArray[np.uint8]

# Which files of a folder are images, by the end of their name, in small letters. Names of files that are still being
# written (x.jpg.part, x.jpg.tmp, x.jpg.partial) end otherwise.
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"},
)

APT_COMMAND = "sudo apt install python3-picamera2"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An image file that arrived whole.

    Attributes:
        path: of the file.
        mtime_ns: when it was last written, as the file system says, in nanoseconds.
    """

    path: Path
    mtime_ns: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells this arrival from others in its folder: name and time; a file that is replaced arrives again."""
        return self.path.name, self.mtime_ns


@dataclass(frozen=True)
class _State:
    mtime_ns: int
    size: int


def folder_images(
    folder: str | os.PathLike[str],
    *,
    poll_s: float = 0.5,
    seen: Iterable[tuple[str, int]] = (),
    stop: threading.Event | None = None,
) -> Generator[Path, None, None]:
    """Yields the paths of the image files in a folder, and of those that arrive: each once, oldest first.

    A file has arrived when its size and its time of writing are the same in two looks; an empty file is waited for. A
    file that is replaced arrives again. Hidden files, names that do not end in one of ``IMAGE_SUFFIXES`` (so also those
    in .part, .tmp and .partial), and what is no regular file are passed over. A file that vanishes before its turn is
    no error.

    The folder is looked at again and again, not watched with inotify: that works on network file systems too, where
    changes by other machines raise no event, and needs no package that has no wheel for 32-bit boards.

    Args:
        folder: where files arrive; not the folders in it.
        poll_s: seconds between two looks.
        seen: (name, ``st_mtime_ns``) of files that are not to be given.
        stop: ends the generator when it is set; None never does.

    Raises:
        ConfigError: the folder is missing or cannot be read, at once; or vanished, from the generator. Or an impossible
            ``poll_s``.
    """
    found = arrivals(folder, poll_s=poll_s, seen=seen, stop=stop)
    return (arrival.path for arrival in found)


def arrivals(
    folder: str | os.PathLike[str],
    *,
    poll_s: float = 0.5,
    seen: Iterable[tuple[str, int]] = (),
    stop: threading.Event | None = None,
) -> Generator[Arrival, None, None]:
    """Yields what ``folder_images`` does, with the time of each file; arguments and errors as there."""
    place = expanded("folder", folder)
    pause_s = _seconds(poll_s)
    _look(place)
    return _arrivals(place, pause_s, set(seen), threading.Event() if stop is None else stop)


def _arrivals(
    folder: Path, poll_s: float, given: set[tuple[str, int]], stop: threading.Event
) -> Generator[Arrival, None, None]:
    before: dict[str, _State] = {}
    while not stop.is_set():
        found = _look(folder)
        # What has left the folder is forgotten: a service may run for years.
        given &= {(name, state.mtime_ns) for name, state in found.items()}
        whole_ones = [
            Arrival(path=folder / name, mtime_ns=state.mtime_ns)
            for name, state in found.items()
            if state.size and before.get(name) == state and (name, state.mtime_ns) not in given
        ]
        for arrival in sorted(whole_ones, key=lambda arrival: (arrival.mtime_ns, arrival.path.name)):
            if stop.is_set():
                return
            # Those before it may have taken long: it may have gone, or be written anew.
            if _state(arrival.path) == found[arrival.path.name]:
                given.add(arrival.key)
                yield arrival
        before = found
        stop.wait(poll_s)


def _seconds(value: object) -> float:
    if isinstance(value, SupportsFloat) and 0 < float(value) < math.inf:
        return float(value)
    raise ConfigError(f"poll_s = {value!r}: give a number of seconds above 0")


def _look(folder: Path) -> dict[str, _State]:
    """Returns the image files of a folder by name."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be looked at: {error.strerror}; is it there, mounted, and readable?"
        ) from error
    images = [name for name in names if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES]
    states = {name: _state(folder / name) for name in images}
    return {name: state for name, state in states.items() if state is not None}


def _state(path: Path) -> _State | None:
    """Returns a regular file's state; None for anything else, also a link to a device, and for what has gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _State(status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None


def camera_frames(
    size: tuple[int, int] = (640, 480), *, stop: threading.Event | None = None
) -> Generator[Frame, None, None]:
    """Yields the frames of a Raspberry Pi's camera, by picamera2, as fast as they are asked for.

    For ``EdgeClient.stream(..., newest=True)``. The camera is opened at the first frame and closed when the generator
    ends, however that happens. A camera that hangs blocks: nothing can interrupt it.

    The project's tests run this with a stand-in of picamera2's interface; on a camera it has not been run.

    Args:
        size: (width, height) in pixels that the camera is asked for. It may give a size near it.
        stop: ends the generator when it is set; None never does.

    Yields:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ConfigError: picamera2 is not installed or does not load, or it finds no camera, at once; the camera cannot be
            opened, from the generator. Or an impossible ``size``.
        ImageError: the camera gave no frame.
    """
    try:
        asked_width, asked_height = size
    except (TypeError, ValueError):
        raise ConfigError(f"size = {size!r}: give (width, height) in pixels") from None
    width, height = whole("width", asked_width, 1), whole("height", asked_height, 1)
    picamera2 = _picamera2()
    if not picamera2.Picamera2.global_camera_info():
        raise ConfigError(
            "no camera was found; look at its cable and its connector, then let rpicam-hello --list-cameras find it"
        )
    return _frames(picamera2, (width, height), threading.Event() if stop is None else stop)


def _frames(picamera2: Any, size: tuple[int, int], stop: threading.Event) -> Generator[Frame, None, None]:
    try:
        camera = picamera2.Picamera2()
    except (RuntimeError, IndexError, OSError) as error:
        raise _unusable(error) from error
    try:
        try:
            # Named after the order in a machine word: picamera2's manual (appendix A) has each pixel of "BGR888" as
            # [R, G, B] in the array, and of "RGB888" as [B, G, R].
            camera.configure(camera.create_video_configuration(main={"size": size, "format": "BGR888"}))
            camera.start()
        except (RuntimeError, ValueError, OSError) as error:
            raise _unusable(error) from error
        while not stop.is_set():
            try:
                frame = np.asarray(camera.capture_array("main"), np.uint8)
            except (RuntimeError, OSError) as error:
                raise ImageError(f"the camera gave no frame: {error}; is it still connected?") from error
            yield frame
    finally:
        camera.close()


def _picamera2() -> Any:
    try:
        import picamera2
    except ImportError as error:
        raise ConfigError(
            f"a camera needs picamera2, which does not load ({error}); {APT_COMMAND}. The system's Python has it: "
            "run ensembler-python of the Debian package, or a virtual environment made with --system-site-packages"
        ) from error
    except ValueError as error:  # compiled for the NumPy of the system, and found beside another one
        raise ConfigError(
            f"picamera2 does not go with this NumPy ({error}); install it where NumPy is the system's: {APT_COMMAND}, "
            "and run ensembler-python of the Debian package"
        ) from error
    return picamera2


def _unusable(error: Exception) -> ConfigError:
    return ConfigError(f"the camera cannot be used: {error}; does another program use it?")
