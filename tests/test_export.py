"""What leaves the export pipeline: who gets what, what nobody gets, and when nothing leaves at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ensembler.cli import main
from ensembler.cli.export import new_keys
from ensembler.client import EdgeClient
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.export import parity
from ensembler.export.parity import Gates
from ensembler.export.pipeline import ExportOptions, export
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import (
    BundleError,
    BundleMismatchError,
    ConfigError,
    DataError,
    ExportError,
    GateFailedError,
)
from ensembler.protocol.integers import sum_exactly
from ensembler.protocol.manifest import MANIFEST_NAME, load_client, load_server
from ensembler.protocol.messages import INFER, RESULT, decode
from ensembler.training import data as data_sets
from ensembler.training.fit import derived_seed
from ensembler.training.fixing import mixed_features
from ensembler.training.models import normalise
from ensembler.training.runs import RunFolder
from ensembler.training.stage1 import load_stage1
from ensembler.training.stages import load_bodies, train
from ensembler.training.stages import load_client as load_trained
from ensembler.transport.inprocess import InProcessTransport
from ensembler.transport.keys import load_public

OPEN = Gates(min_sqnr_db=0.0, max_accuracy_drop_points=100.0)
OUT_OF_REACH_OF_INT8 = Gates(min_sqnr_db=70.0, max_accuracy_drop_points=100.0)


def exported(run, out, **options):
    return export(run, out, ExportOptions(**{"gates": OPEN, **options}))


def files(folder):
    """Returns {relative path: content} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def report_of(out):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads((out / "parity.json").read_text(encoding="utf-8"), parse_constant=refuse)


def graphs_in(folder):
    return {path.name: onnx.load(path) for path in sorted(folder.glob("*.onnx"))}


def initialisers(folder):
    """Yields (file, array) of every constant in a bundle's graphs."""
    for name, model in graphs_in(folder).items():
        for initialiser in model.graph.initializer:
            yield name, numpy_helper.to_array(initialiser)


# --- the runs and bundles that the tests share ---


