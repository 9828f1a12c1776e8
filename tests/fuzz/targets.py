"""What is fuzzed: every decoder of bytes that somebody else wrote, and what must hold for any bytes at all.

Calling a target raises only where something is wrong with us: a decoder that raises what is no error of this package,
that reads what does not survive being written, or that allocates more than its allowance. ``run_atheris.py`` lets a
coverage-guided fuzzer look for such bytes; ``tests/test_fuzz_corpus.py`` replays what it kept.
"""

from __future__ import annotations

import functools
import json
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ensembler.edge_runtime import sealing
from ensembler.edge_runtime.card import (
    MAX_CARD_BYTES,
    PRIVACY_NAME,
    PrivacyCard,
    canonical,
    checked_facts,
    file_digests,
    read_card,
)
from ensembler.protocol import program as programs
from ensembler.protocol.codec import CODEC_BITS, Codes, pack, packed_row_bytes, unpack
from ensembler.protocol.errors import BundleError, KeyFileError, ProtocolError, UnsupportedVersionError
from ensembler.protocol.manifest import (
    MANIFEST_NAME,
    ClientManifest,
    ServerManifest,
    load_client,
    parse_client,
    parse_server,
    to_json,
)
from ensembler.protocol.messages import LIMITS, Message, decode, encode, peek_request_id
from ensembler.protocol.program import Call, DType, Program, Value

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "v1"

# Of the inputs that a fuzzer makes, one in so many is decoded under tracemalloc, which is slow. Which ones depends on
# their bytes, so that an input that fails fails again.
MEASURED_ONE_IN = 16


@dataclass(frozen=True, kw_only=True)
class Target:
    """One decoder.

    Attributes:
        name: of the target and of its folder in the corpus.
        decode: decodes an input; None where it is refused with a typed error. Anything else raised is a fault.
        verify: fails where what was decoded is not what it should be.
        seeds: valid inputs to begin with.
        kind: what an input is, for the mutator: a ``message``, a ``json`` document, or ``bytes``.
        max_bytes: of an input.
        fixed_allowance: bytes that decoding may allocate whatever the input is.
        allowance: bytes that it may allocate on top, for each byte of the input.
    """

    name: str
    decode: Callable[[bytes], Any]
    verify: Callable[[bytes, Any], None]
    seeds: Callable[[], list[bytes]]
    kind: str
    max_bytes: int
    fixed_allowance: int
    allowance: int

    def __call__(self, data: bytes) -> bool:
        """Decodes and verifies, measured for one input in ``MEASURED_ONE_IN``; returns whether it was accepted."""
        return self.measured(data) if zlib.crc32(data) % MEASURED_ONE_IN == 0 else self._verified(data)

    def measured(self, data: bytes) -> bool:
        """Decodes and verifies, and fails where decoding allocated more than its allowance."""
        allowed = self.fixed_allowance + self.allowance * len(data)
        peak = self.peak_bytes(data)
        if peak > allowed:  # once is no proof: Python's own table of strings grows too, by a megabyte
            peak = self.peak_bytes(data)
        assert peak <= allowed, f"{len(data)} bytes made {self.name} allocate {peak}, more than {allowed}"
        return self._verified(data)

    def peak_bytes(self, data: bytes) -> int:
        """Returns the bytes that decoding held at most, as Python and NumPy report them."""
        tracemalloc.start()
        try:
            self.decode(data)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def warm_up(self) -> None:
        """Decodes the seeds once: what a first call allocates for good, imports for instance, is no input's fault."""
        for seed in self.seeds():
            assert self._verified(seed), f"a seed of {self.name} is refused"

    def _verified(self, data: bytes) -> bool:
        decoded = self.decode(data)
        if decoded is not None:
            self.verify(data, decoded)
        return decoded is not None


# --- messages: two bytes, the length of the header; then the header; the rest is the payload ---


def split(data: bytes) -> tuple[bytes, bytes]:
    """Returns the header and the payload of an input of the target ``message``."""
    length = int.from_bytes(data[:2], "little")
    return data[2 : 2 + length], data[2 + length :]


def joined(header: bytes, payload: bytes) -> bytes:
    """Returns the input that ``split`` takes apart."""
    return len(header).to_bytes(2, "little") + header + payload


