"""A net's first layers for two parties: an ONNX graph becomes steps, each a program that SPU compiled from JAX.

Weights are inputs of the programs, never constants of them: a constant would be in the client's bundle. Start reading
at ``to_layers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ensembler.crypto.steps import IMAGE, Step
from ensembler.protocol.errors import ExportError, MissingExtraError

Array = npt.NDArray[Any]
Compute = Callable[..., Any]

# They change no number of a net that only answers.
_NOTHING = frozenset({"Identity", "Dropout"})


class _Unknown(Exception):  # noqa: N818
    """An operator, or a form of one, that has no translation."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What the two parties compute.

    Attributes:
        steps: compiled, in order.
        weights: that the server gives them, float32.
        computes: of each step, in JAX, of one image.
    """

    steps: list[Step]
    weights: dict[str, Array]
    computes: list[Compute]

    def in_fixed_point(self, fraction_bits: int) -> Callable[[Array], tuple[Array, float]]:
        """Returns what computes the steps as the engine does, but for its ring: numbers are cut after each step.

        The engine's truncation is off by one now and then, in an unknown direction; here a random half is.

        Args:
            fraction_bits: f.

        Returns:
            A function of normalised images ``(B, 3, H, W)``, to the last step's output ``(B, ...)`` and the largest
            magnitude of all steps' outputs.
        """
        import jax

        unit, generator = 2.0**fraction_bits, np.random.default_rng(0)
        last_use = {name: place for place, step in enumerate(self.steps) for name in step.inputs}

        def rounded(value: Array) -> Array:
            return (np.rint(value * unit) / unit).astype(np.float32)

        def of_several(step: Step, compute: Compute) -> Compute:
            own = [rounded(self.weights[name]) for name, _ in step.weights]
            several: Compute = jax.vmap(lambda *shared: compute(*(value[None] for value in shared), *own)[0])
            compiled: Compute = jax.jit(several)
            return compiled

        programs = [of_several(step, compute) for step, compute in zip(self.steps, self.computes, strict=True)]

        def computed(images: Array) -> tuple[Array, float]:
            values, largest = {IMAGE: rounded(images)}, 0.0
            for place, (step, program) in enumerate(zip(self.steps, programs, strict=True)):
                result = np.asarray(program(*(values[name] for name in step.inputs)), np.float64)
                largest = max(largest, float(np.abs(result).max()))
                values = {name: value for name, value in values.items() if last_use.get(name, 0) > place}
                values[step.output] = (np.floor(result * unit + generator.random(result.shape)) / unit).astype(
                    np.float32
                )
            return values[self.steps[-1].output], largest

        return computed


def to_layers(graph: onnx.ModelProto, image_shape: tuple[int, ...]) -> Layers:
    """Returns a graph's layers for two parties.

    Args:
        graph: float, batch norms folded; one input, one output.
        image_shape: ``(1, 3, H, W)``.

    Raises:
        ExportError: an operator that has no translation; the message names it and the last place before it.
        MissingExtraError: SPU is not installed.
    """
    nodes = _pooled_first(list(graph.graph.node), graph.graph.output[0].name)
    weights = {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
    names = {graph.graph.input[0].name: IMAGE}
    shapes: dict[str, tuple[int, ...]] = {IMAGE: image_shape}
    steps: list[Step] = []
    used: dict[str, Array] = {}
    computes: list[Compute] = []
    for node in nodes:
        if node.op_type in _NOTHING:
            names[node.output[0]] = names[node.input[0]]
            continue
        try:
            compute, inputs, own = _translated(node, names, weights)
        except _Unknown as unknown:
            last = steps[-1].name if steps else "none"
            raise ExportError(
                f"{node.name or node.op_type}: {unknown} cannot be computed by two parties; the last layer that can is "
                f"{last}, so choose a --boundary up to there"
            ) from None
        output = f"v{len(steps) + 1}"
        named = {f"w{len(used) + i}": value for i, value in enumerate(own)}
        step = Step(
            name=f"{len(steps) + 1}:{node.op_type}",
            operator=node.op_type,
            inputs=tuple(inputs),
            weights=tuple((name, value.shape) for name, value in named.items()),
            output=output,
            shape=(),
        )
        step, shapes[output] = _compiled(step, compute, [shapes[name] for name in inputs])
        used |= named
        names[node.output[0]] = output
        steps.append(step)
        computes.append(compute)
    if not steps:
        raise ExportError("there is no layer before the boundary; choose a later one")
    return Layers(steps=steps, weights=used, computes=computes)


# --- operators ---


def _translated(
    node: onnx.NodeProto, names: dict[str, str], weights: dict[str, Array]
) -> tuple[Compute, list[str], list[Array]]:
    """Returns what a node computes, of which values, and with which weights after them."""
    make = _OPERATORS.get(node.op_type)
    if make is None:
        raise _Unknown(f"the operator {node.op_type}")
    shared = [names[name] for name in node.input if name in names]
    constants = [weights[name] for name in node.input if name in weights]
    if len(shared) + len(constants) != len([name for name in node.input if name]):
        raise _Unknown(f"the operator {node.op_type} on a value that is computed otherwise")
    options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    compute, used = make(options, constants, len(shared))
    return compute, shared, [np.asarray(value, np.float32) for value in used]


Made = tuple[Compute, list[Array]]


def _conv(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    import jax

    if not constants or constants[0].ndim != 4:
        raise _Unknown("a convolution that is not of images")
    if options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise _Unknown("a convolution with automatic padding")
    pads = options.get("pads", [0, 0, 0, 0])
    strides, dilations, groups = (
        options.get("strides", [1, 1]),
        options.get("dilations", [1, 1]),
        options.get("group", 1),
    )

    def compute(x: Any, weight: Any, *bias: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x,
            weight,
            strides,
            [(pads[0], pads[2]), (pads[1], pads[3])],
            rhs_dilation=dilations,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=groups,
        )
        return y + bias[0][None, :, None, None] if bias else y

    return compute, constants


def _gemm(options: dict[str, Any], constants: list[Array], count: int) -> Made:
    if count != 1 or options.get("transA") or options.get("alpha", 1.0) != 1 or options.get("beta", 1.0) != 1:
        raise _Unknown("a product of two values that are both computed, or a scaled one")
    weight = constants[0].T if options.get("transB") else constants[0]

    def compute(x: Any, weight: Any, *bias: Any) -> Any:
        y = x @ weight
        return y + bias[0] if bias else y

    return compute, [np.ascontiguousarray(weight), *constants[1:]]


def _relu(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    import jax.numpy as jnp

    return lambda x: jnp.maximum(x, 0.0), []


def _clip(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    import jax.numpy as jnp

    if len(constants) != 2:
        raise _Unknown("a clip with one bound")
    low, high = (float(value) for value in constants)
    return lambda x: jnp.minimum(jnp.maximum(x, low), high), []


def _max_pool(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    import jax.numpy as jnp

    window = _windows(options)

    def compute(x: Any) -> Any:
        parts = window(x, -(2.0**12))
        while len(parts) > 1:  # a tree: as many comparisons as a chain in fewer rounds
            pairs = [jnp.maximum(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
            parts = pairs + parts[2 * len(pairs) :]
        return parts[0]

    return compute, []


def _average_pool(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    if any(options.get("pads", [0])) and not options.get("count_include_pad"):
        raise _Unknown("an average that leaves its padding out")
    window, size = _windows(options), math.prod(options["kernel_shape"])
    return lambda x: sum(window(x, 0.0)) * (1.0 / size), []


def _windows(options: dict[str, Any]) -> Callable[[Any, float], list[Any]]:
    """Returns what gives a pooling's values, one array for each place in its window."""
    import jax.numpy as jnp

    kernel, strides = options["kernel_shape"], options.get("strides", [1, 1])
    pads = options.get("pads", [0, 0, 0, 0])
    if len(kernel) != 2 or options.get("ceil_mode") or set(options.get("dilations", [1])) != {1}:
        raise _Unknown("a pooling with dilations or sizes that are rounded up")

    def parts(x: Any, padding: float) -> list[Any]:
        if any(pads):
            x = jnp.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])), constant_values=padding)
        height = (x.shape[2] - kernel[0]) // strides[0] + 1
        width = (x.shape[3] - kernel[1]) // strides[1] + 1
        return [
            x[
                :,
                :,
                i : i + strides[0] * (height - 1) + 1 : strides[0],
                j : j + strides[1] * (width - 1) + 1 : strides[1],
            ]
            for i in range(kernel[0])
            for j in range(kernel[1])
        ]

    return parts


