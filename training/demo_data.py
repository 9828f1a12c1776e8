"""The built-in images: 32x32 patches of six photographs that scikit-image ships, labelled by photograph.

The photographs are in scikit-image's wheel (0.24 to 0.26 looked at); terms as its README and docstrings state them:

=================  ==========================================================================
astronaut          NASA, Eileen Collins; public domain
chelsea            Stefan van der Walt; CC0
coffee             Rachel Michetti; CC0
hubble_deep_field  NASA, ESA; public domain
retina             Mikael Häggström, fundus photograph; CC0 1.0
rocket             SpaceX, launch of DSCOVR; released in the public domain
=================  ==========================================================================

No photograph is copied into this project. Patches come from blocks of 64x64 pixels; a block is either train or test,
so no pixel is in both.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import DataError, MissingExtraError

Pixels = npt.NDArray[np.uint8]

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "rocket.jpg",
)
BLOCK = 64
PATCH = 32
TRAIN_PER_CLASS = 1000
TEST_PER_CLASS = 200
# Blocks without structure (black sky, the frame of the retina) cannot be told apart by anyone.
MIN_BLOCK_STD = 6.0

CACHE_TAG = "demo-v1"  # change it whenever what build() returns changes


def labels() -> tuple[str, ...]:
    """Returns the six class names."""
    return tuple(name.split(".", maxsplit=1)[0] for name in PHOTOGRAPHS)


def build() -> tuple[Pixels, npt.NDArray[np.int64], Pixels, npt.NDArray[np.int64]]:
    """Cuts the patches; deterministic, a second of work.

    Returns:
        Train images ``(6000, 3, 32, 32)`` uint8 RGB and labels int64, test images ``(1200, 3, 32, 32)`` and labels.

    Raises:
        MissingExtraError: scikit-image or pillow is not installed.
        DataError: scikit-image no longer ships one of the photographs.
    """
    folder = photograph_folder()
    rng = np.random.Generator(np.random.PCG64(20260101))
    train_x, test_x = [], []
    for name in PHOTOGRAPHS:
        train_blocks, test_blocks = split_blocks(_read(folder / name), rng)
        train_x.append(_patches(train_blocks, TRAIN_PER_CLASS, rng))
        test_x.append(_patches(test_blocks, TEST_PER_CLASS, rng))
    train_y = np.repeat(np.arange(len(PHOTOGRAPHS)), TRAIN_PER_CLASS)
    test_y = np.repeat(np.arange(len(PHOTOGRAPHS)), TEST_PER_CLASS)
    train_order, test_order = rng.permutation(len(train_y)), rng.permutation(len(test_y))
    return (
        np.concatenate(train_x)[train_order],
        train_y[train_order],
        np.concatenate(test_x)[test_order],
        test_y[test_order],
    )


def photograph_folder() -> Path:
    """Returns the folder of scikit-image's data, without importing it (that would take seconds)."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingExtraError("scikit-image", "demo", "--data demo")
    return Path(spec.origin).parent / "data"


def split_blocks(photo: Pixels, rng: np.random.Generator) -> tuple[list[Pixels], list[Pixels]]:
    """Cuts a photograph ``(H, W, 3)`` into disjoint 64x64 blocks; every fifth (in shuffled order) is for testing."""
    rows, columns = photo.shape[0] // BLOCK, photo.shape[1] // BLOCK
    blocks = [
        photo[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK] for r in range(rows) for c in range(columns)
    ]
    blocks = [block for block in blocks if float(block.std()) >= MIN_BLOCK_STD]
    order = rng.permutation(len(blocks))
    test = [blocks[i] for i in order[::5]]
    train = [blocks[i] for k, i in enumerate(order) if k % 5]
    return train, test


def _patches(blocks: list[Pixels], count: int, rng: np.random.Generator) -> Pixels:
    """Returns ``(count, 3, 32, 32)``: random 32x32 windows of random blocks, half of them mirrored."""
    result = np.empty((count, 3, PATCH, PATCH), np.uint8)
    for i in range(count):
        block = blocks[int(rng.integers(len(blocks)))]
        top, left = rng.integers(0, BLOCK - PATCH + 1, 2)
        patch = block[top : top + PATCH, left : left + PATCH]
        if rng.random() < 0.5:
            patch = patch[:, ::-1]
        result[i] = patch.transpose(2, 0, 1)
    return result


def _read(path: Path) -> Pixels:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "image", "--data demo") from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(
            f"the demo photograph {path.name} cannot be read from scikit-image's data; "
            "pip install 'ensembler-edge[demo]' installs a version that has it"
        ) from error
