"""Ed25519 keys and signatures: who vouches for a privacy card.

A key file is PKCS #8 in PEM without a password, readable by its owner alone; openssl reads and makes such files too. A
public key is written as its 32 bytes in hexadecimal digits. That is as short as a digest of it would be, so it is the
fingerprint as well.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensembler.edge_runtime import private_files
from ensembler.protocol.errors import ConfigError, KeyFileError, MissingExtraError
from ensembler.protocol.options import expanded

MAX_FILE_BYTES = 4096
MAX_NAME_CHARACTERS = 200
CURE = "ensembler keys signing FILE makes one"


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Somebody with a signing key. Its repr does not show the key.

    Attributes:
        name: of the key's holder, as it shall stand beside the signature.
        public_key: 64 hexadecimal digits.
    """

    name: str
    public_key: str
    _key: Any = field(repr=False)

    def sign(self, data: bytes) -> str:
        """Returns the signature of ``data``, 128 hexadecimal digits."""
        return bytes(self._key.sign(data)).hex()


def create_key(path: Path) -> str:
    """Writes a new key file and returns its public key.

    Raises:
        KeyFileError: the file exists, or cannot be written.
        MissingExtraError: the package cryptography is not installed.
    """
    key = _ed25519("a signing key").Ed25519PrivateKey.generate()
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private_files.create(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return _public(key)


def load(source: str | os.PathLike[str], name: str) -> Signer:
    """Returns who signs with the key in a file.

    Args:
        source: the key file.
        name: of the key's holder.

    Raises:
        ConfigError: no name, or one that cannot be shown.
        KeyFileError: missing, readable by others, or no Ed25519 key.
        MissingExtraError: the package cryptography is not installed.
    """
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise ConfigError(f"the signer's name is {name[:40]!r}: give 1 to {MAX_NAME_CHARACTERS} printable characters")
    ed25519 = _ed25519("signing a privacy card")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = expanded("the signing key", source)
    data = private_files.read(path, MAX_FILE_BYTES, "signing")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key in PEM without a password; {CURE}")
    return Signer(name=name, public_key=_public(key), _key=key)


def is_signed(data: bytes, public_key: str, signature: str) -> bool:
    """Returns whether the holder of a key signed ``data``; False for texts that are no key or no signature.

    Raises:
        MissingExtraError: the package cryptography is not installed.
    """
    ed25519 = _ed25519("verifying a privacy card")
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), data)
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _public(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).hex()


def _ed25519(purpose: str) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("cryptography", "encrypt", purpose) from error
    return ed25519
