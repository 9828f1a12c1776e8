"""The server under load: latencies over rates and numbers of clients, goodput up to ten times what it can do.

    python benchmarks/bundles.py && python benchmarks/load.py [--seconds 15]

One process offers the load, with CURVE and a key for every device, on a core of its own: the last one that this process
may use. The server has the others, for capacity as for overload; a sender that took its cores from it would be measured
in its place. For each bundle, with a fresh server each time:

* closed loop: 1 to 64 devices with one image under way each. The best answers a second are the capacity.
* open loop: images arrive by a Poisson process of a fixed rate, from 0.25 to 10 times the capacity, whether or not
  answers come. Latencies count from the scheduled arrival. Goodput is what was answered within the deadline.

An open loop whose sender falls behind its schedule says so: ``behind`` is the p99 of how late requests were sent, and a
figure from such a row would speak of the sender.

Writes docs/results/load/load.json (all rows) and docs/results/load/load.svg, and the figures into cloud.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import results
import zmq
from bundles import BUNDLES, Identities, served
from traffic import NO_REPLY, RESULT_CODE, Asked, Offered, ZmqLine, closed_loop, dealer, open_loop

from ensembler.protocol.errors import BusyError, ExpiredError

OUT = results.RESULTS / "load"
DEVICES = (1, 2, 4, 8, 16, 32, 64)
OFFERED = (0.25, 0.5, 0.75, 0.9, 1.0, 2.0, 10.0)
OPEN_DEVICES = 16
PERCENTILES = (50, 95, 99, 99.9)
DEADLINE_MS = {"tiny": 250.0, "resnet18": 2000.0}
BUSY, EXPIRED = BusyError.code, ExpiredError.code
SEED = 0


@contextmanager
def _server(bundle: Path, options: argparse.Namespace, devices: int) -> Iterator[tuple[str, Identities | None]]:
    with tempfile.TemporaryDirectory() as work:
        identities = None if options.plaintext else Identities.new(Path(work) / "keys", devices)
        cores = os.sched_getaffinity(0)
        own = {max(cores)}
        try:
            os.sched_setaffinity(0, cores - own or cores)  # what is started inherits it
            with served(bundle, identities, *options.serve.split(), log=Path(work) / "server.log") as endpoint:
                os.sched_setaffinity(0, own)
                yield endpoint, identities
        finally:
            os.sched_setaffinity(0, cores)


def closed(bundle: Path, asked: Asked, devices: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one row of the closed loop."""
    context: zmq.Context[Any] = zmq.Context()
    with _server(bundle, options, devices) as (endpoint, identities):
        lines = [ZmqLine(context, endpoint, asked, identities, index) for index in range(devices)]
        try:
            found = closed_loop(lines, asked, warm_s=options.seconds / 5, seconds=options.seconds)
        finally:
            for line in lines:
                line.close()
            context.term()
    return {"devices": devices, "rate": found.rate} | _percentiles("latency", found.latencies_ms)


