"""``ensembler card``: what a client bundle's privacy card says and is worth, and writing one from an audit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ensembler.cli.console import EXIT_FAILED, Console, a_path
from ensembler.edge_runtime import signing
from ensembler.edge_runtime.card import PRIVACY_NAME, PrivacyCard, read_card
from ensembler.protocol.errors import BundleError, ConfigError
from ensembler.protocol.manifest import load_client

NAME = "card"
HELP = "show a client bundle's privacy card, or write it from an audit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundle", type=a_path, help="the folder of a client bundle")
    parser.add_argument("--audit", type=a_path, help="write the card from this JSON of ensembler audit")
    add_signing(parser)


def add_signing(parser: argparse.ArgumentParser) -> None:
    """Declares the options of who signs a card."""
    parser.add_argument("--signing-key", type=a_path, help="sign the card with this key (ensembler keys signing FILE)")
    parser.add_argument("--signed-by", metavar="NAME", help="who holds that key, as the card shall say")


def signer_of(options: argparse.Namespace) -> signing.Signer | None:
    """Returns who signs, None for an unsigned card."""
    if (options.signing_key is None) != (options.signed_by is None):
        raise ConfigError("--signing-key and --signed-by go together: the key, and the name of who holds it")
    return None if options.signing_key is None else signing.load(options.signing_key, options.signed_by)


def run(options: argparse.Namespace, console: Console) -> int:
    """Shows or writes a card; the exit status is 1 for one that says nothing of this bundle."""
    signer = signer_of(options)
    card: PrivacyCard | None
    if options.audit is not None:
        from ensembler.privacy.card import read_audit, write_card

        card = write_card(options.bundle, read_audit(options.audit), signer)
    elif signer is not None:
        raise ConfigError("--signing-key signs the card that is written from an audit; give its JSON with --audit")
    else:
        card = read_card(options.bundle, load_client(options.bundle))
        if card is None:
            raise BundleError(
                f"{options.bundle} has no {PRIVACY_NAME}: ensembler audit {options.bundle} --run RUN, then ensembler "
                f"card {options.bundle} --audit report.json"
            )
    console.result(asdict(card), text_of(card))
    return 0 if card.problem is None else EXIT_FAILED


def text_of(card: PrivacyCard) -> str:
    """Returns a card for people."""
    lines = []
    if card.facts:
        facts = card.facts
        images, failed = facts["images"], [check["name"] for check in facts["checks"] if not check["passed"]]
        lines = [
            f"{facts['verdict']}: {facts['sentence']}",
            f"strongest attack  {_figures(facts)}",
            f"a server alone    {_figures(facts['server_alone']) if facts['server_alone'] else 'not tried'}",
            f"oracle            {_figures(facts['oracle'])}",
            f"floor             {_figures(facts['floor'])}",
            f"sanity checks     {len(facts['checks']) - len(failed)} of {len(facts['checks'])} passed"
            + "".join(f"; FAILED: {name}" for name in failed),
            f"audited           {facts['date']}, budget {facts['budget']}, {len(facts['seeds'])} seeds, "
            f"{images['evaluated']} images judged, {images['observed']} observed",
        ]
    lines.append(f"files             {'those of this bundle' if card.of_these_files else 'NOT those of this bundle'}")
    holder = f", key {card.signer}, which says to be of {card.signed_by}" if card.signer else ""
    lines.append(f"signature         {card.signature}{holder}")
    if card.problem is not None:
        lines.append(f"PROBLEM: {card.problem}")
    return "\n".join(lines)


def _figures(reached: Mapping[str, Any]) -> str:
    return f"SSIM {reached['ssim']:.3f}, {reached['psnr_db']:.1f} dB ({reached['attack']})"
