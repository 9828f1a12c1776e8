"""CURVE key pairs and their files.

A pair is two files in ZeroMQ's certificate format: ``NAME.key`` (public, to be copied to the other side) and
``NAME.key_secret`` (0600, stays where it is). A secret never appears in a repr, a log or an error.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth

from ensembler.protocol.errors import ConfigError, KeyFileError
from ensembler.protocol.manifest import is_curve_key
from ensembler.protocol.options import config_folders, expanded, is_visible_file

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"  # noqa: S105 (a file name)


MAX_FILE_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """One side's identity: 40 characters of Z85 each."""

    public: str
    secret: str = field(repr=False)


def create(folder: Path, name: str) -> tuple[Path, Path]:
    """Makes a new pair in ``folder``.

    Args:
        folder: made (0700) if it is not there.
        name: of the files.

    Returns:
        The public file and the secret one.

    Raises:
        KeyFileError: a file of that name exists, or the folder cannot be written.
        ConfigError: the name is not a plain file name, or libzmq has no CURVE.
    """
    _require_curve()
    if not name or Path(name).name != name or name.startswith("."):
        raise ConfigError(f"--name {name!r} is not a plain file name")
    public, secret = folder / f"{name}{PUBLIC_SUFFIX}", folder / f"{name}{SECRET_SUFFIX}"
    for path in (public, secret):
        if path.exists():
            raise KeyFileError(f"{path} exists; a key is never overwritten: choose another --name, or remove it")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # create_certificates writes the secret world-readable, so it does that where nobody else can look.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as private:
            made_public, made_secret = zmq.auth.create_certificates(private, name)
            Path(made_secret).chmod(0o600)
            Path(made_public).chmod(0o644)
            Path(made_secret).rename(secret)
            Path(made_public).rename(public)
    except OSError as error:
        raise KeyFileError(f"{folder}: keys cannot be written: {error.strerror}") from error
    return public, secret


def load_public(path: Path) -> str:
    """Reads a public key, from either file of a pair.

    Raises:
        KeyFileError: missing, unreadable or not a key.
    """
    return _load(path)[0]


def public_of(given: str | os.PathLike[str]) -> str:
    """Returns a public key that somebody gave: a file of it, or its 40 characters.

    Raises:
        ConfigError: neither text nor a path.
        KeyFileError: the file holds the secret key, too; otherwise see ``load_public``.
    """
    path, text = expanded("server_key", given), str(given)
    # Every character of a key may be in a path too: what is named as key files are is one, there or not.
    is_text = is_curve_key(text) and not text.endswith(PUBLIC_SUFFIX) and not is_visible_file(path)
    if is_text:
        return text
    public, secret = _load(path)
    if secret is not None:
        raise KeyFileError(
            f"{path} holds a secret key, which has no place here: give the public file beside it, whose name ends in "
            f"{PUBLIC_SUFFIX}, and keep the secret one where its owner is"
        )
    return public


def load_pair(path: Path) -> KeyPair:
    """Reads a pair from its secret file.

    Raises:
        KeyFileError: missing, readable by others, or without a secret.
    """
    public, secret = _load(path)
    if secret is None:
        raise KeyFileError(f"{path} holds no secret key; give the file that ends in {SECRET_SUFFIX}")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise KeyFileError(f"{path} can be read by others (mode {mode:04o}); chmod 600 {path}")
    return KeyPair(public=public, secret=secret)


def load_authorized(folder: Path) -> frozenset[str]:
    """Reads the public keys of the devices that may connect: every ``*.key`` in ``folder``.

    Raises:
        KeyFileError: not a folder, or one of the files is not a key.
    """
    if not folder.is_dir():
        raise KeyFileError(f"{folder} is not a folder; put the devices' public keys (*{PUBLIC_SUFFIX}) into one")
    return frozenset(load_public(path) for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}")))


def find(argument: str | os.PathLike[str] | None, variable: str, candidates: Iterable[Path]) -> Path | None:
    """Returns the first key file there is: the argument, the environment variable, then the candidates.

    Raises:
        KeyFileError: the argument or the variable names a file that does not exist.
    """
    named = argument if argument is not None else os.environ.get(variable)
    if named:
        source = "the key argument" if argument is not None else f"the environment variable {variable}"
        path = expanded(source, named)
        if not is_visible_file(path):
            raise KeyFileError(
                f"{source} names {path}, which is not a file that this user may see; ensembler keys new makes keys"
            )
        return path
    return next((path for path in candidates if is_visible_file(path)), None)


def standard_places(name: str) -> list[Path]:
    """Returns where a key file of that name is looked for on every machine."""
    return [folder / name for folder in config_folders()]


def _load(path: Path) -> tuple[str, str | None]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:  # a pipe might never end to be read
            raise KeyFileError(f"{path} is not a CURVE key file; ensembler keys new makes one")
        public, secret = zmq.auth.load_certificate(path)
    except KeyFileError:
        raise
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror or 'no such file'}") from error
    except Exception as error:  # a malformed certificate raises ValueError or UnicodeDecodeError
        raise KeyFileError(f"{path} is not a CURVE key file; ensembler keys new makes one") from error
    texts = [key.decode("ascii", "replace") if key else None for key in (public, secret)]
    if texts[0] is None or any(text is not None and not is_curve_key(text) for text in texts):
        raise KeyFileError(f"{path} is not a CURVE key file; ensembler keys new makes one")
    return texts[0], texts[1]


def _require_curve() -> None:
    if not zmq.has("curve"):
        raise ConfigError("this libzmq was built without CURVE; install pyzmq from PyPI or from Debian")
