"""What a call costs from end to end, with its parts, against a running server: warm-up, rounds, percentiles, spread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ensembler.client import EdgeClient
from ensembler.prediction import Prediction, Timings

PERCENTILES = (50, 95, 99)
WARM_UP_CALLS = 5


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value and how far it went in the rounds of one run.

    Attributes:
        value: over all rounds; of a rate the median.
        low: of the lowest round.
        high: of the highest.
    """

    value: float
    low: float
    high: float


def measured(
    client: EdgeClient, images: Sequence[npt.NDArray[np.uint8]], *, at_once: int, calls: int, rounds: int
) -> dict[str, Figure]:
    """Asks again and again, so many calls at a time, and returns figures by name.

    Args:
        client: connected; its deadline counts, and an error of any call is raised.
        images: of one call, ``(H, W, 3)`` each.
        at_once: calls under way.
        calls: of each round.
        rounds: of which each figure's ``low`` and ``high`` tell.

    Returns:
        ``images_per_s``; ``total_p50_ms`` and so on for the call as the application sees it and, in one request of a
        call, for each part of ``Timings``; ``bytes_up`` and ``bytes_down`` of a call.
    """

    def call(_: int) -> tuple[float, list[Prediction]]:
        began = time.perf_counter()
        found = client.predict_batch(images)
        return 1000 * (time.perf_counter() - began), found

    rates: list[float] = []
    times: dict[str, list[list[float]]] = {"total": [], **{field.name: [] for field in fields(Timings)}}
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(call, range(max(WARM_UP_CALLS, at_once))))
        for _ in range(rounds):
            began = time.perf_counter()
            found = list(pool.map(call, range(calls)))
            rates.append(calls * len(images) / (time.perf_counter() - began))
            requests = [one.timings for _, call_s in found for one in _requests(call_s)]
            times["total"].append([total for total, _ in found])
            for name in [name for name in times if name != "total"]:
                times[name].append([getattr(one, name) for one in requests])
    last = _requests(found[-1][1])
    sizes = {"up": sum(one.bytes_up for one in last), "down": sum(one.bytes_down for one in last)}
    return (
        {"images_per_s": Figure(value=round(float(np.median(rates)), 2), low=min(rates), high=max(rates))}
        | {f"{name}_p{p}_ms": _over(each, p) for name, each in times.items() for p in PERCENTILES}
        | {f"bytes_{way}": Figure(value=size, low=size, high=size) for way, size in sizes.items()}
    )


def _requests(found: Sequence[Prediction]) -> list[Prediction]:
    """Returns one prediction of each request of a call."""
    return list({one.request_id: one for one in found}.values())


def _over(rounds: Sequence[Sequence[float]], p: int) -> Figure:
    each = [float(np.percentile(one, p)) for one in rounds]
    value = float(np.percentile(np.concatenate(rounds), p))
    return Figure(value=round(value, 4), low=round(min(each), 4), high=round(max(each), 4))
