"""Bundles: a folder with ``manifest.json`` and the files that it lists with their digests.

A **client bundle** holds the secrets (head with noise, selector + tail); a **server bundle** holds the N bodies and the
wire codec. ``bodies_id`` says which client fits which server; file digests say whether a file is the one that was
exported. Everything is validated before anything runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ensembler.protocol.codec import CODEC_BITS, AffineCodec, packed_row_bytes
from ensembler.protocol.errors import (
    BundleError,
    BundleTamperedError,
    BundleVersionError,
    ConfigError,
)
from ensembler.protocol.messages import LIMITS

FORMAT = "ensembler-bundle"
CRYPTO_FORMAT = "ensembler-c2pi"  # of crypto-clear inference; ensembler.crypto reads it
VERSION = 1
MANIFEST_NAME = "manifest.json"

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_FILE_BYTES = 2 * 1024 * 1024 * 1024
MAX_NETS = 1024
MAX_AXIS = 1 << 20
MAX_LABELS = 100_000
MAX_LABEL_CHARACTERS = 1000
MAX_NOISE_TENSORS = 1024

SALT_BYTES = 32
CIPHER = "chacha20-poly1305"
# What a hostile manifest may make a device spend on a passphrase: 128 * 8 * 2^17 bytes are 128 MiB, four times over.
MIN_SCRYPT_LOG2_N, MAX_SCRYPT_LOG2_N = 14, 17
SCRYPT_R = 8
MAX_SCRYPT_P = 4

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"

# Fields of a client manifest that an earlier one has not, and what they then are.
_OPTIONAL: dict[str, Any] = {"noise_law": "gaussian", "noise_tensors": 0, "dropout": 0.0}
_BODIES_FORMAT = "bodies_format"  # of a server manifest; absent where the bodies are ONNX
_ALSO = "also"  # the models in the other format; absent where there is none
_SURROGATE = re.compile("[\ud800-\udfff]")

ModelFormat = Literal["onnx", "tflite"]
BodiesFormat = Literal["onnx", "torch"]
NoiseMode = Literal["none", "fixed", "fresh", "drawn"]
NoiseLaw = Literal["gaussian", "uniform"]
Precision = Literal["int8", "float32"]

Kdf = Literal["hkdf-sha256", "scrypt"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a bundle: its size in bytes and its SHA-256 as 64 hexadecimal digits."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class WireSpec:
    """What travels between a client and the bodies it was exported for.

    Attributes:
        bodies_id: 64 hexadecimal digits over the float weights, their order and the codecs.
        feature_shape: ``(C, H, W)`` (or another shape without the batch) of one image's features.
        feature_codec: the codec of the features, fixed before the selector was drawn.
        answer_width: F, the length of one body's answer.
        answer_codecs: N codecs, one per body in the server's order.
    """

    bodies_id: str
    feature_shape: tuple[int, ...]
    feature_codec: AffineCodec
    answer_width: int
    answer_codecs: tuple[AffineCodec, ...]

    @property
    def num_nets(self) -> int:
        """N, the number of bodies."""
        return len(self.answer_codecs)

    @property
    def answer_bits(self) -> int:
        """Of one code of an answer; one number for all bodies."""
        return self.answer_codecs[0].bits

    @property
    def bytes_up(self) -> int:
        """One image's features on the wire, without the header."""
        return packed_row_bytes(self.feature_shape, self.feature_codec.bits)

    @property
    def bytes_down(self) -> int:
        """One image's N answers on the wire, without the header."""
        return packed_row_bytes((self.num_nets, self.answer_width), self.answer_bits)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What the head takes: RGB uint8 of this size; the graph itself normalises (docs/protocol.md)."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ServerManifest:
    """The manifest of a server bundle.

    Attributes:
        wire: what the bodies take and give.
        precision: in which they compute.
        bodies: the names of their files: one graph for each, in the server's order; or in the format ``torch`` the
            program of all and their stacked tensors.
        format: of the bodies.
    """

    wire: WireSpec
    precision: Precision
    bodies: tuple[str, ...]
    files: Mapping[str, FileEntry]
    format: BodiesFormat = "onnx"


