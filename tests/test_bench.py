"""``ensembler bench device``, and what it remembers for the clients of this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ensembler.cli import main
from ensembler.edge_runtime import preferences
from ensembler.edge_runtime.backends import BACKENDS, installed
from ensembler.edge_runtime.bench import bench
from ensembler.edge_runtime.preferences import Preferences
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import ConfigError

GOLDEN = Path(__file__).resolve().parent / "golden" / "v1_tflite" / "client"
HERE = [backend for backend in BACKENDS if installed(backend)]


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """The user's own configuration, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "ensembler" / "device.json"


def test_every_runtime_is_timed_at_every_thread_count_the_fastest_first():
    found = bench(GOLDEN, threads=[1, 2], runs=3)
    assert {(timing.backend, timing.threads) for timing in found} == {(name, n) for name in HERE for n in (1, 2)}
    assert [timing.total_ms for timing in found] == sorted(timing.total_ms for timing in found)
    assert all(0 < timing.head_p50_ms <= timing.head_p95_ms for timing in found)
    assert all(0 < timing.tail_p50_ms <= timing.tail_p95_ms for timing in found)


def test_a_bundle_of_one_format_is_timed_in_its_runtimes_alone(tiny):
    assert {timing.backend for timing in bench(tiny.client, threads=[1], runs=1)} == {"onnxruntime"}


def test_the_fastest_is_remembered_when_asked_and_taken_by_the_next_client(config, capsys):
    command = ["bench", "device", str(GOLDEN), "--threads", "2", "--runs", "3", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["written"] is None
    assert not config.exists()
    assert main([*command, "--write"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == str(config)
    best = document["timings"][0]
    assert preferences.load() == Preferences(backend=best["backend"], threads=2)
    assert EdgeRuntime(GOLDEN).backend == best["backend"]


@pytest.mark.parametrize("name", HERE)
def test_what_is_preferred_is_taken_where_the_program_names_nothing(name):
    preferences.save(Preferences(backend=name))
    assert EdgeRuntime(GOLDEN).backend == name
    assert EdgeRuntime(GOLDEN, backend=HERE[0]).backend == HERE[0]


def test_a_preferred_runtime_that_is_gone_or_cannot_read_the_bundle_is_passed_over(tiny):
    preferences.save(Preferences(backend="tflite-runtime"))
    assert EdgeRuntime(tiny.client).backend == "onnxruntime"
    preferences.save(Preferences(backend="ai-edge-litert"))
    assert EdgeRuntime(tiny.client).backend == "onnxruntime"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"backend": "abacus"}',
        b'{"threads": 0}',
        b'{"threads": true}',
        b'{"backend": []}',
        b" " * 5000,
    ],
)
def test_a_file_that_says_something_else_is_refused_by_name(config, content):
    config.parent.mkdir(parents=True)
    config.write_bytes(content)
    with pytest.raises(ConfigError, match=r"device\.json is not what ensembler bench device --write writes"):
        EdgeRuntime(GOLDEN)


def test_a_pipe_in_its_place_does_not_hang(config):
    config.parent.mkdir(parents=True)
    os.mkfifo(config)
    assert preferences.load() == Preferences()


def test_a_place_that_cannot_be_written_is_named(config):
    config.parent.parent.write_text("in the way")
    with pytest.raises(ConfigError, match=r"device\.json: cannot be written: "):
        preferences.save(Preferences())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "--threads = 0: give a whole number, at least 1"),
        (["--threads", "1,two"], "--threads 1,two: give numbers with commas between them"),
        (["--runs", "0"], "--runs = 0: give a whole number, at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message, capsys):
    assert main(["bench", "device", str(GOLDEN), *options]) == 2
    assert message in capsys.readouterr().err


def test_people_get_a_table_and_the_fastest(capsys):
    assert main(["bench", "device", str(GOLDEN), "--threads", "1", "--runs", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runtime")
    assert "fastest: " in out
    assert " with 1 thread, " in out
