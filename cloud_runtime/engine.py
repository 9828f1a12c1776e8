"""What computes the N answers of a batch: the interface that every engine keeps, and the choice among them.

The server knows engines by this interface alone; tests/test_engine.py holds all of them to one table.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ensembler.cloud_runtime import profile
from ensembler.cloud_runtime.profile import Profile
from ensembler.protocol.errors import BundleError, ConfigError, MissingExtraError
from ensembler.protocol.manifest import BodiesFormat, ServerManifest, load_server
from ensembler.protocol.options import whole

log = logging.getLogger("ensembler.engine")

AUTO = "auto"
DEVICES = (AUTO, "cpu", "cuda")

Codes = npt.NDArray[np.uint8]


class Engine(Protocol):
    """Computes all N answers of one server bundle.

    Attributes:
        manifest: of the bundle, verified.
        lanes: how many batches it computes at once: ``run`` is called from that many threads, and no more.
        in_process: whether it computes in the calling process, so that a short batch is best computed by the caller's
            thread.
    """

    manifest: ServerManifest
    lanes: int
    in_process: bool

    def run(self, features: Codes) -> Codes:
        """Computes all N answers.

        Args:
            features: wire codes ``(B, C, h, w)`` uint8.

        Returns:
            Answers' codes ``(B, N, F)`` uint8, in the bundle's order; every body gets every row.

        Raises:
            EngineLostError: what computed it is gone; the batch may be tried again.
            BundleError: codes of more bits than the manifest says.
        """

    def alive(self) -> bool:
        """Whether ``run`` can compute now; False while nothing is there that could, for instance no worker."""

    def describe(self) -> str:
        """Says in a few words what computes, for the ready line: ``onnxruntime on 4 threads``."""

    def close(self) -> None:
        """Frees all it holds. No ``run`` may be under way."""


# Beyond it a number is a mistake.
MAX_WORKERS = 256
MAX_THREADS = 1024


class EngineLostError(Exception):
    """What computed a batch (a process, an actor) ended before it answered; not a fault of the batch, so far."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is made.

    Attributes:
        kind: one of ``ENGINES``; ``auto`` takes what reads the bundle's format.
        threads: computing threads for all nets together; None takes the usable cores. Of ``ray``: for each group of
            nets, and None takes the CPUs that its machine gives Ray.
        device: one of ``DEVICES``; ``auto`` takes a GPU that the engine's library finds.
        workers: processes of their own that compute; 0 computes in this one.
        address: of ``ray`` alone: its head, ``HOST:PORT``, or ``auto``; None starts a Ray of this machine alone.
        replicas: of ``ray`` alone: on how many machines each group of nets is, if there are as many.
        part_rows: of ``onnxruntime`` alone: images that a thread takes through one net at a time; None takes its own.
    """

    kind: str = AUTO
    threads: int | None = None
    device: str = AUTO
    workers: int = 0
    address: str | None = None
    replicas: int = 1
    part_rows: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (AUTO, *ENGINES):
            raise ConfigError(f"--engine {self.kind!r} is unknown; known: {', '.join((AUTO, *ENGINES))}")
        if self.device not in DEVICES:
            raise ConfigError(f"--device {self.device!r} is unknown; known: {', '.join(DEVICES)}")
        if self.threads is not None:
            whole("--threads", self.threads, 1, MAX_THREADS)
        if not 0 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"--workers {self.workers}: 0 to {MAX_WORKERS} processes can compute")
        if self.replicas < 1:
            raise ConfigError(f"--replicas {self.replicas}: at least one")
        if self.kind == "ray" and self.device == "cuda":
            raise ConfigError("--device cuda: the Ray engine computes on processors")
        if self.kind != "ray" and (self.address is not None or self.replicas > 1):
            raise ConfigError(f"--address and --replicas are of --engine ray, not of {self.kind}")
        if self.kind == "ray" and self.workers:
            raise ConfigError("--workers is not of --engine ray, whose nets compute in processes of its own anyway")


def load(bundle: Path, options: EngineOptions) -> Engine:
    """Opens a server bundle in the chosen engine and computes once for real.

    Raises:
        BundleError: missing, damaged, of another version, or its nets do not compute what its manifest says.
        ConfigError: the engine cannot compute on the device.
        MissingExtraError: the engine is not installed.
    """
    options = _completed(bundle, options)
    if options.workers:
        from ensembler.cloud_runtime.worker_engine import WorkerEngine

        return WorkerEngine(bundle, options)
    engine = ENGINES[_kind(options, load_server(bundle))](bundle, options)
    try:
        warm_up(engine)
    except BaseException:
        engine.close()
        raise
    return engine


def tuned_rows(bundles: Iterable[Path], options: EngineOptions) -> int | None:
    """Returns how many images to compute together by the bundles' profiles, or None if none has one that fits.

    Models of one server share the bounds of a batch, so the smallest counts.

    Raises:
        BundleError: see ``load``.
        ConfigError: see ``profile.load``.
    """
    found = [one for bundle in bundles for one, unfit in [_profile(bundle, options)] if one and not unfit]
    return min((one.max_batch_rows for one in found), default=None)


def _profile(bundle: Path, options: EngineOptions) -> tuple[Profile | None, str | None]:
    """Returns the profile beside a bundle, if the engine can use one, and why it does not fit, if it does not."""
    manifest = load_server(bundle)
    if _kind(options, manifest) != "onnxruntime":
        return None, None
    from ensembler.cloud_runtime.onnx_engine import uses_cuda

    if uses_cuda(options.device):  # it says how processors compute
        return None, None
    found, unfit = profile.load(bundle)
    return found, unfit if found is None else found.misfit(manifest)


def _completed(bundle: Path, options: EngineOptions) -> EngineOptions:
    """Returns the options with what the bundle's profile says where they leave it open."""
    if options.threads is not None and options.part_rows is not None:
        return options
    found, unfit = _profile(bundle, options)
    if unfit is not None:
        log.warning("%s is not used: %s; ensembler bench server --tune", profile.path_of(bundle), unfit)
        return options
    if found is None:
        return options
    return replace(
        options,
        threads=found.threads if options.threads is None else options.threads,
        part_rows=found.part_rows if options.part_rows is None else options.part_rows,
    )