@dataclass(frozen=True, kw_only=True)
class PartySpec:
    """One operator of a client: which of the N nets it holds, and how to know its server.

    Attributes:
        bodies_id: of its server bundle; with one operator the wire's.
        num_nets: how many nets it holds; the parties' nets follow one another in the wire's order.
        server_public_key: the CURVE key of its server, 40 characters of Z85, or None for a plaintext bundle.
        channels: which of the codes' channels it is sent, the first and the one after the last; None: all.
    """

    bodies_id: str
    num_nets: int
    server_public_key: str | None
    channels: tuple[int, int] | None = None

    def bytes_up(self, wire: WireSpec) -> int:
        """Returns the bytes of what it is sent of one image."""
        shape = wire.feature_shape
        if self.channels is not None:
            shape = (self.channels[1] - self.channels[0], *shape[1:])
        return packed_row_bytes(shape, wire.feature_codec.bits)


@dataclass(frozen=True, kw_only=True)
class SealSpec:
    """How the models of a client bundle are encrypted at rest; nothing in it is secret (edge_runtime/sealing.py).

    Attributes:
        kdf: ``hkdf-sha256`` makes the bundle's key from a key file, ``scrypt`` from a passphrase.
        salt: 32 random bytes of this bundle alone, as 64 hexadecimal digits.
        log2_n: of scrypt's cost N; 0 for ``hkdf-sha256``.
        p: scrypt's parallelisation; 0 for ``hkdf-sha256``. Its r is 8.
    """

    kdf: Kdf
    salt: str
    log2_n: int = 0
    p: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """The names of head and tail in one format: uint8 image to wire codes, and the N answers' codes to logits."""

    head: str
    tail: str

    @property
    def format(self) -> ModelFormat:
        """What the names say: ``tflite`` or ``onnx``."""
        return "tflite" if ".tflite" in self.head else "onnx"


@dataclass(frozen=True, kw_only=True)
class ClientManifest:
    """The manifest of a client bundle.

    Attributes:
        wire: as in the server bundle that this client fits.
        image: what the head takes.
        labels: the class names, index = class.
        noise_mode: ``fixed`` (a constant of the head graph), ``fresh`` (drawn for each image), ``drawn`` (one of
            several constants for each image) or ``none``.
        noise_std: the standard deviation of the noise, in units of the head's features.
        models: head and selector + tail, in one format or in both; the first is the bundle's default.
        parties: the operators, one or several.
        encryption: how head and tail are encrypted at rest; None: they are not.
        noise_law: of ``fresh`` noise.
        noise_tensors: of ``drawn`` noise, how many there are; else 0.
        dropout: the share of the features that is sent as 0.0, drawn for each image.
    """

    wire: WireSpec
    image: ImageSpec
    labels: tuple[str, ...]
    noise_mode: NoiseMode
    noise_std: float
    precision: Precision
    models: tuple[ModelPair, ...]
    parties: tuple[PartySpec, ...]
    files: Mapping[str, FileEntry]
    encryption: SealSpec | None = None
    noise_law: NoiseLaw = "gaussian"
    noise_tensors: int = 0
    dropout: float = 0.0

    def pair(self, wanted: ModelFormat) -> ModelPair:
        """Returns the models in a format that the bundle has."""
        return next(pair for pair in self.models if pair.format == wanted)

    def bound(self) -> bytes:
        """Returns what a sealed file is bound to: all but the files' digests, which are those of the sealed files."""
        return to_json(replace(self, files={}))


def digest(manifest: ServerManifest | ClientManifest) -> str:
    """Returns the SHA-256 of a manifest, which names every file's own, in hexadecimal: what tells two bundles apart."""
    return hashlib.sha256(to_json(manifest)).hexdigest()


