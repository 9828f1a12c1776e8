"""Every step from a torch module to the ONNX graph that ships, on nets small enough to check by hand."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ensembler.export import graphs
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ExportError
from ensembler.protocol.integers import sum_exactly

IN_CODEC = AffineCodec.from_range(-2.5, 3.0)
BATCHES = (1, 2, 7)


class Residual(nn.Module):
    """A convolution with batch norm and a shortcut, then ``end``: what bodies and heads are made of."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.end = end

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.end(torch.relu(self.conv2(y) + y))


# What the net ends in. Max-pool and flatten only move codes, so that the pinned scale must be carried backwards; the
# average is an operator that onnxruntime leaves in float.
ENDS = {
    "convolution": nn.Conv2d(8, 5, 1),
    "max-pool and flatten": nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten()),
    "average and flatten": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}
QUANTISED_TO_THE_END = ("convolution", "max-pool and flatten")


def small_net(seed, end=None):
    """A net in eval mode whose batch norm is not the identity."""
    torch.manual_seed(seed)
    net = Residual(copy.deepcopy(end if end is not None else ENDS["average and flatten"]))
    with torch.no_grad():
        for _ in range(3):
            net.train()(torch.randn(16, 3, 8, 8))
        net.bn1.weight.uniform_(0.5, 1.5)
        net.bn1.bias.uniform_(-0.3, 0.3)
    return net.eval()


def samples(count, seed=5):
    """Features as they arrive: floats that codes stand for, ``(count, 3, 8, 8)``."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return IN_CODEC.decode(IN_CODEC.encode(rng.normal(0.0, 1.0, (count, 3, 8, 8)).astype(np.float32)))


class Scaled(nn.Module):
    """Two inputs, and a constant that is no weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, noise):
        return self.linear(x) * torch.tensor([1.0, 2.0, 3.0]) + noise


