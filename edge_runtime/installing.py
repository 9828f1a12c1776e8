"""A client bundle's place on a device: installed whole or not at all, and taken back to the one before.

Below the place lie ``bundles/DIGEST`` folders; ``client`` is a link to the one in use, ``client.before`` to the last
one that was. A program is given ``PLACE/client``. Start reading at ``install``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ensembler.edge_runtime.backends import BACKENDS, choose, open_session
from ensembler.edge_runtime.card import PRIVACY_NAME
from ensembler.protocol.errors import BundleError, ConfigError
from ensembler.protocol.manifest import MANIFEST_NAME, ClientManifest, describe_file, load_client
from ensembler.protocol.options import config_folders

CURRENT, BEFORE, STORE = "client", "client.before", "bundles"
PARTIAL_PREFIX = ".partial-"


def standard_place() -> Path:
    """Returns where bundles are installed: for the whole machine by root, else for this user."""
    folders = config_folders()
    return folders[-1] if os.geteuid() == 0 else folders[0]


def install(bundle: Path, place: Path, owner: tuple[int, int] | None = None) -> Path:
    """Installs a client bundle, readable by its owner alone; the one that was in use is kept for ``roll_back``.

    Every file is compared with its digest, on the device too, and the models are opened (unless they are encrypted)
    before the link is moved: a bundle that does not run here leaves the old one in use.

    Args:
        bundle: the folder.
        place: where to.
        owner: user and group who shall own the files; None leaves them to whoever calls.

    Returns:
        The link, ``place/client``.

    Raises:
        BundleError: the bundle is damaged, or does not run here.
        ConfigError: the place cannot be written.
        MissingExtraError: no runtime is installed that reads its models.
    """
    manifest = load_client(bundle)
    if (place / CURRENT).is_dir() and not (place / CURRENT).is_symlink():
        raise ConfigError(
            f"{place / CURRENT} is a folder and no link of an install; move it away, or choose another --to"
        )
    try:
        store = place / STORE
        store.mkdir(mode=0o755, parents=True, exist_ok=True)
        for left in store.glob(f"{PARTIAL_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=store))  # 0700
        try:
            _copy(bundle, manifest, partial)
            _try(partial)
            target = store / describe_file(partial / MANIFEST_NAME).sha256[:16]
            if owner is not None:
                # The folder last: until then nobody else can put a link in the place of a file.
                for path in (*partial.iterdir(), partial):
                    os.chown(path, *owner, follow_symlinks=False)
            if target.exists():
                # The same bundle again: it may be in use, and it may have been damaged since.
                target.rename(Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=store)) / "old")
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        used = _target(place / CURRENT)
        if used is not None and used != target.name:
            _link(place / BEFORE, used)
        _link(place / CURRENT, target.name)
        _clear(place)
    except OSError as error:
        shown = error.filename or place
        raise ConfigError(f"{shown}: cannot be written: {error.strerror}; {CURRENT} is what it was") from error
    return place / CURRENT


def roll_back(place: Path) -> Path:
    """Takes the bundle before into use again; the one that was is then the one before.

    Returns:
        The link, ``place/client``.

    Raises:
        BundleError: there is none before, or it is damaged.
        ConfigError: the place cannot be written.
    """
    used, before = _target(place / CURRENT), _target(place / BEFORE)
    if before is None:
        raise BundleError(f"{place} holds no bundle before this one; ensembler install-bundle BUNDLE installs one")
    load_client(place / BEFORE)
    try:
        _link(place / CURRENT, before)
        if used is not None:
            _link(place / BEFORE, used)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written: {error.strerror}") from error
    return place / CURRENT


def bundle_files(bundle: Path, manifest: ClientManifest) -> list[str]:
    """Returns the names of everything that makes a client bundle, its privacy card among them if it has one."""
    return [MANIFEST_NAME, *manifest.files, *([PRIVACY_NAME] if (bundle / PRIVACY_NAME).is_file() else [])]


def _copy(bundle: Path, manifest: ClientManifest, partial: Path) -> None:
    for name in bundle_files(bundle, manifest):
        descriptor = os.open(partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream, (bundle / name).open("rb") as source:
            shutil.copyfileobj(source, stream)
            stream.flush()
            os.fsync(stream.fileno())


def _try(folder: Path) -> None:
    """Reads the copy as a client does, and opens its models, so far as they open without a secret."""
    manifest = load_client(folder)
    backend = choose("auto", [pair.format for pair in manifest.models])
    if manifest.encryption is None:
        pair = manifest.pair(BACKENDS[backend].format)
        for name in (pair.head, pair.tail):
            open_session(folder / name, backend=backend)


def _target(link: Path) -> str | None:
    """Returns the name of the folder that a link means; None where there is no such folder."""
    try:
        name = Path(link.readlink()).name
    except OSError:
        return None
    return name if (link.parent / STORE / name).is_dir() else None


def _link(link: Path, name: str) -> None:
    """Makes or moves a link in one step."""
    partial = link.with_name(f"{PARTIAL_PREFIX}{link.name}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(Path(STORE) / name)
    partial.replace(link)


def _clear(place: Path) -> None:
    """Removes the bundles that no link means."""
    kept = {_target(place / CURRENT), _target(place / BEFORE)}
    for folder in (place / STORE).iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
