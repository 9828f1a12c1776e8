"""Everything that a program, a person or an operator gets to see is searched for everything that is secret."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import logging
import shutil
import threading
import traceback

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from PIL import Image
from test_export import Haystack, bundle_bytes, exported, trained_secrets
from zmq.utils import z85

from ensembler import AsyncEdgeClient, EdgeClient
from ensembler.cli import main
from ensembler.cloud_runtime.onnx_engine import OnnxEngine
from ensembler.cloud_runtime.server import Server
from ensembler.edge_runtime import sealing, signing
from ensembler.edge_runtime.runtime import EdgeRuntime
from ensembler.export.pipeline import ExportOptions
from ensembler.protocol.errors import EnsemblerError
from ensembler.protocol.manifest import load_client, load_server
from ensembler.training.fit import derived_seed
from ensembler.training.plots import draw
from ensembler.training.runs import RunFolder
from ensembler.training.stages import load_client as load_trained
from ensembler.transport import keys
from ensembler.transport.inprocess import InProcessTransport
from ensembler.transport.zmq_server import ServerSocket

PASSPHRASE = "never say this one aloud"
BUNDLE_KEY = bytes.fromhex("8b1fc2604d7792e5a03cb95e11f8d6437a2904bcde6570f3185a9c21e74b0fd6")
LONG_MS = 60_000


def selector_forms(selector):
    """The selector as a program would print it. Two bare numbers are no find: they stand in shapes and sizes too."""
    numbers = [str(index) for index in selector]
    comma, close = ", ".join(numbers), ",".join(numbers)
    mask = [index in selector for index in range(3)]
    texts = [f"[{comma}]", f"({comma})", f"[{close}]", f"({close})", f"{{{comma}}}", f"array([{comma}])", str(mask)]
    return [text.encode() for text in texts]


def forms_of_bytes(secret):
    """Raw bytes, and how programs write them."""
    texts = [secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1], str(list(secret))]
    return [secret, *(text.encode() for text in texts)]


def forms_of_key(path):
    """A signing key: its 32 bytes, and how its file has them."""
    pem = path.read_bytes()
    raw = load_pem_private_key(pem, None).private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return [pem.splitlines()[1], *forms_of_bytes(raw)]


def secrets_of(run):
    """Returns {name: forms} of what a client's run keeps."""
    secret = RunFolder.open(run).read_secret()
    found = {"selector": selector_forms(secret.selector)}
    for name, seed in (
        ("seed", secret.seed),
        *((f"seed {part}", derived_seed(secret.seed, 3, part)) for part in (0, 1)),
    ):
        found[name] = [str(seed).encode(), f"{seed:x}".encode(), seed.to_bytes(8, "little"), seed.to_bytes(8, "big")]
    noise = load_trained(RunFolder.open(run)).noise.numpy().astype("<f4")
    found["noise"] = [noise.tobytes()[:16], str(noise.reshape(-1)[:2].tolist())[1:-1].encode()]
    found["passphrase"] = [PASSPHRASE.encode(), *forms_of_bytes(PASSPHRASE.encode())]
    found["bundle key"] = forms_of_bytes(BUNDLE_KEY)
    return found


def key_secrets(folder):
    """Returns {file name: forms} of the secret keys in a folder."""
    texts = {path.name: keys.load_pair(path).secret for path in folder.rglob("*.key_secret")}
    return {name: [text.encode(), *forms_of_bytes(z85.decode(text))] for name, text in texts.items()}


@pytest.fixture(scope="module")
def secrets(tiny):
    """Of the tiny run and of both its sides' keys."""
    found = secrets_of(tiny.run) | key_secrets(tiny.keys)
    assert {"device.key_secret", "server.key_secret"} <= found.keys()
    return found


def leaked(secrets, seen):
    """Returns the names of the secrets that stand in what was seen."""
    data = seen if isinstance(seen, bytes) else seen.encode("utf-8", "surrogateescape")
    return [name for name, forms in secrets.items() if any(form in data for form in forms)]


