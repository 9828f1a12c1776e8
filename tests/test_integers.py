"""Integers are added up exactly by every session that the product opens, whatever the processor."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ensembler.cloud_runtime.onnx_engine import _session
from ensembler.crypto.clear import ClearLayers
from ensembler.edge_runtime.backends import OnnxSession

SIZE = 64  # products in a sum


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A quantised matrix product of the largest codes, whose pairs of products do not fit into 16 bits."""
    weights = np.full((SIZE, SIZE), 127, np.int8)
    scalars = {"one": (TensorProto.FLOAT, 1.0), "wide": (TensorProto.FLOAT, float(SIZE * 127))}
    scalars |= {"zero": (TensorProto.UINT8, 0), "zero_s": (TensorProto.INT8, 0)}
    constants = [helper.make_tensor(name, kind, [], [value]) for name, (kind, value) in scalars.items()]
    constants.append(helper.make_tensor("weights", TensorProto.INT8, weights.shape, weights.flatten()))
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["values"]),
            helper.make_node("DequantizeLinear", ["weights", "one", "zero_s"], ["factors"]),
            helper.make_node("MatMul", ["values", "factors"], ["product"]),
            helper.make_node("QuantizeLinear", ["product", "wide", "zero"], ["sums"]),
            helper.make_node("DequantizeLinear", ["sums", "wide", "zero"], ["y"]),
        ],
        "largest",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, SIZE])],
        constants,
    )
    path = tmp_path_factory.mktemp("model") / "largest.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


SESSIONS = {
    "device": lambda path, x: OnnxSession(path, "largest.onnx", 1).run({"x": x}),
    "cloud": lambda path, x: _session(path, ["CPUExecutionProvider"]).run(None, {"x": x})[0],
    "crypto's clear layers": lambda path, x: ClearLayers(path).run(x),
}


@pytest.mark.parametrize("who", SESSIONS)
def test_the_largest_codes_are_added_up_without_saturating(model, who):
    x = np.full((3, SIZE), 255, np.float32)
    assert np.array_equal(SESSIONS[who](model, x), np.full((3, SIZE), 255.0 * 127 * SIZE, np.float32))
