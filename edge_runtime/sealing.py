"""Model files encrypted at rest: keys from files and passphrases, and files that open in memory alone.

ChaCha20-Poly1305, because boards without AES instructions are fast at it. Every bundle has a key of its own, derived
from the key file (HKDF) or the passphrase (scrypt) with the bundle's salt. The manifest and the file's name are
associated data: a file opens in its own bundle, under its own name, beside the manifest it was exported with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ensembler.edge_runtime import private_files
from ensembler.protocol.errors import BundleError, ConfigError, KeyFileError, MissingExtraError
from ensembler.protocol.manifest import SALT_BYTES, Kdf, SealSpec
from ensembler.protocol.options import expanded

KEY_BYTES = 32
NONCE_BYTES = 12
MIN_PASSPHRASE_CHARS = 12
MAX_PASSPHRASE_BYTES = 1024
SUFFIX = ".sealed"
CONTEXT = b"ensembler bundle v1\n"

# 32 MiB and below a second on a board; as strong as 128 MiB with p = 1 (OWASP's table of equals).
SCRYPT_LOG2_N, SCRYPT_P = 15, 3


@dataclass(frozen=True, kw_only=True)
class BundleSecret:
    """What opens a bundle: the content of a key file, or a passphrase. Its repr shows neither."""

    kdf: Kdf
    material: bytes = field(repr=False)


# --- where secrets come from ---


def create_key(path: Path) -> None:
    """Writes a new key file, readable by its owner alone.

    Raises:
        KeyFileError: the file exists, or cannot be written.
    """
    private_files.create(path, os.urandom(KEY_BYTES))


def key(source: str | os.PathLike[str] | bytes) -> BundleSecret:
    """Returns the secret of a key file, or of the 32 bytes themselves.

    Raises:
        KeyFileError: missing, readable by others, or not 32 bytes.
    """
    if isinstance(source, bytes):
        data, name = source, "the bundle key"
    else:
        path = expanded("bundle_key", source)
        data, name = private_files.read(path, KEY_BYTES + 1, "bundle"), str(path)
    if len(data) != KEY_BYTES:
        raise KeyFileError(f"{name} is not a bundle key of {KEY_BYTES} bytes; ensembler keys bundle FILE makes one")
    return BundleSecret(kdf="hkdf-sha256", material=data)


def passphrase(text: str) -> BundleSecret:
    """Returns the secret of a passphrase.

    Raises:
        KeyFileError: empty, or longer than 1,024 bytes.
    """
    data = text.encode("utf-8", "surrogatepass")
    if not 0 < len(data) <= MAX_PASSPHRASE_BYTES:
        raise KeyFileError(f"the passphrase has {len(data)} bytes; give 1 to {MAX_PASSPHRASE_BYTES}")
    return BundleSecret(kdf="scrypt", material=data)


def passphrase_file(source: str | os.PathLike[str]) -> BundleSecret:
    """Returns the secret of a file that holds a passphrase; errors as ``passphrase_of``."""
    return passphrase(passphrase_of(source))


def passphrase_of(source: str | os.PathLike[str]) -> str:
    """Returns the passphrase that a file holds; line ends at its end do not count.

    Raises:
        KeyFileError: missing, readable by others, empty, too long or not UTF-8.
    """
    path = expanded("the passphrase file", source)
    data = private_files.read(path, MAX_PASSPHRASE_BYTES + 3, "bundle")
    try:
        text = data.decode("utf-8").rstrip("\r\n")
        passphrase(text)
    except UnicodeDecodeError:  # its text would show the bytes
        raise KeyFileError(f"{path} is not a text in UTF-8, so it holds no passphrase") from None
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None
    return text


def from_file(source: str | os.PathLike[str], kdf: Kdf) -> BundleSecret:
    """Returns the secret of a file of the kind that a bundle asks for; errors as ``key`` and ``passphrase_file``."""
    return passphrase_file(source) if kdf == "scrypt" else key(source)


# --- sealing and opening ---


def new_seal(secret: BundleSecret) -> SealSpec:
    """Returns the manifest's entry for a new bundle, with a salt of its own."""
    salt = os.urandom(SALT_BYTES).hex()
    if secret.kdf == "hkdf-sha256":
        return SealSpec(kdf=secret.kdf, salt=salt)
    return SealSpec(kdf=secret.kdf, salt=salt, log2_n=SCRYPT_LOG2_N, p=SCRYPT_P)


