"""How long head and tail take on this device, in every runtime that reads the bundle and at several thread counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensembler.edge_runtime.backends import BACKENDS, Session, open_session, readers, times_ms
from ensembler.edge_runtime.runtime import open_head, secret_inputs
from ensembler.edge_runtime.sealing import BundleSecret, opener
from ensembler.protocol.manifest import ClientManifest, Kdf, ModelPair, load_client

WARM_UP_RUNS = 10


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One image through both models, in milliseconds.

    Attributes:
        backend: the runtime.
        threads: of one run.
        head_p50_ms: median time of the head.
        head_p95_ms: of 95 in 100 runs no more.
        tail_p50_ms: as above, of selector and tail.
        tail_p95_ms: as above.
    """

    backend: str
    threads: int
    head_p50_ms: float
    head_p95_ms: float
    tail_p50_ms: float
    tail_p95_ms: float

    @property
    def total_ms(self) -> float:
        """What one image takes on the device, at the median."""
        return self.head_p50_ms + self.tail_p50_ms


def bench(
    bundle: Path,
    *,
    threads: Sequence[int],
    runs: int,
    secret: Callable[[Kdf], BundleSecret | None] = lambda _: None,
) -> list[Timing]:
    """Times head and tail of a client bundle on random images; the fastest comes first.

    Args:
        bundle: the folder of a client bundle.
        threads: the numbers of threads to try.
        runs: of each model, after some that are not counted.
        secret: opens an encrypted bundle, see ``EdgeRuntime``.

    Raises:
        BundleError: see ``EdgeRuntime``.
        KeyFileError: see ``EdgeRuntime``.
        MissingExtraError: no runtime is installed that reads the bundle.
    """
    manifest = load_client(bundle)
    model = opener(bundle, manifest, secret)
    found = [
        _timed(manifest, manifest.pair(BACKENDS[backend].format), model, backend, count, runs)
        for backend in readers([pair.format for pair in manifest.models])
        for count in threads
    ]
    return sorted(found, key=lambda timing: timing.total_ms)


def _timed(
    manifest: ClientManifest,
    pair: ModelPair,
    model: Callable[[str], Path | bytes],
    backend: str,
    threads: int,
    runs: int,
) -> Timing:
    wire = manifest.wire
    generator = np.random.Generator(np.random.PCG64(0))
    image = generator.integers(0, 256, (1, manifest.image.height, manifest.image.width, 3), dtype=np.uint8)
    answers = generator.integers(0, 2**wire.answer_bits, (1, wire.num_nets, wire.answer_width), dtype=np.uint8)
    head = open_head(model(pair.head), wire.feature_codec, name=pair.head, threads=threads, backend=backend)
    tail = open_session(model(pair.tail), name=pair.tail, threads=threads, backend=backend)
    of_head = _percentiles(head, {"image": image, **secret_inputs(manifest, 1)}, runs)
    of_tail = _percentiles(tail, {"answers": answers}, runs)
    return Timing(
        backend=backend,
        threads=threads,
        head_p50_ms=of_head[0],
        head_p95_ms=of_head[1],
        tail_p50_ms=of_tail[0],
        tail_p95_ms=of_tail[1],
    )


def _percentiles(session: Session, inputs: Mapping[str, npt.NDArray[Any]], runs: int) -> tuple[float, float]:
    times = times_ms(session, inputs, WARM_UP_RUNS + runs)
    middle, late = np.percentile(times[WARM_UP_RUNS:], (50, 95))
    return round(float(middle), 4), round(float(late), 4)
