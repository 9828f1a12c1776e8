"""What ``EdgeClient.predict`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of one call went, in milliseconds.

    Attributes:
        head: preparing the image, the head, noise and quantiser, on the device.
        queue: waiting in the server.
        server: the N nets.
        network: everything between sending and receiving that the server does not account for.
        tail: selector, tail and softmax, on the device.
        total: the whole call.
    """

    head: float
    queue: float
    server: float
    network: float
    tail: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one image.

    Attributes:
        label: the most likely class's name.
        score: its probability.
        top_k: (name, probability) of the most likely classes, best first.
        probabilities: ``(K,)`` float32, sums to 1.
        logits: ``(K,)`` float32, before the softmax.
        request_id: 32 hexadecimal digits, the same for all images of one request.
        timings: of the call; the images of a batch share it.
        bytes_up: payload and header bytes sent for the whole request.
        bytes_down: received for it.
    """

    label: str
    score: float
    top_k: tuple[tuple[str, float], ...]
    probabilities: npt.NDArray[np.float32] = field(repr=False)
    logits: npt.NDArray[np.float32] = field(repr=False)
    request_id: str
    timings: Timings
    bytes_up: int
    bytes_down: int
