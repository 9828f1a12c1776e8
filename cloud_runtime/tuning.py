"""How fast the nets of a server bundle are, and in which arrangement of threads, parts and batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensembler.cloud_runtime.engine import Codes
from ensembler.cloud_runtime.onnx_engine import PART_ROWS, OnnxEngine
from ensembler.cloud_runtime.profile import Profile
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.machine import processor
from ensembler.protocol.manifest import digest, load_server
from ensembler.protocol.messages import LIMITS

PARTS = (4, 8, 16, 32)
ROUNDS = 5
# A batch is no larger than it has to be: whoever comes meanwhile waits for all of it.
ENOUGH = 0.97


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """A way to compute batches.

    Attributes:
        threads: that compute at once.
        part_rows: images that one of them takes through one net at a time.
        rows: of a batch.
    """

    threads: int
    part_rows: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one arrangement did.

    Attributes:
        arrangement: see there.
        images_per_s: the median over the rounds.
        slowest: images a second in the slowest round.
        fastest: and in the fastest.
    """

    arrangement: Arrangement
    images_per_s: float
    slowest: float
    fastest: float

    @property
    def batch_ms(self) -> float:
        """How long a batch took."""
        return 1000 * self.arrangement.rows / self.images_per_s


def arrangements(threads: Sequence[int], rows: Sequence[int], *, all_parts: bool) -> list[Arrangement]:
    """Returns all that differ: a part is no larger than its batch.

    Args:
        threads: to try.
        rows: of a batch, to try.
        all_parts: whether to try ``PARTS``, or what the engine takes by itself.

    Raises:
        ConfigError: a batch of more images than a server takes.
    """
    if max(rows) > LIMITS.rows:
        raise ConfigError(f"a batch of {max(rows)} images: at most {LIMITS.rows}")
    parts = PARTS if all_parts else (PART_ROWS,)
    return [
        Arrangement(threads=count, part_rows=part, rows=batch)
        for count in threads
        for batch in rows
        for part in parts
        if part <= batch or part == min(parts)
    ]


def measured(
    bundle: Path, tried: Sequence[Arrangement], seconds: float, said: Callable[[int, int], None] = lambda *_: None
) -> list[Rate]:
    """Times arrangements in turn, in rounds, so that a noisy machine is noisy for all.

    Args:
        bundle: the folder of a server bundle for onnxruntime.
        tried: at least one.
        seconds: of each arrangement, over all rounds.
        said: called with the number of the round that begins, and of all.

    Returns:
        What each did, in the order of ``tried``.

    Raises:
        BundleError: see ``OnnxEngine``.
    """
    engines: dict[int, OnnxEngine] = {}
    try:
        for each in tried:
            if each.threads not in engines:
                engines[each.threads] = OnnxEngine(bundle, threads=each.threads, device="cpu")
        wire = next(iter(engines.values())).manifest.wire
        generator = np.random.Generator(np.random.PCG64(0))
        shape = (max(each.rows for each in tried), *wire.feature_shape)
        features = generator.integers(0, wire.feature_codec.code_max + 1, shape, np.uint8)
        rates: list[list[float]] = [[] for _ in tried]
        for turn in range(ROUNDS):
            said(turn + 1, ROUNDS)
            for each, found in zip(tried, rates, strict=True):
                engine = engines[each.threads]
                engine.part_rows = each.part_rows
                found.append(_rate(engine, features[: each.rows], seconds / ROUNDS))
    finally:
        for engine in engines.values():
            engine.close()
    return [
        Rate(arrangement=each, images_per_s=statistics.median(found), slowest=min(found), fastest=max(found))
        for each, found in zip(tried, rates, strict=True)
    ]


def best(rates: Sequence[Rate]) -> Rate:
    """Returns what is nearly as fast as the fastest in the smallest batches."""
    enough = ENOUGH * max(rate.images_per_s for rate in rates)
    good = [rate for rate in rates if rate.images_per_s >= enough]
    return min(good, key=lambda rate: (rate.arrangement.rows, -rate.images_per_s))


def profile_of(bundle: Path, rate: Rate) -> Profile:
    """Returns what ``serve`` is to take."""
    return Profile(
        processor=processor(),
        version=digest(load_server(bundle)),
        threads=rate.arrangement.threads,
        part_rows=rate.arrangement.part_rows,
        max_batch_rows=rate.arrangement.rows,
    )


def _rate(engine: OnnxEngine, features: Codes, seconds: float) -> float:
    engine.run(features)
    done, began = 0, time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds or not done:
        engine.run(features)
        done += len(features)
        elapsed = time.perf_counter() - began
    return done / elapsed
