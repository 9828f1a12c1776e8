"""The N nets on several machines: groups of bodies in Ray actors, each group on several machines if so wanted.

The gateway (this process) sends a batch to one copy of every group and puts their answers together. A copy that dies,
or that no longer says it is well, is left out at once; the batch goes to another copy, or waits for the new one.
Only arrays that were checked go in and come out. Start reading at ``RayEngine.run``; what runs on the machines is
``Group``.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ensembler.cloud_runtime.engine import Codes, EngineLostError, EngineOptions, load, require_format
from ensembler.cloud_runtime.placement import Step, next_step
from ensembler.cloud_runtime.ray_cluster import connected
from ensembler.protocol.codec import require_codes
from ensembler.protocol.errors import BadRequestError, BundleError, ConfigError, EnsemblerError, MissingExtraError
from ensembler.protocol.manifest import MANIFEST_NAME, ServerManifest, load_server, to_json

log = logging.getLogger("ensembler.ray")

# How often the copies and the machines are looked at: a share of what a new copy needs to start.
LOOK_S = 0.5
# A machine without power answers nothing and refuses nothing. Busy ones answer too, in a thread for that alone.
PING_S = 10.0
# No device waits that long for a batch: in it, what was lost comes back and every copy answers, or is given up.
RUN_S = 60.0
# To bring an answer here that is known to be there.
FETCH_S = 10.0
# To send a group's files to a machine, load and warm them.
OPEN_S = 180.0
# Where a copy was lost or could not be started nothing is started for so long, since it may take Ray as long to find
# that a machine is gone; unless there is no other.
REST_S = 15.0
# Ray sends an array of more bytes through its store, for which it is put there once for all groups.
INLINE_BYTES = 100 * 1024


class Group:
    """What an actor is: an engine for a part of the bodies, on another machine."""

    def open(self, files: dict[str, bytes], threads: int) -> None:
        """Loads a group.

        Args:
            files: by name, what makes a server bundle of these bodies alone.
            threads: that compute.

        Raises:
            BundleError: a file is not what the manifest says, or does not compute.
            ConfigError: this machine lacks a package.
        """
        with tempfile.TemporaryDirectory(prefix="ensembler-ray-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            try:
                self._engine = load(Path(folder), EngineOptions(kind="onnxruntime", threads=threads, device="cpu"))
            except MissingExtraError as error:  # whose constructor does not survive the journey
                raise ConfigError(f"a machine of the Ray cluster lacks a package: {error}") from error

    def run(self, features: Codes) -> Codes:
        """Computes the group's answers ``(B, n, F)`` for wire codes ``(B, C, h, w)``."""
        return self._engine.run(features)

    def ping(self) -> None:
        """Says that it is well."""


@dataclass(eq=False)
class _Copy:
    """One actor.

    Attributes:
        group: which it computes.
        node: where it is.
        actor: Ray's handle.
        asked: what it was asked last: to open, then whether it is well.
        asked_s: when.
        is_open: whether batches go to it.
        is_lost: whether it was given up.
        batches: that it computes now, or will next.
    """

    group: int
    node: str
    actor: Any
    asked: Any
    asked_s: float
    is_open: bool = False
    is_lost: bool = False
    batches: int = 0


