"""From a torch module to the ONNX graph that ships: codes in, codes out, nothing of the machine inside.

Steps, each a function: ``from_torch`` (the float graph), ``with_weights`` (the same graph with another body's weights),
``optimised`` (batch norm folded), ``quantised`` (static U8S8), ``attach_codes`` (the ends become uint8 wire codes),
``scrubbed`` (no source paths, no stack traces, no layer names).
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import onnxscript.optimizer
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ExportError

onnxruntime.disable_telemetry_events()  # see sdk/__init__.py

Floats = npt.NDArray[np.float32]
Graph = onnx.ModelProto

CALIBRATION_BATCH = 64
# Share of activations inside the calibrated range, in percent. Against plain min/max it gained 1 to 3 dB on the
# bodies, whose calibration features come from N heads of which none is the client's.
CALIBRATION_PERCENTILE = 99.99
# Operators that only move codes: what comes out has the scale of what goes in.
_SAME_SCALE = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool"})
INPUT, NOISE, WHICH, KEEP, OUTPUT = "x", "noise", "which", "keep", "y"
_WEIGHTS = "ensembler.weights"  # metadata between from_torch and with_weights; scrubbed takes it off


def from_torch(module: nn.Module, examples: Sequence[Tensor], *, inputs: Sequence[str] = (INPUT,)) -> onnx.ModelProto:
    """Exports ``module`` as a float graph whose batch axis is free and whose initialisers keep their names.

    Args:
        module: in eval mode; one output.
        examples: one tensor per input, batch of 2 or more (a batch of 1 would become a constant).
        inputs: the inputs' names.

    Raises:
        ExportError: torch cannot export the module.
    """
    batch = torch.export.Dim("batch")
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                tuple(examples),
                dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in examples),
                input_names=list(inputs),
                output_names=[OUTPUT],
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter has no common base class
        raise ExportError(f"torch cannot export {type(module).__name__} to ONNX: {error}") from error
    if program is None:
        raise ExportError(f"torch exported nothing for {type(module).__name__}")
    graph: onnx.ModelProto = program.model_proto
    # Constants of forward() are initialisers too: only the module can tell which are weights.
    state = module.state_dict()
    weights = [initializer.name for initializer in graph.graph.initializer if initializer.name in state]
    helper.set_model_props(graph, {_WEIGHTS: "\n".join(weights)})
    return graph


def with_weights(graph: onnx.ModelProto, state: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Returns ``graph`` with the weights of another module of the same architecture.

    Exporting takes seconds, replacing weights milliseconds, and a server bundle has N equal graphs.

    Raises:
        ExportError: a weight of the graph is not in ``state``, one of ``state`` is not in the graph, or shapes differ.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    recorded = next((prop.value for prop in graph.metadata_props if prop.key == _WEIGHTS), "")
    missing = [name for name in recorded.splitlines() if name not in state]
    if missing:
        raise ExportError(f"the net has no {', '.join(missing)}, which the exported graph needs")
    replaced = 0
    for initializer in result.graph.initializer:
        if initializer.name in state:
            value = state[initializer.name].detach().cpu().numpy()
            if list(value.shape) != list(initializer.dims):
                raise ExportError(f"{initializer.name} has shape {value.shape}, the graph needs {initializer.dims}")
            initializer.CopyFrom(numpy_helper.from_array(np.asarray(value, order="C"), initializer.name))
            replaced += 1
    unused = len([n for n in state if not n.endswith("num_batches_tracked")]) - replaced
    if unused:
        raise ExportError(f"{unused} weights of the net have no place in the exported graph")
    return result


def optimised(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph with constants and batch norms folded, and its shapes inferred.

    onnxscript folds what the exporter leaves open; a batch norm that stayed a node of its own would be quantised twice.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(onnxscript.optimizer.optimize(graph), source)
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
        return onnx.load(target)


def quantised(
    graph: onnx.ModelProto,
    calibration: Mapping[str, Floats],
    *,
    input_codec: AffineCodec | None = None,
    output_codec: AffineCodec | None = None,
    weight_bits: Literal[7, 8] = 8,
) -> onnx.ModelProto:
    """Returns the graph with static 8-bit quantisation: unsigned activations, signed weights per channel.

    Args:
        graph: as ``optimised`` returns it.
        calibration: samples for each input, ``(M, ...)`` float32.
        input_codec: pins the scale of the input ``x``; None takes the calibrated one.
        output_codec: pins the scale of the output; None leaves the output in float. What is added at the end and is not
            made of ``x``, a client's noise, is added in float: onnxruntime's integer addition multiplies and adds in
            one step on ARM and in two on x86-64, which now and then rounds to another code; float addition does not.
        weight_bits: with 7 no sum of two products saturates 16 bits, so that x86-64 without VNNI need not take a slower
            way to be exact (``protocol.integers``).
    """
    overrides: dict[str, list[dict[str, Any]]] = {}
    if input_codec is not None:
        overrides[INPUT] = _override(input_codec)
    if output_codec is not None:
        for name in _output_chain(graph):
            overrides[name] = _override(output_codec)
    options: dict[str, Any] = {"TensorQuantOverrides": overrides, "CalibPercentile": CALIBRATION_PERCENTILE}
    if output_codec is None:
        options["OpTypesToExcludeOutputQuantization"] = ["Gemm", "MatMul", "Add"]
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)  # onnxruntime moves the weights of what it is given into a temporary file
    with tempfile.TemporaryDirectory() as folder, quiet():
        target = Path(folder) / "out.onnx"
        quantize_static(
            copy,
            str(target),
            _Samples(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            nodes_to_exclude=[] if output_codec is None else _added_at_the_end(copy),
            extra_options=options,
        )
        return onnx.load(target)


def attach_codes(
    graph: onnx.ModelProto,
    name: str,
    codec: AffineCodec,
    *,
    output: str | None = None,
    out_codec: AffineCodec | None = None,
) -> onnx.ModelProto:
    """Returns the graph with uint8 codes at its input ``x``, and at its output if ``output`` names it.

    Where the quantiser left a QuantizeLinear at the input (or a DequantizeLinear at the output) it is taken off, which
    is exact; a float graph gets the operator instead.

    Args:
        graph: float or quantised.
        name: the new name of the input.
        codec: of the input.
        output: the new name of the output; None leaves the output in float.
        out_codec: of the output.

    Raises:
        ExportError: the quantiser used another scale than the codec's.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    _code_input(result.graph, name, codec)
    if output is not None and out_codec is not None:
        _code_output(result.graph, output, out_codec)
    return result


