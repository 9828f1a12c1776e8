"""A divided net becomes the two bundles of crypto-clear inference. Start reading at ``export``."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ensembler.crypto import layers
from ensembler.crypto import steps as step_files
from ensembler.crypto.bundle import (
    FULL,
    INSECURE,
    SEALED_TAIL_FILE,
    STEPS_FILE,
    SUFFIX_FILE,
    TAIL_FILE,
    CryptoManifest,
    Settings,
    to_json,
    weights_file,
)
from ensembler.crypto.dividing import Divided
from ensembler.crypto.steps import IMAGE, Step
from ensembler.export import graphs
from ensembler.export.pipeline import PARTIAL_PREFIX
from ensembler.protocol.errors import ConfigError, ExportError, GateFailedError
from ensembler.protocol.manifest import MANIFEST_NAME, ImageSpec, SealSpec, describe_file
from ensembler.training.models import PIXEL_SCALE, PIXEL_ZERO_POINT, normalise

BATCH_PIXELS = 100 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class CryptoOptions:
    """The options of an export.

    Attributes:
        settings: how the parties compute.
        noise_magnitude: of the client's noise on what is revealed.
        max_accuracy_drop_points: gate on what noise and fixed point cost.
        server_public_key: pinned in the client's bundle; None makes one for plaintext connections.
        encryption: of an Ensembler's tail in the client's bundle; None leaves it readable.
        sealer: of a manifest with that encryption: from a file's name and content to its sealed content.
    """

    settings: Settings
    noise_magnitude: float
    max_accuracy_drop_points: float
    server_public_key: str | None
    encryption: SealSpec | None = None
    sealer: Callable[[CryptoManifest], Callable[[str, bytes], bytes]] | None = None


@dataclass(frozen=True, kw_only=True)
class CryptoReport:
    """What an export measured, in torch on held-out images, the boundary rounded and noised as the parties do.

    Attributes:
        accuracy: of the net, in percent.
        noised_accuracy: with the boundary as it is revealed.
        images: how many.
        largest: of the boundary's numbers, in magnitude.
        largest_inside: of all layers' numbers.
        error: of the boundary's numbers at most, from fixed point alone.
        shape: of the boundary, without the batch.
        steps: how many layers the parties compute.
        step_bytes: of the compiled layers, which both bundles hold.
    """

    accuracy: float
    noised_accuracy: float
    images: int
    largest: float
    largest_inside: float
    error: float
    shape: tuple[int, ...] = ()
    steps: int = 0
    step_bytes: int = 0


def export(
    divided: Divided,
    images: Tensor,
    targets: Tensor,
    out: Path,
    options: CryptoOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> CryptoReport:
    """Writes ``out/client`` and ``out/server``, both or none.

    Args:
        divided: the net, and who computes what of it.
        images: held out, ``(M, 3, H, W)`` uint8.
        targets: their classes, ``(M,)``.
        out: gets the bundles.
        options: see there.
        progress: told what is being made.

    Raises:
        ConfigError: ``out`` holds a bundle already, or noise is asked for where nothing is revealed to the server.
        GateFailedError: noise costs more accuracy than the gate allows, or the boundary's numbers are too large.
        ExportError: a layer cannot be computed by two parties.
        MissingExtraError: the engine is not installed.
    """
    for name in ("client", "server"):
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists; choose another --out or remove it")
    if divided.mode == FULL and options.noise_magnitude:
        raise ConfigError("--noise is for what the server sees of a boundary, and with --boundary all it sees nothing")
    height, width = divided.image_size
    progress("compiling the layers of the two parties")
    image = torch.zeros(2, 3, height, width)
    with torch.inference_mode():
        boundary = divided.prefix(image)
        answers = boundary if divided.suffix is None else divided.suffix(boundary)
    graph = graphs.optimised(graphs.from_torch(divided.prefix, [image]))
    boundary_shape, answer_shape = tuple(boundary.shape[1:]), tuple(answers.shape[1:])
    settings = options.settings
    made: layers.Layers | None = None
    if settings.engine == INSECURE:
        shape = (1, *boundary_shape)
        steps = [Step(name="1:net", operator="net", inputs=(IMAGE,), weights=(), output="v1", shape=shape)]
        weights = graphs.scrubbed(graph)
    else:
        made = layers.to_layers(graph, (1, 3, height, width))
        steps, weights = made.steps, _npz(made.weights)
    progress("accuracy: the net as it is, and through these bundles")
    report = _measured(divided, made, images, targets, options)
    _require(divided, options, report)
    packed = step_files.to_bytes(steps)
    client, server = {STEPS_FILE: packed}, {STEPS_FILE: packed, weights_file(settings.engine): weights}
    if divided.suffix is not None:
        server[SUFFIX_FILE] = _clear(divided.suffix, boundary)
    if divided.tail is not None:
        client[TAIL_FILE] = _clear(divided.tail, answers)
    manifest = CryptoManifest(
        kind="server",
        mode=divided.mode,
        net_id=os.urandom(32).hex(),
        settings=settings,
        image=ImageSpec(height=height, width=width),
        pixel_scale=PIXEL_SCALE,
        pixel_zero_point=PIXEL_ZERO_POINT,
        labels=divided.labels,
        boundary=divided.boundary,
        boundary_shape=boundary_shape,
        answer_shape=answer_shape,
        noise_magnitude=options.noise_magnitude,
        server_public_key=None,
        files={},
    )
    own = replace(manifest, kind="client", server_public_key=options.server_public_key, encryption=options.encryption)
    if options.sealer is not None:
        tail = options.sealer(own)(SEALED_TAIL_FILE, client.pop(TAIL_FILE))
        client[SEALED_TAIL_FILE] = tail
    partial = out / f"{PARTIAL_PREFIX}crypto-{os.getpid()}"
    try:
        partial.mkdir(parents=True, mode=0o700)
        _write(partial / "client", own, client)
        _write(partial / "server", manifest, server)
        for name in ("server", "client"):  # a client alone would be of no use
            (partial / name).rename(out / name)
    except OSError as error:
        raise ExportError(f"--out {out}: cannot be written: {error.strerror}; nothing was exported") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(report, shape=boundary_shape, steps=len(steps), step_bytes=len(packed))


@torch.inference_mode()
def _measured(
    divided: Divided, made: layers.Layers | None, images: Tensor, targets: Tensor, options: CryptoOptions
) -> CryptoReport:
    """Compares the net with what the bundles compute: fixed point in every layer, and noise at the boundary."""
    bits = options.settings.fraction_bits
    generator = torch.Generator().manual_seed(0)
    right = noised_right = 0
    largest = largest_inside = error = 0.0
    computed = None if made is None else made.in_fixed_point(bits)
    batch = max(1, BATCH_PIXELS // math.prod(divided.image_size))
    for start in range(0, len(images), batch):
        x, wanted = normalise(images[start : start + batch]), targets[start : start + batch]
        exact = divided.prefix(x)
        right += int((divided.finished(exact).argmax(1) == wanted).sum())
        if computed is None:
            features = torch.round(exact * 2.0**bits) / 2.0**bits
        else:
            boundary, inside = computed(x.numpy())
            features, largest_inside = torch.from_numpy(boundary), max(largest_inside, inside)
        error = max(error, float((features - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
        noise = (2 * torch.rand(features.shape, generator=generator) - 1) * options.noise_magnitude
        noised_right += int((divided.finished(features + noise).argmax(1) == wanted).sum())
    return CryptoReport(
        accuracy=100.0 * right / len(images),
        noised_accuracy=100.0 * noised_right / len(images),
        images=len(images),
        largest=largest,
        largest_inside=largest_inside,
        error=error,
    )


def _require(divided: Divided, options: CryptoOptions, report: CryptoReport) -> None:
    """Refuses a boundary that cannot be revealed exactly, or that costs too much."""
    room = 2.0 ** (30 - options.settings.fraction_bits)
    if report.largest + options.noise_magnitude >= room:
        raise GateFailedError(
            f"the boundary {divided.boundary} has numbers up to {report.largest:.4g}; with "
            f"{options.settings.fraction_bits} fraction bits they must stay below {room:g}: choose another --boundary, "
            "or fewer --fraction-bits"
        )
    # A product has twice the fraction bits before it is cut; a bit stays free for images that were not tried.
    inside = 2.0 ** (options.settings.ring_bits - 2 - 2 * options.settings.fraction_bits)
    if report.largest_inside >= inside:
        raise GateFailedError(
            f"a layer has numbers up to {report.largest_inside:.4g}; with --ring {options.settings.ring_bits} and "
            f"{options.settings.fraction_bits} fraction bits they must stay below {inside:g}: take --ring 64, or fewer "
            "--fraction-bits"
        )
    drop = report.accuracy - report.noised_accuracy
    if not drop <= options.max_accuracy_drop_points:  # nor where the gate is not a number
        raise GateFailedError(
            f"noise of {options.noise_magnitude:g} at {divided.boundary} and {options.settings.fraction_bits} fraction "
            f"bits (an error of up to {report.error:.2g}) cost {drop:.2f} points of accuracy "
            f"({report.accuracy:.2f}% to {report.noised_accuracy:.2f}%), more than "
            f"{options.max_accuracy_drop_points:g}: lower --noise, choose a later --boundary, or raise "
            "--max-accuracy-drop"
        )


def _clear(part: nn.Module, example: Tensor) -> bytes:
    return graphs.scrubbed(graphs.optimised(graphs.from_torch(part, [torch.zeros(example.shape)])))


def _npz(tensors: dict[str, layers.Array]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **tensors)
    return stream.getvalue()


def _write(folder: Path, manifest: CryptoManifest, files: dict[str, bytes]) -> None:
    folder.mkdir(mode=0o700)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    entries = {name: describe_file(folder / name) for name in files}
    (folder / MANIFEST_NAME).write_bytes(to_json(replace(manifest, files=entries)))
    (folder / MANIFEST_NAME).chmod(0o600)
