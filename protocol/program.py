"""The graph of a torch server bundle: a list of calls of known operators, written as JSON.

It is what ``torch.export`` traced, and not torch's own archive of it: loading such an archive unpickles its members and
has the sizes of its tensors evaluated as Python. A program can do nothing but what ``OPERATORS`` do to tensors.

This module knows no torch: ``bind`` is given it, by the export and by the engine alike.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensembler.protocol.errors import BundleError
from ensembler.protocol.manifest import ServerManifest

FORMAT, VERSION = "ensembler-program", 1
MAX_PROGRAM_BYTES = 16 * 1024 * 1024
MAX_CALLS = 100_000
MAX_TENSORS = 100_000
MAX_DEPTH = 3  # of lists in an argument
CODES = 0  # the value that a program is given: (B, C, h, w) uint8; its tensors are the next ones

MAX_INTEGER = 1 << 62


def _item(values: Any, index: Any) -> Any:
    """Returns one of several results."""
    if not isinstance(values, list | tuple) or type(index) is not int:
        raise TypeError("getitem takes one of an operator's several results")
    return values[index]


def _on_integers(function: Callable[[int, int], int]) -> Callable[[Any, Any], int]:
    """Returns a function of sizes; of a list or of numbers without bound it would take all memory."""

    def checked(a: Any, b: Any) -> int:
        if type(a) is not int or type(b) is not int or abs(result := function(a, b)) > MAX_INTEGER:
            raise TypeError("sizes are integers")
        return result

    return checked


_PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    "getitem": _item,
    "integer_add": _on_integers(operator.add),
    "integer_sub": _on_integers(operator.sub),
    "integer_mul": _on_integers(operator.mul),
    "integer_floordiv": _on_integers(operator.floordiv),
}
# Of torch.ops.aten. None reads memory that is not its argument's (as as_strided does), draws, or writes in place.
_ATEN = """
    _native_batch_norm_legit_no_training.default _softmax.default _to_copy.default abs.default
    adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_max_pool2d.default add.Scalar add.Tensor
    addmm.default amax.default amin.default avg_pool1d.default avg_pool2d.default bmm.default cat.default
    chunk.default clamp.default clamp_max.default clamp_min.default constant_pad_nd.default conv1d.default
    conv1d.padding conv2d.default conv2d.padding conv3d.default conv_transpose2d.input cos.default div.Scalar
    div.Tensor elu.default erf.default exp.default expand.default flatten.using_ints flip.default gelu.default
    group_norm.default hardsigmoid.default hardswish.default hardtanh.default layer_norm.default leaky_relu.default
    linalg_vector_norm.default linear.default log.default log_softmax.int matmul.default max_pool1d.default
    max_pool2d.default max_pool2d_with_indices.default maximum.default mean.default mean.dim minimum.default
    mish.default mm.default mul.Scalar mul.Tensor native_group_norm.default native_layer_norm.default neg.default
    permute.default pixel_shuffle.default pixel_unshuffle.default pow.Tensor_Scalar prelu.default reciprocal.default
    relu.default relu6.default repeat.default reshape.default rms_norm.default roll.default round.default
    rsqrt.default rsub.Scalar scaled_dot_product_attention.default select.int sigmoid.default silu.default
    sin.default slice.Tensor softmax.int softplus.default split.Tensor split_with_sizes.default sqrt.default
    squeeze.default squeeze.dim squeeze.dims stack.default sub.Scalar sub.Tensor sum.dim_IntList sym_size.int
    t.default tanh.default transpose.int unbind.int unflatten.int unsqueeze.default upsample_bilinear2d.vec
    upsample_nearest2d.vec var.correction var_mean.correction
