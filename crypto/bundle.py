"""The two bundles of crypto-clear inference: a server's, and a client's without any weight of the first layers.

The folders are like those of split inference (``protocol.manifest``), with another format in the manifest. Whether a
client fits a server is told by ``net_id``, 32 random bytes of one export: a digest of the weights would let a client
confirm a guess of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ensembler.crypto import steps as layers
from ensembler.crypto.steps import Step
from ensembler.protocol.errors import BundleError, ConfigError
from ensembler.protocol.manifest import (
    CRYPTO_FORMAT,
    MAX_LABELS,
    VERSION,
    FileEntry,
    ImageSpec,
    Reader,
    SealSpec,
    is_curve_key,
    load_folder,
    opened,
    seal_json,
)

SPU, INSECURE = "spu-cheetah", "insecure-plain"
ENGINES = (SPU, INSECURE)
# Bits of the ring: fraction bits that are taken where nothing is said, and the most.
RINGS = {64: (18, 24), 32: (12, 13)}
LEAST_FRACTION_BITS = 8
STEPS_FILE = "steps.bin"
SUFFIX_FILE = "suffix.onnx"
TAIL_FILE = "tail.onnx"
SEALED_TAIL_FILE = "tail.onnx.sealed"
MAX_NOISE = 1000.0

# What happens after the layers under two parties. C2PI: the server gets the boundary and answers with logits.
CLEAR = "clear"
# The server gets the boundary and answers with what its N bodies say of it; selector and tail are the client's.
ENSEMBLE = "ensemble"
# Nothing: all layers are computed by the two, and the logits revealed to the client alone.
FULL = "full"
MODES = (CLEAR, ENSEMBLE, FULL)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the two parties compute.

    Attributes:
        engine: one of ``ENGINES``.
        ring_bits: of the integers that are computed with. 32 is about twice as fast as 64 with four times the bytes,
            since the engine packs no ciphertexts then; it has less room for large numbers, and for fractions.
        fraction_bits: f of the fixed-point numbers.
    """

    engine: str = SPU
    ring_bits: int = 64
    fraction_bits: int = 18

    @property
    def field(self) -> str:
        """The ring, as SPU calls it."""
        return f"FM{self.ring_bits}"


@dataclass(frozen=True, kw_only=True)
class CryptoManifest:
    """What both bundles state.

    Attributes:
        kind: ``client`` or ``server``.
        mode: one of ``MODES``.
        net_id: 64 hexadecimal digits.
        settings: see there.
        image: what the net takes.
        pixel_scale: a pixel p is the number ``(p - pixel_zero_point) * pixel_scale``.
        pixel_zero_point: see there.
        labels: the class names, index = class.
        boundary: the name of the cut, for people.
        boundary_shape: of what is revealed, without the batch.
        answer_shape: of what the client gets, ``(K,)`` logits or the ``(N, F)`` answers of N bodies.
        noise_magnitude: the client's noise on its share is uniform in plus or minus this.
        server_public_key: pinned in a client's; None for plaintext, and in a server's.
        files: with their digests.
        encryption: of the tail in a client's bundle; None: it has none, or it is not encrypted.
    """

    kind: str
    mode: str
    net_id: str
    settings: Settings
    image: ImageSpec
    pixel_scale: float
    pixel_zero_point: int
    labels: tuple[str, ...]
    boundary: str
    boundary_shape: tuple[int, ...]
    answer_shape: tuple[int, ...]
    noise_magnitude: float
    server_public_key: str | None
    files: Mapping[str, FileEntry]
    encryption: SealSpec | None = None

    @property
    def tail_file(self) -> str | None:
        """The file with selector and tail; None: the bundle has none."""
        return next((name for name in (TAIL_FILE, SEALED_TAIL_FILE) if name in self.files), None)

    def bound(self) -> bytes:
        """Returns what a sealed file is bound to: all but the files' digests."""
        return to_json(replace(self, files={}))

    @property
    def num_nets(self) -> int:
        """N, of the bodies after the boundary; 1 where there is one net."""
        return self.answer_shape[0] if self.mode == ENSEMBLE else 1

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """Of the engine's input."""
        return (1, 3, self.image.height, self.image.width)


def files_of(kind: str, mode: str, engine: str, *, sealed: bool = False) -> list[str]:
    """Returns the names of a bundle's files beside its manifest."""
    if kind == "client":
        tail = SEALED_TAIL_FILE if sealed else TAIL_FILE
        return [STEPS_FILE, tail] if mode == ENSEMBLE else [STEPS_FILE]
    own = [STEPS_FILE, weights_file(engine)]
    return own if mode == FULL else [*own, SUFFIX_FILE]


def weights_file(engine: str) -> str:
    """Returns the name of the file with a server's weights of the steps."""
    return "prefix.onnx" if engine == INSECURE else "weights.npz"


def require_protection(manifest: CryptoManifest, folder: Path, allow_insecure: bool) -> None:
    """Refuses a bundle of the engine without protection, unless it was asked for.

    Raises:
        ConfigError: it was not.
    """
    if manifest.settings.engine == INSECURE and not allow_insecure:
        raise ConfigError(
            f"{folder} was exported with {INSECURE}, which sends the image to the server as it is: for tests alone; "
            "export it again without --insecure-engine, or allow it (--insecure-engine, insecure_engine=True)"
        )


