"""What ``EdgeClient.predict`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ensembler.protocol.errors import ConfigError

Source = Literal["cloud", "fallback"]


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
class LayerCost:
    """What one layer under two-party computation took at the device, for one image.

    Attributes:
        name: its place and its operator, as ONNX calls it.
        ms: until the device's engine was done with it.
        bytes_up: that the engine sent.
        bytes_down: that it was sent.
    """

    name: str
    ms: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class CryptoCost:
    """What one answer of crypto-clear inference cost, beside its ``Timings``.

    Attributes:
        engine: what computed; ``insecure-plain`` protects nothing.
        setup_ms: opening the session; 0 where it was open.
        crypto_ms: the layers before the boundary, by the two parties.
        clear_ms: reveal and the layers after it, with the network between.
        setup_bytes: that travelled between the engines for the session's opening, both ways.
        crypto_bytes_up: that the engines sent for this image.
        crypto_bytes_down: that came.
        layers: of those.
        cpu_s: of this device.
        peak_mb: memory of this device's engine at most, so far, in MiB.
    """

    engine: str
    setup_ms: float
    crypto_ms: float
    clear_ms: float
    setup_bytes: int
    crypto_bytes_up: int
    crypto_bytes_down: int
    layers: tuple[LayerCost, ...]
    cpu_s: float
    peak_mb: float


_NO_TIME = Timings(head=0.0, queue=0.0, server=0.0, network=0.0, tail=0.0, total=0.0)


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
        timings: of the request; the images of one share it. A long batch is several requests, which overlap.
        bytes_up: payload and header bytes sent for the whole request.
        bytes_down: received for it.
        source: ``cloud``, or ``fallback``: what the client's ``fallback`` answered while the cloud was away.
        crypto: what two-party computation cost; None without.
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
    source: Source = "cloud"
    crypto: CryptoCost | None = None

    @classmethod
    def local(cls, label: str, score: float) -> Prediction:
        """Makes the answer of a ``fallback``, which knows a label and how sure it is.

        ``probabilities`` and ``logits`` are empty, ``(0,)``, and ``request_id`` is the empty text.

        Args:
            label: any text; it need not be one of the bundle's labels.
            score: in 0..1.

        Raises:
            ConfigError: not a text, or not a probability.
        """
        if not isinstance(label, str):
            raise ConfigError(f"the label of a local prediction is a text, not {type(label).__name__}")
        if not 0 <= score <= 1:
            raise ConfigError(f"score = {score} for {label!r}: give a probability, 0 to 1")
        return cls(
            label=label,
            score=float(score),
            top_k=((label, float(score)),),
            probabilities=np.zeros(0, np.float32),
            logits=np.zeros(0, np.float32),
            request_id="",
            timings=_NO_TIME,
            bytes_up=0,
            bytes_down=0,
            source="fallback",
        )
