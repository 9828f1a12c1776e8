"""What a server holds: models by their ``bodies_id``, and of each the version that computes.

Two versions of a model compute the same nets, for instance in int8 and in float32; any client of the one may be
answered by the other. Versions are told apart by the digest of their manifest, which names every file's digest.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from ensembler.cloud_runtime.engine import Engine
from ensembler.protocol.errors import BundleMismatchError, ConfigError
from ensembler.protocol.manifest import digest

# Of a digest or a bodies_id, in lines for people.
SHOWN_DIGITS = 12


@dataclass(eq=False)
class Version:
    """One loaded server bundle.

    Attributes:
        engine: computes.
        digest: SHA-256 of its manifest, in hexadecimal.
        computing: batches that it has now.
        retired: it gets no more; it is closed when it has none left.
        unloaded: done when it is closed.
    """

    engine: Engine
    digest: str
    computing: int = 0
    retired: bool = False
    unloaded: Future[None] = field(default_factory=Future)

    @property
    def free(self) -> bool:
        """Whether it can take another batch."""
        return self.computing < self.engine.lanes


class Model:
    """The nets of one ``bodies_id``.

    Attributes:
        bodies_id: in hexadecimal.
        key: the same in bytes, as in requests.
        wire: what features and answers look like; the same for all its versions.
        version: computes what comes now.
        leaving: it takes no more requests, and is gone when none wait.
    """

    def __init__(self, engine: Engine) -> None:
        self.wire = engine.manifest.wire
        self.bodies_id = self.wire.bodies_id
        self.key = bytes.fromhex(self.bodies_id)
        self.version = version_of(engine)
        self.leaving = False

    def replace(self, engine: Engine) -> Version:
        """Lets another version compute; returns the one before.

        Raises:
            BundleMismatchError: its features or answers look otherwise, so the clients would misread it.
        """
        if engine.manifest.wire != self.wire:
            raise BundleMismatchError(
                f"both bundles have the bodies_id {self.bodies_id[:SHOWN_DIGITS]}, but not the same codecs and sizes; "
                "export both from the same run"
            )
        before, self.version = self.version, version_of(engine)
        self.leaving = False
        return before


def version_of(engine: Engine) -> Version:
    """Returns a version that computes nothing yet."""
    return Version(engine, digest(engine.manifest))


def find(models: dict[bytes, Model], prefix: str) -> Model:
    """Returns the model whose ``bodies_id`` begins so.

    Raises:
        ConfigError: none does, or several do.
    """
    found = [model for model in models.values() if model.bodies_id.startswith(prefix)]
    if len(found) != 1 or not prefix:
        held = ", ".join(model.bodies_id[:SHOWN_DIGITS] for model in models.values()) or "none"
        raise ConfigError(f"{prefix!r} is not the beginning of exactly one bodies_id; the server holds {held}")
    return found[0]
