"""Converts an .npz that stores differenced images (``x_delta``, ``y``) into a pair member for ``--data npz:``.

    python tools/convert_data.py cifar10_train.npz local/cifar10/train.npz

``x_delta`` is the exact image, differenced along rows, columns and against the green channel, channels first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(source: str, target: str) -> None:
    """Reads ``source`` and writes ``x`` (N, 3, H, W) uint8, ``y`` and the label names to ``target``."""
    with np.load(source) as stored:
        x = stored["x_delta"].cumsum(2, dtype="u1").cumsum(3, dtype="u1")
        labels = stored["male"] if len(sys.argv) > 3 and sys.argv[3] == "male" else stored["y"]
        names = stored.get("label_names")
    x[0] += x[1]
    x[2] += x[1]
    arrays = {"x": np.ascontiguousarray(x.transpose(1, 0, 2, 3)), "y": labels}
    if names is not None:
        arrays["label_names"] = names
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **arrays)
    print(f"{target}: {arrays['x'].shape[0]} images, channel means {(arrays['x'].mean((0, 2, 3)) / 255).round(4)}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: convert_data.py SOURCE.npz TARGET.npz [male]")
    main(sys.argv[1], sys.argv[2])
