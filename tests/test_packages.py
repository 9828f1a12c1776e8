"""What a board's package is made of; that it installs and runs there is shown in tests/arm."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ensembler.cli import main
from ensembler.edge_runtime.backends import BACKENDS
from ensembler.export import packages, targets, wheels
from ensembler.export.targets import TARGETS
from ensembler.protocol.errors import ConfigError, ExportError, MissingExtraError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
ARM64, ARMHF = TARGETS["rpi-arm64-bookworm"], TARGETS["rpi-armhf-bookworm"]
PAIRS = [(target, runtime) for target in TARGETS.values() for runtime in target.runtimes]


def pins_of(target, runtime):
    lines = target.pins(runtime).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(("target", "runtime"), PAIRS)
def test_every_wheel_of_a_package_is_pinned_with_the_digest_of_its_file(target, runtime):
    pins = pins_of(target, runtime)
    assert all(re.fullmatch(r"[\w.\-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in pins)
    versions = dict(line.split()[0].split("==") for line in pins)
    assert runtime in versions
    for wheel in target.wheels:
        assert re.split("[<>=]", wheel)[0] in versions


@pytest.mark.parametrize(("target", "runtime"), PAIRS)
def test_a_runtime_on_a_board_is_the_one_whose_int8_was_compared(target, runtime):
    known = "legacy" if runtime == "tflite-runtime" else "main"
    pinned = (ROOT / "constraints" / f"{known}.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in pins_of(target, runtime) if line.startswith(f"{runtime}==")] == [
        line for line in pinned if line.startswith(f"{runtime}==")
    ]


def test_bookworm_gets_the_numpy_that_its_own_modules_are_compiled_for():
    for runtime in ARM64.runtimes:
        (numpy,) = [line for line in pins_of(ARM64, runtime) if line.startswith("numpy==")]
        assert numpy.startswith("numpy==1.")


def test_the_runtime_is_the_one_that_reads_the_bundles_default():
    assert targets.runtime_for(ARM64, ["onnx"]) == "onnxruntime"
    assert targets.runtime_for(ARM64, ["tflite", "onnx"]) == "ai-edge-litert"
    assert targets.runtime_for(ARM64, ["tflite", "onnx"], "onnxruntime") == "onnxruntime"
    assert targets.runtime_for(ARMHF, ["onnx", "tflite"]) == "tflite-runtime"


@pytest.mark.parametrize(
    ("target", "formats", "wanted", "says"),
    [
        (ARMHF, ["onnx"], None, "export it with --format tflite"),
        (ARM64, ["onnx"], "ai-edge-litert", "export it with --format tflite"),
        (ARMHF, ["tflite"], "onnxruntime", "rpi-armhf-bookworm has tflite-runtime"),
        (ARM64, ["onnx"], "nothing", "has onnxruntime, ai-edge-litert"),
    ],
)
def test_a_bundle_for_a_runtime_that_the_board_has_not_is_refused(target, formats, wanted, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        targets.runtime_for(target, formats, wanted)


def test_the_same_installation_gives_the_same_wheel(tmp_path):
    digests = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        digests.add(hashlib.sha256(wheels.own(tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_devices_wheel_runs_its_verbs_without_what_stays_at_home(tmp_path):
    with zipfile.ZipFile(wheels.own(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    assert not (tmp_path / "site" / "ensembler" / "training").exists()
    for arguments, status, says in (
        (["doctor", "--json"], (0, 3), '"worst"'),
        (["predict", "nowhere", "x.jpg", "--server", "tcp://127.0.0.1:1"], (2, 1), "nowhere"),
        (["train", "--data", "demo", "--arch", "resnet10_slim", "--out", "x"], (1,), "ensembler-edge[train]"),
        (["export", "x", "--out", "y"], (1,), "ensembler-edge[export]"),
        (["audit", "x", "--out", "y"], (1,), "ensembler-edge["),
    ):
        # First its folder, so that the package under test is not the checkout's; torch as on a device: not there.
        program = (
            "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.modules['torch'] = None; sys.meta_path[:] = "
            "[f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', type(f).__name__).lower()]; "
            "from ensembler.cli import main; sys.exit(main())"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, str(tmp_path / "site"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode in status, done.stderr
        assert says in done.stdout + done.stderr


def test_a_wheel_that_is_not_there_is_an_error_with_its_cure(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="--wheels FOLDER takes them from a folder"):
        wheels.fetch(ARMHF, "tflite-runtime", tmp_path / "out", tmp_path / "empty")


def test_what_pip_is_told_elsewhere_does_not_change_a_package(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    wheels.own(tmp_path / "wheels")
    for name in ("PIP_ROOT", "PIP_PREFIX", "PIP_TARGET"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_DRY_RUN", "1")
    wheels.unpack(ARM64, tmp_path / "wheels", tmp_path / "site")
    assert (tmp_path / "site" / "ensembler" / "client.py").is_file()


def test_the_licence_comes_along(tmp_path):
    wheels.own(tmp_path)
    (own,) = wheels.licences(tmp_path)
    assert (own.name, own.licence) == ("ensembler-edge", "Apache-2.0")
    assert [Path(name).name for name in own.files] == ["LICENSE"]


def test_without_the_packager_nothing_is_fetched_and_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingExtraError, match=re.escape("ensembler-edge[package]")):
        packages.build(ARM64, GOLDEN / "v1" / "client", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_package_leaves_nothing_behind(tmp_path):
    (tmp_path / "empty").mkdir()
    bundle = GOLDEN / "v1" / "client"
    with pytest.raises(ExportError):
        packages.build(ARM64, bundle, tmp_path / "out", source=tmp_path / "empty")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "rpi-arm64-sarge"], "there is rpi-arm64-bookworm"),
        (["--package", "wheelhouse"], "--package goes with --target"),
        (["--include-bundle"], "--include-bundle goes with --target"),
        ([], "is a bundle and no run"),
        (["--target", "rpi-armhf-bookworm"], "export it with --format tflite"),
        (["--target", "rpi-arm64-bookworm", "--wheels", "nowhere"], "--wheels nowhere is not a folder"),
        (["--target", "rpi-arm64-bookworm", "--require-ssim", "0.3"], "is a bundle, and packed as it is"),
        (["--target", "rpi-arm64-bookworm", "--encrypt-key", "k"], "is a bundle, and packed as it is"),
        (["--target", "rpi-arm64-trixie", "--runtime", "tflite-runtime"], "has onnxruntime, ai-edge-litert"),
    ],
)
def test_a_wrong_option_is_said_before_anything_is_fetched(arguments, says, tmp_path, capsys):
    bundle = GOLDEN / "v1" / "client"
    assert main(["export", str(bundle), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_boards_in_the_help_are_those_that_there_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # else the names are broken at their hyphens
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert ", ".join(TARGETS) in " ".join(capsys.readouterr().out.split())


def test_every_runtime_of_a_board_is_known():
    assert {runtime for target in TARGETS.values() for runtime in target.runtimes} <= set(BACKENDS)


class TestAnArchive:
    """A wheelhouse of fake wheels: its shape, without a download."""

    @pytest.fixture
    def built(self, tmp_path, monkeypatch):
        def fetch(target, runtime, folder, source):
            with zipfile.ZipFile(folder / "other-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr(zipfile.ZipInfo("other.py", wheels.ZIP_DATE), "x = 1\n")
                archive.writestr(
                    zipfile.ZipInfo("other-1.0.dist-info/METADATA", wheels.ZIP_DATE),
                    "Metadata-Version: 2.1\nName: other\nVersion: 1.0\nLicense-Expression: MIT\n",
                )
                archive.writestr(zipfile.ZipInfo("other-1.0.dist-info/licenses/LICENSE", wheels.ZIP_DATE), "free\n")

        monkeypatch.setattr(wheels, "fetch", fetch)
        bundle = GOLDEN / "v1" / "client"

        def build(name, **options):
            return packages.build(ARM64, bundle, tmp_path / name, kind="wheelhouse", **options)

        return build

    def unpacked(self, archive, folder):
        """The one folder inside, unpacked as on a board."""
        folder.mkdir()
        subprocess.run(["tar", "--extract", "--file", archive, "--directory", folder], check=True)
        (place,) = folder.iterdir()
        return place

    def test_the_same_input_gives_the_same_bytes(self, built):
        assert built("first").sha256 == built("second").sha256

    def test_its_files_have_the_digests_that_it_states(self, built, tmp_path):
        place = self.unpacked(built("out").path, tmp_path / "x")
        assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=place).returncode == 0
        stated = {line.split()[1] for line in (place / "SHA256SUMS").read_text().splitlines()}
        there = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        assert there - stated == {"SHA256SUMS", "install.sh"}
        assert "other 1.0: MIT" in (place / "LICENCES.txt").read_text()
        assert not re.search("@[A-Z]+@", (place / "install.sh").read_text())

    def test_the_secret_bundle_is_inside_only_on_request_and_the_file_is_then_the_owners_alone(self, built):
        plain, secret = built("plain"), built("secret", include_bundle=True)
        for package, holds in ((plain, False), (secret, True)):
            with tarfile.open(package.path) as archive:
                inside = {member.name: member.mode for member in archive if "/bundle/" in member.name}
            assert bool(inside) == holds
            assert all(mode == 0o600 for mode in inside.values())
        assert plain.path.stat().st_mode & 0o777 == 0o644
        assert secret.path.stat().st_mode & 0o777 == 0o600

    def test_it_is_refused_by_another_board_in_words(self, built, tmp_path):
        place = self.unpacked(built("out").path, tmp_path / "x")
        done = subprocess.run(["sh", str(place / "install.sh"), str(tmp_path / "home")], capture_output=True, text=True)
        assert done.returncode == 1
        assert "this is for arm64" in done.stderr
        assert not (tmp_path / "home").exists()
