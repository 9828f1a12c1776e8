"""The bytes of a message (docs/protocol.md), and what a peer does with bytes that are none."""

from __future__ import annotations

import os
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ensembler.protocol import messages
from ensembler.protocol.errors import LimitExceededError, ProtocolError, UnsupportedVersionError
from ensembler.protocol.messages import Limits, Message, decode, encode, peek_request_id

REQUEST_ID = bytes(range(16))
BODIES_ID = bytes(range(32, 64))

# Written out field by field from the format's description, not copied from what encode() printed.
GOLDEN_REQUEST = bytes.fromhex(
    "87"  # a map of 7
    "a176 01"  # v: 1
    "a26f70 a5696e666572"  # op: infer
    "a26964 c410 000102030405060708090a0b0c0d0e0f"  # id
    "a6626f64696573 c420 202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"  # bodies
    "a96275646765745f6d73 cb4097700000000000"  # budget_ms: 1500.0
    "a674656e736f72 92 a27538 93020103"  # tensor: [u8, [2, 1, 3]]
    "a4696e666f 80"  # info: {}
)
GOLDEN_ERROR = bytes.fromhex(
    "87"
    "a176 01"
    "a26f70 a56572726f72"  # op: error
    "a26964 c410 000102030405060708090a0b0c0d0e0f"
    "a6626f64696573 c420 0000000000000000000000000000000000000000000000000000000000000000"
    "a96275646765745f6d73 cb0000000000000000"
    "a674656e736f72 90"  # tensor: none
    "a4696e666f 83"  # info: a map of 3
    "a4636f6465 cd012d"  # code: 301
    "a76d657373616765 a466756c6c"  # message: full
    "ae72657472795f61667465725f6d73 cb4049000000000000"  # retry_after_ms: 50.0
)


def header(**changes):
    """Returns a valid ``infer`` header's fields with ``changes``; ``...`` leaves a field out."""
    fields = {
        "v": 1,
        "op": "infer",
        "id": REQUEST_ID,
        "bodies": BODIES_ID,
        "budget_ms": 1500.0,
        "tensor": ["u8", [2, 1, 3]],
        "info": {},
    }
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def frames(payload=bytes(6), **changes):
    return [msgpack.packb(header(**changes)), payload]


def read_or_refuse(parts):
    """Decodes ``parts``; any exception but the protocol's own fails the test."""
    try:
        return decode(parts)
    except (ProtocolError, UnsupportedVersionError):
        return None


# --- golden bytes ---


def test_a_request_has_the_documented_bytes():
    tensor = np.arange(6, dtype=np.uint8).reshape(2, 1, 3)
    message = Message(operation="infer", request_id=REQUEST_ID, bodies_id=BODIES_ID, budget_ms=1500.0, tensor=tensor)
    head, payload = encode(message)
    assert head == GOLDEN_REQUEST
    assert bytes(payload) == b"\x00\x01\x02\x03\x04\x05"


def test_a_tensor_of_four_bits_travels_packed_each_image_from_a_byte_of_its_own():
    tensor = np.array([[[1, 2, 3]], [[4, 5, 15]]], np.uint8)
    message = Message(
        operation="infer", request_id=REQUEST_ID, bodies_id=BODIES_ID, budget_ms=1500.0, tensor=tensor, bits=4
    )
    head, payload = encode(message)
    assert head == GOLDEN_REQUEST.replace(b"\xa2u8", b"\xa2u4")
    assert bytes(payload).hex(" ") == "21 03 54 0f"
    arrived = decode([head, payload])
    assert arrived.bits == 4
    assert arrived.tensor.tolist() == tensor.tolist()


def test_packed_bytes_with_a_bit_beyond_the_last_code_are_refused():
    with pytest.raises(ProtocolError, match="packed"):
        decode(frames(bytes([0x21, 0x03, 0x54, 0xFF]), tensor=["u4", [2, 1, 3]]))


def test_codes_that_would_unpack_beyond_the_limit_are_refused_before_that():
    limits = Limits(tensor_bytes=8)
    decode(frames(bytes(2), tensor=["u2", [1, 2, 4]]), limits)
    with pytest.raises(LimitExceededError, match="9 codes"):
        decode(frames(bytes(3), tensor=["u2", [1, 3, 3]]), limits)


def test_an_error_reply_has_the_documented_bytes():
    info = {"code": 301, "message": "full", "retry_after_ms": 50.0}
    head, payload = encode(Message(operation="error", request_id=REQUEST_ID, info=info))
    assert head == GOLDEN_ERROR
    assert bytes(payload) == b""


