"""A transport without a network: the handler runs in the caller's thread. For tests of what lies above it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ensembler.protocol.errors import DeadlineExceededError
from ensembler.transport.base import Frames

T = TypeVar("T")
Handler = Callable[[Frames], list[Frames]]


class InProcessTransport:
    """Gives every request to ``handler``, which returns the messages that come back, in order."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def connect(self) -> InProcessConnection:
        """See ``Transport``."""
        return InProcessConnection(self._handler)

    def close(self) -> None:
        """See ``Transport``."""


class InProcessConnection:
    """See ``Connection``; a handler that returns nothing acceptable counts as a passed deadline."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._replies: list[Frames] = []

    def usable(self) -> bool:
        """See ``Connection``."""
        return True

    def send(self, request: Frames) -> None:
        """See ``Connection``; returns when the handler does."""
        self._replies = self._handler([bytes(frame) for frame in request])

    def receive(self, accept: Callable[[Frames], T | None], until: float) -> T | None:  # noqa: ARG002
        """See ``Connection``."""
        for reply in self._replies:
            accepted = accept(reply)
            if accepted is not None:
                return accepted
        raise self.silence()

    def silence(self) -> DeadlineExceededError:
        """See ``Connection``."""
        return DeadlineExceededError("the in-process handler gave no answer to this request")

    def close(self) -> None:
        """See ``Connection``."""
