"""``ensembler-export --protocol c2pi``: a trained run to the two bundles of crypto-clear inference."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ensembler.cli.console import Console, need_export
from ensembler.edge_runtime.sealing import BundleSecret, Sealer, checked_for_sealing, new_seal
from ensembler.protocol.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ensembler.crypto.dividing import Divided
    from ensembler.crypto.exporting import CryptoReport
    from ensembler.training.runs import RunFolder

MAX_IMAGES = 1000
NOISE = 0.1  # C2PI, IV-C
ALL = "all"  # of the layers

Keys = Callable[[argparse.Namespace], AbstractContextManager["tuple[str, ...] | None"]]


def add_crypto(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``--protocol c2pi``."""
    group = parser.add_argument_group("crypto-clear inference (--protocol c2pi)")
    group.add_argument(
        "--boundary",
        type=_boundary,
        metavar="LAYER",
        help="of a run with --defense none: the last private layer, as ensembler boundary numbers them, or all; an "
        "Ensembler's boundary is its cut",
    )
    group.add_argument(
        "--noise", type=float, help="on what is revealed, uniform in plus or minus this (default: 0.1; with all: none)"
    )
    group.add_argument(
        "--ring",
        type=int,
        choices=[64, 32],
        help="bits of the integers: 32 takes about half the time and four times the bytes of 64 (default: 64)",
    )
    group.add_argument(
        "--fraction-bits", type=int, help="of the fixed-point numbers (default: 18, or 12 with --ring 32)"
    )
    group.add_argument("--insecure-engine", action="store_true", help="an engine that protects nothing, for tests")


def _boundary(text: str) -> float | str:
    try:
        return ALL if text == ALL else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a layer nor {ALL}") from None


def refuse_crypto(options: argparse.Namespace) -> None:
    """Refuses these options with another protocol.

    Raises:
        ConfigError: one was given.
    """
    given = {
        "--boundary": options.boundary is not None,
        "--noise": options.noise is not None,
        "--fraction-bits": options.fraction_bits is not None,
        "--ring": options.ring is not None,
        "--insecure-engine": options.insecure_engine,
    }
    if used := [name for name, value in given.items() if value]:
        raise ConfigError(f"{' and '.join(used)}: with --protocol c2pi alone")