def test_the_documented_bytes_are_read_as_the_messages_they_document():
    request = decode([GOLDEN_REQUEST, bytes(range(6))])
    assert (request.operation, request.request_id, request.bodies_id) == ("infer", REQUEST_ID, BODIES_ID)
    assert request.budget_ms == 1500.0
    assert request.tensor.tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    reply = decode([GOLDEN_ERROR, b""])
    assert reply.tensor is None
    assert reply.info == {"code": 301, "message": "full", "retry_after_ms": 50.0}


def test_the_documented_bytes_are_read_without_msgpacks_compiled_part():
    script = f"""
import msgpack.fallback
from ensembler.protocol.errors import ProtocolError
from ensembler.protocol.messages import decode
assert msgpack.Unpacker is msgpack.fallback.Unpacker
assert decode([{GOLDEN_REQUEST!r}, bytes(6)]).tensor.shape == (2, 1, 3)
try:
    decode([b"\\x82\\xa1v\\x01\\xa1v\\x01", b""])
except ProtocolError as error:
    assert "twice" in str(error)
else:
    raise AssertionError("a field stated twice was read")
"""
    environment = os.environ | {"MSGPACK_PUREPYTHON": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pairs_may_come_from_a_generator_as_in_msgpack_1_0_without_its_compiled_part():
    assert messages._without_duplicates((name, 1) for name in "ab") == {"a": 1, "b": 1}
    with pytest.raises(ProtocolError, match="twice"):
        messages._without_duplicates((name, 1) for name in "aa")


# --- round trip ---

texts = st.text(max_size=20)
facts = st.one_of(
    texts, st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
infos = st.dictionaries(texts, facts | st.lists(facts, max_size=5), max_size=6)
tensors = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=6, max_side=4))
valid_messages = st.builds(
    Message,
    operation=st.sampled_from(messages.OPERATIONS),
    request_id=st.binary(min_size=16, max_size=16),
    bodies_id=st.binary(min_size=32, max_size=32),
    budget_ms=st.floats(0, allow_infinity=False),
    tensor=st.none() | tensors,
    info=infos,
)


@given(valid_messages)
def test_every_message_arrives_as_it_was_sent(message):
    head, payload = encode(message)
    arrived = decode([head, bytes(payload)])
    for name in ("operation", "request_id", "bodies_id", "budget_ms", "info"):
        assert getattr(arrived, name) == getattr(message, name)
    if message.tensor is None:
        assert arrived.tensor is None
    else:
        assert arrived.tensor.dtype == np.uint8
        np.testing.assert_array_equal(arrived.tensor, message.tensor)
        assert arrived.tensor.shape == message.tensor.shape


@given(hnp.array_shapes(max_dims=4, max_side=5), st.integers(0, 2**32 - 1))
def test_the_size_on_the_wire_depends_on_the_shape_alone(shape, seed):
    rng = np.random.default_rng(seed)
    sizes = set()
    for value in (np.zeros(shape, np.uint8), rng.integers(0, 256, shape, dtype=np.uint8)):
        message = Message(
            operation="infer", request_id=rng.bytes(16), bodies_id=rng.bytes(32), budget_ms=1.0, tensor=value
        )
        sizes.add(tuple(len(frame) for frame in encode(message)))
    assert len(sizes) == 1


def test_a_transposed_tensor_arrives_in_its_own_order():
    tensor = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1)
    head, payload = encode(Message(operation="infer", request_id=REQUEST_ID, tensor=tensor))
    np.testing.assert_array_equal(decode([head, bytes(payload)]).tensor, tensor)


def test_neither_side_copies_the_payload():
    tensor = np.arange(6, dtype=np.uint8).reshape(2, 3)
    head, payload = encode(Message(operation="infer", request_id=REQUEST_ID, tensor=tensor))
    assert np.shares_memory(np.asarray(payload), tensor)
    assert np.shares_memory(decode([head, payload]).tensor, tensor)


def test_frames_may_be_memoryviews_as_zeromq_hands_them_over():
    head, payload = frames()
    assert decode([memoryview(head), memoryview(payload)]).tensor.shape == (2, 1, 3)


# --- malformations ---


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_frames_is_refused(count):
    with pytest.raises(ProtocolError, match=f"this one has {count}"):
        decode([*frames(), b""][:count] if count else [])


NOT_A_HEADER = {
    "no bytes": b"",
    "a list": msgpack.packb([1, 2, 3]),
    "a number": b"\x01",
    "not msgpack": b"\xc1",
    "text that is not UTF-8": b"\x81\xa1\xff\x01",
    "a number as key": msgpack.packb({1: 2}),
    "bytes as key": msgpack.packb({b"v": 1}),
    "a list as key": b"\x81\x90\x01",
    "trailing bytes": msgpack.packb(header()) + b"\x00",
    "two maps": msgpack.packb(header()) * 2,
    "cut short": msgpack.packb(header())[:-1],
    "an extension type": msgpack.packb(header(info={"x": msgpack.ExtType(5, b"abc")})),
    "an empty extension type": b"\x81\xa1v\xc7\x00\x05",
    "a timestamp": msgpack.packb(header(info={"x": msgpack.Timestamp(1)})),
    "a length beyond the frame": b"\x81\xa1v\xdb\xff\xff\xff\xff",
    "a list of more items than any header has": msgpack.packb(header(tensor=["u8", [1] * 65])),
    "a map of more items than any header has": msgpack.packb(header(info={str(i): i for i in range(33)})),
    "nested a thousand deep": b"\x81\xa1v" + b"\x91" * 1000 + b"\x01",
}


