"""The wire as training sees it: the codec's straight-through fake quantiser, and how its range is fixed.

Everything here is decided from stage-1 nets, before the selector is drawn, because the server gets to know it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensembler.protocol.codec import CODE_MAX, AffineCodec
from ensembler.protocol.errors import ConfigError

# The share of stage-1 values that a codec's range may clip at either end. Single outliers would cost every other value
# precision; answers to foreign heads have more of them than features.
CLIPPED_FEATURES = 1e-4
CLIPPED_ANSWERS = 1e-3


def fake_quantise(x: Tensor, codec: AffineCodec) -> Tensor:
    """Returns what arrives when ``x`` travels through ``codec``; same shape and dtype.

    Rounding passes the gradient straight through; clipping stops it outside the codec's range.
    """
    inside = x.clamp(codec.low, codec.high)
    codes = torch.round(inside.detach() / codec.scale) + codec.zero_point
    arrived = (codes.clamp(0, CODE_MAX) - codec.zero_point) * codec.scale
    return inside + (arrived - inside).detach()


def fake_quantise_answers(answers: Tensor, codecs: tuple[AffineCodec, ...]) -> Tensor:
    """``fake_quantise`` for answers ``(B, n, F)``, with one codec per net on the second axis."""
    return torch.stack([fake_quantise(answers[:, i], codec) for i, codec in enumerate(codecs)], dim=1)


def codec_for(values: Tensor, clipped: float) -> AffineCodec:
    """Returns the codec whose range holds all but the share ``clipped`` of ``values`` at either end; any shape, float.

    Raises:
        ConfigError: the values are all equal or not finite: the net behind them did not train.
    """
    flat = values.detach().float().flatten()
    if not bool(torch.isfinite(flat).all()):
        raise ConfigError("stage-1 features are not finite: training diverged; lower the learning rate")
    rank = max(1, int(flat.numel() * clipped))
    high = float(flat.topk(rank).values[-1])
    low = float(flat.topk(rank, largest=False).values[-1])
    return AffineCodec.from_range(low, high)
