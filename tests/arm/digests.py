"""What a client computes, as digests; the same program runs on the board and here.

python digests.py BUNDLE BACKEND [IMAGES.npy]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from ensembler.edge_runtime.runtime import EdgeRuntime

IMAGES = 128


def main() -> None:
    """Prints the digests of head and tail, for images and answers that are the same everywhere."""
    runtime = EdgeRuntime(Path(sys.argv[1]), backend=sys.argv[2])
    image, wire = runtime.manifest.image, runtime.manifest.wire
    generator = np.random.Generator(np.random.PCG64(0))
    images = generator.integers(0, 256, (IMAGES, image.height, image.width, 3), dtype=np.uint8)
    if len(sys.argv) > 3:
        images = np.load(sys.argv[3])
    shape = (len(images), wire.num_nets, wire.answer_width)
    answers = generator.integers(0, 2**wire.answer_bits, shape, dtype=np.uint8)
    codes, logits = runtime.encode(images), runtime.finish(answers)
    assert len(np.unique(codes)) > 1
    assert len(np.unique(logits)) > 1
    print(json.dumps({"head": _digest(codes), "tail": _digest(logits)}))


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


if __name__ == "__main__":
    main()
