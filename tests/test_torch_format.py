"""The torch format of a server bundle: what is in its files, what a hostile one can do, and its stacked computation."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import forged_server
from test_export import Haystack, files, initialisers, trained_secrets

from ensembler.cli import main
from ensembler.cloud_runtime.engine import EngineOptions, load
from ensembler.cloud_runtime.torch_engine import TorchEngine, lowered, stacked_run
from ensembler.export import pipeline, torch_bodies
from ensembler.protocol import program as programs
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import BundleError, ExportError
from ensembler.protocol.manifest import WireSpec, load_server, parse_server
from ensembler.protocol.program import Call, DType, Program, Value
from ensembler.training.runs import RunFolder
from ensembler.training.stages import load_bodies

pytestmark = pytest.mark.usefixtures("one_thread")  # the engine sets how many torch has


# --- what is exported ---


def test_the_torch_bundle_serves_the_client_of_the_onnx_bundle(tiny):
    torch_bundle, onnx_bundle = load_server(tiny.server_torch), load_server(tiny.server)
    assert torch_bundle.wire == onnx_bundle.wire  # bodies_id and codecs
    assert (torch_bundle.format, torch_bundle.precision) == ("torch", "float32")
    assert files(tiny.torch_out / "client") == files(tiny.client)


def test_the_report_is_of_each_net_of_the_torch_bundle(tiny):
    rows = {row["stage"]: row for row in json.loads((tiny.torch_out / "parity.json").read_bytes())["stages"]}
    assert {"body 0", "body 1", "body 2", "bodies, client"} <= rows.keys()
    # Float32 against float32: a code apart here and there, or none (null).
    assert rows["bodies"]["sqnr_db"] is None or rows["bodies"]["sqnr_db"] > 50
    stored = sum(entry.size_bytes for entry in load_server(tiny.server_torch).files.values())
    assert rows["bodies"]["size_bytes"] == pytest.approx(stored, abs=3)


def test_an_operators_part_of_the_bodies_answers_as_it_does_among_all(tiny, tmp_path, codes, answers_in_float):
    run = RunFolder.open(tiny.run)
    whole, bodies = load_server(tiny.server_torch).wire, load_bodies(run)
    wire = pipeline.party_wires(bodies, whole, [2, 1])[1]
    folder = tmp_path / "server_1"
    samples = torch.zeros(1, *wire.feature_shape)
    numbers = pipeline.Numbers("float32")
    manifest = pipeline.write_server(folder, None, bodies[2:], wire, samples, numbers, "server_1", lambda _: None)
    assert load_server(folder) == manifest
    engine = TorchEngine(folder, threads=1)
    np.testing.assert_allclose(engine.run(codes).astype(int), answers_in_float[:, 2:], rtol=0, atol=1)


def test_every_text_in_the_files_is_a_number_or_an_operator(tiny):
    names = sorted(path.name for path in tiny.server_torch.iterdir())
    assert names == ["bodies.json", "bodies.safetensors", "manifest.json"]
    document = json.loads((tiny.server_torch / "bodies.json").read_bytes())
    assert sorted(document) == ["calls", "format", "output", "tensors", "version"]
    assert {call[0] for call in document["calls"]} <= programs.OPERATORS
    with safetensors.safe_open(tiny.server_torch / "bodies.safetensors", "pt") as stored:
        assert set(stored.keys()) == {f"t{index}" for index in range(document["tensors"])}
        assert stored.metadata() is None


def test_no_secret_tensor_is_in_the_torch_bundle(tiny):
    haystack = Haystack((tiny.server_torch / "bodies.safetensors").read_bytes())
    secrets = trained_secrets(RunFolder.open(tiny.run))
    tensors = {n: t for n, t in secrets if t.dtype == np.float32 and not n.startswith(("net 0", "net 1"))}
    assert [name for name, tensor in tensors.items() if haystack.holds(tensor)] == []
    assert [name for name, array in initialisers(tiny.client) if haystack.holds(array)] == []
    # The control: a bias of a body's first convolution, its batch norm folded in.
    _, tensors = programs.opened(tiny.server_torch, load_server(tiny.server_torch), safetensors.torch.load)
    assert haystack.holds(tensors[0][1].numpy())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--server-precision", "int8"), "float32 bodies"), (("--server-bundle", "b", "--plaintext"), "--server-bundle")],
)
def test_what_the_torch_format_cannot_is_refused(arguments, words, tiny, tmp_path, capsys):
    command = ["export", str(tiny.run), "--out", str(tmp_path / "out"), "--format", "torch"]
    assert main([*command, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


CODEC = AffineCodec.from_range(-1.0, 1.0)


def wire_of(shape, width, nets):
    return WireSpec(
        bodies_id="ab" * 32, feature_shape=shape, feature_codec=CODEC, answer_width=width, answer_codecs=(CODEC,) * nets
    )


class Odd(torch.nn.Module):
    """What architectures of others have: a constant, shared weights, a split, sizes, a norm that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(4)
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("gain", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        a, b = self.norm(x).chunk(2, 1)
        y = (a * self.gain + b).reshape(x.size(0), -1, 8)
        y = self.linear(torch.relu_(self.linear(y)))
        return (y + torch.tensor([0.25])).mean(1)


def test_a_body_of_odd_parts_answers_as_torch_does():
    nets = [Odd().eval() for _ in range(2)]
    for net in nets:
        net.norm.running_mean.normal_()
    program, tensors = torch_bodies.from_torch(nets, wire_of((4, 4, 4), 8, 2))
    codes = torch.arange(5 * 64, dtype=torch.int64).remainder(256).reshape(5, 4, 4, 4).to(torch.uint8)
    with torch.inference_mode():
        found = stacked_run(programs.bind(program, torch), tensors)(codes).numpy()
        features = torch.from_numpy(CODEC.decode(codes.numpy()))
        wanted = np.stack([CODEC.encode(net(features).numpy()) for net in nets], axis=1)
    np.testing.assert_allclose(found.astype(int), wanted.astype(int), rtol=0, atol=1)


def test_an_operator_that_no_program_has_is_told_by_name():
    class Sorting(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).sort().values

    with pytest.raises(ExportError, match=r"no operator sort\.default, which a body uses; take --format onnx"):
        torch_bodies.from_torch([Sorting()], wire_of((2, 2, 2), 8, 1))


def test_nets_of_two_architectures_are_refused():
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, width)).eval() for width in (3, 4)]
    with pytest.raises(ExportError, match="one architecture"):
        torch_bodies.from_torch(nets, wire_of((2, 2, 2), 3, 2))


