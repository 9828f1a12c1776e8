"""The steps of deploy/Dockerfile, run one by one without Docker; `make test-image`.

What an engine does between the steps is done by hand: each stage gets a fresh virtual environment instead of the base
image's Python, the first a copy of what .dockerignore admits. What is not tried: the base image, the other user, the
read-only root.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.timeout(1200)  # it downloads and installs what an image holds


def steps():
    """Returns the RUN lines of each stage, without their mounts."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    return [
        [re.sub(r"--mount=\S+ +", "", line) for line in re.findall(r"^RUN +(.*)$", stage, flags=re.MULTILINE)]
        for stage in stages
    ]


def context(folder):
    """Copies what .dockerignore admits."""
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split():
        if line.startswith("!"):
            source, target = ROOT / line[1:], folder / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The virtual environment that stands for the last stage's Python."""
    folder = tmp_path_factory.mktemp("image")
    context(folder / "source")
    (folder / "wheels").mkdir()
    for number, lines in enumerate(steps()):
        python = folder / f"stage{number}"
        subprocess.run([sys.executable, "-m", "venv", str(python)], check=True)
        path = f"{python / 'bin'}:{os.environ['PATH']}"
        for line in lines:
            command = line.replace("/wheels", str(folder / "wheels"))
            done = subprocess.run(
                ["sh", "-ec", command],
                cwd=folder / "source",
                env=os.environ | {"PATH": path, "VIRTUAL_ENV": str(python)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    return python


def test_the_image_has_the_server_and_neither_torch_nor_what_builds(image):
    listed = subprocess.run([image / "bin" / "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    names = {line.split("==")[0].lower() for line in listed.split()}
    assert {"ensembler-edge", "onnxruntime", "pyzmq", "numpy", "msgpack"} <= names
    assert names.isdisjoint({"torch", "onnx", "onnxscript", "matplotlib", "build", "pytest"})


def test_everything_in_the_image_is_pinned(image):
    listed = subprocess.run([image / "bin" / "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    pins = (ROOT / "constraints" / "main.txt").read_text(encoding="utf-8").lower().split("\n")
    ours = {"ensembler-edge", "pip", "setuptools"}  # the last two come with the base image's Python
    found = [line.lower() for line in listed.split() if line.split("==")[0].lower() not in ours]
    assert {line.replace("-", "_") for line in found} <= {line.replace("-", "_") for line in pins}


def health_check(image, address):
    """Runs the image's own HEALTHCHECK, of a server at another address; returns its exit status."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    program, *arguments = json.loads(re.search(r"^ +CMD (\[.*\])$", text, flags=re.MULTILINE)[1])
    command = [image / "bin" / program, *(word.replace("127.0.0.1:8080", address) for word in arguments)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode


def test_the_image_serves_a_bundle_in_health_and_drains(image):
    bundle = ROOT / "tests" / "golden" / "v1" / "server_0"
    command = [image / "bin" / "ensembler", "serve", bundle, "--bind", "tcp://127.0.0.1:*", "--plaintext"]
    command += ["--http", "127.0.0.1:0", "--log", "json", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = json.loads(process.stdout.readline())["http"]
        assert health_check(image, address) == 0
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert health_check(image, address) != 0


def test_the_image_knows_serves_options(image):
    done = subprocess.run([image / "bin" / "ensembler", "serve", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--authorized" in done.stdout
