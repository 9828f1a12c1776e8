"""Answers every image that arrives in a folder, until Ctrl-C.

The server: ensembler serve out/demo/server --bind tcp://127.0.0.1:5555
This:       python examples/watch_folder.py out/demo/client tcp://127.0.0.1:5555 inbox

`ensembler watch` is the same as a service: it tries again while there is no server, and goes on after a restart.
"""

from __future__ import annotations

import sys
import threading

from ensembler import EdgeClient, EnsemblerError
from ensembler.sources import folder_images


def main(bundle: str, server: str, folder: str) -> int:
    """Prints one line for each image; returns 1 after an error, which ends a stream."""
    stop = threading.Event()
    try:
        with EdgeClient(bundle, server) as client:
            print(f"watching {folder}", flush=True)
            for index, result in client.stream(folder_images(folder, stop=stop), in_flight=4):
                print(f"{index}: {result.label} {result.score:.1%} in {result.timings.total:.0f} ms", flush=True)
    except KeyboardInterrupt:
        return 0
    except EnsemblerError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        stop.set()  # the folder is read in a thread of its own
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: watch_folder.py BUNDLE SERVER FOLDER")
    sys.exit(main(*sys.argv[1:]))
