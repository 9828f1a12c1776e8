"""Interrupted runs: wherever training is cut, the resumed run ends in the same bits as one that nobody interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ensembler.protocol.errors import ConfigError, DataError
from ensembler.training import data as data_sets
from ensembler.training import stages
from ensembler.training.checkpoint import data_digest, training_lock
from ensembler.training.runs import RunFolder
from ensembler.training.stages import resume, train

COMMAND = [sys.executable, "-m", "ensembler.cli", "train"]
pytestmark = pytest.mark.usefixtures("one_thread")

N, EPOCHS, STEPS = 2, 2, 3
STAGE1 = tuple(f"stage1/net_{index:02d}.safetensors" for index in range(N))
DEADLINE_S = 120


@pytest.fixture(scope="module")
def settings(configs, tiny_data):
    return configs(
        data=tiny_data,
        num_nets=N,
        num_selected=1,
        epochs_stage1=EPOCHS,
        epochs_stage3=EPOCHS,
        train_limit=16 * STEPS,
        learning_rate=0.01,
        client_seed=5,
    )


@pytest.fixture(scope="module")
def drawn():
    """What training draws from the operating system, drawn once, so that whole runs can be compared."""
    with pytest.MonkeyPatch.context() as patch:

        class System:
            def shuffle(self, order):
                order.reverse()

            def sample(self, positions, count):
                return list(positions)[-count:]

            def randrange(self, _):
                return 0

        patch.setattr(stages.secrets, "SystemRandom", System)
        yield


@pytest.fixture(scope="module")
def whole(settings, drawn, tmp_path_factory):
    """A run that nobody interrupted; its stage 3 draws fresh noise from torch's global generator."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(settings(noise_mode="fresh"), out)
    return out


class Cut(Exception):  # noqa: N818 (not an error of ours: what stands for the kill)
    """Stands for the kill."""


class Cutting:
    """A Reporter that raises at its n-th call."""

    def __init__(self, calls: int | None = None) -> None:
        self.left = calls
        self.labels: list[str] = []

    def _call(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Cut

    def begin(self, label, total):
        self.labels.append(label)
        self._call()

    def step(self, detail):
        self._call()

    def end(self, summary):
        self._call()


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but config.json, which names the run's own options."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != "config.json"
    }


def cut_after(config, out, calls):
    with pytest.raises(Cut):
        train(config, out, reporter=Cutting(calls))


# A piece calls begin, one step for each batch of each epoch, and end.
PIECE = EPOCHS * STEPS + 2
PIECES = N + 1


# --- cut anywhere ---


@pytest.mark.parametrize("calls", range(PIECES * PIECE))
def test_a_run_cut_at_any_step_is_resumed_to_the_same_bits(settings, drawn, whole, tmp_path, calls):
    out = tmp_path / "run"
    cut_after(settings(noise_mode="fresh"), out, calls)
    reporter = Cutting()
    resume(out, reporter=reporter)
    assert contents(out) == contents(whole)
    pieces_before, in_piece = divmod(calls, PIECE)
    epochs_before = max(in_piece - 1, 0) // STEPS
    assert len(reporter.labels) == PIECES - pieces_before
    # The last step of an epoch is followed by its checkpoint only when the next call comes.
    assert ("resumed after epoch" in reporter.labels[0]) == (epochs_before > 0)


def test_a_run_cut_again_and_again_is_resumed_to_the_same_bits(settings, drawn, whole, tmp_path):
    out = tmp_path / "run"
    cut_after(settings(noise_mode="fresh"), out, 2)
    for _ in range(100):
        try:
            resume(out, reporter=Cutting(STEPS + 2))  # enough for one epoch, not for two
        except Cut:
            continue
        break
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("function", ["fix_wire", "stage2", "stage3", "_summary"])
def test_a_run_cut_between_the_stages_is_resumed_to_the_same_bits(
    settings, drawn, whole, tmp_path, monkeypatch, function
):
    out = tmp_path / "run"

    def cut(*_, **__):
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(stages, function, cut)
        with pytest.raises(Cut):
            train(settings(noise_mode="fresh"), out)
    resume(out)
    assert contents(out) == contents(whole)