@pytest.mark.parametrize("data", NOT_A_HEADER.values(), ids=NOT_A_HEADER.keys())
def test_a_header_that_is_not_one_msgpack_map_is_refused(data):
    with pytest.raises(ProtocolError):
        decode([data, bytes(6)])


@pytest.mark.parametrize("length", range(len(GOLDEN_REQUEST)))
def test_a_truncated_header_is_refused(length):
    with pytest.raises(ProtocolError):
        decode([GOLDEN_REQUEST[:length], bytes(6)])


def test_a_field_stated_twice_is_refused():
    once = msgpack.packb(header())
    twice = b"\x88" + once[1:] + msgpack.packb("op") + msgpack.packb("status")
    with pytest.raises(ProtocolError, match="twice"):
        decode([twice, bytes(6)])


def test_a_field_stated_twice_inside_info_is_refused():
    head = msgpack.packb(header(info=...))
    head = b"\x87" + head[1:] + msgpack.packb("info") + b"\x82\xa1a\x01\xa1a\x02"
    with pytest.raises(ProtocolError, match="twice"):
        decode([head, bytes(6)])


@pytest.mark.parametrize("version", [0, 2, -1, 2**63])
def test_another_version_is_refused_as_such(version):
    with pytest.raises(UnsupportedVersionError, match="this side speaks 1"):
        decode(frames(v=version))


def test_another_version_is_told_even_if_its_fields_are_unknown():
    with pytest.raises(UnsupportedVersionError):
        decode([msgpack.packb({"v": 2, "something": "new"}), b"with", b"more"][:2])


@pytest.mark.parametrize("version", [..., None, True, "1", 1.0, [1]])
def test_a_version_that_is_no_number_is_refused(version):
    with pytest.raises(ProtocolError, match="version"):
        decode(frames(v=version))


@pytest.mark.parametrize("name", ["op", "id", "bodies", "budget_ms", "tensor", "info"])
def test_a_missing_field_is_refused(name):
    with pytest.raises(ProtocolError, match="fields"):
        decode(frames(**{name: ...}))


def test_an_extra_field_is_refused():
    with pytest.raises(ProtocolError, match="fields"):
        decode(frames(selector=[1, 2]))


