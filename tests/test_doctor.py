"""``ensembler doctor``: each check, provoked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ensembler.cli import main
from ensembler.edge_runtime import diagnosis, probe
from ensembler.edge_runtime.backends import BACKENDS, installed
from ensembler.edge_runtime.probe import ON_X86_64, Probe

GOLDEN = Path(__file__).resolve().parent / "golden" / "v1_tflite" / "client"


def levels(findings):
    return [finding.level for finding in findings]


def only(findings):
    (finding,) = findings
    return finding


@pytest.fixture
def machine(tmp_path):
    """``machine(**files)`` writes files below a root of its own and returns the root."""

    def made(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path

    return made


# --- the machine ---


def test_a_raspberry_pi_is_named(machine):
    root = machine({"proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0"})
    assert only(diagnosis.board(root)).words.startswith("Raspberry Pi 4 Model B Rev 1.4, ")


def test_a_board_that_says_nothing_is_named_by_its_processor(machine):
    assert only(diagnosis.board(machine({}))).words.startswith(os.uname().machine)


def test_the_system_is_named(machine):
    root = machine({"etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n'})
    finding = only(diagnosis.system(root))
    assert finding.level == "ok"
    assert finding.words.startswith("Debian GNU/Linux 12 (bookworm), glibc")


def test_a_system_without_glibc_is_a_warning(machine, monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    finding = only(diagnosis.system(machine({"etc/os-release": 'PRETTY_NAME="Alpine Linux"\n'})))
    assert (finding.level, "glibc" in finding.cure) == ("warning", True)


def test_an_old_python_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    finding = only(diagnosis.python())
    assert (finding.level, "bookworm" in finding.cure) == ("error", True)


def test_little_memory_is_a_warning(machine):
    assert levels(diagnosis.memory(machine({"proc/meminfo": "MemTotal: 500000 kB\nMemAvailable:  40960 kB\n"}))) == [
        "warning"
    ]
    assert only(diagnosis.memory(machine({"proc/meminfo": "MemAvailable: 409600 kB\n"}))).words == "400 MB available"
    assert diagnosis.memory(machine({"proc/meminfo": "nonsense"})) == []


@pytest.mark.parametrize(("degrees", "level"), [("45123\n", "ok"), ("84000\n", "warning")])
def test_a_hot_board_is_a_warning(machine, degrees, level):
    root = machine({"sys/class/thermal/thermal_zone0/temp": degrees})
    assert levels(diagnosis.heat(root, lambda: "")) == [level]


@pytest.mark.parametrize(
    ("answer", "level", "words"),
    [
        ("throttled=0x0\n", "ok", "none since the start"),
        ("throttled=0x50005\n", "warning", "the supply gives too little voltage; the processor is slowed down; the s"),
    ],
)
def test_throttling_is_said_with_its_cause(machine, answer, level, words):
    finding = only(diagnosis.heat(machine({}), lambda: answer))
    assert finding.level == level
    assert finding.words.startswith(words)


def test_a_board_that_tells_neither_temperature_nor_throttling_is_no_finding(machine):
    assert diagnosis.heat(machine({}), lambda: "VCHI initialization failed\n") == []


def test_a_clock_before_the_bundle_was_made_is_a_warning(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    made = (tmp_path / "manifest.json").stat().st_mtime
    assert levels(diagnosis.clock(tmp_path, lambda: 0.0)) == ["warning"]
    assert levels(diagnosis.clock(tmp_path, lambda: made + 1e9)) == ["ok"]


# --- runtimes ---


def test_a_runtime_that_works_says_how_long_it_took_and_that_it_computes_as_on_x86_64():
    for finding in diagnosis.runtimes():
        assert finding.level == "ok"
        assert "int8 as on x86-64" in finding.words


def test_other_results_than_on_x86_64_are_a_warning():
    def look(backend):
        return Probe(backend=backend, version="1.0", digest="00", seconds=1.0, rss_mb=50.0)

    findings = diagnosis.runtimes(look)
    assert set(levels(findings)) == {"warning"}
    assert all("int8 differs from x86-64" in finding.words for finding in findings)


def test_where_no_runtime_is_installed_the_command_is_named(monkeypatch):
    monkeypatch.setattr(diagnosis, "installed", lambda _: False)
    finding = only(diagnosis.runtimes())
    assert (finding.level, "ensembler-edge[onnx]" in finding.cure) == ("error", True)


def doctor(tmp_path, *arguments, **fakes):
    """Runs ``ensembler doctor --json`` where these runtimes are replaced; returns status and findings by check."""
    for module, code in fakes.items():
        package = tmp_path / "fakes" / module
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "fakes"), *sys.path])}
    command = [sys.executable, "-m", "ensembler.cli", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    document = json.loads(done.stdout)
    return done.returncode, {finding["check"]: finding for finding in document["findings"]}


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_a_runtime_that_kills_its_process_is_survived_and_named_with_another(name, tmp_path):
    crash = f"import os, signal\nos.kill(os.getpid(), signal.{name})\n"
    status, found = doctor(tmp_path, onnxruntime=crash)
    assert found["onnxruntime"]["words"] == f"ended by {name}"
    assert "pip install ai-edge-litert" in found["onnxruntime"]["cure"]
    others = [backend for backend in BACKENDS if installed(backend) and backend != "onnxruntime"]
    assert (status, "runtimes" in found) == ((3, False) if others else (1, True))


def test_where_every_runtime_crashes_the_status_is_that_of_an_error(tmp_path):
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    status, found = doctor(tmp_path, onnxruntime=crash, ai_edge_litert=crash)
    assert found["runtimes"]["words"] == "no inference runtime works"
    assert status == 1


def test_tflite_runtime_beside_numpy_2_is_said(tmp_path):
    _, found = doctor(tmp_path, tflite_runtime="")
    assert "compiled for NumPy 1 and this is NumPy 2" in found["tflite-runtime"]["words"]


def test_a_runtime_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.01)
    assert probe.run("onnxruntime").failure == "no answer within 0.01 s"


def test_a_digest_is_known_for_every_runtime():
    assert ON_X86_64.keys() == BACKENDS.keys()


# --- bundle, key, server ---


@pytest.fixture
def private(tmp_path):
    """A bundle with the modes of an export; git keeps none."""
    folder = shutil.copytree(GOLDEN, tmp_path / "client")
    for path in folder.iterdir():
        path.chmod(0o600)
    return folder


def test_a_whole_bundle_is_said_to_be_so_with_the_runtime_that_it_gets(private):
    finding = only(diagnosis.bundle(private))
    assert finding.words.startswith("whole: ")
    assert "runs in " in finding.words


def test_a_bundle_that_others_can_read_is_a_warning(private):
    (private / "head.onnx").chmod(0o644)
    finding = only(diagnosis.bundle(private))
    assert (finding.level, "others can read head.onnx" in finding.words) == ("warning", True)


def test_a_damaged_bundle_is_an_error(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "client")
    (folder / "tail.onnx").write_bytes(b"")
    assert "tail.onnx is not the file that was exported" in only(diagnosis.bundle(folder)).words


def test_a_bundle_that_no_runtime_reads_is_an_error_with_the_install_command(tiny, monkeypatch):
    monkeypatch.setattr(diagnosis, "installed", lambda name: name != "onnxruntime")
    finding = only(diagnosis.bundle(tiny.client))
    assert (finding.level, finding.cure) == ("error", "pip install 'ensembler-edge[onnx]'")


def test_a_device_with_everything_right_ends_with_status_0(tiny, serve, tmp_path):
    with serve(tiny.server) as (endpoint, _):
        status, found = doctor(tmp_path, tiny.client, "--server", endpoint, "--timeout-ms", 60_000)
    assert found["server"]["words"].startswith("answers: ready, 3 nets in ")
    assert found["key"]["level"] == found["bundle"]["level"] == "ok"
    assert status in (0, 3)  # this machine may be hot


def test_a_missing_key_and_a_silent_server_are_errors(tiny, tmp_path):
    lonely = shutil.copytree(tiny.client, tmp_path / "client")
    status, found = doctor(tmp_path / "a", lonely, "--server", "tcp://127.0.0.1:9")
    assert (status, found["key"]["level"]) == (1, "error")
    assert "no device key" in found["key"]["words"]
    status, found = doctor(tmp_path / "b", tiny.client, "--server", "tcp://127.0.0.1:9", "--timeout-ms", 300)
    assert (status, found["server"]["level"]) == (1, "error")


def test_a_server_with_other_nets_is_an_error(tiny, serve, tmp_path):
    golden = GOLDEN.parent / "server_0"
    with serve(golden, "--plaintext") as (endpoint, _):
        _, found = doctor(tmp_path, tiny.client, "--server", endpoint, "--plaintext", "--timeout-ms", 60_000)
    assert found["server"]["words"] == "answers, and holds the nets of another bundle"


def test_a_server_without_its_bundle_is_refused(capsys):
    assert main(["doctor", "--server", "tcp://127.0.0.1:9"]) == 2
    assert "--server needs the client bundle too" in capsys.readouterr().err


def test_people_get_a_line_for_each_finding_and_its_cure_below(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "ok      board" in out
    assert "ERROR   bundle" in out
