"""What a user, a script or a full disk can do wrong: one sentence, the right exit status, nothing half-written.

Bad images, bundles, keys, headers and manifests have their tests beside their modules; here is the rest, and what goes
through the command line.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from ensembler import AsyncEdgeClient, EdgeClient
from ensembler.cli import main
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.edge_runtime.images import to_pixels
from ensembler.protocol.errors import BundleError, ConfigError, DataError
from ensembler.protocol.manifest import ImageSpec, load_client, load_server
from ensembler.training import data as data_sets
from ensembler.training import plots
from ensembler.training.runs import RunFolder

COMMAND = [sys.executable, "-m", "ensembler.cli"]
DEADLINE_S = 120
FLOAT = ("--quantize", "none", "--server-precision", "float32", "--min-sqnr-db", "0", "--max-accuracy-drop", "100")
SMALLEST = ("--arch", "resnet10_slim", "-N", "1", "-P", "1", "--epochs", "1", "--batch-size", "16", "--device", "cpu")


def training(data, out, *more):
    return ["train", "--data", data, "--out", str(out), *SMALLEST, "--train-limit", "16", *more]


def exporting(run, out, *more):
    return ["export", str(run), "--out", str(out), *FLOAT, *more]


def said(capsys):
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- data ---


@pytest.fixture
def changed(tiny_data, tmp_path):
    """``changed(test=..., names=...)``: the tiny data with other class names in the train half or the test half."""

    def build(**names):
        for part, path in zip(("train", "test"), tiny_data.removeprefix("npz:").split(","), strict=True):
            with np.load(path) as stored:
                arrays = dict(stored)
            if part in names:
                arrays["label_names"] = np.array(names[part])
            np.savez(tmp_path / f"{part}.npz", **arrays)
        return f"npz:{tmp_path / 'train.npz'},{tmp_path / 'test.npz'}"

    return build


def test_halves_that_number_their_classes_differently_are_refused(changed):
    with pytest.raises(DataError, match=r"test\.npz: label_names are not those of .*train\.npz.*same order"):
        data_sets.load(changed(test=["blue", "grün", "red"]))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "a"], "two classes have the name 'a'"),
        (["a", "  ", "b"], "a class name is empty"),
        (["a", "b\nc", "d"], r"'b\\nc' has a character that cannot be printed"),
        (["a", "\x1b[31mb", "d"], "cannot be printed"),
        (["a", "b\ud800", "d"], "cannot be printed"),
        (["a", "b" * 1001, "c"], "has 1001 characters; at most 1000"),
        ([str(index) for index in range(100_001)], "100001 class names; at most 100000"),
    ],
    ids=["twice", "empty", "newline", "escape", "surrogate", "long", "many"],
)
def test_class_names_that_no_bundle_or_terminal_could_hold_are_refused(changed, names, words):
    data = changed(train=names, test=names)
    with pytest.raises(DataError, match=words):
        data_sets.load(data)


def test_training_sees_16_bit_images_as_the_device_does(tmp_path):
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for part in ("train", "test"):
        for label in ("dark", "light"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            Image.fromarray(deep if label == "dark" else deep[::-1].copy()).save(folder / "a.png")
    data = data_sets.load(f"folder:{tmp_path}")
    device = to_pixels(tmp_path / "test" / "dark" / "a.png", ImageSpec(height=16, width=16))
    assert np.array_equal(data.test_x[0].transpose(1, 2, 0), device)
    assert len(np.unique(device)) == 256


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_training_takes_the_first_frame_of_an_animation_as_the_device_does(tmp_path, suffix):
    frames = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (0, 255)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.array_equal(
        data_sets._image(path, None).transpose(1, 2, 0), to_pixels(path, ImageSpec(height=16, width=16))
    )


# --- bundles ---


@pytest.fixture
def copied(tiny, tmp_path):
    return {
        "client": (shutil.copytree(tiny.client, tmp_path / "client"), load_client),
        "server": (shutil.copytree(tiny.server, tmp_path / "server"), load_server),
    }


@pytest.mark.parametrize("kind", ["client", "server"])
def test_a_pipe_in_a_bundle_is_refused_instead_of_waited_for(copied, kind):
    folder, load = copied[kind]
    for name in (next(path.name for path in sorted(folder.glob("*.onnx"))), "manifest.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(BundleError, match=f"{name} cannot be read: it is not a file"):
            load(folder)


@pytest.mark.parametrize("kind", ["client", "server"])
def test_a_file_in_the_place_of_a_bundle_is_refused(tmp_path, capsys, kind):
    (tmp_path / "bundle").write_text("x")
    bundle = str(tmp_path / "bundle")
    options = ["predict", bundle, "a.png", "--server", "tcp://127.0.0.1:9"] if kind == "client" else ["serve", bundle]
    assert main(options) == 1
    assert f"no bundle at {bundle}: it is not a folder" in said(capsys)


# --- options of a program ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"server": None}, "server = None: give tcp://host:port"),
        ({"server": [None]}, r"server = \[None\]: give tcp://host:port"),
        ({"server": b"tcp://a:1"}, "server = b'tcp://a:1': give tcp://host:port"),
        ({"bundle": None}, "bundle is NoneType; give a path"),
        ({"bundle": b"client"}, "bundle is bytes; give a path"),
        ({"bundle": "~nosuchuser/x"}, "bundle = '~nosuchuser/x': this machine knows no such home"),
        ({"key": "~nosuchuser/x"}, "the key argument = '~nosuchuser/x': this machine knows no such home"),
        ({"key": 5}, "the key argument is int; give a path"),
        ({"bundle_key": "~nosuchuser/x"}, "bundle_key = '~nosuchuser/x': this machine knows no such home"),
        ({"bundle_key": 5}, "bundle_key is int; give a path"),
        ({"passphrase": b"secret phrase"}, "passphrase is bytes; give a text"),
        ({"plaintext": "false"}, "plaintext = 'false': give True or False"),
        ({"timeout_ms": "5"}, "timeout_ms = '5': give a number"),
        ({"timeout_ms": "soon"}, "timeout_ms = 'soon': give a number"),
        ({"timeout_ms": float("nan")}, "timeout_ms = nan: give a number"),
        ({"threads": "1"}, "threads = '1': give a whole number"),
        ({"threads": 1 << 40}, "threads = 1099511627776: give a whole number"),
        ({"top_k": "5"}, "top_k = '5': give a whole number"),
        ({"backend": []}, r"unknown backend \[\]"),
        ({"max_calls": "8"}, "max_calls = '8': give a whole number"),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_named_with_what_to_give(options, words, tiny):
    make = AsyncEdgeClient if "max_calls" in options else EdgeClient
    with pytest.raises(ConfigError, match=words) as caught:
        make(**({"bundle": tiny.client, "server": "tcp://127.0.0.1:9"} | options))
    assert "secret phrase" not in str(caught.value)


# --- addresses ---


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("tcp://127.0.0.1:70000", "a port of 1 to 65535"),
        ("5555", "a port of 1 to 65535"),
        ("", "a port of 1 to 65535"),
        ("tcp://127.0.0.1", "a port of 1 to 65535"),
        ("tcp://does-not-exist.invalid:5555", "this machine has no such address"),
        ("tcp://192.0.2.1:5555", "this machine has no such address"),
    ],
)
def test_an_address_that_cannot_be_bound_is_named_with_the_cure(address, words):
    from ensembler.transport.zmq_server import ServerSocket

    with pytest.raises(ConfigError, match=rf"--bind '?{address}'?: .*{words}"):
        ServerSocket(address, keys=None, authorized=frozenset())


def test_what_lies_at_a_path_is_not_deleted_to_listen_there(tmp_path):
    from ensembler.transport.zmq_server import ServerSocket

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"kept")
    with pytest.raises(ConfigError, match="is there and is not a socket; choose another path"):
        ServerSocket(f"ipc://{photo}", keys=None, authorized=frozenset())
    assert photo.read_bytes() == b"kept"
    taken = tmp_path / "taken"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(taken))
        other.listen()
        with pytest.raises(ConfigError, match="another server listens there; stop it, or choose another path"):
            ServerSocket(f"ipc://{taken}", keys=None, authorized=frozenset())
    ServerSocket(f"ipc://{taken}", keys=None, authorized=frozenset()).close()  # whoever left it there has gone


def test_a_socket_that_is_taken_is_seen_where_nobody_answers_and_where_others_speak_otherwise(tmp_path):
    from ensembler.transport.zmq_server import ServerSocket

    full, letters = tmp_path / "full", tmp_path / "letters"
    with (
        socket.socket(socket.AF_UNIX) as silent,
        socket.socket(socket.AF_UNIX) as waiting,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        silent.bind(str(full))
        silent.listen(0)
        waiting.connect(str(full))  # a second one would wait for ever
        other.bind(str(letters))
        with pytest.raises(ConfigError, match="another server listens there"):
            ServerSocket(f"ipc://{full}", keys=None, authorized=frozenset())
        with pytest.raises(ConfigError, match=r"another program's socket is there \(.*\); choose another path"):
            ServerSocket(f"ipc://{letters}", keys=None, authorized=frozenset())
    assert letters.is_socket()


def test_a_port_in_use_is_an_error_of_the_input(tiny, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(tiny.server), "--bind", f"tcp://127.0.0.1:{taken.getsockname()[1]}"]) == 2
    assert "the address is in use; stop the other server or choose another port" in capsys.readouterr().err


# --- a full disk ---


@contextmanager
def no_room(after=64):
    """The system refuses every write beyond ``after`` bytes of a file (EFBIG), as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_at(monkeypatch):
    """``full_at(owner, method, what)``: no room while that method writes that file."""

    def arrange(owner, method, chosen):
        real = getattr(owner, method)

        def write(*arguments):
            if not chosen(*arguments):
                return real(*arguments)
            with no_room(0):
                return real(*arguments)

        patch = pytest.MonkeyPatch()
        patch.setattr(owner, method, write)
        return patch

    return arrange


