"""A package that was built here, on emulated boards: it installs offline, predicts as x86-64 does, and goes cleanly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from boards import BOARDS, EmulatedBoard, boot, why_not
from PIL import Image

from ensembler.cli import main
from ensembler.export import packages, wheels
from ensembler.export.packages import Package
from ensembler.export.targets import TARGETS, Target

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ROOT = Path(__file__).resolve().parents[2]
DIGESTS = Path(__file__).with_name("digests.py")
LEGACY = Path(os.environ.get("ENSEMBLER_LEGACY_PYTHON", ROOT / ".venv-legacy" / "bin" / "python"))
PLACE, STATE = "etc/ensembler", "var/lib/ensembler-edge"
AS_SERVICE = ("setpriv", "--reuid=ensembler", "--regid=ensembler", "--init-groups")


@dataclass(frozen=True)
class Case:
    """A board, and what its package is built for."""

    board: str
    target: Target
    runtime: str
    with_bundle: bool = False  # inside the package


CASES = {
    case.board: case
    for case in (
        Case("pi4", TARGETS["rpi-arm64-bookworm"], "onnxruntime"),
        Case("pi5", TARGETS["rpi-arm64-trixie"], "ai-edge-litert"),
        Case("pi2", TARGETS["rpi-armhf-bookworm"], "tflite-runtime", with_bundle=True),
    )
}


@pytest.fixture(scope="session")
def bundle(tiny, tmp_path_factory) -> Path:
    """The tiny client in both formats, with the server's key pinned."""
    out = tmp_path_factory.mktemp("both") / "out"
    options = ["--format", "onnx", "--format", "tflite", "--server-bundle", str(tiny.server)]
    options += ["--server-key", str(tiny.keys / "server.key")]
    gates = ["--min-sqnr-db", "0", "--max-accuracy-drop", "100"]
    assert main(["export", str(tiny.run), "--out", str(out), *options, *gates, "--json"]) == 0
    return out / "client"


def build(case: Case, bundle: Path, out: Path) -> Package:
    return packages.build(case.target, bundle, out, runtime=case.runtime, include_bundle=case.with_bundle)


@pytest.fixture(scope="session")
def package(bundle, tmp_path_factory):
    """``package(case)`` returns the case's .deb, built once, and packed in a hurry."""
    built: dict[str, Package] = {}
    hurried = pytest.MonkeyPatch()
    hurried.setattr(packages, "COMPRESSION", "zstd:fastest")

    def of(case: Case) -> Package:
        if case.board not in built:
            out = tmp_path_factory.mktemp("packages")
            built[case.board] = build(case, bundle, out)
        return built[case.board]

    yield of
    hurried.undo()


@dataclass(frozen=True)
class Device:
    """A board with its package, bundle and key."""

    case: Case
    board: EmulatedBoard
    package: Package


def put(board: EmulatedBoard, source: Path, place: str, mode: int = 0o644) -> None:
    """Copies a file or folder from here onto the board."""
    target = board.root / place
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
        target.chmod(mode)


@pytest.fixture(scope="class")
def device(request, package, bundle, tiny, tmp_path_factory):
    """A class's board, with package, bundle and key."""
    case = CASES[request.cls.board]
    built = package(case)
    with boot(BOARDS[case.board], tmp_path_factory.mktemp(case.board)) as board:
        put(board, built.path, "srv/package.deb")
        board.run("dpkg", "-i", "/srv/package.deb", network=False, check=True, timeout_s=280)
        if not case.with_bundle:
            put(board, bundle, "srv/client")
            board.run("ensembler", "install-bundle", "/srv/client", "--owner", "ensembler", network=False, check=True)
            board.run("rm", "-r", "/srv/client", check=True)
        put(board, tiny.keys / "device.key_secret", f"{PLACE}/device.key_secret", 0o600)
        board.run("chown", "ensembler", f"/{PLACE}/device.key_secret", check=True)
        put(board, DIGESTS, "srv/digests.py")
        yield Device(case, board, built)


def python_with(runtime: str) -> str:
    """Returns the interpreter of this machine that has the same version of a runtime."""
    if runtime != "tflite-runtime":
        return sys.executable
    if not LEGACY.exists():
        pytest.skip(f"no tflite-runtime to compare with; make test-legacy makes {LEGACY}")
    return str(LEGACY)


def on_x86_64(bundle: Path, runtime: str) -> dict[str, str]:
    """Returns the digests of this machine."""
    command = [python_with(runtime), str(DIGESTS), str(bundle), runtime]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def saved(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path)


