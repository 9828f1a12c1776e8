"""``ensembler bench``: times on a device, in a server and from end to end; and two runs compared."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from ensembler.cli.console import Console, a_path, need, positive
from ensembler.cli.predict import add_backend, add_bundle_secret, add_connection, bundle_secret, client_of
from ensembler.client import refuse_idle_secret, secret_finder
from ensembler.edge_runtime import preferences
from ensembler.edge_runtime.backends import MAX_THREADS
from ensembler.edge_runtime.bench import Timing, bench
from ensembler.edge_runtime.images import to_pixels
from ensembler.edge_runtime.preferences import Preferences
from ensembler.end_to_end import PERCENTILES, Figure, measured
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.machine import machine
from ensembler.protocol.manifest import load_client, load_server
from ensembler.protocol.options import whole
from ensembler.protocol.text import aligned

NAME = "bench"
HELP = "time a bundle on this device, its nets in a server, or calls from end to end; compare two runs"

PARTS = ("total", "head", "network", "queue", "server", "tail")
MAX_DOCUMENT_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what is timed, and the options of each."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    def timed(name: str, text: str) -> argparse.ArgumentParser:
        sub = what.add_parser(name, help=text, description=text, allow_abbrev=False)
        # Before WHAT or after it: neither may overrule the other by its default.
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document")
        return sub

    device = timed("device", "head and tail on this device, in every runtime")
    device.add_argument("bundle", type=a_path, help="the folder of a client bundle")
    add_bundle_secret(device)
    device.add_argument("--threads", default="", metavar="N,N,...", help="to try (default: 1, 2, ... to all cores)")
    device.add_argument("--runs", type=int, default=200, help="of each model (default: 200)")
    device.add_argument(
        "--write", action="store_true", help="remember the fastest for this user: clients that name none take it"
    )

    server = timed("server", "the N nets of a server bundle on this machine, without a network")
    server.add_argument("bundle", type=a_path, help="the folder of a server bundle for onnxruntime")
    server.add_argument("--threads", default="", metavar="N,N,...", help="to try (default: all cores)")
    server.add_argument("--rows", default="1,8,16,32,64", metavar="N,N,...", help="images of a batch, to try")
    server.add_argument(
        "--seconds", type=positive(float), default=2.0, help="of each arrangement, over all rounds (default: 2)"
    )
    server.add_argument(
        "--tune",
        action="store_true",
        help="try the sizes of parts as well, and write the best arrangement beside the bundle, for ensembler serve",
    )

    client = timed("client", "calls from end to end, against a running server, with their parts")
    client.add_argument("bundle", type=a_path, help="the folder of a client bundle")
    client.add_argument("image", nargs="?", type=a_path, help="an image file (default: noise)")
    add_connection(client)
    add_backend(client)
    client.add_argument("--batch", type=int, default=1, help="images of a call (default: 1)")
    client.add_argument("--at-once", type=int, default=1, help="calls under way (default: 1)")
    client.add_argument("--calls", type=int, default=100, help="of each round (default: 100)")
    client.add_argument("--rounds", type=int, default=5, help="of which the spread tells (default: 5)")

    compare = timed("compare", "two results of ensembler bench ... --json: ratios, and whether the spreads overlap")
    compare.add_argument("first", type=a_path, help="a file")
    compare.add_argument("second", type=a_path, help="another one, of the same kind")


def run(options: argparse.Namespace, console: Console) -> int:
    """Times, or compares."""
    return {"device": _device, "server": _server, "client": _client, "compare": _compare}[options.what](
        options, console
    )


# --- on the device ---


def _device(options: argparse.Namespace, console: Console) -> int:
    runs = whole("--runs", options.runs, 1)
    threads = _numbers("--threads", options.threads, MAX_THREADS) or _counts()
    secret = bundle_secret(options)
    refuse_idle_secret(options.bundle, load_client(options.bundle), **secret)
    found = bench(options.bundle, threads=threads, runs=runs, secret=secret_finder(**secret))
    best = found[0]
    lines = [
        *_timings(found),
        "",
        f"fastest: {best.backend} with {_counted(best.threads)}, {best.total_ms:.3f} ms an image",
    ]
    values = {
        f"{timing.backend}_{timing.threads}_{name}": getattr(timing, name)
        for timing in found
        for name in ("head_p50_ms", "head_p95_ms", "tail_p50_ms", "tail_p95_ms")
    }
    figures = {name: Figure(value=value, low=value, high=value) for name, value in values.items()}
    document = _document("device", figures) | {
        "runs": runs,
        "timings": [asdict(timing) for timing in found],
        "written": None,
    }
    if options.write:
        path = preferences.save(Preferences(backend=best.backend, threads=best.threads))
        document["written"] = str(path)
        lines.append(f"remembered in {path}")
    console.result(document, "\n".join(lines))
    return 0


def _timings(found: list[Timing]) -> list[str]:
    rows = [("runtime", "threads", "head p50 ms", "p95", "tail p50 ms", "p95")]
    rows += [
        (
            timing.backend,
            str(timing.threads),
            f"{timing.head_p50_ms:.3f}",
            f"{timing.head_p95_ms:.3f}",
            f"{timing.tail_p50_ms:.3f}",
            f"{timing.tail_p95_ms:.3f}",
        )
        for timing in found
    ]
    return aligned(rows)


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


# --- in the server ---


def _server(options: argparse.Namespace, console: Console) -> int:
    need(["onnxruntime"], "cloud", "serving")
    from ensembler.cloud_runtime import profile, tuning

    load_server(options.bundle)  # what is wrong with it is said before the time that it takes
    threads = _numbers("--threads", options.threads, profile.MAX_THREADS) or [len(os.sched_getaffinity(0))]
    tried = tuning.arrangements(threads, _numbers("--rows", options.rows) or [1], all_parts=options.tune)
    console.say(f"{len(tried)} arrangements, about {len(tried) * options.seconds:.0f} s")
    found = tuning.measured(options.bundle, tried, options.seconds)
    best = tuning.best(found)
    table = [("threads", "images", "parts of", "images/s", "slowest round", "fastest", "batch ms")]
    table += [
        (
            str(rate.arrangement.threads),
            str(rate.arrangement.rows),
            str(rate.arrangement.part_rows),
            f"{rate.images_per_s:.1f}",
            f"{rate.slowest:.1f}",
            f"{rate.fastest:.1f}",
            f"{rate.batch_ms:.2f}",
        )
        for rate in found
    ]
    chosen = best.arrangement
    lines = [
        *aligned(table, left=0),
        "",
        f"best: batches of {chosen.rows} in parts of {chosen.part_rows} on {_counted(chosen.threads)}, "
        f"{best.images_per_s:.1f} images/s; what else was tried gains less than {100 * (1 - tuning.ENOUGH):.0f} %",
    ]
    figures = {
        f"images_per_s_{each.threads}_threads_{each.rows}_rows_{each.part_rows}_part": Figure(
            value=rate.images_per_s, low=rate.slowest, high=rate.fastest
        )
        for rate in found
        for each in [rate.arrangement]
    }
    document = _document("server", figures) | {"best": asdict(chosen), "written": None}
    if options.tune:
        try:
            path = profile.save(options.bundle, tuning.profile_of(options.bundle, best))
        except ConfigError:
            console.result(document, "\n".join(lines))  # what was measured is not lost
            raise
        document["written"] = str(path)
        lines.append(f"written to {path}: ensembler serve takes it where its options leave it open")
    console.result(document, "\n".join(lines))
    return 0


# --- from end to end ---


def _client(options: argparse.Namespace, console: Console) -> int:
    batch = whole("--batch", options.batch, 1)
    at_once = whole("--at-once", options.at_once, 1, 256)
    calls, rounds = whole("--calls", options.calls, 1), whole("--rounds", options.rounds, 1)
    image = load_client(options.bundle).image
    if options.image is None:
        noise = np.random.Generator(np.random.PCG64(0))
        images = list(noise.integers(0, 256, (batch, image.height, image.width, 3), dtype=np.uint8))
    else:
        images = [to_pixels(options.image, image)] * batch
    with client_of(options, backend=options.backend) as client:
        figures = measured(client, images, at_once=at_once, calls=calls, rounds=rounds)
    table = [("", *(f"p{p} ms" for p in PERCENTILES), "p50 of the rounds")]
    for part in PARTS:
        middle = figures[f"{part}_p50_ms"]
        table.append(
            (
                part,
                *(f"{figures[f'{part}_p{p}_ms'].value:.3f}" for p in PERCENTILES),
                f"{middle.low:.3f} to {middle.high:.3f}",
            )
        )
    rate = figures["images_per_s"]
    settings = {"batch": batch, "at_once": at_once, "calls": calls, "rounds": rounds}
    lines = [
        *aligned(table),
        "",
        f"{rate.value:.1f} images/s ({rate.low:.1f} to {rate.high:.1f} in {rounds} rounds of {calls} calls), {batch} "
        f"in a call, {at_once} at once",
        f"{figures['bytes_up'].value:.0f} bytes up and {figures['bytes_down'].value:.0f} down in a call",
    ]
    console.result(_document("client", figures) | {"settings": settings}, "\n".join(lines))
    return 0


# --- two runs ---


def _compare(options: argparse.Namespace, console: Console) -> int:
    documents = [_read(path) for path in (options.first, options.second)]
    kinds = [document["bench"] for document in documents]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"{options.first} is of bench {kinds[0]}, {options.second} of bench {kinds[1]}")
    first, second = (document["figures"] for document in documents)
    names = [name for name in first if name in second]
    if not names:
        raise ConfigError(f"{options.first} and {options.second} have no figure in common")
    rows = [("", "first", "second", "ratio", "")]
    compared = {}
    for name in names:
        ratio = second[name]["value"] / first[name]["value"] if first[name]["value"] else None
        apart = first[name]["high"] < second[name]["low"] or second[name]["high"] < first[name]["low"]
        compared[name] = {
            "first": first[name]["value"],
            "second": second[name]["value"],
            "ratio": ratio,
            "spreads_overlap": not apart,
        }
        shown = "" if ratio is None else f"{ratio:.3f}"
        known = any(one[name]["low"] < one[name]["high"] for one in (first, second))
        remark = ("" if apart else "within spread") if known else "no spread known"
        rows.append(
            (
                name,
                f"{first[name]['value']:.4g}",
                f"{second[name]['value']:.4g}",
                shown,
                remark,
            )
        )
    lines = aligned(rows)
    machines = [document["machine"] for document in documents]
    if machines[0] != machines[1]:
        lines += ["", f"the machines differ: {machines[0]}; {machines[1]}"]
    if documents[0].get("settings") != documents[1].get("settings"):
        lines += ["", f"the settings differ: {documents[0].get('settings')}; {documents[1].get('settings')}"]
    console.result({"bench": kinds[0], "machines": machines, "compared": compared}, "\n".join(lines))
    return 0


def _read(path: Path) -> dict[str, Any]:
    """Returns a document of ``--json``.

    Raises:
        ConfigError: the file cannot be read, or is not one.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        document = json.loads(data) if len(data) <= MAX_DOCUMENT_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not (
        isinstance(document, dict)
        and all(type(document.get(name)) is str for name in ("bench", "machine"))
        and isinstance(document.get("figures"), dict)
        and all(
            isinstance(figure, dict) and all(_is_figure(figure.get(key)) for key in ("value", "low", "high"))
            for figure in document["figures"].values()
        )
    ):
        raise ConfigError(f"{path} is not what ensembler bench ... --json > FILE writes")
    return document


def _is_figure(value: object) -> bool:
    """Returns whether it is a number that can be divided and shown: no NaN, no infinity, no integer beyond floats."""
    return type(value) in (int, float) and -sys.float_info.max < cast("float", value) < sys.float_info.max


def _document(kind: str, figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {
        "bench": kind,
        "machine": machine(),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
    }


def _counts() -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return sorted({count for count in (1, 2, 4, cores) if count <= cores})


def _numbers(option: str, text: str, most: int | None = None) -> list[int]:
    if not text:
        return []
    try:
        return [whole(option, int(part), 1, most) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: give numbers with commas between them, for instance 1,2,4") from None
