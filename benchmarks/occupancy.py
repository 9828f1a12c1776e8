"""How much of the time the slowest stage works while ``EdgeClient.stream`` runs: link or server, by images in flight.

And while ``predict_batch`` runs, for a batch of a thousand images over a link that is never waited for: what the server
does of requests of many images, over what its nets do alone.

    python benchmarks/occupancy.py [--seconds 8]      (as root, after benchmarks/table3.py, whose bundle it streams)

Ten int8 nets of ResNet-18, single images, CURVE, over two links of benchmarks/link.py: one on which the server is
what is waited for, and one so slow that the link is. A stage that is never idle lets through as many images a second
as it can by itself: for the link its rate over the bytes that it carries for an image, as its network device counts
them, so that headers and acknowledgements are in; for the server the most that the nets do of 1, 8 or 16 images with
nothing else in the process. The occupancy is what ``stream`` lets through over that. Device and server share this
machine's cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import results
import table3
from bundles import Identities
from link import link, possible

from ensembler import EdgeClient
from ensembler.cloud_runtime import tuning
from ensembler.cloud_runtime.engine import usable_cores

LINKS = {"server": (table3.UP, table3.DOWN), "link": (2.0e5, 2.0e5)}
FAST = (1.0e8, 1.0e8)
BATCH = 1024
IN_FLIGHT = (1, 2, 4, 8, 16)
# What the link lets through at once is used up by then.
WARM_UP_IMAGES = 40
SYSTEM = "ours_features"
SEED = 0


def device(options: argparse.Namespace) -> None:
    """Prints as JSON what came and what the link carried: for each number of images in flight, or of batches."""
    image = np.random.Generator(np.random.PCG64(SEED)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    client = EdgeClient(
        options.folder / SYSTEM / "client",
        options.device,
        key=options.keys / "devices" / "device000.key_secret",
        server_key=options.keys / "server.key",
        timeout_ms=60_000,
    )
    rows: list[list[float]] = []
    with client:
        if options.batches:
            batch = np.repeat(image[None], BATCH, axis=0)
            client.predict_batch(batch)
            many = iter(lambda: len(client.predict_batch(batch)), None)
            print(json.dumps([[BATCH, *_timed(many, options.seconds)]]))
            return
        for in_flight in IN_FLIGHT:
            found = client.stream(itertools.repeat(image), in_flight=in_flight)
            for _ in range(max(2 * in_flight, WARM_UP_IMAGES)):
                next(found)
            rows.append([in_flight, *_timed((1 for _ in found), options.seconds)])
            found.close()
    print(json.dumps(rows))


def _timed(steps: Iterator[int], seconds: float) -> tuple[float, float]:
    """Returns images a second, and bytes sent for one; each of ``steps`` is its number of images."""
    count, began, sent = 0, time.perf_counter(), _sent_bytes()
    while (elapsed := time.perf_counter() - began) < seconds:
        count += next(steps)
    return count / elapsed, (_sent_bytes() - sent) / count


def _alone(options: argparse.Namespace, rows: list[int]) -> tuning.Rate:
    """Returns the most that the nets do by themselves in batches of so many images."""
    tried = tuning.arrangements([usable_cores()], rows, all_parts=False)
    return max(tuning.measured(options.folder / SYSTEM / "server", tried, 8.0), key=lambda rate: rate.images_per_s)


def _sent_bytes() -> int:
    return int(Path("/sys/class/net/ens0/statistics/tx_bytes").read_text(encoding="ascii"))


def measured(options: argparse.Namespace, up: float, down: float, *more: str) -> list[list[float]]:
    """Returns the rows that ``device`` printed over one link; ``more`` are its options."""
    with contextlib.ExitStack() as stack:
        ends = stack.enter_context(link(up, down))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys = Identities.new(work / "keys", 1)
        bundle = options.folder / SYSTEM / "server"
        served = bundles.served(bundle, keys, log=work / "server.log", within=ends.server, host=ends.address)
        own = [sys.executable, __file__, "--folder", str(options.folder), "--seconds", str(options.seconds)]
        own += more
        own += ["--keys", str(keys.folder), "--device", stack.enter_context(served)]
        done = subprocess.run([*ends.device, *own], stdout=subprocess.PIPE, text=True, check=True)
    rows: list[list[float]] = json.loads(done.stdout)
    return rows


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--folder", type=Path, default=table3.FOLDER, help="what benchmarks/table3.py made")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each number of images in flight")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--batches", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keys", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device:
        device(options)
        return
    if reason := possible():
        raise SystemExit(f"no link can be made here: {reason}")
    alone = _alone(options, [1, *IN_FLIGHT[-2:]]).images_per_s
    made: list[dict[str, Any]] = []
    for slowest, (up, down) in LINKS.items():
        print(f"link {up / 1e6:.2f} MB/s up, {down / 1e6:.2f} MB/s down; the nets alone {alone:.1f} images/s")
        shares = {}
        for in_flight, rate, sent in measured(options, up, down):
            most = min(alone, up / sent)
            shares[int(in_flight)] = rate / most
            print(
                f"  {in_flight:2.0f} in flight: {rate:6.1f} images/s, {sent:.0f} bytes up an image, the link at most "
                f"{up / sent:.1f}: {rate / most:.3f} of the slower"
            )
        note = "images/s over what the slower stage can by itself, by images in flight: " + ", ".join(
            f"{count}: {share:.3f}" for count, share in shares.items()
        )
        made.append(results.figure(f"stream_occupancy_{slowest}", round(shares[IN_FLIGHT[-1]], 4), "ratio", "", note))
    before = _alone(options, [32, 64])
    ((_, rate, _),) = measured(options, *FAST, "--batches")
    after = _alone(options, [32, 64])
    ceiling = (before.images_per_s + after.images_per_s) / 2
    note = (
        f"one device on the same cores, batches of {BATCH} images: {rate:.1f} images/s; the nets alone "
        f"{before.images_per_s:.1f} before and {after.images_per_s:.1f} after ({after.arrangement}); requests of one "
        "image: docs/results/cloud.json"
    )
    print(note)
    made.append(results.figure("throughput_vs_ort_ceiling", round(rate / ceiling, 4), "ratio", ">= 0.95", note))
    if not options.no_record:
        results.record("speed", made, command="python benchmarks/occupancy.py", seed=SEED)


if __name__ == "__main__":
    main()