class RayEngine:
    """The bodies of one server bundle on the machines of a Ray cluster.

    There are as many groups as machines when it starts, and no more than bodies.

    Args:
        bundle: the folder of a server bundle; the machines get its files from here and verify them again.
        options: ``address`` of the cluster, ``replicas`` of every group, ``threads`` of one group.

    Raises:
        BundleError: missing, damaged, of another version, or a machine cannot load it.
        ConfigError: the cluster cannot be reached, or its machines cannot run this.
        MissingExtraError: Ray is not installed.
    """

    in_process = False

    def __init__(self, bundle: Path, options: EngineOptions) -> None:
        self.manifest: ServerManifest = load_server(bundle)
        require_format(self.manifest, "onnx", bundle)  # whose bodies are files of their own
        self._options = options
        self._copies: list[_Copy] = []
        self._nodes: dict[str, int] = {}  # the machines, by Ray's node id, and how many CPUs each gives
        self._resting: dict[str, float] = {}  # those where nothing is started until then
        self._lock = threading.Condition()  # of the copies; notified when one computes
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None
        self._stack = contextlib.ExitStack()
        try:
            self._ray = self._stack.enter_context(connected(options.address, cores=options.threads))
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            self._on_node = NodeAffinitySchedulingStrategy
            self._actors = self._ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"health": 1})(Group)
            self._begin(bundle)
        except BaseException:
            self.close()
            raise

    def _begin(self, bundle: Path) -> None:
        """Divides the bodies and starts every copy; returns when all compute."""
        nodes = self._living()
        if not nodes:
            raise ConfigError("no machine of the Ray cluster has a CPU to give; start one with --num-cpus above 0")
        # While a copy computes one batch, the next is on its way to it.
        self.lanes = 2 * min(self._options.replicas, len(nodes))
        bodies = self.manifest.bodies
        shares = np.array_split(np.arange(len(bodies)), min(len(bodies), len(nodes)))
        self._parts = [slice(int(share[0]), int(share[-1]) + 1) for share in shares]
        self._files = [self._ray.put(_files(bundle, self.manifest, part)) for part in self._parts]
        until = time.monotonic() + OPEN_S
        while True:
            self._round()
            opening = [copy.asked for copy in self._copies if not copy.is_open]
            if not opening:
                break
            if time.monotonic() > until:
                raise ConfigError(f"the Ray cluster did not start {len(opening)} groups of nets within {OPEN_S:.0f} s")
            self._ray.wait(opening, timeout=LOOK_S)
        self._keeper = threading.Thread(target=self._keep, name="ray-keeper", daemon=True)
        self._keeper.start()

    # --- the engine ---

    def run(self, features: Codes) -> Codes:
        """See ``Engine``.

        Raises:
            BadRequestError: no wire codes of this bundle's features; nothing was sent.
            BundleError: a machine answers with something else than the manifest says.
            EngineLostError: no copy of a group came back, or answered, in time.
        """
        from ray.exceptions import RayError, RayTaskError

        wire, ray = self.manifest.wire, self._ray
        if type(features) is not np.ndarray or features.dtype != np.uint8 or features.shape[1:] != wire.feature_shape:
            raise BadRequestError(
                f"the engine takes uint8 codes of shape (B, {', '.join(map(str, wire.feature_shape))})"
            )
        answers = np.empty((len(features), wire.num_nets, wire.answer_width), np.uint8)
        sent = ray.put(features) if features.nbytes > INLINE_BYTES else features
        until = time.monotonic() + RUN_S
        todo, asked = list(range(len(self._parts))), dict[Any, _Copy]()
        try:
            while todo or asked:
                for copy in self._take(todo, until):
                    asked[copy.actor.run.remote(sent)] = copy
                todo.clear()
                ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_S)
                for ref in ready:
                    copy = asked[ref]
                    try:
                        part = ray.get(ref, timeout=FETCH_S)
                    except RayTaskError as error:
                        raise _cause(error) from error
                    except RayError as error:
                        self._lose(copy, error)
                    else:
                        answers[:, self._parts[copy.group]] = self._checked(part, copy, len(features))
                        self._give_back(asked.pop(ref))
                for ref in [ref for ref, copy in asked.items() if copy.is_lost]:
                    todo.append(asked[ref].group)
                    self._give_back(asked.pop(ref))
                if asked and time.monotonic() > until:
                    for copy in asked.values():
                        self._lose(copy, f"no answer within {RUN_S:.0f} s")
                    raise EngineLostError(f"{len(asked)} groups of nets did not answer within {RUN_S:.0f} s")
        finally:
            for copy in asked.values():
                self._give_back(copy)
        return answers

    def alive(self) -> bool:
        """See ``Engine``: whether every group has a copy that computes."""
        with self._lock:
            return self._covered(range(len(self._parts)))

    def describe(self) -> str:
        """See ``Engine``."""
        with self._lock:
            nodes, copies = len({copy.node for copy in self._copies}), len(self._copies)
        return f"Ray with {copies} actors for {len(self._parts)} groups of nets on {nodes} machines"

    def close(self) -> None:
        """Ends the actors, and a Ray that was started for them."""
        self._closing.set()
        self._wake.set()
        if self._keeper is not None:
            self._keeper.join()
        for copy in list(self._copies):
            self._forget(copy)
        self._stack.close()

    def places(self) -> dict[str, list[int]]:
        """Returns for each machine (Ray's node id) the groups that compute there."""
        with self._lock:
            nodes = sorted({copy.node for copy in self._copies if copy.is_open})
            return {n: sorted(c.group for c in self._copies if c.node == n and c.is_open) for n in nodes}

    def _checked(self, part: object, copy: _Copy, rows: int) -> Codes:
        wire = self.manifest.wire
        where = self._parts[copy.group]
        shape = (rows, where.stop - where.start, wire.answer_width)
        if not isinstance(part, np.ndarray) or part.dtype != np.uint8 or part.shape != shape:
            raise BundleError(f"node {copy.node} does not answer with uint8 codes of shape {shape}")
        require_codes(part, wire.answer_codecs[0], "a body")
        return part

    # --- which copy computes ---

    def _take(self, groups: list[int], until: float) -> list[_Copy]:
        """Picks a copy of each group, the one with the least to do, its machine counted; waits for those to come.

        Raises:
            EngineLostError: there is none of one group in time. No other has been asked for it in vain.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: self._covered(groups), until - time.monotonic()):
                raise EngineLostError("no machine computes some of the nets at the moment")
            return [self._least_busy(group) for group in groups]

    def _covered(self, groups: Iterable[int]) -> bool:
        return {copy.group for copy in self._copies if copy.is_open}.issuperset(groups)

    def _least_busy(self, group: int) -> _Copy:
        busy: dict[str, int] = {}
        for copy in self._copies:
            busy[copy.node] = busy.get(copy.node, 0) + copy.batches
        fit = [copy for copy in self._copies if copy.group == group and copy.is_open]
        best = min(fit, key=lambda copy: (busy[copy.node], copy.batches))
        best.batches += 1
        return best

    def _give_back(self, copy: _Copy) -> None:
        with self._lock:
            copy.batches -= 1

    def _lose(self, copy: _Copy, why: object) -> None:
        """Gives a copy up, and has it replaced."""
        if not self._forget(copy):
            return
        if len(self._nodes) > 1 or not copy.is_open:
            self._resting[copy.node] = time.monotonic() + REST_S
        reason = str(why).strip().splitlines()[0]
        log.warning("group %d of the nets is lost on node %s: %s", copy.group, copy.node, reason)
        self._wake.set()

    # --- keeping the copies: one thread, once all are there ---

    def _keep(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(LOOK_S)
            self._wake.clear()
            try:
                self._round()
            except Exception:
                log.exception("the Ray cluster cannot be looked after; it is tried again")

    def _round(self) -> None:
        """Hears the copies, and starts or stops what is to be."""
        self._listen()
        self._nodes = self._living()
        for copy in list(self._copies):
            if copy.node not in self._nodes:
                self._lose(copy, "its machine left the cluster")
        now = time.monotonic()
        resting = {node for node, until in self._resting.items() if until > now}
        used = {copy.node for copy in list(self._copies)}
        usable = [node for node in self._nodes if node not in resting or node in used]
        while (step := self._next_step(usable)) is not None:
            if not step.start:
                self._stop(step)
            elif step.node not in resting:
                self._start(step)
            else:
                break

    def _next_step(self, usable: list[str]) -> Step | None:
        copies = list(self._copies)
        placed = [{copy.node for copy in copies if copy.group == group} for group in range(len(self._parts))]
        settled = all(copy.is_open for copy in copies)
        return next_step(placed, usable, self._options.replicas, settled=settled)

    def _listen(self) -> None:
        """Takes what the copies say; one that is silent, or could not open, is given up."""
        from ray.exceptions import RayError, RayTaskError

        copies = {copy.asked: copy for copy in list(self._copies)}  # a batch may lose one meanwhile
        ready = set(self._ray.wait(list(copies), num_returns=len(copies), timeout=0)[0]) if copies else set()
        for ref, copy in copies.items():
            if ref not in ready:
                if time.monotonic() - copy.asked_s > (PING_S if copy.is_open else OPEN_S):
                    self._lose(copy, "it does not say that it is well")
                continue
            try:
                self._ray.get(ref, timeout=FETCH_S)
            except RayError as error:
                cause = _cause(error) if isinstance(error, RayTaskError) else error
                if self._keeper is None:
                    raise _startable(cause) from error
                self._lose(copy, cause)
                continue
            if not copy.is_open and self._keeper is not None:
                log.warning("group %d of the nets computes on node %s", copy.group, copy.node)
            with self._lock:
                copy.is_open = True
                self._lock.notify_all()
            copy.asked = copy.actor.ping.options(concurrency_group="health").remote()
            copy.asked_s = time.monotonic()

    def _living(self) -> dict[str, int]:
        """Returns the living machines that have CPUs to give, and how many."""
        found = [(node["NodeID"], int(node["Resources"].get("CPU", 0))) for node in self._ray.nodes() if node["Alive"]]
        return {name: cpus for name, cpus in sorted(found) if cpus > 0}

    def _start(self, step: Step) -> None:
        # No CPUs are reserved: the machines that are left take everything, however little that gives each net.
        actor = self._actors.options(scheduling_strategy=self._on_node(step.node, soft=False)).remote()
        asked = actor.open.remote(self._files[step.group], self._options.threads or self._nodes[step.node])
        copy = _Copy(group=step.group, node=step.node, actor=actor, asked=asked, asked_s=time.monotonic())
        with self._lock:
            self._copies.append(copy)

    def _stop(self, step: Step) -> None:
        for copy in list(self._copies):
            if (copy.group, copy.node) == (step.group, step.node):
                self._forget(copy)

    def _forget(self, copy: _Copy) -> bool:
        """Sends nothing more to a copy and ends it; False where that was done before."""
        with self._lock:
            if copy.is_lost:
                return False
            copy.is_lost = True
            self._copies.remove(copy)
        with contextlib.suppress(Exception):  # it may be gone, or Ray itself
            self._ray.kill(copy.actor)
        return True


def _files(bundle: Path, manifest: ServerManifest, part: slice) -> dict[str, bytes]:
    """Returns a server bundle of some of the bodies, by file name."""
    bodies = manifest.bodies[part]
    wire = replace(manifest.wire, answer_codecs=manifest.wire.answer_codecs[part])
    entries = {name: manifest.files[name] for name in bodies}
    own = replace(manifest, wire=wire, bodies=bodies, files=entries)
    return {MANIFEST_NAME: to_json(own)} | {name: (bundle / name).read_bytes() for name in bodies}


def _cause(error: Any) -> Exception:
    """Returns what was raised on the other machine, without Ray's wrapping where it is one of ours."""
    cause: Exception = error.cause
    return cause if isinstance(cause, EnsemblerError) else error


def _startable(cause: Exception) -> Exception:
    """Returns what to tell somebody whose cluster cannot start the nets."""
    if isinstance(cause, EnsemblerError):
        return cause
    reason = str(cause).strip().splitlines()[-1]
    return ConfigError(
        f"a machine of the Ray cluster cannot run the nets ({reason}); every machine needs this version of "
        "ensembler-edge[ray]"
    )