def export_crypto(
    options: argparse.Namespace, console: Console, keys_to_pin: Keys, secret: BundleSecret | None
) -> tuple[dict[str, Any], list[str]]:
    """Makes the bundles; returns what is said of them, for scripts and for people.

    Args:
        options: of ``ensembler-export``.
        console: told of the progress.
        keys_to_pin: gives the server's public key, new or given, for as long as the export takes.
        secret: encrypts an Ensembler's tail in the client's bundle; None leaves it readable.

    Raises:
        ConfigError: an option that goes with split inference alone, or no boundary.
        EnsemblerError: as ``crypto.exporting.export``.
    """
    need_export()
    import torch

    from ensembler.crypto.bundle import (
        FULL,
        INSECURE,
        LEAST_FRACTION_BITS,
        MAX_NOISE,
        RINGS,
        SPU,
        Settings,
    )
    from ensembler.crypto.exporting import CryptoOptions, export
    from ensembler.training import data as data_sets
    from ensembler.training.runs import RunFolder

    given = {
        "--format": options.format,
        "--server-bundle": options.server_bundle,
        "--require-ssim": options.require_ssim,
        "--target": options.target,
        "--audit-budget": options.audit_budget,
        "--signing-key": options.signing_key,
        "--parties": options.parties,
        "--quantize none": options.quantize != "int8",
        "--server-precision": options.server_precision != "auto",
        "--server-weight-bits": options.server_weight_bits != 8,
        "a second --server-key": len(options.server_key) > 1,
    }
    if unused := [name for name, value in given.items() if value]:
        raise ConfigError(f"--protocol c2pi takes no {' and no '.join(unused)}")
    if options.parity_images < 1:
        raise ConfigError(f"--parity-images {options.parity_images}: at least one")
    ring_bits = Settings.ring_bits if options.ring is None else options.ring
    usual, most = RINGS[ring_bits]
    bits = usual if options.fraction_bits is None else options.fraction_bits
    if not LEAST_FRACTION_BITS <= bits <= most:
        raise ConfigError(f"--fraction-bits {bits}: from {LEAST_FRACTION_BITS} to {most} with --ring {ring_bits}")
    run = RunFolder.open(options.run)
    divided = _divided(options, run)
    if secret is not None and divided.tail is None:
        raise ConfigError("--encrypt-key and --passphrase-file: the client's bundle has nothing secret to encrypt")
    data = data_sets.load(options.data or run.config.data)
    if data.image_size != run.arch.image_size or data.labels != run.labels:
        raise DataError(f"{options.run} was trained on other images or classes than --data has; give the same data")
    count = min(MAX_IMAGES, options.parity_images, len(data.test_x))
    if options.noise is not None:
        noise = options.noise
        if not 0 <= noise < MAX_NOISE:
            raise ConfigError(f"--noise {noise:g}: from 0 to {MAX_NOISE:g}")
    else:
        noise = 0.0 if divided.mode == FULL else NOISE
    with keys_to_pin(options) as public:
        report = export(
            divided,
            torch.from_numpy(data.test_x[:count]),
            torch.from_numpy(data.test_y[:count]),
            options.out,
            CryptoOptions(
                settings=Settings(
                    engine=INSECURE if options.insecure_engine else SPU,
                    ring_bits=ring_bits,
                    fraction_bits=bits,
                ),
                noise_magnitude=noise,
                max_accuracy_drop_points=options.max_accuracy_drop,
                server_public_key=None if public is None else public[0],
                encryption=None if secret is None else new_seal(checked_for_sealing(secret)),
                sealer=None if secret is None else lambda manifest: Sealer(secret, manifest).seal,
            ),
            progress=console.say,
        )
    client, server = options.out / "client", options.out / "server"
    document = {
        "client": str(client),
        "server": str(server),
        "mode": divided.mode,
        "boundary": divided.boundary,
        "accuracy": report.accuracy,
        "noised_accuracy": report.noised_accuracy,
        "images": report.images,
        "layers": report.steps,
        "largest": report.largest,
    }
    lines = [
        f"{report.steps} layers up to {divided.boundary} are computed by two parties; {_seen(divided, report, noise)}",
        f"accuracy: {report.accuracy:.2f}% of the net, {report.noised_accuracy:.2f}% through these bundles "
        f"({report.images} held-out images)",
        f"{client}: the client bundle; no weight of those layers is in it"
        + ("" if divided.tail is None else ", but selector and tail are: secret, for the device only"),
        f"{server}: the server bundle, for its operator",
    ]
    if secret is not None:
        lines.append("the tail is encrypted; bring the key to the device on another way than the bundle")
    if options.insecure_engine:
        lines.append("the engine protects nothing: for tests alone")
    lines.append(f"next: ensembler serve {server} --bind tcp://0.0.0.0:5555")
    return document, lines


def _divided(options: argparse.Namespace, run: RunFolder) -> Divided:
    from ensembler.crypto.dividing import at_cut, of_ensemble
    from ensembler.privacy.boundary_study import chosen_layers, layers_of, plain_net

    if run.config.defense == "ensembler":
        if options.boundary is not None:
            raise ConfigError("--boundary is of a plain net; an Ensembler's bodies begin at its cut, so leave it out")
        return of_ensemble(run)
    if options.boundary is None:
        raise ConfigError(
            "--protocol c2pi needs --boundary: the last layer that stays private (ensembler boundary RUN), or all"
        )
    net = plain_net(run)
    if options.boundary == ALL:
        return at_cut(net, None, run.labels)
    (layer,) = chosen_layers(layers_of(net, run.config.arch), [options.boundary], run.config.arch)
    return at_cut(net, layer.cut, run.labels)


def _seen(divided: Divided, report: CryptoReport, noise: float) -> str:
    if divided.suffix is None:
        return "the server sees nothing, not even the answer"
    answer = "the answer" if divided.tail is None else "what its nets say, but no answer: selector and tail are yours"
    return f"the server sees {'x'.join(map(str, report.shape))} with noise of {noise:g}, and {answer}"