def to_json(manifest: ServerManifest | ClientManifest) -> bytes:
    """Returns the canonical bytes of a manifest: sorted keys, no timestamp, so equal manifests are equal files."""
    wire = manifest.wire
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "wire": {
            "bodies_id": wire.bodies_id,
            "feature_shape": list(wire.feature_shape),
            "feature_codec": _codec_json(wire.feature_codec),
            "answer_width": wire.answer_width,
            "answer_codecs": [_codec_json(codec) for codec in wire.answer_codecs],
        },
        "precision": manifest.precision,
        "files": {
            name: {"size_bytes": entry.size_bytes, "sha256": entry.sha256} for name, entry in manifest.files.items()
        },
    }
    if isinstance(manifest, ServerManifest):
        document |= {"kind": "server", "bodies": list(manifest.bodies)}
        if manifest.format != "onnx":
            document[_BODIES_FORMAT] = manifest.format
    else:
        document |= {
            "kind": "client",
            "image": {"height": manifest.image.height, "width": manifest.image.width},
            "labels": list(manifest.labels),
            "noise_mode": manifest.noise_mode,
            "noise_std": manifest.noise_std,
            "head": manifest.models[0].head,
            "tail": manifest.models[0].tail,
            "parties": [
                {
                    "bodies_id": party.bodies_id,
                    "num_nets": party.num_nets,
                    "server_public_key": party.server_public_key,
                    **({} if party.channels is None else {"channels": list(party.channels)}),
                }
                for party in manifest.parties
            ],
            "encryption": None if manifest.encryption is None else seal_json(manifest.encryption),
        }
        # Written where they say something, so that the manifests of before keep their bytes, which sealed files bind.
        for name, usual in _OPTIONAL.items():
            if getattr(manifest, name) != usual:
                document[name] = getattr(manifest, name)
        if len(manifest.models) > 1:
            document[_ALSO] = {"head": manifest.models[1].head, "tail": manifest.models[1].tail}
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _codec_json(codec: AffineCodec) -> dict[str, Any]:
    return {"codec": codec.name, "scale": codec.scale, "zero_point": codec.zero_point}


def seal_json(seal: SealSpec) -> dict[str, Any]:
    """Returns how a manifest states it."""
    document: dict[str, Any] = {"cipher": CIPHER, "kdf": seal.kdf, "salt": seal.salt}
    if seal.kdf == "scrypt":
        document |= {"log2_n": seal.log2_n, "r": SCRYPT_R, "p": seal.p}
    return document


def parse_client(data: bytes, source: str = MANIFEST_NAME) -> ClientManifest:
    """Reads and validates a client manifest.

    Args:
        data: the file's bytes.
        source: how errors name the file.

    Raises:
        BundleVersionError: another version of the format.
        BundleError: anything else that is wrong, with the field's name.
    """
    reader = opened(data, source, "client")
    reader.document = _OPTIONAL | reader.document
    mode: NoiseMode = reader.choice("noise_mode", ("none", "fixed", "fresh", "drawn"))
    files = reader.files()
    wire = reader.wire()
    image = reader.child("image")
    std = reader.get("noise_std", lambda v: isinstance(v, int | float) and 0 <= v < 1e6)
    return ClientManifest(
        wire=wire,
        image=ImageSpec(height=image.integer("height", 1, 1 << 14), width=image.integer("width", 1, 1 << 14)),
        labels=tuple(reader.strings("labels", MAX_LABELS)),
        noise_mode=mode,
        noise_std=float(std),
        precision=reader.choice("precision", ("int8", "float32")),
        models=reader.models(files),
        parties=reader.parties(wire),
        files=files,
        encryption=reader.encryption(),
        noise_law=reader.choice("noise_law", ("gaussian", "uniform")),
        noise_tensors=reader.integer("noise_tensors", *((1, MAX_NOISE_TENSORS) if mode == "drawn" else (0, 0))),
        dropout=float(reader.get("dropout", lambda v: isinstance(v, int | float) and 0 <= v < 1)),
    )


def parse_server(data: bytes, source: str = MANIFEST_NAME) -> ServerManifest:
    """Reads and validates a server manifest; arguments and errors as ``parse_client``."""
    reader = opened(data, source, "server")
    files = reader.files()
    wire = reader.wire()
    reader.document = {_BODIES_FORMAT: "onnx"} | reader.document
    bodies_format: BodiesFormat = reader.choice(_BODIES_FORMAT, ("onnx", "torch"))
    count = wire.num_nets if bodies_format == "onnx" else 2
    bodies = tuple(reader.strings("bodies", MAX_NETS))
    if len(set(bodies)) != len(bodies) or len(bodies) != count or not files.keys() >= set(bodies):
        raise reader.error("bodies", f"does not name {count} of the bundle's files")
    return ServerManifest(
        wire=wire,
        precision=reader.choice("precision", ("int8", "float32")),
        bodies=bodies,
        files=files,
        format=bodies_format,
    )


def load_client(folder: Path) -> ClientManifest:
    """Reads the manifest of the client bundle ``folder`` and verifies every file against its digest.

    Raises:
        BundleError: missing, malformed, of another version or tampered with; see the subclasses.
    """
    return load_folder(folder, parse_client)


