"""What a program may show about its client: everything of the bundle that is no secret."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ensembler.edge_runtime.card import PrivacyCard, read_card
from ensembler.protocol.codec import packed_row_bytes
from ensembler.protocol.manifest import ClientManifest, NoiseMode, Precision


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
        noise_mode: ``fixed``, ``fresh``, ``drawn`` (one of several tensors for each image) or ``none``.
        dropout: the share of the features that is sent as 0.0, other ones for each image.
        backend: the inference runtime.
        servers: the addresses, one text for each operator; replicas are joined by commas.
        encrypted: whether the connections are.
        privacy: what the bundle's privacy card says, who signed it, and whether it is of these files; None if the
            bundle has none.
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
    dropout: float
    backend: str
    servers: tuple[str, ...]
    encrypted: bool
    privacy: PrivacyCard | None


def describe(
    bundle: Path, manifest: ClientManifest, *, backend: str, servers: tuple[str, ...], encrypted: bool
) -> ClientInfo:
    """Collects the facts; arguments as the attributes of ``ClientInfo``."""
    wire = manifest.wire
    return ClientInfo(
        bundle=str(bundle),
        bodies_id=wire.bodies_id,
        num_nets=wire.num_nets,
        image_size=(manifest.image.height, manifest.image.width),
        num_labels=len(manifest.labels),
        feature_shape=wire.feature_shape,
        codec=wire.feature_codec.name,
        payload_bytes_up=sum(party.bytes_up(wire) for party in manifest.parties),
        # Every operator's reply is filled up to whole bytes.
        payload_bytes_down=sum(
            packed_row_bytes((party.num_nets, wire.answer_width), wire.answer_bits) for party in manifest.parties
        ),
        precision=manifest.precision,
        noise_mode=manifest.noise_mode,
        dropout=manifest.dropout,
        backend=backend,
        servers=servers,
        encrypted=encrypted,
        privacy=read_card(bundle, manifest),
    )
