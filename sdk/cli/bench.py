"""``ensembler bench``: how long a device takes for its part."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from ensembler.cli.console import Console
from ensembler.cli.predict import add_bundle_secret, bundle_secret
from ensembler.client import refuse_idle_secret, secret_finder
from ensembler.edge_runtime import preferences
from ensembler.edge_runtime.backends import MAX_THREADS
from ensembler.edge_runtime.bench import Timing, bench
from ensembler.edge_runtime.preferences import Preferences
from ensembler.protocol.errors import ConfigError
from ensembler.protocol.manifest import load_client
from ensembler.protocol.options import whole
from ensembler.protocol.text import aligned

NAME = "bench"
HELP = "time head and tail of a bundle on this device, in every runtime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("what", choices=["device"], help="what is timed")
    parser.add_argument("bundle", type=Path, help="the folder of a client bundle")
    add_bundle_secret(parser)
    parser.add_argument("--threads", default="", metavar="N,N,...", help="to try (default: 1, 2, ... to all cores)")
    parser.add_argument("--runs", type=int, default=200, help="of each model (default: 200)")
    parser.add_argument(
        "--write", action="store_true", help="remember the fastest for this user: clients that name none take it"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Times, and remembers the fastest if asked to."""
    runs = whole("--runs", options.runs, 1)
    threads = _threads(options.threads)
    secret = bundle_secret(options)
    refuse_idle_secret(options.bundle, load_client(options.bundle), **secret)
    found = bench(options.bundle, threads=threads, runs=runs, secret=secret_finder(**secret))
    best = found[0]
    lines = [
        *_table(found),
        "",
        f"fastest: {best.backend} with {_counted(best.threads)}, {best.total_ms:.3f} ms an image",
    ]
    document = {"runs": runs, "timings": [asdict(timing) for timing in found], "written": None}
    if options.write:
        path = preferences.save(Preferences(backend=best.backend, threads=best.threads))
        document["written"] = str(path)
        lines.append(f"remembered in {path}")
    console.result(document, "\n".join(lines))
    return 0


def _threads(text: str) -> list[int]:
    if not text:
        cores = len(os.sched_getaffinity(0))
        return sorted({count for count in (1, 2, 4, cores) if count <= cores})
    try:
        return [whole("--threads", int(part), 1, MAX_THREADS) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--threads {text}: give numbers with commas between them, for instance 1,2,4") from None


def _table(found: list[Timing]) -> list[str]:
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