def dropped(graph: onnx.ModelProto, name: str, codec: AffineCodec) -> onnx.ModelProto:
    """Returns the graph with an input ``keep``, bool: where it is False, the code of 0.0 takes the output's place.

    Dropping codes is exact, and a runtime that does not give the input fails instead of sending everything.

    Args:
        graph: with codes at its output.
        name: that output.
        codec: of it.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    output = _value(result.graph.output, name)
    inner = f"{name}_all"
    for node in result.graph.node:
        node.output[:] = [inner if o == name else o for o in node.output]
        node.input[:] = [inner if i == name else i for i in node.input]
    names = _constants(result.graph, {f"{name}_of_0": np.uint8(codec.zero_point)})
    result.graph.node.append(helper.make_node("Where", [KEEP, inner, *names], [name]))
    shape = [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]
    result.graph.input.append(helper.make_tensor_value_info(KEEP, TensorProto.BOOL, shape))
    return result


def channels_last(graph: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Returns the graph taking ``(B, H, W, C)`` at its uint8 input ``name`` instead of ``(B, C, H, W)``."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    inner = f"{name}_nchw"
    for node in result.graph.node:
        node.input[:] = [inner if i == name else i for i in node.input]
    result.graph.node.insert(0, helper.make_node("Transpose", [name], [inner], perm=[0, 3, 1, 2]))
    value = _value(result.graph.input, name)
    batch, channels, height, width = value.type.tensor_type.shape.dim
    dims = [batch.dim_param or "batch", height.dim_value, width.dim_value, channels.dim_value]
    value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.UINT8, dims))
    return result


def select_answers(
    graph: onnx.ModelProto, name: str, codecs: Sequence[AffineCodec], selector: Sequence[int], width: int
) -> onnx.ModelProto:
    """Returns the tail's graph with the selector in front: the codes of all N answers in, Eq. 1 inside.

    ``Gather`` takes the P answers that count; one ``DequantizeLinear`` with a scale per net turns codes into features
    and multiplies by S_i = 1/P.

    Args:
        graph: takes ``x`` ``(B, P, F)`` float.
        name: the new input, ``(B, N, F)`` uint8.
        codecs: of the N answers.
        selector: P positions.
        width: F.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    chosen = [codecs[i] for i in selector]
    scales = np.array([codec.scale / len(selector) for codec in chosen], np.float32)
    zeros = np.array([codec.zero_point for codec in chosen], np.uint8)
    result.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(selector, np.int64), "selector"),
            numpy_helper.from_array(scales, "answer_scales"),
            numpy_helper.from_array(zeros, "answer_zeros"),
        ]
    )
    first = [
        helper.make_node("Gather", [name, "selector"], ["selected"], axis=1),
        helper.make_node("DequantizeLinear", ["selected", "answer_scales", "answer_zeros"], [INPUT], axis=1),
    ]
    nodes = [*first, *result.graph.node]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    _replace_value(
        result.graph.input,
        INPUT,
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", len(codecs), width]),
    )
    return result


