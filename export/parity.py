"""The parity report: what quantisation cost, stage by stage, measured on the files that ship.

Each stage's artifact is compared with torch on the same input, with the same fake quantiser, on held-out images. The
bodies are judged on the features of the N stage-1 heads, never on a client's: whether a server bundle passes must not
depend on a selector. What they do to this client's features stands beside it, over all N, and the accuracy is the
client's own.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ensembler.edge_runtime.backends import BACKENDS, Session, median_ms, open_session, readers
from ensembler.edge_runtime.runtime import open_head
from ensembler.edge_runtime.sealing import BundleSecret, opener
from ensembler.export import torch_bodies
from ensembler.protocol.errors import ConfigError, GateFailedError
from ensembler.protocol.manifest import ClientManifest, ModelFormat, ModelPair, ServerManifest, WireSpec
from ensembler.protocol.text import aligned
from ensembler.training.models import normalise
from ensembler.training.operators import Channels, heard_by
from ensembler.training.perturbation import Draw
from ensembler.training.stages import Client
from ensembler.training.wire import fake_quantise, fake_quantise_answers

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

BATCH = 100
SQNR_IMAGES = 1000
GATED = ("head", "bodies", "tail")
ON_CLIENT = "bodies, client"
MAX_LSB = 1  # steps by which two runtimes may differ on the same integer model


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What an export must reach.

    Attributes:
        min_sqnr_db: of head, all bodies together on stage-1 features, and tail. A stage whose codes have fewer than 8
            bits need not be better than its codec: a tiny error before the quantiser moves a value by a whole step.
        max_accuracy_drop_points: from the better of torch in float and torch through the wire to the artifacts, on
            held-out images.
    """

    min_sqnr_db: float = 35.0
    max_accuracy_drop_points: float = 0.5

    def __post_init__(self) -> None:
        options = {"--min-sqnr-db": self.min_sqnr_db, "--max-accuracy-drop": self.max_accuracy_drop_points}
        for option, value in options.items():
            if math.isnan(value):  # which nothing is below, and nothing above
                raise ConfigError(f"{option} {value}: give a number")


@dataclass(frozen=True, kw_only=True)
class StageParity:
    """One stage against torch.

    Attributes:
        stage: ``head``; ``body 0`` ... and ``bodies`` (all N together) on stage-1 features; ``bodies, client`` (all N
            on this client's features; no gate, since it would depend on the client); ``tail``.
        sqnr_db: signal to quantisation noise; infinite when bit-identical.
        max_error: the largest difference, in units of what the stage puts out.
        wire_sqnr_db: what the codec of fewer than 8 bits after this stage loses by itself; infinite with 8 bits.
        size_bytes: of the artifact.
        batch1_ms: median time of one image on one thread; None for rows over several bodies.
    """

    stage: str
    sqnr_db: float
    max_error: float
    wire_sqnr_db: float
    size_bytes: int
    batch1_ms: float | None

    def required_db(self, min_sqnr_db: float) -> float:
        """Returns the SQNR that the gate ``min_sqnr_db`` asks of this stage."""
        return min(min_sqnr_db, self.wire_sqnr_db)


