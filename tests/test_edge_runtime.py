"""The device's side of inference: runtimes, head and tail, fresh noise, and every image an application may give."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from ensembler.edge_runtime.backends import as_codes, open_session
from ensembler.edge_runtime.images import to_pixels
from ensembler.edge_runtime.runtime import EdgeRuntime, fresh_noise, secret_inputs, softmax, uniform_noise
from ensembler.protocol.errors import BundleError, BundleTamperedError, ConfigError, ImageError
from ensembler.protocol.manifest import MANIFEST_NAME, ImageSpec, describe_file, load_client, to_json

SPEC = ImageSpec(height=16, width=16)
WIDE = ImageSpec(height=8, width=24)


def random_pixels(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, shape, dtype=np.uint8)


# --- onnxruntime ---


def write_model(path):
    """A model of two inputs that arrive by name: ``y = a - b``, float32 ``(batch, 3)``."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("a", "b", "y")]
    graph = helper.make_graph([helper.make_node("Sub", ["a", "b"], ["y"])], "g", values[:2], values[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_onnx_inputs_are_given_by_name_in_any_order(tmp_path):
    session = open_session(write_model(tmp_path / "model.onnx"))
    a, b = np.full((1, 3), 5, np.float32), np.full((1, 3), 2, np.float32)
    np.testing.assert_array_equal(session.run({"a": a, "b": b}), np.full((1, 3), 3, np.float32))
    np.testing.assert_array_equal(session.run({"b": b, "a": a}), np.full((1, 3), 3, np.float32))


def test_onnxruntime_is_told_to_report_nothing_to_its_maker(tiny, monkeypatch):
    told = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: told.append(True))
    open_session(tiny.client / "head.onnx")
    assert told


def test_onnxruntime_starts_nothing_that_could_report():
    code = "import os, numpy, ensembler; before = os.listdir('/proc/self/task'); import onnxruntime; "
    code += "print(os.environ['ORT_DISABLE_TELEMETRY'], len(os.listdir('/proc/self/task')) - len(before))"
    outside = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    done = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 0\n", "")


def test_an_unknown_backend_is_refused_with_the_known_ones(tiny):
    with pytest.raises(ConfigError, match=r"unknown backend 'abacus'; known: .*onnxruntime"):
        open_session(tiny.client / "head.onnx", backend="abacus")


def test_a_bundle_for_another_runtime_than_the_one_asked_for_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"ai-edge-litert reads tflite models and the bundle has onnx: use onnxrun"):
        EdgeRuntime(tiny.client, backend="ai-edge-litert")


# --- what is missing ---

