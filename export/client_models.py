"""The client's two models in the formats that ship: head with noise, and selector with tail.

Both formats take and give the same codes. Start reading at ``make``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ensembler.edge_runtime.backends import AUTO, FEATURES, choose, median_ms, open_session
from ensembler.edge_runtime.runtime import open_head
from ensembler.export import graphs, tflite
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import ModelFormat, NoiseMode, Precision
from ensembler.training.models import PIXEL_SCALE, PIXEL_ZERO_POINT
from ensembler.training.perturbation import Draw
from ensembler.training.stages import Client

PIXEL_CODEC = AffineCodec(scale=PIXEL_SCALE, zero_point=PIXEL_ZERO_POINT)
IMAGE, ANSWERS, LOGITS = "image", "answers", "logits"

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Models:
    """Head and tail in one format.

    Attributes:
        head: the model's bytes.
        tail: the same.
        float32_ms: median time of one image through both in float32, on one thread of this machine.
    """

    head: bytes
    tail: bytes
    float32_ms: float


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the models are calibrated with.

    Attributes:
        x: normalised images, ``(M, 3, H, W)`` float32.
        draw: what is done to their features.
        answers: of all N bodies as they arrive, ``(M, N, F)`` float32.
    """

    x: Tensor
    draw: Draw
    answers: Tensor


def check(formats: Sequence[ModelFormat], precision: Precision) -> None:
    """Refuses what cannot be made, before anything is.

    Raises:
        ConfigError: TFLite in float32, or a format twice.
        MissingExtraError: the converter is not installed.
    """
    if len(set(formats)) != len(formats) or not formats:
        raise ConfigError(f"--format {', '.join(formats)}: give onnx, tflite or each of them once")
    if "tflite" in formats:
        if precision != "int8":
            raise ConfigError(
                "--format tflite makes int8 models alone: leave --quantize none out, or take --format onnx"
            )
        tflite.require()


def make(
    client: Client, samples: Samples, formats: Sequence[ModelFormat], precision: Precision
) -> dict[ModelFormat, Models]:
    """Makes head and tail in every format.

    Returns:
        The models; of several formats the one that takes less time here comes first.

    Raises:
        ExportError: a model cannot be made.
    """
    made = {each: _onnx(client, samples, precision) if each == "onnx" else _tflite(client, samples) for each in formats}
    if len(made) == 1:
        return made
    inputs, codec = _image_inputs(client, samples), client.wire.feature_codec
    took = {each: _both_ms(each, models.head, models.tail, codec, inputs) for each, models in made.items()}
    return {each: made[each] for each in sorted(made, key=took.__getitem__)}


def noise_mode(client: Client) -> NoiseMode:
    """Returns how the client's noise comes about."""
    perturbation = client.perturbation
    if perturbation.std == 0:
        return "none"
    if perturbation.tensors:
        return "drawn"
    return "fresh" if perturbation.fresh else "fixed"


# --- the modules that both formats are made of ---


class _Head(nn.Module):
    """Head and noise as one graph; what is drawn for each image is a second input."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.head = client.head
        self.mode = noise_mode(client)
        self.constant: Tensor
        self.register_buffer("constant", client.noise)

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> Tensor:
        features: Tensor = self.head(x)
        if drawn is not None:
            return features + (drawn if self.mode == "fresh" else self.constant.index_select(0, drawn))
        return features + self.constant if self.mode == "fixed" else features


class _ChannelsLastHead(nn.Module):
    """``_Head`` for images ``(B, H, W, 3)``, as applications have them."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.head = _Head(client)

    def forward(self, image: Tensor, drawn: Tensor | None = None) -> Tensor:
        features: Tensor = self.head(image.permute(0, 3, 1, 2), drawn)
        return features


class _Tail(nn.Module):
    """The tail behind the selector: ``(B, P, F)``, already weighted with 1/P, to logits."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.tail = client.tail

    def forward(self, selected: Tensor) -> Tensor:
        logits: Tensor = self.tail(selected.flatten(1))
        return logits


class _SelectingTail(nn.Module):
    """Selector and tail: the codes of all N answers as ``_numbers``, ``(B, N, F)``, to logits (Eq. 1)."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.tail = _Tail(client)
        codecs = [client.wire.answer_codecs[i] for i in client.selector]
        middle = _numbers(client).zero_point
        self.selector: Tensor
        self.scales: Tensor
        self.zeros: Tensor
        self.register_buffer("selector", torch.tensor(client.selector))
        self.register_buffer("scales", torch.tensor([[codec.scale / len(codecs)] for codec in codecs]))
        self.register_buffer("zeros", torch.tensor([[float(codec.zero_point - middle)] for codec in codecs]))

    def forward(self, codes: Tensor) -> Tensor:
        selected = codes.index_select(1, self.selector)
        logits: Tensor = self.tail((selected - self.zeros) * self.scales)
        return logits


# --- ONNX ---


