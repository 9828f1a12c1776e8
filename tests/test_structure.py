"""The lines that docs/design.md draws: who may import whom, what a device needs, what a wheel holds."""

from __future__ import annotations

import ast
import configparser
import importlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import ensembler

ROOT = Path(__file__).resolve().parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PACKAGES = SETUP["options"]["packages"].split()
FOLDERS = {
    name.strip(): folder.strip()
    for name, folder in (line.split("=") for line in SETUP["options"]["package_dir"].strip().splitlines())
}

# What each package may import of ours. The public face, "ensembler" itself, may import everything, and nobody it.
ALLOWED = {
    "protocol": set(),
    "transport": {"protocol"},
    "edge_runtime": {"protocol"},
    "cloud_runtime": {"protocol", "transport"},
    "training": {"protocol"},
    "export": {"protocol", "edge_runtime", "training"},
    "privacy": {"protocol", "edge_runtime", "training"},
    "crypto": {"protocol", "transport", "training", "export"},
}
# What runs on a device may import of others.
ALLOWED_ELSEWHERE = {
    "protocol": {"numpy", "msgpack"},
    "transport": {"zmq"},
    "edge_runtime": {"numpy", "onnxruntime", "PIL", "ai_edge_litert", "tflite_runtime", "cryptography"},
}


def modules(package):
    """Yields (import name, path) of the modules right in a package's folder."""
    for path in sorted((ROOT / FOLDERS[package]).glob("*.py")):
        yield package if path.stem == "__init__" else f"{package}.{path.stem}", path


MODULES = dict(item for package in PACKAGES for item in modules(package))


def imports(path):
    """Returns the absolute names of everything that a module imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(name):
    """Returns which of our packages an imported name is in: ``protocol``, ..., or ``ensembler`` for the public face."""
    if name.split(".")[0] != "ensembler":
        return None
    return next((part for part in ALLOWED if f"{name}.".startswith(f"ensembler.{part}.")), "ensembler")


def python(code, *arguments, **options):
    """Runs ``code`` in a fresh interpreter where warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


# --- who may import whom ---


def test_every_package_has_its_line_in_the_table():
    assert {name.split(".")[1] for name in PACKAGES if name.count(".")} - {"cli"} <= ALLOWED.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_what_its_package_may(name):
    used = {part_of(imported) for imported in imports(MODULES[name])} - {None}
    own = part_of(name)
    if own != "ensembler":
        assert used <= ALLOWED[own] | {own}


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) in ALLOWED_ELSEWHERE])
def test_a_module_of_the_device_imports_few_packages_of_others(name):
    used = {imported.split(".")[0] for imported in imports(MODULES[name])} - set(sys.stdlib_module_names)
    assert used <= ALLOWED_ELSEWHERE[part_of(name)] | {"ensembler"}


def test_the_rules_would_notice():
    assert part_of("ensembler.export.graphs") == "export"
    assert part_of("ensembler.client.EdgeClient") == part_of("ensembler.__version__") == "ensembler"
    assert part_of("torch.nn") is None
    found = set().union(*(imports(path) for path in MODULES.values()))
    assert {"ensembler.protocol.errors.ConfigError", "torch", "zmq", "PIL.Image"} <= found


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name):
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring.splitlines()[0]) > 20


# --- the device ---

BLOCKED = ("torch", "onnx", "PIL", "rich", "safetensors", "onnxscript", "skimage", "scipy", "sympy", "cryptography")
DEVICE = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is not on a device")
sys.meta_path.insert(0, Blocker())
from pathlib import Path
import numpy as np
import ensembler, ensembler.async_client
import ensembler.client, ensembler.prediction, ensembler.transport.zmq_client, ensembler.cli.predict
from ensembler.edge_runtime.images import to_pixels
from ensembler.edge_runtime.runtime import EdgeRuntime
runtime = EdgeRuntime(Path(sys.argv[1]))
image = runtime.manifest.image
pixels = to_pixels(np.zeros((image.height, image.width, 3), np.uint8), image)
codes = runtime.encode(np.stack([pixels, pixels]))
wire = runtime.manifest.wire
logits = runtime.finish(np.zeros((2, wire.num_nets, wire.answer_width), np.uint8))
client = ensembler.EdgeClient(sys.argv[1], "tcp://127.0.0.1:9", plaintext=True)
client.info()
client.close()
print(codes.shape == (2, *wire.feature_shape), logits.shape == (2, len(runtime.manifest.labels)))
print(*sorted(name for name in {BLOCKED!r} if sys.modules.get(name)))
"""


def test_a_device_needs_none_of_the_training_packages(tiny):
    done = python(DEVICE, tiny.client)
    assert (done.stdout, done.stderr) == ("True True\n\n", "")


def test_importing_the_package_loads_nothing_of_it():
    code = "import sys, ensembler; print(*sorted(name for name in sys.modules if name.split('.')[0] in sys.argv[1:]))"
    done = python(code, "ensembler", "numpy", "zmq", "torch", "onnxruntime")
    assert (done.stdout, done.stderr) == ("ensembler\n", "")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "ensembler.cli.__main__"])
def test_every_module_can_be_imported(name):
    assert importlib.import_module(name).__name__ == name


REFUSED = """
import importlib, sys
sys.path.insert(0, "")
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""


def test_a_folder_under_its_bare_name_is_refused():
    # It would be a second copy: its errors would not be caught, its classes not match.
    names = [name for name in PACKAGES if name.count(".") < 2 and name != "ensembler.cli"]
    done = python(REFUSED, *(FOLDERS[name] for name in names), cwd=ROOT)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"import {name}, not {FOLDERS[name]}")


