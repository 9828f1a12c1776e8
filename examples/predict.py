"""Classifies image files with a client bundle and a running server.

    python examples/predict.py out/demo/client tcp://127.0.0.1:5555 photo.jpg another.png

The device's key is found beside the bundle or in ~/.config/ensembler; see docs/app-developer.md.
"""

from __future__ import annotations

import sys

from ensembler import EdgeClient, EnsemblerError


def main(arguments: list[str]) -> int:
    """Prints one line for each image; returns 1 if one of them got no answer."""
    if len(arguments) < 3:
        print("usage: predict.py BUNDLE SERVER IMAGE...", file=sys.stderr)
        return 2
    bundle, server, *images = arguments
    failed = False
    try:
        with EdgeClient(bundle, server, timeout_ms=2000) as client:
            for image in images:
                try:
                    result = client.predict(image)
                    print(f"{image}: {result.label} {result.score:.1%} in {result.timings.total:.0f} ms")
                except EnsemblerError as error:  # this image, or this moment; the client stays usable
                    print(f"{image}: {error}", file=sys.stderr)
                    failed = True
    except EnsemblerError as error:  # the bundle, the key, an option
        print(error, file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
