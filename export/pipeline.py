"""From a run folder to a client bundle and a server bundle: the work behind ``ensembler-export``.

The server bundle is made first and from stage 1 alone; the client's graphs may be calibrated with the secret head.
Everything is built in a hidden folder beside the target and renamed when the parity gates hold, so an export that
fails or is killed leaves no bundle behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from ensembler.export import graphs, parity
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import BundleMismatchError, ConfigError, DataError, ExportError
from ensembler.protocol.manifest import (
    MANIFEST_NAME,
    ClientManifest,
    ImageSpec,
    NoiseMode,
    Precision,
    ServerManifest,
    WireSpec,
    describe_file,
    load_server,
    to_json,
)
from ensembler.training import data as data_sets
from ensembler.training.models import PIXEL_SCALE, PIXEL_ZERO_POINT, normalise
from ensembler.training.runs import RunFolder
from ensembler.training.stages import Client, load_client, load_stage1, mixed_features
from ensembler.training.wire import fake_quantise, fake_quantise_answers

CALIBRATION_IMAGES = 512
BODY_CALIBRATION_IMAGES = 1024
PIXEL_CODEC = AffineCodec(scale=PIXEL_SCALE, zero_point=PIXEL_ZERO_POINT)
REPORT_NAME = "parity.json"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of ``ensembler-export``.

    Attributes:
        client_precision: of head and tail.
        server_precision: of the bodies; ``auto`` is int8 where that reaches the gate, else float32. Not used when
            ``server_bundle`` is given.
        server_bundle: an existing server bundle of the same stage 1: only a client bundle is made for it.
        server_public_key: pinned in the client bundle; None makes a bundle for plaintext connections.
        data: a data specification instead of the run's own.
        parity_images: how many held-out images the report uses.
        gates: what must hold.
    """

    client_precision: Precision = "int8"
    server_precision: Literal["auto", "int8", "float32"] = "auto"
    server_bundle: Path | None = None
    server_public_key: str | None = None
    data: str | None = None
    parity_images: int = 10_000
    gates: parity.Gates = field(default_factory=parity.Gates)


