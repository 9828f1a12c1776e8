"""What the benchmarks take as done: a run, an export and a report of exactly what they would make now."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ensembler.cli.train import add_arguments, config_of
from ensembler.privacy.audit import audit
from ensembler.training.runs import RunFolder

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import frontier
import product
import results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def commands(monkeypatch):
    """What the command line would have been told; nothing of it is done."""
    told = []
    monkeypatch.setattr(product, "checked", lambda *arguments: told.append(arguments))
    return told


# --- runs ---


@pytest.fixture
def strong(tiny_data):
    return ("--data", tiny_data, "--arch", "resnet10_slim", "--preset", "strong", "-N", "3", "-P", "2")


@pytest.fixture
def begun(tmp_path):
    """Returns a function that makes the folder of a run which was stopped at once."""

    def make(arguments, *, stage1_from=None, **changes):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        config = dataclasses.replace(config_of(parser.parse_args(arguments)), **changes)
        arch = config.arch_spec((16, 16), 3)
        facts = {"data_digest": "0" * 64, "stage1_from": stage1_from}
        return RunFolder.create(tmp_path / "run", config, arch, ("a", "b", "c"), **facts)

    return make


def finish(run):
    run.write_json("summary.json", {})


def test_a_run_that_is_not_there_is_trained(strong, commands, tmp_path):
    assert product.trained(tmp_path / "run", *strong) == tmp_path / "run"
    assert commands == [("train", *strong, "--out", str(tmp_path / "run"))]


def test_a_run_that_was_stopped_goes_on(begun, strong, commands):
    run = begun(strong)
    assert product.trained(run.path, *strong) == run.path
    assert commands == [("train", "--resume", str(run.path))]


def test_a_finished_run_is_taken_on_whatever_machine_it_was_made(begun, strong, commands):
    run = begun(strong, device="cuda", jobs=2, precision="bfloat16", client_seed=5)
    finish(run)
    product.trained(run.path, *strong)
    assert commands == []


def test_a_teacher_is_the_same_by_its_path_from_here(begun, strong, commands, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = begun(strong, teacher=str(tmp_path / "plain"))
    finish(run)
    product.trained(run.path, *strong, "--teacher", "plain")
    assert commands == []
    with pytest.raises(SystemExit, match="teacher"):
        product.trained(run.path, *strong, "--teacher", "other")


def test_a_run_on_the_nets_of_another_is_not_taken(begun, strong, commands, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    finish(begun(strong, stage1_from=tmp_path / "first"))
    product.trained(tmp_path / "run", *strong, "--stage1", "first")
    assert commands == []
    for others in ((), ("--stage1", "second")):
        with pytest.raises(SystemExit, match=r"with stage 1 of .*first and not of"):
            product.trained(tmp_path / "run", *strong, *others)


@pytest.mark.parametrize(
    "changes",
    [
        {"information_weight": 0.05},  # of a preset as it was
        {"bottleneck": None, "encoder": ()},
        {"epochs_stage3": 5},  # a default
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_a_run_of_other_options_is_not_taken_nor_gone_on_with(begun, strong, commands, changes, finished):
    run = begun(strong, **changes)
    if finished:
        finish(run)
    with pytest.raises(SystemExit, match=f"{next(iter(changes))} .* and not .*delete it"):
        product.trained(run.path, *strong)
    assert commands == []


def test_the_secret_seed_is_in_no_message(begun, strong):
    run = begun(strong, client_seed=987654321, seed=1)
    with pytest.raises(SystemExit) as caught:
        product.trained(run.path, *strong)
    assert "seed 1 and not 0" in str(caught.value)
    assert "987654321" not in str(caught.value)


# --- exports ---


@pytest.fixture
def whole(tmp_path):
    """A finished run and its export with a report beside it: their folders."""
    run, out = tmp_path / "run", tmp_path / "out"
    for path in (run / "summary.json", out / "client" / "manifest.json", out / "audit.parts" / "oracle-0.npz"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return run, out


def test_an_export_that_is_whole_is_not_made_again_and_what_lies_beside_it_stays(whole, commands):
    run, out = whole
    assert product.exported_once(run, out, "demo") == out
    assert commands == []
    assert (out / "audit.parts" / "oracle-0.npz").is_file()


def test_an_export_that_was_killed_is_made_anew(whole, commands):
    run, out = whole
    (out / "client").rename(out / ".partial-1")
    product.exported_once(run, out, "demo", "--plaintext")
    assert commands == [("export", str(run), "--out", str(out), "--data", "demo", "--plaintext")]
    assert not out.exists()


def test_an_export_of_the_run_that_was_there_before_is_made_anew(whole, commands):
    run, out = whole
    later = (out / "client" / "manifest.json").stat().st_mtime + 60
    os.utime(run / "summary.json", (later, later))
    product.exported_once(run, out, "demo")
    assert [command[0] for command in commands] == ["export"]


# --- reports ---

ASKED = {"budget": "quick", "attacks": ("known-pairs-10", "other-device"), "seeds": 1}


@pytest.fixture
def report(tiny, audit_images, tiny_budget, one_thread, tmp_path):
    """Returns a function that audits a client in a moment, and gives the JSON's path."""

    def make(client=tiny.client, **options):
        audit(tiny.run, client, tmp_path / "report.html", data=audit_images, **(ASKED | options))
        return tmp_path / "report.json"

    return make


