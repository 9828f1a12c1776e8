"""Stage-1 nets that train on two nodes: the same nets as here, and a run that goes on wherever it was cut."""

from __future__ import annotations

import pytest
import torch

from ensembler.cli import main
from ensembler.cloud_runtime.ray_cluster import connected
from ensembler.protocol.errors import ConfigError, TrainingError
from ensembler.training import data as data_sets
from ensembler.training.fit import Silent, Tensors
from ensembler.training.ray_pool import RayPool
from ensembler.training.runs import RunFolder
from ensembler.training.stage1 import stage1

pytest.importorskip("ray", reason="make test-ray runs it")
pytestmark = pytest.mark.usefixtures("one_thread")

N, EPOCHS, STEPS = 3, 3, 4


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
    )


class Listening(Silent):
    """A Reporter that counts, and does something at a step."""

    def __init__(self, at_step=0, do=lambda: None):
        self.total = self.steps = 0
        self.resumed = False
        self._at_step, self._do = at_step, do

    def begin(self, label, total):
        self.total = total

    def step(self, detail):
        self.steps += 1
        self.resumed |= "resumed" in detail
        if self.steps == self._at_step:
            self._do()


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def pool(nodes):
    with connected(nodes.address) as ray:
        yield RayPool(ray)


@pytest.fixture
def start(settings, tmp_path):
    """Returns a function that does stage 1 of the run, or goes on with it."""

    def run_stage1(pool, reporter=None, **changes):
        config = settings(**changes)
        data = data_sets.load(config.data)
        arch = config.arch_spec(data.image_size, len(data.labels))
        path = tmp_path / "run"
        run = RunFolder(path) if path.exists() else RunFolder.create(path, config, arch, data.labels)
        tensors = Tensors.of(data, torch.device("cpu"), config.train_limit)
        nets = stage1(run, config, arch, tensors, reporter or Silent(), pool)
        assert len(nets) == N
        assert not list(run.path.rglob("*checkpoint*"))
        return run

    return run_stage1


def result(run):
    """The nets' files, and their lines of metrics in the order of the nets."""
    files = {index: (run.path / run.stage1_file(index)).read_bytes() for index in range(N)}
    return files, sorted(run.read_metrics(), key=lambda record: (record["net"], record.get("epoch", EPOCHS + 1)))


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The result of a run that was trained here."""
    config = settings()
    data = data_sets.load(config.data)
    arch = config.arch_spec(data.image_size, len(data.labels))
    run = RunFolder.create(tmp_path_factory.mktemp("alone") / "run", config, arch, data.labels)
    stage1(run, config, arch, Tensors.of(data, torch.device("cpu"), config.train_limit), Silent())
    return result(run)


def test_nets_that_train_over_ray_are_bit_for_bit_those_that_train_here(start, alone, pool):
    reporter = Listening()
    assert result(start(pool, reporter)) == alone
    assert (reporter.steps, reporter.total) == (N * EPOCHS * STEPS,) * 2


@pytest.mark.parametrize("here", [False, True], ids=["over Ray", "here"])
def test_an_interrupted_run_goes_on_at_its_last_epoch(start, alone, pool, here):
    with pytest.raises(KeyboardInterrupt):
        start(pool, Listening(STEPS * 4, interrupt))
    reporter = Listening()
    assert result(start(None if here else pool, reporter)) == alone


def test_a_machine_that_is_killed_is_told_with_the_cure_and_nothing_that_came_back_is_lost(
    start, alone, nodes, pool, tmp_path
):
    kept = []

    def kill():
        kept.extend((tmp_path / "run" / "stage1").glob("net_*"))
        nodes.kill_other()

    with pytest.raises(TrainingError, match=r"was lost .*--resume .* --engine ray"):
        start(pool, Listening(STEPS * 4, kill), epochs_stage1=EPOCHS)
    assert kept
    assert result(start(pool)) == alone


def test_an_error_of_one_net_is_the_callers(start, pool):
    with pytest.raises(ConfigError, match="the loss is no longer finite; lower --learning-rate"):
        start(pool, learning_rate=1e30)


def test_threads_that_no_machine_has_are_refused_with_the_number_of_jobs_that_helps(start, pool):
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConfigError, match=r"trains on 2 threads.*more than 1 CPUs.*--jobs 2"):
            start(pool)
    finally:
        torch.set_num_threads(1)


def test_the_command_line_trains_over_ray(nodes, tiny_data, tmp_path):
    given = [
        *("--data", tiny_data, "--out", tmp_path / "run", "--arch", "resnet10_slim", "-N", 2, "-P", 1),
        *("--epochs", 1, "--batch-size", 16, "--train-limit", 64, "--learning-rate", 0.01, "--device", "cpu"),
        *("--engine", "ray", "--ray-address", nodes.address),
    ]
    assert main(["train", *map(str, given)]) == 0
    assert RunFolder.open(tmp_path / "run").config.num_nets == 2
