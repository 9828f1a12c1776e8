"""The engine without any protection: the image goes to the server as it is. For tests of what is around an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ensembler.crypto.bundle import Settings
from ensembler.crypto.clear import ClearLayers
from ensembler.crypto.engine import SERVER, Link, Rank
from ensembler.crypto.shares import Floats, Shares, encode, random_share
from ensembler.crypto.steps import Step

_log = logging.getLogger("ensembler.crypto")


class InsecureEngine:
    """See ``engine.Engine``; arguments as ``engine.open_engine``."""

    def __init__(
        self,
        settings: Settings,
        link: Link,
        rank: Rank,
        steps: Sequence[Step],
        weights: Path | None,
        image_shape: tuple[int, ...],
    ) -> None:
        self._fraction_bits = settings.fraction_bits
        self._link, self._rank, self._steps, self._shape = link, rank, steps, image_shape
        self._runs = 0
        if weights is not None:
            self._net = ClearLayers(weights)
        _log.warning("insecure-plain: the server is given the image itself; nothing is private")

    def run(self, image: Floats | None, told: Callable[[int], None]) -> Shares:
        """See ``Engine``."""
        self._runs += 1
        shape = self._steps[-1].shape
        if self._rank == SERVER:
            received = np.frombuffer(self._link.receive(f"image {self._runs}"), np.float32).reshape(self._shape)
            result = self._net.run(received)
            theirs = random_share(shape)
            self._link.send(f"share {self._runs}", theirs.tobytes())
            own: Shares = encode(result.reshape(shape), self._fraction_bits) - theirs
        else:
            assert image is not None
            self._link.send(f"image {self._runs}", np.ascontiguousarray(image, np.float32).tobytes())
            own = np.frombuffer(self._link.receive(f"share {self._runs}"), np.uint64).reshape(shape)
        told(len(self._steps))
        return own
