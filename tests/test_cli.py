"""The command line as a user and a script meet it: processes, exit statuses, words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from ensembler.cli import main

COMMAND = [sys.executable, "-m", "ensembler.cli"]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=240, **options)


@pytest.fixture
def photo(tiny_images, tmp_path):
    path = tmp_path / "bücher.png"
    Image.fromarray(tiny_images[0]).save(path)
    return path


def test_help_lists_the_verbs():
    done = run("--help")
    assert done.returncode == 0
    for verb in ("demo", "train", "audit", "card", "export", "serve", "predict", "watch", "keys"):
        assert verb in done.stdout


@pytest.mark.parametrize("verb", ["demo", "train", "audit", "card", "export", "serve", "predict", "watch", "keys"])
def test_every_verb_explains_itself_and_takes_json(verb):
    done = run(verb, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_predict_prints_label_times_and_bytes(tiny, serve, photo):
    with serve(tiny.server) as (endpoint, _):
        done = run("predict", tiny.client, photo, "--server", endpoint)
        as_json = run("predict", tiny.client, photo, photo, "--server", endpoint, "--json")
    assert done.returncode == 0, done.stderr
    assert "bytes up" in done.stdout
    document = json.loads(as_json.stdout)
    assert len(document["predictions"]) == 2
    assert document["predictions"][0]["label"] in done.stdout
    assert set(document["predictions"][0]["timings_ms"]) == {"head", "queue", "server", "network", "tail", "total"}


def test_predict_gives_the_answers_that_came_before_an_error_whatever_the_files_are_called(
    tiny, serve, photo, tmp_path
):
    strange = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(photo, strange)
    missing, ascii_only = tmp_path / "missing.jpg", {**os.environ, "PYTHONIOENCODING": "ascii"}
    with serve(tiny.server) as (endpoint, _):
        done = run("predict", tiny.client, os.fsdecode(strange), missing, "--server", endpoint, "--json")
        text = run("predict", tiny.client, os.fsdecode(strange), "--server", endpoint, env=ascii_only)
    assert done.returncode == 2
    (answered,) = json.loads(done.stdout)["predictions"]
    assert os.fsencode(answered["image"]) == strange
    assert "missing.jpg" in json.loads(done.stderr)["error"]["message"]
    assert text.returncode == 0, text.stderr
    assert r"\udcff.png: " in text.stdout


def test_keys_new_makes_a_pair_and_refuses_to_overwrite_it(tmp_path):
    done = run("keys", "new", "--out", tmp_path, "--name", "porch", "--json")
    assert done.returncode == 0
    made = json.loads(done.stdout)
    secret = (tmp_path / "porch.key_secret").read_text()
    assert made["secret"].endswith("porch.key_secret")
    again = run("keys", "new", "--out", tmp_path, "--name", "porch")
    assert again.returncode == 2
    assert "never overwritten" in again.stderr
    assert (tmp_path / "porch.key_secret").read_text() == secret


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("train", "--data", "nowhere", "--out", "x"), 2, "not a data set"),
        (("train", "--data", "demo", "--out", "x", "-N", "3", "-P", "4"), 2, "1 <= P <= N"),
        (("train", "--data", "demo", "--out", "x", "-N", "4", "-P", "0"), 2, "1 <= P <= N"),
        (("train", "--data", "demo", "--out", "x", "--arch", "resnet99"), 2, "resnet10_slim"),
        (
            ("train", "--data", "demo", "--out", "x", "--defense", "none", "--dropout", "0.3"),
            2,
            "--noise-std 0 --dropout",
        ),
        (("train", "--data", "demo", "--out", "x", "--noise", "learned", "--noise-std", "0"), 2, "that it keeps up"),
        (("export", "nowhere", "--out", "x"), 2, "not a run folder"),
        (("serve", "nowhere"), 1, "ensembler-export"),
        (("predict", "nowhere", "a.jpg", "--server", "tcp://127.0.0.1:1"), 1, "ensembler-export"),
        (("serve", "nowhere", "--threads", "100000"), 2, "--threads = 100000: give a whole number, at least 1 and at"),
        (("predict", "", "a.jpg", "--server", "tcp://127.0.0.1:1"), 2, "bundle: an empty text is no path"),
        (("cuts", "resnet18", "--num-classes", "0"), 2, "0 is not above zero"),
    ],
    ids=[
        "no data",
        "P > N",
        "P = 0",
        "unknown arch",
        "no defence that drops",
        "no noise to learn",
        "no run",
        "no server bundle",
        "no client bundle",
        "more threads than can be",
        "an empty path",
        "no classes",
    ],
)
def test_wrong_uses_say_what_to_do_and_leave_nothing(tmp_path, arguments, status, words):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_json_for_scripts(tmp_path):
    done = run("export", "nowhere", "--out", "x", "--json", cwd=tmp_path)
    assert done.stdout == ""
    assert json.loads(done.stderr)["error"]["type"] == "DataError"


def test_a_missing_image_and_a_missing_server_are_told_apart(tiny, photo, tmp_path):
    no_image = run("predict", tiny.client, tmp_path / "missing.jpg", "--server", "tcp://127.0.0.1:1")
    no_server = run("predict", tiny.client, photo, "--server", "tcp://127.0.0.1:1", "--timeout-ms", "3000")
    assert (no_image.returncode, no_server.returncode) == (2, 1)
    assert "missing.jpg" in no_image.stderr
    assert "is the server running" in no_server.stderr


@pytest.mark.parametrize("option", ["--key", "--authorized"])
def test_a_key_beside_plaintext_is_refused_and_not_ignored(tiny, tmp_path, option):
    done = run("serve", tiny.server, "--plaintext", option, tmp_path / "something")
    assert done.returncode == 2
    assert f"--plaintext takes no {option}" in done.stderr


def test_a_server_without_an_authorised_device_does_not_start(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run("serve", tiny.server, "--authorized", tmp_path / "empty")
    assert done.returncode == 2
    assert "no device could connect" in done.stderr


@pytest.mark.slow
def test_ctrl_c_while_training_ends_with_130_and_an_unfinished_run_is_not_exported(tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "--data", "demo", "--arch", "resnet10_slim", "-N", "2", "-P", "1", "--out", str(out)]
    with subprocess.Popen([*COMMAND, *arguments, "--epochs-stage1", "1"], stdout=subprocess.PIPE, text=True) as process:
        assert "net 1 of 2" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    done = run("export", out, "--out", tmp_path / "bundles")
    assert done.returncode == 2
    assert "not finished" in done.stderr
    assert not (tmp_path / "bundles").exists()


def test_serve_stops_on_ctrl_c_too(tiny, serve):
    with serve(tiny.server) as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_the_server_says_no_key_and_no_image_in_its_log(tiny, serve, photo):
    with serve(tiny.server) as (endpoint, process):
        assert run("predict", tiny.client, photo, "--server", endpoint).returncode == 0
        process.terminate()
        _, log = process.communicate(timeout=30)
    for name in ("server", "device"):
        secret = (tiny.keys / f"{name}.key_secret").read_text().split('secret-key = "')[1].split('"')[0]
        assert secret not in log
    assert "stopped after 1 requests" in log


@pytest.mark.slow
def test_demo_runs_the_whole_product_ends_with_an_audit_and_can_run_again(tmp_path, tiny_budget, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("demo", "--out", "demo", "--train-limit", "512", "--epochs-stage1", "1", "--epochs-stage3", "1")
    assert main([*arguments, "--no-gates", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    # Hardly trained, so no accuracy is promised: what is served must be what the parity report measured.
    report = json.loads((tmp_path / "demo" / "parity.json").read_text())
    assert document["test_images"] == report["images"] == 1200
    assert document["accuracy_split_quantised_percent"] == pytest.approx(report["accuracy_artifact"], abs=0.25)
    assert document["bytes_up_per_image"] > 4096
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == document
    audited = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert document["audit"]["verdict"] == audited["verdict"]
    assert (tmp_path / document["audit"]["report"]).is_file()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "precious").touch()
    refused = run("demo", "--out", "mine", cwd=tmp_path)
    assert refused.returncode == 2
    assert (other / "precious").exists()


def test_training_without_torch_names_the_install_command(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run("train", "--data", "demo", "--out", tmp_path / "x", env=environment)
    assert done.returncode == 1
    assert "pip install 'ensembler-edge[train]'" in done.stderr
