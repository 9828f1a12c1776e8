"""One tiny inference of one runtime, in a process of its own: ``python -m ensembler.edge_runtime.probe BACKEND``.

A wheel that was compiled for another processor ends the process that imports it (SIGILL, SIGSEGV), so whoever wants to
know looks from outside: ``run``. The model is an int8 head, and the digest of its codes is the same on every processor
where the runtime computes as it does on x86-64.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path

from ensembler.edge_runtime.backends import BACKENDS, open_session
from ensembler.protocol.errors import EnsemblerError

TIMEOUT_S = 120
# Of the codes on x86-64: onnxruntime 1.31.1, ai-edge-litert 2.3.0, tflite-runtime 2.14.0 (tools/probe_models.py).
ON_X86_64 = {
    "onnxruntime": "f37c49b5e672667ffd507e52bfeee18fb4aae96f739843350e62e7af7841cc6c",
    "ai-edge-litert": "f37c49b5e672667ffd507e52bfeee18fb4aae96f739843350e62e7af7841cc6c",
    "tflite-runtime": "8b2be6fd45c1906958fac9dbf2aec092eb7facee9497b4b9abc6d1969e57fb79",
}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a runtime did.

    Attributes:
        backend: its name.
        version: of it; empty where the process ended before it could tell.
        digest: SHA-256 of the codes; empty where there are none.
        seconds: from before the import to after the inference.
        rss_mb: the most memory that the process had.
        failure: why there are no codes; empty where there are.
    """

    backend: str
    version: str = ""
    digest: str = ""
    seconds: float = 0.0
    rss_mb: float = 0.0
    failure: str = ""

    @property
    def as_on_x86_64(self) -> bool:
        """Whether the codes are those of x86-64, bit for bit."""
        return self.digest == ON_X86_64[self.backend]


def run(backend: str) -> Probe:
    """Probes a runtime from outside: whatever happens to it happens to a child."""
    # -P: not from the folder where a doctor is called. A board's package has its modules on a path of its own.
    command = [sys.executable, "-P", "-m", __name__, backend]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return Probe(backend=backend, failure=f"no answer within {TIMEOUT_S} s")
    if done.returncode < 0:
        return Probe(backend=backend, failure=f"ended by {_signal_name(-done.returncode)}")
    try:
        return Probe(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        last = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Probe(backend=backend, failure=last[-1][:300])


def _peak_mb() -> float:
    """Returns the most memory that this program had; getrusage would count what started it, too."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _probe(backend: str) -> Probe:
    import numpy as np

    began = time.perf_counter()
    model = resources.files("ensembler.edge_runtime") / f"probe.{BACKENDS[backend].format}"
    image = (np.arange(16 * 16 * 3, dtype=np.uint32) * 7 % 256).astype(np.uint8).reshape(1, 16, 16, 3)
    try:
        codes = open_session(model.read_bytes(), name="the probe", backend=backend).run({"image": image})
    except EnsemblerError as error:
        return Probe(backend=backend, failure=str(error))
    return Probe(
        backend=backend,
        version=metadata.version(backend),
        digest=hashlib.sha256(codes.tobytes()).hexdigest(),
        seconds=round(time.perf_counter() - began, 3),
        rss_mb=_peak_mb(),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_probe(sys.argv[1]))))
