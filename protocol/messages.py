"""Messages and their bytes; docs/protocol.md is the same in prose.

A message is two frames: a msgpack map (the header) and the payload of at most one tensor. Both directions decode with
the same two functions, and every limit is checked before anything is allocated for what it limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from ensembler.protocol.codec import CODEC_BITS, Codes, pack, packed_row_bytes, unpack
from ensembler.protocol.errors import LimitExceededError, ProtocolError, UnsupportedVersionError

VERSION = 1

INFER = "infer"
STATUS = "status"
RESULT = "result"
ERROR = "error"
# Of crypto-clear inference (docs/crypto.md): a session is opened and ended; link carries the engines' bytes both ways.
OPEN = "open"
LINK = "link"
RUN = "run"
SHARE = "share"
END = "end"
OPERATIONS = (INFER, STATUS, RESULT, ERROR, OPEN, LINK, RUN, SHARE, END)

REQUEST_ID_BYTES = 16
BODIES_ID_BYTES = 32
NO_BODIES = bytes(BODIES_ID_BYTES)
_FIELDS = frozenset(("v", "op", "id", "bodies", "budget_ms", "tensor", "info"))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a peer accepts. The defaults are the protocol's."""

    frames: int = 2
    header_bytes: int = 4096
    tensor_bytes: int = 64 * 1024 * 1024
    rank: int = 6
    rows: int = 4096
    text_chars: int = 1000

    @property
    def frame_bytes(self) -> int:
        """The largest single frame, for ZeroMQ's own MAXMSGSIZE."""
        return max(self.header_bytes, self.tensor_bytes)


LIMITS = Limits()


@dataclass(kw_only=True, slots=True)
class Message:
    """One request or reply.

    Attributes:
        operation: ``infer`` or ``status`` (device to cloud), ``result`` or ``error`` (back); or one of a session of
            crypto-clear inference.
        request_id: 16 random bytes that the reply repeats; a retry repeats them too.
        bodies_id: 32 bytes, which nets; zeros in ``status`` requests.
        budget_ms: how long the sender will still wait, at the moment of sending; 0 in replies.
        tensor: the codes, uint8, one a byte, first axis is the batch; None when the operation has none.
        bits: of one code of the tensor on the wire.
        info: small facts beside it: timings of a result, code and text of an error. Texts, numbers, lists of them.
    """

    operation: str
    request_id: bytes
    bodies_id: bytes = NO_BODIES
    budget_ms: float = 0.0
    tensor: Codes | None = None
    bits: int = 8
    info: dict[str, Any] = field(default_factory=dict)


def encode(message: Message) -> list[bytes | memoryview]:
    """Returns the two frames of ``message``. The payload of 8-bit codes is the tensor's own memory, not a copy."""
    descriptor: list[Any] = []
    payload: bytes | memoryview = b""
    if message.tensor is not None:
        descriptor = [f"u{message.bits}", list(message.tensor.shape)]
        payload = np.ascontiguousarray(pack(message.tensor, message.bits)).reshape(-1).data
    header: bytes = msgpack.packb(
        {
            "v": VERSION,
            "op": message.operation,
            "id": message.request_id,
            "bodies": message.bodies_id,
            "budget_ms": float(message.budget_ms),
            "tensor": descriptor,
            "info": message.info,
        }
    )
    return [header, payload]


def decode(frames: Sequence[bytes | memoryview], limits: Limits = LIMITS) -> Message:
    """Reads one message.

    Args:
        frames: what arrived, without ZeroMQ's routing frames. The tensor of the result is a view into the last one.
        limits: refused beyond these.

    Raises:
        LimitExceededError: a frame, the rank or the rows exceed a limit.
        UnsupportedVersionError: the header states another version.
        ProtocolError: anything else that is not a message.
    """
    if len(frames) != limits.frames:
        raise ProtocolError(f"a message has {limits.frames} frames, this one has {len(frames)}")
    header_frame, payload = frames
    if len(header_frame) > limits.header_bytes:
        raise LimitExceededError(f"the header has {len(header_frame)} bytes, more than {limits.header_bytes}")
    if len(payload) > limits.tensor_bytes:
        raise LimitExceededError(f"the payload has {len(payload)} bytes, more than {limits.tensor_bytes}")
    header = _unpack_header(header_frame, limits)
    version = header.get("v")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ProtocolError("the header states no version")
    if version != VERSION:
        raise UnsupportedVersionError(f"the peer speaks protocol version {version}, this side speaks {VERSION}")
    if header.keys() != _FIELDS:
        raise ProtocolError("the header's fields are not those of version 1")
    tensor, bits = _tensor(header["tensor"], payload, limits)
    return Message(
        operation=_operation(header["op"]),
        request_id=_fixed_bytes(header["id"], REQUEST_ID_BYTES, "id"),
        bodies_id=_fixed_bytes(header["bodies"], BODIES_ID_BYTES, "bodies"),
        budget_ms=_budget(header["budget_ms"]),
        tensor=tensor,
        bits=bits,
        info=_info(header["info"], limits),
    )


