"""From a run folder to a client bundle and a server bundle: the work behind ``ensembler-export``.

The server bundle is made first and from stage 1 alone; the client's graphs may be calibrated with the secret head.
Everything is built in a hidden folder beside the target and renamed when the gates hold, so an export that
fails or is killed leaves no bundle behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from ensembler.edge_runtime.sealing import SUFFIX, BundleSecret, Sealer, checked_for_sealing, new_seal
from ensembler.export import client_models, graphs, parity, torch_bodies
from ensembler.protocol.errors import BundleMismatchError, ConfigError, DataError, ExportError
from ensembler.protocol.manifest import (
    MANIFEST_NAME,
    BodiesFormat,
    ClientManifest,
    ImageSpec,
    ModelFormat,
    ModelPair,
    PartySpec,
    Precision,
    ServerManifest,
    WireSpec,
    describe_file,
    load_server,
    to_json,
)
from ensembler.training import data as data_sets
from ensembler.training.data import Dataset
from ensembler.training.fixing import mixed_features
from ensembler.training.models import normalise
from ensembler.training.operators import heard, heard_by, held, party_sizes
from ensembler.training.runs import RunFolder, bodies_digest
from ensembler.training.stage1 import Stage1Net, load_stage1
from ensembler.training.stages import Client, load_client
from ensembler.training.wire import fake_quantise, fake_quantise_answers

CALIBRATION_IMAGES = 512
BODY_CALIBRATION_IMAGES = 1024
REPORT_NAME = "parity.json"
PARTIAL_PREFIX = ".partial-"
CLIENT_NAME = "client"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of ``ensembler-export``.

    Attributes:
        client_precision: of head and tail.
        formats: of head and tail; of several the one that is fastest here becomes the bundle's default.
        server_precision: of the bodies; ``auto`` is int8 where that reaches the gate, else float32. Not used when
            ``server_bundles`` are given.
        server_weight_bits: of int8 bodies; 7 is faster on servers without VNNI, and a little less exact.
        server_format: of the bodies. In ``torch`` they are float32.
        parties: among how many operators the N bodies are divided, each with a server bundle of its own; None takes the
            run's, of which there may be several where it was trained for them (``training.operators``).
        server_bundles: existing server bundles of the same stage 1, one for each operator: only a client bundle is made
            for them.
        server_public_keys: pinned in the client bundle, one for each operator; None makes a bundle for plaintext
            connections.
        data: a data specification instead of the run's own.
        parity_images: how many held-out images the report uses.
        gates: what must hold.
        secret: encrypts head and tail in the client bundle; None leaves them readable.
    """

    client_precision: Precision = "int8"
    formats: tuple[ModelFormat, ...] = ("onnx",)
    server_precision: Literal["auto", "int8", "float32"] = "auto"
    server_weight_bits: Literal[7, 8] = 8
    server_format: BodiesFormat = "onnx"
    parties: int | None = None
    server_bundles: tuple[Path, ...] = ()
    server_public_keys: tuple[str, ...] | None = None
    data: str | None = None
    parity_images: int = 10_000
    gates: parity.Gates = field(default_factory=parity.Gates)
    secret: BundleSecret | None = None