def plain_graph(kind, *weights, shape=(3, 8, 8), **attributes):
    """A graph of one operator with constant inputs, without torch: ``x`` (batch, *shape) to ``y``."""
    constants = [numpy_helper.from_array(value, f"w{i}") for i, value in enumerate(weights)]
    node = helper.make_node(kind, ["x", *(c.name for c in constants)], ["y"], **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normal(*shape):
    return np.random.Generator(np.random.PCG64(8)).normal(0.0, 0.1, shape).astype(np.float32)


def torch_output(net, x):
    with torch.inference_mode():
        return net(torch.from_numpy(x)).numpy()


def run(graph, **inputs):
    """Runs a graph or its bytes in onnxruntime."""
    data = graph if isinstance(graph, bytes) else graph.SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sum_exactly(options)
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def sqnr_db(wanted, found):
    error = np.square(wanted.astype(np.float64) - found).sum()
    return 10 * np.log10(np.square(wanted.astype(np.float64)).sum() / error)


class Case:
    """One net in every stage of the pipeline, made once."""

    def __init__(self, end):
        self.net = small_net(0, end)
        self.wanted = torch_output(self.net, samples(256))
        self.out_codec = AffineCodec.from_range(float(self.wanted.min()), float(self.wanted.max()))
        self.exported = graphs.from_torch(self.net, [torch.zeros(2, 3, 8, 8)])
        self.plain = graphs.optimised(self.exported)
        self.int8 = graphs.quantised(self.plain, {"x": samples(256)}, input_codec=IN_CODEC, output_codec=self.out_codec)

    def coded(self, graph):
        return graphs.attach_codes(graph, "codes", IN_CODEC, output="answer", out_codec=self.out_codec)


@pytest.fixture(scope="module")
def cases():
    return {name: Case(end) for name, end in ENDS.items()}


@pytest.fixture(scope="module")
def average(cases):
    return cases["average and flatten"]


@pytest.fixture(params=ENDS)
def case(request, cases):
    return cases[request.param]


@pytest.fixture(params=QUANTISED_TO_THE_END)
def quantised_case(request, cases):
    return cases[request.param]


@pytest.fixture(scope="module")
def scaled():
    net = Scaled().eval()
    return net, graphs.from_torch(net, [torch.zeros(2, 3), torch.zeros(2, 3)], inputs=["x", "noise"])


# --- from torch ---


@pytest.mark.parametrize("batch", BATCHES)
def test_the_exported_graph_computes_what_torch_does_for_any_batch(case, batch):
    x = samples(batch)
    np.testing.assert_allclose(run(case.exported, x=x), torch_output(case.net, x), rtol=1e-4, atol=1e-5)


def test_optimising_folds_the_batch_norm_and_changes_nothing(case):
    assert "BatchNormalization" in {node.op_type for node in case.exported.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in case.plain.graph.node}
    x = samples(7)
    np.testing.assert_allclose(run(case.plain, x=x), torch_output(case.net, x), rtol=1e-4, atol=1e-5)


def test_several_inputs_keep_their_names(scaled):
    net, graph = scaled
    x, noise = normal(7, 3), normal(7, 3) + 1
    with torch.inference_mode():
        wanted = net(torch.from_numpy(x), torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(run(graph, x=x, noise=noise), wanted, rtol=1e-5, atol=1e-6)


def test_a_net_whose_path_depends_on_the_data_cannot_be_exported():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch cannot export Branching to ONNX"):
        graphs.from_torch(Branching().eval(), [torch.zeros(2, 3)])


def test_quantising_again_gives_the_same_bytes(case):
    again = graphs.quantised(case.plain, {"x": samples(256)}, input_codec=IN_CODEC, output_codec=case.out_codec)
    assert graphs.scrubbed(again) == graphs.scrubbed(case.int8)


# --- another net's weights ---


def test_another_nets_weights_give_the_graph_that_exporting_it_would(average, capfd):
    other = small_net(1)
    swapped = graphs.with_weights(average.exported, other.state_dict())
    x = samples(7)
    np.testing.assert_allclose(run(swapped, x=x), torch_output(other, x), rtol=1e-4, atol=1e-5)
    fresh = graphs.from_torch(other, [torch.zeros(2, 3, 8, 8)])
    assert graphs.scrubbed(graphs.optimised(swapped)) == graphs.scrubbed(graphs.optimised(fresh))
    assert capfd.readouterr() == ("", "")  # the exporter's chatter is no news for the terminal


def test_weights_of_another_shape_are_refused(average):
    state = small_net(1).state_dict()
    state["conv2.weight"] = torch.zeros(8, 8, 5, 5)
    with pytest.raises(ExportError, match=r"conv2\.weight has shape \(8, 8, 5, 5\)"):
        graphs.with_weights(average.exported, state)


@pytest.mark.parametrize("name", ["conv2.weight", "bn1.running_var"])
def test_missing_weights_are_refused_instead_of_keeping_the_other_nets(average, name):
    state = small_net(1).state_dict()
    del state[name]
    with pytest.raises(ExportError, match=f"has no {name}"):
        graphs.with_weights(average.exported, state)


def test_weights_without_a_place_in_the_graph_are_refused(average):
    state = small_net(1).state_dict() | {"conv3.weight": torch.zeros(8, 8, 3, 3)}
    with pytest.raises(ExportError, match="1 weights of the net have no place"):
        graphs.with_weights(average.exported, state)


def test_a_constant_of_forward_is_not_a_weight(scaled):
    other = Scaled().eval()
    graph = graphs.with_weights(scaled[1], other.state_dict())
    x, noise = normal(7, 3), normal(7, 3)
    with torch.inference_mode():
        wanted = other(torch.from_numpy(x), torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(run(graph, x=x, noise=noise), wanted, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_one_number_stays_one():
    class Louder(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(gain))

        def forward(self, x):
            return torch.relu(self.gain * x)

    graph = graphs.from_torch(Louder(2.0).eval(), [torch.zeros(2, 3)])
    swapped = graphs.optimised(graphs.with_weights(graph, Louder(3.0).state_dict()))
    np.testing.assert_array_equal(run(swapped, x=np.float32([[1, 2, 4]])), [[3, 6, 12]])


# --- codes in, codes out ---


@pytest.mark.parametrize("batch", BATCHES)
def test_a_float_graph_with_codes_is_quantise_after_the_graph_after_dequantise(case, batch):
    x = samples(batch, seed=9)
    found = run(case.coded(case.plain), codes=IN_CODEC.encode(x))
    wanted = case.out_codec.encode(run(case.plain, x=x))
    difference = np.abs(found.astype(int) - wanted)
    assert found.dtype == np.uint8
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


OPERATORS = {
    "Conv": plain_graph("Conv", normal(8, 3, 3, 3), normal(8)),
    "Gemm": plain_graph("Gemm", normal(192, 5), normal(5), shape=(192,)),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_one_float_operator_between_codes_stays_float(kind):
    # onnxruntime quantises the weights of what stands between a DequantizeLinear and a QuantizeLinear.
    plain = graphs.optimised(OPERATORS[kind])
    shape = [d.dim_value for d in plain.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = samples(64, seed=9).reshape(64, *shape)
    wanted = run(plain, x=x)
    codec = AffineCodec.from_range(float(wanted.min()), float(wanted.max()))
    coded = graphs.attach_codes(plain, "codes", IN_CODEC, output="answer", out_codec=codec)
    assert (run(coded, codes=IN_CODEC.encode(x)) != codec.encode(wanted)).mean() < 0.001


@pytest.mark.parametrize("batch", BATCHES)
def test_taking_the_ends_off_a_quantised_graph_is_exact(case, batch):
    x = samples(batch, seed=9)
    found = run(case.coded(case.int8), codes=IN_CODEC.encode(x))
    np.testing.assert_array_equal(found, case.out_codec.encode(run(case.int8, x=x)))


def test_a_quantised_graph_with_codes_has_lost_both_end_operators(quantised_case):
    coded = quantised_case.coded(quantised_case.int8)
    assert [node.op_type for node in coded.graph.node if "codes" in node.input] == ["DequantizeLinear"]
    assert [node.op_type for node in coded.graph.node if "answer" in node.output] != ["DequantizeLinear"]
    assert not {"x", "y"} & {name for node in coded.graph.node for name in (*node.input, *node.output)}


def test_codes_are_uint8_at_both_ends(case):
    for graph in (case.coded(case.plain), case.coded(case.int8)):
        ends = (*graph.graph.input, *graph.graph.output)
        assert [value.name for value in ends] == ["codes", "answer"]
        assert [value.type.tensor_type.elem_type for value in ends] == [TensorProto.UINT8, TensorProto.UINT8]


def test_int8_stays_close_to_float(case):
    x = samples(64, seed=9)
    assert sqnr_db(torch_output(case.net, x), run(case.int8, x=x)) > 25


@pytest.mark.parametrize("count", [1, 63, 65, 96, 200])
def test_any_number_of_samples_calibrates(quantised_case, count):
    int8 = graphs.quantised(quantised_case.plain, {"x": samples(count)}, input_codec=IN_CODEC)
    assert run(int8, x=samples(4)).shape == run(quantised_case.plain, x=samples(4)).shape


def test_the_int8_graph_is_a_third_of_the_size():
    plain = graphs.optimised(plain_graph("Conv", normal(64, 3, 7, 7)))
    small = graphs.quantised(plain, {"x": samples(16)}, input_codec=IN_CODEC)
    assert 3 * len(graphs.scrubbed(small)) < len(graphs.scrubbed(plain))


def scale_of(graph, kind, name):
    """The (scale, zero point) of the quantiser's operator ``kind`` at the tensor ``name``."""
    values = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    node = next(n for n in graph.graph.node if n.op_type == kind and name in (n.input[0], n.output[0]))
    return float(values[node.input[1]]), int(values[node.input[2]])


def test_the_pinned_scales_survive_quantisation(quantised_case):
    codec = quantised_case.out_codec
    assert scale_of(quantised_case.int8, "QuantizeLinear", "x") == (IN_CODEC.scale, IN_CODEC.zero_point)
    assert scale_of(quantised_case.int8, "DequantizeLinear", "y") == (codec.scale, codec.zero_point)


def test_an_output_that_moves_codes_only_is_not_rounded_twice(quantised_case):
    # Every value of the output is one that the codec knows, bit for bit.
    y = run(quantised_case.int8, x=samples(16))
    np.testing.assert_array_equal(y, quantised_case.out_codec.decode(quantised_case.out_codec.encode(y)))


def test_values_beyond_the_pinned_range_are_clipped(quantised_case):
    low, high = np.percentile(quantised_case.wanted, [20, 80])
    narrow = AffineCodec.from_range(float(low), float(high))
    int8 = graphs.quantised(quantised_case.plain, {"x": samples(64)}, input_codec=IN_CODEC, output_codec=narrow)
    coded = graphs.attach_codes(int8, "codes", IN_CODEC, output="answer", out_codec=narrow)
    found = run(coded, codes=IN_CODEC.encode(samples(64)))
    assert found.max() == 255
    np.testing.assert_array_equal(found, narrow.encode(run(int8, x=samples(64))))


def test_a_graph_quantised_with_another_scale_than_the_codecs_is_refused(quantised_case):
    other = AffineCodec.from_range(-1.0, 1.0)
    with pytest.raises(ExportError, match="did not keep the wire codec's scale"):
        graphs.attach_codes(quantised_case.int8, "codes", other)
    with pytest.raises(ExportError, match="did not keep the wire codec's scale"):
        graphs.attach_codes(quantised_case.int8, "codes", IN_CODEC, output="answer", out_codec=other)


def test_the_input_alone_can_take_codes(average):
    x = samples(7)
    found = run(graphs.attach_codes(average.plain, "codes", IN_CODEC), codes=IN_CODEC.encode(x))
    np.testing.assert_allclose(found, run(average.plain, x=x), rtol=1e-6, atol=1e-6)


def test_without_an_output_codec_the_output_stays_float():
    plain = graphs.optimised(plain_graph("Gemm", normal(192, 5), normal(5), shape=(192,)))
    x = samples(64).reshape(64, 192)
    found = run(graphs.quantised(plain, {"x": x}), x=x)
    assert found.dtype == np.float32
    assert len(np.unique(found)) > 256
    assert sqnr_db(run(plain, x=x), found) > 25


def test_the_steps_leave_their_argument_alone(average):
    inputs = (average.exported, average.plain, average.int8)
    before = [graph.SerializeToString(deterministic=True) for graph in inputs]
    graphs.with_weights(average.exported, small_net(1).state_dict())
    graphs.optimised(average.exported)
    graphs.quantised(average.plain, {"x": samples(16)}, input_codec=IN_CODEC)
    for graph in (average.plain, average.int8):
        graphs.channels_last(average.coded(graph), "codes")
        graphs.scrubbed(graph)
    assert [graph.SerializeToString(deterministic=True) for graph in inputs] == before


@pytest.mark.parametrize("batch", BATCHES)
def test_channels_last_takes_the_image_as_applications_have_it(case, batch):
    codes = IN_CODEC.encode(samples(batch))
    coded = case.coded(case.int8)
    turned = graphs.channels_last(coded, "codes")
    shape = [d.dim_param or d.dim_value for d in turned.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 8, 8, 3]
    found = run(turned, codes=np.ascontiguousarray(codes.transpose(0, 2, 3, 1)))
    np.testing.assert_array_equal(found, run(coded, codes=codes))


# --- the selector ---


@pytest.mark.parametrize("selector", [(0,), (3,), (0, 2), (1, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("batch", BATCHES)
def test_select_answers_is_equation_1(selector, batch):
    rng = np.random.Generator(np.random.PCG64(3))
    codecs = [AffineCodec.from_range(-float(i) / 3, 1.7 + i) for i in range(5)]
    answers = rng.integers(0, 256, (batch, 5, 6), dtype=np.uint8)
    identity = plain_graph("Identity", shape=(len(selector), 6))
    graph = graphs.select_answers(identity, "answers", codecs, selector, 6)
    features = np.stack([codecs[i].decode(answers[:, i]) for i in selector], axis=1)
    by_hand = np.stack(
        [
            (answers[:, i].astype(np.float32) - np.float32(codecs[i].zero_point))
            * np.float32(codecs[i].scale / len(selector))
            for i in selector
        ],
        axis=1,
    )
    found = run(graph, answers=answers)
    np.testing.assert_array_equal(found, by_hand)
    np.testing.assert_allclose(found, features / len(selector), rtol=1e-6)


def test_answers_that_do_not_count_do_not_matter():
    codecs = [AffineCodec.from_range(-1.0, 1.0 + i) for i in range(4)]
    graph = graphs.select_answers(plain_graph("Identity", shape=(2, 6)), "answers", codecs, (1, 3), 6)
    answers = np.full((2, 4, 6), 77, np.uint8)
    spoiled = answers.copy()
    spoiled[:, [0, 2]] = 255
    np.testing.assert_array_equal(run(graph, answers=answers), run(graph, answers=spoiled))


# --- what a graph tells about the machine ---


def test_torch_leaves_the_machine_in_the_graph_and_scrubbing_takes_it_out(case):
    assert b"test_graphs.py" in case.exported.SerializeToString()  # or the rest proves nothing
    for graph in (case.exported, case.plain, case.int8, case.coded(case.int8)):
        data = graphs.scrubbed(graph)
        for word in (b".py", b"torch", b"conv1", b"bn1", b"ensembler.weights", b"onnxruntime.quant", b"Residual"):
            assert word not in data
        scrubbed = onnx.load_from_string(data)
        assert (scrubbed.producer_name, scrubbed.producer_version) == ("ensembler", "")
        assert [opset.domain for opset in scrubbed.opset_import] == [""]
        onnx.checker.check_model(scrubbed, full_check=True)


def test_scrubbing_changes_no_answer(case):
    codes = IN_CODEC.encode(samples(7))
    coded = case.coded(case.int8)
    np.testing.assert_array_equal(run(graphs.scrubbed(coded), codes=codes), run(coded, codes=codes))


def test_inputs_and_outputs_keep_their_names_and_nothing_else_does(average):
    graph = onnx.load_from_string(graphs.scrubbed(average.coded(average.int8))).graph
    assert [value.name for value in graph.input] == ["codes"]
    assert [value.name for value in graph.output] == ["answer"]
    inner = {name for node in graph.node for name in (*node.input, *node.output)} - {"codes", "answer", ""}
    inner |= {initializer.name for initializer in graph.initializer}
    assert all(name.startswith("t") and name[1:].isdecimal() for name in inner)
    assert [node.name for node in graph.node] == [f"n{i}" for i in range(len(graph.node))]


def test_an_invalid_graph_is_not_shipped():
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Relu", ["nowhere"], ["y"])
    with pytest.raises(ExportError, match="not valid ONNX"):
        graphs.scrubbed(helper.make_model(helper.make_graph([node], "g", [], [value])))


def test_a_graph_inside_a_node_is_not_shipped():
    # Its nodes would keep their names and source lines.
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    constant = helper.make_node("Constant", [], ["y"], value_floats=[1.0], doc_string="/secret/path.py")
    branch = helper.make_graph([constant], "branch", [], [value])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.BOOL, [])], [value])
    with pytest.raises(ExportError, match="branches or loops"):
        graphs.scrubbed(helper.make_model(graph))


# --- dropout ---


@pytest.mark.parametrize("bits", [8, 2])
def test_a_dropped_code_is_that_of_zero_and_the_others_stay(bits):
    codec = AffineCodec.from_range(-1.0, 2.0, bits)
    net = small_net(1, ENDS["convolution"])
    graph = graphs.optimised(graphs.from_torch(net, [torch.from_numpy(samples(2))]))
    whole = graphs.attach_codes(graph, "image", IN_CODEC, output="features", out_codec=codec)
    images = IN_CODEC.encode(samples(7))
    keep = np.random.Generator(np.random.PCG64(0)).random((7, 5, 8, 8)) >= 0.3
    model = onnx.load_model_from_string(graphs.scrubbed(graphs.dropped(whole, "features", codec)))
    dropping = ort.InferenceSession(model.SerializeToString())
    codes = ort.InferenceSession(graphs.scrubbed(whole)).run(None, {"image": images})[0]
    found = dropping.run(None, {"image": images, "keep": keep})[0]
    assert np.array_equal(found, np.where(keep, codes, codec.zero_point))
    assert (found != codes).any()
    # A runtime that knows nothing of dropout must not send everything.
    with pytest.raises(Exception, match="keep"):
        dropping.run(None, {"image": images})
