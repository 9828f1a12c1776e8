"""Several operators of one ensemble: which nets each of them holds, and which of the codes it hears.

Operators that are all sent the same codes each know as much as all together. With a bottleneck the codes can be divided
instead: each operator's nets are trained on some of its channels, and the device sends every operator those alone. What
all of them hear together is what one would have heard. The nets follow one another in the server's order, operator by
operator, so that who has which net says nothing of the selector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from ensembler.protocol.errors import ConfigError

Channels = tuple[int, int]  # the first, and the one after the last


class Hearing(nn.Module):
    """A body that hears some of the codes' channels: ``(B, C, h, w)`` -> ``(B, F)``.

    Args:
        inner: the body as its operator holds it, of those channels alone.
        channels: which.
    """

    def __init__(self, inner: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.inner = inner
        self.channels = channels

    def forward(self, features: Tensor) -> Tensor:
        """Returns what the inner body says of its channels."""
        answer: Tensor = self.inner(heard(self, features))
        return answer


def party_sizes(num_nets: int, parties: int) -> list[int]:
    """Divides N nets among operators as evenly as possible.

    Raises:
        ConfigError: less than one operator, or more than there are nets.
    """
    if not 1 <= parties <= num_nets:
        raise ConfigError(f"--parties {parties}: choose 1 to {num_nets}, the number of bodies")
    return [len(part) for part in np.array_split(np.arange(num_nets), parties)]


def party_of(position: int, sizes: Sequence[int]) -> int:
    """Returns whose net the one at ``position`` is."""
    return int(np.searchsorted(np.cumsum(sizes), position, side="right"))


def channels_of(party: int, parties: int, channels: int) -> Channels:
    """Returns what an operator hears of a bottleneck whose ``channels`` are divided by the number of operators."""
    width = channels // parties
    return party * width, (party + 1) * width


def heard_by(body: nn.Module) -> Channels | None:
    """Returns the channels that a body hears; None: all."""
    return body.channels if isinstance(body, Hearing) else None


def heard(body: nn.Module, features: Tensor) -> Tensor:
    """Returns the part of ``features`` ``(B, C, h, w)`` that a body hears."""
    return features[:, slice(*body.channels)] if isinstance(body, Hearing) else features


def held(body: nn.Module) -> nn.Module:
    """Returns a body as its operator holds it."""
    return body.inner if isinstance(body, Hearing) else body
