"""Many devices of one server: no secret in common, nothing of the server changed, a renewal that loses nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import open_export

from ensembler.cli import main
from ensembler.export.pipeline import export
from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training import personal
from ensembler.training.personal import personalize
from ensembler.training.runs import RunFolder
from ensembler.training.stages import load_client, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tiny_run, tmp_path):
    """A copy of the tiny run."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def head_of(folder):
    """The weights of a client's first convolutions, as numbers."""
    return np.concatenate(
        [p.detach().numpy().ravel() for p in load_client(RunFolder.open(folder)).head.parameters() if p.dim() == 4]
    )


class Cut(Exception):  # noqa: N818 (what stands for the kill)
    """Where training was stopped."""


@pytest.fixture
def cut(monkeypatch):
    """``cut()`` lets the next client's training end before its first step, ``cut(False)`` no more."""

    def apply(active=True):
        def stopped(*_args, **_options):
            raise Cut

        if active:
            monkeypatch.setattr("ensembler.training.stages.stage3", stopped)
        else:
            monkeypatch.undo()

    return apply


def test_devices_share_the_nets_and_the_wire_and_no_secret(source):
    folders = [source, *(personalize(source, name, epochs=1)[0] for name in ("kitchen", "hall"))]
    assert folders[1:] == [source / "devices" / "kitchen", source / "devices" / "hall"]
    runs = [RunFolder.open(folder) for folder in folders]
    for run in runs[1:]:
        assert run.read_wire() == runs[0].read_wire()
        for index in range(run.config.trained_nets):
            # One file of several names: a server may have many devices.
            assert (run.path / run.stage1_file(index)).samefile(source / run.stage1_file(index))
    assert len({run.read_secret().seed for run in runs}) == 3
    heads = [head_of(folder) for folder in folders]
    tails = [load_client(run).tail.state_dict() for run in runs]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(heads[i], heads[j])[0, 1]) < 0.5
        assert any(not np.array_equal(tails[i][name], tails[j][name]) for name in tails[i])


def test_a_personal_client_is_exported_for_the_server_that_is_there(source, tiny, tmp_path):
    folder, summary = personalize(source, "kitchen", epochs=1)
    assert summary["accuracy_wire"] > 0
    export(folder, tmp_path / "out", open_export(server_bundles=(tiny.server,)))
    assert (tmp_path / "out" / "client" / "manifest.json").is_file()
    assert not (tmp_path / "out" / "server").exists()


def test_a_client_is_renewed_when_that_is_asked_for_alone(source):
    folder, _ = personalize(source, "kitchen", epochs=1)
    before = head_of(folder)
    with pytest.raises(ConfigError, match="has a client; --rotate renews it"):
        personalize(source, "kitchen", epochs=1)
    assert np.array_equal(head_of(folder), before)
    assert personalize(source, "kitchen", rotate=True, epochs=1)[0] == folder
    assert not np.array_equal(head_of(folder), before)
    assert [each.name for each in folder.parent.iterdir()] == ["kitchen"]


def test_the_old_client_stays_until_the_new_one_is_finished(source, cut):
    folder, _ = personalize(source, "kitchen", epochs=1)
    before = head_of(folder)
    cut()
    with pytest.raises(Cut):
        personalize(source, "kitchen", rotate=True, epochs=1)
    assert np.array_equal(head_of(folder), before)
    cut(False)
    seed = RunFolder(folder.with_name("kitchen.new")).read_secret().seed
    personalize(source, "kitchen", rotate=True)
    assert RunFolder.open(folder).read_secret().seed == seed  # the one that was begun
    assert [each.name for each in folder.parent.iterdir()] == ["kitchen"]


@pytest.mark.parametrize(
    "moment", ["before the old one is moved", "before the new one is moved", "before the old one is gone"]
)
def test_a_renewal_that_was_killed_between_two_renames_is_finished_by_the_next(source, moment):
    folder, _ = personalize(source, "kitchen", epochs=1)
    new, old = folder.with_name("kitchen.new"), folder.with_name("kitchen.old")
    train(RunFolder.open(folder).config, new, stage1_from=source)
    wanted = head_of(new)
    if moment != "before the old one is moved":
        folder.rename(old)
    if moment == "before the old one is gone":
        new.rename(folder)
    with pytest.raises(ConfigError, match="has a client"):
        personalize(source, "kitchen", epochs=1)
    assert np.array_equal(head_of(folder), wanted)
    assert [each.name for each in folder.parent.iterdir()] == ["kitchen"]


def test_an_interrupted_client_goes_on_and_takes_no_other_options(source, cut):
    cut()
    with pytest.raises(Cut):
        personalize(source, "kitchen", epochs=1)
    cut(False)
    with pytest.raises(ConfigError, match=r"--epochs 2: .* was begun with --epochs 1; leave it out"):
        personalize(source, "kitchen", epochs=2)
    with pytest.raises(ConfigError, match=r"--teacher .*: .* was begun without; leave it out"):
        personalize(source, "kitchen", epochs=1, teacher=source)
    folder, _ = personalize(source, "kitchen", epochs=1)  # the same command goes on
    assert RunFolder.open(folder).config.epochs_stage3 == 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a.new", "-a", "a" * 65, "kü che", "a\n"])
def test_a_name_that_is_no_plain_folder_is_refused(source, name):
    with pytest.raises(ConfigError, match="--device"):
        personalize(source, name)
    assert not (source / personal.DEVICES).exists()


def test_what_cannot_be_personalised_is_refused(source, tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        personalize(tmp_path / "nothing", "kitchen")
    with pytest.raises(ConfigError, match="no client to renew"):
        personalize(source, "kitchen", rotate=True)
    document = json.loads((source / "config.json").read_text())
    document["config"]["defense"] = "single"
    (source / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="--defense single"):
        personalize(source, "kitchen")


def test_a_teacher_that_moved_is_said_where_it_is_now(source, tmp_path):
    document = json.loads((source / "config.json").read_text())
    document["config"]["teacher"] = str(tmp_path / "gone")
    (source / "config.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"gone, the run's teacher, is not there; --teacher says where it is now"):
        personalize(source, "kitchen")
    with pytest.raises(DataError, match=r"--teacher .*nowhere: no folder is there; give the run that teaches"):
        personalize(source, "kitchen", teacher=tmp_path / "nowhere")
    plain = replace(RunFolder.open(source).config, defense="none", teacher=None, client_seed=None)
    train(plain, tmp_path / "here")
    folder, _ = personalize(source, "kitchen", teacher=tmp_path / "here")
    assert RunFolder.open(folder).config.teacher == str(tmp_path / "here")


def test_the_verb_says_what_comes_next(source, capsys):
    assert main(["personalize", str(source), "--device", "kitchen", "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert f"next: ensembler-export {source / 'devices' / 'kitchen'} " in said
    assert "--server-bundle" in said
    assert main(["personalize", str(source), "--device", "kitchen"]) == 2
    assert "--rotate" in capsys.readouterr().err
