"""The wire as training sees it: the codec's straight-through fake quantiser, and how its range is fixed.

Everything here is decided from stage-1 nets, before the selector is drawn, because the server gets to know it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError

# The share of stage-1 values that a codec's range may clip at either end. Single outliers would cost every other value
# precision; answers to foreign heads have more of them than features.
CLIPPED_FEATURES = 1e-4
CLIPPED_ANSWERS = 1e-3
# A codec of few bits clips more: of so many ranges, evenly spaced, the one with the least squared error is taken.
RANGES_TRIED = 64
SAMPLED_VALUES = 1 << 20


def fake_quantise(x: Tensor, codec: AffineCodec) -> Tensor:
    """Returns what arrives when ``x`` travels through ``codec``; same shape and dtype.

    Rounding passes the gradient straight through; clipping stops it outside the codec's range.
    """
    inside = x.clamp(codec.low, codec.high)
    codes = torch.round(inside.detach() / codec.scale) + codec.zero_point
    arrived = (codes.clamp(0, codec.code_max) - codec.zero_point) * codec.scale
    return inside + (arrived - inside).detach()


def codes_of(x: Tensor, codec: AffineCodec) -> Tensor:
    """Returns the codes int64 of values; as ``AffineCodec.encode``, of tensors on any device."""
    return (torch.round(x / codec.scale) + codec.zero_point).clamp(0, codec.code_max).long()


def fake_quantise_answers(answers: Tensor, codecs: tuple[AffineCodec, ...]) -> Tensor:
    """``fake_quantise`` for answers ``(B, n, F)``, with one codec per net on the second axis."""
    return torch.stack([fake_quantise(answers[:, i], codec) for i, codec in enumerate(codecs)], dim=1)


def codec_for(values: Tensor, clipped: float, bits: int = 8) -> AffineCodec:
    """Returns the codec for ``values``, any shape, float.

    With 8 bits its range holds all but the share ``clipped`` at either end. Below, a step is so wide that clipping
    more pays: the range is scaled down to where the squared error is least.

    Raises:
        ConfigError: the values are all equal or not finite: the net behind them did not train.
    """
    flat = values.detach().float().flatten()
    if not bool(torch.isfinite(flat).all()):
        raise ConfigError("stage-1 features are not finite: training diverged; lower the learning rate")
    rank = max(1, int(flat.numel() * clipped))
    high = float(flat.topk(rank).values[-1])
    low = float(flat.topk(rank, largest=False).values[-1])
    if bits == 8:
        return AffineCodec.from_range(low, high)
    # An odd step: an even one may divide the width of a map, and see some of its columns only.
    sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES) | 1]
    candidates = [
        AffineCodec.from_range(low * i / RANGES_TRIED, high * i / RANGES_TRIED, bits)
        for i in range(RANGES_TRIED // 16, RANGES_TRIED + 1)
    ]
    return min(candidates, key=lambda codec: float((fake_quantise(sample, codec) - sample).square().mean()))
