"""The privacy card of a client bundle: what an audit found, of which files, and who vouches for it.

The card is ``privacy.json`` beside the manifest. It is for people and never in the way of a prediction: a card that is
damaged, edited or another bundle's is read as just that, and no content of it raises an error. ``privacy/card.py``
writes cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ensembler.edge_runtime.signing import is_signed
from ensembler.protocol.errors import BundleError, MissingExtraError
from ensembler.protocol.manifest import MANIFEST_NAME, ClientManifest, describe_file, require_regular

PRIVACY_NAME = "privacy.json"
FORMAT = "ensembler-privacy-card"
VERSION = 1
MAX_CARD_BYTES = 256 * 1024
MAX_CHARACTERS = 1000

VERDICTS = ("readable", "recognisable", "obscured", "inconclusive")
Signature = Literal["valid", "invalid", "unsigned", "unchecked"]


@dataclass(frozen=True, kw_only=True)
class PrivacyCard:
    """What a client bundle's privacy card says, and what that is worth.

    Whoever can write the folder can write an unsigned card, and can sign one with a key and a name of their own. An
    application that relies on a card knows whose key it wants: ``card.signer == "5f0c..."`` is the whole check.

    Attributes:
        facts: the audit, as docs/protocol.md lists the fields of a card; empty if the card cannot be read.
        signature: ``valid``, ``invalid`` (the card was changed after it was signed, or cannot be read), ``unsigned``,
            or ``unchecked`` (the package cryptography is not installed).
        of_these_files: whether the audit was of exactly this bundle's files.
        signed_by: the name beside a valid signature; anybody can write any name.
        signer: the public key, 64 hexadecimal digits, if the signature is valid and the card is of these files; else
            None.
        problem: why the card says nothing of this bundle, in a sentence; None if it does, signed or not.
    """

    facts: dict[str, Any]
    signature: Signature
    of_these_files: bool
    signed_by: str | None
    signer: str | None
    problem: str | None


def read_card(bundle: Path, manifest: ClientManifest) -> PrivacyCard | None:
    """Reads a bundle's card; None if it has none.

    Args:
        bundle: the folder.
        manifest: its manifest, the files verified.
    """
    path = bundle / PRIVACY_NAME
    try:
        document = _parsed(path)
        facts = checked_facts(document)
        signed = canonical(document)
    except FileNotFoundError:
        return None
    except OSError as error:
        return _damaged(f"{path} cannot be read: {error.strerror}")
    except BundleError as error:  # no file, but a pipe or a folder
        return _damaged(str(error))
    except (ValueError, RecursionError) as error:
        return _damaged(f"{path} is not a privacy card of version {VERSION}: {error}")
    signature, problem = _verified(document, signed)
    same = _is_of(document["files"], bundle, manifest)
    if not same:
        problem = "the card is of other files than this bundle's: it was copied here, or the bundle was changed"
    signer = document["signer"] if signature == "valid" else None
    return PrivacyCard(
        facts=facts,
        signature=signature,
        of_these_files=same,
        signed_by=signer["name"] if signer else None,
        signer=signer["public_key"] if signer and same else None,
        problem=problem,
    )


def file_digests(bundle: Path, manifest: ClientManifest) -> dict[str, str]:
    """Returns what a card is about: SHA-256 by name, of the manifest and of every file that it lists.

    Args:
        bundle: the folder.
        manifest: its manifest, the files verified.

    Raises:
        OSError: the manifest cannot be read.
    """
    listed = {name: entry.sha256 for name, entry in manifest.files.items()}
    return {**listed, MANIFEST_NAME: describe_file(bundle / MANIFEST_NAME).sha256}


def canonical(document: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a card that are signed: all of it but the signature, as JSON in one fixed form.

    Raises:
        ValueError: a number that JSON has not.
    """
    content = {name: value for name, value in document.items() if name != "signature"}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


# --- the fields ---

Check = Callable[[Any, str], Any]  # of a value and its name: returns what is known of it, or raises ValueError


def checked_facts(document: Any) -> dict[str, Any]:
    """Returns the facts of a card, and nothing else of it.

    Raises:
        ValueError: with the name of what is missing or malformed.
    """
    facts: dict[str, Any] = _FACTS(document, "")
    return facts


def _leaf(valid: Callable[[Any], bool]) -> Check:
    def check(value: Any, name: str) -> Any:
        if not valid(value):
            raise ValueError(f"{name or 'it'} is missing, or is not what it should be")
        return value

    return check


def _each(item: Check) -> Check:
    return lambda value, name: [item(each, name) for each in _list(value, name)]


def _object(**fields: Check) -> Check:
    def check(value: Any, name: str) -> Any:
        known = _dict(value, name)
        prefix = f"{name}." if name else ""
        return {field: each(known.get(field), f"{prefix}{field}") for field, each in fields.items()}

    return check


def _or_null(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


_list = _leaf(lambda v: isinstance(v, list))
_dict = _leaf(lambda v: isinstance(v, dict))
# What is not printable could write to a terminal as it likes.
_text = _leaf(lambda v: isinstance(v, str) and len(v) <= MAX_CHARACTERS and v.isprintable())
_number = _leaf(lambda v: isinstance(v, int | float) and not isinstance(v, bool) and -1e9 < v < 1e9)
_whole = _leaf(lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 53)
_flag = _leaf(lambda v: isinstance(v, bool))
_digits = _leaf(lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]+", v) is not None)
_reached = _object(attack=_text, ssim=_number, psnr_db=_number)

_FACTS = _object(
    date=_text,
    verdict=_leaf(lambda v: v in VERDICTS),
    sentence=_text,
    attack=_text,
    ssim=_number,
    psnr_db=_number,
    server_alone=_or_null(_reached),
    floor=_reached,
    oracle=_reached,
    attacks=_each(_text),
    not_run=_each(_text),
    checks=_each(_object(about=_text, name=_text, words=_text, passed=_flag)),
    budget=_text,
    seeds=_each(_whole),
    images=_object(evaluated=_whole, observed=_whole, auxiliary=_whole, auxiliary_source=_text),
    versions=_object(ensembler=_text, torch=_text),
)
_FRAME = _object(
    format=_leaf(lambda v: v == FORMAT),
    version=_leaf(lambda v: v == VERSION and not isinstance(v, bool)),
    files=_dict,
    signer=_or_null(_object(name=_text, public_key=_digits)),
    signature=_or_null(_digits),
)


# --- reading ---


def _parsed(path: Path) -> Any:
    require_regular(path)
    with path.open("rb") as stream:
        data = stream.read(MAX_CARD_BYTES + 1)
    if len(data) > MAX_CARD_BYTES:
        raise ValueError(f"it is larger than {MAX_CARD_BYTES} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    _FRAME(document, "")
    return document


def _damaged(problem: str) -> PrivacyCard:
    return PrivacyCard(
        facts={}, signature="invalid", of_these_files=False, signed_by=None, signer=None, problem=problem
    )


def _verified(document: Mapping[str, Any], signed: bytes) -> tuple[Signature, str | None]:
    signer, signature = document.get("signer"), document.get("signature")
    if signer is None and signature is None:
        return "unsigned", None
    try:
        if signer is not None and signature is not None and is_signed(signed, signer["public_key"], signature):
            return "valid", None
    except MissingExtraError as error:
        return "unchecked", str(error)
    return "invalid", "the signature is not of this card: the card was changed after it was signed"


def _is_of(files: Mapping[str, Any], bundle: Path, manifest: ClientManifest) -> bool:
    try:
        return files == file_digests(bundle, manifest)
    except OSError:  # the bundle went away
        return False
