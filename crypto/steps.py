"""The layers before the boundary as both parties know them: operators, shapes and compiled programs, and no weight.

The file is in both bundles and is the same in both; its digest is compared before anything private is used. So a server
cannot have the client run another program than the one that its bundle came with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from ensembler.protocol.errors import BundleError

FORMAT, VERSION = "ensembler-steps", 1
IMAGE = "image"
MAX_STEPS = 10_000
MAX_CODE_BYTES = 64 * 1024 * 1024
MAX_VALUES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator.

    Attributes:
        name: unique, as in the net.
        operator: as ONNX calls it.
        inputs: values that are shared between the parties: ``IMAGE``, or outputs of steps before.
        weights: names and shapes of what only the server has.
        output: the name of what it makes.
        shape: of that, with the batch of 1.
        code: the engine's compiled program; empty where the engine needs none.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    output: str
    shape: tuple[int, ...]
    code: bytes = b""


def to_bytes(steps: Sequence[Step]) -> bytes:
    """Returns the canonical file of the steps."""
    rows = [
        [s.name, s.operator, list(s.inputs), [[n, list(d)] for n, d in s.weights], s.output, list(s.shape), s.code]
        for s in steps
    ]
    packed: bytes = msgpack.packb({"format": FORMAT, "version": VERSION, "steps": rows})
    return packed


def parse(data: bytes, source: str) -> tuple[Step, ...]:
    """Reads and validates steps.

    Args:
        data: the file's bytes.
        source: how errors name the file.

    Raises:
        BundleError: not steps of this version.
    """
    try:
        document = msgpack.unpackb(data, raw=False, max_bin_len=MAX_CODE_BYTES)
    except Exception as error:  # msgpack raises ValueError, UnpackException, RecursionError, UnicodeDecodeError, ...
        raise BundleError(f"{source} does not hold the layers of a net; copy the bundle again") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise BundleError(f"{source} does not hold layers in version {VERSION}; export the bundle again")
    rows = document.get("steps")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_STEPS:
        raise BundleError(f"{source}: steps is not a list of 1 to {MAX_STEPS}")
    known, steps = {IMAGE}, []
    for index, row in enumerate(rows):
        step = _step(row, f"{source}: steps[{index}]")
        if step.output in known or not known.issuperset(step.inputs):
            raise BundleError(f"{source}: steps[{index}] uses a value that is not there, or makes one twice")
        known.add(step.output)
        steps.append(step)
    return tuple(steps)


def digest(data: bytes) -> str:
    """Returns what the parties compare: the SHA-256 of the file, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _step(row: Any, source: str) -> Step:
    if not isinstance(row, list) or len(row) != 7:
        raise BundleError(f"{source} is not a step")
    name, operator, inputs, weights, output, shape, code = row
    texts = [name, operator, output, *(inputs if isinstance(inputs, list) else [None])]
    if not all(isinstance(text, str) and 0 < len(text) <= 200 for text in texts) or not isinstance(code, bytes):
        raise BundleError(f"{source} has a name that is none, or no program")
    if not isinstance(weights, list) or not all(isinstance(w, list) and len(w) == 2 for w in weights):
        raise BundleError(f"{source} has weights that are none")
    if not all(isinstance(weight, str) for weight, _ in weights):
        raise BundleError(f"{source} has weights that are none")
    return Step(
        name=name,
        operator=operator,
        inputs=tuple(inputs),
        weights=tuple((weight, _shape(dims, source)) for weight, dims in weights),
        output=output,
        shape=_shape(shape, source),
        code=code,
    )


def _shape(dims: Any, source: str) -> tuple[int, ...]:
    if not isinstance(dims, list) or len(dims) > 6 or not all(type(d) is int and 1 <= d <= MAX_VALUES for d in dims):
        raise BundleError(f"{source} has a shape that is none")
    if math.prod(dims) > MAX_VALUES:
        raise BundleError(f"{source} has a shape of more than {MAX_VALUES} values")
    return tuple(dims)