"""
OPERATORS = frozenset(_ATEN.split()) | _PYTHON.keys()
DTYPES = frozenset({"float32", "uint8", "int64", "bool"})
# What is computed in fewer bits where that is asked for, and what then needs its weights' 32.
LOWERED = frozenset({"addmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "mm"})
_RAISED = frozenset(
    {"_native_batch_norm_legit_no_training", "group_norm", "layer_norm", "native_group_norm", "native_layer_norm"}
    | {"prelu", "rms_norm"}
)
OPTIONS = frozenset({"alpha", "approximate", "correction", "dtype", "enable_gqa", "keepdim", "scale"})


@dataclass(frozen=True)
class Value:
    """An argument that is computed: the codes (0), a tensor of the net (1 to T), or the result of a call."""

    index: int


@dataclass(frozen=True)
class DType:
    """An argument that is a dtype of torch."""

    name: str


@dataclass(frozen=True)
class Call:
    """One operator and its arguments: values, dtypes, numbers, words, None, and lists of those."""

    operator: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """What a body computes, codes in and codes out; all N of a bundle have one.

    Attributes:
        num_tensors: T, how many tensors a net has: weights and its answer's codec.
        calls: in order; the result of the first is the value T + 1.
        output: the value that is the answer, ``(B, F)`` uint8.
    """

    num_tensors: int
    calls: tuple[Call, ...]
    output: int

    def tensor_names(self) -> list[str]:
        """Returns how the stacked tensors are called in the file beside the program, in their order."""
        return [f"t{index}" for index in range(self.num_tensors)]


def to_json(program: Program) -> bytes:
    """Returns the canonical bytes of a program: equal programs are equal files."""
    calls = [
        [call.operator, _plain(call.arguments), {name: _plain(value) for name, value in call.options.items()}]
        for call in program.calls
    ]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": program.num_tensors,
        "calls": calls,
        "output": program.output,
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def parse(data: bytes, source: str) -> Program:
    """Reads and validates a program.

    Args:
        data: the file's bytes.
        source: how errors name the file.

    Raises:
        BundleError: no program of this version, or an operator or argument that none has.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not JSON, so it is no program; export the bundle again") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise BundleError(f"{source} is not a program of version {VERSION}; export the bundle again")
    tensors, listed, output = (document.get(name) for name in ("tensors", "calls", "output"))
    if type(tensors) is not int or not 0 <= tensors <= MAX_TENSORS:
        raise BundleError(f"{source}: tensors is not a number up to {MAX_TENSORS}")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_CALLS:
        raise BundleError(f"{source}: calls is not a list of 1 to {MAX_CALLS}")
    calls = tuple(_Reader(f"{source}: calls[{i}]", tensors + 1 + i).call(each) for i, each in enumerate(listed))
    if type(output) is not int or not 0 <= output <= tensors + len(calls):
        raise BundleError(f"{source}: output is no value")
    return Program(tensors, calls, output)


def opened(
    bundle: Path, manifest: ServerManifest, load: Callable[[bytes], Mapping[str, Any]]
) -> tuple[Program, list[Any]]:
    """Reads the bodies of a torch bundle whose files are verified.

    Args:
        bundle: the folder.
        manifest: of it.
        load: reads the tensors by their names, as safetensors does. It is given bytes: what it mapped instead could
            change under a running server.

    Returns:
        The program and its tensors in its order, ``(N, ...)`` each.

    Raises:
        BundleError: no program, no tensors, or others than the program's.
    """
    graph, weights = (bundle / name for name in manifest.bodies)
    if graph.stat().st_size > MAX_PROGRAM_BYTES:
        raise BundleError(f"{graph} is larger than {MAX_PROGRAM_BYTES} bytes: not a program")
    program = parse(graph.read_bytes(), str(graph))
    try:
        found = load(weights.read_bytes())
    except Exception as error:  # the loader's own class, which this module does not know
        raise BundleError(f"{weights} does not hold tensors; export the bundle again") from error
    names, nets = program.tensor_names(), manifest.wire.num_nets
    if found.keys() != set(names) or any(tuple(found[name].shape)[:1] != (nets,) for name in names):
        raise BundleError(f"{weights} does not hold the program's {len(names)} tensors of {nets} nets")
    return program, [found[name] for name in names]


def lowered_tensors(program: Program) -> set[int]:
    """Returns which of the net's tensors are weights of what may be computed in fewer bits."""
    calls = (call for call in program.calls if call.operator.partition(".")[0] in LOWERED)
    return {value - 1 for call in calls for value in _values(call) if 1 <= value <= program.num_tensors}


