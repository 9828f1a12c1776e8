"""From a torch module to the TFLite model that ships: codes in, codes out, nothing of the machine inside.

Steps, each a function: ``from_torch`` (the float model), ``quantised`` (static int8: signed activations, signed weights
per channel), ``scrubbed`` (no source paths, no layer names). Models take one image or row; a session loops.

A code ``c`` of the wire is the int8 value ``c - 128`` here, of the same scale, so both formats speak one wire.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ensembler.export import graphs
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ExportError, MissingExtraError

# The quantiser keeps a scale as the quotient of a range, which is the codec's but for the last bit.
SCALE_SLACK = 1e-6
# Operators that only move codes: what comes out has the scale of what goes in.
_SAME_SCALE = ("TRANSPOSE", "RESHAPE", "MAX_POOL_2D")
_FILE_ID = b"TFL3"

BINS = 2048  # of a tensor's histogram

Range = tuple[float, float]


def require() -> None:
    """Raises ``MissingExtraError`` where the converter is not installed."""
    try:
        with _silent():
            import_module("ai_edge_quantizer")
            import_module("litert_torch")
    except ImportError as error:
        raise MissingExtraError("litert-torch", "tflite", "--format tflite") from error


def from_torch(module: nn.Module, examples: Sequence[Tensor], *, inputs: Sequence[str], output: str) -> bytes:
    """Converts ``module`` to a float model of one image.

    Not to one of a free number of images: the converter then may make a model without operators, which answers zeros.

    Args:
        module: in eval mode; one output.
        examples: one tensor per input, batch of 1.
        inputs: the inputs' names.
        output: the output's name.

    Raises:
        ExportError: the converter cannot, or what it made has no operators.
    """
    try:
        with _silent(), tempfile.TemporaryDirectory() as folder:
            import litert_torch

            target = Path(folder) / "model.tflite"
            litert_torch.convert(module.eval(), tuple(examples)).export(str(target))
            data = target.read_bytes()
    except Exception as error:  # the converter has no common base class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"litert-torch cannot convert {type(module).__name__} to TFLite: {reason[0][:500]}"
        ) from error
    model = _unpacked(data)
    graph = _graph(model)
    for index, name in zip([*graph.inputs, *graph.outputs], [*inputs, output], strict=True):
        graph.tensors[index].name = name.encode()
    if not graph.operators:
        raise ExportError(f"litert-torch made an empty model of {type(module).__name__}")
    return _packed(model)


def quantised(model: bytes, calibration: Mapping[str, npt.NDArray[Any]], *, codecs: Mapping[str, AffineCodec]) -> bytes:
    """Returns the model with static int8 quantisation.

    Args:
        model: as ``from_torch`` returns it.
        calibration: samples for each input, ``(M, ...)``.
        codecs: of the inputs and the output that are to be codes, by name. Other inputs stay in float; another output
            is int8 with the scale that it says itself, since runtimes differ in how they turn codes into numbers.

    Raises:
        ExportError: the quantiser fails, or used another scale than a codec's.
    """
    from ai_edge_quantizer import qtyping, quantizer, recipe_manager

    model = _with_finite_padding(model, calibration)
    ranges = _ranges(model, calibration)
    chain = _output_chain(model)
    ends = _ends(model)
    pinned = {name: codec for name, codec in codecs.items() if name != ends[-1]}
    if ends[-1] in codecs:
        pinned |= dict.fromkeys(chain, codecs[ends[-1]])
    for name, codec in pinned.items():
        ranges[name] = (-codec.zero_point * codec.scale, (255 - codec.zero_point) * codec.scale)
    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        activation_num_bits=8,
        weight_num_bits=8,
        algorithm_key=recipe_manager.AlgorithmName.MIN_MAX_UNIFORM_QUANT,
    )
    try:
        with _silent():
            found = quantizer.Quantizer(model, recipe.get_quantization_recipe()).quantize(
                {name: {"min": np.float32(low), "max": np.float32(high)} for name, (low, high) in ranges.items()},
                enable_progress_report=False,
            )
    except Exception as error:  # as above
        raise ExportError(f"ai-edge-quantizer cannot quantise the model: {error}") from error
    result = _with_scales(bytes(found.quantized_model), pinned, ends)
    for name in ends[:-1]:
        if name not in codecs:
            result = _with_float_input(result, name)
    return result


def scrubbed(model: bytes) -> bytes:
    """Returns the model without layer names, metadata and the converter's version; the ends keep their names."""
    result = _unpacked(model)
    graph = _graph(result)
    ends = {*graph.inputs, *graph.outputs}
    for index, tensor in enumerate(graph.tensors):
        if index not in ends:
            tensor.name = f"t{index}".encode()
    used = {0, *(tensor.buffer for tensor in graph.tensors)}
    for index, buffer in enumerate(result.buffers):
        if index not in used:
            buffer.data = None
    graph.name = b"graph"
    graph.debugMetadataIndex = -1
    for operator in graph.operators:
        operator.debugMetadataIndex = -1
    result.description, result.metadata, result.signatureDefs, result.metadataBuffer = b"ensembler", None, None, None
    return _packed(result)


