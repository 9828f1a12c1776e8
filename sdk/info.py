"""What a program may show about its client: everything of the bundle that is no secret."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.protocol.codec import packed_row_bytes
from ensembler.protocol.errors import BundleError
from ensembler.protocol.manifest import MAX_MANIFEST_BYTES, ClientManifest, NoiseMode, Precision, require_regular

PRIVACY_NAME = "privacy.json"


@dataclass(frozen=True, kw_only=True)
class ClientInfo:
    """Facts about one client. No key, no noise, nothing of the selector: it may be shown and logged.

    Attributes:
        bundle: the folder.
        bodies_id: 64 hexadecimal digits, which nets the server must hold.
        num_nets: N.
        image_size: (height, width) in pixels of what the head takes.
        num_labels: K.
        feature_shape: of one image, ``(C, h, w)``.
        codec: the wire codec of the features.
        payload_bytes_up: for one image, without headers, to all operators together.
        payload_bytes_down: for one image, the answers of all N nets, without headers.
        precision: of head and tail.
        noise_mode: ``fixed``, ``fresh`` or ``none``.
        backend: the inference runtime.
        servers: the addresses.
        encrypted: whether the connections are.
        privacy: the bundle's privacy card (``privacy.json``), as it stands there; None if it has none.
    """

    bundle: str
    bodies_id: str
    num_nets: int
    image_size: tuple[int, int]
    num_labels: int
    feature_shape: tuple[int, ...]
    codec: str
    payload_bytes_up: int
    payload_bytes_down: int
    precision: Precision
    noise_mode: NoiseMode
    backend: str
    servers: tuple[str, ...]
    encrypted: bool
    privacy: dict[str, Any] | None


def describe(
    bundle: Path, manifest: ClientManifest, *, backend: str, servers: tuple[str, ...], encrypted: bool
) -> ClientInfo:
    """Collects the facts; arguments as the attributes of ``ClientInfo``.

    Raises:
        BundleError: the privacy card cannot be read.
    """
    wire = manifest.wire
    return ClientInfo(
        bundle=str(bundle),
        bodies_id=wire.bodies_id,
        num_nets=wire.num_nets,
        image_size=(manifest.image.height, manifest.image.width),
        num_labels=len(manifest.labels),
        feature_shape=wire.feature_shape,
        codec=wire.feature_codec.name,
        payload_bytes_up=wire.bytes_up * len(manifest.parties),
        # Every operator's reply is filled up to whole bytes.
        payload_bytes_down=sum(
            packed_row_bytes((party.num_nets, wire.answer_width), wire.answer_bits) for party in manifest.parties
        ),
        precision=manifest.precision,
        noise_mode=manifest.noise_mode,
        backend=backend,
        servers=servers,
        encrypted=encrypted,
        privacy=_privacy(bundle / PRIVACY_NAME),
    )


def _privacy(path: Path) -> dict[str, Any] | None:
    try:
        require_regular(path)
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
        card = json.loads(data) if len(data) <= MAX_MANIFEST_BYTES else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON; copy the bundle again") from error
    if not isinstance(card, dict):
        raise BundleError(f"{path} is not a privacy card; copy the bundle again")
    return card