def export(
    run_path: Path, out: Path, options: ExportOptions, progress: Callable[[str], None] = lambda _: None
) -> parity.ParityReport:
    """Exports a run.

    Args:
        run_path: a finished run folder.
        out: gets ``client/``, ``server/`` (unless ``options.server_bundle``) and ``parity.json``.
        options: see there.
        progress: told what is being made.

    Raises:
        ConfigError: ``out`` already holds a bundle, or cannot be written.
        DataError: the run or its data cannot be read.
        BundleMismatchError: ``options.server_bundle`` belongs to other nets.
        GateFailedError: the parity report is worse than the gates; the message has the table.
        ExportError: a graph cannot be made.
    """
    run = RunFolder.open(run_path)
    wire = run.read_wire().spec
    server = load_server(options.server_bundle) if options.server_bundle is not None else None
    if server is not None and server.wire.bodies_id != wire.bodies_id:
        raise BundleMismatchError(
            f"--server-bundle {options.server_bundle} holds other nets than the run {run_path}: the second client "
            "must come from ensembler train --stage1 with the first client's run"
        )
    for name in ("client", "server")[: 1 if server is not None else 2]:
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists; choose another --out, or remove it")
    dataset = data_sets.load(options.data or run.config.data)
    if dataset.image_size != run.arch.image_size or dataset.labels != run.labels:
        raise DataError(f"{run_path} was trained on other images or classes than --data has; give the same data")
    nets, client = load_stage1(run), load_client(run)
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    try:
        order = run.read_wire().order
        bodies = [nets[i].net.body for i in order]
        held_out = torch.from_numpy(np.ascontiguousarray(dataset.test_x[: parity.SQNR_IMAGES]))
        features = mixed_features(nets, wire.feature_codec, held_out)
        if server is None:
            server_folder = partial / "server"
            samples = mixed_features(
                nets,
                wire.feature_codec,
                torch.from_numpy(np.ascontiguousarray(dataset.train_x[:BODY_CALIBRATION_IMAGES])),
            )
            server, server_stages = _make_server(server_folder, bodies, wire, samples, features, options, progress)
        else:
            assert options.server_bundle is not None
            server_folder = options.server_bundle
            paths = {name: server_folder / name for name in server.files}
            server_stages = parity.measure_bodies(bodies, paths, server, features)
        progress("client: head and tail")
        manifest = _write_client(partial / "client", client, bodies, run, dataset.train_x[:CALIBRATION_IMAGES], options)
        progress("parity report")
        files = {name: partial / "client" / name for name in manifest.files}
        files |= {name: server_folder / name for name in server.files}
        count = options.parity_images
        report = parity.measure(
            client,
            bodies,
            files,
            (manifest, server),
            dataset.test_x[:count],
            dataset.test_y[:count],
            options.gates,
            server_stages,
        )
        report.require()
        (partial / REPORT_NAME).touch(mode=0o600)
        (partial / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
        if options.server_bundle is None:
            (partial / "server").rename(out / "server")
        (partial / REPORT_NAME).rename(out / REPORT_NAME)
        (partial / "client").rename(out / "client")
    except OSError as error:
        raise ExportError(f"--out {out}: cannot be written: {error.strerror}; nothing was exported") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


# --- the server bundle: stage 1 only ---


@torch.inference_mode()
def _make_server(
    folder: Path,
    bodies: Sequence[nn.Module],
    wire: WireSpec,
    samples: Tensor,
    held_out: Tensor,
    options: ExportOptions,
    progress: Callable[[str], None],
) -> tuple[ServerManifest, tuple[parity.StageParity, ...]]:
    """Writes and measures the server bundle. It is given no client, selector or stage-3 tensor, so it can use none.

    With ``auto`` the bodies are float32 where int8 misses the gate on stage-1 features.
    """
    wanted = options.server_precision
    template = graphs.from_torch(bodies[0], [torch.zeros(2, *wire.feature_shape)])
    for precision in ("int8", "float32") if wanted == "auto" else (wanted,):
        shutil.rmtree(folder, ignore_errors=True)
        manifest = _write_server(folder, template, bodies, wire, samples, precision, progress)
        stages = parity.measure_bodies(bodies, {name: folder / name for name in manifest.files}, manifest, held_out)
        required_db = stages[-1].required_db(options.gates.min_sqnr_db)
        if stages[-1].sqnr_db >= required_db:
            break
        if precision != wanted:
            progress(f"server: {precision} reaches {stages[-1].sqnr_db:.1f} dB, the gate is {required_db:.3g} dB")
    return manifest, stages


def _write_server(
    folder: Path,
    template: onnx.ModelProto,
    bodies: Sequence[nn.Module],
    wire: WireSpec,
    samples: Tensor,
    precision: Precision,
    progress: Callable[[str], None],
) -> ServerManifest:
    folder.mkdir(mode=0o755)
    names = tuple(f"body_{position:02d}.onnx" for position in range(len(bodies)))
    for position, body in enumerate(bodies):
        progress(f"server: body {position + 1} of {len(bodies)}, {precision}")
        graph = graphs.optimised(graphs.with_weights(template, body.state_dict()))
        codec = wire.answer_codecs[position]
        if precision == "int8":
            graph = graphs.quantised(
                graph, {graphs.INPUT: samples.numpy()}, input_codec=wire.feature_codec, output_codec=codec
            )
        graph = graphs.attach_codes(graph, "features", wire.feature_codec, output="answer", out_codec=codec)
        (folder / names[position]).write_bytes(graphs.scrubbed(graph))
    manifest = ServerManifest(
        wire=wire,
        precision=precision,
        bodies=names,
        files={name: describe_file(folder / name) for name in names},
    )
    (folder / MANIFEST_NAME).write_bytes(to_json(manifest))
    return manifest


# --- the client bundle ---


class _Head(nn.Module):
    """Head and noise as one graph; with fresh noise it is a second input."""

    def __init__(self, client: Client, mode: NoiseMode) -> None:
        super().__init__()
        self.head = client.head
        self.mode = mode
        self.constant: Tensor
        self.register_buffer("constant", client.noise)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        features: Tensor = self.head(x)
        if noise is not None:
            return features + noise
        return features + self.constant if self.mode == "fixed" else features


class _Tail(nn.Module):
    """The tail behind the selector: ``(B, P, F)``, already weighted with 1/P, to logits."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.tail = client.tail

    def forward(self, selected: Tensor) -> Tensor:
        logits: Tensor = self.tail(selected.flatten(1))
        return logits


@torch.inference_mode()
def _write_client(
    folder: Path,
    client: Client,
    bodies: Sequence[nn.Module],
    run: RunFolder,
    images: Pixels,
    options: ExportOptions,
) -> ClientManifest:
    folder.mkdir(mode=0o700)
    wire, config = client.wire, run.config
    mode: NoiseMode = "fixed"
    if config.stage1_noise_std == 0:
        mode = "none"
    elif client.fresh_noise_std > 0:
        mode = "fresh"
    x = normalise(torch.from_numpy(np.ascontiguousarray(images)))
    features = client.head(x)
    sent = fake_quantise(client.noised(features), wire.feature_codec)
    chosen = torch.stack([bodies[i](sent) for i in client.selector], dim=1)
    codecs = tuple(wire.answer_codecs[i] for i in client.selector)
    weighted = fake_quantise_answers(chosen, codecs) / len(client.selector)
    models = {
        "head.onnx": _head_graph(client, mode, x, features, options.client_precision),
        "tail.onnx": _tail_graph(client, weighted, options.client_precision),
    }
    for name, data in models.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(data)
    manifest = ClientManifest(
        wire=wire,
        image=ImageSpec(height=run.arch.image_size[0], width=run.arch.image_size[1]),
        labels=run.labels,
        noise_mode=mode,
        noise_std=config.stage1_noise_std,
        precision=options.client_precision,
        head="head.onnx",
        tail="tail.onnx",
        server_public_key=options.server_public_key,
        files={name: describe_file(folder / name) for name in models},
    )
    (folder / MANIFEST_NAME).touch(mode=0o600)
    (folder / MANIFEST_NAME).write_bytes(to_json(manifest))
    return manifest


def _head_graph(client: Client, mode: NoiseMode, x: Tensor, features: Tensor, precision: Precision) -> bytes:
    codec = client.wire.feature_codec
    samples = {graphs.INPUT: x.numpy()}
    examples, inputs = [x[:2]], [graphs.INPUT]
    if mode == "fresh":
        noise = client.fresh_noise_std * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        samples[graphs.NOISE] = noise.numpy()
        examples, inputs = [x[:2], noise[:2]], [graphs.INPUT, graphs.NOISE]
    graph = graphs.optimised(graphs.from_torch(_Head(client, mode).eval(), examples, inputs=inputs))
    if precision == "int8":
        graph = graphs.quantised(graph, samples, input_codec=PIXEL_CODEC, output_codec=codec)
    graph = graphs.attach_codes(graph, "image", PIXEL_CODEC, output="features", out_codec=codec)
    return graphs.scrubbed(graphs.channels_last(graph, "image"))


def _tail_graph(client: Client, weighted: Tensor, precision: Precision) -> bytes:
    graph = graphs.optimised(graphs.from_torch(_Tail(client).eval(), [weighted[:2]]))
    if precision == "int8":
        graph = graphs.quantised(graph, {graphs.INPUT: weighted.numpy()})
    wire = client.wire
    graph = graphs.select_answers(graph, "answers", wire.answer_codecs, client.selector, wire.answer_width)
    return graphs.scrubbed(graph)