def _kind(options: EngineOptions, manifest: ServerManifest) -> str:
    return _READERS[manifest.format] if options.kind == AUTO else options.kind


def warm_up(engine: Engine) -> None:
    """Runs every body once for real; a bundle whose nets do not answer as its manifest says is refused.

    Raises:
        BundleError: wrong shape, dtype or codes.
    """
    wire = engine.manifest.wire
    try:
        engine.run(np.zeros((1, *wire.feature_shape), np.uint8))
    except Exception as error:
        raise BundleError(f"the bundle's bodies cannot compute what its manifest says: {error}") from error


def require_format(manifest: ServerManifest, wanted: BodiesFormat, bundle: Path) -> None:
    """Refuses a bundle whose bodies are in another format than the engine reads.

    Raises:
        BundleError: they are.
    """
    if manifest.format != wanted:
        raise BundleError(
            f"{bundle} holds bodies in the format {manifest.format}, this engine reads {wanted}: "
            f"--engine {_READERS[manifest.format]} reads them"
        )


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _onnxruntime(bundle: Path, options: EngineOptions) -> Engine:
    from ensembler.cloud_runtime.onnx_engine import PART_ROWS, OnnxEngine

    part_rows = PART_ROWS if options.part_rows is None else options.part_rows
    return OnnxEngine(bundle, threads=options.threads, part_rows=part_rows, device=options.device)


def _torch(bundle: Path, options: EngineOptions) -> Engine:
    try:
        from ensembler.cloud_runtime.torch_engine import TorchEngine
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "cloud-torch", "serving a torch bundle") from error
    return TorchEngine(bundle, threads=options.threads, device=options.device)


def _ray(bundle: Path, options: EngineOptions) -> Engine:
    from ensembler.cloud_runtime.ray_engine import RayEngine

    return RayEngine(bundle, options)


# Each imports its own library when it is chosen, and no other.
ENGINES: dict[str, Callable[[Path, EngineOptions], Engine]] = {
    "onnxruntime": _onnxruntime,
    "torch": _torch,
    "ray": _ray,
}
_READERS: dict[BodiesFormat, str] = {"onnx": "onnxruntime", "torch": "torch"}
