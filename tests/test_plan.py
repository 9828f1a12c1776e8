"""The plan of a run: what ``ensembler train --dry-run`` prints, and that it leaves nothing."""

from __future__ import annotations

import json

import pytest

from ensembler.cli import main
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training.plan import duration, make_plan
from ensembler.training.stages import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(configs, tiny_data):
    return configs(
        data=tiny_data,
        num_nets=3,
        num_selected=2,
        epochs_stage1=2,
        epochs_stage3=4,
    )


def test_the_plan_counts_what_the_run_will_do(settings):
    plan = make_plan(settings(train_limit=40))
    first, third = plan.stages["stage1"], plan.stages["stage3"]
    assert (plan.train_images, plan.test_images, plan.image_size, plan.num_classes) == (40, 96, (16, 16), 3)
    assert (first.pieces, first.epochs, first.steps_per_epoch) == (3, 2, 3)
    assert (third.pieces, third.epochs, third.steps_per_epoch) == (1, 4, 3)
    assert first.trained_parameters == sum(plan.parameters.values())
    assert third.trained_parameters == plan.parameters["head"] + 2 * 128 * 3 + 3
    assert plan.time_s == pytest.approx(first.time_s + third.time_s)
    assert plan.time_s > 0
    assert plan.peak_memory_mib >= plan.peak_memory_measured_mib > 0


def test_the_planned_disk_holds_the_run(settings, tmp_path):
    plan = make_plan(settings())
    train(settings(epochs_stage1=1, epochs_stage3=1), tmp_path / "run")
    used = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors")) / 2**20
    assert used <= plan.disk_mib <= 3 * used


def test_what_is_not_trained_is_not_planned(settings, tmp_path):
    assert make_plan(settings(defense="none")).stages.keys() == {"stage1"}
    train(settings(epochs_stage1=1, epochs_stage3=1), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()  # its client may still be in training
    plan = make_plan(settings(), stage1_from=tmp_path / "run")
    assert plan.stages.keys() == {"stage3"}
    assert "stage 1   not trained" in plan.text()


def test_what_training_would_refuse_is_not_planned(settings, tmp_path):
    train(settings(epochs_stage1=1, epochs_stage3=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="give the same --arch"):
        make_plan(settings(num_nets=4), stage1_from=tmp_path / "run")
    (tmp_path / "run" / "wire.json").unlink()
    with pytest.raises(DataError, match="stage 1 was not finished"):
        make_plan(settings(), stage1_from=tmp_path / "run")


def test_a_tail_that_learns_after_its_head_is_planned_beside_it(settings):
    plan = make_plan(settings(head_for="all"))
    tail = plan.stages["tail"]
    assert (tail.trained_parameters, tail.epochs, tail.steps_per_epoch) == (2 * 128 * 3 + 3, 1, 12)
    assert plan.time_s == pytest.approx(sum(stage.time_s for stage in plan.stages.values()))
    assert "tail      after its head: 1 epochs of 12 steps" in plan.text()


def test_nets_behind_one_head_are_planned_as_one_piece(settings):
    plan = make_plan(settings(defense="joint"))
    stage = plan.stages["stage1"]
    assert (plan.num_nets, plan.num_selected, stage.pieces) == (3, 3, 1)
    assert stage.trained_parameters == sum(plan.parameters.values()) + 2 * (
        plan.parameters["body"] + plan.parameters["tail"]
    )
    assert plan.stages.keys() == {"stage1"}
    assert "stage 1   3 nets, together, each 2 epochs" in plan.text()


@pytest.mark.parametrize(("defense", "mode", "tensors"), [("ensembler", "fixed", 1), ("single", "fresh", 8)])
def test_learning_noise_is_planned_beside_the_net(settings, defense, mode, tensors):
    plan = make_plan(settings(defense=defense, noise="learned", noise_mode=mode))
    noise = plan.stages["noise"]
    assert (noise.trained_parameters, noise.epochs, noise.steps_per_epoch) == (tensors * 16 * 8 * 8, 4, 12)
    assert plan.time_s == pytest.approx(sum(stage.time_s for stage in plan.stages.values()))
    assert f"noise     {noise.trained_parameters:,} values, learned with the net frozen" in plan.text()


def test_the_plan_says_what_nets_that_train_together_would_take(settings):
    plan = make_plan(settings(jobs=2))
    together, alone = plan.stages["stage1"], plan.stage1_other
    assert (together.jobs, alone.jobs) == (2, 1)
    assert together.step_ms > 0
    assert "3 nets, 2 at a time" in plan.text()
    assert "--jobs 1 is" in plan.text()
    assert plan.peak_memory_mib > 3 * plan.peak_memory_measured_mib
    # This process has one thread to share, and a baseline one net.
    assert make_plan(settings()).stage1_other is None
    assert make_plan(settings(jobs=2, defense="single")).stage1_other is None


def test_the_plan_of_a_single_step_measures_nets_that_train_together_too(settings):
    assert make_plan(settings(jobs=3, train_limit=16)).stages["stage1"].step_ms > 0


def test_a_plan_of_the_impossible_is_refused_as_the_run_would_be(settings):
    with pytest.raises(ConfigError, match="unknown architecture"):
        make_plan(settings(arch="resnet99"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (36_059, "10 h 1 min")]
)
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = ["train", "--data", tiny_data, "--arch", "resnet10_slim", "-N", "2", "-P", "1", "--dry-run"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for word in ("stage 1   2 nets", "stage 2   a secret 1 of 2", "stage 3   1 client", "time", "memory", "disk"):
        assert word in printed
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages"]["stage1"]["epochs"] == 30
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_beside_resume_is_refused(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path), "--dry-run"]) == 2
    assert "--dry-run: not with --resume" in capsys.readouterr().err