@pytest.mark.parametrize(
    "name",
    [
        "stage1/net_00.checkpoint.safetensors",
        "stage1/net_00.safetensors",
        "wire.json",
        "client/secret.json",
        "client/client.checkpoint.safetensors",
        "client/client.safetensors",
        "confusion.json",
        "summary.json",
        "metrics.jsonl",
    ],
)
def test_a_disk_that_fills_up_while_training_costs_a_sentence_and_resume_goes_on(
    tiny_data, tmp_path, capsys, full_at, name
):
    out = tmp_path / "run"
    if name == "metrics.jsonl":
        patch = full_at(RunFolder, "append_metrics", lambda *_: True)
    else:
        patch = full_at(RunFolder, "_replace", lambda _run, asked, *_: asked == name)
    assert main(training(tiny_data, out)) == 2
    patch.undo()
    line = said(capsys)
    assert f"{out / name} cannot be written" in line
    assert "File too large" in line
    assert "ensembler train --resume" in line
    assert not list(out.rglob("*.tmp*"))
    assert main(["export", str(out), "--out", str(tmp_path / "bundles")]) == 2
    assert "training was not finished" in said(capsys)
    assert main(["train", "--resume", str(out)]) == 0
    assert RunFolder.open(out).has("summary.json")


def test_a_run_that_could_not_begin_is_not_in_the_way_of_the_next(tiny_data, tmp_path, capsys):
    out = tmp_path / "run"
    with no_room():
        assert main(training(tiny_data, out)) == 2
    assert "config.json cannot be written" in said(capsys)
    assert not out.exists()


