"""Client bundles encrypted at rest: what opens them, what does not, and what a thief of the storage finds."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import resource
import shutil
import stat
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from ensembler import EdgeClient
from ensembler.cli import main
from ensembler.edge_runtime import sealing
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.protocol.errors import (
    BundleError,
    BundleTamperedError,
    ConfigError,
    KeyFileError,
    MissingExtraError,
)
from ensembler.protocol.manifest import (
    MANIFEST_NAME,
    ModelPair,
    SealSpec,
    describe_file,
    load_client,
    parse_client,
    to_json,
)
from ensembler.transport.inprocess import InProcessTransport

KEY = bytes(range(100, 132))
PASSPHRASE = "correct horse, battery; größer"
SALT = "5a" * 32
BY_KEY = SealSpec(kdf="hkdf-sha256", salt=SALT)
BY_PASSPHRASE = SealSpec(kdf="scrypt", salt=SALT, log2_n=14, p=1)  # as cheap as a manifest may say


def names_of(manifest):
    """The names of the models, in the order of their pairs."""
    return [name for pair in manifest.models for name in (pair.head, pair.tail)]


def sealed(plain, out, secret, seal):
    """Makes an encrypted copy of a plain client bundle, without exporting again."""
    manifest = load_client(plain)
    names = {name: f"{name}{sealing.SUFFIX}" for name in names_of(manifest)}
    pairs = tuple(ModelPair(head=names[pair.head], tail=names[pair.tail]) for pair in manifest.models)
    changed = dataclasses.replace(manifest, models=pairs, files={}, encryption=seal)
    sealer = sealing.Sealer(secret, changed)
    out.mkdir(parents=True)
    for plain_name, name in names.items():
        (out / name).write_bytes(sealer.seal(name, (plain / plain_name).read_bytes()))
    written(out, changed)
    return out


def written(folder, manifest):
    """Writes ``manifest`` with the digests of the files that are there, as whoever can write the folder could."""
    entries = {name: describe_file(folder / name) for name in names_of(manifest)}
    (folder / MANIFEST_NAME).write_bytes(to_json(dataclasses.replace(manifest, files=entries)))


@pytest.fixture(scope="module")
def by_key(tiny, tmp_path_factory):
    return sealed(tiny.client, tmp_path_factory.mktemp("by-key") / "client", sealing.key(KEY), BY_KEY)


@pytest.fixture(scope="module")
def by_passphrase(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by-passphrase") / "client"
    return sealed(tiny.client, folder, sealing.passphrase(PASSPHRASE), BY_PASSPHRASE)


@pytest.fixture
def copied(by_key, tmp_path):
    """A copy of the bundle that KEY opens, to be changed."""
    return shutil.copytree(by_key, tmp_path / "copy")


def secret_file(path, content, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


def opened(bundle, **options):
    """Makes a client that asks nobody."""
    return EdgeClient(bundle, "in-process", transport=InProcessTransport(lambda _: []), **options)


# --- the whole way ---


def test_an_encrypted_export_predicts_what_a_plain_one_does(tiny, tiny_images, expected, tmp_path, serve, capsys):
    key = tmp_path / "keys" / "bundle.key"
    assert main(["keys", "bundle", str(key)]) == 0
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    arguments = ["--server-bundle", tiny.server, "--server-key", tiny.keys / "server.key", "--encrypt-key", key]
    gates = ["--min-sqnr-db=-1000", "--max-accuracy-drop=100"]
    out = tmp_path / "out"
    assert main(["export", str(tiny.run), "--out", str(out), *map(str, arguments), *gates]) == 0
    assert "head and tail are encrypted" in capsys.readouterr().out
    client = out / "client"
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in client.iterdir()} == dict.fromkeys(
        ("head.onnx.sealed", "tail.onnx.sealed", MANIFEST_NAME), 0o600
    )
    with (
        serve(tiny.server) as (endpoint, _),
        EdgeClient(client, endpoint, key=tiny.keys / "device.key_secret", bundle_key=key, timeout_ms=60_000) as edge,
    ):
        found = [prediction.logits for prediction in edge.predict_batch(list(tiny_images))]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_predict_takes_the_passphrase_from_a_file(by_passphrase, tiny, tiny_images, tmp_path, serve, capsys):
    from PIL import Image

    Image.fromarray(tiny_images[0]).save(tmp_path / "a.png")
    file = secret_file(tmp_path / "passphrase", PASSPHRASE.encode() + b"\r\n")
    arguments = ["--key", str(tiny.keys / "device.key_secret"), "--passphrase-file", str(file), "--json"]
    with serve(tiny.server) as (endpoint, _):
        command = ["predict", str(by_passphrase), str(tmp_path / "a.png"), "--server", endpoint, *arguments]
        assert main([*command, "--timeout-ms", "60000"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"]


@pytest.mark.parametrize("kind", ["key", "passphrase"])
def test_the_environment_names_the_file_that_the_bundle_asks_for(
    kind, by_key, by_passphrase, tmp_path, monkeypatch, tiny
):
    content, bundle = {"key": (KEY, by_key), "passphrase": (PASSPHRASE.encode(), by_passphrase)}[kind]
    monkeypatch.setenv("ENSEMBLER_BUNDLE_KEY", str(secret_file(tmp_path / "secret", content)))
    opened(bundle).close()
    opened(tiny.client).close()  # which asks for none


def test_models_are_decrypted_in_memory_alone(by_key, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    writes, active = [], [True]

    def hook(event, arguments):
        if active[0] and event == "open" and isinstance(arguments[2], int) and arguments[2] & 3:
            writes.append(arguments[0])

    sys.addaudithook(hook)  # cannot be removed
    try:
        (tmp_path / "control").touch()
        control, writes[:] = list(writes), []
        before = {path: path.read_bytes() for path in by_key.iterdir()}
        opened(by_key, bundle_key=KEY).close()
    finally:
        active[0] = False
    assert len(control) == 1
    assert writes == []
    assert [path.name for path in tmp_path.iterdir()] == ["control"]
    assert {path: path.read_bytes() for path in by_key.iterdir()} == before


# --- the format, as docs/protocol.md has it ---


def test_a_sealed_file_is_nonce_ciphertext_and_tag_under_a_key_of_its_bundle(by_key, tiny):
    manifest = load_client(by_key)
    context = b"ensembler bundle v1\n"
    pseudorandom = hmac.digest(bytes.fromhex(SALT), KEY, "sha256")  # HKDF, RFC 5869
    key = hmac.digest(pseudorandom, context + b"\x01", "sha256")
    for name, plain in zip(names_of(manifest), ("head.onnx", "tail.onnx"), strict=True):
        data = (by_key / name).read_bytes()
        bound = context + to_json(dataclasses.replace(manifest, files={})) + name.encode()
        expected = (tiny.client / plain).read_bytes()
        assert len(data) == 12 + len(expected) + 16
        assert ChaCha20Poly1305(key).decrypt(data[:12], data[12:], bound) == expected


def test_a_passphrase_is_stretched_with_scrypt(by_passphrase, tiny):
    manifest = load_client(by_passphrase)
    key = hashlib.scrypt(PASSPHRASE.encode(), salt=bytes.fromhex(SALT), n=1 << 14, r=8, p=1, dklen=32)
    data = (by_passphrase / manifest.models[0].tail).read_bytes()
    bound = (
        b"ensembler bundle v1\n" + to_json(dataclasses.replace(manifest, files={})) + manifest.models[0].tail.encode()
    )
    assert ChaCha20Poly1305(key).decrypt(data[:12], data[12:], bound) == (tiny.client / "tail.onnx").read_bytes()


@pytest.mark.parametrize("seal", [None, BY_KEY, BY_PASSPHRASE], ids=["plain", "key", "passphrase"])
def test_the_manifest_states_the_scheme(seal, tiny):
    manifest = dataclasses.replace(load_client(tiny.client), encryption=seal)
    assert parse_client(to_json(manifest)) == manifest
    stated = json.loads(to_json(manifest))["encryption"]
    both = {"cipher": "chacha20-poly1305", "salt": SALT}
    assert (
        stated
        == {
            None: None,
            BY_KEY: {**both, "kdf": "hkdf-sha256"},
            BY_PASSPHRASE: {**both, "kdf": "scrypt", "log2_n": 14, "r": 8, "p": 1},
        }[seal]
    )


def test_no_two_bundles_have_the_same_salt_and_no_two_files_the_same_nonce(tiny):
    secret = sealing.key(KEY)
    assert sealing.new_seal(secret) != sealing.new_seal(secret)
    sealer = sealing.Sealer(secret, dataclasses.replace(load_client(tiny.client), encryption=BY_KEY))
    assert sealer.seal("a", b"same")[:12] != sealer.seal("a", b"same")[:12]


@pytest.mark.parametrize(
    "change",
    [
        {"log2_n": 18},
        {"log2_n": 13},
        {"log2_n": 1 << 70},
        {"log2_n": 14.0},
        {"p": 5},
        {"p": 0},
        {"p": True},
        {"r": 16},
        {"r": None},
        {"salt": "5a"},
        {"salt": 5},
        {"kdf": "pbkdf2"},
        {"kdf": []},
        {"cipher": "none"},
    ],
    ids=str,
)
def test_a_hostile_manifest_is_refused_before_a_key_is_derived(change, by_passphrase, tmp_path, monkeypatch):
    folder = shutil.copytree(by_passphrase, tmp_path / "copy")
    document = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    document["encryption"] |= change
    (folder / MANIFEST_NAME).write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.setattr(sealing, "_derived", lambda *_: pytest.fail("a key was derived"))
    with pytest.raises(BundleError, match=rf"encryption\.{next(iter(change))} "):
        opened(folder, passphrase=PASSPHRASE)


# --- what does not open a bundle ---


@pytest.mark.parametrize(
    ("bundle", "options", "error", "words"),
    [
        ("by_key", {}, KeyFileError, ["encrypted with a key file", "--bundle-key", "ENSEMBLER_BUNDLE_KEY"]),
        ("by_passphrase", {}, KeyFileError, ["encrypted with a passphrase", "--passphrase-file"]),
        ("by_key", {"bundle_key": bytes(32)}, KeyFileError, ["head.onnx.sealed does not open", "is not this bundle's"]),
        ("by_passphrase", {"passphrase": "another one"}, KeyFileError, ["head.onnx.sealed does not open"]),
        ("by_key", {"passphrase": PASSPHRASE}, KeyFileError, ["encrypted with a key file", "a passphrase was given"]),
        ("by_passphrase", {"bundle_key": KEY}, KeyFileError, ["encrypted with a passphrase", "a key file was given"]),
        ("by_key", {"bundle_key": KEY[:31]}, KeyFileError, ["not a bundle key of 32 bytes", "ensembler keys bundle"]),
        ("by_key", {"bundle_key": "/nowhere/key"}, KeyFileError, ["/nowhere/key cannot be read"]),
        ("by_passphrase", {"passphrase": ""}, KeyFileError, ["has 0 bytes"]),
        ("by_key", {"bundle_key": KEY, "passphrase": PASSPHRASE}, ConfigError, ["both given"]),
        ("plain", {"bundle_key": KEY}, ConfigError, ["is not encrypted", "whether it is the right bundle"]),
        ("plain", {"passphrase": PASSPHRASE}, ConfigError, ["is not encrypted"]),
    ],
)
def test_what_does_not_fit_is_one_typed_error_with_the_cure(bundle, options, error, words, request, tiny):
    folder = tiny.client if bundle == "plain" else request.getfixturevalue(bundle)
    with pytest.raises(error) as caught:
        opened(folder, **options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_damaged_file_is_told_from_a_wrong_key(copied):
    data = bytearray((copied / "tail.onnx.sealed").read_bytes())
    data[100] ^= 1
    (copied / "tail.onnx.sealed").write_bytes(data)
    with pytest.raises(BundleTamperedError, match=r"tail\.onnx\.sealed"):
        opened(copied, bundle_key=KEY)


def test_files_cannot_be_exchanged_even_with_the_digests_corrected(copied):
    head, tail = copied / "head.onnx.sealed", copied / "tail.onnx.sealed"
    head_bytes, tail_bytes = head.read_bytes(), tail.read_bytes()
    head.write_bytes(tail_bytes)
    tail.write_bytes(head_bytes)
    written(copied, load_client_unchecked(copied))
    with pytest.raises(KeyFileError, match="changed after its export"):
        opened(copied, bundle_key=KEY)


@pytest.mark.parametrize("content", [b"", b"short", bytes(40)])
def test_a_file_that_was_replaced_does_not_open(copied, content):
    (copied / "head.onnx.sealed").write_bytes(content)
    written(copied, load_client_unchecked(copied))
    with pytest.raises(KeyFileError, match="changed after its export"):
        opened(copied, bundle_key=KEY)


def load_client_unchecked(folder):
    return parse_client((folder / MANIFEST_NAME).read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ("blue", "grün", "red")},
        {"noise_mode": "none"},
        {"encryption": dataclasses.replace(BY_KEY, salt="00" * 32)},
    ],
    ids=["labels", "noise", "salt"],
)
def test_the_manifest_of_an_encrypted_bundle_cannot_be_changed(copied, change):
    written(copied, dataclasses.replace(load_client(copied), **change))
    with pytest.raises(KeyFileError, match="changed after its export"):
        opened(copied, bundle_key=KEY)


def test_another_server_cannot_be_pinned_in_an_encrypted_bundle(copied):
    manifest = load_client(copied)
    party = dataclasses.replace(manifest.parties[0], server_public_key="A" * 40)
    written(copied, dataclasses.replace(manifest, parties=(party,)))
    with pytest.raises(KeyFileError, match="changed after its export"):
        opened(copied, bundle_key=KEY)


def test_a_model_that_is_none_is_named_without_its_content(tiny, tmp_path):
    plain = shutil.copytree(tiny.client, tmp_path / "plain")
    (plain / "head.onnx").write_bytes(b"no graph at all")
    written(plain, load_client_unchecked(plain))
    folder = sealed(plain, tmp_path / "client", sealing.key(KEY), BY_KEY)
    with pytest.raises(BundleError, match=r"head\.onnx\.sealed cannot be loaded") as caught:
        opened(folder, bundle_key=KEY)
    assert "no graph at all" not in str(caught.value)


def test_without_the_package_the_error_is_the_install_command(by_key, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingExtraError, match=r"needs cryptography: pip install 'ensembler-edge\[encrypt\]'"):
        opened(by_key, bundle_key=KEY)
    with pytest.raises(MissingExtraError, match=r"encrypting a bundle needs cryptography"):
        sealing.checked_for_sealing(sealing.key(KEY))
    EdgeRuntime(tiny.client)  # a plain bundle does not need it


def test_a_short_passphrase_encrypts_nothing():
    with pytest.raises(ConfigError, match="shorter than 12 characters"):
        sealing.checked_for_sealing(sealing.passphrase("eleven char"))
    assert sealing.checked_for_sealing(sealing.passphrase("twelve chars"))


# --- key files and passphrase files ---


def test_a_bundle_key_is_never_overwritten(tmp_path):
    sealing.create_key(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        sealing.create_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before
    assert sealing.key(tmp_path / "key").material == before


def test_half_a_key_is_removed_and_the_error_is_the_systems(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # as on a full disk
    try:
        with pytest.raises(KeyFileError, match="the key cannot be written: File too large"):
            sealing.create_key(tmp_path / "key")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="the key cannot be written"):
        sealing.create_key(tmp_path / "file" / "key")


@pytest.mark.parametrize("read", [sealing.key, sealing.passphrase_file])
def test_a_secret_file_that_others_can_read_is_refused_with_the_cure(read, tmp_path):
    path = secret_file(tmp_path / "secret", KEY, mode=0o640)
    with pytest.raises(KeyFileError, match=r"can be read by others \(mode 0640\); chmod 600"):
        read(path)


@pytest.mark.parametrize("read", [sealing.key, sealing.passphrase_file])
def test_a_folder_is_no_secret_file(read, tmp_path):
    with pytest.raises(KeyFileError, match=str(tmp_path)):
        read(tmp_path)


@pytest.mark.parametrize("read", [sealing.key, sealing.passphrase_file])
def test_a_pipe_is_no_secret_file_and_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(KeyFileError, match="pipe is not a file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("content", [PASSPHRASE, f"{PASSPHRASE}\n", f"{PASSPHRASE}\r\n"])
def test_the_end_of_the_line_is_not_part_of_a_passphrase(content, tmp_path):
    path = secret_file(tmp_path / "passphrase", content.encode())
    assert sealing.passphrase_file(path) == sealing.passphrase(PASSPHRASE)


@pytest.mark.parametrize("content", [b"", b"\n", bytes([0xFF, 0xFE]) * 20, b"x" * 1025], ids=len)
def test_a_file_that_holds_no_passphrase_is_named_and_not_shown(content, tmp_path):
    path = secret_file(tmp_path / "passphrase", content)
    with pytest.raises(KeyFileError) as caught:
        sealing.passphrase_file(path)
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is None
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["bundle"], ["bundle", "f", "--out", "x"], ["bundle", "f", "--name", "x"], ["new", "f"]]
)
def test_keys_refuses_what_it_would_ignore(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["keys", *arguments]) == 2
    assert "ensembler: keys " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