# --- parts ---


def _ranges(model: bytes, calibration: Mapping[str, npt.NDArray[Any]]) -> dict[str, Range]:
    """Returns the range of each tensor that is computed, over all samples, but for the rarest values.

    The quantiser's own calibration keeps a moving average of each sample's ends, and what lies outside is cut off.
    """
    ends = _extremes(model, calibration)
    edges = {name: np.linspace(low, max(high, low + 1e-6), BINS + 1) for name, (low, high) in ends.items()}
    counts = {name: np.zeros(BINS) for name in ends}
    for name, values in _computed(model, calibration):
        counts[name] += np.histogram(values, edges[name])[0]
    cut = (100 - graphs.CALIBRATION_PERCENTILE) / 200  # at either end
    found = {}
    for name, count in counts.items():
        share = np.cumsum(count) / count.sum()
        low = edges[name][int(np.searchsorted(share, cut, side="right"))]
        high = edges[name][int(np.searchsorted(share, 1 - cut)) + 1]
        found[name] = (float(low), float(high))
    return found


def _extremes(model: bytes, calibration: Mapping[str, npt.NDArray[Any]]) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for name, values in _computed(model, calibration):
        low, high = found.get(name, (np.inf, -np.inf))
        found[name] = (min(low, float(values.min())), max(high, float(values.max())))
    return found