BAD_FIELDS = [
    *(("op", value) for value in ("", "INFER", "train", b"infer", 1, None, [], {})),
    *(("id", value) for value in (b"", bytes(15), bytes(17), "0123456789abcdef", None, 1, [0] * 16)),
    *(("bodies", value) for value in (b"", bytes(31), bytes(33), "0" * 32, None)),
    *(("budget_ms", value) for value in (float("nan"), float("inf"), -1.0, -float("inf"), 5, True, None, "5")),
    *(("tensor", value) for value in (None, "u8", {}, 6, ["u8"], ["u8", [6], 1], ["f4", [6]], [8, [6]])),
    *(("tensor", ["u8", value]) for value in (None, 6, "6", {}, [True, 6], [6.0], ["6"], [None], [[6]])),
    *(("tensor", ["u8", value]) for value in ([0], [6, 0], [-6], [-2, -3], [2**40], [2**63])),
    *(("info", value) for value in (None, [], "text", 1)),
    *(("info", {"x": value}) for value in (None, {}, {"y": 1}, [[1]], [None], float("nan"), [float("inf")])),
    *(("info", {"x": value}) for value in ("a" * 1001, ["a" * 1001])),
    ("info", {b"x": 1}),
    ("info", {1: 1}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_field_with_an_impossible_value_is_refused(name, value):
    with pytest.raises(ProtocolError):
        decode(frames(**{name: value}))


@pytest.mark.parametrize("length", [0, 5, 7, 12])
def test_a_payload_of_another_size_than_its_shape_is_refused(length):
    with pytest.raises(ProtocolError, match=f"the payload has {length} bytes"):
        decode(frames(payload=bytes(length)))


def test_a_payload_without_a_descriptor_is_refused():
    with pytest.raises(ProtocolError, match="describes no tensor"):
        decode(frames(tensor=[], payload=b"x"))


def test_an_empty_payload_without_a_descriptor_is_no_tensor():
    assert decode(frames(tensor=[], payload=b"")).tensor is None


# --- limits ---


def test_a_header_of_the_longest_length_is_read_and_a_longer_one_refused():
    head, payload = frames(info={"a": "x" * 500})
    assert decode([head, payload], Limits(header_bytes=len(head))).info == {"a": "x" * 500}
    with pytest.raises(LimitExceededError, match="header"):
        decode([head, payload], Limits(header_bytes=len(head) - 1))


@pytest.mark.parametrize(("length", "fits"), [(4096, True), (4097, False)])
def test_the_default_header_limit_is_4096_bytes(length, fits):
    info = {str(i): "x" * 900 for i in range(4)} | {"filler": "y" * 300}
    short = length - len(frames(info=info)[0])
    head, payload = frames(info=info | {"filler": "y" * (300 + short)})
    assert len(head) == length
    if fits:
        assert decode([head, payload]).info["0"] == "x" * 900
    else:
        with pytest.raises(LimitExceededError, match="more than 4096"):
            decode([head, payload])


def test_a_payload_beyond_the_limit_is_refused():
    assert decode(frames(), Limits(tensor_bytes=6)).tensor.size == 6
    with pytest.raises(LimitExceededError, match="payload"):
        decode(frames(), Limits(tensor_bytes=5))


def test_the_limit_holds_before_the_header_is_looked_at():
    with pytest.raises(LimitExceededError):
        decode([b"\xc1" * 4097, b""])
    with pytest.raises(LimitExceededError):
        decode([b"\xc1", bytes(11)], Limits(tensor_bytes=10))


@pytest.mark.parametrize("shape", [[], [1] * 7])
def test_a_tensor_of_rank_zero_or_of_too_many_axes_is_refused(shape):
    with pytest.raises(LimitExceededError, match="axes"):
        decode(frames(tensor=["u8", shape], payload=b"x"))


def test_a_tensor_of_six_axes_is_read():
    assert decode(frames(tensor=["u8", [1] * 6], payload=b"x")).tensor.shape == (1,) * 6


def test_too_many_rows_are_refused_with_advice():
    assert len(decode(frames(tensor=["u8", [4096]], payload=bytes(4096))).tensor) == 4096
    with pytest.raises(LimitExceededError, match="send smaller batches"):
        decode(frames(tensor=["u8", [4097]], payload=bytes(4097)))
    with pytest.raises(LimitExceededError, match="3 rows, more than 2"):
        decode(frames(tensor=["u8", [3, 2]]), Limits(rows=2))


def test_the_largest_frame_is_the_larger_limit():
    assert Limits().frame_bytes == 64 * 1024 * 1024
    assert Limits(header_bytes=100, tensor_bytes=10).frame_bytes == 100


# --- fuzz ---


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_random_frames_are_refused_by_the_protocols_errors_only(parts):
    read_or_refuse(parts)
    peek_request_id(parts)


@given(
    valid_messages,
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    st.integers(0, 10_000),
    st.sampled_from(["keep", "cut", "insert"]),
)
def test_damaged_headers_are_read_or_refused_by_the_protocols_errors(message, changes, place, action):
    head, payload = encode(message)
    damaged = bytearray(head)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    place %= len(damaged)
    if action == "cut":
        del damaged[place:]
    elif action == "insert":
        damaged[place:place] = damaged[: place % 7]
    parts = [bytes(damaged), bytes(payload)]
    arrived = read_or_refuse(parts)
    if arrived is not None:
        assert len(arrived.request_id) == 16
        assert len(arrived.bodies_id) == 32
        assert arrived.budget_ms >= 0
    peek_request_id(parts)


def containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=4)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=40),
)
anything = st.recursive(scalars, containers, max_leaves=8)


@given(st.sampled_from([*header(), "extra"]), anything, st.sampled_from([b"", bytes(6)]))
def test_a_header_with_any_value_in_any_field_is_read_or_refused(name, value, payload):
    read_or_refuse(frames(payload=payload, **{name: value}))


# --- the id of a refused message ---


def test_the_id_of_a_refused_message_can_be_read():
    for refused in (frames(op="nonsense"), frames(v=9), frames(payload=b"x"), frames()[:1], [*frames(), b""]):
        with pytest.raises((ProtocolError, UnsupportedVersionError)):
            decode(refused)
        assert peek_request_id(refused) == REQUEST_ID


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b""],
        [b"\xc1", b""],
        frames(id=...),
        frames(id=b"short"),
        frames(id="0123456789abcdef"),
        [msgpack.packb(header(info={"a": "x" * 5000})), b""],
        [msgpack.packb([REQUEST_ID]), b""],
    ],
)
def test_an_unreadable_id_is_none(parts):
    assert peek_request_id(parts) is None
