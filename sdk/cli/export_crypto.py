"""``ensembler-export --protocol c2pi``: a plain net and a boundary to the two bundles of crypto-clear inference."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ensembler.cli.console import Console, need_export
from ensembler.protocol.errors import ConfigError, DataError

MAX_IMAGES = 1000

Keys = Callable[[argparse.Namespace], AbstractContextManager["tuple[str, ...] | None"]]


def export_crypto(options: argparse.Namespace, console: Console, keys_to_pin: Keys) -> tuple[dict[str, Any], list[str]]:
    """Makes the bundles; returns what is said of them, for scripts and for people.

    Args:
        options: of ``ensembler-export``.
        console: told of the progress.
        keys_to_pin: gives the server's public key, new or given, for as long as the export takes.

    Raises:
        ConfigError: an option that goes with split inference alone, or no boundary.
        EnsemblerError: as ``crypto.exporting.export``.
    """
    need_export()
    import torch

    from ensembler.crypto.bundle import INSECURE, SPU, Settings
    from ensembler.crypto.exporting import CryptoOptions, export
    from ensembler.privacy.boundary_study import chosen_layers, layers_of, plain_net
    from ensembler.training import data as data_sets
    from ensembler.training.runs import RunFolder

    given = {
        "--format": options.format,
        "--server-bundle": options.server_bundle,
        "--encrypt-key": options.encrypt_key,
        "--passphrase-file": options.passphrase_file,
        "--require-ssim": options.require_ssim,
        "--target": options.target,
    }
    if unused := [name for name, value in given.items() if value]:
        raise ConfigError(f"--protocol c2pi takes no {' and no '.join(unused)}: nothing of the net is on the device")
    if options.boundary is None:
        raise ConfigError(
            "--protocol c2pi needs --boundary: the last layer that stays private (ensembler boundary RUN)"
        )
    run = RunFolder.open(options.run)
    net = plain_net(run)
    arch = run.config.arch
    (layer,) = chosen_layers(layers_of(net, arch), [options.boundary], arch)
    data = data_sets.load(options.data or run.config.data)
    if data.image_size != run.arch.image_size or data.labels != run.labels:
        raise DataError(f"{options.run} was trained on other images or classes than --data has; give the same data")
    count = min(MAX_IMAGES, options.parity_images, len(data.test_x))
    with keys_to_pin(options) as public:
        report = export(
            net,
            layer.cut,
            run.labels,
            torch.from_numpy(data.test_x[:count]),
            torch.from_numpy(data.test_y[:count]),
            options.out,
            CryptoOptions(
                settings=Settings(engine=INSECURE if options.insecure_engine else SPU),
                noise_magnitude=options.noise,
                max_accuracy_drop_points=options.max_accuracy_drop,
                server_public_key=None if public is None else public[0],
            ),
            progress=console.say,
        )
    client, server = options.out / "client", options.out / "server"
    document = {
        "client": str(client),
        "server": str(server),
        "boundary": layer.cut.names[0],
        "accuracy": report.accuracy,
        "noised_accuracy": report.noised_accuracy,
        "images": report.images,
        "layers": report.steps,
        "largest": report.largest,
    }
    lines = [
        f"{report.steps} layers up to {layer.cut.names[0]} are computed by two parties; what the server sees then is "
        f"{'x'.join(map(str, layer.cut.shape))} with noise of {options.noise:g}",
        f"accuracy: {report.accuracy:.2f}% without noise, {report.noised_accuracy:.2f}% as the server gets it "
        f"({report.images} held-out images)",
        f"{client}: the client bundle; no weight is in it",
        f"{server}: the server bundle, for its operator",
    ]
    if options.insecure_engine:
        lines.append("the engine protects nothing: for tests alone")
    lines.append(f"next: ensembler serve {server} --bind tcp://0.0.0.0:5555")
    return document, lines