def _message(data: bytes) -> Message | None:
    try:
        return decode(split(data))
    except (ProtocolError, UnsupportedVersionError):
        return None


def _verify_message(data: bytes, message: Message) -> None:
    assert peek_request_id(split(data)) == message.request_id
    # A header of 32-bit floats grows when it is written again, beyond what a peer takes.
    again = decode([bytes(frame) for frame in encode(message)], replace(LIMITS, header_bytes=2 * LIMITS.header_bytes))
    assert replace(again, tensor=None) == replace(message, tensor=None)
    assert (again.tensor is None) == (message.tensor is None)
    if message.tensor is not None and again.tensor is not None:
        assert np.array_equal(again.tensor, message.tensor)
        assert message.tensor.max() < 2**message.bits


def _message_seeds() -> list[bytes]:
    rng = np.random.Generator(np.random.PCG64(0))
    ids = {"request_id": bytes(range(16)), "bodies_id": bytes(range(32))}
    timing = {"queue_ms": 0.25, "compute_ms": 12.5}
    messages = [
        Message(operation=operation, **ids, tensor=tensor, bits=bits, info=info)
        for operation, info in (("infer", {}), ("result", timing))
        for bits in CODEC_BITS.values()
        for tensor in (rng.integers(0, 2**bits, (2, 3, 5), dtype=np.uint8),)
    ]
    messages.append(Message(operation="status", request_id=bytes(16)))
    messages.append(
        Message(
            operation="error",
            request_id=bytes(16),
            info={"code": 301, "message": "the queue is full", "retry_after_ms": 50.0, "more": [1, -2.5, "x", True]},
        )
    )
    return [joined(*(bytes(frame) for frame in encode(message))) for message in messages]


# --- request ids: the first byte says how many frames, the rest is the first of them ---


def _request_id(data: bytes) -> bytes | None:
    return peek_request_id([data[1:], b"", b""][: data[0] % 4] if data else [])


def _verify_request_id(data: bytes, found: bytes) -> None:
    assert type(found) is bytes
    assert len(found) == 16
    assert found in data


def _request_id_seeds() -> list[bytes]:
    whole = [b"\2" + split(data)[0] for data in _message_seeds()]
    return [b"\1" + msgpack.packb({"v": 9, "id": bytes(16), "of a later version": [1]}), *whole]


# --- manifests ---


def _client(data: bytes) -> ClientManifest | None:
    try:
        return parse_client(data)
    except BundleError:
        return None


def _verify_client(data: bytes, manifest: ClientManifest) -> None:
    assert parse_client(to_json(manifest)) == manifest


def _client_seeds() -> list[bytes]:
    document = json.loads((GOLDEN / "client" / MANIFEST_NAME).read_bytes())
    entry = document["files"]["head.onnx"]
    both = {
        "also": {"head": "head.tflite", "tail": "tail.tflite"},
        "files": document["files"] | {"head.tflite": entry, "tail.tflite": entry},
    }
    bodies_id, key = document["wire"]["bodies_id"], "rq:rM>}U?@Lns47E1%kR" * 2
    one_party = {"parties": [{"bodies_id": bodies_id, "num_nets": 3, "server_public_key": key}]}
    drawn = {"noise_mode": "drawn", "noise_tensors": 4, "noise_law": "uniform", "dropout": 0.5}
    seal = {"cipher": "chacha20-poly1305", "salt": "5a" * 32}
    by_key = {"encryption": seal | {"kdf": "hkdf-sha256"}}
    by_passphrase = {"encryption": seal | {"kdf": "scrypt", "log2_n": 15, "r": 8, "p": 3}}
    return [_json(document | change) for change in ({}, both, one_party, drawn, by_key, by_passphrase)]


def _server(data: bytes) -> ServerManifest | None:
    try:
        return parse_server(data)
    except BundleError:
        return None


def _verify_server(data: bytes, manifest: ServerManifest) -> None:
    assert parse_server(to_json(manifest)) == manifest


def _server_seeds() -> list[bytes]:
    document = json.loads((GOLDEN / "server_0" / MANIFEST_NAME).read_bytes())
    torch = {"bodies_format": "torch", "bodies": ["program.json", "tensors"], "precision": "float32"}
    torch["files"] = dict.fromkeys(torch["bodies"], document["files"]["body_00.onnx"])
    return [_json(document), _json(document | {"precision": "float32"}), _json(document | torch)]