def scrubbed(graph: onnx.ModelProto) -> bytes:
    """Returns the graph's bytes without source paths, stack traces, layer names or the producer's version.

    Torch writes the source line of every layer into ``metadata_props``. Nodes and inner tensors get numbers for names.

    Raises:
        ExportError: the graph is not valid, or has graphs inside (branches, loops), which would keep their names.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    result.producer_name, result.producer_version, result.doc_string, result.domain = "ensembler", "", "", ""
    del result.metadata_props[:]
    del result.functions[:]
    inner = result.graph
    # onnxruntime declares every operator set that it knows.
    domains = {"", *(node.domain for node in inner.node)}
    opsets = [opset for opset in result.opset_import if opset.domain in domains]
    del result.opset_import[:]
    result.opset_import.extend(opsets)
    inner.name, inner.doc_string = "graph", ""
    del inner.value_info[:]
    del inner.metadata_props[:]
    keep = {value.name for value in (*inner.input, *inner.output)}
    names: dict[str, str] = {"": ""}

    def renamed(old: str) -> str:
        if old in keep:
            return old
        return names.setdefault(old, f"t{len(names)}")

    for index, node in enumerate(inner.node):
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ExportError(f"a net with branches or loops ({node.op_type}) cannot be exported")
        node.name, node.doc_string = f"n{index}", ""
        del node.metadata_props[:]
        node.input[:] = [renamed(i) for i in node.input]
        node.output[:] = [renamed(o) for o in node.output]
    for initializer in inner.initializer:
        initializer.name, initializer.doc_string = renamed(initializer.name), ""
        del initializer.metadata_props[:]
    for value in (*inner.input, *inner.output):
        value.doc_string = ""
        del value.metadata_props[:]
    try:
        onnx.checker.check_model(result)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
    data: bytes = result.SerializeToString(deterministic=True)
    return data


# --- parts ---


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    """Batches of one size: onnxruntime cannot put others into one histogram. The few samples left over are not used."""

    def __init__(self, samples: Mapping[str, Floats]) -> None:
        count = len(next(iter(samples.values())))
        batches = -(-count // CALIBRATION_BATCH)
        size = count // batches
        self._batches = iter(
            [
                {name: values[index * size : (index + 1) * size] for name, values in samples.items()}
                for index in range(batches)
            ]
        )

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._batches, None)


def _override(codec: AffineCodec) -> list[dict[str, Any]]:
    return [
        {
            "scale": np.array(codec.scale, np.float32),
            "zero_point": np.array(codec.zero_point, np.uint8),
            "quant_type": QuantType.QUInt8,
        }
    ]


def _output_chain(graph: onnx.ModelProto) -> Iterator[str]:
    """Yields the output's name and, through operators that only move codes, the tensors that must share its scale."""
    producers = {output: node for node in graph.graph.node for output in node.output}
    name = OUTPUT
    while True:
        yield name
        node = producers.get(name)
        if node is None or node.op_type not in _SAME_SCALE:
            return
        name = node.input[0]


def _added_at_the_end(graph: onnx.ModelProto) -> list[str]:
    """Returns the names of the last Add, and of what makes the summand that is not made of ``x``."""
    of_x = {INPUT}
    for node in graph.graph.node:  # in the order of computation
        if of_x.intersection(node.input):
            of_x.update(node.output)
    last = next((node for node in graph.graph.node if OUTPUT in node.output), None)
    if last is None or last.op_type != "Add" or of_x.issuperset(last.input):
        return []
    return [last.name, *(node.name for node in graph.graph.node if not of_x.intersection(node.output))]


