"""The parity report: what quantisation cost, stage by stage, measured on the files that ship.

Each stage's artifact is compared with torch on the same input, with the same fake quantiser, on held-out images. The
report belongs to the owner of the run: it says which accuracy the secret selector reaches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ensembler.edge_runtime.backends import Session, open_session
from ensembler.protocol.errors import GateFailedError
from ensembler.protocol.manifest import ClientManifest, ServerManifest
from ensembler.training.models import normalise
from ensembler.training.stages import Client
from ensembler.training.wire import fake_quantise, fake_quantise_answers

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

BATCH = 100
TIMED_RUNS = 30
SQNR_IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What an export must reach.

    Attributes:
        min_sqnr_db: of head, selected bodies together, and tail.
        max_accuracy_drop_points: from torch in float to the artifacts, on held-out images.
    """

    min_sqnr_db: float = 35.0
    max_accuracy_drop_points: float = 0.5


@dataclass(frozen=True, kw_only=True)
class StageParity:
    """One stage against torch.

    Attributes:
        stage: ``head``, ``body 0`` ..., ``bodies`` (the P that count, together), ``tail``.
        sqnr_db: signal to quantisation noise; infinite when bit-identical.
        max_error: the largest difference, in units of what the stage puts out.
        size_bytes: of the artifact.
        batch1_ms: median time of one image on one thread; None for the summary row.
    """

    stage: str
    sqnr_db: float
    max_error: float
    size_bytes: int
    batch1_ms: float | None


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything measured; accuracies and agreement in percent of ``images`` held-out images."""

    stages: tuple[StageParity, ...]
    images: int
    accuracy_float: float
    accuracy_wire: float
    accuracy_artifact: float
    top1_agreement: float
    gates: Gates

    @property
    def accuracy_drop_points(self) -> float:
        """Torch in float minus the artifacts; negative when the artifacts are better."""
        return self.accuracy_float - self.accuracy_artifact

    @property
    def min_stage_sqnr_db(self) -> float:
        """The worst of the gated stages: head, bodies together, tail."""
        return min(stage.sqnr_db for stage in self.stages if not stage.stage.startswith("body "))

    @property
    def failures(self) -> list[str]:
        """What is worse than the gates allow, as sentences."""
        found = [
            f"{stage.stage}: SQNR {stage.sqnr_db:.1f} dB is below {self.gates.min_sqnr_db:g} dB"
            for stage in self.stages
            if not stage.stage.startswith("body ") and not stage.sqnr_db >= self.gates.min_sqnr_db
        ]
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
                + "\nTry --quantize none for the client, --server-precision float32 for the bodies, more training, or "
                "other gates (--min-sqnr-db, --max-accuracy-drop)."
            )

    def to_json(self) -> str:
        """Returns the report as JSON; an infinite SQNR is null."""
        document: dict[str, Any] = asdict(self) | {
            "accuracy_drop_points": self.accuracy_drop_points,
            "min_stage_sqnr_db": _finite(self.min_stage_sqnr_db),
        }
        for stage in document["stages"]:
            stage["sqnr_db"] = _finite(stage["sqnr_db"])
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
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines += [
            "",
            f"accuracy on {self.images} held-out images: torch float {self.accuracy_float:.2f}%, "
            f"torch through the wire {self.accuracy_wire:.2f}%, artifacts {self.accuracy_artifact:.2f}% "
            f"(drop {self.accuracy_drop_points:.2f} points)",
            f"same top-1 answer as torch through the wire: {self.top1_agreement:.2f}%",
        ]
        return "\n".join(lines)


@torch.inference_mode()
def measure(
    client: Client,
    bodies: Sequence[nn.Module],
    files: Mapping[str, Path],
    manifests: tuple[ClientManifest, ServerManifest],
    images: Codes,
    labels: npt.NDArray[np.int64],
    gates: Gates,
) -> ParityReport:
    """Runs artifacts and torch side by side.

    Args:
        client: the trained client, in eval mode; its fresh noise, if any, is drawn once and given to both.
        bodies: all N, in the server's order.
        files: paths by manifest name.
        manifests: of the two bundles.
        images: held-out, ``(M, 3, H, W)`` uint8.
        labels: ``(M,)``.
        gates: recorded in the report.
    """
    client_manifest, server_manifest = manifests
    wire = client_manifest.wire
    head = open_session(files[client_manifest.head])
    tail = open_session(files[client_manifest.tail])
    nets = [open_session(files[name]) for name in server_manifest.bodies]
    selected = list(client.selector)
    tally = _Tally(wire.num_nets)
    for start in range(0, len(images), BATCH):
        x, y = images[start : start + BATCH], labels[start : start + BATCH]
        noise = client.noised(torch.zeros(len(x), *wire.feature_shape))
        features = client.head(normalise(torch.from_numpy(x)))
        chosen = [bodies[i] for i in selected]
        sent = fake_quantise(features + noise, wire.feature_codec)
        # Every stage is compared on the same input: what the artifact before it put out.
        codes = head.run(_head_inputs(client_manifest, x, noise.numpy()))
        arrived = torch.from_numpy(wire.feature_codec.decode(codes))
        answers = np.stack([net.run({"features": codes}) for net in nets], axis=1)  # (B, N, F)
        decoded = np.stack([c.decode(answers[:, i]) for i, c in enumerate(wire.answer_codecs)], axis=1)
        logits = tail.run({"answers": answers})
        torch_logits = client.combine(torch.from_numpy(decoded[:, selected])).numpy()
        if start < SQNR_IMAGES:
            tally.add("head", sent.numpy(), arrived.numpy())
            tally.add("tail", torch_logits, logits)
            wanted = fake_quantise_answers(torch.stack([body(arrived) for body in bodies], dim=1), wire.answer_codecs)
            for i in range(wire.num_nets):
                tally.add(f"body {i}", wanted[:, i].numpy(), decoded[:, i])
            tally.add("bodies", wanted[:, selected].numpy(), decoded[:, selected])
        plain = torch.stack([body(features + noise) for body in chosen], dim=1)
        through = torch.stack([body(sent) for body in chosen], dim=1)
        codecs = tuple(wire.answer_codecs[i] for i in selected)
        tally.count(
            client.combine(plain).numpy(),
            client.combine(fake_quantise_answers(through, codecs)).numpy(),
            logits,
            y,
        )
    first = images[:1]
    noise_one = np.zeros((1, *wire.feature_shape), np.float32)
    one = head.run(_head_inputs(client_manifest, first, noise_one))
    timings = {
        "head": _median_ms(head, _head_inputs(client_manifest, first, noise_one)),
        "tail": _median_ms(tail, {"answers": np.stack([net.run({"features": one}) for net in nets], axis=1)}),
        **{f"body {i}": _median_ms(net, {"features": one}) for i, net in enumerate(nets)},
    }
    sizes = {
        "head": client_manifest.files[client_manifest.head].size_bytes,
        "tail": client_manifest.files[client_manifest.tail].size_bytes,
        **{f"body {i}": server_manifest.files[name].size_bytes for i, name in enumerate(server_manifest.bodies)},
    }
    sizes["bodies"] = sum(sizes[f"body {i}"] for i in selected)
    order = ["head", *(f"body {i}" for i in range(wire.num_nets)), "bodies", "tail"]
    return ParityReport(
        stages=tuple(
            StageParity(
                stage=stage,
                sqnr_db=tally.sqnr(stage),
                max_error=tally.max_error[stage],
                size_bytes=sizes[stage],
                batch1_ms=timings.get(stage),
            )
            for stage in order
        ),
        images=len(images),
        accuracy_float=tally.percent("float"),
        accuracy_wire=tally.percent("wire"),
        accuracy_artifact=tally.percent("artifact"),
        top1_agreement=tally.percent("agree"),
        gates=gates,
    )


def _finite(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None


class _Tally:
    """Sums over batches: energies per stage, hits per variant."""

    def __init__(self, num_nets: int) -> None:
        stages = ["head", "tail", "bodies", *(f"body {i}" for i in range(num_nets))]
        self.signal = dict.fromkeys(stages, 0.0)
        self.error = dict.fromkeys(stages, 0.0)
        self.max_error = dict.fromkeys(stages, 0.0)
        self.low = dict.fromkeys(stages, math.inf)
        self.high = dict.fromkeys(stages, -math.inf)
        self.hits = dict.fromkeys(("float", "wire", "artifact", "agree"), 0)
        self.images = 0

    def add(self, stage: str, reference: Floats, found: Floats) -> None:
        difference = reference.astype(np.float64) - found
        self.signal[stage] += float(np.square(reference.astype(np.float64)).sum())
        self.error[stage] += float(np.square(difference).sum())
        self.max_error[stage] = max(self.max_error[stage], float(np.abs(difference).max()))
        self.low[stage] = min(self.low[stage], float(found.min()))
        self.high[stage] = max(self.high[stage], float(found.max()))

    def sqnr(self, stage: str) -> float:
        if self.low[stage] == self.high[stage]:
            return -math.inf  # a constant artifact is broken, however close to torch
        if self.error[stage] == 0:
            return math.inf
        return 10 * math.log10(self.signal[stage] / self.error[stage]) if self.signal[stage] > 0 else -math.inf

    def count(self, plain: Floats, wire: Floats, artifact: Floats, y: npt.NDArray[np.int64]) -> None:
        self.images += len(y)
        for name, logits in (("float", plain), ("wire", wire), ("artifact", artifact)):
            self.hits[name] += int((logits.argmax(1) == y).sum())
        self.hits["agree"] += int((wire.argmax(1) == artifact.argmax(1)).sum())

    def percent(self, name: str) -> float:
        return 100 * self.hits[name] / self.images


def _head_inputs(manifest: ClientManifest, images: Codes, noise: Floats) -> dict[str, npt.NDArray[Any]]:
    inputs: dict[str, npt.NDArray[Any]] = {"image": np.ascontiguousarray(images.transpose(0, 2, 3, 1))}
    if manifest.noise_mode == "fresh":
        inputs["noise"] = noise
    return inputs


def _median_ms(session: Session, inputs: Mapping[str, npt.NDArray[Any]]) -> float:
    times = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        session.run(inputs)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))