WITHOUT = """
import sys
import threading
sys.modules[sys.argv[1]] = None
from pathlib import Path
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.edge_runtime.images import to_pixels
from ensembler.protocol.errors import MissingExtraError
from ensembler.protocol.manifest import ImageSpec
try:
    EdgeRuntime(Path(sys.argv[2]))
    to_pixels(b"GIF89a", ImageSpec(height=8, width=8))
except MissingExtraError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("onnxruntime", "running the bundle's models needs onnxruntime: pip install 'ensembler-edge[onnx]'"),
        ("PIL", "decoding an image needs pillow: pip install 'ensembler-edge[image]'"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(package, message, tiny):
    command = [sys.executable, "-W", "error", "-c", WITHOUT, package, str(tiny.client)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (message, "")


def test_only_uint8_is_taken_for_codes():
    codes = random_pixels(2, 3)
    assert as_codes(codes) is codes
    with pytest.raises(BundleError, match="answers with float32, not with uint8 codes"):
        as_codes(codes.astype(np.float32))


# --- head and tail ---


@pytest.fixture(scope="module")
def runtime(tiny):
    return EdgeRuntime(tiny.client)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_encode_gives_one_block_of_codes_per_image(batch, runtime, tiny_images):
    codes = runtime.encode(tiny_images[:batch])
    assert codes.shape == (batch, *runtime.manifest.wire.feature_shape)
    assert codes.dtype == np.uint8


def test_fixed_noise_gives_the_same_codes_every_time(runtime, tiny_images, tiny):
    assert runtime.manifest.noise_mode == "fixed"
    first = runtime.encode(tiny_images[:5])
    np.testing.assert_array_equal(runtime.encode(tiny_images[:5]), first)
    np.testing.assert_array_equal(EdgeRuntime(tiny.client, threads=2).encode(tiny_images[:5]), first)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_finish_gives_one_logit_per_label(batch, runtime):
    wire = runtime.manifest.wire
    logits = runtime.finish(random_pixels(batch, wire.num_nets, wire.answer_width))
    assert logits.shape == (batch, len(runtime.manifest.labels))
    assert logits.dtype == np.float32


def test_finish_takes_the_answers_of_all_nets_only(runtime):
    wire = runtime.manifest.wire
    for shape in ((1, wire.num_nets - 1, wire.answer_width), (1, wire.num_nets, wire.answer_width + 1)):
        with pytest.raises(BundleError, match="cannot run on answers"):
            runtime.finish(np.zeros(shape, np.uint8))


def test_encode_takes_images_of_the_manifests_size_only(runtime):
    with pytest.raises(BundleError, match="cannot run on image uint8"):
        runtime.encode(np.zeros((1, 15, 16, 3), np.uint8))


def doctored(source, target, head=None, tail=None):
    """Copies a client bundle with other models, the digests set right: a bundle that contradicts itself."""
    shutil.copytree(source, target)
    text = (target / MANIFEST_NAME).read_text(encoding="utf-8")
    for name, data in (("head.onnx", head), ("tail.onnx", tail)):
        if data is not None:
            before = describe_file(target / name)
            (target / name).write_bytes(data)
            after = describe_file(target / name)
            text = text.replace(before.sha256, after.sha256)
            text = text.replace(f'"size_bytes": {before.size_bytes}', f'"size_bytes": {after.size_bytes}')
    (target / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return target


def flattening(name, dtype, shape, out="y"):
    """A model that only flattens its input, so its output has the wrong shape."""
    inputs = [helper.make_tensor_value_info(name, dtype, ["batch", *shape])]
    outputs = [helper.make_tensor_value_info(out, dtype, ["batch", None])]
    graph = helper.make_graph([helper.make_node("Flatten", [name], [out])], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def test_a_head_that_contradicts_its_manifest_is_refused(tiny, tmp_path, tiny_images):
    head = flattening("image", TensorProto.UINT8, (16, 16, 3))
    runtime = EdgeRuntime(doctored(tiny.client, tmp_path / "client", head=head))
    with pytest.raises(BundleError, match=r"the head answers with shape \(768,\), the manifest says"):
        runtime.encode(tiny_images[:1])


def test_a_head_that_emits_codes_of_more_bits_than_its_manifest_says_is_refused(tiny, tmp_path, tiny_images):
    folder = shutil.copytree(tiny.client, tmp_path / "client")
    manifest = load_client(folder)
    codec = replace(manifest.wire.feature_codec, bits=2, zero_point=0)
    (folder / MANIFEST_NAME).write_bytes(to_json(replace(manifest, wire=replace(manifest.wire, feature_codec=codec))))
    with pytest.raises(BundleError, match="the head answers with codes above 3, which u2 does not have"):
        EdgeRuntime(folder).encode(tiny_images[:2])


def test_a_tail_that_contradicts_its_manifest_is_refused(tiny, tmp_path):
    wire = load_client(tiny.client).wire
    tail = flattening("answers", TensorProto.UINT8, (wire.num_nets, wire.answer_width))
    runtime = EdgeRuntime(doctored(tiny.client, tmp_path / "client", tail=tail))
    with pytest.raises(BundleError, match=r"the tail answers with uint8 .*, not float32 \(1, 3\)"):
        runtime.finish(np.zeros((1, wire.num_nets, wire.answer_width), np.uint8))


def test_a_changed_model_is_refused_before_it_is_loaded(tiny, tmp_path):
    folder = tmp_path / "client"
    shutil.copytree(tiny.client, folder)
    data = bytearray((folder / "tail.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "tail.onnx").write_bytes(data)
    with pytest.raises(BundleTamperedError, match=r"tail\.onnx is not the file that was exported"):
        EdgeRuntime(folder)


# --- fresh noise ---

HUNDRED_THOUSAND = (100, 10, 100)


def test_fresh_noise_is_normal_with_the_given_deviation():
    noise = fresh_noise(HUNDRED_THOUSAND, 0.25).astype(np.float64).ravel() / 0.25
    # Six standard errors of each estimate, so that a sound generator does not fail.
    count = noise.size
    assert abs(noise.mean()) < 6 / count**0.5
    assert abs(noise.var() - 1) < 6 * (2 / count) ** 0.5
    assert abs((noise**3).mean()) < 6 * (15 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 6 * (96 / count) ** 0.5
    # Kolmogorov-Smirnov against a normal law drawn by numpy, at a level of 1e-9.
    other = np.random.Generator(np.random.PCG64(1)).normal(size=count)
    grid = np.sort(np.concatenate([noise, other]))
    gap = np.searchsorted(np.sort(noise), grid, "right") - np.searchsorted(np.sort(other), grid, "right")
    assert np.abs(gap).max() / count < (-0.5 * np.log(0.5e-9) * 2 / count) ** 0.5


def test_fresh_noise_is_independent_from_value_to_value():
    noise = fresh_noise((2, 50_000), 1.0).astype(np.float64)
    limit = 6 / 50_000**0.5
    assert abs((noise[0] * noise[1]).mean()) < limit  # the two halves of Box-Muller
    assert abs((noise[0, 1:] * noise[0, :-1]).mean()) < limit
    assert abs((noise[0] ** 2 * noise[1] ** 2).mean() - 1) < 6 * (8 / 50_000) ** 0.5


def test_two_draws_of_fresh_noise_share_no_value():
    first, second = fresh_noise((1000,), 1.0), fresh_noise((1000,), 1.0)
    assert (first != second).mean() > 0.99


def test_seeding_numpy_does_not_make_the_noise_repeat():
    draws = []
    for _ in range(2):
        np.random.seed(0)  # what an application may do
        draws.append(fresh_noise((100,), 1.0))
    assert not np.array_equal(*draws)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 7), (2, 4), (0, 16, 8, 8)])
def test_fresh_noise_has_any_shape(shape):
    noise = fresh_noise(shape, 1.0)
    assert noise.shape == shape
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()


def test_no_deviation_is_no_noise():
    assert not fresh_noise((4, 4), 0.0).any()


def test_uniform_noise_keeps_within_its_magnitude_and_has_the_given_deviation():
    noise = uniform_noise(HUNDRED_THOUSAND, 0.25).astype(np.float64)
    magnitude = 0.25 * 3**0.5
    assert 0.999 * magnitude < np.abs(noise).max() <= magnitude
    assert noise.std() == pytest.approx(0.25, rel=0.02)
    assert abs(noise.mean()) < 6 * 0.25 / noise.size**0.5
    # As many values in each tenth of the range.
    counts = np.histogram(noise, 10, (-magnitude, magnitude))[0]
    assert np.abs(counts - noise.size / 10).max() < 6 * (noise.size / 10) ** 0.5


def test_what_is_secret_is_drawn_for_every_image_and_only_what_the_head_takes(tiny):
    manifest = load_client(tiny.client)
    shape = (500, *manifest.wire.feature_shape)
    assert secret_inputs(manifest, 500) == {}
    drawn = dataclasses.replace(manifest, noise_mode="drawn", noise_tensors=3, dropout=0.3)
    inputs = secret_inputs(drawn, 500)
    assert inputs.keys() == {"which", "keep"}
    assert (inputs["which"].dtype, inputs["keep"].dtype, inputs["keep"].shape) == (np.int64, np.bool_, shape)
    assert set(np.unique(inputs["which"])) == {0, 1, 2}
    assert 1 - inputs["keep"].mean() == pytest.approx(0.3, abs=0.01)
    assert (inputs["keep"][0] != inputs["keep"][1]).mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.05)
    uniform = dataclasses.replace(manifest, noise_mode="fresh", noise_law="uniform", noise_std=0.5)
    assert np.abs(secret_inputs(uniform, 500)["noise"]).max() <= 0.5 * 3**0.5


# --- softmax ---


def test_softmax_is_what_its_definition_says():
    logits = np.array([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.5]], np.float32)
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(softmax(logits), wanted, rtol=1e-6)
    assert softmax(logits).dtype == np.float32


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_softmax_does_not_overflow(size):
    logits = np.array([[size, -size, 0.0], [size, size, -size], [-size, -size, -size]], np.float32)
    wanted = [[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(softmax(logits), wanted, rtol=1e-6)


# --- images: what is taken ---


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PIXELS = random_pixels(16, 16, 3)
PICTURE = Image.fromarray(PIXELS)


def as_path(folder):
    path = folder / "photo.png"
    path.write_bytes(encoded(PICTURE))
    return path


class BytesPath:
    """An ``os.PathLike`` of bytes, as ``os.scandir(b'.')`` gives."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fsencode(self.path)