class OnABoard:
    """What holds on each board; with several processes of pytest (--dist loadscope) each board is one process's."""

    board: str

    def test_head_and_tail_are_bit_identical_to_x86_64(self, device, bundle):
        command = ("ensembler-python", "/srv/digests.py", f"/{PLACE}/client", device.case.runtime)
        done = device.board.run(*AS_SERVICE, *command, network=False, check=True)
        assert json.loads(done.stdout) == on_x86_64(bundle, device.case.runtime)

    def test_a_runtime_that_the_package_has_not_is_bit_identical_too(self, device, bundle, tmp_path):
        case, board = device.case, device.board
        for runtime in [name for name in case.target.runtimes if name != case.runtime]:
            (tmp_path / runtime).mkdir()
            wheels.fetch(case.target, runtime, tmp_path / runtime)
            wheels.unpack(case.target, tmp_path / runtime, board.root / "srv" / runtime)
            put(board, bundle, f"srv/client-{runtime}")
            path = f"PYTHONPATH=/opt/ensembler-edge/site:/srv/{runtime}"
            command = ("python3", "/srv/digests.py", f"/srv/client-{runtime}", runtime)
            done = board.run("env", path, *command, network=False, check=True)
            assert json.loads(done.stdout) == on_x86_64(bundle, runtime)

    def test_the_doctor_knows_the_board_and_finds_nothing_that_stops_it(self, device):
        done = device.board.run(*AS_SERVICE, "ensembler", "doctor", f"/{PLACE}/client", "--json", network=False)
        findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert done.returncode == 0, done.stdout
        assert device.board.board.model in findings["board"]["words"]
        assert "int8 as on x86-64" in findings[device.case.runtime]["words"]
        assert findings["bundle"]["level"] == "ok"

    def test_an_application_predicts_over_an_encrypted_connection_as_on_x86_64(
        self, device, bundle, tiny, tiny_images, serve
    ):
        saved(tiny_images[0], device.board.root / "srv/image.png")
        program = (
            "import json, sys; from ensembler import EdgeClient\n"
            "bundle, server, key, backend, image = sys.argv[1:]\n"
            "with EdgeClient(bundle, server, key=key, backend=backend, timeout_ms=60000) as client:\n"
            "    answer = client.predict(image)\n"
            "    print(json.dumps([answer.label, answer.logits.tolist(), answer.bytes_up]))"
        )
        with serve(tiny.server, "--key", str(tiny.keys / "server.key_secret")) as (endpoint, _):
            arguments = (
                f"/{PLACE}/client",
                endpoint,
                f"/{PLACE}/device.key_secret",
                device.case.runtime,
                "/srv/image.png",
            )
            there = device.board.run(*AS_SERVICE, "ensembler-python", "-c", program, *arguments, check=True)
            key = tiny.keys / "device.key_secret"
            image = device.board.root / "srv/image.png"
            arguments = (str(bundle), endpoint, str(key), device.case.runtime, str(image))
            here = subprocess.run(
                [python_with(device.case.runtime), "-c", program, *arguments], capture_output=True, text=True
            )
        assert here.returncode == 0, here.stderr
        assert json.loads(there.stdout) == json.loads(here.stdout)

    def test_the_service_answers_what_arrives_in_its_folder(self, device, tiny, tiny_images, serve):
        """The unit's own command with the unit's own configuration, by its user; no systemd runs on the board."""
        root = device.board.root
        for index in range(3):
            saved(tiny_images[index], root / STATE / "inbox" / f"{index}.png")
        with serve(tiny.server, "--key", str(tiny.keys / "server.key_secret")) as (endpoint, _):
            config = root / PLACE / "edge.conf"
            config.write_text(config.read_text().replace("tcp://server.example:5555", endpoint))
            unit = (root / "lib/systemd/system/ensembler-edge.service").read_text()
            (start,) = [line.removeprefix("ExecStart=") for line in unit.splitlines() if line.startswith("ExecStart=")]
            script = f"set -a; . /{PLACE}/edge.conf; set +a; timeout --signal TERM 240 {start} & pid=$!\n"
            # Nothing on the board looks again and again: an emulated shell that forks hundreds of times may hang.
            script += "read _ < /srv/enough; kill -TERM $pid; wait $pid"
            os.mkfifo(root / "srv/enough")
            (root / "srv/enough").chmod(0o644)
            results_file = root / STATE / "results.jsonl"
            with ThreadPoolExecutor(1) as pool, (root / "srv/enough").open("r+b", buffering=0) as enough:
                running = pool.submit(device.board.run, *AS_SERVICE, "sh", "-c", script, timeout_s=250)
                deadline = time.monotonic() + 230
                while time.monotonic() < deadline and not running.done():
                    if results_file.exists() and results_file.read_bytes().count(b"\n") == 3:
                        break
                    wait([running], timeout=0.2)
                enough.write(b"\n")
                done = running.result()
        assert done.returncode == 0, done.stderr
        results = [json.loads(line) for line in results_file.read_text().splitlines()]
        assert sorted(Path(result["name"]).name for result in results) == ["0.png", "1.png", "2.png"]
        assert all(result["label"] for result in results)

    def test_the_bundle_and_its_key_are_the_services_alone(self, device):
        listed = device.board.run("find", f"/{PLACE}/bundles", f"/{PLACE}/device.key_secret", "-printf", "%u %m %y\n")
        assert set(listed.stdout.split("\n")) <= {"ensembler 600 f", "ensembler 700 d", "root 755 d", ""}
        assert "ensembler 600 f" in listed.stdout
        refused = device.board.run(
            "setpriv", "--reuid=nobody", "--clear-groups", "cat", f"/{PLACE}/client/manifest.json"
        )
        assert "Permission denied" in refused.stderr
        inside = device.board.root / "opt/ensembler-edge/bundle"
        assert inside.exists() == device.case.with_bundle
        if device.case.with_bundle:
            assert device.package.path.stat().st_mode & 0o777 == 0o600
            assert {path.stat().st_mode & 0o777 for path in inside.iterdir()} == {0o600}
            assert inside.stat().st_mode & 0o777 == 0o700

    def test_the_bundle_before_comes_back(self, device, bundle, tmp_path):
        other = shutil.copytree(bundle, tmp_path / "client")
        manifest = other / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"red"', '"rot"'))
        put(device.board, other, "srv/other")
        before = (device.board.root / PLACE / "client").readlink()
        board = device.board
        board.run("ensembler", "install-bundle", "/srv/other", "--owner", "ensembler", network=False, check=True)
        assert (board.root / PLACE / "client").readlink() != before
        board.run("ensembler", "install-bundle", "--rollback", network=False, check=True)
        assert (board.root / PLACE / "client").readlink() == before

    def test_a_package_leaves_nothing_behind(self, device):
        board = device.board
        board.run("dpkg", "--purge", "ensembler-edge", network=False, check=True)
        for place in ("opt/ensembler-edge", PLACE, STATE, "usr/bin/ensembler", "usr/bin/ensembler-python"):
            assert not os.path.lexists(board.root / place), place
        assert "ensembler" not in (board.root / "etc/passwd").read_text()