def checked_for_sealing(secret: BundleSecret) -> BundleSecret:
    """Returns ``secret`` if it may encrypt a new bundle.

    Raises:
        ConfigError: a passphrase that is too short.
        MissingExtraError: the package cryptography is not installed.
    """
    _cryptography("encrypting a bundle")
    if secret.kdf == "scrypt" and len(secret.material.decode("utf-8", "replace")) < MIN_PASSPHRASE_CHARS:
        raise ConfigError(f"the passphrase is shorter than {MIN_PASSPHRASE_CHARS} characters; take a longer one")
    return secret


class Sealable(Protocol):
    """A client bundle's manifest."""

    @property
    def encryption(self) -> SealSpec | None:
        """How its files are encrypted; None: they are not."""

    def bound(self) -> bytes:
        """Returns what its sealed files are bound to."""


class Sealer:
    """Seals and opens the files of one client bundle; the key is derived once.

    Args:
        secret: what was given for this bundle.
        manifest: of the bundle, with its ``encryption``. The table of files need not be complete.

    Raises:
        KeyFileError: a key where the bundle asks for a passphrase, or the other way round.
        MissingExtraError: the package cryptography is not installed.
    """

    def __init__(self, secret: BundleSecret, manifest: Sealable) -> None:
        seal = manifest.encryption
        assert seal is not None  # the callers looked
        if seal.kdf != secret.kdf:
            wanted, given = _WORDS[seal.kdf], _WORDS[secret.kdf].split(" (")[0]
            raise KeyFileError(f"the bundle is encrypted with {wanted}; {given} was given")
        self._bound = CONTEXT + manifest.bound()
        chacha = _cryptography("an encrypted bundle")
        self._cipher = chacha(_derived(secret, seal))

    def seal(self, name: str, data: bytes) -> bytes:
        """Returns the content of the file ``name``: nonce, ciphertext, tag."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + bytes(self._cipher.encrypt(nonce, data, self._bound + name.encode()))

    def open(self, path: Path) -> bytes:
        """Returns the model in the sealed file ``path``.

        Raises:
            KeyFileError: another key or passphrase, or the manifest is not the exported one.
            BundleError: the file cannot be read.
        """
        from cryptography.exceptions import InvalidTag

        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return bytes(self._cipher.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], self._bound + path.name.encode()))
        except (InvalidTag, ValueError):  # ValueError: shorter than a nonce
            raise KeyFileError(
                f"{path} does not open: the key or passphrase is not this bundle's, or the bundle was changed after "
                "its export; give the one it was encrypted with, or copy the bundle again"
            ) from None


_WORDS: dict[Kdf, str] = {
    "hkdf-sha256": "a key file (bundle_key=, --bundle-key)",
    "scrypt": "a passphrase (passphrase=, --passphrase-file)",
}


def opener(
    folder: Path, manifest: Sealable, secret: Callable[[Kdf], BundleSecret | None]
) -> Callable[[str], Path | bytes]:
    """Returns what gives the models of a client bundle: the path of a plain file, the content of a sealed one.

    Args:
        folder: of the bundle.
        manifest: its manifest.
        secret: asked only for an encrypted bundle.

    Raises:
        KeyFileError: the bundle is encrypted and there is no secret, or one of another kind.
        MissingExtraError: the package cryptography is not installed.
    """
    if manifest.encryption is None:
        return lambda name: folder / name
    kdf = manifest.encryption.kdf
    found = secret(kdf)
    if found is None:
        raise KeyFileError(
            f"the bundle {folder} is encrypted with {_WORDS[kdf]}; give it, or set ENSEMBLER_BUNDLE_KEY to the path of "
            "a file with it"
        )
    sealer = Sealer(found, manifest)
    return lambda name: sealer.open(folder / name)


def _cryptography(purpose: str) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError as error:
        raise MissingExtraError("cryptography", "encrypt", purpose) from error
    return ChaCha20Poly1305


def _derived(secret: BundleSecret, seal: SealSpec) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    salt = bytes.fromhex(seal.salt)
    if seal.kdf == "scrypt":
        return bytes(Scrypt(salt=salt, length=KEY_BYTES, n=1 << seal.log2_n, r=8, p=seal.p).derive(secret.material))
    return bytes(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=CONTEXT).derive(secret.material))