# --- programs of torch bundles ---


def _program(data: bytes) -> Program | None:
    try:
        return programs.parse(data, "program.json")
    except BundleError:
        return None


def _verify_program(data: bytes, program: Program) -> None:
    assert programs.parse(programs.to_json(program), "program.json") == program
    assert all(call.operator in programs.OPERATORS for call in program.calls)
    assert programs.lowered_tensors(program) <= set(range(program.num_tensors))


def _program_seeds() -> list[bytes]:
    calls = (
        Call("_to_copy.default", (Value(0),), {"dtype": DType("float32")}),
        Call("conv2d.default", (Value(3), Value(1), None, (2, 2), (1, 1))),
        Call("split.Tensor", (Value(4), 4, 1)),
        Call("getitem", (Value(5), 0)),
        Call("clamp.default", (Value(6), -0.5, 6)),
        Call("gelu.default", (Value(7),), {"approximate": "none"}),
    )
    return [programs.to_json(Program(2, calls[:length], 2 + length)) for length in (1, len(calls))]


def _json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


# --- files beside a manifest: they are read from a folder ---

MEMORY = Path("/dev/shm")  # where there is one: a disk would be what takes the time


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None)
    (Path(folder.name) / MANIFEST_NAME).write_bytes((GOLDEN / "client" / MANIFEST_NAME).read_bytes())
    return folder


@functools.cache
def _manifest() -> ClientManifest:
    return load_client(GOLDEN / "client")


def _card(data: bytes) -> PrivacyCard | None:
    folder = Path(_folder().name)
    (folder / PRIVACY_NAME).write_bytes(data)
    card = read_card(folder, _manifest())
    assert card is not None
    if card.facts:
        return card
    assert (card.signature, card.signer, card.of_these_files) == ("invalid", None, False)
    assert card.problem
    return None


def _verify_card(data: bytes, card: PrivacyCard) -> None:
    assert checked_facts(card.facts) == card.facts
    assert card.signer is None or (card.signature == "valid" and card.of_these_files)


def _card_seeds() -> list[bytes]:
    reached = {"attack": "floor", "ssim": 0.1, "psnr_db": 12.0}
    document = {
        "format": "ensembler-privacy-card",
        "version": 1,
        "date": "2031-02-03T04:05:06+00:00",
        "verdict": "obscured",
        "sentence": "Nothing that was tried reads an image.",
        **reached,
        "server_alone": reached,
        "floor": reached,
        "oracle": reached,
        "attacks": ["floor", "oracle"],
        "not_run": ["known-pairs-10"],
        "checks": [{"about": "oracle", "name": "stronger", "words": "is it?", "passed": True}],
        "budget": "quick",
        "seeds": [0, 1],
        "images": {"evaluated": 500, "observed": 700, "auxiliary": 900, "auxiliary_source": "disjoint"},
        "versions": {"ensembler": "0.1.0", "torch": "2.6.0"},
        "files": file_digests(Path(_folder().name), _manifest()),
        "signer": None,
        "signature": None,
    }
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    signed = document | {"signer": {"name": "the office", "public_key": public}}
    signed["signature"] = key.sign(canonical(signed)).hex()
    return [_json(document), _json(document | {"server_alone": None, "files": {}}), _json(signed)]


MODEL = b"what a model file holds"
SEALED_NAME = "head.onnx.sealed"


@functools.cache
def _sealer() -> sealing.Sealer:
    seal = sealing.SealSpec(kdf="hkdf-sha256", salt="5a" * 32)
    return sealing.Sealer(sealing.key(bytes(range(32))), replace(_manifest(), encryption=seal))


def _sealed(data: bytes) -> bytes | None:
    path = Path(_folder().name) / SEALED_NAME
    path.write_bytes(data)
    try:
        return _sealer().open(path)
    except KeyFileError:
        return None


def _verify_sealed(data: bytes, opened: bytes) -> None:
    assert opened == MODEL  # without the key nobody makes another file that opens


def _sealed_seeds() -> list[bytes]:
    return [_sealer().seal(SEALED_NAME, MODEL) for _ in range(2)]


# --- packed codes: a byte for the number of bits, two for the shape, then the packed rows ---


