"""The wire codec: one contract, and the operators of ONNX as the reference."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from ensembler.protocol.codec import CODEC_BITS, MAX_SCALE, AffineCodec, pack, packed_row_bytes, unpack
from ensembler.protocol.errors import ConfigError

ALL_CODES = np.arange(256, dtype=np.uint8)

CODECS = {
    "features after a ReLU, with noise": AffineCodec.from_range(-0.4, 3.1),
    "answers after a ReLU": AffineCodec.from_range(0.0, 2.7),
    "all negative": AffineCodec.from_range(-5.0, -1.0),
    "symmetric": AffineCodec.from_range(-1.0, 1.0),
    "tiny": AffineCodec.from_range(0.0, 1e-6),
    "huge": AffineCodec.from_range(-1e30, 1e30),
    "four bits": AffineCodec.from_range(-0.4, 3.1, 4),
    "three bits": AffineCodec.from_range(-1.0, 1.0, 3),
    "two bits": AffineCodec.from_range(-0.2, 2.0, 2),
    "image pixels": AffineCodec(scale=1 / 64, zero_point=128),
}
codec_table = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())

float32 = st.floats(-(2.0**20), 2.0**20, width=32)


@st.composite
def codecs(draw):
    low, high = sorted((draw(float32), draw(float32)))
    if max(high, 0) - min(low, 0) < 1e-3:
        high = low + 1
    return AffineCodec.from_range(low, high, draw(st.sampled_from(list(CODEC_BITS.values()))))


def onnx_session(codec):
    """Returns a session of QuantizeLinear (``codes``), then DequantizeLinear (``values``)."""
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["values"]),
        ],
        "codec",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor_value_info("codes", TensorProto.UINT8, [None]),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, [None]),
        ],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [codec.scale]),
            helper.make_tensor("zero_point", TensorProto.UINT8, [], [codec.zero_point]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- codes ---


def test_golden_codes():
    codec = AffineCodec(scale=0.5, zero_point=10)
    values = [-6.0, -5.0, -0.25, 0.0, 0.25, 0.26, 0.75, 1.25, 122.5, 200.0]
    codes = codec.encode(np.array(values, np.float32))
    assert codes.dtype == np.uint8
    assert codes.tolist() == [0, 0, 10, 10, 10, 11, 12, 12, 255, 255]
    decoded = codec.decode(np.array([0, 10, 11, 255], np.uint8))
    assert decoded.dtype == np.float32
    assert decoded.tolist() == [-5.0, 0.0, 0.5, 122.5]


def test_a_codec_built_from_a_range_has_golden_scale_and_zero_point():
    codec = AffineCodec.from_range(-1.0, 2.0)
    assert codec.scale == float(np.float32(3 / 255))
    assert codec.zero_point == 85


@codec_table
def test_onnx_operators_give_the_same_codes_and_values_bit_for_bit(codec):
    rng = np.random.default_rng(0)
    span = codec.high - codec.low
    inside = rng.uniform(codec.low - 0.2 * span, codec.high + 0.2 * span, 20_000)
    halves = (np.arange(-300, 300) + 0.5) * codec.scale
    special = [0.0, -0.0, np.inf, -np.inf, np.finfo(np.float32).tiny]
    values = np.concatenate([inside, halves, special]).astype(np.float32)
    codes, decoded = onnx_session(codec).run(["codes", "values"], {"x": values})
    # QuantizeLinear knows no codes of fewer than 8 bits: the exported graphs clip after it.
    np.testing.assert_array_equal(codec.encode(values), np.minimum(codes, codec.code_max))
    assert codec.decode(codes).tobytes() == decoded.tobytes()


@given(codecs())
def test_every_code_survives_being_decoded_and_encoded(codec):
    codes = ALL_CODES[: codec.code_max + 1]
    np.testing.assert_array_equal(codec.encode(codec.decode(codes)), codes)


@given(codecs(), st.data())
def test_inside_the_range_the_error_is_at_most_half_a_step(codec, data):
    elements = st.floats(float(np.float32(codec.low)), float(np.float32(codec.high)), width=32, allow_subnormal=False)
    values = data.draw(hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=5), elements=elements))
    arrived = codec.decode(codec.encode(values))
    assert arrived.shape == values.shape
    # 1e-4 of a step is what float32 arithmetic adds at 255 steps from zero.
    assert np.abs(arrived.astype(np.float64) - values).max() <= codec.scale * (0.5 + 1e-4)


@given(codecs(), hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)))
def test_outside_the_range_values_arrive_as_its_ends(codec, values):
    arrived = codec.decode(codec.encode(values))
    ends = codec.decode(np.array([0, codec.code_max], np.uint8))
    assert (arrived[values <= ends[0]] == ends[0]).all()
    assert (arrived[values >= ends[1]] == ends[1]).all()


@given(codecs(), hnp.arrays(np.float32, 20, elements=float32))
def test_larger_values_never_get_smaller_codes(codec, values):
    assert (np.diff(codec.encode(np.sort(values)).astype(int)) >= 0).all()


@codec_table
def test_nan_becomes_the_code_of_zero_and_infinities_the_ends(codec):
    values = np.array([np.nan, -np.nan, np.inf, -np.inf], np.float32)
    assert codec.encode(values).tolist() == [codec.zero_point, codec.zero_point, codec.code_max, 0]


@codec_table
def test_the_largest_float32_values_are_clipped_without_a_warning(codec):
    largest = np.finfo(np.float32).max
    assert codec.encode(np.array([largest, -largest], np.float32)).tolist() == [codec.code_max, 0]


@codec_table
def test_decoded_values_are_finite(codec):
    assert np.isfinite(codec.decode(ALL_CODES)).all()


def test_the_input_is_left_as_it_was():
    values = np.array([np.nan, 1.0], np.float32)
    CODECS["symmetric"].encode(values)
    assert np.isnan(values[0])
    assert values[1] == 1.0


@pytest.mark.parametrize("shape", [(0,), (), (2, 0, 3), (1, 64, 16, 16)])
def test_any_shape_is_kept(shape):
    codec = CODECS["symmetric"]
    codes = codec.encode(np.zeros(shape, np.float32))
    assert codes.shape == shape
    assert codec.decode(codes).shape == shape


# --- ranges ---


@given(float32, float32)
def test_the_range_always_contains_zero_exactly(a, b):
    low, high = min(a, b), max(a, b)
    if max(high, 0) - min(low, 0) < 1e-6:
        return
    codec = AffineCodec.from_range(low, high)
    assert codec.low <= 0 <= codec.high
    assert codec.decode(codec.encode(np.zeros(1, np.float32)))[0] == 0.0
    assert codec.low == pytest.approx(min(low, 0.0), abs=0.51 * codec.scale)
    assert codec.high == pytest.approx(max(high, 0.0), abs=0.51 * codec.scale)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 0.0),
        (0.0, 1e-13),
        (NAN, 1.0),
        (0.0, NAN),
        (-INFINITY, 1.0),
        (0.0, INFINITY),
        (-1e308, 1e308),
        (0.0, 1e300),
        (-1e39, 0.0),
    ],
)
def test_a_range_that_is_empty_or_beyond_float32_is_refused(low, high):
    with pytest.raises(ConfigError, match="cannot quantise the range"):
        AffineCodec.from_range(low, high)


@pytest.mark.parametrize("scale", [0.0, -0.5, NAN, INFINITY, -INFINITY, 0.1, 1e300, 1e-46, 10**400, 2 * MAX_SCALE])
def test_a_scale_that_is_not_a_positive_float32_value_is_refused(scale):
    with pytest.raises(ConfigError, match="scale"):
        AffineCodec(scale=scale, zero_point=0)


@pytest.mark.parametrize("zero_point", [-1, 256, 3.5, NAN, True, 2**70])
def test_a_zero_point_that_is_not_a_code_is_refused(zero_point):
    with pytest.raises(ConfigError, match="zero point"):
        AffineCodec(scale=0.5, zero_point=zero_point)


@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_low_and_high_are_what_the_end_codes_stand_for(zero_point):
    codec = AffineCodec(scale=0.25, zero_point=zero_point)
    assert codec.decode(np.array([0, 255], np.uint8)).tolist() == [codec.low, codec.high]


# --- packing ---

# Worked out on paper: the first code in the lowest bits of the first byte.
GOLDEN_PACKED = {
    8: ([[1, 2, 255]], "01 02 ff"),
    4: ([[1, 2, 15], [0, 3, 4]], "21 0f 30 04"),
    3: ([[1, 2, 3, 4, 5, 6, 7, 0, 1]], "d1 58 1f 01"),  # 001 010 011 100 101 110 111 000, then 001
    2: ([[0, 1, 2, 3, 1]], "e4 01"),
    1: ([[0, 1, 0, 0, 1, 1, 1, 1, 1]], "f2 01"),
}
packed_table = pytest.mark.parametrize(("bits", "golden"), GOLDEN_PACKED.items(), ids=lambda v: str(v)[:1])


@packed_table
def test_packed_codes_have_the_documented_bytes(bits, golden):
    codes, expected = golden
    packed = pack(np.array(codes, np.uint8), bits)
    assert packed.shape == (len(codes), packed_row_bytes([len(codes[0])], bits))
    assert packed.tobytes() == bytes.fromhex(expected)


@packed_table
def test_the_documented_bytes_are_the_codes_they_document(bits, golden):
    codes, expected = golden
    packed = np.frombuffer(bytes.fromhex(expected), np.uint8).reshape(len(codes), -1)
    assert unpack(packed, [len(codes[0])], bits).tolist() == codes


@given(st.sampled_from(list(CODEC_BITS.values())), hnp.array_shapes(min_dims=1, max_dims=4, max_side=7), st.data())
def test_codes_survive_packing_and_every_row_has_the_same_bytes_alone(bits, shape, data):
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack(codes, bits)
    assert packed.shape == (shape[0], packed_row_bytes(shape[1:], bits))
    assert unpack(packed, shape[1:], bits).tolist() == codes.tolist()
    assert pack(codes[:1], bits).tobytes() == packed[:1].tobytes()


@pytest.mark.parametrize(("bits", "count"), [(4, 1), (2, 1), (2, 3), (3, 1), (3, 7), (3, 9), (1, 7)])
def test_a_bit_set_beyond_the_last_code_is_refused(bits, count):
    packed = pack(np.zeros((2, count), np.uint8), bits)
    packed[1, -1] = 0x80
    with pytest.raises(ValueError, match="beyond the last code"):
        unpack(packed, [count], bits)


@pytest.mark.parametrize("bits", [0, 5, 16, 8.0, True, "8"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=r"bits: choose 8, 4, 3, 2, 1"):
        AffineCodec(scale=1.0, zero_point=0, bits=bits)


def test_a_zero_point_beyond_the_codes_is_refused():
    with pytest.raises(ConfigError, match=r"zero point 4 is not in 0\.\.3"):
        AffineCodec(scale=1.0, zero_point=4, bits=2)