def _onnx(client: Client, samples: Samples, precision: Precision) -> Models:
    given = {graphs.INPUT: samples.x} | _drawn(client, samples.draw)
    examples = [value[:2] for value in given.values()]
    head = graphs.optimised(graphs.from_torch(_Head(client).eval(), examples, inputs=list(given)))
    weighted = samples.answers[:, list(client.selector)] / len(client.selector)
    tail = graphs.optimised(graphs.from_torch(_Tail(client).eval(), [weighted[:2]]))
    in_float = _onnx_head(client, head, samples.draw), _onnx_tail(client, tail)
    found = in_float
    if precision == "int8":
        calibration = {name: value.numpy() for name, value in given.items()}
        codec = client.wire.feature_codec
        head = graphs.quantised(head, calibration, input_codec=PIXEL_CODEC, output_codec=codec)
        tail = graphs.quantised(tail, {graphs.INPUT: weighted.numpy()})
        found = _onnx_head(client, head, samples.draw), _onnx_tail(client, tail)
    return Models(*found, _both_ms("onnx", *in_float, client.wire.feature_codec, _image_inputs(client, samples)))


def _onnx_head(client: Client, graph: graphs.Graph, draw: Draw) -> bytes:
    codec = client.wire.feature_codec
    graph = graphs.attach_codes(graph, IMAGE, PIXEL_CODEC, output=FEATURES, out_codec=codec)
    if draw.keep is not None:
        graph = graphs.dropped(graph, FEATURES, codec)
    return graphs.scrubbed(graphs.channels_last(graph, IMAGE))


def _onnx_tail(client: Client, graph: graphs.Graph) -> bytes:
    wire = client.wire
    return graphs.scrubbed(
        graphs.select_answers(graph, ANSWERS, wire.answer_codecs, client.selector, wire.answer_width)
    )


# --- TFLite ---


def _tflite(client: Client, samples: Samples) -> Models:
    images = {IMAGE: samples.x.permute(0, 2, 3, 1).contiguous()} | _drawn(client, samples.draw)
    numbers = _numbers(client)
    answers = {ANSWERS: torch.from_numpy(numbers.decode(_answer_codes(client, samples.answers)))}
    ends = {IMAGE: PIXEL_CODEC, FEATURES: client.wire.feature_codec, ANSWERS: numbers}
    backend, float32_ms = choose(AUTO, ["tflite"]), 0.0
    models = []
    for module, given, output in (
        (_ChannelsLastHead(client), images, FEATURES),
        (_SelectingTail(client), answers, LOGITS),
    ):
        arrays = {name: value.numpy() for name, value in given.items()}
        in_float = tflite.from_torch(
            module.eval(), [value[:1] for value in given.values()], inputs=list(given), output=output
        )
        first = {name: values[:1] for name, values in arrays.items()}
        float32_ms += median_ms(open_session(in_float, backend=backend), first)
        codecs = {name: ends[name] for name in (*given, output) if name in ends}
        models.append(tflite.scrubbed(tflite.quantised(in_float, arrays, codecs=codecs)))
    head, tail = models
    return Models(head, tail, float32_ms)


# --- parts ---


def _numbers(client: Client) -> AffineCodec:
    """Returns which numbers the answers' codes are in TFLite, where all nets share one scale and one zero point.

    The converter multiplies scales into the tail's weights and adds zero points to its bias. What a weight loses when
    it is rounded is multiplied by the number that it meets, so numbers are counted from the middle of the zero points.
    """
    zeros = [client.wire.answer_codecs[i].zero_point for i in client.selector]
    return AffineCodec(scale=1.0, zero_point=round(sum(zeros) / len(zeros)))


def _drawn(client: Client, draw: Draw) -> dict[str, Tensor]:
    """Returns what the head takes beside the images."""
    if noise_mode(client) == "fresh":
        return {graphs.NOISE: draw.noise}
    return {} if draw.which is None else {graphs.WHICH: draw.which}


def _answer_codes(client: Client, answers: Tensor) -> npt.NDArray[np.uint8]:
    """Returns the codes of ``answers`` ``(M, N, F)`` float32, each net's by its own codec."""
    codecs = client.wire.answer_codecs
    return np.stack([codec.encode(answers[:, i].numpy()) for i, codec in enumerate(codecs)], axis=1)


def _image_inputs(client: Client, samples: Samples) -> dict[str, Array]:
    """Returns everything that head and tail take for the first image, as they ship."""
    image = PIXEL_CODEC.encode(samples.x[:1].permute(0, 2, 3, 1).numpy())
    drawn = {name: value[:1].numpy() for name, value in _drawn(client, samples.draw).items()}
    keep = {} if samples.draw.keep is None else {graphs.KEEP: samples.draw.keep[:1].numpy()}
    return {IMAGE: image, **drawn, **keep, ANSWERS: _answer_codes(client, samples.answers[:1])}


def _both_ms(wanted: ModelFormat, head: bytes, tail: bytes, codec: AffineCodec, inputs: Mapping[str, Array]) -> float:
    """Returns the time of one image through head and tail in the preferred runtime of a format."""
    backend = choose(AUTO, [wanted])
    given = {name: value for name, value in inputs.items() if name != ANSWERS}
    return median_ms(open_head(head, codec, backend=backend), given) + median_ms(
        open_session(tail, backend=backend), {ANSWERS: inputs[ANSWERS]}
    )
