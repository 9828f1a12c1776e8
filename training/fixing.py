"""Between stages 1 and 2: what the server gets is fixed, from stage-1 nets alone.

The bodies' order, the codecs and their bits. No client, no selector and nothing of stage 3 is an argument of anything
here. Start reading at ``fix_wire``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ensembler.protocol.codec import CODEC_BITS, AffineCodec
from ensembler.protocol.manifest import WireSpec
from ensembler.training.fit import EVALUATION_BATCH, accuracy
from ensembler.training.models import Bottleneck, normalise
from ensembler.training.operators import Channels, heard_by
from ensembler.training.runs import WireState, bodies_digest
from ensembler.training.stage1 import Stage1Net
from ensembler.training.wire import CLIPPED_ANSWERS, CLIPPED_FEATURES, codec_for, fake_quantise

CALIBRATION_IMAGES = 1024
BITS_IMAGES = 4096
FEW_ANSWER_BITS = 4


@torch.inference_mode()
def fix_wire(
    nets: Sequence[Stage1Net],
    images: Tensor,
    *,
    wire_bits: int = 8,
    answer_bits: int = 8,
    bottleneck: Bottleneck | None = None,
    sizes: Sequence[int] | None = None,
) -> WireState:
    """Fixes everything the server gets: the bodies' order and the codecs, from stage-1 features alone.

    The features' range covers all N heads with their noise. A body's answers are taken on the features of all heads of
    its operator's nets: the client's head will be none of them, and the selected bodies' answers to it exceed what they
    say to their own head (measured: 28 dB instead of 41 dB through the wire). The order is shuffled with the operating
    system's generator, each operator's nets among themselves.

    Args:
        nets: the N trained nets.
        images: ``(M, 3, H, W)`` uint8 train images.
        wire_bits: of the features' codec.
        answer_bits: of the answers' codecs.
        bottleneck: of the nets; its codec is the features'.
        sizes: how many nets each operator holds; None: one holds all.
    """
    order: list[int] = []
    for size in sizes or [len(nets)]:
        own = list(range(len(order), len(order) + size))
        secrets.SystemRandom().shuffle(own)
        order += own
    x = normalise(images).to(memory_format=torch.channels_last)
    if bottleneck is None:
        feature_codec = codec_for(_all_features(nets, x), CLIPPED_FEATURES, wire_bits)
    else:
        feature_codec = bottleneck.codec
    features = mixed_features(nets, feature_codec, images)
    answer_codecs = tuple(
        codec_for(_in_batches(nets[i].net.body, features), CLIPPED_ANSWERS, answer_bits) for i in order
    )
    spec = WireSpec(
        bodies_id=bodies_digest([nets[i].net.body for i in order], feature_codec, answer_codecs),
        feature_shape=tuple(features.shape[1:]),
        feature_codec=feature_codec,
        answer_width=int(nets[0].net.body(features[:1]).shape[1]),
        answer_codecs=answer_codecs,
    )
    return WireState(spec=spec, order=tuple(order))


@torch.inference_mode()
def mixed_features(nets: Sequence[Stage1Net], codec: AffineCodec, images: Tensor) -> Tensor:
    """Returns features ``(M, C, h, w)`` as they arrive, the N stage-1 heads taking turns over ``images``.

    They stand in for the features of clients that do not exist yet, and say nothing of any selector: the bodies'
    codecs and quantisation scales come from them. What is drawn anew for every image is the same in each call. Of
    several operators each one's heads take turns over its own channels: in the others' nobody taught them to say
    anything.

    Args:
        nets: the N trained nets.
        codec: of the features.
        images: ``(M, 3, H, W)`` uint8, M >= 1.
    """
    by_channels: dict[Channels | None, list[Stage1Net]] = {}
    for item in nets:
        by_channels.setdefault(heard_by(item.net.body), []).append(item)
    parts = []
    for channels, heads in by_channels.items():
        features = _in_turns(heads, codec, images)
        parts.append(features if channels is None else features[:, slice(*channels)])
    return torch.cat(parts, dim=1)


def _in_turns(nets: Sequence[Stage1Net], codec: AffineCodec, images: Tensor) -> Tensor:
    parts = []
    for index, item in enumerate(nets):
        chosen = images[index :: len(nets)]
        if len(chosen):
            features = _in_batches(item.net.head, normalise(chosen).to(memory_format=torch.channels_last))
            parts.append(fake_quantise(item.perturbed(features, torch.Generator().manual_seed(index)), codec))
    return torch.cat(parts)


def _all_features(nets: Sequence[Stage1Net], x: Tensor) -> Tensor:
    """Returns what all N stage-1 heads send for the normalised images ``x``, ``(N, M, C, h, w)``."""
    drawn = [torch.Generator().manual_seed(index) for index in range(len(nets))]
    return torch.stack(
        [item.perturbed(_in_batches(item.net.head, x), each) for item, each in zip(nets, drawn, strict=True)]
    )


@torch.inference_mode()
def fewest_bits(nets: Sequence[Stage1Net], images: Tensor, labels: Tensor, max_drop_points: float) -> int:
    """Returns the fewest bits of the features' codec that cost the stage-1 nets little accuracy: ``--wire-bits auto``.

    Like everything that the server gets to know it is decided from stage 1. It is a careful choice, because the client
    is then trained through the codec and the stage-1 nets were not.

    Args:
        nets: the N trained nets.
        images: ``(M, 3, H, W)`` uint8; train images, whose accuracy is not used for anything else.
        labels: ``(M,)``.
        max_drop_points: of the mean accuracy over the N nets, in points.
    """
    x = normalise(images[:CALIBRATION_IMAGES]).to(memory_format=torch.channels_last)
    values = _all_features(nets, x)

    def mean_accuracy(codec: AffineCodec | None) -> float:
        return sum(accuracy(partial(_logits, item, codec, None), images, labels) for item in nets) / len(nets)

    floor = mean_accuracy(None) - max_drop_points
    widths = sorted(CODEC_BITS.values())
    for bits in widths[:-1]:
        if mean_accuracy(codec_for(values, CLIPPED_FEATURES, bits)) >= floor:
            return bits
    return widths[-1]


@torch.inference_mode()
def fewest_answer_bits(nets: Sequence[Stage1Net], images: Tensor, labels: Tensor, max_drop_points: float) -> int:
    """Returns 4 where answers in 4 bits cost the stage-1 nets little accuracy, else 8: ``--answer-bits auto``.

    Each net answers its own head; arguments, and why the choice is careful, as ``fewest_bits``.
    """
    x = normalise(images[:CALIBRATION_IMAGES]).to(memory_format=torch.channels_last)
    drops = []
    for item in nets:
        own = item.net.codec  # of a bottleneck, a part of the net
        coarse = codec_for(_in_batches(partial(_answers, item, own), x), CLIPPED_ANSWERS, FEW_ANSWER_BITS)
        exact, less = (accuracy(partial(_logits, item, own, codec), images, labels) for codec in (None, coarse))
        drops.append(exact - less)
    return FEW_ANSWER_BITS if sum(drops) / len(drops) <= max_drop_points else max(CODEC_BITS.values())


def _answers(item: Stage1Net, codec: AffineCodec | None, x: Tensor) -> Tensor:
    """Returns what a net answers its own head ``(B, F)``; the same in each call, also under fresh noise."""
    sent = item.perturbed(item.net.head(x), torch.Generator().manual_seed(0))
    answers: Tensor = item.net.body(sent if codec is None else fake_quantise(sent, codec))
    return answers


def _logits(item: Stage1Net, codec: AffineCodec | None, answer_codec: AffineCodec | None, x: Tensor) -> Tensor:
    answers = _answers(item, codec, x)
    logits: Tensor = item.net.tail(answers if answer_codec is None else fake_quantise(answers, answer_codec))
    return logits


def _in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(part) for part in torch.split(x, EVALUATION_BATCH)])
