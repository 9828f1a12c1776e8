"""Classifies what a Raspberry Pi's camera sees: always the newest frame, until Ctrl-C.

The server: ensembler serve out/demo/server --bind tcp://0.0.0.0:5555
This:       ensembler-python examples/camera.py BUNDLE tcp://HOST:5555

Needs picamera2 (sudo apt install python3-picamera2). Without it, or without a camera, it says so and ends. It was
tested with a stand-in of picamera2 and not on a camera.
"""

from __future__ import annotations

import sys
import threading

from ensembler import EdgeClient, EnsemblerError
from ensembler.protocol.errors import ConfigError
from ensembler.sources import camera_frames


def main(bundle: str, server: str) -> int:
    """Prints one line for each answer; returns 0 without a camera, 1 after an error."""
    stop = threading.Event()
    try:
        frames = camera_frames((640, 480), stop=stop)
    except ConfigError as error:
        print(f"skipped: {error}")
        return 0
    try:
        with EdgeClient(bundle, server, timeout_ms=2000) as client:
            # One in flight and only the newest frame waits, so no answer is about an old one.
            for index, result in client.stream(frames, newest=True, in_flight=1):
                print(f"frame {index}: {result.label} {result.score:.1%}", flush=True)
    except KeyboardInterrupt:
        return 0
    except EnsemblerError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        stop.set()
        frames.close()  # and the camera with it
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: camera.py BUNDLE SERVER")
    sys.exit(main(*sys.argv[1:]))
