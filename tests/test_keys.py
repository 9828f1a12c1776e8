"""CURVE key files: made private, read strictly, never shown."""

from __future__ import annotations

import os
import stat

import pytest
import zmq.auth

from ensembler.protocol.errors import ConfigError, KeyFileError
from ensembler.transport import keys


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_secret_key_is_readable_by_its_owner_alone(tmp_path):
    public, secret = keys.create(tmp_path / "keys", "device")
    assert (mode(public), mode(secret), mode(tmp_path / "keys")) == (0o644, 0o600, 0o700)
    assert sorted(p.name for p in (tmp_path / "keys").iterdir()) == ["device.key", "device.key_secret"]


def test_both_files_of_a_pair_hold_the_same_public_key(tmp_path):
    public, secret = keys.create(tmp_path, "device")
    pair = keys.load_pair(secret)
    assert keys.load_public(public) == keys.load_public(secret) == pair.public
    assert len(pair.public) == len(pair.secret) == 40


def test_the_secret_file_in_the_place_of_a_public_key_is_refused(tmp_path):
    public, secret = keys.create(tmp_path, "server")
    assert keys.public_of(public) == keys.load_public(public)
    with pytest.raises(KeyFileError, match=r"key_secret holds a secret key, .* give the public file") as caught:
        keys.public_of(secret)
    assert keys.load_pair(secret).secret not in str(caught.value)


def test_the_public_file_does_not_hold_the_secret(tmp_path):
    public, secret = keys.create(tmp_path, "device")
    assert keys.load_pair(secret).secret not in public.read_text()


def test_a_pair_does_not_show_its_secret(tmp_path):
    _, secret = keys.create(tmp_path, "device")
    pair = keys.load_pair(secret)
    assert pair.secret not in repr(pair)
    assert pair.secret not in f"{pair}"


def test_a_key_is_never_overwritten(tmp_path):
    public, secret = keys.create(tmp_path, "device")
    before = secret.read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys.create(tmp_path, "device")
    public.unlink()
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys.create(tmp_path, "device")
    assert secret.read_bytes() == before


def test_a_secret_that_others_can_read_is_refused_with_the_cure(tmp_path):
    _, secret = keys.create(tmp_path, "device")
    secret.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        keys.load_pair(secret)


def test_the_public_file_is_refused_where_a_secret_is_needed(tmp_path):
    public, _ = keys.create(tmp_path, "device")
    with pytest.raises(KeyFileError, match="holds no secret key"):
        keys.load_pair(public)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\xff\xfe\x00",
        b'metadata\ncurve\n    public-key = "short"\n',
        b'metadata\ncurve\n    public-key = "' + b"~" * 40 + b'"\n',
        bytes(5000),
    ],
    ids=["empty", "text", "binary", "short key", "other letters", "zeros"],
)
def test_a_file_that_is_no_key_is_refused(tmp_path, content):
    path = tmp_path / "x.key"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"x\.key"):
        keys.load_public(path)


def test_a_pipe_and_a_huge_file_are_no_keys_and_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.key")
    with (tmp_path / "huge.key").open("wb") as stream:
        stream.truncate(1 << 40)
    monkeypatch.setattr(zmq.auth, "load_certificate", lambda path: pytest.fail(f"{path} was read"))
    for name in ("pipe.key", "huge.key"):
        with pytest.raises(KeyFileError, match=f"{name} is not a CURVE key file"):
            keys.load_public(tmp_path / name)


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(KeyFileError, match="nowhere"):
        keys.load_public(tmp_path / "nowhere.key")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_a_key_name_is_a_plain_file_name(tmp_path, name):
    with pytest.raises(ConfigError):
        keys.create(tmp_path, name)


def test_authorized_devices_are_the_public_keys_of_a_folder(tmp_path):
    expected = {keys.load_public(keys.create(tmp_path, name)[0]) for name in ("one", "two")}
    assert keys.load_authorized(tmp_path) == expected
    with pytest.raises(KeyFileError, match="not a folder"):
        keys.load_authorized(tmp_path / "missing")


def test_a_place_in_another_users_folder_is_passed_over_and_named_it_is_an_error(tmp_path, shut_away):
    _, place = keys.create(tmp_path, "place")
    closed = tmp_path / "closed" / "device.key_secret"
    shut_away(closed)
    assert keys.find(None, "SOME_KEY", [closed, place]) == place
    with pytest.raises(KeyFileError, match=r"the key argument names .*closed.* that this user may see"):
        keys.find(closed, "SOME_KEY", [place])


def test_a_key_is_looked_for_in_the_argument_the_variable_and_the_places_in_this_order(tmp_path, monkeypatch):
    _, argument = keys.create(tmp_path, "argument")
    _, variable = keys.create(tmp_path, "variable")
    _, place = keys.create(tmp_path, "place")
    assert keys.find(None, "SOME_KEY", [tmp_path / "missing", place]) == place
    monkeypatch.setenv("SOME_KEY", str(variable))
    assert keys.find(None, "SOME_KEY", [place]) == variable
    assert keys.find(argument, "SOME_KEY", [place]) == argument
    monkeypatch.setenv("SOME_KEY", str(tmp_path / "missing"))
    with pytest.raises(KeyFileError, match="SOME_KEY"):
        keys.find(None, "SOME_KEY", [place])
