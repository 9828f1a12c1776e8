"""Several stage-1 nets at once, each in a process of its own with its share of the processor's threads.

The nets have nothing to tell each other. A process trains the nets it is given into the run folder, exactly as its
parent would have done alone and from the same seeds, so it can be killed and resumed like it. It tells how far it is
in lines of JSON on its standard output. That pipe ties it to its parent: once nobody reads it, its next step is its
last. Until then it holds the run's lock, so that nothing else trains in that folder.

What a process does is ``stage1_worker``. Start reading at ``train_nets``.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import torch

from ensembler.protocol.errors import ConfigError, DataError, EnsemblerError, TrainingError
from ensembler.training.config import TrainConfig
from ensembler.training.fit import Reporter
from ensembler.training.runs import RunFolder

STOP_S = 10  # for a process that was told to end
ENDED = "ended"
ERRORS: Mapping[str, type[EnsemblerError]] = {kind.__name__: kind for kind in (ConfigError, DataError)}

Event = tuple[str, int, Any]  # what happened, to which net, and its number or text


def train_nets(
    run: RunFolder, config: TrainConfig, nets: Sequence[int], device: torch.device, steps: int, reporter: Reporter
) -> None:
    """Trains ``nets`` in ``config.jobs`` processes and returns when all are stored.

    Args:
        run: the run folder, locked by the caller.
        config: the options.
        nets: their indices, dealt out to the processes in turn.
        device: that trains.
        steps: of one net from its beginning.
        reporter: told of all steps as one piece of work.

    Raises:
        ConfigError: of a process, for instance a loss that is no longer finite. The others are stopped, and a resumed
            run goes on with them at their last finished epoch; so in every case.
        DataError: of a process.
        TrainingError: a process ended without saying why.
    """
    jobs = min(config.jobs, len(nets))
    with _started(run, nets, jobs, device) as workers:
        follow(workers.events(), nets, steps, reporter, f"stage 1, {len(nets)} nets, {jobs} at a time")


def follow(events: Iterable[Event], nets: Sequence[int], steps: int, reporter: Reporter, label: str) -> None:
    """Tells ``reporter`` of all nets as one piece of work, to the end of ``events``.

    Args:
        events: of ``nets``, which train elsewhere.
        nets: their indices.
        steps: of one net from its beginning.
        reporter: told.
        label: what the reporter calls it.
    """
    reporter.begin(label, len(nets) * steps)
    summaries = {}
    for event, index, detail in events:
        if event == "begin":
            for _ in range(steps - detail):  # done before the run was resumed
                reporter.step(f"net {index + 1}: resumed")
        elif event == "step":
            reporter.step(f"net {index + 1}: {detail}")
        else:
            summaries[index] = detail
    reporter.end("; ".join(f"net {index + 1}: {summaries[index]}" for index in nets))


def heard(line: str) -> Event:
    """Returns what a worker's line of JSON says: ``begin`` with the number of steps, ``step`` and ``end`` with a text.

    Raises:
        EnsemblerError: the line tells of one.
    """
    event, index, detail = json.loads(line)
    if event == "error":
        raise ERRORS[index](detail)
    return event, index, detail


def step_s(run: RunFolder, jobs: int, device: torch.device) -> float:
    """Returns how long one step of one net takes while ``jobs`` nets train at once, in seconds.

    Args:
        run: a run folder of ``jobs`` nets or more and a single epoch; each trains that epoch into it.
        jobs: processes.
        device: that trains.

    Raises:
        EnsemblerError: as ``train_nets``.
    """
    times: list[list[float]] = []  # of each net: the beginning, and every step
    with _started(run, range(jobs), jobs, device, hold=True) as workers:
        totals: list[int] = []
        for event, index, detail in workers.events():
            if event == "begin":
                totals.append(detail)
                if len(totals) == jobs:
                    times = [[time.perf_counter()] for _ in range(jobs)]
                    workers.release()
            elif event == "step":
                times[index].append(time.perf_counter())
                if sum(len(own) - 1 for own in times) == sum(totals):
                    break  # the held-out images would follow
    # Only the time that all of them train counts, and not the first step, which warms up.
    first, last = max(own[1] for own in times), min(own[-1] for own in times)
    pairs = [pair for own in times for pair in itertools.pairwise(own)]
    together = [b - a for a, b in pairs if first <= a and b <= last]
    return statistics.median(together or [b - a for a, b in pairs])


class _Workers:
    """The processes, and what they tell."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self._told: queue.Queue[tuple[int, str]] = queue.Queue()

    def listen(self) -> None:
        """Reads what each process tells, in a thread of its own."""
        for number, process in enumerate(self._processes):
            assert process.stdout is not None
            threading.Thread(target=self._read, args=(number, process.stdout), daemon=True).start()

    def _read(self, number: int, stream: TextIO) -> None:
        for line in stream:
            self._told.put((number, line))
        self._told.put((number, ENDED))

    def events(self) -> Iterator[Event]:
        """Yields what the processes tell, see ``heard``."""
        left = len(self._processes)
        while left:
            number, line = self._told.get()
            if line == ENDED:
                left -= 1
                status = self._processes[number].wait()
                if status:
                    raise TrainingError(death(status))
                continue
            yield heard(line)

    def release(self) -> None:
        """Lets processes that hold go on."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def stop(self) -> None:
        """Ends those that still run; what they have not stored begins again at its last finished epoch."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


@contextmanager
def _started(
    run: RunFolder, nets: Sequence[int], jobs: int, device: torch.device, *, hold: bool = False
) -> Iterator[_Workers]:
    threads = max(1, torch.get_num_threads() // jobs)
    command = [sys.executable, "-m", "ensembler.training.stage1_worker", str(run.path.absolute())]
    # What the parent can import, its processes can: a user's own net comes from there.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes: list[subprocess.Popen[str]] = []
    workers = _Workers(processes)
    try:
        for first in range(jobs):
            order = {"device": device.type, "threads": threads, "nets": list(nets[first::jobs]), "hold": hold}
            processes.append(
                subprocess.Popen(  # noqa: S603 (our own module)
                    [*command, json.dumps(order)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    env=environment,
                    pass_fds=() if run.lock is None else (run.lock,),
                )
            )
        workers.listen()
        yield workers
    finally:
        workers.stop()


def death(status: int) -> str:
    """Returns how a process ended that did not say why, from its exit status, and what to do."""
    how = f"was ended by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"failed, status {status}"
    return (
        f"a process that trained stage-1 nets {how}; if memory ran out, --jobs 1 needs the least. "
        "ensembler train --resume goes on at the last finished epoch"
    )
