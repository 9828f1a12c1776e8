"""The wire codec: how a float tensor becomes the bytes that travel.

Version 1 knows one codec, ``u8``: unsigned 8-bit affine codes,

    code = clip(round(x / scale) + zero_point, 0, 255)        x ~ (code - zero_point) * scale

with round-half-to-even, as ONNX ``QuantizeLinear`` does, so that a graph that ends in that operator emits wire codes.
The range is fixed before the selector is drawn (docs/threat-model.md), and the size of a message depends on nothing
but the shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import ConfigError

U8 = "u8"
CODE_MAX = 255
MAX_SCALE = float(np.finfo(np.float32).max) / CODE_MAX  # beyond it a code stands for infinity

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class AffineCodec:
    """One affine 8-bit quantiser, for a whole tensor.

    Attributes:
        scale: the step between two codes, a positive float32 value.
        zero_point: the code of 0.0, in 0..255.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (0 < self.scale <= MAX_SCALE and float(np.float32(self.scale)) == self.scale):
            raise ConfigError(f"codec scale {self.scale!r} is not a positive float32 value")
        if type(self.zero_point) is not int or not 0 <= self.zero_point <= CODE_MAX:
            raise ConfigError(f"codec zero point {self.zero_point!r} is not in 0..{CODE_MAX}")

    @classmethod
    def from_range(cls, low: float, high: float) -> AffineCodec:
        """Builds the codec whose codes span ``[low, high]``, widened to contain 0.

        Raises:
            ConfigError: the range is not finite, or empty.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        if not 1e-12 <= high - low <= MAX_SCALE * CODE_MAX:
            raise ConfigError(f"cannot quantise the range [{low}, {high}]: it is empty or not finite")
        scale = float(np.float32((high - low) / CODE_MAX))
        return cls(scale=scale, zero_point=int(np.clip(round(-low / scale), 0, CODE_MAX)))

    @property
    def low(self) -> float:
        """The smallest value that a code can stand for."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest value that a code can stand for."""
        return (CODE_MAX - self.zero_point) * self.scale

    def encode(self, values: Floats) -> Codes:
        """Returns the codes of ``values``, any shape, float32 in and uint8 out; NaN becomes the code of 0.0."""
        with np.errstate(over="ignore"):  # an overflow is clipped like any value outside the range
            scaled = np.nan_to_num(values / np.float32(self.scale), nan=0.0)
        codes: Codes = np.clip(np.rint(scaled) + self.zero_point, 0, CODE_MAX).astype(np.uint8)
        return codes

    def decode(self, codes: Codes) -> Floats:
        """Returns the values that ``codes`` stand for, any shape, uint8 in and float32 out."""
        values: Floats = (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return values
