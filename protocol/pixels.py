"""Images of 16 bits a channel to 8 bits: the device and training must agree on every pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import ImageError

# Pillow's modes of one channel of 16 bits. Before version 10 it opens a 16-bit PNG as I, which could hold 32 bits.
SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})
_TO_EIGHT_BITS = 257  # 65535 / 255


def eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scales 0..65535 to 0..255, rounded; the type of the result is uint8."""
    scaled: npt.NDArray[np.uint8] = ((values.astype(np.uint32) + _TO_EIGHT_BITS // 2) // _TO_EIGHT_BITS).astype(
        np.uint8
    )
    return scaled


def sixteen_to_eight_bits(image: Any, source: str) -> npt.NDArray[np.uint8]:
    """Returns the pixels ``(H, W)`` of a PIL image of one of ``SIXTEEN_BIT_MODES``, which convert() clips to white.

    Args:
        image: the PIL image.
        source: how the error names it.

    Raises:
        ImageError: a value is no 16-bit value.
    """
    values = np.asarray(image)
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise ImageError(
            f"{source}: mode {image.mode} with values {values.min()} to {values.max()}; 16 bits are 0 to 65535: scale "
            "them first"
        )
    return eight_bits(values)
