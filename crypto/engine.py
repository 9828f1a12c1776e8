"""The seam between crypto-clear inference and what computes under two parties.

An engine runs a net's first layers on an image that only the client has with weights that only the server has, and
leaves each party with its own additive share of the result. Both parties make one, with a ``Link`` between them, and
call ``run`` at the same time. ``spu-cheetah`` is the real one; ``insecure-plain`` sends the image to the server in the
clear, for tests alone, and is never taken without being asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from ensembler.crypto.bundle import INSECURE, SPU, Settings
from ensembler.crypto.shares import Floats, Shares
from ensembler.crypto.steps import Step
from ensembler.protocol.errors import ConfigError, MissingExtraError

Rank = Literal[0, 1]
SERVER: Rank = 0
CLIENT: Rank = 1


class Link(Protocol):
    """Bytes to and from the other party, by names; may be used by several threads."""

    def send(self, key: str, data: bytes) -> None:
        """Sends; returns when the bytes are on their way.

        Raises:
            ServerUnreachableError: the other party has gone.
        """

    def receive(self, key: str) -> bytes:
        """Waits for what the other party sends under ``key``; errors as ``send``."""


class Engine(Protocol):
    """One party's half. Made by ``open_engine``; used by one thread."""

    def run(self, image: Floats | None, told: Callable[[int], None]) -> Shares:
        """Computes all steps together with the other party.

        Args:
            image: the client's, normalised, ``(1, 3, H, W)`` float32; None at the server.
            told: called with the number of steps that are done.

        Returns:
            This party's share of the last step's output.
        """


def require_installed(settings: Settings) -> None:
    """Refuses settings whose engine is not here, before anything waits for it.

    Raises:
        MissingExtraError: it is not.
    """
    if settings.engine == SPU and importlib.util.find_spec("spu") is None:
        raise MissingExtraError("spu", "crypto", "crypto-clear inference")


def open_engine(
    settings: Settings,
    link: Link,
    rank: Rank,
    steps: Sequence[Step],
    weights: Path | None,
    image_shape: tuple[int, ...],
) -> Engine:
    """Makes a party's half; both must be making theirs, since setting up is a conversation.

    Args:
        settings: of the bundle; equal on both sides.
        link: to the other party.
        rank: which of the two this is.
        steps: the layers.
        weights: the server's file of them; None at the client.
        image_shape: ``(1, 3, H, W)``.

    Raises:
        ConfigError: an engine of no such name.
        MissingExtraError: the engine is not installed.
    """
    if settings.engine == INSECURE:
        from ensembler.crypto.insecure import InsecureEngine

        return InsecureEngine(settings, link, rank, steps, weights, image_shape)
    if settings.engine == SPU:
        from ensembler.crypto.spu_engine import SpuEngine

        return SpuEngine(settings, link, rank, steps, weights, image_shape)
    raise ConfigError(f"there is no engine {settings.engine!r} for two parties: {SPU}, {INSECURE}")
