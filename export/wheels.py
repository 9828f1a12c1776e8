"""The wheels of a board's package: this project's own, and the pinned ones of others.

Start reading at ``own`` and ``fetch``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

from ensembler.export.targets import Target
from ensembler.protocol.errors import ExportError, MissingExtraError

DISTRIBUTION = "ensembler-edge"
# What a device runs. Training, audit and export stay where torch is; their verbs say what to install.
DEVICE = ("", ".cli", ".cloud_runtime", ".edge_runtime", ".protocol", ".transport")
SUFFIXES = {".py", ".typed", ".onnx", ".tflite"}
WHEEL = b"Wheel-Version: 1.0\nGenerator: ensembler-export\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
ZIP_DATE = (2026, 1, 1, 0, 0, 0)  # a wheel of the same files is the same wheel
PIP_TIMEOUT_S = 1800
PIP_OF_USER = {
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_TRUSTED_HOST"),
    *("PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_CACHE_DIR", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES"),
}


@dataclass(frozen=True, kw_only=True)
class Licence:
    """Whose work a wheel is.

    Attributes:
        wheel: the file.
        name: of the distribution.
        version: of it.
        licence: what its metadata says, in one line.
        files: the licence texts in the wheel.
    """

    wheel: Path
    name: str
    version: str
    licence: str
    files: tuple[str, ...]


def own(folder: Path) -> Path:
    """Writes the wheel of this very installation's device side, also of an editable one.

    The same files give the same bytes.

    Returns:
        The wheel in ``folder``.
    """
    found = metadata.distribution(DISTRIBUTION)
    name = f"{DISTRIBUTION.replace('-', '_')}-{found.version}"
    about = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""
    headers, _, _ = about.partition("\n\n")  # what follows is the README
    content = {
        f"{name}.dist-info/METADATA": f"{headers}\n".encode(),
        f"{name}.dist-info/WHEEL": WHEEL,
        f"{name}.dist-info/licenses/LICENSE": _licence_text(found),
        f"{name}.dist-info/entry_points.txt": (found.read_text("entry_points.txt") or "").encode(),
    }
    for package in DEVICE:
        place = resources.files(f"ensembler{package}")
        for file in place.iterdir():
            if Path(file.name).suffix in SUFFIXES:
                content[f"ensembler{package}".replace(".", "/") + f"/{file.name}"] = file.read_bytes()
    record = f"{name}.dist-info/RECORD"
    lines = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in sorted(content.items())]
    content[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in sorted(content.items()):
            entry = zipfile.ZipInfo(path, ZIP_DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return wheel


def _licence_text(found: metadata.Distribution) -> bytes:
    """Returns this project's licence: of an installation, or of the checkout that an editable one means."""
    text = found.read_text("licenses/LICENSE")
    if text is None:
        text = (Path(str(resources.files("ensembler.export"))).resolve().parent / "LICENSE").read_text(encoding="utf-8")
    return text.encode()


def fetch(target: Target, runtime: str, folder: Path, source: Path | None = None) -> None:
    """Puts the pinned wheels of others into ``folder``, for the target's processor and Python, not for this machine's.

    Args:
        target: the board.
        runtime: of it.
        folder: where to.
        source: a folder with the wheels; None asks pip's package index.

    Raises:
        ExportError: a wheel is not to be had, or has not the pinned digest.
        MissingExtraError: there is no pip.
    """
    offline = ["--no-index", "--find-links", str(source)] if source is not None else []
    with resources.as_file(target.pins(runtime)) as pins:
        _pip("download", target, "--require-hashes", "--requirement", str(pins), "--dest", str(folder), *offline)


def unpack(target: Target, folder: Path, tree: Path) -> None:
    """Installs every wheel of ``folder`` into ``tree``, a folder to be put on a path.

    Raises:
        ExportError: pip does not take them for this target.
        MissingExtraError: there is no pip.
    """
    # By name: of a wheel that is given by its path pip notes the path, which is this machine's and changes.
    names = [f"{one.name}=={one.version}" for one in licences(folder)]
    _pip("install", target, "--no-index", "--find-links", str(folder), "--no-compile", "--target", str(tree), *names)


def unpacked_bytes(folder: Path) -> int:
    """Returns how much the wheels of a folder hold."""
    total = 0
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            total += sum(entry.file_size for entry in archive.infolist())
    return total


def licences(folder: Path) -> list[Licence]:
    """Returns whose work the wheels of a folder are, by name."""
    return [_licence(wheel) for wheel in sorted(folder.glob("*.whl"), key=lambda path: path.name.lower())]


def _licence(wheel: Path) -> Licence:
    with zipfile.ZipFile(wheel) as archive:
        about = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = HeaderParser().parsestr(archive.read(about).decode())
        texts = ("LICEN", "COPYING", "NOTICE")
        files = tuple(
            sorted(name for name in archive.namelist() if any(text in Path(name).name.upper() for text in texts))
        )
    classified = [line.split("::")[-1].strip() for line in said.get_all("Classifier", []) if line.startswith("License")]
    stated = [said["License-Expression"], *classified, said["License"]]
    first = next((text.strip().splitlines()[0] for text in stated if text and text.strip()), "see its licence texts")
    return Licence(wheel=wheel, name=said["Name"], version=said["Version"], licence=first, files=files)


def _pip(verb: str, target: Target, *arguments: str) -> None:
    if find_spec("pip") is None:
        raise MissingExtraError("pip", "package", "fetching a board's wheels")
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python]
    for platform in target.pip_platforms:
        command += ["--platform", platform]
    # Where wheels come from is for the user to say; all else that pip can be told would change what is built.
    environment = {name: value for name, value in os.environ.items() if name in PIP_OF_USER or name[:4] != "PIP_"}
    if verb == "install":
        command.append("--isolated")
    try:
        done = subprocess.run(  # noqa: S603
            [*command, *arguments], capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"the wheels for {target.name}: pip {verb} took more than {PIP_TIMEOUT_S} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line[-1] != ":"]
        said = (errors or lines)[-1]  # of a traceback the last line says what happened
        cure = (
            "; is the package index reachable? --wheels FOLDER takes them from a folder" if verb == "download" else ""
        )
        raise ExportError(f"the wheels for {target.name}: pip {verb}: {said}{cure}")


def _digest(data: bytes) -> str:
    return urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
