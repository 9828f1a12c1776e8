"""TFLite models: what is converted, quantised, scrubbed and shipped.

Most of it needs the extra ``tflite``: ``make test-tflite``.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from ensembler import EdgeClient
from ensembler.cli import main
from ensembler.cloud_runtime.engine import OnnxEngine
from ensembler.edge_runtime.backends import open_session
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.export import client_models, tflite
from ensembler.export.parity import Gates
from ensembler.export.pipeline import ExportOptions, export
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError, ExportError, MissingExtraError
from ensembler.protocol.manifest import load_client
from ensembler.training.runs import RunFolder
from ensembler.training.stages import load_client as load_trained
from ensembler.training.stages import train

try:
    tflite.require()
    HERE = True
except MissingExtraError:
    HERE = False
converts = pytest.mark.skipif(not HERE, reason="needs the extra tflite: make test-tflite")

OPEN = Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0)
PIXELS = client_models.PIXEL_CODEC


def sqnr_db(wanted, found):
    wanted = wanted.astype(np.float64)
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum())


def images(count, size=16, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def shipped(module, pixels, codec):
    """The int8 model of a module of normalised images, calibrated with ``pixels``."""
    x = torch.from_numpy(PIXELS.decode(pixels))
    in_float = tflite.from_torch(module, [x[:1]], inputs=["image"], output="features")
    quantised = tflite.quantised(in_float, {"image": x.numpy()}, codecs={"image": PIXELS, "features": codec})
    return tflite.scrubbed(quantised)


class Pooled(nn.Module):
    """Batch norm without a ReLU, then a maximum over windows that reach beyond the map's edge."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1))

    def forward(self, image):
        return self.inner(image.permute(0, 3, 1, 2))


@converts
def test_what_is_padded_before_a_maximum_has_an_int8_code():
    module, pixels = Pooled().eval(), images(64)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(PIXELS.decode(pixels))).numpy()
    codec = AffineCodec.from_range(float(wanted.min()), float(wanted.max()))
    session = open_session(shipped(module, pixels, codec), backend="ai-edge-litert")
    assert sqnr_db(wanted, codec.decode(session.run({"image": pixels}))) > 35


@converts
def test_a_rare_image_of_great_values_is_inside_the_calibrated_range():
    """A moving average of each image's range, the quantiser's own way, would end far below."""
    pixels = images(64) // 16 + 120
    pixels[40] = images(1, seed=1)[0]
    module = Pooled().eval()
    with torch.inference_mode():
        wanted = module(torch.from_numpy(PIXELS.decode(pixels))).numpy()
    codec = AffineCodec.from_range(float(wanted.min()), float(wanted.max()))
    session = open_session(shipped(module, pixels, codec), backend="ai-edge-litert")
    assert sqnr_db(wanted[40], codec.decode(session.run({"image": pixels[40:41]}))[0]) > 30


@converts
def test_a_model_without_operators_is_refused():
    class Nothing(nn.Module):
        def forward(self, image):
            return image

    with pytest.raises(ExportError, match=r"litert-torch made an empty model of Nothing|cannot convert Nothing"):
        tflite.from_torch(Nothing(), [torch.zeros(1, 4, 4, 3)], inputs=["image"], output="features")


@converts
def test_what_cannot_be_converted_is_one_typed_error():
    class Branches(nn.Module):
        def forward(self, image):
            return image if image.sum() > 0 else -image

    with pytest.raises(ExportError, match="litert-torch cannot convert Branches to TFLite"):
        tflite.from_torch(Branches(), [torch.zeros(1, 4, 4, 3)], inputs=["image"], output="features")


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """The tiny client in both formats, for the tiny server."""
    out = tmp_path_factory.mktemp("both") / "out"
    options = ["--format", "onnx", "--format", "tflite", "--server-bundle", str(tiny.server)]
    gates = ["--min-sqnr-db", "30", "--max-accuracy-drop", "100"]
    assert main(["export", str(tiny.run), "--out", str(out), "--plaintext", *options, *gates, "--json"]) == 0
    return out


@converts
def test_the_parity_report_has_a_row_for_each_runtime(both):
    report = json.loads((both / "parity.json").read_text(encoding="utf-8"))
    rows = {row["runtime"]: row for row in report["runtimes"]}
    assert {"onnxruntime", "ai-edge-litert"} <= rows.keys()
    assert [row["default"] for row in report["runtimes"]] == [True] + [False] * (len(rows) - 1)
    assert rows["ai-edge-litert"]["format"] == "tflite"
    for row in report["runtimes"]:
        assert row["head_sqnr_db"] > 30
        assert row["tail_sqnr_db"] > 30
        assert row["batch1_ms"] > 0
        assert row["float32_ms"] > 0 or row["max_lsb"] is not None
    default = min(rows.values(), key=lambda row: not row["default"])
    assert load_client(both / "client").models[0].format == default["format"]