def load_server(folder: Path) -> ServerManifest:
    """Reads the manifest of the server bundle ``folder`` and verifies every file; errors as ``load_client``."""
    return load_folder(folder, parse_server)


def of_crypto(folder: Path) -> bool:
    """Whether a folder looks like a bundle of crypto-clear inference; what is wrong with one is said at its loading."""
    try:
        require_regular(folder / MANIFEST_NAME)
        with (folder / MANIFEST_NAME).open("rb") as stream:
            document = json.loads(stream.read(MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError, BundleError):
        return False
    return isinstance(document, dict) and document.get("format") == CRYPTO_FORMAT


def describe_file(path: Path) -> FileEntry:
    """Returns the size and digest of ``path``."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(size_bytes=path.stat().st_size, sha256=digest)


def is_curve_key(text: str) -> bool:
    """Returns whether ``text`` stands for a CURVE key: 40 characters of Z85, each five of them below 2^32."""
    digits = [_Z85.find(character) for character in text]
    if len(digits) != 40 or min(digits) < 0:
        return False
    groups = (digits[start : start + 5] for start in range(0, 40, 5))
    return all(sum(digit * 85**power for power, digit in enumerate(reversed(group))) < 1 << 32 for group in groups)


def load_folder(folder: Path, parse: Callable[[bytes, str], T]) -> T:
    """Reads the manifest of a bundle and verifies every file; errors as ``load_client``, and what ``parse`` raises."""
    path = folder / MANIFEST_NAME
    try:
        if not folder.is_dir():
            raise BundleError(f"no bundle at {folder}: it is not a folder; ensembler-export makes one")
        if not path.exists():
            raise BundleError(_without_manifest(folder, parse))
        require_regular(path)
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes: not a manifest")
        manifest = parse(path.read_bytes(), str(path))
        _verify(folder, manifest.files)  # type: ignore[attr-defined]
    except FileNotFoundError as error:
        raise BundleError(
            f"the bundle {folder} is incomplete: {Path(error.filename).name} is missing; copy the whole folder again"
        ) from error
    except OSError as error:
        raise BundleError(f"the bundle {folder} cannot be read: {error.strerror}") from error
    return manifest


def _without_manifest(folder: Path, parse: Callable[[bytes, str], object]) -> str:
    """Says what a folder is that has no manifest, and what to give or do instead."""
    within = [path for path in sorted(folder.glob(f"*/{MANIFEST_NAME}")) if _is_kind(path, parse)]
    if within:
        return f"{folder} is no bundle, but holds some: give {' or '.join(str(path.parent) for path in within[:4])}"
    if (folder / "config.json").is_file() and (folder / "stage1").is_dir():
        return f"{folder} is a run of ensembler train and no bundle; ensembler-export {folder} --out bundles makes them"
    return (
        f"{folder} is no bundle, or incomplete: {MANIFEST_NAME} is missing; give a folder that ensembler-export made, "
        "and copy it whole"
    )


def _is_kind(path: Path, parse: Callable[[bytes, str], object]) -> bool:
    """Whether a manifest is one that ``parse`` takes."""
    try:
        require_regular(path)
        with path.open("rb") as stream:
            parse(stream.read(MAX_MANIFEST_BYTES), str(path))
    except (OSError, BundleError):
        return False
    return True


def _verify(folder: Path, files: Mapping[str, FileEntry]) -> None:
    for name, expected in files.items():
        require_regular(folder / name)
        found = describe_file(folder / name)
        if found != expected:
            raise BundleTamperedError(
                f"{folder / name} is not the file that was exported (its SHA-256 differs from the manifest's); "
                "copy the bundle again, or export it again"
            )


def require_regular(path: Path) -> None:
    """Refuses a pipe or a device, which might never end to be read, or a folder."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise BundleError(f"{path} cannot be read: it is not a file; copy the bundle again")


def opened(data: bytes, source: str, kind: str, form: str = FORMAT) -> Reader:
    """Returns a reader of a manifest of this package's version.

    Args:
        data: the file's bytes.
        source: how errors name the file.
        kind: ``client`` or ``server``.
        form: what the manifest calls its format.

    Raises:
        BundleVersionError: another version of the format.
        BundleError: another format or kind, or not JSON.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not JSON; copy the bundle again") from error
    reader = Reader(document, source, "")
    found = document.get("format") if isinstance(document, dict) else None
    if found in (FORMAT, CRYPTO_FORMAT) and found != form:
        other = "split" if form == CRYPTO_FORMAT else "crypto-clear"
        raise BundleError(f"{source} belongs to a bundle of {other} inference, which this does not take")
    if found != form:
        raise BundleError(f"{source} is not the manifest of an Ensembler bundle")
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise BundleVersionError(
            f"{source} has bundle version {str(version)[:20]}, this package reads version {VERSION}; "
            "export again, or install the matching ensembler-edge"
        )
    if document.get("kind") != kind:
        raise BundleError(
            f"{source} belongs to a {str(document.get('kind'))[:20]} bundle, a {kind} bundle is needed here"
        )
    return reader


class Reader:
    """Reads fields of one JSON object; every refusal names the file and the field."""

    def __init__(self, document: Any, source: str, prefix: str) -> None:
        self.document = document
        self.source = source
        self.prefix = prefix

    def error(self, name: str, problem: str) -> BundleError:
        """Returns the error that names the file and the field."""
        return BundleError(f"{self.source}: {self.prefix}{name} {problem}")

    def get(self, name: str, valid: Callable[[Any], bool]) -> Any:
        """Returns a field's value if it is there and ``valid`` says so."""
        if name not in self.document:
            raise self.error(name, "is missing")
        value = self.document[name]
        if isinstance(value, bool) or not valid(value):
            raise self.error(name, "has an invalid value")
        return value

    def child(self, name: str) -> Reader:
        """Returns a reader of a field that is an object."""
        return Reader(self.get(name, lambda v: isinstance(v, dict)), self.source, f"{self.prefix}{name}.")

    def integer(self, name: str, low: int, high: int) -> int:
        """Returns an integer within bounds, both of them included."""
        return int(self.get(name, lambda v: isinstance(v, int) and low <= v <= high))

    def choice(self, name: str, choices: tuple[str, ...]) -> Any:
        """Returns a field that is one of ``choices``."""
        return self.get(name, lambda v: v in choices)

    def strings(self, name: str, limit: int) -> list[str]:
        """Returns a field that is a list of 1 to ``limit`` texts."""
        items: list[str] = self.get(
            name,
            lambda v: (
                isinstance(v, list)
                and 1 <= len(v) <= limit
                and all(isinstance(s, str) and len(s) <= MAX_LABEL_CHARACTERS for s in v)
                and not any(_SURROGATE.search(s) for s in v)  # JSON can state half a pair, UTF-8 cannot
            ),
        )
        return items

    def file_name(self, name: str, files: Mapping[str, FileEntry]) -> str:
        """Returns a field that names one of the bundle's files."""
        return str(self.get(name, lambda v: isinstance(v, str) and v in files))

    def models(self, files: Mapping[str, FileEntry]) -> tuple[ModelPair, ...]:
        """Returns head and tail, in one format or both."""
        readers = [self, self.child(_ALSO)] if _ALSO in self.document else [self]
        pairs = tuple(ModelPair(head=r.file_name("head", files), tail=r.file_name("tail", files)) for r in readers)
        if len({pair.format for pair in pairs}) != len(pairs):
            raise self.error(_ALSO, "has models of the same format as head and tail")
        return pairs

    def files(self) -> dict[str, FileEntry]:
        """Returns the files and their digests."""
        entries = self.child("files")
        result = {}
        for name in entries.document:
            # Names only: a manifest must not reach outside its folder.
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name == MANIFEST_NAME:
                raise self.error("files", "holds a name that is not a plain file name")
            entry = entries.child(name)
            result[name] = FileEntry(
                size_bytes=entry.integer("size_bytes", 0, MAX_FILE_BYTES), sha256=entry.hexadecimal("sha256")
            )
        return result

    def hexadecimal(self, name: str) -> str:
        """Returns 64 hexadecimal digits."""
        return str(self.get(name, lambda v: isinstance(v, str) and re.fullmatch(r"[0-9a-f]{64}", v) is not None))

    def codec(self, value: Any, name: str) -> AffineCodec:
        """Returns a codec."""
        reader = Reader(value, self.source, f"{self.prefix}{name}.")
        if not isinstance(value, dict):
            raise self.error(name, "is not an object")
        bits = CODEC_BITS[reader.choice("codec", tuple(CODEC_BITS))]
        scale = reader.get("scale", lambda v: isinstance(v, int | float))
        try:
            return AffineCodec(scale=float(scale), zero_point=reader.integer("zero_point", 0, 2**bits - 1), bits=bits)
        except (ConfigError, OverflowError) as error:
            raise reader.error("scale", "is not a positive float32 value") from error

    def parties(self, wire: WireSpec) -> tuple[PartySpec, ...]:
        """Returns the operators."""
        items = self.get("parties", lambda v: isinstance(v, list) and 1 <= len(v) <= wire.num_nets)
        found = []
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise self.error(f"parties[{index}]", "is not an object")
            reader = Reader(item, self.source, f"{self.prefix}parties[{index}].")
            found.append(
                PartySpec(
                    bodies_id=reader.hexadecimal("bodies_id"),
                    num_nets=reader.integer("num_nets", 1, wire.num_nets),
                    server_public_key=reader.get(
                        "server_public_key", lambda v: v is None or (isinstance(v, str) and is_curve_key(v))
                    ),
                    channels=reader.channels(wire),
                )
            )
        if sum(party.num_nets for party in found) != wire.num_nets:
            raise self.error("parties", f"do not hold {wire.num_nets} nets together")
        if len(found) == 1 and found[0].bodies_id != wire.bodies_id:
            raise self.error("parties", "name other nets than wire.bodies_id")
        divided = sorted(party.channels for party in found if party.channels is not None)
        if divided and len(divided) < len(found):
            raise self.error("parties", "give the channels of some operators only; one of them would hear all")
        if any(following[0] < before[1] for before, following in itertools.pairwise(divided)):
            raise self.error("parties", "are sent the same channels, which are divided among them")
        return tuple(found)

    def channels(self, wire: WireSpec) -> tuple[int, int] | None:
        """Returns which channels an operator is sent; None: all."""
        if "channels" not in self.document:
            return None
        count = wire.feature_shape[0]
        first, end = self.get(
            "channels",
            lambda v: (
                isinstance(v, list) and len(v) == 2 and all(type(n) is int for n in v) and 0 <= v[0] < v[1] <= count
            ),
        )
        return first, end

    def encryption(self) -> SealSpec | None:
        """Returns how the models are encrypted, None: they are not."""
        if self.get("encryption", lambda v: v is None or isinstance(v, dict)) is None:
            return None
        seal = self.child("encryption")
        seal.choice("cipher", (CIPHER,))
        kdf: Kdf = seal.choice("kdf", ("hkdf-sha256", "scrypt"))
        salt = seal.hexadecimal("salt")
        if kdf == "hkdf-sha256":
            return SealSpec(kdf=kdf, salt=salt)
        seal.integer("r", SCRYPT_R, SCRYPT_R)
        log2_n = seal.integer("log2_n", MIN_SCRYPT_LOG2_N, MAX_SCRYPT_LOG2_N)
        return SealSpec(kdf=kdf, salt=salt, log2_n=log2_n, p=seal.integer("p", 1, MAX_SCRYPT_P))

    def wire(self) -> WireSpec:
        """Returns what travels."""
        wire = self.child("wire")
        shape = wire.get(
            "feature_shape",
            lambda v: isinstance(v, list) and 1 <= len(v) <= 4 and all(type(n) is int and 0 < n <= MAX_AXIS for n in v),
        )
        if math.prod(shape) > LIMITS.tensor_bytes:
            raise wire.error("feature_shape", f"has more than {LIMITS.tensor_bytes} values; a message holds no more")
        codecs = wire.get("answer_codecs", lambda v: isinstance(v, list) and 1 <= len(v) <= MAX_NETS)
        answer_codecs = tuple(wire.codec(codec, f"answer_codecs[{i}]") for i, codec in enumerate(codecs))
        if len({codec.bits for codec in answer_codecs}) > 1:
            raise wire.error("answer_codecs", "mixes codecs of several bits; the answers travel as one tensor")
        width = wire.integer("answer_width", 1, MAX_AXIS)
        if width * len(answer_codecs) > LIMITS.tensor_bytes:
            raise wire.error(
                "answer_width",
                f"times {len(answer_codecs)} nets is more than {LIMITS.tensor_bytes} values; a message holds no more",
            )
        return WireSpec(
            bodies_id=wire.hexadecimal("bodies_id"),
            feature_shape=tuple(shape),
            feature_codec=wire.codec(wire.document.get("feature_codec"), "feature_codec"),
            answer_width=width,
            answer_codecs=answer_codecs,
        )
