"""What ``ensembler bench server --tune`` found best for a bundle on this machine, in a file beside the bundle.

``BUNDLE.profile.json`` stands next to the bundle's folder, whose files are all in its manifest. It holds no secret.
``serve`` takes from it what its options leave open, if it was made for these nets and this processor.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ensembler.protocol.errors import ConfigError
from ensembler.protocol.machine import processor
from ensembler.protocol.manifest import ServerManifest, digest
from ensembler.protocol.messages import LIMITS

MAX_BYTES = 4096
# Beyond it a number is a mistake.
MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An arrangement, and what it is good for.

    Attributes:
        processor: that was measured, see ``protocol.machine``.
        version: of the bundle, see ``protocol.manifest.digest``.
        threads: computing threads for all nets together.
        part_rows: images that a thread takes through one net at a time.
        max_batch_rows: images computed together; larger batches are hardly faster.
    """

    processor: str
    version: str
    threads: int
    part_rows: int
    max_batch_rows: int

    def misfit(self, manifest: ServerManifest) -> str | None:
        """Returns why it says nothing about these nets on this machine, or None."""
        if self.version != digest(manifest):
            return "it was made for other nets"
        here = processor()
        return None if self.processor == here else f"it was made on {self.processor}, and this is {here}"


def path_of(bundle: Path) -> Path:
    """Returns where the profile of a bundle is."""
    folder = bundle.resolve()
    return folder.with_name(folder.name + ".profile.json")


def load(bundle: Path) -> tuple[Profile | None, str | None]:
    """Returns the profile of a bundle, or None and, where there is a file, what is wrong with it.

    A server goes on without: a profile makes it faster and no more.
    """
    path = path_of(bundle)
    try:
        if not path.is_file():  # a pipe might never end to be read
            return None, None
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return None, f"it cannot be read: {error.strerror}"
    try:
        document = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and set(document) == {field.name for field in fields(Profile)}:
        bounds = {"threads": MAX_THREADS, "part_rows": LIMITS.rows, "max_batch_rows": LIMITS.rows}
        texts = all(type(document[name]) is str for name in ("processor", "version"))
        if texts and all(type(document[name]) is int and 1 <= document[name] <= most for name, most in bounds.items()):
            return Profile(**document), None
    return None, "it is not what that command writes"


def save(bundle: Path, profile: Profile) -> Path:
    """Writes the profile of a bundle and returns its path.

    Raises:
        ConfigError: it cannot be written.
    """
    path = path_of(bundle)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return path