def test_the_search_finds_what_is_there(secrets, tiny):
    secret = RunFolder.open(tiny.run).read_secret()
    for text in (f"chosen: {list(secret.selector)}", f"{secret.selector}", f"{set(secret.selector)}"):
        assert leaked(secrets, text) == ["selector"]
    assert leaked(secrets, f"seed={secret.seed}") == ["seed"]
    assert leaked(secrets, (tiny.run / RunFolder.SECRET_FILE).read_bytes().replace(b"\n", b"")) != []
    assert leaked(secrets, (tiny.keys / "device.key_secret").read_text()) == ["device.key_secret"]
    assert leaked(secrets, f"ValueError: {BUNDLE_KEY!r}") == ["bundle key"]
    assert leaked(secrets, f"passphrase={PASSPHRASE!r}") == ["passphrase"]
    noise = load_trained(RunFolder.open(tiny.run)).noise.numpy()
    assert leaked(secrets, b"..." + noise.tobytes()) == ["noise"]


# --- files ---


def test_what_leaves_for_others_holds_no_secret(secrets, tiny):
    # test_export.py searches the server bundle for tensors; the forms of seeds, keys and passphrases are sought here.
    assert leaked(secrets, bundle_bytes(tiny.server)) == []
    assert leaked(secrets, (tiny.out / "parity.json").read_bytes()) == []


def test_pictures_hold_no_secret_in_their_metadata_and_none_in_their_bytes(secrets, tiny, tmp_path):
    run = shutil.copytree(tiny.run, tmp_path / "run")
    for path in draw(run):
        with Image.open(path) as picture:
            picture.load()
            described = repr(sorted(picture.info.items()))
        assert leaked(secrets, path.read_bytes() + described.encode()) == []
        assert str(run) not in described


def test_an_encrypted_bundle_shows_nothing_of_its_models(tiny, tmp_path, secrets):
    secret = sealing.key(BUNDLE_KEY)
    exported(tiny.run, tmp_path, secret=secret, server_bundles=(tiny.server,), client_precision="float32")
    manifest = load_client(tmp_path / "client")
    stored = b"\0".join(path.read_bytes() for path in sorted((tmp_path / "client").iterdir()))
    haystack = Haystack(stored)
    assert [name for name, tensor in trained_secrets(RunFolder.open(tiny.run)) if haystack.holds(tensor.ravel())] == []
    assert leaked(secrets, stored) == []
    assert b"GatherElements" not in stored
    assert b"QuantizeLinear" not in stored
    # The control: the same search finds them once the files are open.
    model = sealing.opener(tmp_path / "client", manifest, lambda _: secret)
    assert b"QuantizeLinear" in model(manifest.models[0].head)
    assert Haystack(model(manifest.models[0].head)).holds(load_trained(RunFolder.open(tiny.run)).noise.numpy())


# --- objects ---


def test_no_object_shows_a_secret(secrets, tiny, tiny_images, gate):
    transport = InProcessTransport(gate)
    pair = keys.load_pair(tiny.keys / "device.key_secret")
    hidden = [sealing.key(BUNDLE_KEY), sealing.passphrase(PASSPHRASE)]
    seal = dataclasses.replace(load_client(tiny.client), encryption=sealing.new_seal(hidden[0]))
    asynchronous = AsyncEdgeClient(tiny.client, "tcp://127.0.0.1:9", key=tiny.keys / "device.key_secret")
    with (
        EdgeClient(tiny.client, "in-process", transport=transport) as client,
        EdgeClient(tiny.client, "tcp://127.0.0.1:9", key=tiny.keys / "device.key_secret") as encrypted,
    ):
        prediction = client.predict(tiny_images[0])
        objects = [
            *(client, encrypted, asynchronous, prediction, prediction.timings, client.info(), encrypted.info()),
            *(pair, *hidden, sealing.Sealer(hidden[0], seal), seal, EdgeRuntime(tiny.client)),
            *(load_client(tiny.client), load_server(tiny.server), ExportOptions(secret=hidden[1])),
            *(RunFolder.open(tiny.run).read_secret(), RunFolder.open(tiny.run), load_trained(RunFolder.open(tiny.run))),
            *(encrypted._parties, [vars(party) for party in encrypted._parties], vars(encrypted), vars(client)),
            *(vars(replica) for replica in encrypted._parties[0].replicas),
            vars(encrypted._parties[0].replicas[0]._transport),
            *(client.statistics(), encrypted.statistics()),
            vars(encrypted._runtime),
        ]
        for each in objects:
            assert leaked(secrets, f"{each!r} {each}") == [], type(each)
    asyncio.run(asynchronous.aclose())