@dataclass(frozen=True)
class _Packed:
    bits: int
    row_shape: tuple[int, ...]
    rows: Codes

    @classmethod
    def of(cls, data: bytes) -> _Packed | None:
        if len(data) < 3:
            return None
        bits = tuple(CODEC_BITS.values())[data[0] % len(CODEC_BITS)]
        row_shape = (1 + data[1] % 16, 1 + data[1] // 16, 1 + data[2])
        row_bytes = packed_row_bytes(row_shape, bits)
        whole = (len(data) - 3) // row_bytes * row_bytes
        rows = np.frombuffer(data[3 : 3 + whole], np.uint8).reshape(-1, row_bytes)
        return cls(bits, row_shape, rows) if whole else None


def _packed(data: bytes) -> Codes | None:
    given = _Packed.of(data)
    if given is None:
        return None
    try:
        return unpack(given.rows, given.row_shape, given.bits)
    except ValueError:
        return None


def _verify_packed(data: bytes, codes: Codes) -> None:
    given = _Packed.of(data)
    assert given is not None
    assert codes.shape == (len(given.rows), *given.row_shape)
    assert codes.dtype == np.uint8
    assert np.array_equal(pack(codes, given.bits), given.rows)
    # The definition, of the first row: its bytes are one number, the first code in the lowest bits.
    number = int.from_bytes(given.rows[0].tobytes(), "little")
    flat = codes[0].ravel()
    for index in (0, len(flat) // 2, len(flat) - 1):
        assert flat[index] == number >> given.bits * index & 2**given.bits - 1


def _packed_seeds() -> list[bytes]:
    rng = np.random.Generator(np.random.PCG64(1))
    seeds = []
    for choice, bits in enumerate(CODEC_BITS.values()):
        codes = rng.integers(0, 2**bits, (2, 3, 1, 5), dtype=np.uint8)
        seeds.append(bytes([choice, 2, 4]) + pack(codes, bits).tobytes())
    return seeds


# The allowances are about twice what was measured of the worst input known: three bytes of a header make it a list of
# 64 places, and read() makes room for a whole card before it reads.
_KIB = 1024
TARGETS = {
    target.name: target
    for target in (
        Target(
            name="message",
            decode=_message,
            verify=_verify_message,
            seeds=_message_seeds,
            kind="message",
            max_bytes=8 * _KIB,
            fixed_allowance=16 * _KIB,
            allowance=256,
        ),
        Target(
            name="request_id",
            decode=_request_id,
            verify=_verify_request_id,
            seeds=_request_id_seeds,
            kind="bytes",
            max_bytes=LIMITS.header_bytes + 16,
            fixed_allowance=16 * _KIB,
            allowance=256,
        ),
        Target(
            name="client",
            decode=_client,
            verify=_verify_client,
            seeds=_client_seeds,
            kind="json",
            max_bytes=8 * _KIB,
            fixed_allowance=32 * _KIB,
            allowance=128,
        ),
        Target(
            name="server",
            decode=_server,
            verify=_verify_server,
            seeds=_server_seeds,
            kind="json",
            max_bytes=8 * _KIB,
            fixed_allowance=32 * _KIB,
            allowance=128,
        ),
        Target(
            name="program",
            decode=_program,
            verify=_verify_program,
            seeds=_program_seeds,
            kind="json",
            max_bytes=8 * _KIB,
            fixed_allowance=32 * _KIB,
            allowance=128,
        ),
        Target(
            name="card",
            decode=_card,
            verify=_verify_card,
            seeds=_card_seeds,
            kind="json",
            max_bytes=8 * _KIB,
            fixed_allowance=MAX_CARD_BYTES + 64 * _KIB,
            allowance=128,
        ),
        Target(
            name="sealed",
            decode=_sealed,
            verify=_verify_sealed,
            seeds=_sealed_seeds,
            kind="bytes",
            max_bytes=_KIB,
            fixed_allowance=32 * _KIB,
            allowance=16,
        ),
        Target(
            name="packed",
            decode=_packed,
            verify=_verify_packed,
            seeds=_packed_seeds,
            kind="bytes",
            max_bytes=4 * _KIB,
            fixed_allowance=32 * _KIB,
            allowance=64,
        ),
    )
}