@dataclass(frozen=True, kw_only=True)
class RuntimeParity:
    """Head and tail of one format in one runtime.

    Attributes:
        runtime: a name of ``backends.BACKENDS``.
        version: of it.
        format: of the models.
        default: whether the bundle names these models first.
        head_sqnr_db: against torch.
        tail_sqnr_db: the same.
        max_lsb: the largest difference of a code of the head, or of a step of the tail, from the first runtime that
            reads the same models; None for that one.
        size_bytes: of both models.
        batch1_ms: median time of one image through both, on one thread.
        float32_ms: the same of the models before they were quantised; None where it was not measured.
    """

    runtime: str
    version: str
    format: ModelFormat
    default: bool
    head_sqnr_db: float
    tail_sqnr_db: float
    max_lsb: int | None
    size_bytes: int
    batch1_ms: float
    float32_ms: float | None


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything measured; accuracies and agreement in percent of ``images`` held-out images.

    Attributes:
        stages: head and tail as the bundle's default, and the bodies.
        runtimes: head and tail in every runtime that is installed; the default comes first.
        gates: what was asked for.
    """

    stages: tuple[StageParity, ...]
    runtimes: tuple[RuntimeParity, ...]
    images: int
    accuracy_float: float
    accuracy_wire: float
    accuracy_artifact: float
    top1_agreement: float
    gates: Gates

    @property
    def accuracy_drop_points(self) -> float:
        """The better of torch in float and torch through the wire, minus the artifacts.

        A client that was trained through a wire of few bits may well be worse without it.
        """
        return max(self.accuracy_float, self.accuracy_wire) - self.accuracy_artifact

    @property
    def min_stage_sqnr_db(self) -> float:
        """The worst of the gated stages: head, bodies together, tail."""
        return min(stage.sqnr_db for stage in self.stages if stage.stage in GATED)

    @property
    def failures(self) -> list[str]:
        """What is worse than the gates allow, as sentences."""
        found = [
            f"{stage.stage}: SQNR {stage.sqnr_db:.1f} dB is below {stage.required_db(self.gates.min_sqnr_db):.3g} dB"
            for stage in self.stages
            if stage.stage in GATED and not stage.sqnr_db >= stage.required_db(self.gates.min_sqnr_db)
        ]
        for each in self.runtimes:
            if each.max_lsb is not None and each.max_lsb > MAX_LSB:
                found.append(
                    f"{each.runtime}: differs by {each.max_lsb} steps from another runtime on the same {each.format} "
                    f"models; {MAX_LSB} is allowed"
                )
            for stage, sqnr_db in (("head", each.head_sqnr_db), ("tail", each.tail_sqnr_db)):
                required = next(s for s in self.stages if s.stage == stage).required_db(self.gates.min_sqnr_db)
                if not each.default and not sqnr_db >= required:
                    found.append(f"{stage} in {each.runtime}: SQNR {sqnr_db:.1f} dB is below {required:.3g} dB")
        if not self.accuracy_drop_points <= self.gates.max_accuracy_drop_points:
            found.append(
                f"accuracy drops by {self.accuracy_drop_points:.2f} points, "
                f"more than {self.gates.max_accuracy_drop_points:g}"
            )
        return found

    def require(self) -> None:
        """Raises ``GateFailedError`` with the table unless every gate holds."""
        if self.failures:
            raise GateFailedError(
                f"{self.table()}\n\nThe export failed its gates; nothing was written:\n  "
                + "\n  ".join(self.failures)
                + "\nhead, tail: try --quantize none. bodies: try --server-precision float32. accuracy: train the "
                "client longer. Or set other gates: --min-sqnr-db, --max-accuracy-drop."
            )

    def to_json(self) -> str:
        """Returns the report as JSON; an infinite SQNR is null."""
        document: dict[str, Any] = asdict(self) | {
            "accuracy_drop_points": self.accuracy_drop_points,
            "min_stage_sqnr_db": _finite(self.min_stage_sqnr_db),
        }
        for part in (*document["stages"], *document["runtimes"]):
            for name in ("sqnr_db", "wire_sqnr_db", "head_sqnr_db", "tail_sqnr_db"):
                if name in part:
                    part[name] = _finite(part[name])
        document["gates"] = {name: _finite(value) for name, value in document["gates"].items()}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """Returns the report as text for a terminal."""
        rows = [("stage", "SQNR dB", "max error", "KiB", "ms/image")]
        for stage in self.stages:
            ms = "" if stage.batch1_ms is None else f"{stage.batch1_ms:.3f}"
            rows.append(
                (
                    stage.stage,
                    f"{stage.sqnr_db:.1f}",
                    f"{stage.max_error:.4f}",
                    f"{stage.size_bytes / 1024:.0f}",
                    ms,
                )
            )
        lines = [*aligned(rows), "", *aligned(self._runtime_rows())]
        slower = [each.runtime for each in self.runtimes if each.float32_ms and each.batch1_ms > each.float32_ms]
        if slower:
            lines.append(f"int8 is slower than float32 on this machine in {', '.join(slower)}")
        lines += [
            "",
            f"accuracy on {self.images} held-out images: torch float {self.accuracy_float:.2f}%, "
            f"torch through the wire {self.accuracy_wire:.2f}%, artifacts {self.accuracy_artifact:.2f}% "
            f"(drop {self.accuracy_drop_points:.2f} points)",
            f"same top-1 answer as torch through the wire: {self.top1_agreement:.2f}%",
        ]
        return "\n".join(lines)

    def _runtime_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("head and tail in", "format", "head dB", "tail dB", "steps off", "KiB", "ms/image", "float32 ms")
        ]
        for each in self.runtimes:
            rows.append(
                (
                    f"{each.runtime} {each.version}",
                    f"{each.format}, default" if each.default else each.format,
                    f"{each.head_sqnr_db:.1f}",
                    f"{each.tail_sqnr_db:.1f}",
                    "" if each.max_lsb is None else str(each.max_lsb),
                    f"{each.size_bytes / 1024:.0f}",
                    f"{each.batch1_ms:.3f}",
                    "" if each.float32_ms is None else f"{each.float32_ms:.3f}",
                )
            )
        return rows


@torch.inference_mode()
def measure_bodies(
    bodies: Sequence[nn.Module], servers: Sequence[tuple[Path, ServerManifest]], features: Tensor
) -> tuple[StageParity, ...]:
    """Compares the bodies' artifacts with torch, one row each and one for all N together.

    Args:
        bodies: all N, in the server's order.
        servers: the folder and manifest of each operator's bundle, in their order.
        features: held-out stage-1 features as they arrive, ``(M, C, h, w)`` float32.
    """
    wire = _joined(servers)
    nets = _nets(servers, bodies)
    tally = _Tally()
    for part in torch.split(features, BATCH):
        codes = wire.feature_codec.encode(part.numpy())
        plain, wanted, found = _answers(bodies, nets, wire, part, codes)
        for i in range(wire.num_nets):
            tally.add(f"body {i}", wanted[:, i], found[:, i])
        tally.add("bodies", wanted, found)
        tally.add_wire("bodies", plain, wanted, wire.answer_bits)
    sizes = [size for _, manifest in servers for size in _sizes(manifest)]
    rows = [tally.stage(f"body {i}", sizes[i], median_ms(net, {"features": codes[:1]})) for i, net in enumerate(nets)]
    return (*rows, tally.stage("bodies", sum(sizes), None))


@torch.inference_mode()
def measure(
    client: Client,
    bodies: Sequence[nn.Module],
    client_bundle: tuple[Path, ClientManifest],
    servers: Sequence[tuple[Path, ServerManifest]],
    images: Codes,
    labels: npt.NDArray[np.int64],
    gates: Gates,
    server_stages: Sequence[StageParity],
    secret: BundleSecret | None = None,
    float32_ms: Mapping[ModelFormat, float] | None = None,
) -> ParityReport:
    """Runs artifacts and torch side by side, through the whole client.

    Args:
        client: the trained client, in eval mode; what it draws for each image is drawn once and given to both.
        bodies: all N, in the server's order.
        client_bundle: folder and manifest of the client bundle.
        servers: the same of each operator's bundle, in their order.
        images: held-out, ``(M, 3, H, W)`` uint8.
        labels: ``(M,)``.
        gates: recorded in the report.
        server_stages: what ``measure_bodies`` found.
        secret: opens the client bundle, if that is encrypted.
        float32_ms: what one image takes in float32, for each format.
    """
    folder, client_manifest = client_bundle
    wire = client_manifest.wire
    model = opener(folder, client_manifest, lambda _: secret)
    runtimes = [
        _Device(client_manifest.pair(BACKENDS[backend].format), backend, model, wire)
        for backend in readers([pair.format for pair in client_manifest.models])
    ]
    head, tail = runtimes[0].head, runtimes[0].tail
    nets = _nets(servers, bodies)
    selected = list(client.selector)
    chosen = [bodies[i] for i in selected]
    codecs = tuple(wire.answer_codecs[i] for i in selected)
    tally = _Tally()
    for start in range(0, len(images), BATCH):
        x, y = images[start : start + BATCH], labels[start : start + BATCH]
        draw = client.draw(len(x))
        in_float = draw.applied(client.head(normalise(torch.from_numpy(x))))
        sent = fake_quantise(in_float, wire.feature_codec)
        # Every stage is compared on the same input: what the artifact before it put out.
        codes = head.run(_head_inputs(client_manifest, x, draw))
        answers = np.stack([net.run({"features": codes}) for net in nets], axis=1)  # (B, N, F)
        logits = tail.run({"answers": answers})
        if start < SQNR_IMAGES:
            arrived = torch.from_numpy(wire.feature_codec.decode(codes))
            tally.add("head", sent.numpy(), arrived.numpy())
            tally.add_wire("head", in_float.numpy(), sent.numpy(), wire.feature_codec.bits)
            _, wanted, found = _answers(bodies, nets, wire, arrived, codes)
            tally.add(ON_CLIENT, wanted, found)
            expected = client.combine(torch.from_numpy(found[:, selected])).numpy()
            tally.add("tail", expected, logits)
            inputs = _head_inputs(client_manifest, x, draw)
            for device in runtimes:
                device.add(tally, sent.numpy(), inputs, expected, answers)
        referred = client.referred(in_float)
        plain = torch.stack([body(referred) for body in chosen], dim=1)
        through = torch.stack([body(sent) for body in chosen], dim=1)
        tally.count(
            client.combine(plain).numpy(),
            client.combine(fake_quantise_answers(through, codecs)).numpy(),
            logits,
            y,
        )
    one = _head_inputs(client_manifest, images[:1], client.draw(1))
    default = client_manifest.models[0]
    sizes = {name: entry.size_bytes for name, entry in client_manifest.files.items()}
    return ParityReport(
        stages=(
            tally.stage("head", sizes[default.head], median_ms(head, one)),
            *server_stages,
            tally.stage(ON_CLIENT, server_stages[-1].size_bytes, None),
            tally.stage("tail", sizes[default.tail], median_ms(tail, {"answers": answers[:1]})),
        ),
        runtimes=tuple(
            device.parity(tally, runtimes, sizes, one, answers[:1], (float32_ms or {}).get(device.pair.format))
            for device in runtimes
        ),
        images=len(images),
        accuracy_float=tally.percent("float"),
        accuracy_wire=tally.percent("wire"),
        accuracy_artifact=tally.percent("artifact"),
        top1_agreement=tally.percent("agree"),
        gates=gates,
    )


class _Device:
    """Head and tail in one runtime, and what they gave."""

    def __init__(self, pair: ModelPair, backend: str, model: Callable[[str], Path | bytes], wire: WireSpec) -> None:
        self.pair = pair
        self.backend = backend
        self.codec = wire.feature_codec
        self.head = open_head(model(pair.head), wire.feature_codec, name=pair.head, backend=backend)
        self.tail = open_session(model(pair.tail), name=pair.tail, backend=backend)
        self.codes: list[Codes] = []
        self.logits: list[Floats] = []

    def add(
        self,
        tally: _Tally,
        sent: Floats,
        inputs: Mapping[str, npt.NDArray[Any]],
        expected: Floats,
        answers: Codes,
    ) -> None:
        """Runs both on a batch; ``sent`` and ``expected`` are what torch says."""
        self.codes.append(self.head.run(inputs))
        self.logits.append(self.tail.run({"answers": answers}))
        tally.add(f"head in {self.backend}", sent, self.codec.decode(self.codes[-1]))
        tally.add(f"tail in {self.backend}", expected, self.logits[-1])

    def parity(
        self,
        tally: _Tally,
        runtimes: Sequence[_Device],
        sizes: Mapping[str, int],
        one: Mapping[str, npt.NDArray[Any]],
        answers: Codes,
        float32_ms: float | None,
    ) -> RuntimeParity:
        """Returns the row; ``runtimes`` are all, ``one`` and ``answers`` what one image is timed with."""
        first = next(device for device in runtimes if device.pair == self.pair)
        return RuntimeParity(
            runtime=self.backend,
            version=metadata.version(self.backend),
            format=self.pair.format,
            default=self is runtimes[0],
            head_sqnr_db=tally.sqnr(f"head in {self.backend}"),
            tail_sqnr_db=tally.sqnr(f"tail in {self.backend}"),
            max_lsb=None if self is first else self._steps_from(first),
            size_bytes=sizes[self.pair.head] + sizes[self.pair.tail],
            batch1_ms=median_ms(self.head, one) + median_ms(self.tail, {"answers": answers}),
            float32_ms=float32_ms if self is first else None,
        )

    def _steps_from(self, other: _Device) -> int:
        codes, logits = np.concatenate(self.codes), np.concatenate(self.logits)
        of_codes = np.abs(codes.astype(np.int16) - np.concatenate(other.codes)).max()
        values = np.unique(logits)  # of an integer model: whole steps
        step = np.diff(values).min() if len(values) > 1 else 1.0
        return max(int(of_codes), round(float(np.abs(logits - np.concatenate(other.logits)).max() / step)))


class _Hearing:
    """A body's artifact that takes all codes and hears those of its operator."""

    def __init__(self, net: Session, channels: Channels) -> None:
        self._net, self._channels = net, channels

    def run(self, inputs: Mapping[str, Codes]) -> Any:
        return self._net.run({name: codes[:, slice(*self._channels)] for name, codes in inputs.items()})


