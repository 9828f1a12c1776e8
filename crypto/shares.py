"""Fixed-point numbers in two additive shares, and C2PI's reveal.

A number x is the integer ``round(x * 2^f)`` modulo 2^64, or 2^32; client and server have a share each,
and they add up to it. Each share alone is uniform. To reveal the boundary (Zhang et al., "C2PI", III-A) the client adds
noise to its own share and sends that; only the low 32 bits travel, which is exact while ``|y| < 2^(31 - f)``.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import ConfigError, ProtocolError

Shares = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

REVEALED = np.dtype("<u4")


def encode(values: Floats, fraction_bits: int) -> Shares:
    """Returns numbers as integers modulo 2^64."""
    return np.rint(values.astype(np.float64) * 2.0**fraction_bits).astype(np.int64).view(np.uint64)


def random_share(shape: tuple[int, ...]) -> Shares:
    """Returns a uniform share, from the operating system's generator."""
    return np.frombuffer(os.urandom(8 * math.prod(shape)), np.uint64).reshape(shape).copy()


def noised(share: Shares, magnitude: float, fraction_bits: int) -> bytes:
    """Returns what the client sends of its share: noise added, the low 32 bits of each number, little-endian.

    Args:
        share: the client's, any shape.
        magnitude: the noise is uniform in plus or minus this (C2PI's Eq. for the revealed share), from the operating
            system's generator; 0 adds none.
        fraction_bits: f.

    Raises:
        ConfigError: noise that does not fit into the revealed bits.
    """
    width = 2 * round(magnitude * 2**fraction_bits) + 1
    if not 1 <= width < 2**31:
        raise ConfigError(f"a noise magnitude of {magnitude:g} does not fit into {31 - fraction_bits} integer bits")
    # Of 64 random bits the remainder's bias is below 2^-32.
    drawn = np.frombuffer(os.urandom(8 * share.size), np.uint64) % np.uint64(width)
    noise = drawn.astype(np.int64) - width // 2
    total = share.reshape(-1) + noise.view(np.uint64)
    sent: bytes = total.astype(np.uint32).astype(REVEALED).tobytes()
    return sent


def revealed(share: Shares, sent: bytes, fraction_bits: int) -> Floats:
    """Returns the noised numbers from the server's share and what the client sent.

    Raises:
        ProtocolError: not 4 bytes for each number.
    """
    if len(sent) != REVEALED.itemsize * share.size:
        raise ProtocolError(f"a share of {share.size} numbers came in {len(sent)} bytes instead of {4 * share.size}")
    own = share.reshape(-1).astype(np.uint32)
    total = (own + np.frombuffer(sent, REVEALED).astype(np.uint32)).view(np.int32)
    return (total.astype(np.float64) / 2.0**fraction_bits).astype(np.float32).reshape(share.shape)