def peek_request_id(frames: Sequence[bytes | memoryview], limits: Limits = LIMITS) -> bytes | None:
    """Returns the request id of a message that ``decode`` refused, if it can be read, so that the reply can name it."""
    try:
        if not frames or len(frames[0]) > limits.header_bytes:
            return None
        return _fixed_bytes(_unpack_header(frames[0], limits).get("id"), REQUEST_ID_BYTES, "id")
    except ProtocolError:
        return None


def _unpack_header(frame: bytes | memoryview, limits: Limits) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(  # cheaper than an Unpacker that reads one header
            frame,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_without_duplicates,
            max_str_len=limits.header_bytes,
            max_bin_len=limits.header_bytes,
            max_array_len=64,
            max_map_len=32,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except msgpack.ExtraData as error:
        raise ProtocolError("the header is not one msgpack map with text keys") from error
    except Exception as error:  # msgpack raises ValueError, UnpackException, RecursionError, UnicodeDecodeError, ...
        raise ProtocolError("the header is not a msgpack map") from error
    if not isinstance(header, dict):
        raise ProtocolError("the header is not one msgpack map with text keys")
    return header


def _without_duplicates(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    items = pairs if isinstance(pairs, list) else list(pairs)  # msgpack 1.0 without its C part: a generator
    result = dict(items)
    if len(result) != len(items):
        raise ProtocolError("the header states a field twice")
    return result


def _operation(value: Any) -> str:
    if value not in OPERATIONS:
        raise ProtocolError("the header's operation is unknown")
    return str(value)


def _fixed_bytes(value: Any, length: int, name: str) -> bytes:
    if not isinstance(value, bytes) or len(value) != length:
        raise ProtocolError(f"the header's {name} is not {length} bytes")
    return value


def _budget(value: Any) -> float:
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise ProtocolError("the header's budget_ms is not a non-negative float")
    return value


def _tensor(descriptor: Any, payload: bytes | memoryview, limits: Limits) -> tuple[Codes | None, int]:
    if not isinstance(descriptor, list):
        raise ProtocolError("the header's tensor is not a list")
    if not descriptor:
        if len(payload):
            raise ProtocolError("the message has a payload but describes no tensor")
        return None, 8
    if len(descriptor) != 2 or not isinstance(descriptor[0], str) or not isinstance(descriptor[1], list):
        raise ProtocolError("the header's tensor is not [codec, shape]")
    if descriptor[0] not in CODEC_BITS:
        raise ProtocolError(f"the header's tensor has a codec other than {', '.join(CODEC_BITS)}")
    shape, bits = descriptor[1], CODEC_BITS[descriptor[0]]
    if not 1 <= len(shape) <= limits.rank:
        raise LimitExceededError(f"the tensor has {len(shape)} axes, not 1 to {limits.rank}")
    for axis in shape:
        if type(axis) is not int or not 1 <= axis <= limits.tensor_bytes:
            raise ProtocolError("an axis of the tensor is not a positive integer within the limits")
    if shape[0] > limits.rows:
        raise LimitExceededError(f"the tensor has {shape[0]} rows, more than {limits.rows}; send smaller batches")
    if math.prod(shape) > limits.tensor_bytes:
        raise LimitExceededError(f"the tensor has {math.prod(shape)} codes, more than {limits.tensor_bytes}")
    expected = shape[0] * packed_row_bytes(shape[1:], bits)
    if expected != len(payload):
        raise ProtocolError(f"the payload has {len(payload)} bytes, the shape {shape} in {bits} bits needs {expected}")
    try:
        return unpack(np.frombuffer(payload, np.uint8).reshape(shape[0], -1), shape[1:], bits), bits
    except ValueError as error:
        raise ProtocolError(f"the payload is not packed as the protocol says: {error}") from error


def _info(value: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError("the header's info is not a map with text keys")
    for key, item in value.items():
        if not isinstance(key, str):
            raise ProtocolError("the header's info is not a map with text keys")
        members = item if isinstance(item, list) else [item]
        for member in members:
            if isinstance(member, str) and len(member) <= limits.text_chars:
                continue
            if isinstance(member, int) or (isinstance(member, float) and math.isfinite(member)):
                continue
            raise ProtocolError("a value of the header's info is not a short text, number or list of them")
    return value
