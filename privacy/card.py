"""From an audit to a privacy card and to a decision: what a client bundle's ``privacy.json`` says, and what may ship.

Needs no torch, so that who signs need not be where the audit ran. ``edge_runtime/card.py`` reads cards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensembler.edge_runtime.card import (
    FORMAT,
    MAX_CARD_BYTES,
    PRIVACY_NAME,
    VERSION,
    PrivacyCard,
    canonical,
    checked_facts,
    file_digests,
    read_card,
)
from ensembler.edge_runtime.signing import Signer
from ensembler.privacy.parts import write_whole
from ensembler.protocol.errors import BundleError, BundleMismatchError, ConfigError, DataError, GateFailedError
from ensembler.protocol.manifest import load_client

FLOOR, ORACLE = "mean-image", "oracle-decoder"
AUDIT = "audit"  # what a check is about that is about no single attack
SERVER = 1  # scene.Access.QUERY_FREE, which would import torch


def require_ssim(document: Mapping[str, Any], limit: float) -> None:
    """Refuses what an audit says to leak too much, or of which it says nothing.

    Args:
        document: the audit's result.
        limit: the mean SSIM that the strongest attack may reach.

    Raises:
        GateFailedError: it reaches more, or the audit failed a sanity check: then a low figure is none. A check of one
            attack does not count: the oracle has all that the attack had, and more.
    """
    verdict = document["verdict"]
    failed = [gate for gate in document["gates"] if gate["about"] == AUDIT and not gate["passed"]]
    if not verdict["ssim"] <= limit:
        reason = (
            f"the strongest attack, {verdict['attack']}, reaches SSIM {verdict['ssim']:.3f}, more than {limit:g}\n"
            "Try a deeper cut, fewer bits or a bottleneck."
        )
    elif failed or verdict["word"] == "inconclusive":
        reason = "the audit is inconclusive, so its figures do not show that little leaks"
        reason += "".join(f"\n  failed check: {gate['name']}: {gate['words']}" for gate in failed)
        reason += "\nTry a larger budget or more held-out images."
    else:
        return
    raise GateFailedError(f"{table(document)}\n\nThe client failed its privacy gate; nothing was written: {reason}")


def table(document: Mapping[str, Any]) -> str:
    """Returns what each attack of an audit reached, worst first, a line for each."""
    return "\n".join(
        f"{row['name']:<28} SSIM {row['ssim']['mean']:6.3f}   {row['psnr_db']['mean']:5.1f} dB   {row['access_words']}"
        for row in document["attacks"]
    )


def read_audit(path: Path) -> dict[str, Any]:
    """Returns the JSON that ``ensembler audit`` wrote.

    Raises:
        DataError: it cannot be read, or is no JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give the JSON beside an audit's report") from error
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise DataError(f"{path} is not JSON of ensembler audit; give the file beside its report")
    return document


def write_card(bundle: Path, document: Mapping[str, Any], signer: Signer | None = None) -> PrivacyCard:
    """Writes a bundle's privacy card, in place of one that is there.

    Args:
        bundle: the folder of a client bundle.
        document: an audit of exactly its files.
        signer: vouches for the card; None leaves it unsigned.

    Returns:
        The card, as a reader of the bundle finds it.

    Raises:
        BundleError: the bundle cannot be read.
        BundleMismatchError: the audit is of other files.
        ConfigError: a signed card is there, and nobody signs this one.
        DataError: the document is not an audit's, or the card cannot be written.
    """
    manifest = load_client(bundle)
    content = _content(document)
    try:
        files = file_digests(bundle, manifest)
    except OSError as error:
        raise BundleError(f"the bundle {bundle} cannot be read: {error.strerror}") from error
    if content["files"] != files:
        raise BundleMismatchError(
            f"the audit is not of the files in {bundle}: their digests differ; audit this bundle: ensembler audit "
            f"{bundle} --run RUN"
        )
    before = read_card(bundle, manifest)
    if signer is None and before is not None and before.signature in ("valid", "unchecked"):
        by = f" by {before.signed_by}" if before.signed_by else ""
        raise ConfigError(
            f"{bundle / PRIVACY_NAME} is signed{by}, and an unsigned card would take its place: sign "
            "this one with --signing-key and --signed-by, or remove that one first"
        )
    card = {
        **content,
        "format": FORMAT,
        "version": VERSION,
        "signer": None if signer is None else {"name": signer.name, "public_key": signer.public_key},
    }
    card["signature"] = None if signer is None else signer.sign(canonical(card))
    text = json.dumps(card, indent=1, sort_keys=True) + "\n"
    if len(text) > MAX_CARD_BYTES:
        raise DataError(
            f"the card would be larger than {MAX_CARD_BYTES} bytes: the audit has too many attacks or checks"
        )
    write_whole(bundle / PRIVACY_NAME, text, mode=0o600)
    written = read_card(bundle, manifest)
    assert written is not None
    return written


def _content(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a card tells of an audit. No path and no image: the card goes to every device."""
    try:
        if not document["subject"].get("all_operators", True):
            raise ConfigError(
                f"the audit is of a part of what the device sends (operators {document['subject']['operators']}), and "
                "a card is about all of it: audit without --operators"
            )
        rows = {row["name"]: row for row in document["attacks"]}
        verdict = document["verdict"]
        alone = [row for row in rows.values() if row["access"] == SERVER]
        strongest_alone = max(alone, key=lambda row: row["ssim"]["mean"], default=None)
        facts = {
            "date": document["date"],
            "verdict": verdict["word"],
            "sentence": verdict["sentence"],
            **_reached(rows[verdict["attack"]]),
            "server_alone": None if strongest_alone is None else _reached(strongest_alone),
            "floor": _reached(rows[FLOOR]),
            "oracle": _reached(rows[ORACLE]),
            "attacks": list(rows),
            "not_run": [left["name"] for left in document["not_run"]],
            "checks": document["gates"],
            **{name: document[name] for name in ("budget", "seeds", "images", "versions")},
        }
        return {**checked_facts(facts), "files": document["subject"]["digests"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"this is no audit of this version of the package ({error}); audit the bundle again") from error


def _reached(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"attack": row["name"], "ssim": row["ssim"]["mean"], "psnr_db": row["psnr_db"]["mean"]}
