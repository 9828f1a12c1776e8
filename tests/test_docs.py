"""Every snippet of the documents runs, in the order in which a reader meets them."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fake_picamera2
import numpy as np
import pytest
from PIL import Image
from test_sealing import BY_KEY, BY_PASSPHRASE, KEY, PASSPHRASE, sealed

from ensembler.cli import main
from ensembler.client import EdgeClient
from ensembler.edge_runtime import sealing
from ensembler.export.targets import TARGETS
from ensembler.protocol.manifest import of_crypto

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
]
# Their snippets train, export or build many times.
SLOW = ("crypto.md", "ml-engineer.md", "privacy-audit.md", "privacy-presets.md", "raspberry-pi.md")
# Trainings in documents are shortened; what comes last on a command line counts.
BRIEF = ["--epochs", "1", "--batch-size", "16"]
OPEN_GATES = ["--min-sqnr-db", "0", "--max-accuracy-drop", "100"]
ADDRESS = re.compile(r"tcp://(?:127\.0\.0\.1|0\.0\.0\.0|cloud|host)[\w.\-]*:\d+")

# They run until somebody ends them, or for minutes; tests/test_examples.py does.
LONG_EXAMPLES = ("watch_folder.py", "camera.py", "web_app.py", "security_ladder.py")

OWN_NET = """
from torch import nn

def detector(num_classes):
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)
    )
    net = nn.Sequential()
    net.add_module("features", features)
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(8, num_classes))
    return net