def export(
    run_path: Path,
    out: Path,
    options: ExportOptions,
    progress: Callable[[str], None] = lambda _: None,
    approve: Callable[[Path], Sequence[str]] | None = None,
) -> parity.ParityReport:
    """Exports a run.

    Args:
        run_path: a finished run folder.
        out: gets ``client/``, ``server/`` (``server_0/``, ``server_1/``, ... for several operators; nothing with
            ``options.server_bundles``) and ``parity.json``.
        options: see there.
        progress: told what is being made.
        approve: called with the hidden folder once the parity gates hold, the bundles in it by their names. It may add
            to the client bundle, and to the folder: it returns the names of the files that shall lie in ``out`` too.
            What it raises ends the export.

    Raises:
        ConfigError: ``out`` already holds a bundle, or cannot be written; the passphrase is too short; or the formats
            do not go with the precision.
        DataError: the run or its data cannot be read.
        BundleMismatchError: ``options.server_bundles`` belong to other nets.
        GateFailedError: the parity report is worse than the gates; the message has the table.
        ExportError: a graph cannot be made.
        MissingExtraError: the package that encrypts a bundle, or that makes TFLite models, is not installed.
    """
    client_models.check(options.formats, options.client_precision)
    _check_server(options)
    if options.secret is not None:
        checked_for_sealing(options.secret)
    job = _checked(run_path, out, options)
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=out))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    try:
        with in_use(partial):
            with _scratch(partial / "scratch"):
                report = _build(job, partial, options, progress)
            report.require()
            (partial / REPORT_NAME).touch(mode=0o600)
            (partial / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
            added = approve(partial) if approve is not None else ()
            # The client comes last: where it is, everything is.
            _publish(partial, out, (*job.made, REPORT_NAME, *added, CLIENT_NAME))
    except OSError as error:
        raise ExportError(f"--out {out}: cannot be written: {error.strerror}; nothing was exported") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Has temporary files written into ``folder``, onnxruntime's too.

    Head, noise and tail pass through them as plain graphs. In the system's folder a kill would leave them behind.
    """
    folder.mkdir(mode=0o700)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _publish(partial: Path, out: Path, names: Sequence[str]) -> None:
    """Moves all of ``names`` into ``out``, or none."""
    moved: list[str] = []
    try:
        for name in names:
            (partial / name).rename(out / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (out / name).rename(partial / name)
        raise


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Marks a file or folder as this process's; the system takes the mark off however the process ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether what is there was left behind: no process has it ``in_use``."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def remove_abandoned(out: Path) -> None:
    """Removes the hidden folders of exports that were killed; they hold secrets, and nothing loads them."""
    for partial in out.glob(f"{PARTIAL_PREFIX}*"):
        if is_abandoned(partial):
            shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Job:
    """What is to be exported, all of it read and checked.

    Attributes:
        run: the run folder.
        dataset: its images.
        client: the trained client.
        nets: the stage-1 nets, in training order.
        bodies: their bodies, in the server's order.
        wires: one for each operator.
        parties: what the client bundle says of each operator.
        existing: the server bundles that are there already, folder and manifest; empty if they are to be made.
        made: the names of the server bundles to make.
    """

    run: RunFolder
    dataset: Dataset
    client: Client
    nets: Sequence[Stage1Net]
    bodies: Sequence[nn.Module]
    wires: Sequence[WireSpec]
    parties: tuple[PartySpec, ...]
    existing: Sequence[tuple[Path, ServerManifest]]
    made: Sequence[str]


def _check_server(options: ExportOptions) -> None:
    """Refuses a server bundle that cannot be made, before anything is."""
    if options.server_format == "torch" and options.server_precision == "int8":
        raise ConfigError("--format torch makes float32 bodies: leave --server-precision int8 out, or --format torch")
    if options.server_weight_bits != 8 and (
        options.server_format == "torch" or options.server_precision == "float32" or options.server_bundles
    ):
        raise ConfigError(
            f"--server-weight-bits {options.server_weight_bits} is of int8 bodies that are made now: leave it out, or "
            "--format torch, --server-precision float32 and --server-bundle"
        )
    if options.server_format == "torch" and options.server_bundles:
        raise ConfigError("--format torch is of the bodies, and --server-bundle names bodies that are there already")


def _checked(run_path: Path, out: Path, options: ExportOptions) -> _Job:
    run = RunFolder.open(run_path)
    existing = [(folder, load_server(folder)) for folder in options.server_bundles]
    wire, order = run.read_wire().spec, run.read_wire().order
    sizes = [server.wire.num_nets for _, server in existing] or sizes_of(run, options.parties)
    keys = options.server_public_keys
    if keys is not None and len(keys) != len(sizes):
        raise ConfigError(f"{len(keys)} --server-key for {len(sizes)} operators: give one for each, in their order")
    nets = load_stage1(run)
    bodies = [nets[i].net.body for i in order]
    wires = party_wires(bodies, wire, sizes)
    if existing and [server.wire.bodies_id for _, server in existing] != [each.bodies_id for each in wires]:
        raise BundleMismatchError(
            f"--server-bundle {', '.join(map(str, options.server_bundles))} holds other nets than the run {run_path}: "
            "the second client must come from ensembler train --stage1 with the first client's run, and several "
            "bundles must be given in the order in which they were exported"
        )
    made = [] if existing else server_names(len(sizes))
    for name in (CLIENT_NAME, *made):
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists; choose another --out, or remove it")
    dataset = data_sets.load(options.data or run.config.data)
    if dataset.image_size != run.arch.image_size or dataset.labels != run.labels:
        raise DataError(f"{run_path} was trained on other images or classes than --data has; give the same data")
    parties = tuple(
        PartySpec(
            bodies_id=each.bodies_id,
            num_nets=each.num_nets,
            server_public_key=None if keys is None else keys[i],
            channels=heard_by(bodies[start]),
        )
        for i, (each, start) in enumerate(zip(wires, accumulate(sizes, initial=0), strict=False))
    )
    return _Job(run, dataset, load_client(run), nets, bodies, wires, parties, existing, made)


def _build(job: _Job, partial: Path, options: ExportOptions, progress: Callable[[str], None]) -> parity.ParityReport:
    """Writes the bundles into ``partial`` and measures them."""
    client = job.client
    codec = client.wire.feature_codec

    def arrived(images: Pixels) -> Tensor:
        return mixed_features(job.nets, codec, torch.from_numpy(np.ascontiguousarray(images)))

    data = job.dataset
    features = arrived(data.test_x[: parity.SQNR_IMAGES])
    if job.existing:
        servers = job.existing
        server_stages = parity.measure_bodies(job.bodies, servers, features)
    else:
        folders = [partial / name for name in job.made]
        samples = arrived(data.train_x[:BODY_CALIBRATION_IMAGES])
        servers, server_stages = _make_servers(folders, job.bodies, job.wires, samples, features, options, progress)
    progress("client: head and tail")
    folder = partial / CLIENT_NAME
    manifest, float32_ms = _write_client(folder, client, job, data.train_x[:CALIBRATION_IMAGES], options)
    progress("parity report")
    count = options.parity_images
    return parity.measure(
        client,
        job.bodies,
        (folder, manifest),
        servers,
        data.test_x[:count],
        data.test_y[:count],
        options.gates,
        server_stages,
        options.secret,
        float32_ms,
    )


# --- several operators ---


def made_for(run: Path, parties: int | None) -> list[str]:
    """Returns the folders of the server bundles that an export of ``run`` makes; arguments as ``sizes_of``."""
    return server_names(len(sizes_of(RunFolder.open(run), parties)))


def server_names(parties: int) -> list[str]:
    """Returns the folders of the server bundles."""
    return ["server"] if parties == 1 else [f"server_{index}" for index in range(parties)]


def sizes_of(run: RunFolder, parties: int | None) -> list[int]:
    """Returns how many bodies each operator gets.

    Args:
        run: what is exported.
        parties: how many operators; None takes the run's.

    Raises:
        ConfigError: as many cannot be.
    """
    trained = run.config.parties
    if trained > 1 and parties not in (None, trained):
        raise ConfigError(f"--parties {parties}: the run was trained for {trained}, each of which hears its own codes")
    return party_sizes(run.read_wire().spec.num_nets, trained if parties is None else parties)


def party_wires(bodies: Sequence[nn.Module], wire: WireSpec, sizes: Sequence[int]) -> list[WireSpec]:
    """Returns the wire of each operator: the bodies in the wire's order, ``sizes`` of them each.

    The order was shuffled before the selector was drawn, so who gets which body says nothing of it.
    """
    if sum(sizes) != wire.num_nets:
        raise BundleMismatchError(
            f"--server-bundle holds other nets than the run, or not all of them: {sum(sizes)} instead of "
            f"{wire.num_nets}; give one for each operator, in the order of the first export"
        )
    if len(sizes) == 1:
        return [wire]
    wires, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        codecs = wire.answer_codecs[part]
        digest = bodies_digest([held(body) for body in bodies[part]], wire.feature_codec, codecs)
        shape = wire.feature_shape
        if (channels := heard_by(bodies[part][0])) is not None:
            shape = (channels[1] - channels[0], *shape[1:])
        wires.append(replace(wire, bodies_id=digest, feature_shape=shape, answer_codecs=codecs))
    return wires


# --- the server bundles: stage 1 only ---


class Numbers(NamedTuple):
    """What bodies compute with; ``weight_bits`` is of int8 alone."""

    precision: Precision
    weight_bits: Literal[7, 8] = 8


@torch.inference_mode()
def _make_servers(
    folders: Sequence[Path],
    bodies: Sequence[nn.Module],
    wires: Sequence[WireSpec],
    samples: Tensor,
    held_out: Tensor,
    options: ExportOptions,
    progress: Callable[[str], None],
) -> tuple[list[tuple[Path, ServerManifest]], tuple[parity.StageParity, ...]]:
    """Writes and measures the server bundles. It is given no client, selector or stage-3 tensor, so it can use none.

    With ``auto`` the bodies are float32 where int8 misses the gate on stage-1 features.
    """
    wanted, template = options.server_precision, None
    if options.server_format == "torch":
        wanted = "float32"
    else:
        template = graphs.from_torch(held(bodies[0]), [torch.zeros(2, *wires[0].feature_shape)])
    for precision in ("int8", "float32") if wanted == "auto" else (wanted,):
        numbers = Numbers(precision, options.server_weight_bits)
        servers, left = [], list(bodies)
        for folder, wire in zip(folders, wires, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            mine, left = left[: wire.num_nets], left[wire.num_nets :]
            label = "server" if len(folders) == 1 else folder.name
            received = heard(mine[0], samples)
            inner = [held(body) for body in mine]
            servers.append((folder, write_server(folder, template, inner, wire, received, numbers, label, progress)))
        stages = parity.measure_bodies(bodies, servers, held_out)
        required_db = stages[-1].required_db(options.gates.min_sqnr_db)
        if stages[-1].sqnr_db >= required_db:
            break
        if precision != wanted:
            progress(f"server: {precision} reaches {stages[-1].sqnr_db:.1f} dB, the gate is {required_db:.3g} dB")
    return servers, stages


def write_server(
    folder: Path,
    template: onnx.ModelProto | None,
    bodies: Sequence[nn.Module],
    wire: WireSpec,
    samples: Tensor,
    numbers: Numbers,
    label: str,
    progress: Callable[[str], None],
) -> ServerManifest:
    """Writes one server bundle; without a template in the torch format."""
    folder.mkdir(mode=0o755)
    if template is None:
        progress(f"{label}: {len(bodies)} bodies as one program")
        names = torch_bodies.write(folder, bodies, wire)
    else:
        names = _write_graphs(folder, template, bodies, wire, samples, numbers, label, progress)
    manifest = ServerManifest(
        wire=wire,
        precision=numbers.precision,
        bodies=names,
        files={name: describe_file(folder / name) for name in names},
        format="onnx" if template is not None else "torch",
    )
    (folder / MANIFEST_NAME).write_bytes(to_json(manifest))
    return manifest


def _write_graphs(
    folder: Path,
    template: onnx.ModelProto,
    bodies: Sequence[nn.Module],
    wire: WireSpec,
    samples: Tensor,
    numbers: Numbers,
    label: str,
    progress: Callable[[str], None],
) -> tuple[str, ...]:
    names = tuple(f"body_{position:02d}.onnx" for position in range(len(bodies)))
    for position, body in enumerate(bodies):
        progress(f"{label}: body {position + 1} of {len(bodies)}, {numbers.precision}")
        graph = graphs.optimised(graphs.with_weights(template, body.state_dict()))
        codec = wire.answer_codecs[position]
        if numbers.precision == "int8":
            graph = graphs.quantised(
                graph,
                {graphs.INPUT: samples.numpy()},
                input_codec=wire.feature_codec,
                output_codec=codec,
                weight_bits=numbers.weight_bits,
            )
        graph = graphs.attach_codes(graph, "features", wire.feature_codec, output="answer", out_codec=codec)
        (folder / names[position]).write_bytes(graphs.scrubbed(graph))
    return names


# --- the client bundle ---


@torch.inference_mode()
def _write_client(
    folder: Path,
    client: Client,
    job: _Job,
    images: Pixels,
    options: ExportOptions,
) -> tuple[ClientManifest, dict[ModelFormat, float]]:
    """Returns the manifest, and what each format's models would take in float32."""
    folder.mkdir(mode=0o700)
    precision, secret = options.client_precision, options.secret
    wire, perturbation = client.wire, client.perturbation
    x = normalise(torch.from_numpy(np.ascontiguousarray(images)))
    features = client.head(x)
    draw = client.draw(len(x), torch.Generator().manual_seed(0))
    sent = fake_quantise(draw.applied(features), wire.feature_codec)
    answers = fake_quantise_answers(torch.stack([body(sent) for body in job.bodies], dim=1), wire.answer_codecs)
    samples = client_models.Samples(x=x, draw=draw, answers=answers)
    made = client_models.make(client, samples, options.formats, precision)
    suffix = "" if secret is None else SUFFIX
    pairs = [ModelPair(head=f"head.{each}{suffix}", tail=f"tail.{each}{suffix}") for each in made]
    models = {pair.head: made[pair.format].head for pair in pairs} | {
        pair.tail: made[pair.format].tail for pair in pairs
    }
    manifest = ClientManifest(
        wire=wire,
        image=ImageSpec(height=job.dataset.image_size[0], width=job.dataset.image_size[1]),
        labels=job.run.labels,
        noise_mode=client_models.noise_mode(client),
        noise_std=_noise_std(client),
        precision=precision,
        models=tuple(pairs),
        parties=job.parties,
        files={},
        encryption=None if secret is None else new_seal(secret),
        noise_law="uniform" if perturbation.noise == "uniform" and perturbation.fresh else "gaussian",
        noise_tensors=perturbation.tensors,
        dropout=perturbation.dropout,
    )
    if secret is not None:
        sealer = Sealer(secret, manifest)
        models = {name: sealer.seal(name, data) for name, data in models.items()}
    for name, data in models.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(data)
    manifest = replace(manifest, files={name: describe_file(folder / name) for name in models})
    (folder / MANIFEST_NAME).touch(mode=0o600)
    (folder / MANIFEST_NAME).write_bytes(to_json(manifest))
    return manifest, {each: found.float32_ms for each, found in made.items()}


def _noise_std(client: Client) -> float:
    """Returns the standard deviation of the noise: the asked one, or what learned noise has come to."""
    perturbation = client.perturbation
    return float(client.noise.std()) if perturbation.noise == "learned" else float(perturbation.std)