@converts
def test_both_formats_speak_one_wire(both, tiny, tiny_images):
    of_onnx, of_tflite = (EdgeRuntime(both / "client", backend=name) for name in ("onnxruntime", "ai-edge-litert"))
    wire = of_onnx.manifest.wire
    codes = [wire.feature_codec.decode(each.encode(tiny_images)) for each in (of_onnx, of_tflite)]
    assert sqnr_db(*codes) > 30  # two integer models of one net
    engine = OnnxEngine(tiny.server, threads=1)
    answers = engine.run(of_onnx.encode(tiny_images))
    engine.close()
    logits = of_onnx.finish(answers)
    assert sqnr_db(logits, of_tflite.finish(answers)) > 25


@converts
@pytest.mark.parametrize("backend", ["onnxruntime", "ai-edge-litert"])
def test_a_device_predicts_with_either_format_against_one_server(backend, both, tiny, tiny_images, serve, expected):
    with (
        serve(tiny.server, "--plaintext") as (endpoint, _),
        EdgeClient(both / "client", endpoint, plaintext=True, backend=backend, timeout_ms=60_000) as client,
    ):
        assert client.info().backend == backend
        found = [prediction.label for prediction in client.predict_batch(list(tiny_images[:32]))]
    labels = load_client(both / "client").labels
    same = [label == labels[index] for label, index in zip(found, expected[:32].argmax(1), strict=True)]
    assert np.mean(same) > 0.9


@converts
def test_no_model_names_a_layer_a_file_or_the_converter(both):
    for name in ("head.tflite", "tail.tflite"):
        data = (both / "client" / name).read_bytes().lower()
        for word in (b"torch", b"conv", b"mlir", b"litert", b"serving", b".py", b"/home", b"resnet", b"version"):
            assert word not in data, (name, word)


@converts
def test_the_same_client_gives_the_same_bytes(both, tiny, tmp_path):
    options = ExportOptions(formats=("tflite",), server_bundles=(tiny.server,), gates=OPEN)
    export(tiny.run, tmp_path / "out", options)
    for name in ("head.tflite", "tail.tflite"):
        assert (tmp_path / "out" / "client" / name).read_bytes() == (both / "client" / name).read_bytes()


CLIENTS = {
    "one of several learned tensors, and dropout": {"noise": "learned", "noise_mode": "fresh", "dropout": 0.3},
    "fresh noise": {"noise_mode": "fresh"},
    "no noise, codes of 3 bits": {"noise_std": 0.0, "wire_bits": 3},
}


@converts
@pytest.mark.parametrize("kind", CLIENTS)
def test_what_a_client_does_to_its_features_is_done_to_tflites(kind, tiny, tiny_images, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    changes = {"defense": "single", "epochs_stage3": 1, "epochs_stage1": 1} | CLIENTS[kind]
    train(dataclasses.replace(RunFolder.open(tiny.run).config, **changes), run)
    report = export(run, out, ExportOptions(formats=("tflite",), server_precision="float32", gates=OPEN))
    runtime = EdgeRuntime(out / "client")
    manifest = runtime.manifest
    codec = manifest.wire.feature_codec
    codes = runtime.encode(tiny_images)
    assert codes.max() <= codec.code_max
    (row,) = report.runtimes
    assert row.head_sqnr_db > min(35.0, report.stages[0].wire_sqnr_db - 1)
    client = load_trained(RunFolder.open(run))
    with torch.inference_mode():
        x = torch.from_numpy(tiny_images.transpose(0, 3, 1, 2).copy())
        features = client.head((x.float() - 128) / 64)
    if manifest.dropout:
        assert (codes == codec.zero_point).mean() >= 0.9 * manifest.dropout
    if manifest.noise_mode in ("fresh", "drawn"):
        assert (runtime.encode(tiny_images) != codes).mean() > 0.2
    if manifest.noise_mode == "none":
        np.testing.assert_array_less(np.abs(codec.encode(features.numpy()).astype(int) - codes), 2)


def test_float32_models_are_onnx_alone(tiny, tmp_path, capsys):
    options = ["--format", "tflite", "--quantize", "none"]
    assert main(["export", str(tiny.run), "--out", str(tmp_path / "out"), "--plaintext", *options]) == 2
    assert "--format tflite makes int8 models alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_format_is_given_once():
    with pytest.raises(ConfigError, match="--format onnx, onnx: give onnx, tflite or each of them once"):
        client_models.check(("onnx", "onnx"), "int8")


@pytest.mark.skipif(HERE, reason="the converter is installed")
def test_without_the_converter_its_install_command_is_named(tiny, tmp_path, capsys):
    assert main(["export", str(tiny.run), "--out", str(tmp_path / "out"), "--format", "tflite"]) == 1
    assert "--format tflite needs litert-torch: pip install 'ensembler-edge[tflite]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
