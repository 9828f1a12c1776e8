"""Stage-1 nets that train on the machines of a Ray cluster, each as it would in a process of ``together``.

A task gets what its net needs as bytes: the options, the data, where the net stands. It makes a run folder of its own
on its machine and has ``stage1_worker`` train there. What that tells and stores comes back after every epoch, so that
the run can be resumed anywhere. Start reading at ``RayPool``; what runs on the machines is ``train_net``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensembler.protocol.errors import ConfigError, TrainingError
from ensembler.training.config import TrainConfig
from ensembler.training.fit import Reporter, Tensors
from ensembler.training.runs import CONFIG_FILE, METRICS_FILE, RunFolder
from ensembler.training.together import STOP_S, Event, death, follow, heard

# Steps are told in bundles, since each telling is an object in Ray's books.
TELL_S = 0.25
# How often the driver looks up from waiting.
LOOK_S = 1.0
# To bring here what is known to be there: a net of a few hundred MB over a slow line.
FETCH_S = 300.0

Telling = tuple[list[str], dict[str, bytes]]


def train_net(
    order: Mapping[str, Any], data: Mapping[str, Any], files: Mapping[str, bytes], sent_back: Sequence[str]
) -> Iterator[Telling]:
    """Trains one net on this machine.

    Args:
        order: what ``stage1_worker`` is told.
        data: the fields of ``Tensors`` as arrays.
        files: of the run folder, by name: the options, and where the net stands.
        sent_back: names of the files whose contents are sent back whenever the first of them is another one.

    Yields:
        Lines of JSON that the worker told, and files by name.
    """
    with tempfile.TemporaryDirectory(prefix="ensembler-ray-") as name:
        folder = Path(name)
        (folder / "stage1").mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        np.savez(folder / "data.npz", **data)
        words = json.dumps({**order, "data": str(folder / "data.npz")})
        environment = {"OMP_NUM_THREADS": str(order["threads"]), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(  # noqa: S603 (our own module)
            [sys.executable, "-m", "ensembler.training.stage1_worker", name, words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | environment,
        ) as process:
            try:
                yield from _tellings(process, folder, sent_back)
            finally:
                process.kill()
        yield [], _contents(folder, sent_back)
        if process.returncode:
            raise TrainingError(death(process.returncode))


def _tellings(process: subprocess.Popen[str], folder: Path, sent_back: Sequence[str]) -> Iterator[Telling]:
    lines: list[str] = []
    told, stored = time.monotonic(), _changed(folder / sent_back[0])
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        now = _changed(folder / sent_back[0])
        if now != stored or time.monotonic() - told > TELL_S:
            yield lines, (_contents(folder, sent_back) if now != stored else {})
            lines, told, stored = [], time.monotonic(), now
    process.wait()
    yield lines, {}


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_ino  # a stored file is a new one under the old name
    except OSError:
        return None


def _contents(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


class RayPool:
    """Trains stage-1 nets over Ray.

    Args:
        ray: the module, connected to a cluster.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def train_nets(
        self, run: RunFolder, config: TrainConfig, nets: Sequence[int], data: Tensors, steps: int, reporter: Reporter
    ) -> None:
        """Trains ``nets``, each as soon as a machine has CPUs for it, and returns when all are stored.

        Args:
            run: the run folder, locked by the caller.
            config: the options; a net gets the threads that ``jobs`` nets would each have here, and is bit for bit the
                one that would be trained with them here.
            nets: their indices.
            data: on the device that trains.
            steps: of one net from its beginning.
            reporter: told of all steps as one piece of work.

        Raises:
            ConfigError: no machine has that many CPUs; or of a net, as in ``together``.
            TrainingError: a machine was lost. What had come back is kept, and a resumed run goes on with it.
        """
        threads = max(1, torch.get_num_threads() // config.jobs)
        most = max((int(n["Resources"].get("CPU", 0)) for n in self._ray.nodes() if n["Alive"]), default=0)
        if most < threads:
            raise ConfigError(
                f"a net trains on {threads} threads, and no machine of the Ray cluster has more than {most} CPUs to "
                f"give; --jobs {-(-torch.get_num_threads() // max(most, 1))} makes them fewer"
            )
        with self._started(run, nets, data, threads) as tasks:
            follow(self._events(run, tasks), nets, steps, reporter, f"stage 1, {len(nets)} nets over Ray")

    @contextmanager
    def _started(self, run: RunFolder, nets: Sequence[int], data: Tensors, threads: int) -> Iterator[dict[Any, int]]:
        device = data.train_x.device.type
        arrays = {field.name: getattr(data, field.name).cpu().numpy() for field in fields(Tensors)}
        task = self._ray.remote(
            num_cpus=threads,
            num_gpus=int(device == "cuda"),
            num_returns="streaming",
            max_retries=0,  # Ray's would begin anew; --resume goes on at the last epoch
            scheduling_strategy="SPREAD",
        )(train_net)
        there = self._ray.put(arrays)
        tasks = {}
        for index in nets:
            order = {"device": device, "threads": threads, "nets": [index], "hold": False}
            files = _contents(run.path, [CONFIG_FILE, run.stage1_checkpoint(index)])
            own = [record for record in run.read_metrics() if _piece(index).items() <= record.items()]
            files[METRICS_FILE] = "".join(json.dumps(record) + "\n" for record in own).encode()
            sent_back = [run.stage1_checkpoint(index), METRICS_FILE, run.stage1_file(index)]
            tasks[task.remote(order, there, files, sent_back)] = index
        try:
            yield tasks
        finally:
            for running in tasks:
                self._ray.cancel(running)
            if tasks:
                ends = [running.completed() for running in tasks]
                self._ray.wait(ends, num_returns=len(ends), timeout=STOP_S)

    def _events(self, run: RunFolder, tasks: dict[Any, int]) -> Iterator[Event]:
        """Yields what the nets tell, and stores what they send; a finished task leaves ``tasks``."""
        from ray.exceptions import RayError, RayTaskError

        while tasks:
            ready, _ = self._ray.wait(list(tasks), timeout=LOOK_S)
            for task in ready:
                try:
                    lines, files = self._ray.get(next(task), timeout=FETCH_S)
                except StopIteration:
                    del tasks[task]
                    continue
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, TrainingError) else error from error
                except RayError as error:
                    raise TrainingError(
                        f"a machine that trained net {tasks[task] + 1} was lost ({str(error).splitlines()[0]}); "
                        f"ensembler train --resume {run.path} --engine ray goes on at the last finished epoch"
                    ) from error
                if files:
                    self._store(run, tasks[task], files)
                for line in lines:
                    yield heard(line)

    @staticmethod
    def _store(run: RunFolder, index: int, files: Mapping[str, bytes]) -> None:
        checkpoint = run.stage1_checkpoint(index)
        run.replace_metrics(_piece(index), files[METRICS_FILE])
        for name in (run.stage1_file(index), checkpoint):
            if name in files:
                run.write_bytes(name, files[name])
        if checkpoint not in files:
            run.remove(checkpoint)


def _piece(index: int) -> dict[str, int]:
    """Returns what the lines of one net in ``metrics.jsonl`` have in common."""
    return {"stage": 1, "net": index}
