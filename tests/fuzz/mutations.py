"""Changes valid inputs into nearly valid ones: the tree of a header or of a JSON document, not its bytes.

A fuzzer that flips bytes of a manifest hardly ever gets past the JSON parser. Here a random node of the tree is
replaced, removed, repeated, moved or renamed; every few times the bytes are changed after all.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack
from fuzz.targets import Target, joined, split

from ensembler.protocol.codec import CODEC_BITS, packed_row_bytes

ByBytes = Callable[[bytes, int], bytes]  # changes bytes, to at most so many

NUMBERS = (0, 1, -1, 2, 3, 4, 6, 7, 8, 15, 16, 63, 64, 255, 256, 1024, 4095, 4096, 4097, 1 << 20, (1 << 26) + 1)
NUMBERS += (1 << 31, 1 << 32, 1 << 53, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.5, 1e-45, 1e6, 1e38, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "a", "ü", "🦊", "\0", "\x1b[2J", "../x", "/etc/passwd", "manifest.json", "x" * 101, "0" * 64, "f" * 64)
TEXTS += ("u8", "u4", "u3", "u2", "u1", "u16", "infer", "status", "result", "error", "none", "fixed", "fresh", "drawn")
TEXTS += (
    "int8",
    "float32",
    "scrypt",
    "hkdf-sha256",
    "uniform",
    "\ud800",
    "a.tflite",
    "valid",
    "value",
    "dtype",
    "bodies_format",
    "torch",
    "getitem",
    "mm.default",
)


def mutated(target: Target, data: bytes, rng: random.Random, by_bytes: ByBytes) -> bytes:
    """Returns a changed input of ``target``, at most ``target.max_bytes`` long."""
    changed: bytes | None = None
    if target.kind != "bytes" and rng.random() < 0.75:
        with suppress(Exception):  # no tree, or one that the format cannot hold: its bytes are changed instead
            changed = _message(data, rng) if target.kind == "message" else _document(data, rng)
    if changed is None or len(changed) > target.max_bytes or rng.random() < 0.1:
        changed = by_bytes(data if changed is None else changed[: target.max_bytes], target.max_bytes)
    return changed


def flipped(rng: random.Random) -> ByBytes:
    """Returns what changes bytes where no fuzzer is there to do it: some are replaced, cut out or put in."""

    def change(data: bytes, limit: int) -> bytes:
        result = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(result) + 1)
            kind = rng.randrange(3)
            if kind == 0 and at < len(result):
                result[at] = rng.randrange(256)
            elif kind == 1:
                del result[at : at + rng.randint(1, 16)]
            else:
                result[at:at] = rng.randbytes(rng.randint(1, 16))
        return bytes(result[:limit])

    return change


def _document(data: bytes, rng: random.Random) -> bytes:
    tree = _changed(json.loads(data), rng)
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _message(data: bytes, rng: random.Random) -> bytes:
    header, payload = split(data)
    tree = _changed(msgpack.unpackb(header, strict_map_key=False), rng)
    if rng.random() < 0.6:
        payload = _fitting(tree, payload, rng)
    return joined(msgpack.packb(tree, use_single_float=rng.random() < 0.1), payload)


def _fitting(tree: Any, payload: bytes, rng: random.Random) -> bytes:
    """Returns a payload of the length that the header asks for, or the same one where that is none or much."""
    with suppress(Exception):
        codec, shape = tree["tensor"]
        if not all(type(axis) is int for axis in shape):  # a number times a text is a long text
            return payload
        length = shape[0] * packed_row_bytes(shape[1:], CODEC_BITS[codec])
        if 0 < length <= 4096:
            fill = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
            return (payload + fill)[:length]
    return payload


def _changed(tree: Any, rng: random.Random) -> Any:
    root = [tree]
    for _ in range(1 if rng.random() < 0.7 else rng.randint(2, 5)):
        places = list(_places(root))
        parent, key = rng.choice(places)
        _change(parent, key, places, rng)
    return root[0]


def _places(tree: Any) -> Any:
    """Yields every place of a tree: what holds it, and the key or index there."""
    pending = [tree]
    while pending:
        parent = pending.pop()
        for key in parent if isinstance(parent, dict) else range(len(parent)):
            yield parent, key
            if isinstance(parent[key], dict | list):
                pending.append(parent[key])


def _change(parent: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    value = parent[key]
    kind = rng.randrange(8)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice([*TEXTS, f"{key}x"])] = parent.pop(key)
    elif kind == 2:
        parent[key] = _other(value, rng)
    elif kind == 3 and isinstance(value, list):
        # Repeated lists share what they hold: doing it again and again would make a tree of millions of places.
        times = rng.choice((0, 2, 17 if len(places) < 200 else 1))
        parent[key] = value * times if rng.random() < 0.5 else value[: rng.randint(0, len(value))]
    elif kind == 4:
        there, at = rng.choice(places)
        with suppress(LookupError):  # it was removed meanwhile
            parent[key] = json.loads(json.dumps(there[at]))
    elif kind == 5:
        parent[key] = [value] if rng.random() < 0.5 else {"a": value}
    elif kind == 6 and isinstance(value, dict):
        value[rng.choice(TEXTS)] = _scalar(rng)
    else:
        parent[key] = _scalar(rng) if rng.random() < 0.5 else _other(value, rng)


def _other(value: Any, rng: random.Random) -> Any:
    """Returns a value of the same type, or of any where the type has no others."""
    if isinstance(value, bool) or value is None:
        return _scalar(rng)
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, 2 * value, rng.choice(NUMBERS), rng.randint(1, 9)))
    if isinstance(value, float):
        return rng.choice((value / 2, value * 3, -value, rng.choice(FLOATS)))
    if isinstance(value, str | bytes):
        cut = rng.randint(0, len(value))
        return rng.choice((value[:cut], value + value[cut:], value[:cut] + value[cut + 1 :]))
    return _scalar(rng)


def _scalar(rng: random.Random) -> Any:
    return rng.choice((rng.choice(NUMBERS), rng.choice(FLOATS), rng.choice(TEXTS), True, False, None, [], {}))