GIVEN = {
    "path": as_path,
    "text": lambda folder: str(as_path(folder)),
    "bytes path": lambda folder: BytesPath(as_path(folder)),
    "bytes": lambda folder: encoded(PICTURE),
    "bytearray": lambda folder: bytearray(encoded(PICTURE)),
    "memoryview": lambda folder: memoryview(encoded(PICTURE)),
    "PIL": lambda folder: PICTURE,
    "lazy PIL": lambda folder: Image.open(io.BytesIO(encoded(PICTURE))),
    "array": lambda folder: PIXELS,
    "read-only array": lambda folder: np.asarray(PICTURE),
    "view of an array": lambda folder: np.repeat(PIXELS, 2, axis=0)[::2],
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_same_image_gives_the_same_pixels_however_it_is_given(kind, tmp_path):
    found = to_pixels(GIVEN[kind](tmp_path), SPEC)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_give_the_pixels_that_were_saved(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(to_pixels(encoded(PICTURE, kind, **options), SPEC), PIXELS)


@pytest.mark.parametrize("name", ["grün.png", "写真.png", "a b.png", "%20.png"])
def test_any_file_name_will_do(name, tmp_path):
    (tmp_path / name).write_bytes(encoded(PICTURE))
    np.testing.assert_array_equal(to_pixels(tmp_path / name, SPEC), PIXELS)
    np.testing.assert_array_equal(to_pixels(str(tmp_path / name), SPEC), PIXELS)


GREY = random_pixels(16, 16)
ALPHA = random_pixels(16, 16, 4)


def with_palette(**options):
    image = Image.fromarray(GREY).convert("P")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 0)])
    return encoded(image, **options)