def test_a_report_is_taken_for_what_was_asked_alone(report, tiny, tmp_path):
    made = report()
    assert {each["name"] for each in json.loads(made.read_text())["not_run"]} >= {"other-device", "mla"}
    for same in ({}, {"attacks": ()}, {"seeds": None}, {"coalition": None}):
        assert product.is_about(made, tiny.client, **(ASKED | same)), same
    for other in (
        {"budget": "standard"},
        {"attacks": None},
        {"attacks": ("known-pairs-10", "mla")},
        {"seeds": 3},
        {"auxiliary": "train"},
        {"other_device": tiny.client},
        {"coalition": [0]},
    ):
        assert not product.is_about(made, tiny.client, **(ASKED | other)), other
    assert not product.is_about(tmp_path / "missing.json", tiny.client, **ASKED)


@pytest.fixture
def anew(tiny, tmp_path):
    """The tiny client, whose manifest has another digest."""
    bundle = shutil.copytree(tiny.client, tmp_path / "client")
    with (bundle / "manifest.json").open("a") as stream:
        stream.write("\n")
    return bundle


def test_a_report_of_a_bundle_that_was_made_anew_is_not_taken(report, tiny, anew):
    made = report()
    assert not product.is_about(made, anew, **ASKED)
    assert product.is_about(report(anew), anew, **ASKED)


def test_a_report_with_another_device_is_of_that_device(report, tiny, anew):
    made = report(other_device=tiny.client)
    assert product.is_about(made, tiny.client, **ASKED, other_device=tiny.client)
    assert not product.is_about(made, tiny.client, **ASKED, other_device=anew)
    assert not product.is_about(made, tiny.client, **ASKED)


def test_a_report_of_some_operators_is_of_those(report, tiny):
    made = report(coalition=[0])
    assert product.is_about(made, tiny.client, **ASKED, coalition=[0])
    for others in ([1], [0, 1], None):
        assert not product.is_about(made, tiny.client, **ASKED, coalition=others), others


def test_an_audit_is_made_again_where_the_report_has_too_few_seeds(report, tiny, monkeypatch):
    made, asked = report(), []
    monkeypatch.setattr(product, "audit", lambda *_, **options: asked.append(options["seeds"]))
    for seeds in (1, 3):
        product.audited(tiny.run, tiny.client, made.with_suffix(".html"), **(ASKED | {"seeds": seeds}))
    assert asked == [3]