def bind(program: Program, torch: Any, *, low: Any = None) -> Callable[[Sequence[Any], Any], Any]:
    """Returns the program as a function of one net's tensors and the codes.

    ``torch.func.vmap`` of it over stacked tensors computes N nets as one.

    Args:
        program: validated.
        torch: the module of that name.
        low: the dtype of what is between the codecs, for instance ``torch.bfloat16``; None leaves it in float32.
    """
    functions: list[Callable[..., Any]] = []
    dtypes: list[Any] = []
    for call in program.calls:
        name, _, overload = call.operator.partition(".")
        functions.append(_PYTHON[name] if not overload else getattr(getattr(torch.ops.aten, name), overload))
        dtypes.append(None if low is None else low if name in LOWERED else torch.float32 if name in _RAISED else None)
    first = program.num_tensors + 1
    last_use = {program.output: len(program.calls)}
    for index in reversed(range(len(program.calls))):
        for value in _values(program.calls[index]):
            last_use.setdefault(value, index)
    ended: list[list[int]] = [[] for _ in program.calls]
    for value, index in last_use.items():
        if value >= first and index < len(program.calls):
            ended[index].append(value)

    def run(tensors: Sequence[Any], codes: Any) -> Any:
        values = [codes, *tensors]

        def given(argument: Any) -> Any:
            if isinstance(argument, Value):
                return values[argument.index]
            if isinstance(argument, DType):
                return getattr(torch, argument.name)
            return [given(item) for item in argument] if isinstance(argument, tuple) else argument

        for function, dtype, call, dead in zip(functions, dtypes, program.calls, ended, strict=True):
            options = {name: given(option) for name, option in call.options.items()}
            arguments = [given(argument) for argument in call.arguments]
            if dtype is not None:
                arguments = [each.to(dtype) if isinstance(each, torch.Tensor) else each for each in arguments]
            values.append(function(*arguments, **options))
            for value in dead:
                values[value] = None  # its memory serves the next call
        return values[program.output]

    return run


# --- parts ---


def _values(call: Call) -> list[int]:
    def inside(argument: Any) -> list[int]:
        if isinstance(argument, Value):
            return [argument.index]
        return [index for item in argument for index in inside(item)] if isinstance(argument, tuple) else []

    return inside((*call.arguments, *call.options.values()))


def _plain(argument: Any) -> Any:
    if isinstance(argument, Value):
        return {"value": argument.index}
    if isinstance(argument, DType):
        return {"dtype": argument.name}
    return [_plain(item) for item in argument] if isinstance(argument, tuple) else argument


class _Reader:
    """Reads one call; ``values`` is how many there are before it."""

    def __init__(self, source: str, values: int) -> None:
        self._source = source
        self._values = values

    def call(self, item: Any) -> Call:
        if not (isinstance(item, list) and len(item) == 3 and isinstance(item[1], list) and isinstance(item[2], dict)):
            raise BundleError(f"{self._source} is not an operator, its arguments and its options")
        name, arguments, options = item
        if not isinstance(name, str) or name not in OPERATORS:
            raise BundleError(f"{self._source}: {str(name)[:60]!r} is no operator of a program")
        if not options.keys() <= OPTIONS:
            raise BundleError(f"{self._source} has an option that no program has")
        read = {option: self._argument(value, 0) for option, value in options.items()}
        return Call(name, tuple(self._argument(argument, 0) for argument in arguments), read)

    def _argument(self, item: Any, depth: int) -> Any:
        number = (isinstance(item, int) and abs(item) <= MAX_INTEGER) or (
            isinstance(item, float) and math.isfinite(item)
        )
        if item is None or number or (isinstance(item, str) and re.fullmatch("[a-z_]{1,20}", item)):
            return item
        if isinstance(item, list) and depth < MAX_DEPTH:
            return tuple(self._argument(each, depth + 1) for each in item)
        kind, value = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (None, None)
        if kind == "value" and type(value) is int and 0 <= value < self._values:
            return Value(value)
        if kind == "dtype" and isinstance(value, str) and value in DTYPES:
            return DType(value)
        raise BundleError(f"{self._source} has an argument that no program has")
