"""The pictures in a run folder: drawn from the run's own files, and never at the run's cost."""

from __future__ import annotations

import json
import shutil
import stat

import numpy as np
import pytest
from PIL import Image

from ensembler.training.plots import CONFUSION_PICTURE, CURVES_FILE, PLAN_PICTURE, draw
from ensembler.training.runs import CONFUSION_FILE, RunFolder


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A copy of the run that a test may draw into."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def rename(run, labels):
    document = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**document, "labels": labels}))


def test_the_confusion_counts_every_held_out_image_and_is_the_accuracy_through_the_wire(tiny_run):
    run = RunFolder.open(tiny_run)
    counts = np.array(run.read_json(CONFUSION_FILE)["counts"])
    summary = run.read_json("summary.json")
    assert counts.shape == (3, 3)
    assert counts.sum() == summary["test_images"]
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(summary["accuracy_wire"])


def test_the_pictures_are_drawn_for_the_owner_alone(copied):
    assert draw(copied) == [copied / PLAN_PICTURE, copied / CURVES_FILE, copied / CONFUSION_PICTURE]
    for name in (PLAN_PICTURE, CURVES_FILE, CONFUSION_PICTURE):
        with Image.open(copied / name) as picture:
            assert min(picture.size) > 400
        assert stat.S_IMODE((copied / name).stat().st_mode) == 0o600
    assert not list(copied.rglob("*.tmp"))


@pytest.mark.parametrize("defense", ["ensembler", "joint"])
def test_learned_noise_and_nets_behind_one_head_are_drawn_too(copied, defense):
    document = json.loads((copied / "config.json").read_text())
    document["config"] |= {"noise": "learned", "defense": defense}
    (copied / "config.json").write_text(json.dumps(document))
    records = [{"stage": "noise", "epoch": epoch, "loss": 1.0, "train_accuracy": 50.0} for epoch in (1, 2)]
    with (copied / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
    assert len(draw(copied)) == 3
    with Image.open(copied / CURVES_FILE) as picture:
        assert picture.size[0] == 3 * 5 * 150  # a column for each of the two stages, and one for the noise


def test_a_tail_that_learned_after_its_head_has_a_bar_and_curves_of_its_own(copied):
    document = json.loads((copied / "config.json").read_text())
    document["config"] |= {"head_for": "all"}
    (copied / "config.json").write_text(json.dumps(document))
    with (copied / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"stage": "tail", "epoch": 1, "loss": 1.0, "train_accuracy": 50.0}) + "\n")
    assert len(draw(copied)) == 3
    with Image.open(copied / CURVES_FILE) as picture:
        assert picture.size[0] == 3 * 5 * 150


@pytest.mark.parametrize("classes", [2, 100, 130])
def test_any_number_of_classes_and_any_name_is_drawn(copied, classes):
    rename(copied, ["$5 $", "鳥" * 200, *(f"class {i}" for i in range(2, classes))])
    counts = np.eye(classes, dtype=int) * 3
    counts[1] = 0  # a class without a held-out image
    (copied / CONFUSION_FILE).write_text(json.dumps({"counts": counts.tolist()}))
    assert copied / CONFUSION_PICTURE in draw(copied)


def test_the_pictures_do_not_need_the_secret(copied):
    shutil.rmtree(copied / "client")
    assert len(draw(copied)) == 3


def test_a_picture_that_cannot_be_drawn_costs_a_line_in_the_log_and_not_the_others(copied, caplog):
    (copied / CONFUSION_FILE).write_text("{")
    assert draw(copied) == [copied / PLAN_PICTURE, copied / CURVES_FILE]
    assert "confusion.png could not be drawn" in caplog.text
    assert "the run itself is complete" in caplog.text