# --- figures and the frontier's cells ---


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """The folder of the results, which is empty."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    results.RESULTS.mkdir()
    return results.RESULTS


def test_figures_are_written_whole_or_not_at_all(figures, monkeypatch):
    results.record("some", [results.figure("speed", 1.0, "s")], command="c", seed=None)
    before = (figures / "some.json").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.record("some", [results.figure("speed", 2.0, "s")], command="c", seed=None)
    assert (figures / "some.json").read_text() == before
    assert [path.name for path in figures.iterdir()] == ["some.json"]


NAME = "after stem, noise 2"


@pytest.fixture
def make_cells(figures, monkeypatch, tmp_path):
    """Returns a function that starts frontier.py for one cell, with what is known of it; the folder of its export."""
    known = json.loads((ROOT / "docs" / "results" / "frontier.json").read_text(encoding="utf-8"))[NAME]

    def start(*arguments, **changes):
        (figures / "frontier.json").write_text(json.dumps({NAME: known | changes}))
        given = ["--data", "demo", "--only", NAME, "--runs", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", ["frontier.py", *given])
        frontier.main()

    monkeypatch.setattr(frontier, "cell", lambda *_: known | {"accuracy": 1.0})
    return start


def test_a_cell_whose_client_is_elsewhere_is_named_with_what_to_do(make_cells):
    for again in ("--thorough", "--films"):
        with pytest.raises(SystemExit, match=rf"{NAME} \(.*after_stem__noise_2.*remove the cells from the file"):
            make_cells(again)


def test_of_a_cell_of_a_former_oracle_the_reports_go_and_the_client_stays(make_cells, figures, tmp_path):
    out = tmp_path / "out" / "after_stem__noise_2"
    names = ["audit.json", "audit.parts/oracle-0.npz", "client/manifest.json", "films.json"]
    for path in (out / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    make_cells()  # of today's oracle: nothing is to be done
    assert all((out / name).is_file() for name in names)
    make_cells(decoder=frontier.DECODER - 1)
    assert [name for name in names if (out / name).is_file()] == ["audit.parts/oracle-0.npz", "client/manifest.json"]
    assert json.loads((figures / "frontier.json").read_text())[NAME]["accuracy"] == 1.0


# --- the Makefile ---


@pytest.fixture
def make(tmp_path):
    """Returns a function that makes a target in an empty folder, where programs do nothing but say their arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ensembler", "python"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> said\n')
        (programs / name).chmod(0o755)

    def run(target):
        given = ["INSTALLED=", f"BIN={programs}", "CIFAR10=demo", "FACES=demo"]
        command = ["make", "--file", str(ROOT / "Makefile"), "--directory", str(tmp_path), target, *given]
        subprocess.run(command, check=True, capture_output=True)
        said = (tmp_path / "said").read_text().splitlines()
        (tmp_path / "said").unlink()
        return said

    return run


@pytest.mark.parametrize(
    ("target", "net"),
    [("presets", "strong_1"), ("presets", "obf_0"), ("faces", "faces_strong_2"), ("privacy", "wire/bits_8_2")],
)
def test_make_goes_on_with_what_was_killed_and_leaves_alone_what_is_finished(make, target, net, tmp_path):
    run, out = tmp_path / "runs" / net, tmp_path / "out" / net
    said = make(target)
    (trained,) = (line for line in said if line.startswith("ensembler train") and line.endswith(f"--out runs/{net}"))
    (exported,) = (line for line in said if line.startswith(f"ensembler export runs/{net} --out out/{net} "))
    run.mkdir(parents=True)
    (run / "config.json").touch()
    (out / ".partial-1").mkdir(parents=True)
    goes_on = make(target)
    assert [line for line in goes_on if line not in said] == [f"ensembler train --resume runs/{net}"]
    assert [line for line in said if line not in goes_on] == [trained]
    (run / "summary.json").touch()
    (out / "client").mkdir()
    (out / "client" / "manifest.json").touch()
    assert [line for line in said if line not in make(target)] == [trained, exported]