@pytest.fixture(scope="module", autouse=True)
def _own_nets():
    """``--arch own_nets:NAME`` finds tests/own_nets.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def second_run(tiny, tmp_path_factory):
    """Another client of the tiny run's stage 1: another selector, fresh noise. Its data has moved since."""
    config = dataclasses.replace(RunFolder.open(tiny.run).config, noise_mode="fresh")
    first = RunFolder.open(tiny.run).read_secret().selector
    selector = first
    while selector == first:
        run = tmp_path_factory.mktemp("second") / "run"
        train(config, run, stage1_from=tiny.run)
        selector = RunFolder.open(run).read_secret().selector
    document = json.loads((run / "config.json").read_text(encoding="utf-8"))
    document["config"]["data"] = "npz:/nowhere/train.npz,/nowhere/test.npz"
    (run / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def second(second_run, tiny, tmp_path_factory):
    """Both bundles of the second client, exported on their own, with the data's new place."""
    out = tmp_path_factory.mktemp("second-out")
    exported(second_run, out, data=tiny.data)
    return out


@pytest.fixture(scope="module")
def in_float(tiny, tmp_path_factory):
    """Both bundles of the tiny run in float32, and the report. The bodies are because int8 misses the gate."""
    out = tmp_path_factory.mktemp("float")
    report = exported(tiny.run, out, client_precision="float32", server_precision="auto", gates=OUT_OF_REACH_OF_INT8)
    return out, report


@pytest.fixture(scope="module")
def baselines(tiny, tmp_path_factory):
    """{defense: the folder of its run and bundles}; one net, so only these two in float32."""
    found = {}
    for defense in ("single", "none"):
        folder = found[defense] = tmp_path_factory.mktemp(defense)
        config = dataclasses.replace(RunFolder.open(tiny.run).config, defense=defense, epochs_stage1=1)
        train(config, folder / "run")
        exported(folder / "run", folder / "out", client_precision="float32", server_precision="float32")
    return found


# --- what the server gets does not depend on the selector ---


def test_two_selectors_give_the_same_server_bundle_byte_for_byte(tiny, second, second_run):
    selectors = [RunFolder.open(run).read_secret().selector for run in (tiny.run, second_run)]
    assert selectors[0] != selectors[1]
    assert files(second / "server") == files(tiny.server)
    assert files(second / "client") != files(tiny.client)


@pytest.mark.slow
def test_two_selectors_give_the_same_torch_bundle_byte_for_byte(tiny, second_run, tmp_path):
    exported(second_run, tmp_path, data=tiny.data, server_format="torch")
    assert files(tmp_path / "server") == files(tiny.server_torch)


def test_two_selectors_see_the_same_parity_of_the_bodies(tiny, second):
    # Whether a server bundle passes its gate must not depend on whom it is exported for.
    rows = [
        {row["stage"]: (row["sqnr_db"], row["max_error"]) for row in report_of(out)["stages"]}
        for out in (tiny.out, second)
    ]
    for stage in ("body 0", "body 1", "body 2", "bodies"):
        assert rows[0][stage] == rows[1][stage]
    assert rows[0]["bodies, client"] != rows[1]["bodies, client"]


def test_the_server_bundle_holds_the_bodies_and_a_manifest_of_known_fields_only(tiny):
    assert sorted(files(tiny.server)) == ["body_00.onnx", "body_01.onnx", "body_02.onnx", MANIFEST_NAME]
    document = json.loads((tiny.server / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert sorted(document) == ["bodies", "files", "format", "kind", "precision", "version", "wire"]
    wire = ["answer_codecs", "answer_width", "bodies_id", "feature_codec", "feature_shape"]
    assert sorted(document["wire"]) == wire


def test_bodies_differ_in_nothing_but_their_weights(tiny):
    bodies = list(graphs_in(tiny.server).values())
    for model in bodies:
        for initialiser in model.graph.initializer:
            for field in ("raw_data", "float_data", "int32_data", "int64_data"):
                initialiser.ClearField(field)
    assert len(bodies) == 3
    assert all(model == bodies[0] for model in bodies)


def test_two_clients_of_one_stage_1_look_alike_on_the_wire(tiny, second, tiny_images):
    clients = [EdgeRuntime(folder / "client") for folder in (tiny.out, second)]
    assert clients[0].manifest.wire == clients[1].manifest.wire
    assert clients[0].encode(tiny_images).shape == clients[1].encode(tiny_images).shape


def test_two_selectors_give_messages_of_equal_number_order_and_size(tiny, second, tiny_images, gate):
    def messages(bundle):
        """Returns direction, operation and frame sizes of each message, as the server sees them."""
        seen = []

        def handler(frames):
            replies = gate(frames)
            for direction, each in (("up", frames), *(("down", reply) for reply in replies)):
                seen.append((direction, decode(each).operation, [len(frame) for frame in each]))
            return replies

        with EdgeClient(bundle, "in-process", transport=InProcessTransport(handler)) as client:
            client.predict(tiny_images[0])
            client.predict_batch(list(tiny_images[:5]))
        return seen

    first = messages(tiny.client)
    assert [(direction, operation) for direction, operation, _ in first] == [("up", INFER), ("down", RESULT)] * 2
    assert messages(second / "client") == first


# --- secrets have one place ---

WINDOW, SHORTEST = 16, 12  # bytes; three floats are the tail's bias


class Haystack:
    """Searches bytes for any 16 consecutive bytes of a tensor (or all of a shorter one), at every offset."""

    def __init__(self, data):
        self.data = data
        words = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
        self.words = np.unique(np.ascontiguousarray(words).view(np.uint64))

    def holds(self, tensor):
        """Whether the data holds a part of ``tensor``, little-endian; runs of one value do not count."""
        raw, step = np.ascontiguousarray(tensor).tobytes(), tensor.itemsize
        width = min(WINDOW, len(raw))
        if width < SHORTEST:
            return False
        for start in range(0, len(raw) - width + 1, step):
            window = raw[start : start + width]
            first = np.frombuffer(window[:8], np.uint64)[0]
            position = np.searchsorted(self.words, first)
            if position == len(self.words) or self.words[position] != first:
                continue
            if window != window[:step] * (width // step) and window in self.data:
                return True
        return False


def trained_secrets(run):
    """Yields (name, array) of what stays with the client: stage 3, and every stage-1 head, tail and noise."""
    for name, tensor in run.load_tensors(run.CLIENT_FILE).items():
        yield f"client {name}", tensor.numpy()
    for index in range(run.config.trained_nets):
        for name, tensor in run.load_tensors(run.stage1_file(index)).items():
            if not name.startswith("body."):
                yield f"net {index} {name}", tensor.numpy()


def bundle_bytes(folder):
    """The bytes of all files, and those of all constants as arrays, however protobuf packs them."""
    arrays = (np.ascontiguousarray(array).tobytes() for _, array in initialisers(folder))
    return b"\0".join([*files(folder).values(), *arrays])


@pytest.fixture(scope="module")
def server_haystacks(tiny, in_float):
    return {"int8": Haystack(bundle_bytes(tiny.server)), "float32": Haystack(bundle_bytes(in_float[0] / "server"))}


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_no_secret_tensor_is_in_the_server_bundle(precision, server_haystacks, tiny):
    haystack = server_haystacks[precision]
    tensors = {n: t for n, t in trained_secrets(RunFolder.open(tiny.run)) if t.dtype == np.float32}
    assert {"client head.stem.conv.weight", "client tail.fc.weight", "client noise", "net 2 noise"} <= tensors.keys()
    assert min(tensor.nbytes for tensor in tensors.values()) >= SHORTEST
    assert [name for name, tensor in tensors.items() if haystack.holds(tensor)] == []


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_nothing_of_the_clients_graphs_is_in_the_server_bundle(precision, server_haystacks, tiny, in_float):
    # This is the form in which head, noise and tail ship: folded and quantised.
    haystack = server_haystacks[precision]
    for client in (tiny.client, in_float[0] / "client"):
        constants = list(initialisers(client))
        assert len(constants) > 8
        assert [(name, array.shape) for name, array in constants if haystack.holds(array)] == []


def test_the_server_bundle_has_no_constant_of_a_heads_or_tails_shape(tiny, in_float):
    secret = {array.shape for folder in (tiny.client, in_float[0] / "client") for _, array in initialisers(folder)}
    secret |= {tensor.shape for _, tensor in trained_secrets(RunFolder.open(tiny.run))}
    for folder in (tiny.server, in_float[0] / "server"):
        shapes = {array.shape for _, array in initialisers(folder)}
        assert {shape for shape in shapes & secret if len(shape) > 1} == set()


def test_the_search_finds_what_is_there(server_haystacks, tiny, in_float):
    # The control: a body's first convolution with its batch norm folded in, and the noise in the float head.
    body = load_bodies(RunFolder.open(tiny.run))[1].get_submodule("layer1.0")
    norm = body.bn1
    folded, _ = fuse_conv_bn_weights(
        body.conv1.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    assert server_haystacks["float32"].holds(folded.detach().numpy())
    client = load_trained(RunFolder.open(tiny.run))
    head, tail = (Haystack((in_float[0] / "client" / name).read_bytes()) for name in ("head.onnx", "tail.onnx"))
    assert head.holds(client.noise.numpy())
    assert tail.holds(client.tail.fc.weight.detach().numpy())
    assert tail.holds(client.tail.fc.bias.detach().numpy())
    assert not tail.holds(client.noise.numpy())


def test_no_seed_and_no_selector_is_in_the_server_bundle(tiny, in_float):
    run = RunFolder.open(tiny.run)
    secret, config = run.read_secret(), run.config
    seeds = {secret.seed, *(derived_seed(secret.seed, 3, part) for part in range(3))}
    seeds |= {derived_seed(config.seed, 1, net, part) for net in range(config.num_nets) for part in range(3)}
    for folder in (tiny.server, in_float[0] / "server"):
        data = bundle_bytes(folder)
        for seed in seeds:
            for form in (str(seed).encode(), seed.to_bytes(8, "little"), seed.to_bytes(8, "big"), f"{seed:x}".encode()):
                assert form not in data
        whole = [array.tolist() for _, array in initialisers(folder) if array.dtype == np.int64]
        assert list(secret.selector) not in whole
        assert b"select" not in data


def test_the_selector_is_in_the_clients_tail(tiny):
    # So the test above looks for it in the form in which it ships.
    selector = list(RunFolder.open(tiny.run).read_secret().selector)
    assert selector in [array.tolist() for _, array in initialisers(tiny.client) if array.dtype == np.int64]


def test_only_the_owner_can_read_the_client_bundle_and_the_report(tiny):
    def mode(path):
        return path.stat().st_mode & 0o777

    assert mode(tiny.client) == 0o700
    assert {mode(path) for path in tiny.client.iterdir()} == {0o600}
    assert mode(tiny.out / "parity.json") == 0o600
    assert mode(tiny.server) == 0o755


def test_nothing_else_is_left_beside_the_bundles(tiny, second):
    assert sorted(path.name for path in tiny.out.iterdir()) == ["client", "keys", "parity.json", "server"]
    assert sorted(path.name for path in second.iterdir()) == ["client", "parity.json", "server"]
    assert sorted(files(tiny.client)) == ["head.onnx", MANIFEST_NAME, "tail.onnx"]


# --- artifacts say nothing of the machine or of the training code ---


def texts(message):
    """Yields (field, text) for every string in a protobuf message, however deep; weights are no text."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        for item in values:
            if field.type == field.TYPE_MESSAGE:
                yield from texts(item)
            elif field.type == field.TYPE_STRING and item:
                yield field.name, item
            elif field.type == field.TYPE_BYTES and item and field.name != "raw_data":
                yield field.name, item.decode("utf-8", "replace")


def test_the_search_for_texts_goes_as_deep_as_there_is_text():
    inner = helper.make_graph([helper.make_node("Relu", ["a"], ["b"], name="deep", doc_string="doc")], "g", [], [])
    node = helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner, text="attribute")
    node.metadata_props.add(key="path", value="/home/somebody")
    found = set(texts(helper.make_model(helper.make_graph([node], "g", [], []))))
    assert {
        ("name", "deep"),
        ("doc_string", "doc"),
        ("s", "attribute"),
        ("key", "path"),
        ("value", "/home/somebody"),
    } <= found


@pytest.fixture(scope="module")
def every_bundle(tiny, in_float, second, baselines):
    outs = {"int8": tiny.out, "float32": in_float[0], "fresh": second}
    return outs | {name: folder / "out" for name, folder in baselines.items()}


KINDS = ("int8", "float32", "fresh", "single", "none")
ENDS = {
    "head.onnx": ({"image", "noise"}, {"features"}),
    "tail.onnx": ({"answers"}, {"y"}),
    "body": ({"features"}, {"answer"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_in_a_graph_is_a_number_or_a_word_of_onnx(kind, every_bundle):
    operators = {schema.name for schema in onnx.defs.get_all_schemas()}
    attributes = {name for schema in onnx.defs.get_all_schemas() for name in schema.attributes}
    models = [item for part in ("client", "server") for item in graphs_in(every_bundle[kind] / part).items()]
    assert len(models) >= 2
    for name, model in models:
        inputs, outputs = ENDS[name] if name in ENDS else ENDS["body"]
        assert {value.name for value in model.graph.input} <= inputs
        assert {value.name for value in model.graph.output} == outputs
        found = list(texts(model))
        assert {field for field, _ in found} & {"doc_string", "metadata_props", "key", "value"} == set()
        words = {"ensembler", "graph", "batch", "NOTSET", *inputs, *outputs, *operators, *attributes}
        assert {text for _, text in found if not re.fullmatch(r"[tn]\d+", text)} <= words


@pytest.mark.parametrize("kind", KINDS)
def test_no_artifact_names_the_machine_or_the_training_code(kind, every_bundle, tmp_path_factory):
    account = pwd.getpwuid(os.getuid())
    places = [account.pw_dir + "/", os.environ["HOME"], str(Path(__file__).resolve().parent.parent), sys.prefix]
    places += [tempfile.gettempdir() + "/", str(tmp_path_factory.getbasetemp()), "site-packages", "Traceback", "/usr/"]
    out = every_bundle[kind]
    artifacts = {n: c for n, c in files(out).items() if n.split("/")[0] in ("client", "server", "parity.json")}
    assert len(artifacts) >= 4
    for name, content in artifacts.items():
        assert [place for place in places if len(place) > 3 and place.encode() in content] == [], name
        if name.endswith(".onnx"):
            text = "\n".join(text for _, text in texts(onnx.load_from_string(content)))
        else:
            text = content.decode("utf-8")
        words = ["torch", ".py", "conv1", "bn1", "weight", str(Path(sys.executable).parent)]
        words += [] if name == "parity.json" else ["onnxruntime"]  # that report tells of runtimes, and ships with none
        words += [account.pw_name] if len(account.pw_name) > 3 else []
        assert [word for word in words if word in text] == [], name


@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_is_valid_onnx_by_itself(kind, every_bundle):
    for part in ("client", "server"):
        for model in graphs_in(every_bundle[kind] / part).values():
            onnx.checker.check_model(model, full_check=True)
            assert not model.functions
            assert not any(i.external_data for i in model.graph.initializer)


# --- a client fits its server only ---


@pytest.mark.parametrize("gate", ["min_sqnr_db", "max_accuracy_drop_points"])
def test_a_gate_that_is_no_number_is_refused(gate):
    with pytest.raises(ConfigError, match="nan: give a number"):
        Gates(**{gate: float("nan")})


@pytest.mark.parametrize("form", ["file", "text"])
def test_a_client_can_be_made_for_a_server_that_runs_already(tiny, tmp_path, capsys, form):
    out = tmp_path / "out"
    gates = ("--min-sqnr-db", "0", "--max-accuracy-drop", "100")
    public = tiny.keys / "server.key"
    server = ("--server-bundle", tiny.server, "--server-key", public if form == "file" else load_public(public))
    assert main(command(tiny.run, out, *server, *gates, "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"client": str(out / "client"), "parity": str(out / "parity.json")}
    assert sorted(path.name for path in out.iterdir()) == ["client", "parity.json"]
    assert load_client(out / "client").wire == load_server(tiny.server).wire
    # The same run and key: the same client, byte for byte.
    assert files(out / "client") == files(tiny.client)


def test_a_server_bundle_of_another_run_is_refused(tiny, baselines, tmp_path):
    with pytest.raises(BundleMismatchError, match="holds other nets than the run"):
        exported(tiny.run, tmp_path / "out", server_bundles=(baselines["single"] / "out" / "server",))
    assert not (tmp_path / "out").exists()


def test_a_damaged_server_bundle_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.server, tmp_path / "server")
    (tmp_path / "server" / "body_01.onnx").unlink()
    with pytest.raises(BundleError, match=r"incomplete: body_01\.onnx is missing"):
        exported(tiny.run, tmp_path / "out", server_bundles=(tmp_path / "server",))
    with pytest.raises(BundleError, match="client bundle, a server bundle is needed"):
        exported(tiny.run, tmp_path / "out", server_bundles=(tiny.client,))


# --- when nothing is exported ---


def command(run, out, *arguments):
    return ["export", str(run), "--out", str(out), *map(str, arguments)]


FLOAT = ("--quantize", "none", "--server-precision", "float32")


def is_empty(folder):
    return not folder.exists() or not any(folder.iterdir())


def test_a_failed_gate_shows_the_table_and_leaves_neither_bundle_nor_keys(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(command(tiny.run, out, *FLOAT, "--max-accuracy-drop=-1000", "--json")) == 1
    assert files(out) == {"notes.txt": b"mine"}
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert error["type"] == "GateFailedError"
    for words in ("SQNR dB", "head", "body 0", "bodies", "tail", "on 96 held-out images", "accuracy drops by"):
        assert words in error["message"]
    assert "nothing was written" in error["message"]
    assert "--max-accuracy-drop" in error["message"]  # what to do


@pytest.mark.parametrize("name", ["client", "server", "keys"])
def test_what_is_already_there_is_refused_and_left_alone(name, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(tiny.out / name, out / name)
    before = files(out)
    assert main(command(tiny.run, out)) == 2
    assert files(out) == before
    assert sorted(path.name for path in out.iterdir()) == [name]
    assert f"{out / name} exists" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_refused(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("mine")
    assert main(command(tiny.run, out)) == 2
    assert main(command(tiny.run, out, "--plaintext")) == 2
    assert out.read_text() == "mine"
    assert str(out) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--parity-images", "0"), ("--server-bundle", "somewhere")])
def test_an_impossible_option_is_refused(arguments, tiny, tmp_path, capsys):
    assert main(command(tiny.run, tmp_path / "out", *arguments)) == 2
    assert not (tmp_path / "out").exists()
    assert arguments[0] in capsys.readouterr().err


@pytest.fixture
def copied_run(tiny, tmp_path):
    """A copy of the tiny run to break, of the client's secrets too."""
    return Path(shutil.copytree(tiny.run, tmp_path / "run"))


def test_an_unfinished_run_is_refused(copied_run, tmp_path, capsys):
    (copied_run / "summary.json").unlink()
    with pytest.raises(DataError, match="training was not finished"):
        exported(copied_run, tmp_path / "out")
    assert main(command(copied_run, tmp_path / "out")) == 2
    assert is_empty(tmp_path / "out")
    assert "training was not finished" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        exported(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["stage1/net_01.safetensors", "client/client.safetensors", "client/secret.json"])
def test_a_run_with_a_missing_part_is_refused(name, copied_run, tmp_path):
    (copied_run / name).unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        exported(copied_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_moved_is_named_and_may_be_given_anew(second_run, second, tmp_path):
    with pytest.raises(DataError, match=r"/nowhere/train\.npz"):
        exported(second_run, tmp_path / "out")
    assert report_of(second)["images"] == 96


@pytest.mark.parametrize("wrong", ["size", "labels"])
def test_other_data_than_the_runs_is_refused(wrong, tiny, tmp_path):
    for part, spec in zip(("train", "test"), tiny.data.removeprefix("npz:").split(","), strict=True):
        with np.load(spec) as stored:
            x, y, names = stored["x"], stored["y"], stored["label_names"]
        x = x[:, :, :8, :8] if wrong == "size" else x
        names = names[::-1] if wrong == "labels" else names
        np.savez(tmp_path / f"{part}.npz", x=x, y=y, label_names=names)
    data = f"npz:{tmp_path / 'train.npz'},{tmp_path / 'test.npz'}"
    with pytest.raises(DataError, match="trained on other images or classes"):
        exported(tiny.run, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        exported(tiny.run, tmp_path / "file" / "out")


def test_a_killed_export_leaves_nothing_that_loads(tiny, tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    arguments = [sys.executable, "-m", "ensembler.cli", *command(tiny.run, out, "--plaintext")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        line = process.stdout.readline()
        process.kill()
        process.communicate()
    assert line.startswith(b"server: body 1 of 3")
    assert process.returncode == -signal.SIGKILL
    for name in ("client", "server", "parity.json"):
        assert not (out / name).exists()
    for load, path in ((load_client, out / "client"), (load_server, out / "server")):
        with pytest.raises(BundleError, match="no bundle at"):
            load(path)
    # What is left is hidden and for its owner alone.
    assert all(path.name.startswith(".partial-") for path in out.iterdir())
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o700}


# --- the parity report ---


def test_the_report_has_every_stage_with_the_size_of_its_file(tiny):
    report = report_of(tiny.out)
    rows = {row["stage"]: row for row in report["stages"]}
    assert list(rows) == ["head", "body 0", "body 1", "body 2", "bodies", "bodies, client", "tail"]
    paths = {"head": tiny.client / "head.onnx", "tail": tiny.client / "tail.onnx"}
    paths |= {f"body {i}": tiny.server / f"body_{i:02d}.onnx" for i in range(3)}
    for stage, path in paths.items():
        assert rows[stage]["size_bytes"] == path.stat().st_size
        assert rows[stage]["batch1_ms"] > 0
    for stage in ("bodies", "bodies, client"):
        assert rows[stage]["size_bytes"] == sum(rows[f"body {i}"]["size_bytes"] for i in range(3))
        assert rows[stage]["batch1_ms"] is None
    assert report["min_stage_sqnr_db"] == min(rows[stage]["sqnr_db"] for stage in ("head", "bodies", "tail"))
    assert report["gates"] == {"min_sqnr_db": 0.0, "max_accuracy_drop_points": 100.0}
    assert report["accuracy_drop_points"] == (
        max(report["accuracy_float"], report["accuracy_wire"]) - report["accuracy_artifact"]
    )


def test_no_row_of_the_report_is_about_the_selected_bodies_alone(tiny, second):
    # Reports get pasted into issues: rows and sizes are the same for all selectors.
    first, other = report_of(tiny.out), report_of(second)
    assert first.keys() == other.keys()
    for a, b in zip(first["stages"], other["stages"], strict=True):
        assert a["stage"] == b["stage"]
        assert a["size_bytes"] == b["size_bytes"] or a["stage"] in ("head", "tail")


def answers_of(server, codes):
    """Runs the bodies of a server bundle one by one: ``(B, N, F)``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sum_exactly(options)
    names = load_server(server).bodies
    sessions = [ort.InferenceSession(str(server / n), options, providers=["CPUExecutionProvider"]) for n in names]
    return np.stack([session.run(None, {"features": codes})[0] for session in sessions], axis=1)


def logits_of(out, server, images):
    runtime = EdgeRuntime(out / "client")
    return runtime.finish(answers_of(server, runtime.encode(images)))


def held_out_classes(tiny):
    return data_sets.load(tiny.data).test_y


def test_the_reports_accuracy_is_that_of_the_bundles(tiny, tiny_images):
    logits = logits_of(tiny.out, tiny.server, tiny_images)
    report = report_of(tiny.out)
    assert report["images"] == 96
    assert report["accuracy_artifact"] == pytest.approx(100 * (logits.argmax(1) == held_out_classes(tiny)).mean())
    assert report["accuracy_artifact"] > 60  # three classes: 33 is chance


def test_the_bundles_answer_as_torch_does(tiny, in_float, tiny_images):
    run = RunFolder.open(tiny.run)
    client, bodies = load_trained(run), load_bodies(run)
    x = (torch.from_numpy(np.ascontiguousarray(tiny_images.transpose(0, 3, 1, 2))).float() - 128) / 64
    with torch.inference_mode():
        wanted = client.finish(client.head(x), [bodies[i] for i in client.selector]).numpy()
    found = logits_of(in_float[0], in_float[0] / "server", tiny_images)
    error = np.square(wanted - found).sum() / np.square(wanted).sum()
    assert error < 1e-4


def test_the_bodies_are_int8_where_that_reaches_the_gate_and_float_elsewhere(tiny, in_float):
    bodies = {row["stage"]: row["sqnr_db"] for row in report_of(tiny.out)["stages"]}["bodies"]
    assert OPEN.min_sqnr_db < bodies < OUT_OF_REACH_OF_INT8.min_sqnr_db
    assert load_server(tiny.server).precision == "int8"
    assert load_server(in_float[0] / "server").precision == "float32"


def test_float_bundles_lose_less_than_int8(tiny, in_float):
    report = in_float[1]
    rows = {row["stage"]: row for row in report_of(tiny.out)["stages"]}
    for stage in report.stages:
        assert stage.sqnr_db > rows[stage.stage]["sqnr_db"]
    assert report.min_stage_sqnr_db > 70
    assert load_client(in_float[0] / "client").precision == "float32"


def test_int8_bodies_are_a_third_of_the_float_ones(tiny, in_float):
    for name in load_server(tiny.server).bodies:
        assert 3 * (tiny.server / name).stat().st_size < (in_float[0] / "server" / name).stat().st_size


def test_a_lossless_stage_is_null_in_the_json(in_float):
    out, report = in_float
    rows = {row["stage"]: row["sqnr_db"] for row in report_of(out)["stages"]}
    for stage in report.stages:
        assert rows[stage.stage] == (stage.sqnr_db if np.isfinite(stage.sqnr_db) else None)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_the_report_is_json_whatever_was_measured(value, in_float):
    report = in_float[1]
    stages = tuple(dataclasses.replace(stage, sqnr_db=value) for stage in report.stages)
    text = dataclasses.replace(report, stages=stages, gates=Gates(min_sqnr_db=-np.inf)).to_json()
    document = json.loads(text, parse_constant=pytest.fail)
    assert document["min_stage_sqnr_db"] is None
    assert document["gates"]["min_sqnr_db"] is None


def measured(tiny, **replaced):
    """Runs the parity report on the tiny bundles, some of whose files are replaced."""
    run = RunFolder.open(tiny.run)
    manifest, servers = load_client(tiny.client), [(tiny.server, load_server(tiny.server))]
    with tempfile.TemporaryDirectory() as folder:
        bundles = []
        for name, bundle in (("client", tiny.client), ("server", tiny.server)):
            bundles.append(shutil.copytree(bundle, Path(folder) / name))
            for file, path in replaced.items():
                if (bundle / file.replace("_onnx", ".onnx")).exists():
                    shutil.copy(path, bundles[-1] / file.replace("_onnx", ".onnx"))
        servers = [(bundles[1], servers[0][1])]
        dataset, bodies = data_sets.load(tiny.data), load_bodies(run)
        features = mixed_features(load_stage1(run), manifest.wire.feature_codec, torch.from_numpy(dataset.test_x))
        stages = parity.measure_bodies(bodies, servers, features)
        images, labels = dataset.test_x, dataset.test_y
        return parity.measure(load_trained(run), bodies, (bundles[0], manifest), servers, images, labels, OPEN, stages)


def constant(source, target):
    """Copies a model so that it answers the same to everything, in the right shape and dtype."""
    model = onnx.load(source)
    output = model.graph.output[0]
    for node in model.graph.node:
        node.output[:] = ["before" if name == output.name else name for name in node.output]
    dtype = helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, dtype), "zero"))
    model.graph.node.append(helper.make_node("Mul", ["before", "zero"], [output.name]))
    onnx.save(model, target)
    return target


def test_the_report_can_be_measured_again(tiny):
    rows = {row["stage"]: row["sqnr_db"] for row in report_of(tiny.out)["stages"]}
    assert {stage.stage: stage.sqnr_db for stage in measured(tiny).stages} == rows


def test_an_artifact_that_answers_the_same_to_everything_fails_every_gate(tiny, tmp_path):
    report = measured(tiny, tail_onnx=constant(tiny.client / "tail.onnx", tmp_path / "tail.onnx"))
    assert report.min_stage_sqnr_db == -np.inf
    assert report.failures == ["tail: SQNR -inf dB is below 0 dB"]
    with pytest.raises(GateFailedError, match="tail: SQNR -inf dB"):
        report.require()
    without_limit = dataclasses.replace(report, gates=Gates(min_sqnr_db=-1000.0, max_accuracy_drop_points=100.0))
    with pytest.raises(GateFailedError):
        without_limit.require()


@pytest.mark.parametrize("position", range(3))
def test_one_dead_body_is_seen_whether_it_counts_or_not(position, tiny, tmp_path):
    name = f"body_{position:02d}.onnx"
    report = measured(tiny, **{name: constant(tiny.server / name, tmp_path / name)})
    rows = {stage.stage: stage.sqnr_db for stage in report.stages}
    assert rows[f"body {position}"] == -np.inf
    assert min(rows[f"body {i}"] for i in range(3) if i != position) > 0
    assert rows["bodies"] < Gates().min_sqnr_db


def test_an_artifact_that_is_constant_and_right_is_still_refused():
    tally = parity._Tally()
    same = np.full((4, 3), 0.5, np.float32)
    tally.add("tail", same, same)
    assert tally.sqnr("tail") == -np.inf


def test_sqnr_is_signal_over_error():
    tally = parity._Tally()
    reference = np.array([[3.0, 4.0]], np.float32)
    tally.add("head", reference, reference + np.array([[0.3, -0.4]], np.float32))
    assert tally.sqnr("head") == pytest.approx(20.0, abs=1e-4)
    assert tally.max_error["head"] == pytest.approx(0.4, abs=1e-6)
    tally.add("tail", reference, reference)
    assert tally.sqnr("tail") == np.inf
    tally.add("bodies", reference, np.array([[np.nan, 4.0]], np.float32))
    assert not tally.sqnr("bodies") >= -np.inf  # which fails any gate


# --- fewer bits on the wire ---


@pytest.fixture(scope="module")
def low_bits(tiny, tmp_path_factory):
    """A client of the tiny run's stage-1 nets, 3-bit features, 4-bit answers, the default SQNR gate: (out, report)."""
    folder = tmp_path_factory.mktemp("low-bits")
    config = dataclasses.replace(RunFolder.open(tiny.run).config, wire_bits=3, answer_bits=4)
    train(config, folder / "run", stage1_from=tiny.run)
    key = new_keys(folder / "keys")
    gates = Gates(max_accuracy_drop_points=100.0)
    report = exported(folder / "run", folder, gates=gates, server_public_keys=key, server_precision="int8")
    return folder, report


def test_codes_of_fewer_bits_stay_within_them_on_both_ways(low_bits, tiny_images):
    out, _ = low_bits
    codes = EdgeRuntime(out / "client").encode(tiny_images)
    assert 3 < codes.max() <= 7
    answers = answers_of(out / "server", codes)
    assert 7 < answers.max() <= 15


def test_few_bits_are_packed_on_a_real_connection_and_the_answer_is_the_same(low_bits, tiny_images, serve):
    out, _ = low_bits
    wire = load_server(out / "server").wire
    with (
        serve(out / "server", "--key", str(out / "keys" / "server.key_secret")) as (endpoint, _),
        EdgeClient(out / "client", endpoint, timeout_ms=60_000) as client,
    ):
        one = client.predict(tiny_images[0])
        batch = client.predict_batch(list(tiny_images))
    assert wire.bytes_up == math.prod(wire.feature_shape) * 3 // 8
    assert wire.bytes_down == wire.num_nets * wire.answer_width // 2
    assert 0 < one.bytes_up - wire.bytes_up < 200
    assert 0 < one.bytes_down - wire.bytes_down < 250
    np.testing.assert_allclose(
        [p.logits for p in batch], logits_of(out, out / "server", tiny_images), rtol=1e-5, atol=1e-5
    )


def test_the_gate_asks_of_few_bits_no_more_than_the_codec_itself_keeps(low_bits):
    rows = {stage.stage: stage for stage in low_bits[1].stages}
    for name in ("head", "bodies"):
        assert rows[name].wire_sqnr_db < 35
        assert rows[name].sqnr_db >= rows[name].wire_sqnr_db == rows[name].required_db(35.0)
    assert rows["tail"].wire_sqnr_db == np.inf


def test_a_client_of_another_width_does_not_fit_the_first_ones_server(low_bits, tiny):
    assert load_server(low_bits[0] / "server").wire.bodies_id != load_server(tiny.server).wire.bodies_id


def test_with_8_bits_the_gate_is_the_one_that_was_asked_for(tiny):
    for row in report_of(tiny.out)["stages"]:
        assert row["wire_sqnr_db"] is None


# --- own nets ---


@pytest.fixture(scope="module")
def own(tiny, tmp_path_factory):
    """A user's own net, cut behind its shortcut, with a bottleneck of 4 channels in 4 bits: (out, report)."""
    folder = tmp_path_factory.mktemp("own")
    config = dataclasses.replace(
        RunFolder.open(tiny.run).config,
        arch="own_nets:skipping",
        head_end="add",
        tail_start="gelu",
        bottleneck=(4, 2, 4),
        num_nets=2,
        num_selected=2,
        epochs_stage1=1,
        epochs_stage3=1,
    )
    train(config, folder / "run")
    report = exported(folder / "run", folder, server_precision="int8")
    return folder, report


def test_an_own_net_with_a_bottleneck_goes_all_the_way(own, tiny, tiny_images):
    out, report = own
    wire = load_server(out / "server").wire
    assert wire.feature_shape == (4, 4, 4)
    assert wire.bytes_up == 32
    logits = logits_of(out, out / "server", tiny_images)
    assert report.accuracy_artifact == pytest.approx(100 * (logits.argmax(1) == held_out_classes(tiny)).mean())
    assert report.top1_agreement > 90


def test_the_float_reference_of_a_net_with_a_bottleneck_has_its_quantiser(own, tiny):
    run = RunFolder.open(own[0] / "run")
    client, bodies = load_trained(run), load_bodies(run)
    client.wire = dataclasses.replace(client.wire, feature_codec=AffineCodec(scale=1000.0, zero_point=8, bits=4))
    x = normalise(torch.from_numpy(data_sets.load(tiny.data).test_x[:8]))
    logits = client.finish(client.head(x), [bodies[k] for k in client.selector], through_wire=False)
    assert torch.equal(logits, logits[:1].expand_as(logits))  # such codes say nothing
    plain, bodies = load_trained(RunFolder.open(tiny.run)), load_bodies(RunFolder.open(tiny.run))
    plain.wire = dataclasses.replace(plain.wire, feature_codec=AffineCodec(scale=1000.0, zero_point=0, bits=8))
    logits = plain.finish(plain.head(x), [bodies[k] for k in plain.selector], through_wire=False)
    assert not torch.equal(logits, logits[:1].expand_as(logits))


def test_the_bottlenecks_codec_is_the_wires(own):
    config = RunFolder.open(own[0] / "run").config
    assert load_server(own[0] / "server").wire.feature_codec == config.squeezed.codec


@pytest.mark.parametrize(("bits", "options"), [(2, {}), (1, {"noise_mode": "fresh", "noise_std": 0.3})])
def test_an_encoder_before_few_codes_goes_all_the_way(bits, options, tiny, tiny_images, tmp_path):
    config = dataclasses.replace(
        RunFolder.open(tiny.run).config,
        bottleneck=(16, 1, bits),
        encoder=(24,),
        information_weight=0.05,
        num_nets=2,
        num_selected=1,
        **({"noise_std": 0.0} | options),
    )
    train(config, tmp_path / "run")
    report = exported(tmp_path / "run", tmp_path)
    wire = load_server(tmp_path / "server").wire
    assert (wire.feature_shape, wire.bytes_up) == ((16, 4, 4), 16 * 16 * bits // 8)
    logits = logits_of(tmp_path, tmp_path / "server", tiny_images)
    right = 100 * (logits.argmax(1) == held_out_classes(tiny)).mean()
    assert report.accuracy_artifact == pytest.approx(right, abs=1e-9 if bits == 2 else 10)


# --- noise and baselines ---


def test_the_noise_is_added_in_float_so_that_every_processor_rounds_alike(tiny):
    """Seen on emulated boards: with integer addition a few codes were other ones on ARM."""
    graph = onnx.load(tiny.client / "head.onnx").graph
    (add,) = [node for node in graph.node if node.op_type == "Add"]
    producers = {output: node.op_type for node in graph.node for output in node.output}
    floats = {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.FLOAT}
    assert [producers.get(name) for name in add.input if name not in floats] == ["DequantizeLinear"]
    assert len(floats.intersection(add.input)) == 1


def test_fresh_noise_is_an_input_of_the_head(tiny, second):
    models = graphs_in(second / "client")
    inputs = {name: [value.name for value in model.graph.input] for name, model in models.items()}
    assert inputs == {"head.onnx": ["image", "noise"], "tail.onnx": ["answers"]}
    assert load_client(second / "client").noise_mode == "fresh"
    assert [value.name for value in graphs_in(tiny.client)["head.onnx"].graph.input] == ["image"]
    assert load_client(tiny.client).noise_mode == "fixed"


def test_fresh_noise_differs_for_every_image_and_the_class_stays(tiny, second, tiny_images):
    runtime = EdgeRuntime(second / "client")
    first, again = runtime.encode(tiny_images), runtime.encode(tiny_images)
    assert (first != again).mean() > 0.2
    twice = runtime.encode(np.stack([tiny_images[0], tiny_images[0]]))
    assert not np.array_equal(twice[0], twice[1])
    classes = held_out_classes(tiny)
    for codes in (first, again):
        assert (runtime.finish(answers_of(tiny.server, codes)).argmax(1) == classes).mean() > 0.6
    assert report_of(second)["accuracy_artifact"] > 60


def test_fresh_noise_has_the_deviation_of_the_run(second, tiny_images):
    # One image many times: the codes scatter with the noise's deviation, where they are not clipped.
    runtime = EdgeRuntime(second / "client")
    codec, std = runtime.manifest.wire.feature_codec, runtime.manifest.noise_std
    codes = runtime.encode(np.repeat(tiny_images[:1], 400, axis=0))
    inside = ((codes > 0) & (codes < 255)).all(0)
    assert inside.mean() > 0.2
    found = codec.decode(codes)[:, inside].std(0)
    rounding = codec.scale**2 / 12
    assert np.sqrt(np.square(found).mean() - rounding) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(("defense", "mode", "std"), [("single", "fixed", 0.1), ("none", "none", 0.0)])
def test_a_baseline_exports_one_net_that_works(defense, mode, std, baselines, tiny, tiny_images):
    out = baselines[defense] / "out"
    manifest = load_client(out / "client")
    assert (manifest.noise_mode, manifest.noise_std) == (mode, std)
    assert manifest.wire.num_nets == 1
    assert load_server(out / "server").bodies == ("body_00.onnx",)
    hits = logits_of(out, out / "server", tiny_images).argmax(1) == held_out_classes(tiny)
    assert report_of(out)["accuracy_artifact"] == 100 * hits.mean()
    # The head sends what the trained net's head computes with the run's noise, and nothing else.
    net = load_stage1(RunFolder.open(baselines[defense] / "run"))[0]
    x = (torch.from_numpy(np.ascontiguousarray(tiny_images.transpose(0, 3, 1, 2))).float() - 128) / 64
    with torch.inference_mode():
        features = net.net.head(x) + net.noise
    codec = manifest.wire.feature_codec
    difference = np.abs(codec.encode(features.numpy()).astype(int) - EdgeRuntime(out / "client").encode(tiny_images))
    assert difference.max() <= 1
    assert (net.noise == 0).all() == (defense == "none")


OTHER_CLIENTS = {
    "one of several learned tensors, and dropout": (
        {"noise": "learned", "noise_mode": "fresh", "dropout": 0.3},
        ("drawn", "gaussian", 8, 0.3),
        ["image", "which", "keep"],
    ),
    "fresh uniform noise, N nets behind one head": (
        {"defense": "joint", "noise": "uniform", "noise_mode": "fresh"},
        ("fresh", "uniform", 0, 0.0),
        ["image", "noise"],
    ),
}


def largest_weight(server):
    """Returns the largest of all int8 weights of a server bundle, as a magnitude."""
    found = [numpy_helper.to_array(each) for graph in graphs_in(server).values() for each in graph.graph.initializer]
    return max(int(np.abs(each.astype(int)).max()) for each in found if each.dtype == np.int8 and each.ndim > 1)


def test_bodies_with_weights_of_7_bits_cannot_saturate_and_serve_the_same_clients(tiny, tmp_path):
    exported(tiny.run, tmp_path / "out", server_precision="int8", server_weight_bits=7)
    narrow, whole = load_server(tmp_path / "out" / "server"), load_server(tiny.server)
    assert narrow.precision == "int8"
    assert narrow.wire.bodies_id == whole.wire.bodies_id
    assert largest_weight(tmp_path / "out" / "server") <= 64
    assert largest_weight(tiny.server) > 64


@pytest.mark.parametrize(
    "options", [{"server_format": "torch"}, {"server_precision": "float32"}, {"server_bundles": (Path("server"),)}]
)
def test_weights_of_7_bits_are_of_int8_bodies_that_are_made_now(tiny, tmp_path, options):
    with pytest.raises(ConfigError, match="--server-weight-bits 7 is of int8 bodies that are made now"):
        exported(tiny.run, tmp_path / "out", server_weight_bits=7, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", OTHER_CLIENTS)
def test_what_a_client_does_to_its_features_goes_all_the_way(kind, tiny, tiny_images, tmp_path):
    changes, told, inputs = OTHER_CLIENTS[kind]
    run, out = tmp_path / "run", tmp_path / "out"
    config = dataclasses.replace(RunFolder.open(tiny.run).config, epochs_stage3=1, **{"defense": "single"} | changes)
    train(config, run)
    exported(run, out, server_precision="float32")
    manifest = load_client(out / "client")
    assert (manifest.noise_mode, manifest.noise_law, manifest.noise_tensors, manifest.dropout) == told
    assert [value.name for value in graphs_in(out / "client")["head.onnx"].graph.input] == inputs
    head = next(stage for stage in report_of(out)["stages"] if stage["stage"] == "head")
    assert head["sqnr_db"] > 35
    runtime = EdgeRuntime(out / "client")
    codes, again = runtime.encode(tiny_images), runtime.encode(tiny_images)
    assert (codes != again).mean() > 0.2
    codec = manifest.wire.feature_codec
    client = load_trained(RunFolder.open(run))
    with torch.inference_mode():
        features = client.head((torch.from_numpy(tiny_images.transpose(0, 3, 1, 2).copy()).float() - 128) / 64)
    dropped = codes == codec.zero_point
    assert dropped.mean() >= 0.95 * manifest.dropout
    if manifest.noise_mode == "drawn":
        # Every image has one of the tensors, and not all the same one.
        possible = codec.encode((features[:, None] + client.noise).numpy())  # (B, 8, C, h, w)
        off = np.where(dropped[:, None], 0, np.abs(possible.astype(int) - codes[:, None]))
        which = off.mean((2, 3, 4)).argmin(1)
        assert len(set(which)) > 1
        assert np.quantile(off[np.arange(len(which)), which], 0.99) <= 2  # int8 clips a few
    else:
        noise = codec.decode(codes) - features.numpy()
        inside = (codes > 0) & (codes < codec.code_max)
        assert np.quantile(np.abs(noise[inside]), 0.99) <= manifest.noise_std * 3**0.5 + 2 * codec.scale
    classes = held_out_classes(tiny)
    assert (logits_of(out, out / "server", tiny_images).argmax(1) == classes).mean() > 0.6


DAMAGED = {
    "config.json": [
        ("config", []),
        ("config", None),
        ("image_size", [32]),
        ("image_size", None),
        ("image_size", ["a", "b"]),
        ("labels", 5),
    ],
    "wire.json": [
        ("order", [0, 7, 1]),
        ("order", [0, 0, 1]),
        ("order", ["a", "b", "c"]),
        ("answer_codecs", []),
        ("feature_shape", "ab"),
        ("answer_width", None),
    ],
    "client/secret.json": [("selector", [0, 99]), ("selector", ["a"]), ("selector", [0, 0]), ("seed", "x")],
}


@pytest.mark.parametrize(
    ("name", "field", "value"), [(name, field, value) for name, cases in DAMAGED.items() for field, value in cases]
)
def test_a_damaged_file_of_a_run_is_refused_by_name(name, field, value, copied_run, tmp_path):
    document = json.loads((copied_run / name).read_text(encoding="utf-8"))
    (copied_run / name).write_text(json.dumps(document | {field: value}), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(name)):
        exported(copied_run, tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "value"), [("noise_std", 10**400), ("bottleneck", [8.5, 2, 2]), ("arch", 5), ("arch", [])]
)
def test_a_damaged_option_of_a_run_is_refused(option, value, copied_run, tmp_path):
    document = json.loads((copied_run / "config.json").read_text(encoding="utf-8"))
    document["config"][option] = value
    (copied_run / "config.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=r"config\.json"):
        exported(copied_run, tmp_path / "out")


def test_temporary_files_of_an_export_lie_in_its_own_folder(tiny, tmp_path, monkeypatch):
    elsewhere = tmp_path / "system"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    seen = []
    original = tempfile.mkdtemp

    def spy(*arguments, **options):
        seen.append(original(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", spy)
    exported(tiny.run, tmp_path / "out", server_bundles=(tiny.server,))
    inside = [path for path in seen if "scratch" in path]
    assert len(inside) >= 4  # for head and tail: folding, quantising, onnxruntime's own
    assert all(Path(path).is_relative_to(tmp_path / "out") for path in seen)
    assert not any(elsewhere.iterdir())
    assert tempfile.tempdir == str(elsewhere)


def test_a_failure_between_the_last_renames_takes_the_first_ones_back(tiny, tmp_path, monkeypatch):
    rename = Path.rename

    def fail_for_the_client(self, target):
        if self.name == "client":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_client)
    with pytest.raises(ExportError, match="nothing was exported"):
        exported(tiny.run, tmp_path / "out", server_precision="int8")
    assert not any((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    real = Path.write_bytes

    def full(path, data):
        if path.name == "body_01.onnx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match="No space left on device; nothing was exported"):
        exported(tiny.run, tmp_path / "out")
    assert is_empty(tmp_path / "out")
