"""The contract of every inference runtime, and which one is taken.

Needs numpy, pytest and a runtime, nothing else, so that it runs where tflite-runtime does: ``make test-legacy``.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from ensembler.edge_runtime.backends import BACKENDS, choose, installed, open_session
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import BundleError, ConfigError, MissingExtraError
from ensembler.protocol.manifest import load_client

GOLDEN = Path(__file__).resolve().parent / "golden" / "v1_tflite" / "client"


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of each runtime. tflite-runtime has an environment of its own: make test-legacy."""
    if not installed(request.param):
        pytest.skip(f"needs {request.param}")
    return request.param


@pytest.fixture
def head(backend):
    """A head that the runtime reads, its codes at its end."""
    return GOLDEN / f"head.{BACKENDS[backend].format}"


def pixels(*shape):
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, shape, dtype=np.uint8)


IMAGES = pixels(7, 16, 16, 3)


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_shape_dtype_and_codes_are_the_same_for_any_batch_and_threads(backend, head, batch, threads):
    session = open_session(head, threads=threads, backend=backend)
    codes = session.run({"image": IMAGES[:batch]})
    assert codes.dtype == np.uint8
    assert codes.shape == (batch, *load_client(GOLDEN).wire.feature_shape)
    one_by_one = [session.run({"image": IMAGES[i : i + 1]}) for i in range(batch)]
    np.testing.assert_array_equal(codes, np.concatenate([codes[:0], *one_by_one]))


def test_a_model_may_come_as_its_content(backend, head):
    from_file, from_bytes = (open_session(model, backend=backend) for model in (head, head.read_bytes()))
    np.testing.assert_array_equal(from_bytes.run({"image": IMAGES}), from_file.run({"image": IMAGES}))


def test_a_tail_gives_float_logits(backend, head):
    wire = load_client(GOLDEN).wire
    session = open_session(head.with_stem("tail"), backend=backend)
    logits = session.run({"answers": pixels(5, wire.num_nets, wire.answer_width) >> 4})
    assert logits.dtype == np.float32
    assert logits.shape == (5, 3)
    assert logits.std() > 0


def test_every_runtime_gives_the_codes_of_the_others_but_for_a_step(backend, head):
    """Of the same integer model; two formats are two integer models of one net, and differ by a step here and there."""
    found = open_session(head, backend=backend).run({"image": IMAGES}).astype(int)
    for other, known in BACKENDS.items():
        if installed(other):
            codes = open_session(GOLDEN / f"head.{known.format}", backend=other).run({"image": IMAGES})
            assert np.abs(found - codes).max() <= 1
            assert (found == codes).mean() > 0.95


def test_a_session_may_be_used_by_several_threads(backend, head):
    session = open_session(head, backend=backend)
    wanted = session.run({"image": IMAGES})
    found = [None] * 4

    def work(index):
        found[index] = session.run({"image": IMAGES})

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for codes in found:
        np.testing.assert_array_equal(codes, wanted)


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(backend, head, threads):
    with pytest.raises(ConfigError, match=f"threads = {threads}: give a whole number, at least 1"):
        open_session(head, threads=threads, backend=backend)


@pytest.mark.parametrize("content", [b"", b"not a model", None], ids=["empty", "text", "half"])
def test_a_damaged_file_is_refused(backend, head, content, tmp_path):
    if backend == "tflite-runtime" and content is None:
        pytest.skip("ends the process: it verifies nothing, so a bundle's digests are compared before")
    whole = head.read_bytes()
    path = tmp_path / head.name
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match=rf"{head.name} cannot be loaded .* export it again"):
        open_session(path, backend=backend)


def test_a_missing_file_is_refused(backend, tmp_path):
    with pytest.raises(BundleError, match="nowhere"):
        open_session(tmp_path / "nowhere", backend=backend)


@pytest.mark.parametrize(
    "inputs",
    [
        {"image": np.zeros((1, 8, 8, 3), np.uint8)},
        {"image": np.zeros((1, 16, 16, 3), np.float32)},
        {"picture": np.zeros((1, 16, 16, 3), np.uint8)},
        {},
    ],
    ids=["shape", "dtype", "name", "nothing"],
)
def test_inputs_that_the_model_does_not_take_are_one_typed_error(backend, head, inputs):
    session = open_session(head, backend=backend)
    with pytest.raises(BundleError, match=rf"{head.name} cannot run on"):
        session.run(inputs)


# --- which runtime ---


@pytest.fixture
def having(monkeypatch):
    """``having(*names)``: only these runtimes are installed."""

    def only(*names):
        monkeypatch.setattr("ensembler.edge_runtime.backends.installed", lambda name: name in names)

    return only


@pytest.mark.parametrize(
    ("there", "formats", "taken"),
    [
        (["onnxruntime", "ai-edge-litert"], ["onnx", "tflite"], "onnxruntime"),
        (["onnxruntime", "ai-edge-litert"], ["tflite", "onnx"], "ai-edge-litert"),
        (["ai-edge-litert", "tflite-runtime"], ["tflite"], "ai-edge-litert"),
        (["tflite-runtime"], ["tflite"], "tflite-runtime"),
        (["onnxruntime"], ["tflite", "onnx"], "onnxruntime"),
    ],
)
def test_the_runtime_is_the_first_that_is_there_for_the_bundles_first_format(having, there, formats, taken):
    having(*there)
    assert choose("auto", formats) == taken


@pytest.mark.parametrize(
    ("there", "formats", "command"),
    [
        ([], ["onnx", "tflite"], r"needs onnxruntime: pip install 'ensembler-edge\[onnx\]'"),
        (["onnxruntime"], ["tflite"], r"needs ai-edge-litert: pip install 'ensembler-edge\[litert\]'"),
    ],
)
def test_where_no_runtime_reads_the_bundle_the_install_command_is_named(having, there, formats, command):
    having(*there)
    with pytest.raises(MissingExtraError, match=command):
        choose("auto", formats)


def test_tflite_runtime_beside_numpy_2_is_refused_with_the_cure(monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(ConfigError, match=r"compiled for NumPy 1 and this is NumPy 2\.4\.6: pip install 'numpy<2'"):
        EdgeRuntime(GOLDEN, backend="tflite-runtime")


def test_a_client_runs_in_every_runtime_that_is_installed():
    wanted = EdgeRuntime(GOLDEN)
    assert BACKENDS[wanted.backend].format == "tflite"  # this bundle's default
    for name in filter(installed, BACKENDS):
        runtime = EdgeRuntime(GOLDEN, backend=name)
        assert runtime.backend == name
        assert np.abs(runtime.encode(IMAGES).astype(int) - wanted.encode(IMAGES)).max() <= 1
