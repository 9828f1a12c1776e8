"""``EdgeClient.info()``: true facts about the client, and no secret among them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from ensembler import AsyncEdgeClient, ClientInfo, EdgeClient
from ensembler.info import describe
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.manifest import PartySpec, load_client
from ensembler.protocol.messages import INFER, RESULT, decode
from ensembler.transport import keys
from ensembler.transport.inprocess import InProcessTransport

SERVER = "tcp://127.0.0.1:9"


def test_info_says_what_the_manifest_and_the_options_say(tiny):
    with EdgeClient(tiny.client, SERVER) as edge:
        info = edge.info()
    manifest = load_client(tiny.client)
    assert info == ClientInfo(
        bundle=str(tiny.client),
        bodies_id=manifest.wire.bodies_id,
        num_nets=3,
        image_size=(16, 16),
        num_labels=3,
        feature_shape=manifest.wire.feature_shape,
        codec="u8",
        payload_bytes_up=info.payload_bytes_up,
        payload_bytes_down=info.payload_bytes_down,
        precision=manifest.precision,
        noise_mode="fixed",
        dropout=0.0,
        backend="onnxruntime",
        servers=(SERVER,),
        encrypted=True,
        privacy=None,
    )
    with EdgeClient(tiny.client, SERVER, plaintext=True) as edge:
        assert edge.info().encrypted is False
    with pytest.raises(FrozenInstanceError):
        info.num_nets = 4


def test_the_payload_bytes_are_those_on_the_wire(tiny, gate, tiny_images):
    sizes = {}

    def handler(frames):
        replies = gate(frames)
        for message in (frames, *replies):
            sizes[decode(message).operation] = len(message[1])
        return replies

    with EdgeClient(tiny.client, "in-process", transport=InProcessTransport(handler)) as edge:
        edge.predict(tiny_images[0])
        info = edge.info()
    assert sizes == {INFER: info.payload_bytes_up, RESULT: info.payload_bytes_down}


def test_no_secret_is_in_it(tiny):
    """Neither by a field, nor by the text of one: no selector, no P, no noise, no key."""
    with EdgeClient(tiny.client, SERVER) as edge:
        info = edge.info()
    names = {field.name for field in fields(info)}
    for word in ("select", "key", "std", "sigma", "seed", "tail", "head", "file", "digest"):
        assert not [name for name in names if word in name]
    text = json.dumps(asdict(info)) + repr(info)
    pair = keys.load_pair(tiny.keys / "device.key_secret")
    manifest = load_client(tiny.client)
    secrets = [pair.secret, pair.public, manifest.parties[0].server_public_key]
    secrets += [entry.sha256 for entry in manifest.files.values()]
    assert all(secrets)
    assert not [secret for secret in secrets if secret in text]
    assert manifest.noise_std not in asdict(info).values()


def test_the_bytes_down_of_several_operators_are_those_of_every_reply(tiny):
    manifest = load_client(tiny.client)
    codecs = (AffineCodec(scale=1.0, zero_point=0, bits=4),) * 4
    wire = replace(manifest.wire, answer_width=3, answer_codecs=codecs)
    parties = tuple(PartySpec(bodies_id="ab" * 32, num_nets=n, server_public_key=None) for n in (1, 3))
    info = describe(
        tiny.client,
        replace(manifest, wire=wire, parties=parties),
        backend="onnxruntime",
        servers=("a", "b"),
        encrypted=False,
    )
    assert info.payload_bytes_down == 2 + 5  # 3 codes and 9 codes of 4 bits, each reply whole bytes


def test_the_asyncio_client_says_the_same(tiny):
    client = AsyncEdgeClient(tiny.client, SERVER)
    with EdgeClient(tiny.client, SERVER) as edge:
        assert client.info() == edge.info()
    asyncio.run(client.aclose())
