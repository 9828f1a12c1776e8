"""Stage-1 nets that train at once in processes of their own: the same nets, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensembler.protocol.errors import ConfigError, DataError, TrainingError
from ensembler.training import data as data_sets
from ensembler.training import together
from ensembler.training.checkpoint import data_digest
from ensembler.training.fit import Silent, Tensors
from ensembler.training.runs import RunFolder
from ensembler.training.stage1 import stage1

pytestmark = pytest.mark.usefixtures("one_thread")

N, EPOCHS, STEPS = 3, 3, 4
EPOCHS_KILLED = 12
DEADLINE_S = 120
NAMES = [f"stage1/net_{index:02d}.safetensors" for index in range(N)]


@pytest.fixture(scope="module")
def settings(configs, tiny_data):
    return configs(
        data=tiny_data,
        num_nets=N,
        num_selected=1,
        epochs_stage1=EPOCHS,
        epochs_stage3=1,
        train_limit=16 * STEPS,
        learning_rate=0.01,
        jobs=2,
    )


class Listening(Silent):
    """A Reporter that counts, and does something at a step."""

    def __init__(self, at_step=0, do=lambda: None):
        self.total, self.steps, self.label, self.summary = 0, 0, "", ""
        self._at_step, self._do = at_step, do

    def begin(self, label, total):
        self.label, self.total = label, total

    def step(self, detail):
        self.steps += 1
        if self.steps == self._at_step:
            self._do()

    def end(self, summary):
        self.summary = summary


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # of a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.fixture(autouse=True)
def _no_process_is_left():
    before = children()
    yield
    assert children() <= before


@pytest.fixture
def start(settings, tmp_path):
    """Returns a function that does stage 1 of a run in a new folder, or goes on with it."""

    def run_stage1(reporter=None, name="run", **changes):
        config = settings(**changes)
        data = data_sets.load(config.data)
        arch = config.arch_spec(data.image_size, len(data.labels))
        path = tmp_path / name
        run = RunFolder(path) if path.exists() else RunFolder.create(path, config, arch, data.labels)
        tensors = Tensors.of(data, torch.device("cpu"), config.train_limit)
        return run, stage1(run, config, arch, tensors, reporter or Silent())

    return run_stage1


def files(run: RunFolder) -> dict[str, bytes]:
    return {name: (run.path / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The files of nets that were trained one after the other, and their lines of metrics."""
    config = settings(jobs=1)
    data = data_sets.load(config.data)
    arch = config.arch_spec(data.image_size, len(data.labels))
    run = RunFolder.create(tmp_path_factory.mktemp("alone") / "run", config, arch, data.labels)
    stage1(run, config, arch, Tensors.of(data, torch.device("cpu"), config.train_limit), Silent())
    return files(run), run.read_metrics()


def in_order(metrics):
    return sorted(metrics, key=lambda record: (record["net"], record.get("epoch", EPOCHS + 1)))


@pytest.mark.parametrize("jobs", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_nets_that_train_together_are_bit_for_bit_those_that_train_one_after_the_other(start, alone, jobs):
    reporter = Listening()
    run, nets = start(reporter, jobs=jobs)
    assert files(run) == alone[0]
    assert in_order(run.read_metrics()) == alone[1]
    assert len(nets) == N
    assert not any(parameter.requires_grad for item in nets for parameter in item.net.parameters())
    assert (reporter.steps, reporter.total) == (N * EPOCHS * STEPS,) * 2
    assert reporter.label == f"stage 1, 3 nets, {min(jobs, N)} at a time"
    assert reporter.summary.count("train accuracy") == N
    assert not list(run.path.rglob("*checkpoint*"))


@pytest.mark.slow
def test_they_are_stopped_with_their_parent_and_go_on_at_the_last_epoch(start, alone):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(Listening(STEPS * 3, interrupt))
    reporter = Listening()
    run, _ = start(reporter)
    assert files(run) == alone[0]
    assert in_order(run.read_metrics()) == alone[1]
    assert reporter.steps == reporter.total


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_with_the_cure(start, alone):
    before = children()

    def kill():
        os.kill(min(children() - before), signal.SIGKILL)

    with pytest.raises(TrainingError, match=r"ended by signal 9 \(Killed\).*--jobs 1.*--resume"):
        start(Listening(2, kill))
    run, _ = start()
    assert files(run) == alone[0]


def test_an_error_of_one_process_ends_all_and_is_the_callers(start):
    with pytest.raises(ConfigError, match="the loss is no longer finite; lower --learning-rate"):
        start(learning_rate=1e30)


def test_data_that_changed_meanwhile_is_refused(settings, tiny_data, tmp_path):
    config, data = settings(), data_sets.load(tiny_data)
    arch = config.arch_spec(data.image_size, len(data.labels))
    other = data_digest(replace(data, labels=("x", *data.labels[1:])))
    run = RunFolder.create(tmp_path / "run", config, arch, data.labels, data_digest=other)
    with pytest.raises(DataError, match="was changed while the run was training"):
        together.train_nets(run, config, range(N), torch.device("cpu"), EPOCHS * STEPS, Silent())


def test_no_jobs_are_refused(settings):
    with pytest.raises(ConfigError, match="jobs = 0: at least one"):
        settings(jobs=0)


@pytest.mark.slow
def test_a_killed_parent_takes_its_processes_along_and_resume_goes_on(tiny_data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ensembler.cli", "train"]
    given = [
        *("--data", tiny_data, "--out", out, "--arch", "resnet10_slim", "-N", 2, "-P", 1, "--batch-size", 16),
        *("--epochs-stage1", EPOCHS_KILLED, "--epochs-stage3", 1, "--learning-rate", 0.01),
        *("--jobs", 2, "--device", "cpu"),
    ]
    checkpoints = [out / RunFolder(out).stage1_checkpoint(index) for index in range(2)]
    deadline = time.monotonic() + DEADLINE_S
    with subprocess.Popen([*command, *map(str, given)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not all(path.exists() for path in checkpoints):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    while True:  # the run is locked until the last process has noticed
        done = subprocess.run([*command, "--resume", str(out), "--jobs", "2"], capture_output=True, text=True)
        if "another process is training this run" not in done.stderr:
            break
        assert time.monotonic() < deadline
    assert done.returncode == 0, done.stderr
    assert "stage 1, 2 nets, 2 at a time" in done.stdout
    epochs = [line["epoch"] for line in RunFolder(out).read_metrics() if "epoch" in line]
    assert sorted(epochs) == sorted([*range(1, EPOCHS_KILLED + 1)] * 2 + [1])