PALETTE_PIXELS = np.stack([GREY, 255 - GREY, np.zeros_like(GREY)], axis=2)
GREY_PIXELS = np.repeat(GREY[:, :, None], 3, axis=2)
MODES = {
    "grey": (encoded(Image.fromarray(GREY)), GREY_PIXELS),
    "grey with alpha": (encoded(Image.fromarray(np.stack([GREY, GREY], 2), "LA")), GREY_PIXELS),
    "RGBA": (encoded(Image.fromarray(ALPHA)), ALPHA[:, :, :3]),
    "two colours": (encoded(Image.fromarray(GREY > 127)), np.where(GREY_PIXELS > 127, 255, 0)),
    "palette": (with_palette(), PALETTE_PIXELS),
    "palette with one transparent colour": (with_palette(transparency=7), PALETTE_PIXELS),
    "palette with transparencies": (with_palette(transparency=bytes(range(256))), PALETTE_PIXELS),
    "CMYK": (encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"), np.full((16, 16, 3), (0, 255, 255))),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_every_eight_bit_mode_becomes_rgb(mode):
    data, wanted = MODES[mode]
    np.testing.assert_array_equal(to_pixels(data, SPEC), wanted)


DEEP = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
DEEP_PIXELS = np.repeat(np.round(DEEP / 257).astype(np.uint8)[:, :, None], 3, axis=2)
DEEP_RGB = random_pixels(16, 16, 6).view(np.uint16)
DEEP_BIG_ENDIAN = Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes())
SIXTEEN_BITS = {
    "grey array": (DEEP, DEEP_PIXELS),
    "grey array of three axes": (DEEP[:, :, None], DEEP_PIXELS),
    "big-endian array": (DEEP.astype(">u2"), DEEP_PIXELS),
    "RGB array": (DEEP_RGB, np.round(DEEP_RGB / 257)),
    "RGBA array": (np.dstack([DEEP_RGB, DEEP]), np.round(DEEP_RGB / 257)),
    "PIL I;16": (Image.fromarray(DEEP), DEEP_PIXELS),
    "PIL I;16B": (DEEP_BIG_ENDIAN, DEEP_PIXELS),
    "PIL I": (Image.fromarray(DEEP).convert("I"), DEEP_PIXELS),
    "PNG": (encoded(Image.fromarray(DEEP)), DEEP_PIXELS),
    "TIFF": (encoded(Image.fromarray(DEEP), "TIFF"), DEEP_PIXELS),
    "big-endian TIFF": (encoded(DEEP_BIG_ENDIAN, "TIFF"), DEEP_PIXELS),
    "TIFF of 32 bits": (encoded(Image.fromarray(DEEP).convert("I"), "TIFF"), DEEP_PIXELS),
    "PGM": (b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(), DEEP_PIXELS),
    "PPM": (b"P6 16 16 65535\n" + DEEP_RGB.astype(">u2").tobytes(), np.round(DEEP_RGB / 257)),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(name):
    image, wanted = SIXTEEN_BITS[name]
    found = to_pixels(image, SPEC)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)


def test_sixteen_bits_of_another_size_are_scaled_as_eight_bits_are():
    wanted = to_pixels(DEEP_PIXELS, WIDE)
    for image in (DEEP, Image.fromarray(DEEP), encoded(Image.fromarray(DEEP))):
        np.testing.assert_array_equal(to_pixels(image, WIDE), wanted)


ARRAYS = {
    "grey": (GREY, GREY_PIXELS),
    "grey of three axes": (GREY[:, :, None], GREY_PIXELS),
    "RGBA": (ALPHA, ALPHA[:, :, :3]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_grey_and_transparent_arrays_become_rgb(name):
    array, wanted = ARRAYS[name]
    np.testing.assert_array_equal(to_pixels(array, SPEC), wanted)
    np.testing.assert_array_equal(to_pixels(array, WIDE), to_pixels(wanted, WIDE))


def test_pixels_of_any_array_can_be_given_to_a_head(runtime):
    for array in (GREY, ALPHA, DEEP, PIXELS):
        assert runtime.encode(to_pixels(array, SPEC)[None]).dtype == np.uint8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(to_pixels(data, SPEC), np.full((16, 16, 3), (255, 0, 0)))


@pytest.mark.parametrize("name", ["CMYK", "grey"])
def test_jpegs_of_other_modes_become_rgb(name):
    mode, colour, wanted = {"CMYK": ("CMYK", (255, 0, 0, 0), (0, 255, 255)), "grey": ("L", 90, (90, 90, 90))}[name]
    found = to_pixels(encoded(Image.new(mode, (16, 16), colour), "JPEG"), SPEC)
    assert np.abs(found.astype(int) - wanted).max() <= 2


ORIENTATIONS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_photo_stands_upright_as_its_exif_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PICTURE, "PNG", exif=exif)
    np.testing.assert_array_equal(to_pixels(data, SPEC), ORIENTATIONS[orientation](PIXELS))


def test_a_photo_of_sixteen_bits_stands_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, kind in ((Image.fromarray(DEEP), "PNG"), (DEEP_BIG_ENDIAN, "TIFF")):
        np.testing.assert_array_equal(to_pixels(encoded(image, kind, exif=exif), SPEC), np.rot90(DEEP_PIXELS, -1))


def test_another_size_is_scaled_to_cover_and_cropped_in_the_middle():
    tall = np.zeros((48, 16, 3), np.uint8)
    tall[16:32] = 200  # the middle third is what remains
    assert (to_pixels(tall, SPEC) == 200).all()
    wide = tall.transpose(1, 0, 2)
    assert (to_pixels(np.ascontiguousarray(wide), SPEC) == 200).all()
    assert to_pixels(tall, WIDE).shape == (8, 24, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (15, 17), (333, 77)])
def test_any_size_will_do(size):
    found = to_pixels(np.full((*size, 3), 90, np.uint8), WIDE)
    assert found.shape == (8, 24, 3)
    assert (found == 90).all()


def test_scaling_an_array_or_its_file_gives_the_same():
    pixels = random_pixels(40, 30, 3)
    wanted = to_pixels(pixels, SPEC)
    np.testing.assert_array_equal(to_pixels(encoded(Image.fromarray(pixels)), SPEC), wanted)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), SPEC), wanted)