"""


def snippets(path):
    """Yields (language, first line's number, text) of a document's fenced blocks."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield found[1], text[: found.start()].count("\n") + 2, found[2]


def lines_of(script):
    """Yields the commands of a shell snippet, without comments."""
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def at_home(word):
    return str(Path(word).expanduser()) if word.startswith("~") else word


def insecure(bundle: Path) -> list[str]:
    """Returns what a verb needs beside a bundle of crypto-clear inference here."""
    return ["--insecure-engine"] if of_crypto(bundle) else []


class Reader:
    """Somebody who pastes one document's snippets into a fresh folder, one after the other."""

    def __init__(self, folder: Path, tiny, endpoint: str, serve, audit_images: str) -> None:
        self.folder = folder
        self.tiny = tiny
        self.endpoint = endpoint
        self.serve = serve
        self.audit_images = audit_images
        home = Path(os.environ["HOME"])
        shutil.rmtree(home / ".config", ignore_errors=True)
        shutil.copytree(tiny.out, folder / "out" / "demo")
        shutil.copytree(tiny.run, folder / "out" / "demo" / "run")
        for name in ("photo.jpg", "a.jpg", "b.jpg", "another.png"):
            Image.new("RGB", (40, 30), (200, 20, 20)).save(folder / name)
        rng = np.random.Generator(np.random.PCG64(3))
        for part in ("train", "test"):
            for colour in ("red", "green"):
                (folder / "photos" / part / colour).mkdir(parents=True)
                for index in range(20):
                    pixels = rng.integers(0, 99, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "photos" / part / colour / f"{index}.png")
        (folder / "my_package").mkdir()
        (folder / "my_package" / "nets.py").write_text(OWN_NET, encoding="utf-8")

    # --- python ---

    def python(self, text: str) -> None:
        """Runs a snippet; names that its text leaves to the reader are given."""
        if ".crypto)" in text:
            self.of_crypto(text)
            return
        text = ADDRESS.sub(self.endpoint, text)
        image = np.zeros((32, 32, 3), np.uint8)
        stop = threading.Event()
        if '"inbox"' in text:
            (self.folder / "inbox").mkdir()
            shutil.copy("photo.jpg", "inbox")
        with contextlib.ExitStack() as stack:
            given = {
                "bundle": "out/demo/client",
                "server": self.endpoint,
                "paths": ["a.jpg", "b.jpg"],
                "frames": lambda: iter([image, image]),
                "stop": stop,
                "show": lambda result: stop.set(),
            }
            if "bundle_key" in text:
                given |= self.sealed()
            if "client" in text and "as client" not in text:
                given["client"] = stack.enter_context(EdgeClient("out/demo/client", self.endpoint, timeout_ms=60_000))
            exec(compile(text, "snippet", "exec"), given)
            begin = given.get("main")
            if inspect.iscoroutinefunction(begin):
                asyncio.run(begin())

    def of_crypto(self, text: str) -> None:
        """Runs a snippet with the bundles of crypto-clear inference that the document has made."""
        with self.serve(self.folder / "out" / "server", "--insecure-engine") as (endpoint, _):
            given = text.replace('"tcp://cloud:5555"', f'"{endpoint}", insecure_engine=True')
            assert endpoint in given
            exec(compile(given, "snippet", "exec"), {})

    def sealed(self):
        """Returns the reader's two encrypted bundles, and what opens the second."""
        demo, key_file = self.folder / "out" / "demo", self.folder / "bundle.key"
        key_file.write_bytes(KEY)
        key_file.chmod(0o600)
        return {
            "bundle": sealed(self.tiny.client, demo / "by_key", sealing.key(KEY), BY_KEY),
            "other_bundle": sealed(self.tiny.client, demo / "other", sealing.passphrase(PASSPHRASE), BY_PASSPHRASE),
            "ask": lambda: PASSPHRASE,
        }

    # --- shell ---

    def shell(self, words: list[str]) -> None:
        """Runs one command line."""
        words = [word.replace(".venv/bin/", "") for word in words]
        name, arguments = words[0], words[1:]
        if name == "ensembler-export":
            name, arguments = "ensembler", ["export", *arguments]
        run = {
            "ensembler": self.ensembler,
            "python": self.script,
            "make": self.make,
            "pip": self.pip,
            "mkdir": self.plain(words),
            "cp": self.plain(words),
            ".": lambda arguments: None,
        }
        assert name in run, f"no test knows how to run {name}"
        run[name](arguments)

    def ensembler(self, arguments: list[str]) -> None:
        verb = arguments[0]
        arguments = [at_home(ADDRESS.sub(self.endpoint, word)) for word in arguments]
        if verb == "serve":
            bundle = Path(arguments[1])
            with self.serve(bundle, *insecure(bundle)):
                return
        if verb == "watch":
            self.watch(arguments)
            return
        if verb == "train":
            if "--resume" in arguments:  # as if it had been cut before its last file
                (Path(arguments[arguments.index("--resume") + 1]) / "summary.json").unlink()
            else:
                arguments += BRIEF
            arguments = [self.tiny.data if word in ("demo", "local/cifar10") else word for word in arguments]
        if verb == "audit":
            arguments += ["--data", self.audit_images]
        if verb == "export":
            arguments += OPEN_GATES
            if "--protocol" in arguments:  # its real engine is another environment's: tests/test_crypto.py
                arguments += ["--insecure-engine", "--fraction-bits", "8"]  # few, for a net of one epoch
            if "--target" in arguments:  # its wheels are downloads: tests/test_packages.py and tests/arm
                place = arguments.index("--target")
                assert arguments[place + 1] in TARGETS
                del arguments[place : place + 2]
        if verb == "boundary":
            arguments += ["--steps", "1"]
        if verb == "predict":
            bundle = Path(arguments[1])
            more = insecure(bundle)
            with self.serve(bundle.parent / "server", *more) as (endpoint, _):
                assert main([*(endpoint if word == self.endpoint else word for word in arguments), *more]) == 0
            return
        assert main(arguments) == 0, arguments

    @staticmethod
    def watch(arguments: list[str]) -> None:
        """Starts the service and ends it when it is ready."""
        command = [sys.executable, "-m", "ensembler.cli", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline().startswith("ready")
            process.terminate()
            assert process.wait(60) == 0

    def elsewhere(self, words: list[str]) -> None:
        """Reads a command that is for another machine; on emulated boards tests/arm runs what it does."""
        if words[0] == "sudo":
            words = words[1:]
        if words[0] != "ensembler":
            known = {"apt", "ensembler-python", "install", "mv", "nano", "scp", "sh", "ssh", "systemctl", "tar"}
            known |= {"chown", "cp", "docker", "kubectl", "python3"}
            assert words[0] in known or words[0].startswith("/opt/")
            return
        with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit):
            main([words[1], "--help"])
        for option in [word for word in words[2:] if word.startswith("--")]:
            assert option in told.getvalue()

    def script(self, arguments: list[str]) -> None:
        if Path(arguments[0]).name in LONG_EXAMPLES:
            assert (ROOT / arguments[0]).is_file()
            return
        if arguments[0] == "tools/convert_data.py":
            # Its input is a download of the reader's own; tests/test_data.py has one.
            assert (ROOT / arguments[0]).is_file()
            return
        arguments = [ADDRESS.sub(self.endpoint, word) for word in arguments]
        command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def make(self, arguments: list[str]) -> None:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert arguments[0] in targets

    def pip(self, arguments: list[str]) -> None:
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg", encoding="utf-8")
        for extra in re.findall(r"\[(.*?)\]", arguments[-1])[0].split(","):
            assert extra in config["options.extras_require"]

    @staticmethod
    def plain(words: list[str]):
        def run(_: list[str]) -> None:
            command = [at_home(word) for word in words]
            if command[0] == "cp":  # the reader carries the file over from the other machine
                command[1] = str(Path(command[2]).parent.parent / command[1])
            subprocess.run(command, check=True, timeout=60)

        return run


@pytest.fixture(scope="module")
def endpoint(tiny, serve) -> Iterator[str]:
    with serve(tiny.server, "--key", str(tiny.keys / "server.key_secret")) as (address, _):
        yield address


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.name in SLOW else []) for path in DOCUMENTS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_snippet_runs_when_it_is_pasted(
    path, tiny, endpoint, serve, audit_images, tiny_budget, tmp_path, monkeypatch, capfd, request
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "picamera2", fake_picamera2)
    # What a reader leaves at home is not the next test's.
    request.addfinalizer(lambda: shutil.rmtree(Path(os.environ["HOME"]) / ".config", ignore_errors=True))
    reader = Reader(tmp_path, tiny, endpoint, serve, audit_images)
    for language, number, text in snippets(path):
        try:
            if language == "python":
                reader.python(text)
            elif language == "sh":
                for words in lines_of(text):
                    reader.shell(words)
            elif language == "console":
                for words in lines_of(text):
                    reader.elsewhere(words)
            else:
                assert language == "", f"nobody runs {language}"
        except BaseException as error:
            raise AssertionError(f"{path.name}:{number}: {type(error).__name__}: {error}") from error
    capfd.readouterr()


def test_relative_links_of_the_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_api_reference_is_made_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(tmp_path), "ensembler"]
    done = subprocess.run([*command, "!ensembler.cli"], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "ensembler.html").read_text(encoding="utf-8")
    for name in ("EdgeClient", "AsyncEdgeClient", "Prediction", "ClientInfo"):
        assert f'id="{name}"' in page