def _computed(
    model: bytes, calibration: Mapping[str, npt.NDArray[Any]]
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yields the float tensors that the model computes of each sample, its inputs among them, by name."""
    from ai_edge_litert.interpreter import Interpreter

    with _silent():
        interpreter = Interpreter(model_content=model, num_threads=1, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
    inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
    computed = {index for operator in interpreter._get_ops_details() for index in operator["outputs"]}
    computed |= {detail["index"] for detail in inputs.values()}
    details = [
        detail
        for detail in interpreter.get_tensor_details()
        if detail["index"] in computed and detail["dtype"] == np.float32
    ]
    for row in range(len(next(iter(calibration.values())))):
        for name, detail in inputs.items():
            sample = calibration[name][row : row + 1].astype(detail["dtype"], copy=False)
            interpreter.set_tensor(detail["index"], np.ascontiguousarray(sample))
        interpreter.invoke()
        for detail in details:
            try:
                value = interpreter.get_tensor(detail["index"])
            except ValueError:  # of a fused operator: never computed by itself
                continue
            yield detail["name"], value


def _with_finite_padding(model: bytes, calibration: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Returns the model with the least value of what is padded in place of minus infinity.

    The converter pads with that before a maximum is pooled, and it has no int8 code.
    """
    result = _unpacked(model)
    graph = _graph(result)
    ranges: dict[str, Range] | None = None
    for operator in graph.operators:
        if _name_of(result, operator) != "PADV2":
            continue
        buffer = result.buffers[graph.tensors[operator.inputs[2]].buffer]
        value = np.frombuffer(bytes(buffer.data), np.float32)
        if np.isneginf(value).all():
            ranges = ranges or _extremes(model, calibration)
            low = ranges[graph.tensors[operator.inputs[0]].name.decode()][0]
            buffer.data = np.frombuffer(np.full_like(value, low).tobytes(), np.uint8)
    return _packed(result)


def _output_chain(model: bytes) -> list[str]:
    """Returns the output's name and, through operators that only move codes, the tensors that must share its scale."""
    unpacked = _unpacked(model)
    graph = _graph(unpacked)
    producers = {index: operator for operator in graph.operators for index in operator.outputs}
    index = graph.outputs[0]
    chain = [index]
    while index in producers and _name_of(unpacked, producers[index]) in _SAME_SCALE:
        index = producers[index].inputs[0]
        chain.append(index)
    return [graph.tensors[index].name.decode() for index in chain]


def _ends(model: bytes) -> list[str]:
    """Returns the names of the inputs and, last, of the output."""
    graph = _graph(_unpacked(model))
    return [graph.tensors[index].name.decode() for index in (*graph.inputs, *graph.outputs)]


def _with_scales(model: bytes, pinned: Mapping[str, AffineCodec], ends: Sequence[str]) -> bytes:
    """Returns the model with exactly the codecs' scales, from which the quantiser's may differ in the last bit.

    The quantiser gives an end that stays in float another name, so the ends get theirs back.
    """
    result = _unpacked(model)
    graph = _graph(result)
    found = set()
    for tensor in graph.tensors:
        name = tensor.name.decode()
        if name in pinned and tensor.quantization is not None and tensor.quantization.scale is not None:
            codec, scale = pinned[name], float(tensor.quantization.scale[0])
            same = abs(scale - codec.scale) <= SCALE_SLACK * codec.scale
            if not same or int(tensor.quantization.zeroPoint[0]) != codec.zero_point - 128:
                raise ExportError(
                    f"ai-edge-quantizer did not keep the scale of {name!r}; this version of it is not supported"
                )
            tensor.quantization.scale = np.array([codec.scale], np.float32)
            found.add(name)
    missing = sorted(set(pinned) - found)
    if missing:
        raise ExportError(f"ai-edge-quantizer left {', '.join(missing)} in float; this version of it is not supported")
    for index, name in zip([*graph.inputs, *graph.outputs], ends, strict=True):
        graph.tensors[index].name = name.encode()
    return _packed(result)


def _with_float_input(model: bytes, name: str) -> bytes:
    """Returns the model taking the int8 input ``name`` in float; the quantiser leaves all inputs so, or none."""
    from ai_edge_litert import schema_py_generated as schema

    result = _unpacked(model)
    graph = _graph(result)
    position = next(i for i, index in enumerate(graph.inputs) if graph.tensors[index].name == name.encode())
    inner = graph.tensors[graph.inputs[position]]
    if inner.type != schema.TensorType.INT8:
        return model  # an index, which is a number as it is
    outer = copy.deepcopy(inner)
    inner.name = f"{name}_codes".encode()
    outer.type, outer.quantization = schema.TensorType.FLOAT32, None
    result.buffers.append(schema.BufferT())
    outer.buffer = len(result.buffers) - 1
    graph.tensors.append(outer)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.QUANTIZE
    code.version = 1
    result.operatorCodes.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex = len(result.operatorCodes) - 1
    operator.inputs, operator.outputs = [len(graph.tensors) - 1], [graph.inputs[position]]
    graph.operators.insert(0, operator)
    graph.inputs = [len(graph.tensors) - 1 if i == position else index for i, index in enumerate(graph.inputs)]
    return _packed(result)


def _unpacked(model: bytes) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(model, 0))


def _packed(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), _FILE_ID)
    return bytes(builder.Output())


def _graph(model: Any) -> Any:
    if len(model.subgraphs) != 1:
        raise ExportError("a net with branches or loops cannot be exported to TFLite")
    return model.subgraphs[0]


def _name_of(model: Any, operator: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    code = model.operatorCodes[operator.opcodeIndex]
    builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
    return next((name for name, value in vars(schema.BuiltinOperator).items() if value == builtin), "")


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps the converter's chatter off the terminal: what it prints, and what its C++ writes past Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with (
            Path(os.devnull).open("w", encoding="utf-8") as sink,
            redirect_stdout(sink),
            redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(nowhere)