def _global_average(options: dict[str, Any], constants: list[Array], count: int) -> Made:
    axes = [int(axis) for axis in (constants[0] if constants else options.get("axes", [2, 3]))]
    if count != 1 or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise _Unknown("a mean over other axes than an image's")
    keep = bool(options.get("keepdims", 1))
    return lambda x: x.mean((2, 3), keepdims=keep), []


def _reshape(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    wanted = [int(axis) for axis in constants[0]]
    if wanted[0] not in (0, -1, 1) or wanted[1:].count(-1) > (wanted[0] != -1):
        raise _Unknown("a reshape that mixes images")
    return lambda x: x.reshape(1, *wanted[1:]), []


def _flatten(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    if options.get("axis", 1) != 1:
        raise _Unknown("a flatten that mixes images")
    return lambda x: x.reshape(1, -1), []


def _add(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    return (lambda a, b: a + b), constants


def _batch_norm(options: dict[str, Any], constants: list[Array], count: int) -> Made:  # noqa: ARG001
    scale, shift, mean, variance = (value.astype(np.float64) for value in constants)
    factor = scale / np.sqrt(variance + options.get("epsilon", 1e-5))
    return (lambda x, a, b: x * a[None, :, None, None] + b[None, :, None, None]), [factor, shift - mean * factor]


_OPERATORS: dict[str, Callable[[dict[str, Any], list[Array], int], Made]] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Conv": _conv,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "MaxPool": _max_pool,
    "ReduceMean": _global_average,
    "Relu": _relu,
    "Reshape": _reshape,
}


def _pooled_first(nodes: list[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Takes the largest before the ReLU and not after it, which is the same and leaves fewer numbers to compare."""
    result = list(nodes)
    for index, node in enumerate(result):
        readers = [other for other in result if node.output[0] in other.input]
        if node.op_type != "Relu" or node.output[0] == output or [r.op_type for r in readers] != ["MaxPool"]:
            continue
        (pool,) = readers
        relu, pooled = onnx.NodeProto(), onnx.NodeProto()
        pooled.CopyFrom(pool)
        relu.CopyFrom(node)
        pooled.input[0], pooled.output[0] = node.input[0], node.output[0]
        relu.input[0], relu.output[0] = node.output[0], pool.output[0]
        result[index], result[result.index(pool)] = pooled, relu
    return result


# --- SPU ---


def _compiled(step: Step, compute: Compute, shapes: Sequence[tuple[int, ...]]) -> tuple[Step, tuple[int, ...]]:
    """Returns the step with its program and the shape of its output."""
    try:
        import jax
        from spu import libspu
        from spu.utils import frontend
    except ImportError as error:
        raise MissingExtraError("spu", "crypto", "exporting for two parties") from error
    given = [np.zeros(shape, np.float32) for shape in (*shapes, *(shape for _, shape in step.weights))]
    shape = tuple(jax.eval_shape(compute, *given).shape)
    names = [*step.inputs, *(name for name, _ in step.weights)]
    secret = [libspu.Visibility.VIS_SECRET] * len(names)
    program, _ = frontend.compile(frontend.Kind.JAX, compute, given, {}, names, secret, lambda _: [step.output])
    return replace(step, shape=shape, code=program.SerializeToString()), shape
