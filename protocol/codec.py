"""The wire codecs: how a float tensor becomes the bytes that travel.

There are five, ``u8``, ``u4``, ``u3``, ``u2`` and ``u1``: unsigned affine codes of so many bits,

    code = clip(round(x / scale) + zero_point, 0, 2^bits - 1)        x ~ (code - zero_point) * scale

with round-half-to-even, as ONNX ``QuantizeLinear`` does, so that a graph that ends in that operator emits wire codes.
Inside a program codes are uint8, one a byte; on the wire those of fewer bits are packed, one image after the other,
the first code in the lowest bits of the first byte. The range is fixed before the selector is drawn
(docs/threat-model.md), and the size of a message depends on nothing but shape and codec: there is no entropy coding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import BundleError, ConfigError

CODEC_BITS = {"u8": 8, "u4": 4, "u3": 3, "u2": 2, "u1": 1}
MAX_SCALE = float(np.finfo(np.float32).max) / 255  # beyond it a code stands for infinity

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class AffineCodec:
    """One affine quantiser, for a whole tensor.

    Attributes:
        scale: the step between two codes, a positive float32 value.
        zero_point: the code of 0.0, in 0..code_max.
        bits: of one code: 8, 4, 3, 2 or 1.
    """

    scale: float
    zero_point: int
    bits: int = 8

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in CODEC_BITS.values():
            raise ConfigError(f"a codec of {self.bits!r} bits: choose {known_bits()}")
        if not (0 < self.scale <= MAX_SCALE and float(np.float32(self.scale)) == self.scale):
            raise ConfigError(f"codec scale {self.scale!r} is not a positive float32 value")
        if type(self.zero_point) is not int or not 0 <= self.zero_point <= self.code_max:
            raise ConfigError(f"codec zero point {self.zero_point!r} is not in 0..{self.code_max}")

    @classmethod
    def from_range(cls, low: float, high: float, bits: int = 8) -> AffineCodec:
        """Builds the codec whose codes span ``[low, high]``, widened to contain 0.

        Raises:
            ConfigError: the range is not finite, or empty.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        code_max = 2**bits - 1
        if not 1e-12 <= high - low <= MAX_SCALE * code_max:
            raise ConfigError(f"cannot quantise the range [{low}, {high}]: it is empty or not finite")
        scale = float(np.float32((high - low) / code_max))
        return cls(scale=scale, zero_point=int(np.clip(round(-low / scale), 0, code_max)), bits=bits)

    @property
    def name(self) -> str:
        """The codec's name on the wire and in manifests, for instance ``u8``."""
        return f"u{self.bits}"

    @property
    def code_max(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def low(self) -> float:
        """The smallest value that a code can stand for."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest value that a code can stand for."""
        return (self.code_max - self.zero_point) * self.scale

    def encode(self, values: Floats) -> Codes:
        """Returns the codes of ``values``, any shape, float32 in and uint8 out; NaN becomes the code of 0.0."""
        with np.errstate(over="ignore"):  # an overflow is clipped like any value outside the range
            scaled = np.nan_to_num(values / np.float32(self.scale), nan=0.0)
        codes: Codes = np.clip(np.rint(scaled) + self.zero_point, 0, self.code_max).astype(np.uint8)
        return codes

    def decode(self, codes: Codes) -> Floats:
        """Returns the values that ``codes`` stand for, any shape, uint8 in and float32 out."""
        values: Floats = (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return values


def require_codes(codes: Codes, codec: AffineCodec, model: str) -> None:
    """Refuses a model's answer that is no codes of ``codec``: packed, a code of too many bits would change others.

    Raises:
        BundleError: the model emits codes of more bits than its bundle says.
    """
    if codec.bits < 8 and codes.max(initial=0) > codec.code_max:
        raise BundleError(
            f"{model} answers with codes above {codec.code_max}, which {codec.name} does not have; export the bundle "
            "again"
        )


def known_bits() -> str:
    """Returns the codecs' bits as a sentence has them."""
    return ", ".join(str(bits) for bits in CODEC_BITS.values())


def packed_row_bytes(row_shape: Sequence[int], bits: int) -> int:
    """Returns how many bytes the codes of one image (one row of a batch) take on the wire."""
    return -(-math.prod(row_shape) * bits // 8)


def pack(codes: Codes, bits: int) -> Codes:
    """Returns codes as they travel.

    Args:
        codes: ``(B, ...)`` uint8, each below ``2^bits``.
        bits: of one code.

    Returns:
        ``(B, row_bytes)`` uint8. A last byte that codes do not fill is filled up with zero bits.
    """
    rows = np.ascontiguousarray(codes).reshape(len(codes), -1)
    if bits == 8:
        return rows
    return _regrouped(rows, bits, 8)[:, : packed_row_bytes(codes.shape[1:], bits)]


def unpack(packed: Codes, row_shape: Sequence[int], bits: int) -> Codes:
    """Returns the codes ``(B, *row_shape)`` uint8 of ``pack``'s result ``(B, row_bytes)`` uint8.

    Raises:
        ValueError: a bit beyond the last code is set, so these are not the bytes that ``pack`` makes.
    """
    if bits == 8:
        return packed.reshape(len(packed), *row_shape)
    count = math.prod(row_shape)
    rows = _regrouped(packed, 8, bits)
    if rows[:, count:].any():
        raise ValueError("bits beyond the last code are set")
    return rows[:, :count].reshape(len(packed), *row_shape)


def _regrouped(rows: Codes, bits_in: int, bits_out: int) -> Codes:
    """Reads each row's values of ``bits_in`` bits as one string of bits, and returns it in values of ``bits_out``.

    A row is filled up with zeros to whole groups: the fewest values that both widths divide, as 24 bits are eight codes
    of 3 bits and three bytes.
    """
    group_bits = math.lcm(bits_in, bits_out)
    values_in, values_out = group_bits // bits_in, group_bits // bits_out
    padding = -rows.shape[1] % values_in
    if padding:
        rows = np.pad(rows, [(0, 0), (0, padding)])
    groups = rows.reshape(len(rows), -1, values_in)
    words = np.zeros(groups.shape[:2], np.uint32)
    for i in range(values_in):
        words |= groups[:, :, i].astype(np.uint32) << np.uint32(bits_in * i)
    mask = np.uint32(2**bits_out - 1)
    parts = [((words >> np.uint32(bits_out * i)) & mask).astype(np.uint8) for i in range(values_out)]
    return np.stack(parts, axis=2).reshape(len(rows), -1)