# --- the program's bytes ---

HALVED = Program(
    1,
    (
        Call("_to_copy.default", (Value(0),), {"dtype": DType("float32")}),
        Call("mul.Tensor", (Value(2), Value(1))),
        Call("flatten.using_ints", (Value(3), 1)),
        Call("_to_copy.default", (Value(4),), {"dtype": DType("uint8")}),
    ),
    5,
)
HALVED_BYTES = (
    b'{"calls":[["_to_copy.default",[{"value":0}],{"dtype":{"dtype":"float32"}}],'
    b'["mul.Tensor",[{"value":2},{"value":1}],{}],["flatten.using_ints",[{"value":3},1],{}],'
    b'["_to_copy.default",[{"value":4}],{"dtype":{"dtype":"uint8"}}]],'
    b'"format":"ensembler-program","output":5,"tensors":1,"version":1}\n'
)


def test_a_program_is_these_bytes_and_is_read_as_it_was_written():
    assert programs.to_json(HALVED) == HALVED_BYTES
    assert programs.parse(HALVED_BYTES, "p") == HALVED
    run = programs.bind(HALVED, torch)
    assert run([torch.tensor(0.5)], torch.full((2, 1, 3), 8, dtype=torch.uint8)).tolist() == [[4] * 3] * 2


# --- hostile files ---