def test_a_client_does_not_keep_what_opened_its_bundle(tiny, tmp_path):
    exported(tiny.run, tmp_path, secret=sealing.key(BUNDLE_KEY), server_bundles=(tiny.server,))
    seen, found = set(), []

    def walk(value, depth=0):
        if id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        if isinstance(value, bytes | str):
            found.extend(leaked({"bundle key": forms_of_bytes(BUNDLE_KEY)}, value))
        for inner in (
            list(getattr(value, "__dict__", {}).values())
            + (list(value) if isinstance(value, list | tuple | set) else [])
            + (list(value.values()) if isinstance(value, dict) else [])
            + [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        ):
            walk(inner, depth + 1)

    with EdgeClient(tmp_path / "client", "x", bundle_key=BUNDLE_KEY, transport=InProcessTransport(list)) as client:
        walk(client)
    assert len(seen) > 50
    assert found == []


# --- errors ---


def failures(tiny, tmp_path):
    """Yields (what, a call that fails) for the failures that an application meets."""
    device = tiny.keys / "device.key_secret"
    key = tmp_path / "bundle.key"
    key.write_bytes(BUNDLE_KEY)
    key.chmod(0o600)
    phrase = tmp_path / "phrase"
    phrase.write_text(PASSPHRASE)
    readable = tmp_path / "readable.key_secret"
    readable.write_bytes(device.read_bytes())
    readable.chmod(0o644)
    exported(tiny.run, tmp_path / "by-key", secret=sealing.key(BUNDLE_KEY), server_bundles=(tiny.server,))
    locked = tmp_path / "by-key" / "client"

    def client(bundle=tiny.client, server="tcp://127.0.0.1:9", **options):
        with EdgeClient(bundle, server, timeout_ms=200, **options) as edge:
            edge.predict(np.zeros((16, 16, 3), np.uint8))

    def nonsense(frames):
        return [[b"\xff", b""]]

    yield "nobody answers", lambda: client(key=device)
    yield "a passphrase for a key", lambda: client(locked, key=device, passphrase=PASSPHRASE)
    yield "another key", lambda: client(locked, key=device, bundle_key=BUNDLE_KEY[::-1])
    yield "a key too long", lambda: client(locked, key=device, bundle_key=BUNDLE_KEY + b"x")
    yield "a key for a plain bundle", lambda: client(key=device, bundle_key=key)
    yield "a passphrase for a plain bundle", lambda: client(key=device, passphrase=PASSPHRASE)
    yield "a passphrase file that others read", lambda: sealing.passphrase_file(phrase)
    yield "a key file as a device key", lambda: client(key=key)
    yield "a device key as a bundle key", lambda: client(locked, bundle_key=device)
    yield "a bundle key as a signing key", lambda: signing.load(key, "somebody")
    yield "a device key that others read", lambda: client(key=readable)
    yield "no answer", lambda: client(transport=InProcessTransport(lambda _: []))
    yield "no message", lambda: client(transport=InProcessTransport(nonsense))
    yield "a run as a bundle", lambda: client(tiny.run, key=device)


def test_no_error_and_no_traceback_shows_a_secret(secrets, tiny, tmp_path):
    for what, fail in failures(tiny, tmp_path):
        with pytest.raises(EnsemblerError) as caught:
            fail()
        text = "".join(traceback.format_exception(caught.value))
        assert leaked(secrets, f"{caught.value!r} {caught.value} {text}") == [], what


# --- logs ---


class FailsOnce(OnnxEngine):
    """The engine of a bundle, whose first batch fails."""

    failed = False

    def run(self, features):
        if not self.failed:
            self.failed = True
            raise RuntimeError("out of luck")
        return super().run(features)


def test_a_server_and_its_devices_log_no_secret_at_debug_level(secrets, tiny, tiny_images, caplog):
    caplog.set_level(logging.DEBUG)
    listening = ServerSocket(
        "tcp://127.0.0.1:*",
        keys=keys.load_pair(tiny.keys / "server.key_secret"),
        authorized=keys.load_authorized(tiny.keys / "authorized"),
    )
    server = Server(FailsOnce(tiny.server, threads=1), listening)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with EdgeClient(tiny.client, listening.endpoint, timeout_ms=LONG_MS) as client:
            with pytest.raises(EnsemblerError, match="internal error"):
                client.predict(tiny_images[0])
            client.predict(tiny_images[0])
    finally:
        server.stop()
        thread.join(30)
        listening.close()
    assert "out of luck" in caplog.text
    assert "stopped after" in caplog.text
    assert leaked(secrets, caplog.text) == []
    codes = EdgeRuntime(tiny.client).encode(tiny_images[:1]).tobytes()
    assert (
        leaked(
            {"features": forms_of_bytes(codes[:32]), "image": forms_of_bytes(tiny_images[0].tobytes()[:32])},
            caplog.text,
        )
        == []
    )


# --- the command line ---


def said(*arguments):
    """Runs a verb in this process; returns everything it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue() + err.getvalue()


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_no_verb_prints_a_secret(form, tiny, tiny_images, tmp_path, serve, secrets):
    photo, run, out = tmp_path / "a.png", tmp_path / "run", tmp_path / "out"
    Image.fromarray(tiny_images[0]).save(photo)
    (tmp_path / "phrase").touch(mode=0o600)
    (tmp_path / "phrase").write_text(PASSPHRASE)
    seen = []

    def verb(*arguments):
        status, text = said(*arguments, *form)
        assert status == 0, text
        seen.append(text)

    nets = ["--arch", "resnet10_slim", "-N", 3, "-P", 2, "--epochs", 1, "--train-limit", 64, "--batch-size", 16]
    verb("train", "--data", tiny.data, "--out", run, *nets)
    verb(
        "export",
        run,
        "--out",
        out,
        "--passphrase-file",
        tmp_path / "phrase",
        "--min-sqnr-db=-1000",
        "--max-accuracy-drop=100",
    )
    verb("keys", "new", "--out", tmp_path / "more")
    verb("keys", "bundle", tmp_path / "bundle.key")
    verb("keys", "signing", tmp_path / "signing.pem")
    with serve(out / "server") as (endpoint, process):
        client = ["predict", out / "client", photo, "--server", endpoint]
        verb(*client, "--passphrase-file", tmp_path / "phrase", "--timeout-ms", LONG_MS)
        status, text = said(*client, "--bundle-key", tmp_path / "bundle.key", *form)
        assert status == 2
        seen.append(text)
        process.terminate()
        seen += process.communicate(timeout=30)
    hidden = secrets_of(run) | key_secrets(out) | key_secrets(tmp_path / "more")
    hidden["made key"] = forms_of_bytes((tmp_path / "bundle.key").read_bytes())
    hidden["signing key"] = forms_of_key(tmp_path / "signing.pem")
    assert len(seen) == 9
    assert all(seen[:7])
    for text in seen:
        assert leaked(hidden | secrets, text) == []
    assert leaked(hidden, (out / "parity.json").read_bytes()) == []


def test_help_names_files_of_secrets_and_takes_no_secret_itself():
    """A secret on the command line would stand in the list of processes and in the shell's history."""
    for verb in ("export", "predict", "keys"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            main([verb, "--help"])
        assert "--passphrase " not in out.getvalue()