def to_json(manifest: CryptoManifest) -> bytes:
    """Returns the canonical bytes of a manifest."""
    document: dict[str, Any] = {"format": CRYPTO_FORMAT, "version": VERSION, **asdict(manifest)}
    del document["encryption"]
    if manifest.encryption is not None:  # written where there is one, as before there was any
        document["encryption"] = seal_json(manifest.encryption)
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_client(data: bytes, source: str) -> CryptoManifest:
    """Reads and validates a client's manifest; errors as ``protocol.manifest.parse_client``."""
    return _parse(data, source, "client")


def parse_server(data: bytes, source: str) -> CryptoManifest:
    """Reads and validates a server's manifest; errors as ``protocol.manifest.parse_client``."""
    return _parse(data, source, "server")


def load_client(folder: Path) -> tuple[CryptoManifest, tuple[Step, ...]]:
    """Reads a client's bundle and verifies every file; errors as ``protocol.manifest.load_client``."""
    manifest = load_folder(folder, parse_client)
    return manifest, _steps(folder, manifest)


def load_server(folder: Path) -> tuple[CryptoManifest, tuple[Step, ...]]:
    """Reads a server's bundle and verifies every file; errors as ``protocol.manifest.load_client``."""
    manifest = load_folder(folder, parse_server)
    return manifest, _steps(folder, manifest)


def _steps(folder: Path, manifest: CryptoManifest) -> tuple[Step, ...]:
    steps = layers.parse((folder / STEPS_FILE).read_bytes(), str(folder / STEPS_FILE))
    if manifest.settings.engine == INSECURE and len(steps) != 1:
        raise BundleError(f"{folder / STEPS_FILE}: {INSECURE} has one step; export the bundle again")
    if steps[-1].shape != (1, *manifest.boundary_shape):
        raise BundleError(f"{folder / STEPS_FILE} ends with another shape than the boundary's; export the bundle again")
    return steps


def _parse(data: bytes, source: str, kind: str) -> CryptoManifest:
    reader = opened(data, source, kind, CRYPTO_FORMAT)
    reader.document = {"encryption": None} | reader.document
    encryption = reader.encryption()
    files = reader.files()
    settings = reader.child("settings")
    engine = settings.choice("engine", ENGINES)
    ring_bits = settings.integer("ring_bits", min(RINGS), max(RINGS))
    if ring_bits not in RINGS:
        raise settings.error("ring_bits", f"is none of {', '.join(map(str, RINGS))}")
    mode = reader.choice("mode", MODES)
    if encryption is not None and (kind, mode) != ("client", ENSEMBLE):
        raise reader.error("encryption", "is of a bundle without a secret")
    needed = files_of(kind, mode, engine, sealed=encryption is not None)
    if files.keys() != set(needed):
        raise reader.error("files", f"are not {', '.join(needed)}")
    image = reader.child("image")
    labels = tuple(reader.strings("labels", MAX_LABELS))
    boundary_shape, answer_shape = _shape(reader, "boundary_shape"), _shape(reader, "answer_shape")
    if mode == ENSEMBLE:
        if len(answer_shape) != 2:
            raise reader.error("answer_shape", "is not of several bodies")
    elif answer_shape != (len(labels),):
        raise reader.error("answer_shape", f"is not of {len(labels)} classes")
    if mode == FULL and boundary_shape != answer_shape:
        raise reader.error("boundary_shape", "is not the answer's")
    return CryptoManifest(
        kind=kind,
        mode=mode,
        net_id=reader.hexadecimal("net_id"),
        settings=Settings(
            engine=engine,
            ring_bits=ring_bits,
            fraction_bits=settings.integer("fraction_bits", LEAST_FRACTION_BITS, RINGS[ring_bits][1]),
        ),
        image=ImageSpec(height=image.integer("height", 1, 1 << 12), width=image.integer("width", 1, 1 << 12)),
        pixel_scale=_number(reader, "pixel_scale", 1e3),
        pixel_zero_point=reader.integer("pixel_zero_point", 0, 255),
        labels=labels,
        boundary=_text(reader),
        boundary_shape=boundary_shape,
        answer_shape=answer_shape,
        noise_magnitude=_number(reader, "noise_magnitude", MAX_NOISE),
        server_public_key=reader.get(
            "server_public_key", lambda v: v is None or (isinstance(v, str) and is_curve_key(v))
        ),
        files=files,
        encryption=encryption,
    )


def _shape(reader: Reader, name: str) -> tuple[int, ...]:
    shape = reader.get(
        name,
        lambda v: isinstance(v, list) and 1 <= len(v) <= 4 and all(type(n) is int and 0 < n <= 1 << 20 for n in v),
    )
    if math.prod(shape) > layers.MAX_VALUES:
        raise reader.error(name, f"has more than {layers.MAX_VALUES} values")
    return tuple(shape)


def _number(reader: Reader, name: str, most: float) -> float:
    return float(reader.get(name, lambda v: isinstance(v, int | float) and 0 <= v < most))


def _text(reader: Reader) -> str:
    return str(reader.get("boundary", lambda v: isinstance(v, str) and 0 < len(v) <= 200 and v.isprintable()))