def _nets(servers: Sequence[tuple[Path, ServerManifest]], bodies: Sequence[nn.Module]) -> list[Session]:
    """Opens all N bodies, each by itself, in the server's order; all take all codes."""
    found: list[Session] = []
    for folder, manifest in servers:
        if manifest.format == "torch":
            found += torch_bodies.sessions(folder, manifest)
        else:
            found += [open_session(folder / name) for name in manifest.bodies]
    heard = [heard_by(body) for body in bodies]
    return [net if part is None else _Hearing(net, part) for net, part in zip(found, heard, strict=True)]


def _sizes(manifest: ServerManifest) -> list[int]:
    """Returns the bytes of each body; of nets that share their files, its part of them."""
    sizes = [manifest.files[name].size_bytes for name in manifest.bodies]
    nets = manifest.wire.num_nets
    return sizes if manifest.format == "onnx" else [sum(sizes) // nets] * nets


def _joined(servers: Sequence[tuple[Path, ServerManifest]]) -> WireSpec:
    """Returns the wire of all operators together; its ``bodies_id`` is the first one's."""
    wires = [manifest.wire for _, manifest in servers]
    return replace(wires[0], answer_codecs=tuple(codec for wire in wires for codec in wire.answer_codecs))


def _answers(
    bodies: Sequence[nn.Module], nets: Sequence[Session], wire: WireSpec, features: Tensor, codes: Codes
) -> tuple[Floats, Floats, Floats]:
    """Returns what torch (in float, and through the codec) and the artifacts answer, ``(B, N, F)`` float32 each."""
    plain = torch.stack([body(features) for body in bodies], dim=1)
    wanted = fake_quantise_answers(plain, wire.answer_codecs)
    found = [codec.decode(net.run({"features": codes})) for net, codec in zip(nets, wire.answer_codecs, strict=True)]
    return plain.numpy(), wanted.numpy(), np.stack(found, axis=1)


def _finite(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None


class _Tally:
    """Sums over batches: energies per stage, hits per variant."""

    def __init__(self) -> None:
        self.signal: dict[str, float] = defaultdict(float)
        self.error: dict[str, float] = defaultdict(float)
        self.max_error: dict[str, float] = defaultdict(float)
        self.low: dict[str, float] = defaultdict(lambda: math.inf)
        self.high: dict[str, float] = defaultdict(lambda: -math.inf)
        self.wire: dict[str, tuple[float, float]] = {}
        self.hits = dict.fromkeys(("float", "wire", "artifact", "agree"), 0)
        self.images = 0

    def add(self, stage: str, reference: Floats, found: Floats) -> None:
        difference = reference.astype(np.float64) - found
        self.signal[stage] += float(np.square(reference.astype(np.float64)).sum())
        self.error[stage] += float(np.square(difference).sum())
        self.max_error[stage] = max(self.max_error[stage], float(np.abs(difference).max()))
        self.low[stage] = min(self.low[stage], float(found.min()))
        self.high[stage] = max(self.high[stage], float(found.max()))

    def add_wire(self, stage: str, plain: Floats, arrived: Floats, bits: int) -> None:
        """Counts what a codec of fewer than 8 bits does to ``plain`` by itself."""
        if bits < 8:
            signal, error = self.wire.get(stage, (0.0, 0.0))
            signal += float(np.square(plain.astype(np.float64)).sum())
            error += float(np.square(plain.astype(np.float64) - arrived).sum())
            self.wire[stage] = signal, error

    def wire_sqnr(self, stage: str) -> float:
        if stage not in self.wire:
            return math.inf
        signal, error = self.wire[stage]
        return 10 * math.log10(signal / error) if signal > 0 and error > 0 else math.inf

    def sqnr(self, stage: str) -> float:
        if self.low[stage] == self.high[stage]:
            return -math.inf  # a constant artifact is broken, however close to torch
        if self.error[stage] == 0:
            return math.inf
        return 10 * math.log10(self.signal[stage] / self.error[stage]) if self.signal[stage] > 0 else -math.inf

    def stage(self, stage: str, size_bytes: int, batch1_ms: float | None) -> StageParity:
        return StageParity(
            stage=stage,
            sqnr_db=self.sqnr(stage),
            max_error=self.max_error[stage],
            wire_sqnr_db=self.wire_sqnr(stage),
            size_bytes=size_bytes,
            batch1_ms=batch1_ms,
        )

    def count(self, plain: Floats, wire: Floats, artifact: Floats, y: npt.NDArray[np.int64]) -> None:
        self.images += len(y)
        for name, logits in (("float", plain), ("wire", wire), ("artifact", artifact)):
            self.hits[name] += int((logits.argmax(1) == y).sum())
        self.hits["agree"] += int((wire.argmax(1) == artifact.argmax(1)).sum())

    def percent(self, name: str) -> float:
        return 100 * self.hits[name] / self.images


def _head_inputs(manifest: ClientManifest, images: Codes, draw: Draw) -> dict[str, npt.NDArray[Any]]:
    inputs: dict[str, npt.NDArray[Any]] = {"image": np.ascontiguousarray(images.transpose(0, 2, 3, 1))}
    if manifest.noise_mode == "fresh":
        inputs["noise"] = draw.noise.numpy()
    if draw.which is not None:
        inputs["which"] = draw.which.numpy()
    if draw.keep is not None:
        inputs["keep"] = draw.keep.numpy()
    return inputs