def test_the_wire_and_the_selector_once_written_are_kept(settings, tmp_path):
    out = tmp_path / "run"
    cut_after(settings(num_nets=4, num_selected=2, client_seed=None), out, 4 * PIECE + 1)
    kept = {name: (out / name).read_bytes() for name in ("wire.json", RunFolder.SECRET_FILE)}
    resume(out)
    assert {name: (out / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"defense": "none"}, 1),
        ({"defense": "single"}, 1),
        ({"defense": "single", "noise": "uniform", "noise_mode": "fresh"}, 1),
        ({"defense": "single", "noise": "learned", "noise_mode": "fresh", "dropout": 0.3}, 2),
        ({"defense": "joint", "dropout": 0.3}, 1),
        ({"noise": "learned"}, N + 2),
        ({"decoder_weight": 1.0, "bottleneck": (4, 4, 2), "noise_mode": "fresh"}, N + 1),
    ],
)
def test_other_defences_are_resumed_too(settings, drawn, tmp_path, changes, pieces):
    config = settings(**changes)
    train(config, tmp_path / "whole")
    for index, calls in enumerate((1 + STEPS + 1, pieces * PIECE - 1)):  # in the first piece, and in the last
        out = tmp_path / f"run{index}"
        cut_after(config, out, calls)
        resume(out)
        assert contents(out) == contents(tmp_path / "whole")


def test_a_client_whose_tail_learns_after_its_head_is_resumed_in_either(settings, drawn, tmp_path):
    config = settings(head_for="all", noise_mode="fresh", num_selected=N)
    train(config, tmp_path / "whole")
    of_tail = config.epochs_of_tail * STEPS + 2
    for calls in range(PIECES * PIECE - 1, PIECES * PIECE + of_tail):  # from the end of the head to that of the tail
        out = tmp_path / f"run{calls}"
        cut_after(config, out, calls)
        resume(out)
        assert contents(out) == contents(tmp_path / "whole")


