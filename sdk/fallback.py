"""What answers on the device while the cloud is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from ensembler.edge_runtime.images import ImageLike
from ensembler.prediction import Prediction
from ensembler.protocol.errors import (
    AuthenticationError,
    BusyError,
    ConfigError,
    EnsemblerError,
    ShuttingDownError,
    TransportError,
)

Fallback: TypeAlias = Callable[[ImageLike, EnsemblerError], Prediction]


def cloud_is_away(error: EnsemblerError) -> bool:
    """Returns whether waiting may cure ``error``: no connection, no answer in time, a full or a stopping server.

    Everything else is raised also where there is a fallback: an image, a bundle, a key that is not authorised, a server
    that fails or holds other nets. Somebody has to mend that, and a fallback would hide it.
    """
    return isinstance(error, TransportError | BusyError | ShuttingDownError) and not isinstance(
        error, AuthenticationError
    )


def answer_locally(fallback: Fallback, image: ImageLike, error: EnsemblerError, started: float) -> Prediction:
    """Asks ``fallback`` for one image.

    Args:
        fallback: the application's.
        image: as it was given to the client.
        error: why the cloud gave no answer.
        started: of the call, on the clock of ``time.monotonic()``.

    Returns:
        Its prediction, marked as such, with the whole call's time.

    Raises:
        ConfigError: it returned something else.
    """
    found = fallback(image, error)
    if not isinstance(found, Prediction):
        raise ConfigError(f"fallback returned {type(found).__name__}; return Prediction.local(label, score)")
    total = 1000 * (time.monotonic() - started)
    return replace(found, source="fallback", timings=replace(found.timings, total=total))
