"""One party's process: ``python -m ensembler.crypto.party LINK CONTROL``, two inherited sockets.

The engine has a process of its own, so that what hangs in it can be ended at a deadline, and what it takes in memory
ends with it. ``LINK`` is the stream to the other party's engine; over ``CONTROL`` come one order after the other, and
each has one answer, and before it messages of what is ``told``: steps that are done, seconds and bytes since the
order. Orders: ``open``, ``run``, ``finish`` (see ``_Party``). Start reading at ``main``.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ensembler.crypto import bundle as bundles
from ensembler.crypto import shares
from ensembler.crypto.clear import ClearLayers
from ensembler.crypto.engine import CLIENT, SERVER, Engine, open_engine
from ensembler.crypto.link import StreamLink
from ensembler.protocol.errors import EnsemblerError, InternalError

MAX_ORDER_BYTES = 256 * 1024 * 1024
OUT_OF_MEMORY = "MemoryError"


class _Party:
    """Answers orders."""

    def __init__(self, link: StreamLink, tell: Callable[[int], None]) -> None:
        self._link, self._tell = link, tell
        self._engine: Engine
        self._manifest: bundles.CryptoManifest
        self._share: shares.Shares | None = None
        self._clear: ClearLayers | None = None

    def open(self, folder: str, rank: int, threads: int, tail: bytes = b"") -> dict[str, Any]:
        """Loads a bundle and sets the engine up, together with the other party; ``tail`` is one that was sealed."""
        path = Path(folder)
        load = bundles.load_server if rank == SERVER else bundles.load_client
        self._manifest, steps = load(path)
        settings = self._manifest.settings
        weights = path / bundles.weights_file(settings.engine) if rank == SERVER else None
        side = SERVER if rank == SERVER else CLIENT
        own = bundles.SUFFIX_FILE if side == SERVER else bundles.TAIL_FILE
        if tail or own in self._manifest.files:
            self._clear = ClearLayers(tail or path / own, threads)
        self._engine = open_engine(settings, self._link, side, steps, weights, self._manifest.image_shape)
        return {}

    def run(self, image: bytes) -> dict[str, Any]:
        """Runs the steps. Who reveals answers with its share and the noise on it; the other one keeps its own."""
        manifest = self._manifest
        given = np.frombuffer(image, np.float32).reshape(manifest.image_shape) if image else None
        share = self._engine.run(given, self._tell)
        reveals = SERVER if manifest.mode == bundles.FULL else CLIENT
        if reveals != (SERVER if given is None else CLIENT):
            self._share = share
            return {}
        return {"share": shares.noised(share, manifest.noise_magnitude, manifest.settings.fraction_bits)}

    def finish(self, content: bytes) -> dict[str, Any]:
        """Takes what the other party sent, its share or the bodies' answers, and computes what is this party's then."""
        manifest, share, self._share = self._manifest, self._share, None
        if share is not None:
            values = shares.revealed(share, content, manifest.settings.fraction_bits)
        elif manifest.mode == bundles.ENSEMBLE:
            values = np.frombuffer(content, "<f4").astype(np.float32).reshape(1, *manifest.answer_shape)
        else:
            raise InternalError("no result is waiting for a share")
        if self._clear is not None:
            values = self._clear.run(values)
        return {"result": values.astype("<f4").tobytes()}


def _peak_mb() -> float:
    """Returns this program's largest memory; what ``getrusage`` says counts the program before it too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def _end_with(control: int) -> None:
    """Ends this process when the one that started it has gone, whatever the engine does."""
    watch = select.poll()
    watch.register(control, 0)  # a hang-up is always told
    watch.poll()
    os._exit(1)


def main(link: int, control: int) -> None:
    """Answers until the other end of ``control`` is closed."""
    orders = Connection(control)
    threading.Thread(target=_end_with, args=(control,), name="ensembler-watch", daemon=True).start()

    stream = StreamLink(socket.socket(fileno=link))

    def tell(done: int) -> None:
        sent, received = stream.sent_bytes - sent_before, stream.received_bytes - received_before
        orders.send_bytes(msgpack.packb({"told": [done, time.monotonic() - begun, sent, received]}))

    party = _Party(stream, tell)
    calls: dict[str, Callable[..., dict[str, Any]]] = {"open": party.open, "run": party.run, "finish": party.finish}
    while True:
        try:
            order = msgpack.unpackb(orders.recv_bytes(MAX_ORDER_BYTES), max_bin_len=MAX_ORDER_BYTES)
        except (EOFError, OSError):
            return
        begun, before = time.monotonic(), time.process_time()
        sent_before, received_before = stream.sent_bytes, stream.received_bytes
        try:
            answer = calls[order.pop("do")](**order)
        except EnsemblerError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        except MemoryError:
            answer = {"error": OUT_OF_MEMORY, "text": ""}
        except Exception as error:  # the engine's own classes
            memory = "bad_alloc" in str(error) or "memory" in str(error).lower()
            answer = {"error": OUT_OF_MEMORY if memory else type(error).__name__, "text": str(error)[:500]}
        answer["wall_s"] = time.monotonic() - begun
        answer["cpu_s"] = time.process_time() - before
        answer["peak_mb"] = _peak_mb()
        try:
            orders.send_bytes(msgpack.packb(answer))
        except OSError:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # what the engine has of threads is not waited for