def test_a_second_client_cut_while_stage_1_is_copied_is_resumed(settings, whole, tmp_path, monkeypatch):
    config, out = settings(), tmp_path / "run"

    def cut(run, source):
        (run.path / STAGE1[0]).write_bytes((source.path / STAGE1[0]).read_bytes())
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "copy_stage1", cut)
        with pytest.raises(Cut):
            train(config, out, stage1_from=whole)
    resume(out)
    for name in (*STAGE1, "wire.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_no_epoch_is_in_the_metrics_twice_and_a_torn_line_does_no_harm(settings, drawn, whole, tmp_path):
    out = tmp_path / "run"
    cut_after(settings(noise_mode="fresh"), out, 1 + STEPS + 1)
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": 1, "net": 0, "epoch": 2, "loss": 0.1}\n{"stage": 1, "ne')
    resume(out)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [(line["stage"], line.get("net"), line["epoch"]) for line in lines if "epoch" in line]
    assert len(set(epochs)) == len(epochs) == PIECES * EPOCHS


# --- what is left in the folder ---


def test_a_finished_run_holds_no_checkpoint_and_an_unfinished_one_only_its_owners(settings, whole, tmp_path):
    assert not list(whole.rglob("*checkpoint*"))
    out = tmp_path / "run"
    cut_after(settings(), out, N * PIECE + 1 + STEPS)
    (checkpoint,) = out.rglob("*checkpoint*")
    assert checkpoint == out / RunFolder.CLIENT_CHECKPOINT
    assert stat.S_IMODE(checkpoint.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["empty", "cut short", "text", "one bit", "another net", "no position"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_piece_starts_anew(settings, drawn, whole, tmp_path, damage):
    out = tmp_path / "run"
    cut_after(settings(noise_mode="fresh"), out, N * PIECE + 1 + STEPS + 1)
    path = out / RunFolder.CLIENT_CHECKPOINT
    content = path.read_bytes()
    if damage == "another net":
        other = tmp_path / "other"
        cut_after(settings(num_nets=3, num_selected=3), other, 3 * PIECE + 1 + STEPS + 1)
        shutil.copy(other / RunFolder.CLIENT_CHECKPOINT, path)
    elif damage == "no position":
        save_file(load_file(path), path)
    else:
        flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
        damaged = {"empty": b"", "cut short": content[: len(content) // 2], "text": b"x" * 100, "one bit": flipped}
        path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=r"client\.checkpoint\.safetensors is no intact checkpoint.*remove it, then"):
        resume(out)
    path.unlink()
    resume(out)
    assert contents(out) == contents(whole)


def test_a_stage_1_net_that_went_missing_after_the_wire_was_fixed_is_named(settings, tmp_path):
    out = tmp_path / "run"
    cut_after(settings(), out, N * PIECE + 1)
    (out / STAGE1[1]).unlink()
    with pytest.raises(DataError, match=r"net_01\.safetensors is missing, and wire\.json was made with it"):
        resume(out)


# --- refusals ---


def test_a_finished_run_says_so(whole):
    with pytest.raises(ConfigError, match="training is finished; there is nothing to resume"):
        resume(whole)


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        resume(tmp_path)


def test_a_run_of_a_version_without_checkpoints_is_refused(settings, tmp_path):
    out = tmp_path / "run"
    cut_after(settings(), out, 3)
    document = json.loads((out / "config.json").read_text())
    del document["data_digest"], document["stage1_from"]
    (out / "config.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="was begun by a version that could not resume"):
        resume(out)


def test_an_unfinished_runs_refusal_names_the_command_that_finishes_it(settings, tmp_path):
    out = tmp_path / "run"
    cut_after(settings(), out, 3)
    with pytest.raises(DataError, match=re.escape(f"ensembler train --resume {out} continues it")):
        RunFolder.open(out)


def test_a_run_that_another_process_trains_is_refused(settings, tmp_path):
    out = tmp_path / "run"
    cut_after(settings(), out, 3)
    with training_lock(RunFolder(out)), pytest.raises(ConfigError, match="another process is training this run"):
        resume(out)
    resume(out)


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_data_than_the_run_began_with_is_refused(settings, tiny_data, tmp_path, part):
    names = [Path(name) for name in tiny_data.removeprefix("npz:").split(",")]
    mine = [shutil.copy(name, tmp_path / name.name) for name in names]
    out = tmp_path / "run"
    cut_after(settings(data=f"npz:{mine[0]},{mine[1]}"), out, 3)
    with np.load(tmp_path / f"{part}.npz") as stored:
        changed = {name: stored[name] for name in stored}
    changed["x"][-1, 0, 0, 0] ^= 1
    np.savez(tmp_path / f"{part}.npz", **changed)
    with pytest.raises(DataError, match="now holds other images or labels than the run began with"):
        resume(out)


def test_the_digest_of_the_data_covers_images_labels_and_names(tiny_data):
    data = data_sets.load(tiny_data)
    others = [
        dataclasses.replace(data, train_y=data.train_y[::-1]),
        dataclasses.replace(data, test_x=data.test_x[::-1]),
        dataclasses.replace(data, labels=("a", "b", "c")),
        dataclasses.replace(data, train_x=data.train_x.transpose(0, 1, 3, 2)),
    ]
    assert data_digest(data_sets.load(tiny_data)) == data_digest(data)
    assert len({data_digest(other) for other in (data, *others)}) == 5


# --- real processes ---


def arguments(tiny_data, out, epochs_stage1, epochs_stage3):
    return [
        *("--data", tiny_data, "--out", out, "--arch", "resnet10_slim", "-N", N, "-P", 1, "--batch-size", 16),
        *("--epochs-stage1", epochs_stage1, "--epochs-stage3", epochs_stage3, "--learning-rate", 0.01),
        *("--train-limit", 16 * STEPS, "--device", "cpu"),
    ]


def command(*given):
    return [*COMMAND, *map(str, given)]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Returns once the file is there."""
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{path} did not come: {process.communicate()}")
        time.sleep(0.002)


@pytest.mark.slow
def test_a_process_killed_in_stage_1_is_resumed_to_the_same_nets(tiny_data, settings, tmp_path):
    out, epochs = tmp_path / "run", 25
    given = arguments(tiny_data, out, epochs, 1)
    with subprocess.Popen(command(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(out / RunFolder(out).stage1_checkpoint(1), process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)
    assert (out / STAGE1[0]).exists()
    assert not (out / STAGE1[1]).exists()
    done = subprocess.run(command("--resume", out), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "net 2 of 2, resumed after epoch" in done.stdout
    assert "net 1 of 2" not in done.stdout
    train(settings(epochs_stage1=epochs, epochs_stage3=1), tmp_path / "whole")
    for name in STAGE1:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_copy_taken_in_stage_3_ends_in_the_same_client(tiny_data, tmp_path):
    out, copy = tmp_path / "run", tmp_path / "copy"
    given = arguments(tiny_data, out, 1, 25)
    with subprocess.Popen(command(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(out / RunFolder.CLIENT_CHECKPOINT, process)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        shutil.copytree(out, copy)
        refused = subprocess.run(command("--resume", out), capture_output=True, text=True, timeout=DEADLINE_S)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, said
    assert refused.returncode == 2
    assert "another process is training this run" in refused.stderr
    assert not (copy / RunFolder.CLIENT_FILE).exists()
    done = subprocess.run(command("--resume", copy), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "the client, resumed after epoch" in done.stdout
    assert contents(copy) == contents(out)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_options_beside_resume_are_refused(tiny_data, tmp_path):
    out = tmp_path / "run"
    given = arguments(tiny_data, out, 60, 1)
    with subprocess.Popen(command(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(out / RunFolder(out).stage1_checkpoint(0), process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert f"ensembler train --resume {out}" in said
    refused = subprocess.run(
        command("--resume", out, "--epochs-stage1", 30, "--no-stem-pool"), capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "--no-stem-pool, --epochs-stage1: not with --resume" in refused.stderr
    bare = subprocess.run(command("--data", tiny_data), capture_output=True, text=True)
    assert bare.returncode == 2
    assert "--resume RUN" in bare.stderr
