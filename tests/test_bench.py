"""``ensembler bench``: what it measures, and what it remembers for clients and servers of this machine."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from ensembler.cli import main
from ensembler.cloud_runtime import engine as engines
from ensembler.cloud_runtime import profile, tuning
from ensembler.cloud_runtime.engine import EngineOptions
from ensembler.cloud_runtime.profile import Profile
from ensembler.cloud_runtime.tuning import Arrangement, Rate
from ensembler.edge_runtime import preferences
from ensembler.edge_runtime.backends import BACKENDS, installed
from ensembler.edge_runtime.bench import bench
from ensembler.edge_runtime.preferences import Preferences
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.machine import machine, processor
from ensembler.protocol.manifest import digest, load_server

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


def test_a_place_in_a_folder_of_another_user_is_passed_over(config, shut_away):
    preferences.save(Preferences(threads=2))
    shut_away(config)
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


# --- the nets in a server ---


@pytest.fixture
def bundle(tiny, tmp_path):
    """A server bundle of its own, beside which a profile may be written."""
    return Path(shutil.copytree(tiny.server, tmp_path / "bundles" / "server"))


def fitting(bundle, **changes) -> Profile:
    """A profile that is right for the bundle on this machine, but for the changes."""
    fields = {"processor": processor(), "version": digest(load_server(bundle)), "threads": 1, "part_rows": 4}
    return Profile(**fields | {"max_batch_rows": 8} | changes)


def test_every_arrangement_is_timed_and_the_smallest_good_batch_is_best():
    tried = tuning.arrangements([1, 2], [1, 8], all_parts=True)
    assert {(each.rows, each.part_rows) for each in tried} == {(1, 4), (8, 4), (8, 8)}
    rates = [
        Rate(arrangement=Arrangement(threads=1, part_rows=4, rows=rows), images_per_s=rate, slowest=1, fastest=1000)
        for rows, rate in [(1, 50), (8, 98), (16, 99), (32, 100)]
    ]
    assert tuning.best(rates).arrangement.rows == 8


def test_what_is_timed_computes_for_real(bundle):
    (rate,) = tuning.measured(bundle, tuning.arrangements([1], [8], all_parts=False), seconds=0.05)
    assert 0 < rate.slowest <= rate.images_per_s <= rate.fastest
    assert rate.batch_ms == pytest.approx(8000 / rate.images_per_s)


def test_tuning_writes_a_profile_beside_the_bundle_and_serving_takes_it(bundle, capsys):
    command = ["bench", "server", str(bundle), "--threads", "1", "--rows", "4,8", "--seconds", "0.05", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["written"] is None
    assert profile.load(bundle) == (None, None)
    assert main([*command, "--tune"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == str(bundle.parent / "server.profile.json")
    found, unfit = profile.load(bundle)
    assert unfit is None
    assert found == fitting(bundle, part_rows=document["best"]["part_rows"], max_batch_rows=document["best"]["rows"])
    engine = engines.load(bundle, EngineOptions())
    assert (engine.threads, engine.part_rows) == (1, found.part_rows)
    engine.close()


def test_what_the_operator_says_overrules_the_profile(bundle):
    profile.save(bundle, fitting(bundle, threads=1, part_rows=4))
    engine = engines.load(bundle, EngineOptions(threads=2, part_rows=3))
    assert (engine.threads, engine.part_rows) == (2, 3)
    engine.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"version": "0" * 64}, "made for other nets"), ({"processor": "64 cores of an abacus"}, "made on 64 cores")],
)
def test_a_profile_of_something_else_is_not_used_and_the_log_says_why(bundle, changes, why, caplog):
    profile.save(bundle, fitting(bundle, **changes))
    with caplog.at_level(logging.WARNING):
        engine = engines.load(bundle, EngineOptions(threads=2))
    assert engine.part_rows == 16
    engine.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "server.profile.json is not used: it was " + why in line
    assert engines.tuned_rows([bundle], EngineOptions()) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b" " * 5000,
        *(
            json.dumps(
                {"processor": "p", "version": "v", "threads": 1, "part_rows": 4, "max_batch_rows": 8} | wrong
            ).encode()
            for wrong in ({"threads": 0}, {"threads": True}, {"part_rows": 1.5}, {"max_batch_rows": 10**9}, {"more": 1})
        ),
    ],
)
def test_a_profile_that_is_none_is_not_used_and_the_log_names_it(bundle, content, caplog):
    (bundle.parent / "server.profile.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        engine = engines.load(bundle, EngineOptions(threads=2))
    assert engine.part_rows == 16
    engine.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "server.profile.json is not used: it is not what that command writes; ensembler bench server --tune" in line


def test_what_was_measured_is_shown_even_if_it_cannot_be_kept(bundle, capsys):
    (bundle.parent / "server.profile.partial").mkdir()
    command = ["bench", "server", str(bundle), "--threads", "1", "--rows", "4", "--seconds", "0.05", "--tune", "--json"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["best"]["rows"] == 4
    assert "server.profile.json: cannot be written: Is a directory" in captured.err


def test_models_of_one_server_share_the_smallest_batch_of_their_profiles(bundle, tiny, tmp_path):
    assert engines.tuned_rows([tiny.server], EngineOptions()) is None
    profile.save(bundle, fitting(bundle, max_batch_rows=8))
    other = Path(shutil.copytree(tiny.server, tmp_path / "other"))
    profile.save(other, fitting(other, max_batch_rows=4))
    assert engines.tuned_rows([bundle, tiny.server], EngineOptions()) == 8
    assert engines.tuned_rows([bundle, other], EngineOptions()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows = 0: give a whole number, at least 1"),
        (["--rows", "1,x"], "--rows 1,x: give numbers with commas between them"),
        (["--rows", "1000000"], "a batch of 1000000 images: at most"),
        (["--seconds", "0"], "0 is not above zero"),
    ],
)
def test_impossible_options_of_the_server_are_refused(bundle, options, message, capsys):
    try:
        status = main(["bench", "server", str(bundle), *options])
    except SystemExit as exit_:  # argparse's own
        status = exit_.code
    assert status == 2
    assert message in capsys.readouterr().err


# --- from end to end, and two runs ---


def test_calls_are_measured_from_end_to_end_and_two_runs_are_compared(tiny, serve, tmp_path, capsys):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    with serve(tiny.server) as (endpoint, _):
        for path in files:
            command = ["bench", "client", str(tiny.client), "--server", endpoint, "--calls", "4", "--rounds", "2"]
            assert main([*command, "--batch", "3", "--at-once", "2", "--timeout-ms", "60000", "--json"]) == 0
            path.write_text(capsys.readouterr().out)
    document = json.loads(files[0].read_text())
    assert document["machine"] == machine()
    figures = document["figures"]
    assert all(one["low"] <= one["high"] for one in figures.values())
    parts = [figures[f"{part}_p50_ms"]["value"] for part in ("head", "network", "queue", "server", "tail")]
    assert 0 < max(parts) <= figures["total_p99_ms"]["value"]
    assert figures["total_p50_ms"]["value"] <= figures["total_p95_ms"]["value"] <= figures["total_p99_ms"]["value"]
    assert main(["bench", "compare", *map(str, files), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["compared"]
    assert compared["bytes_up"] == {
        "first": figures["bytes_up"]["value"],
        "second": figures["bytes_up"]["value"],
        "ratio": 1.0,
        "spreads_overlap": True,
    }


def written(path, figure, bench="client", **more):
    """Writes a result with one figure, and returns its path as a text."""
    document = {"bench": bench, "machine": "a", "figures": {"images_per_s": figure}} | more
    path.write_text(json.dumps(document))
    return str(path)


def test_a_comparison_says_the_ratio_what_is_noise_and_what_else_differs(tmp_path, capsys):
    first = written(tmp_path / "1.json", {"value": 100, "low": 90, "high": 110})
    near = written(tmp_path / "2.json", {"value": 105, "low": 95, "high": 115})
    far = written(tmp_path / "3.json", {"value": 200, "low": 190, "high": 210}, machine="b", settings={"batch": 2})
    assert main(["bench", "compare", first, near]) == 0
    out = capsys.readouterr().out
    assert "1.050" in out
    assert "within spread" in out
    assert main(["bench", "compare", first, far]) == 0
    out = capsys.readouterr().out
    assert "2.000" in out
    assert "within spread" not in out
    assert "the machines differ: a; b" in out
    assert "the settings differ: None; {'batch': 2}" in out


def test_what_cannot_be_compared_is_refused_by_name(tmp_path, capsys):
    good = written(tmp_path / "good.json", {"value": 1, "low": 1, "high": 1})
    other = written(tmp_path / "other.json", {"value": 1, "low": 1, "high": 1}, bench="server")
    torn = written(tmp_path / "torn.json", {"value": "1", "low": 1, "high": 1})
    huge = written(tmp_path / "huge.json", {"value": 10**400, "low": 1, "high": 1})
    endless = written(tmp_path / "endless.json", {"value": 1, "low": float("nan"), "high": float("inf")})
    for second, message in {
        other: "good.json is of bench client, " + other + " is of bench server",
        torn: "torn.json is not what ensembler bench ... --json > FILE writes",
        huge: "huge.json is not what ensembler bench ... --json > FILE writes",
        endless: "endless.json is not what ensembler bench ... --json > FILE writes",
        str(tmp_path / "none.json"): "none.json: cannot be read: No such file or directory",
    }.items():
        assert main(["bench", "compare", good, second]) == 2
        assert message.split(", ")[0] in capsys.readouterr().err


def test_the_processor_and_the_machine_are_said_in_words(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: Abacus 3000\n")
    (tmp_path / "meminfo").write_text("MemTotal:       4194304 kB\n")
    cores = len(os.sched_getaffinity(0))
    assert processor(tmp_path) == f"{cores} cores of Abacus 3000"
    assert machine(tmp_path).startswith(f"{cores} cores of Abacus 3000, 4 GiB, Python 3.")
    assert machine(tmp_path / "none").startswith(f"{cores} cores of ")
    for line, told in {
        "flags\t\t: fpu avx2 avx512_vnni": " with VNNI",
        "flags\t\t: fpu avx2 avx512_vnni_not": "",
        "Features\t: fp asimd asimddp": " with dot products",
    }.items():
        (tmp_path / "cpuinfo").write_text(f"processor: 0\nmodel name\t: Abacus 3000\n{line}\nmodel name\t: Other\n")
        assert processor(tmp_path) == f"{cores} cores of Abacus 3000{told}"