def _code_input(graph: onnx.GraphProto, name: str, codec: AffineCodec) -> None:
    shape = [d.dim_param or d.dim_value for d in _value(graph.input, INPUT).type.tensor_type.shape.dim]
    users = [node for node in graph.node if INPUT in node.input]
    if len(users) == 1 and users[0].op_type == "QuantizeLinear":
        _require_scale(graph, users[0], codec)
        codes = users[0].output[0]
        graph.node.remove(users[0])
        for node in graph.node:
            node.input[:] = [name if i == codes else i for i in node.input]
    else:
        for node in reversed(_decoding_nodes(graph, name, codec)):
            graph.node.insert(0, node)
    _replace_value(graph.input, INPUT, helper.make_tensor_value_info(name, TensorProto.UINT8, shape))


def _code_output(graph: onnx.GraphProto, name: str, codec: AffineCodec) -> None:
    shape = [d.dim_param or d.dim_value for d in _value(graph.output, OUTPUT).type.tensor_type.shape.dim]
    producer = next(node for node in graph.node if OUTPUT in node.output)
    if producer.op_type == "DequantizeLinear":
        _require_scale(graph, producer, codec)
        codes = producer.input[0]
        graph.node.remove(producer)
    else:
        scale, zero = np.array(codec.scale, np.float32), np.array(codec.zero_point, np.uint8)
        names = _constants(graph, {f"{name}_scale": scale, f"{name}_zero": zero})
        codes = f"{name}_codes"
        graph.node.append(helper.make_node("QuantizeLinear", [OUTPUT, *names], [codes]))
    if codec.bits < 8:
        # QuantizeLinear saturates at 255; codes of fewer bits end earlier.
        ends = _constants(graph, {f"{name}_least": np.uint8(0), f"{name}_most": np.uint8(codec.code_max)})
        graph.node.append(helper.make_node("Clip", [codes, *ends], [name]))
    else:
        for node in graph.node:
            node.output[:] = [name if o == codes else o for o in node.output]
            node.input[:] = [name if i == codes else i for i in node.input]
    _replace_value(graph.output, OUTPUT, helper.make_tensor_value_info(name, TensorProto.UINT8, shape))


def _decoding_nodes(graph: onnx.GraphProto, name: str, codec: AffineCodec) -> list[onnx.NodeProto]:
    """Returns (code - zero_point) * scale in float operators.

    Not DequantizeLinear: onnxruntime quantises the float weights of an operator that stands between it and a
    QuantizeLinear when it loads the model, so that a float32 bundle would compute in int8.
    """
    scale, zero = np.array(codec.scale, np.float32), np.array(codec.zero_point, np.float32)
    zero_name, scale_name = _constants(graph, {f"{name}_zero": zero, f"{name}_scale": scale})
    floats, centred = f"{name}_float", f"{name}_centred"
    return [
        helper.make_node("Cast", [name], [floats], to=TensorProto.FLOAT),
        helper.make_node("Sub", [floats, zero_name], [centred]),
        helper.make_node("Mul", [centred, scale_name], [INPUT]),
    ]


def _constants(graph: onnx.GraphProto, values: Mapping[str, npt.NDArray[Any] | np.generic]) -> list[str]:
    """Adds initialisers and returns their names."""
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())
    return list(values)


def _require_scale(graph: onnx.GraphProto, node: onnx.NodeProto, codec: AffineCodec) -> None:
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.name in node.input[1:]}
    scale, zero = (values[name] for name in node.input[1:])
    if float(scale) != codec.scale or int(zero) != codec.zero_point or zero.dtype != np.uint8:
        raise ExportError("the quantiser did not keep the wire codec's scale; this onnxruntime is not supported")


def _value(values: Any, name: str) -> onnx.ValueInfoProto:
    found: onnx.ValueInfoProto = next(value for value in values if value.name == name)
    return found


def _replace_value(values: Any, name: str, new: onnx.ValueInfoProto) -> None:
    _value(values, name).CopyFrom(new)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's and quantiser's chatter (missing torchvision, histograms on stdout) off the terminal."""
    import contextlib
    import io

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