def test_the_callers_image_is_not_changed():
    pixels = random_pixels(40, 30, 3)
    image = Image.fromarray(pixels)
    to_pixels(image, SPEC)
    to_pixels(pixels, SPEC)
    assert image.size == (30, 40)
    np.testing.assert_array_equal(pixels, random_pixels(40, 30, 3))


def test_decoding_in_many_threads_leaves_the_applications_warning_filters_alone():
    before = list(warnings.filters)
    data, interval = encoded(PICTURE), sys.getswitchinterval()

    def work():
        for _ in range(100):
            to_pixels(data, SPEC)

    threads = [threading.Thread(target=work) for _ in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


# --- images: what is refused ---


def png_that_claims(width, height):
    """A PNG whose header states a size that its few bytes do not hold."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
CLOSED = Image.new("RGB", (8, 8))
CLOSED.close()
REFUSED = {
    "empty": (b"", "the image bytes: empty, not an image"),
    "text": (b"hello", "not a readable image"),
    "zeros": (bytes(5000), "not a readable image"),
    "half a PNG": (encoded(PICTURE)[:300], "not a readable image .*; is it complete"),
    "half a JPEG": (encoded(PICTURE, "JPEG")[:300], "not a readable image .*; is it complete"),
    "more pixels than allowed": (png_that_claims(9000, 9000), "9000x9000 pixels; shrink it"),
    "pixels that pillow warns of": (png_that_claims(10_000, 10_000), "too many pixels|10000x10000 pixels"),
    "a decompression bomb": (png_that_claims(60_000, 60_000), "too many pixels"),
    "no pixels": (png_that_claims(0, 16), "not a readable image"),
    "PostScript": (EPS, "PostScript is a program"),
    "float array": (np.zeros((16, 16, 3), np.float32), r"is float32; give uint8 in 0\.\.255"),
    "int64 array": (
        np.zeros((16, 16, 3), np.int64),
        r"is int64; .* for instance x\.astype\('uint8'\) for x in 0\.\.255",
    ),
    "bool array": (np.zeros((16, 16, 3), bool), "is bool; give uint8"),
    "NaN": (np.full((16, 16, 3), np.nan, np.float32), "float32 and holds NaN or infinity; mend that"),
    "infinity": (np.full((16, 16), np.inf), "float64 and holds NaN or infinity"),
    "uint32 array": (np.zeros((16, 16, 3), np.uint32), r"is uint32; give uint8 .* \(or uint16"),
    "complex array": (np.zeros((16, 16), complex), "is complex128; give uint8"),
    "text array": (np.array([["a"]]), "give uint8"),
    "channels first": (
        np.zeros((3, 16, 16), np.uint8),
        r"shape \(3, 16, 16\).* looks channels first: give x\.transpose",
    ),
    "two channels": (np.zeros((16, 16, 2), np.uint8), r"shape \(16, 16, 2\); give \(H, W, 3\), channels last, RGB"),
    "five channels": (np.zeros((16, 16, 5), np.uint16), "channels last, RGB"),
    "a batch": (np.zeros((1, 16, 16, 3), np.uint8), r"give \(H, W, 3\)"),
    "one axis": (np.zeros(16, np.uint8), r"shape \(16,\); give \(H, W, 3\)"),
    "no axis": (np.zeros((), np.uint8), r"shape \(\); give \(H, W, 3\)"),
    "no channel": (np.zeros((16, 16, 0), np.uint8), r"give \(H, W, 3\)"),
    "empty grey array": (np.zeros((16, 0), np.uint16), r"give \(H, W, 3\)"),
    "huge array": (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "the image array: 9000x9000 pixels; shrink it"),
    "huge PIL image": (Image.new("1", (9000, 9000)), "the PIL image: 9000x9000 pixels; shrink it"),
    "PIL image without pixels": (Image.new("RGB", (0, 16)), "the PIL image: 0x16 pixels; an image has at least one"),
    "closed PIL image": (CLOSED, "the PIL image: cannot be converted to RGB .*closed image"),
    "PIL F": (Image.new("F", (16, 16)), "mode F has no fixed range of values; scale it to 0..255"),
    "float TIFF": (encoded(Image.new("F", (16, 16)), "TIFF"), "the image bytes: mode F"),
    "PIL I beyond 16 bits": (Image.new("I", (16, 16), 65536), "values 65536 to 65536; 16 bits are 0 to 65535"),
    "PIL I below zero": (Image.new("I", (16, 16), -1), "values -1 to -1"),
    "empty array": (np.zeros((0, 16, 3), np.uint8), r"give \(H, W, 3\)"),
    "None": (None, "not NoneType"),
    "a list": ([[[0, 0, 0]]], "not list"),
    "a number": (3, "not int"),
    "missing": (Path("/nowhere/photo.jpg"), "/nowhere/photo.jpg cannot be read: No such file"),
    "missing as text": ("/nowhere/grün.jpg", "/nowhere/grün.jpg cannot be read: No such file"),
    "a folder": (Path("/"), "/ is not a file"),
    "a device that never ends": (Path("/dev/zero"), "/dev/zero is not a file"),
    "no path": ("", "an empty text is no path"),
    "a NUL in the path": ("a\0b.png", "is not a path"),
    "too long a name": ("a" * 300, "cannot be read: File name too long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_one_typed_error_that_says_why(name):
    image, message = REFUSED[name]
    with pytest.raises(ImageError, match=message):
        to_pixels(image, SPEC)


def test_what_pillow_only_warns_of_is_refused_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match="10000x10000 pixels; shrink it"):
            to_pixels(png_that_claims(10_000, 10_000), SPEC)


@pytest.mark.parametrize("content", [b"", b"GIF89a", encoded(PICTURE)[:200]], ids=["empty", "header", "half"])
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "damaged.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"damaged\.png: "):
        to_pixels(path, SPEC)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe is not a file"):
        to_pixels(tmp_path / "pipe", SPEC)


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as stream:
        stream.truncate(65 * 1024 * 1024)  # sparse: takes no room
    with pytest.raises(ImageError, match=r"huge\.png is larger than"):
        to_pixels(path, SPEC)