# --- the public names ---


def test_the_public_names_are_these():
    names = ["AsyncEdgeClient", "ClientInfo", "EdgeClient", "EnsemblerError", "Prediction", "ReplicaStatistics"]
    assert ensembler.__all__ == [*names, "Timings", "__version__"]
    assert dir(ensembler) == sorted(ensembler.__all__)


@pytest.mark.parametrize("name", ensembler.__all__)
def test_every_public_name_is_there(name):
    value = getattr(ensembler, name)
    assert value is getattr(ensembler, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ensembler' has no attribute 'EdgeCleint'"):
        _ = ensembler.EdgeCleint
    assert not hasattr(ensembler, "torch")


def test_from_ensembler_import_star_gives_the_public_names():
    done = python("from ensembler import *; print(EdgeClient.__name__, Timings.__name__, __version__)")
    assert (done.stdout, done.stderr) == (f"EdgeClient Timings {ensembler.__version__}\n", "")


# --- packaging ---


def package_folders():
    """Returns the folders, relative to the root, that are packages: those with ``__init__.py``, and theirs."""
    tops = [path for path in ROOT.iterdir() if (path / "__init__.py").is_file() and path.name != "build"]
    return {str(init.parent.relative_to(ROOT)) for top in tops for init in top.rglob("__init__.py")}


def test_setup_cfg_lists_every_package_once():
    assert sorted(PACKAGES) == sorted(set(PACKAGES))
    assert {FOLDERS[name] for name in PACKAGES} == package_folders()


def test_setup_cfg_maps_every_package_to_the_folder_of_its_name():
    assert list(FOLDERS) == PACKAGES
    for name, folder in FOLDERS.items():
        if name == "ensembler" or name.startswith("ensembler.cli"):
            assert folder == name.replace("ensembler", "sdk", 1).replace(".", "/")
        else:
            assert folder == name.removeprefix("ensembler.").replace(".", "/")


def test_the_console_scripts_are_functions():
    scripts = {point.name: point for point in entry_points(group="console_scripts") if point.dist}
    ours = {name: point for name, point in scripts.items() if point.dist.name == "ensembler-edge"}
    assert ours.keys() == {"ensembler", "ensembler-export"}
    assert all(callable(point.load()) for point in ours.values())


DATA = {"py.typed", "probe.onnx", "probe.tflite"}
DATA_FOLDERS = {"ensembler.export": "board"}


def files_of_packages():
    """Returns {path below ensembler/: content} of what the packages hold."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in (ROOT / folder).iterdir():
            if path.is_file() and (path.suffix == ".py" or path.name in DATA):
                found[f"{name.replace('.', '/')}/{path.name}"] = path.read_bytes()
        if name in DATA_FOLDERS:
            data = (ROOT / folder / DATA_FOLDERS[name]).rglob("*")
            found |= {f"ensembler/{path.relative_to(ROOT)}": path.read_bytes() for path in data if path.is_file()}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: leftovers in the checkout's own build folder would end up in it."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "source")
        elif (path / "__init__.py").is_file() or path.name in ("tests", "tools", "benchmarks", "examples", "docs"):
            shutil.copytree(path, folder / "source" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_what_the_editable_install_runs(wheel):
    inside = {name: content for name, content in wheel.items() if name.startswith("ensembler/")}
    assert inside == files_of_packages()
    assert "ensembler/py.typed" in inside


def test_the_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel} == {"ensembler", f"ensembler_edge-{ensembler.__version__}.dist-info"}


def test_the_wheel_needs_no_training_package_unless_asked(wheel):
    (name,) = [name for name in wheel if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel[name].decode())
    plain = {re.split(r"[<>=!~ ]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert plain == {"msgpack", "numpy", "pyzmq"}
    assert {"onnx", "image", "cloud", "train", "export", "demo", "dev"} <= set(metadata.get_all("Provides-Extra"))


# --- what is in the repository ---


def tracked_files():
    """Yields (path, content) of the files that git tracks."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git does not read this checkout: {done.stderr}")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():  # a file may be removed and not yet committed
            yield name, (ROOT / name).read_bytes()


def test_no_tracked_file_names_this_machine():
    home = pwd.getpwuid(os.getuid()).pw_dir
    places = {str(ROOT), sys.prefix, f"{home}/"}
    # A path of one component ("/app") is an ordinary word in many texts.
    patterns = [re.compile(rb"(?<![\w.])" + re.escape(place.encode())) for place in places if len(place) > 4]
    found = [(name, p.pattern) for name, content in tracked_files() for p in patterns if p.search(content)]
    assert found == []


def test_no_tracked_file_holds_a_secret():
    patterns = [
        rb"secret-key\s*=\s*\"[^\"]{40}\"",  # ZeroMQ's certificates
        rb"BEGIN [A-Z ]*PRIVATE" + rb" KEY",
        rb"AKIA[0-9A-Z]{16}",
        rb"gh[pousr]_[A-Za-z0-9]{36}",
        rb"hf_[A-Za-z0-9]{30}",
        rb"xox[bp]-[0-9A-Za-z-]{20}",
        rb"\bsk-[A-Za-z0-9]{32}",
    ]
    names, found = [], []
    for name, content in tracked_files():
        names.append(name)
        found += [(name, pattern) for pattern in patterns if re.search(pattern, content)]
    assert found == []
    # The golden bundles are nets of noise that were trained to be published, the probe is of random weights.
    kinds = (".key_secret", "secret.json", ".safetensors", ".onnx", ".tflite", ".pem")
    known = ("tests/golden/", "edge_runtime/probe.")
    assert not [name for name in names if name.endswith(kinds) and not name.startswith(known)]