class TestOnPi4(OnABoard):
    board = "pi4"


class TestOnPi5(OnABoard):
    board = "pi5"


class TestOnPi2(OnABoard):
    board = "pi2"


class TestOn64Bits:
    """What is shown on one board."""

    @pytest.mark.parametrize(
        ("other", "says"),
        [("pi5", "python3 (>= 3.13)"), ("pi2", "package architecture (armhf) does not match system (arm64)")],
    )
    def test_a_package_for_another_release_or_architecture_is_refused_in_words(self, other, says, package, tmp_path):
        with boot(BOARDS["pi4"], tmp_path / "board") as board:
            put(board, package(CASES[other]).path, "srv/other.deb")
            done = board.run("dpkg", "-i", "/srv/other.deb", network=False)
            assert done.returncode != 0
            assert says in done.stderr
            assert board.run("dpkg-query", "--show", "--showformat", "${Status}", "ensembler-edge").stdout in (
                "",
                "install ok unpacked",
            )


class TestOn32Bits:
    """The same, where the package is small."""

    def test_an_archive_of_wheels_installs_offline_into_a_place_of_its_own(self, bundle, tmp_path):
        case = CASES["pi2"]
        built = packages.build(case.target, bundle, tmp_path / "out", kind="wheelhouse")
        with boot(BOARDS["pi2"], tmp_path / "board") as board:
            put(board, built.path, "srv/package.tar.gz")
            board.run("tar", "-C", "/srv", "-xf", "/srv/package.tar.gz", check=True)
            stem = built.path.name.removesuffix(".tar.gz")
            script = f"/srv/{stem}/install.sh"
            done = board.run("sh", script, network=False, check=True, timeout_s=280)
            assert "next: /usr/local/bin/ensembler doctor" in done.stdout
            board.run("/usr/local/bin/ensembler-python", "-c", "import ensembler, tflite_runtime", check=True)
            told = board.run("/usr/local/bin/ensembler", "doctor", "--json", network=False, timeout_s=240)
            words = [finding["words"] for finding in json.loads(told.stdout)["findings"]]
            assert any("int8 as on x86-64" in text for text in words), words
            # A damaged wheel is found before anything is touched.
            (wheel,) = (board.root / f"srv/{stem}/wheels").glob("tflite*")
            wheel.write_bytes(wheel.read_bytes()[:-1] + b"?")
            done = board.run("sh", script, network=False)
            assert done.returncode == 1
            assert "a file is damaged" in done.stderr
            assert board.run("/usr/local/bin/ensembler", "--version", network=False).returncode == 0

    def test_a_full_disk_leaves_nothing_half_installed(self, package, tmp_path):
        case = CASES["pi2"]
        with boot(BOARDS["pi2"], tmp_path / "board") as board:
            put(board, package(case).path, "srv/package.deb")
            small = board.root / "opt"
            small.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
            try:
                done = board.run("dpkg", "-i", "/srv/package.deb", network=False)
                assert done.returncode != 0
                assert "No space left on device" in done.stderr
                assert [path for path in small.rglob("*") if path.is_file()] == []
            finally:
                subprocess.run(["umount", str(small)], check=True)
            assert not (board.root / "usr/bin/ensembler").exists()

    def test_the_same_input_gives_the_same_package(self, package, bundle, tmp_path):
        case = CASES["pi2"]
        again = build(case, bundle, tmp_path / "again")
        assert again.sha256 == package(case).sha256
        assert again.sha256 == hashlib.sha256(again.path.read_bytes()).hexdigest()
