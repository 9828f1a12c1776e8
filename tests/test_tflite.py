"""TFLite models: what is converted, quantised, scrubbed and shipped.

Most of it needs the extra ``tflite``: ``make test-tflite``.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import LABELS, colour_images
from onnx import numpy_helper
from torch import nn

from ensembler import EdgeClient
from ensembler.cli import main
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.edge_runtime import sealing
from ensembler.edge_runtime.backends import BACKENDS, open_session
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.export import client_models, tflite
from ensembler.export.parity import Gates
from ensembler.export.pipeline import ExportOptions, export
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import ConfigError, ExportError, KeyFileError, MissingExtraError
from ensembler.protocol.manifest import load_client
from ensembler.training.runs import RunFolder
from ensembler.training.stages import load_client as load_trained
from ensembler.training.stages import train
from ensembler.transport.inprocess import InProcessTransport

try:
    tflite.require()
    HERE = True
except MissingExtraError:
    HERE = False
converts = pytest.mark.skipif(not HERE, reason="needs the extra tflite: make test-tflite")

OPEN = Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0)
PIXELS = client_models.PIXEL_CODEC
RUNTIMES = ("onnxruntime", "ai-edge-litert")
MODELS = tuple(f"{part}.{name}" for part in ("head", "tail") for name in ("onnx", "tflite"))
each_runtime = pytest.mark.parametrize("backend", RUNTIMES)


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


@converts
def test_answers_around_zero_keep_their_precision_in_the_tail_of_one_net(tiny, tiny_images):
    client = load_trained(RunFolder.open(tiny.run))
    codecs = tuple(AffineCodec(scale=2.0**-6, zero_point=128 + i) for i in range(client.wire.num_nets))
    client.wire = dataclasses.replace(client.wire, answer_codecs=codecs)
    count, generator = len(tiny_images), torch.Generator().manual_seed(0)
    client.selector, client.tail = (1,), nn.Linear(client.wire.answer_width, len(LABELS))
    nn.init.normal_(client.tail.weight, std=0.1, generator=generator)
    nn.init.zeros_(client.tail.bias)
    answers = 0.1 * torch.randn(count, len(codecs), client.wire.answer_width, generator=generator)
    codes = np.stack([codec.encode(answers[:, i].numpy()) for i, codec in enumerate(codecs)], axis=1)
    arrived = np.stack([codec.decode(codes[:, i]) for i, codec in enumerate(codecs)], axis=1)
    x = torch.from_numpy(PIXELS.decode(tiny_images.transpose(0, 3, 1, 2)))
    samples = client_models.Samples(x=x, draw=client.draw(count), answers=answers)
    with torch.inference_mode():
        wanted = client.combine(torch.from_numpy(arrived[:, list(client.selector)])).numpy()
        tail = client_models.make(client, samples, ("tflite",), "int8")["tflite"].tail
    found = open_session(tail, backend="ai-edge-litert").run({"answers": codes})
    assert sqnr_db(wanted, found) > 35


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
    of_onnx, of_tflite = (EdgeRuntime(both / "client", backend=name) for name in RUNTIMES)
    wire = of_onnx.manifest.wire
    codes = [wire.feature_codec.decode(each.encode(tiny_images)) for each in (of_onnx, of_tflite)]
    assert sqnr_db(*codes) > 30  # two integer models of one net
    engine = OnnxEngine(tiny.server, threads=1)
    answers = engine.run(of_onnx.encode(tiny_images))
    engine.close()
    logits = of_onnx.finish(answers)
    assert sqnr_db(logits, of_tflite.finish(answers)) > 25


@converts
@each_runtime
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


# --- encrypted at rest ---


@pytest.fixture(scope="module")
def encrypted(tiny, tmp_path_factory):
    """The client of ``both`` once more, encrypted: the folder of the export and the key file."""
    folder = tmp_path_factory.mktemp("encrypted")
    out, key = folder / "out", folder / "bundle.key"
    assert main(["keys", "bundle", str(key)]) == 0
    options = ["--format", "onnx", "--format", "tflite", "--server-bundle", str(tiny.server), "--encrypt-key", str(key)]
    gates = ["--min-sqnr-db", "30", "--max-accuracy-drop", "100"]
    assert main(["export", str(tiny.run), "--out", str(out), "--plaintext", *options, *gates]) == 0
    return out, key


@converts
def test_the_models_of_both_formats_are_encrypted(encrypted, both):
    out, key = encrypted
    sealer = sealing.Sealer(sealing.key(key), load_client(out / "client"))
    plain = {name: (both / "client" / name).read_bytes() for name in MODELS}
    assert {path.name for path in (out / "client").iterdir()} == {
        "manifest.json",
        *(f"{name}.sealed" for name in MODELS),
    }
    assert {name: sealer.open(out / "client" / f"{name}.sealed") for name in MODELS} == plain


@converts
def test_no_part_of_a_model_lies_readable_beside_an_encrypted_bundle(encrypted, both):
    parts = {
        data[start : start + 16]
        for data in ((both / "client" / name).read_bytes() for name in MODELS)
        for start in range(0, len(data) - 15, 16)
    }
    written = [path for path in encrypted[0].rglob("*") if path.is_file()]
    assert len(written) == len(MODELS) + 2  # manifest and parity report
    for path in written:
        data = path.read_bytes()
        assert [part for part in parts if part in data] == [], path


@converts
@each_runtime
def test_an_encrypted_bundle_gives_the_codes_and_logits_of_the_plain_one(backend, encrypted, both, tiny_images, gate):
    out, key = encrypted
    plain = EdgeRuntime(both / "client", backend=backend)
    opened = EdgeRuntime(out / "client", backend=backend, secret=lambda _: sealing.key(key))
    codes = plain.encode(tiny_images)
    np.testing.assert_array_equal(opened.encode(tiny_images), codes)
    wanted = plain.finish(gate.engine.run(codes))
    client = EdgeClient(
        out / "client", "in-process", transport=InProcessTransport(gate), bundle_key=key, backend=backend
    )
    with client:
        assert client.info().backend == backend
        found = [prediction.logits for prediction in client.predict_batch(list(tiny_images))]
    np.testing.assert_array_equal(found, wanted)


@converts
@each_runtime
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "is encrypted with a key file"),
        ({"bundle_key": bytes(32)}, r"head\.{format}\.sealed does not open"),
        ({"passphrase": "correct horse, battery"}, "a passphrase was given"),
    ],
    ids=["nothing", "another key", "a passphrase"],
)
def test_no_runtime_opens_an_encrypted_bundle_without_its_key(options, words, backend, encrypted):
    with pytest.raises(KeyFileError, match=words.format(format=BACKENDS[backend].format)):
        EdgeClient(
            encrypted[0] / "client",
            "in-process",
            transport=InProcessTransport(lambda _: []),
            backend=backend,
            **options,
        )


# --- images of 224x224 pixels ---


@pytest.fixture(scope="module")
def large_data(tmp_path_factory):
    """A ``--data`` specification of 24 train and 8 test images of 224x224 pixels."""
    folder = tmp_path_factory.mktemp("large")
    for part, count, seed in (("train", 24, 1), ("test", 8, 2)):
        x, y = colour_images(count, seed, size=224)
        np.savez(folder / f"{part}.npz", x=x, y=y, label_names=np.array(LABELS))
    return f"npz:{folder / 'train.npz'},{folder / 'test.npz'}"


# The head's last part, and the shape of the features.
CUTS = {
    "behind the first pooling": ("3", (8, 56, 56)),
    "behind a shortcut": ("6", (16, 28, 28)),
    "behind all convolutions": ("8", (32, 28, 28)),
}


@converts
@pytest.mark.parametrize("cut", CUTS)
def test_a_head_of_224_pixels_is_the_same_in_both_formats(cut, large_data, configs, tmp_path):
    head_end, shape = CUTS[cut]
    settings = configs(data=large_data, arch="own_nets:mobile", num_nets=2, num_selected=1, batch_size=8, client_seed=0)
    run, out = tmp_path / "run", tmp_path / "out"
    train(settings(head_end=head_end, epochs_stage1=1, epochs_stage3=1), run)
    report = export(run, out, ExportOptions(formats=("onnx", "tflite"), gates=OPEN))
    rows = {row.runtime: row for row in report.runtimes}
    assert rows.keys() >= set(RUNTIMES)
    for row in rows.values():
        assert row.head_sqnr_db > 30, row
        assert row.tail_sqnr_db > 30, row

    wire = load_client(out / "client").wire
    codec = wire.feature_codec
    assert wire.feature_shape == shape
    (found,) = interpreted(out / "client" / "head.tflite").get_output_details()
    assert tuple(found["shape"]) == (1, *shape)
    assert found["quantization"] == (codec.scale, codec.zero_point - 128)
    assert last_codec(out / "client" / "head.onnx") == (codec.scale, codec.zero_point)

    with np.load(large_data.split(",")[1]) as stored:
        x = stored["x"]
    client = load_trained(RunFolder.open(run))
    with torch.inference_mode():
        wanted = (client.head(torch.from_numpy(PIXELS.decode(x))) + client.noise).numpy()
    pixels = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    for backend in RUNTIMES:
        codes = EdgeRuntime(out / "client", backend=backend).encode(pixels)
        assert sqnr_db(wanted, codec.decode(codes)) > 30, backend


def interpreted(path):
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_content=path.read_bytes())


def last_codec(path):
    """Scale and zero point of the codes that an ONNX model gives."""
    graph = onnx.load(path).graph
    node = next(node for node in graph.node if graph.output[0].name in node.output)
    assert node.op_type == "QuantizeLinear"
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    return tuple(constants[name].item() for name in node.input[1:])


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