def test_pictures_without_room_cost_a_line_and_not_the_run(tiny_run, tmp_path, caplog):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = sorted(run.iterdir())
    with no_room():
        assert plots.draw(run) == []
    assert "could not be drawn" in caplog.text
    assert sorted(run.iterdir()) == before


def test_a_disk_that_fills_up_while_exporting_leaves_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    with no_room(4096):  # enough for keys, not for nets
        assert main(exporting(tiny.run, out)) == 1
    assert f"--out {out}: cannot be written: File too large; nothing was exported" in said(capsys)
    assert not out.exists()


# --- outputs that cannot be written ---


@pytest.mark.parametrize("verb", ["train", "export", "demo", "keys"])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_an_output_below_a_file_is_refused_by_every_verb_alike(verb, as_json, tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    arguments = {
        "train": training(tiny.data, out),
        "export": exporting(tiny.run, out),
        "demo": ["demo", "--out", str(out)],
        "keys": ["keys", "new", "--out", str(out)],
    }[verb]
    assert main([*arguments, *(["--json"] if as_json else [])]) == 2
    line = said(capsys)
    assert str(out) in line
    assert "written" in line
    assert line.startswith('{"error": {"type": ' if as_json else "ensembler: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["demo", "cuts", "train", "export", "serve", "predict", "keys"])
def test_an_unknown_option_is_json_for_scripts_in_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--json", "--no-such-option"])
    assert ended.value.code == 2
    error = json.loads(said(capsys))["error"]
    assert error["type"] == "ConfigError"
    assert "--help lists what there is" in error["message"]


# --- kill and Ctrl-C ---


@contextmanager
def process_of(arguments):
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_an_export_that_was_killed_is_not_in_the_way_of_the_next(tiny, tmp_path):
    out = tmp_path / "mein Bündel 束"
    with process_of(exporting(tiny.run, out)) as process:
        assert process.stdout.readline().startswith("server: body 1")
    assert (out / "keys").is_dir()
    assert list(out.glob(".partial-*"))
    assert main(exporting(tiny.run, out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["client", "keys", "parity.json", "server"]
    assert not list((out / "keys").glob(".*"))
    assert load_client(out / "client").labels == load_client(tiny.client).labels


@pytest.mark.slow
def test_ctrl_c_while_exporting_ends_with_130_one_line_and_nothing(tiny, tmp_path):
    out = tmp_path / "out"
    with process_of(["export", tiny.run, "--out", out]) as process:
        assert process.stdout.readline().startswith("server: body 1")  # int8: calibration begins
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (130, "ensembler: interrupted\n")
    assert not out.exists()


def test_ctrl_c_while_predicting_ends_with_130_and_one_json_line(tiny, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a b ü.png")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        image = tmp_path / "a b ü.png"
        options = ["--server", endpoint, "--timeout-ms", 1000 * DEADLINE_S, "--json"]
        with process_of(["predict", tiny.client, image, *options]) as process:
            silent.settimeout(DEADLINE_S)
            with silent.accept()[0]:  # it waits for the handshake now
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert json.loads(errors)["error"] == {"type": "KeyboardInterrupt", "message": "interrupted"}


@pytest.mark.parametrize("piece", ["data", "stage 1", "stage 3"])
def test_ctrl_c_while_training_is_one_line_that_names_resume_once_there_is_a_run(
    tiny_data, tmp_path, capsys, monkeypatch, piece
):
    from ensembler.training import stage1, stages

    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    owner, name = {
        "data": (data_sets, "load"),
        "stage 1": (stage1, "fit"),
        "stage 3": (stages, "stage3"),
    }[piece]
    monkeypatch.setattr(owner, name, interrupt)
    out = tmp_path / "mein Lauf ü"
    assert main(training(tiny_data, out)) == 130
    resume = "" if piece == "data" else f"; to go on: ensembler train --resume {out}"
    assert said(capsys) == f"ensembler: interrupted{resume}"
    assert out.exists() == (piece != "data")


# --- names beyond ASCII ---


def test_spaces_and_letters_beyond_ascii_are_kept(changed, tmp_path):
    names = ["rot & gelb", "grün", "青"]
    run = tmp_path / "mein Lauf ü"
    assert main(training(changed(train=names, test=names), run)) == 0
    assert list(RunFolder.open(run).labels) == names


# --- telemetry ---


def test_the_server_and_the_export_tell_onnxruntime_to_report_nothing(tiny, monkeypatch):
    import importlib

    import onnxruntime

    from ensembler.export import graphs

    told = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: told.append("told"))
    OnnxEngine(tiny.server, threads=1).close()
    by_server = len(told)
    importlib.reload(graphs)
    assert by_server
    assert len(told) > by_server
