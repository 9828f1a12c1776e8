"""A plain net and a boundary become the two bundles of crypto-clear inference. Start reading at ``export``."""

from __future__ import annotations

import io
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
    INSECURE,
    STEPS_FILE,
    SUFFIX_FILE,
    CryptoManifest,
    Settings,
    to_json,
    weights_file,
)
from ensembler.crypto.steps import IMAGE, Step
from ensembler.export import graphs
from ensembler.export.pipeline import PARTIAL_PREFIX
from ensembler.protocol.errors import ConfigError, ExportError, GateFailedError
from ensembler.protocol.manifest import MANIFEST_NAME, ImageSpec, describe_file
from ensembler.training.models import PIXEL_SCALE, PIXEL_ZERO_POINT, normalise
from ensembler.training.splits import Cut, TracedNet

BATCH = 100


@dataclass(frozen=True, kw_only=True)
class CryptoOptions:
    """The options of an export.

    Attributes:
        settings: how the parties compute.
        noise_magnitude: of the client's noise on what is revealed.
        max_accuracy_drop_points: gate on what noise and fixed point cost.
        server_public_key: pinned in the client's bundle; None makes one for plaintext connections.
    """

    settings: Settings
    noise_magnitude: float
    max_accuracy_drop_points: float
    server_public_key: str | None


@dataclass(frozen=True, kw_only=True)
class CryptoReport:
    """What an export measured, in torch on held-out images, the boundary rounded and noised as the parties do.

    Attributes:
        accuracy: of the net, in percent.
        noised_accuracy: with the boundary as the server gets it.
        images: how many.
        largest: of the boundary's numbers, in magnitude.
        steps: how many layers the parties compute.
        step_bytes: of the compiled layers, which both bundles hold.
    """

    accuracy: float
    noised_accuracy: float
    images: int
    largest: float
    steps: int
    step_bytes: int


def export(
    net: TracedNet,
    cut: Cut,
    labels: tuple[str, ...],
    images: Tensor,
    targets: Tensor,
    out: Path,
    options: CryptoOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> CryptoReport:
    """Writes ``out/client`` and ``out/server``, both or none.

    Args:
        net: whole, with its weights.
        cut: what comes before it is computed by the two parties.
        labels: the class names.
        images: held out, ``(M, 3, H, W)`` uint8.
        targets: their classes, ``(M,)``.
        out: gets the bundles.
        options: see there.
        progress: told what is being made.

    Raises:
        ConfigError: ``out`` holds a bundle already.
        GateFailedError: noise costs more accuracy than the gate allows, or the boundary's numbers are too large.
        ExportError: a layer cannot be computed by two parties.
        MissingExtraError: the engine is not installed.
    """
    for name in ("client", "server"):
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists; choose another --out or remove it")
    prefix, suffix = net.chain([cut.names[0]])
    progress("accuracy: the boundary as it is, and as the server gets it")
    accuracy, noised, largest = _measured(prefix.eval(), suffix.eval(), images, targets, options)
    settings = options.settings
    room = 2.0 ** (30 - settings.fraction_bits)
    if largest + options.noise_magnitude >= room:
        raise GateFailedError(
            f"the boundary {cut.names[0]} has numbers up to {largest:.4g}; with {settings.fraction_bits} fraction bits "
            f"they must stay below {room:g}: choose another --boundary"
        )
    drop = accuracy - noised
    if drop > options.max_accuracy_drop_points:
        raise GateFailedError(
            f"noise of {options.noise_magnitude:g} at {cut.names[0]} costs {drop:.2f} points of accuracy "
            f"({accuracy:.2f}% to {noised:.2f}%), more than {options.max_accuracy_drop_points:g}: lower --noise, "
            "choose a later --boundary, or raise --max-accuracy-drop"
        )
    height, width = net.image_size
    progress("compiling the layers before the boundary")
    example = torch.zeros(2, 3, height, width)
    graph = graphs.optimised(graphs.from_torch(prefix, [example]))
    after = graphs.optimised(graphs.from_torch(suffix, [torch.zeros(2, *cut.shape)]))
    steps: list[Step]
    if settings.engine == INSECURE:
        steps = [Step(name="1:net", operator="net", inputs=(IMAGE,), weights=(), output="v1", shape=(1, *cut.shape))]
        weights = graphs.scrubbed(graph)
    else:
        steps, tensors = layers.to_steps(graph, (1, 3, height, width))
        weights = _npz(tensors)
    packed = step_files.to_bytes(steps)
    partial = out / f"{PARTIAL_PREFIX}crypto-{os.getpid()}"
    manifest = CryptoManifest(
        kind="server",
        net_id=os.urandom(32).hex(),
        settings=settings,
        image=ImageSpec(height=height, width=width),
        pixel_scale=PIXEL_SCALE,
        pixel_zero_point=PIXEL_ZERO_POINT,
        labels=labels,
        boundary=cut.names[0],
        boundary_shape=cut.shape,
        noise_magnitude=options.noise_magnitude,
        server_public_key=None,
        files={},
    )
    try:
        partial.mkdir(parents=True, mode=0o700)
        _write(partial / "client", manifest, {STEPS_FILE: packed}, "client", options.server_public_key)
        server = {STEPS_FILE: packed, SUFFIX_FILE: graphs.scrubbed(after), weights_file(settings.engine): weights}
        _write(partial / "server", manifest, server, "server", None)
        for name in ("server", "client"):  # a client alone would be of no use
            (partial / name).rename(out / name)
    except OSError as error:
        raise ExportError(f"--out {out}: cannot be written: {error.strerror}; nothing was exported") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return CryptoReport(
        accuracy=accuracy,
        noised_accuracy=noised,
        images=len(images),
        largest=largest,
        steps=len(steps),
        step_bytes=len(packed),
    )


@torch.inference_mode()
def _measured(
    prefix: nn.Module, suffix: nn.Module, images: Tensor, targets: Tensor, options: CryptoOptions
) -> tuple[float, float, float]:
    """Returns accuracy in percent without and with rounding and noise, and the boundary's largest number."""
    unit = 2.0**-options.settings.fraction_bits
    generator = torch.Generator().manual_seed(0)
    right = noised_right = 0
    largest = 0.0
    for start in range(0, len(images), BATCH):
        x, wanted = normalise(images[start : start + BATCH]), targets[start : start + BATCH]
        features = prefix(x)
        noise = (2 * torch.rand(features.shape, generator=generator) - 1) * options.noise_magnitude
        largest = max(largest, float(features.abs().max()))
        right += int((suffix(features).argmax(1) == wanted).sum())
        seen = torch.round((features + noise) / unit) * unit
        noised_right += int((suffix(seen).argmax(1) == wanted).sum())
    return 100.0 * right / len(images), 100.0 * noised_right / len(images), largest


def _npz(tensors: dict[str, layers.Array]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **tensors)
    return stream.getvalue()


def _write(folder: Path, manifest: CryptoManifest, files: dict[str, bytes], kind: str, key: str | None) -> None:
    folder.mkdir(mode=0o700)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    entries = {name: describe_file(folder / name) for name in files}
    stated = replace(manifest, kind=kind, server_public_key=key, files=entries)
    (folder / MANIFEST_NAME).write_bytes(to_json(stated))
    (folder / MANIFEST_NAME).chmod(0o600)