def opened(bundle: Path, asked: Asked, factor: float, capacity: float, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one row of the open loop."""
    context: zmq.Context[Any] = zmq.Context()
    with _server(bundle, options, OPEN_DEVICES) as (endpoint, identities):
        lines = [dealer(context, endpoint, identities, index) for index in range(OPEN_DEVICES)]
        try:
            # The server learns how long an image takes before anything counts, and every handshake is done.
            load = {"deadline_ms": options.deadline_ms, "seed": SEED}
            open_loop(lines, asked, rate=capacity / 2, seconds=options.seconds / 5, **load)
            found = open_loop(lines, asked, rate=factor * capacity, seconds=options.seconds, **load)
        finally:
            for line in lines:
                line.close(linger=0)
            context.term()
    return {"offered": factor} | _row(found, capacity, options.deadline_ms)


def _row(found: Offered, capacity: float, deadline_ms: float) -> dict[str, Any]:
    good = found.of(RESULT_CODE)
    in_time = int((good <= deadline_ms).sum())
    others = {"result": RESULT_CODE, "busy": BUSY, "expired": EXPIRED, "no_reply": NO_REPLY}
    return (
        {"rate": found.rate, "goodput": in_time / found.seconds, "goodput_ratio": in_time / found.seconds / capacity}
        | {f"{name}_requests": int((found.codes == code).sum()) for name, code in others.items()}
        | {
            "other_requests": int((~np.isin(found.codes, list(others.values()))).sum()),
            "late_requests": len(good) - in_time,
            "behind_p99_ms": float(np.percentile(found.behind_ms, 99)),
        }
        | _percentiles("latency", good)
        | _percentiles("busy", found.of(BUSY))
    )


def _percentiles(name: str, values: np.ndarray) -> dict[str, float]:
    """Returns the percentiles by their names in a row; none of nothing."""
    return {f"{name}_p{p:g}_ms": float(np.percentile(values, p)) for p in PERCENTILES if len(values)}


def measured(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Returns all rows of one bundle."""
    asked = Asked(bundle)
    rows = []
    for devices in options.devices:
        rows.append(closed(bundle, asked, devices, options))
        _say(rows[-1], "devices", "rate")
    capacity = max(row["rate"] for row in rows)
    offered = []
    for factor in options.offered:
        offered.append(opened(bundle, asked, factor, capacity, options))
        _say(offered[-1], "offered", "goodput", "busy_requests", "expired_requests", "busy_p99_ms", "behind_p99_ms")
    return {"capacity": capacity, "deadline_ms": options.deadline_ms, "closed_loop": rows, "open_loop": offered}


def _say(row: dict[str, Any], *names: str) -> None:
    shown = [*names, "latency_p50_ms", "latency_p99_ms", "latency_p99.9_ms"]
    print("  " + "  ".join(f"{name} {row[name]:.6g}" for name in shown if name in row), flush=True)


def figures(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what is recorded of one bundle; nothing where ten times the capacity was not offered."""
    row = next((row for row in found["open_loop"] if row["offered"] == 10), None)
    if row is None:
        return []
    suffix = "" if name == "resnet18" else f"_{name}"
    note = (
        f"{name} bodies; capacity {found['capacity']:.1f} images/s in a closed loop, {row['rate']:.0f} offered; "
        f"deadline {found['deadline_ms']:.0f} ms; {row['result_requests']} answered, {row['late_requests']} of them "
        f"late, {row['busy_requests']} Busy, {row['expired_requests']} Expired, "
        f"{row['no_reply_requests']} without a reply; sender behind by {row['behind_p99_ms']:.1f} ms at p99"
    )
    made = [
        results.figure(f"overload_goodput_ratio{suffix}", round(row["goodput_ratio"], 4), "ratio", ">= 0.9", note),
        results.figure(
            f"overload_late_requests{suffix}", row["late_requests"] + row["expired_requests"], "requests", "0", note
        ),
    ]
    if "busy_p99_ms" in row:
        made.append(results.figure(f"busy_p99_ms{suffix}", round(row["busy_p99_ms"], 3), "ms", "<= 50", note))
    return made


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws latencies and goodput over the offered load, a row for each bundle."""
    import matplotlib as mpl

    mpl.use("svg")
    # Neither a date nor random names in the file: the same rows draw the same bytes.
    mpl.rcParams["svg.hashsalt"] = "load"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(found), 2, figsize=(9, 3.2 * len(found)), squeeze=False, layout="constrained")
    for (name, one), (left, right) in zip(found.items(), axes, strict=True):
        rows = one["open_loop"]
        x = [row["offered"] for row in rows]
        for p in PERCENTILES:
            left.plot(x, [row.get(f"latency_p{p:g}_ms", np.nan) for row in rows], marker=".", label=f"p{p:g}")
        left.axhline(one["deadline_ms"], color="grey", linestyle=":", label="deadline")
        left.set(title=f"{name}: answered requests", ylabel="latency, ms", yscale="log")
        for label, key in {
            "answered in time": "goodput",
            "Busy": "busy_requests",
            "Expired": "expired_requests",
        }.items():
            seconds = one["seconds"] if key != "goodput" else 1.0
            right.plot(x, [row[key] / seconds / one["capacity"] for row in rows], marker=".", label=label)
        right.set(title=f"{name}: capacity {one['capacity']:.0f} images/s", ylabel="share of the capacity")
        for axis in (left, right):
            axis.set(xscale="log", xlabel="offered, in capacities")
            axis.set_xticks(x, [f"{value:g}" for value in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measures, draws and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--bundles", type=Path, default=bundles.FOLDER, help="what benchmarks/bundles.py made")
    parser.add_argument("--only", choices=BUNDLES, help="one of the bundles")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each row")
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES, help="of the closed loop's rows")
    parser.add_argument("--offered", type=float, nargs="+", default=OFFERED, help="in capacities, of the open loop's")
    parser.add_argument("--deadline-ms", type=float, default=None, help="instead of the bundle's own")
    parser.add_argument("--plaintext", action="store_true", help="without encryption")
    parser.add_argument("--serve", default="", help="options of the server, as one text")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of load.json and load.svg")
    parser.add_argument("--no-record", action="store_true", help="no figures, only the two files")
    options = parser.parse_args()
    own_deadline = options.deadline_ms is None
    found: dict[str, dict[str, Any]] = {}
    for name in [options.only] if options.only else BUNDLES:
        print(name, flush=True)
        if own_deadline:
            options.deadline_ms = DEADLINE_MS[name]
        found[name] = {"seconds": options.seconds} | measured(options.bundles / name / "server", options)
    options.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": results.machine(), "seed": SEED, "encrypted": not options.plaintext, "bundles": found}
    (options.out / "load.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(found, options.out / "load.svg")
    if not options.no_record:
        listed = [figure for name, one in found.items() for figure in figures(name, one)]
        results.record("cloud", listed, command="python benchmarks/load.py", seed=SEED)


if __name__ == "__main__":
    main()