@pytest.fixture
def bundle(tiny, tmp_path):
    return Path(shutil.copytree(tiny.server_torch, tmp_path / "server"))


def refused(bundle, words):
    """The bundle, its digests made right again, is refused before or by the first forward pass."""
    forged_server(parse_server((bundle / "manifest.json").read_bytes()), bundle)
    with pytest.raises(BundleError, match=words):
        load(bundle, EngineOptions(threads=1))


CODES_OUT = ["_to_copy.default", [{"value": 0}], {"dtype": {"dtype": "uint8"}}]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["os.system", ["echo"], {}], "'os.system' is no operator"),
        (["as_strided.default", [{"value": 0}, [1000], [1]], {}], "is no operator"),
        (["random.default", [{"value": 0}], {}], "is no operator"),
        (["relu_.default", [{"value": 0}], {}], "is no operator"),
        ([["relu.default"], [{"value": 0}], {}], "is no operator"),
        (["relu.default", [{"value": 0}]], "is not an operator, its arguments and its options"),
        (["relu.default", [{"value": 99}], {}], "argument"),
        (["relu.default", [{"value": -1}], {}], "argument"),
        (["relu.default", [{"value": True}], {}], "argument"),
        (["relu.default", [{"dtype": "os"}], {}], "argument"),
        (["relu.default", [{"device": "cuda"}], {}], "argument"),
        (["relu.default", [[[[[[1]]]]]], {}], "argument"),
        (["relu.default", ["__import__('os')"], {}], "argument"),
        (["relu.default", [1 << 70], {}], "argument"),
        (["relu.default", [float("inf")], {}], "argument"),
        (["relu.default", [{"value": 0}], {"out": {"value": 0}}], "an option that no program has"),
        (["relu.default", [], {}], "cannot compute"),
        (["conv2d.default", [{"value": 0}, {"value": 0}], {}], "cannot compute"),
        (["constant_pad_nd.default", [{"value": 0}, [0, 1 << 40]], {}], "cannot compute"),
        (["constant_pad_nd.default", [{"value": 0}, [0, 1 << 61]], {}], "cannot compute"),
        (["integer_mul", [[0], 1 << 40], {}], "sizes are integers"),
        (["integer_mul", [1 << 40, 1 << 40], {}], "sizes are integers"),
        (["integer_floordiv", [1, 0], {}], "cannot compute"),
        (["getitem", [[1], 5], {}], "cannot compute"),
        (["getitem", [{"value": 0}, 0], {}], "several results"),
    ],
)
def test_a_call_that_no_program_has_is_refused(call, words, bundle):
    path = bundle / "bodies.json"
    document = json.loads(path.read_bytes()) | {"calls": [call, CODES_OUT]}
    path.write_text(json.dumps(document | {"output": document["tensors"] + 2}))
    refused(bundle, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "not a program of version 1"),
        ({"format": "torch"}, "not a program of version 1"),
        ({"tensors": 3}, "calls|tensors"),
        ({"tensors": -1}, "tensors is not a number"),
        ({"tensors": True}, "tensors is not a number"),
        ({"tensors": 1 << 40}, "tensors is not a number"),
        ({"calls": []}, "calls is not a list"),
        ({"calls": {}}, "calls is not a list"),
        ({"output": 1 << 20}, "output is no value"),
        ({"output": None}, "output is no value"),
        ({"output": 1}, "cannot compute"),
    ],
)
def test_a_program_out_of_form_is_refused(change, words, bundle):
    path = bundle / "bodies.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    refused(bundle, words)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"[" * 100_000, b"null", b"\xff\xfe", b'"text"'])
def test_what_is_no_json_is_refused(content, bundle):
    (bundle / "bodies.json").write_bytes(content)
    refused(bundle, "no program|not a program")


def test_a_program_without_end_is_not_read(bundle, monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAM_BYTES", 1000)
    refused(bundle, "larger than 1000 bytes")


def tensors_in(bundle):
    return safetensors.torch.load_file(bundle / "bodies.safetensors")


@pytest.mark.parametrize(
    "changed",
    [
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "t0"},
        lambda tensors: tensors | {"more": tensors["t0"].clone()},
        lambda tensors: tensors | {"t0": tensors["t0"][:2].contiguous()},
        lambda tensors: tensors | {"t0": torch.zeros(())},
        lambda tensors: tensors | {"t0": tensors["t0"].flatten(1)},
        lambda tensors: tensors | {"t0": tensors["t0"].to(torch.int64)},
    ],
)
def test_tensors_that_are_not_the_programs_are_refused(changed, bundle):
    safetensors.torch.save_file(changed(tensors_in(bundle)), bundle / "bodies.safetensors")
    refused(bundle, "tensors of 3 nets|cannot compute")


class Touching:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive of torch.export with a pickle inside, and the file that unpickling it makes."""
    folder = tmp_path_factory.mktemp("archive")
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2, 3),)), folder / "good.pt2")
    marker, hostile = folder / "unpickled", folder / "hostile.pt2"
    with zipfile.ZipFile(folder / "good.pt2") as good, zipfile.ZipFile(hostile, "w") as written:
        for name in good.namelist():
            content = pickle.dumps(Touching(marker)) if "sample_inputs" in name else good.read(name)
            written.writestr(name, content)
    return hostile, marker


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_archive_runs_what_is_pickled_in_it(archive):
    # Why a program is no such archive. Should this fail one day, torch has become safer.
    hostile, marker = archive
    with pytest.raises(RuntimeError, match="deserializing"):
        torch.export.load(hostile)
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("name", ["bodies.json", "bodies.safetensors"])
def test_an_archive_in_a_files_place_is_refused_and_not_unpickled(name, bundle, archive):
    hostile, marker = archive
    for content in (hostile.read_bytes(), pickle.dumps(Touching(marker))):
        (bundle / name).write_bytes(content)
        refused(bundle, "is no program|does not hold tensors")
    assert not marker.exists()


# --- the stacked computation ---


@pytest.mark.parametrize("rows", [1, 21])
def test_stacked_and_separate_nets_answer_alike(rows, tiny, codes):
    engines = [TorchEngine(tiny.server_torch, threads=1, stacked=stacked) for stacked in (False, True)]
    separate, stacked = (engine.run(codes[:rows]).astype(int) for engine in engines)
    np.testing.assert_allclose(stacked, separate, rtol=0, atol=1)
    assert ["separate" in engine.describe() for engine in engines] == [True, False]


def test_a_batch_is_divided_where_there_are_more_threads_than_nets(tiny, codes, answers_in_float):
    engine = TorchEngine(tiny.server_torch, threads=5)
    for rows in (1, 3, 21):
        np.testing.assert_allclose(engine.run(codes[:rows]).astype(int), answers_in_float[:rows], rtol=0, atol=1)
    engine.close()


def test_in_bf16_the_codecs_stay_exact_and_the_answers_close(tiny, codes, answers_in_float):
    # The arithmetic of a GPU, on the CPU: what is cast, and what it costs.
    program, tensors = programs.opened(tiny.server_torch, load_server(tiny.server_torch), safetensors.torch.load)
    weights = lowered(program, tensors)
    dtypes = [tensor.dtype for tensor in weights]
    assert dtypes[-2:] == [torch.float32] * 2  # scale and zero point
    assert torch.bfloat16 in dtypes
    compute = stacked_run(programs.bind(program, torch, low=torch.bfloat16), weights)
    with torch.inference_mode():
        found = compute(torch.tensor(codes)).numpy()
    wire = load_server(tiny.server_torch).wire
    signal = np.stack([c.decode(answers_in_float[:, i]) for i, c in enumerate(wire.answer_codecs)], axis=1)
    error = np.stack([c.decode(found[:, i]) for i, c in enumerate(wire.answer_codecs)], axis=1) - signal
    assert found.shape == answers_in_float.shape
    assert (found != answers_in_float).any()  # it was bf16
    assert 10 * np.log10(np.square(signal).sum() / np.square(error).sum()) > 35
