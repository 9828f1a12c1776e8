"""``ensembler install-bundle``: whole or not at all, private, and back to the one before."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from ensembler.cli import main
from ensembler.edge_runtime import installing
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import BundleError, BundleTamperedError, ConfigError, MissingExtraError
from ensembler.protocol.manifest import MANIFEST_NAME, load_client, to_json

GOLDEN = Path(__file__).resolve().parent / "golden" / "v1_tflite" / "client"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


@pytest.fixture
def others(tmp_path):
    """``others(label)``: the golden bundle, its first class called so."""

    def made(label):
        folder = shutil.copytree(GOLDEN, tmp_path / label)
        manifest = load_client(folder)
        labels = (label, *manifest.labels[1:])
        (folder / MANIFEST_NAME).write_bytes(to_json(replace(manifest, labels=labels)))
        return folder

    return made


def in_use(place):
    return load_client(place / "client").labels[0]


def test_an_installed_bundle_runs_and_its_owner_alone_can_read_it(place, others):
    source = others("one")
    for path in source.iterdir():
        path.chmod(0o644)
    (source / "unlisted").write_text("stays behind")
    link = installing.install(source, place)
    assert link == place / "client"
    assert EdgeRuntime(link).manifest.labels[0] == "one"
    inside = link.resolve()
    assert stat.S_IMODE(inside.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in inside.iterdir()} == {0o600}
    assert {path.name for path in inside.iterdir()} == {MANIFEST_NAME, *load_client(source).files}


def test_a_privacy_card_comes_along(place, others):
    source = others("one")
    (source / "privacy.json").write_text("{}")
    assert (installing.install(source, place) / "privacy.json").read_text() == "{}"


def test_the_one_before_is_kept_and_comes_back_and_older_ones_go(place, others):
    for label in ("one", "two", "three"):
        installing.install(others(label), place)
    assert in_use(place) == "three"
    assert len(list((place / "bundles").iterdir())) == 2
    installing.roll_back(place)
    assert in_use(place) == "two"
    installing.roll_back(place)
    assert in_use(place) == "three"


def test_the_same_bundle_again_mends_a_damaged_one_and_forgets_nothing(place, others):
    first, second = others("one"), others("two")
    installing.install(first, place)
    installing.install(second, place)
    (place / "client" / "head.onnx").write_bytes(b"")
    installing.install(second, place)
    assert in_use(place) == "two"
    installing.roll_back(place)
    assert in_use(place) == "one"


def damaged(folder):
    (folder / "tail.tflite").write_bytes(b"")


def without_a_runtime_that_reads_it(folder):
    manifest = load_client(folder)
    head = folder / manifest.models[0].head
    head.write_bytes(b"not a model")
    entries = dict(manifest.files) | {head.name: installing.describe_file(head)}
    (folder / MANIFEST_NAME).write_bytes(to_json(replace(manifest, files=entries)))


@pytest.mark.parametrize(
    ("harm", "error"), [(damaged, BundleTamperedError), (without_a_runtime_that_reads_it, BundleError)]
)
def test_a_bundle_that_does_not_run_here_leaves_the_one_in_use(place, others, harm, error):
    installing.install(others("one"), place)
    bad = others("two")
    harm(bad)
    with pytest.raises(error):
        installing.install(bad, place)
    assert in_use(place) == "one"
    assert len(list((place / "bundles").iterdir())) == 1


def test_a_device_without_a_runtime_is_told_which_to_install(place, others, monkeypatch):
    monkeypatch.setattr("ensembler.edge_runtime.backends.installed", lambda _: False)
    with pytest.raises(MissingExtraError, match="pip install"):
        installing.install(others("one"), place)
    assert not (place / "client").exists()


@pytest.mark.parametrize("step", ["rename", "replace", "symlink_to"])
def test_a_full_disk_at_any_step_leaves_the_one_in_use(place, others, monkeypatch, step):
    installing.install(others("one"), place)
    two = others("two")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, full)
        with pytest.raises(ConfigError, match="No space left on device; client is what it was"):
            installing.install(two, place)
    assert in_use(place) == "one"
    installing.install(two, place)  # what was left behind is in nobody's way
    assert in_use(place) == "two"
    assert not list((place / "bundles").glob(".partial-*"))


def test_there_may_be_nothing_to_go_back_to(place, others):
    installing.install(others("one"), place)
    with pytest.raises(BundleError, match="holds no bundle before this one"):
        installing.roll_back(place)


def test_a_damaged_bundle_is_not_gone_back_to(place, others):
    installing.install(others("one"), place)
    installing.install(others("two"), place)
    (place / "client.before" / "head.onnx").write_bytes(b"")
    with pytest.raises(BundleTamperedError):
        installing.roll_back(place)
    assert in_use(place) == "two"


def test_a_folder_that_was_put_there_by_hand_is_not_touched(place, others):
    shutil.copytree(GOLDEN, place / "client")
    with pytest.raises(ConfigError, match="is a folder and no link of an install; move it away"):
        installing.install(others("one"), place)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")
def test_root_gives_the_files_to_the_service_user(place, others):
    user = pwd.getpwnam("nobody")
    link = installing.install(others("one"), place, (user.pw_uid, user.pw_gid))
    assert {path.stat().st_uid for path in (link.resolve(), *link.resolve().iterdir())} == {user.pw_uid}


def test_the_verb_installs_and_rolls_back(place, others, capsys):
    for label in ("one", "two"):
        assert main(["install-bundle", str(others(label)), "--to", str(place), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["bundle"] == str(place / "client")
    assert main(["install-bundle", "--rollback", "--to", str(place)]) == 0
    assert "the bundle before is in use again" in capsys.readouterr().out
    assert in_use(place) == "one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give the folder of a client bundle, or --rollback"),
        (["--rollback", "x"], "--rollback takes neither a bundle nor --owner"),
        ([str(GOLDEN), "--owner", "nobody-of-that-name"], "this machine has no such user"),
        (["nowhere"], "no bundle at nowhere"),
    ],
)
def test_wrong_uses_are_one_sentence(options, message, place, capsys):
    assert main(["install-bundle", *options, "--to", str(place)]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (place / "client").exists()


def test_without_to_it_is_the_users_own_place_or_the_machines(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert installing.standard_place() == tmp_path / "ensembler"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert installing.standard_place() == Path("/etc/ensembler")
