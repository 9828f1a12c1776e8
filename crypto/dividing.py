"""Who computes what: a trained run becomes the layers under two parties, those in the clear, and the device's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensembler.crypto.bundle import CLEAR, ENSEMBLE, FULL
from ensembler.protocol.errors import ConfigError
from ensembler.training.runs import RunFolder
from ensembler.training.splits import Cut, TracedNet
from ensembler.training.stages import load_bodies, load_client


@dataclass(frozen=True, kw_only=True)
class Divided:
    """A net in up to three parts, in the order in which an image passes them.

    Attributes:
        mode: of ``bundle.MODES``.
        prefix: computed by the two parties, with the server's weights.
        suffix: of the server, on the noised boundary; None where all layers are in the prefix.
        tail: of the device, on what the server answers; None where that is the logits.
        boundary: the name of the prefix's end, for people.
        labels: the class names.
        image_size: H and W.
    """

    mode: str
    prefix: nn.Module
    suffix: nn.Module | None
    tail: nn.Module | None
    boundary: str
    labels: tuple[str, ...]
    image_size: tuple[int, int]

    def finished(self, boundary: Tensor) -> Tensor:
        """Returns the logits for what the boundary shows, ``(B, ...)``."""
        for part in (self.suffix, self.tail):
            boundary = boundary if part is None else part(boundary)
        return boundary


class _Bodies(nn.Module):
    """N bodies on the same features: ``(B, N, F)``."""

    def __init__(self, bodies: Sequence[nn.Module]) -> None:
        super().__init__()
        self._bodies = nn.ModuleList(bodies)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([body(features) for body in self._bodies], dim=1)


class _SelectedTail(nn.Module):
    """Selector, concatenation with S_i = 1/P (Ensembler, Eq. 1), and tail."""

    def __init__(self, selector: Sequence[int], tail: nn.Module) -> None:
        super().__init__()
        self._selector: Tensor
        self.register_buffer("_selector", torch.tensor(selector))
        self._tail = tail

    def forward(self, answers: Tensor) -> Tensor:
        chosen = answers.index_select(1, self._selector) / len(self._selector)
        logits: Tensor = self._tail(chosen.flatten(1))
        return logits


def at_cut(net: TracedNet, cut: Cut | None, labels: tuple[str, ...]) -> Divided:
    """Divides a plain net.

    Args:
        net: whole, with its weights.
        cut: what comes before it is computed by the two parties; None: everything.
        labels: the class names.
    """
    prefix: nn.Module = net.module
    suffix: nn.Module | None = None
    if cut is not None:
        prefix, suffix = net.chain([cut.names[0]])
    return Divided(
        mode=FULL if cut is None else CLEAR,
        prefix=prefix.eval(),
        suffix=None if suffix is None else suffix.eval(),
        tail=None,
        boundary="the last layer" if cut is None else cut.names[0],
        labels=labels,
        image_size=net.image_size,
    )


def of_ensemble(run: RunFolder) -> Divided:
    """Divides an Ensembler where it was cut: head under two parties, N bodies in the clear, the client's tail.

    Raises:
        ConfigError: the head does to the features what the two parties cannot: fixed or learned noise, dropout, a
            bottleneck.
    """
    config = run.config
    if config.squeezed is not None:
        raise ConfigError(f"{run.path} rounds its features in a bottleneck, which two parties do not: train without")
    if config.dropout:
        raise ConfigError(f"{run.path} drops features at random, which two parties do not: train with --dropout 0")
    if config.noise_std and (config.noise_mode != "fresh" or config.noise == "learned"):
        raise ConfigError(
            f"{run.path} has noise of its own in the head; here the device adds uniform noise to its share: train with "
            "--noise uniform --noise-mode fresh, or with --noise-std 0"
        )
    client = load_client(run)
    return Divided(
        mode=ENSEMBLE,
        prefix=client.head.eval(),
        suffix=_Bodies(load_bodies(run)).eval(),
        tail=_SelectedTail(client.selector, client.tail).eval(),
        boundary=config.head_end or "the head's end",
        labels=run.labels,
        image_size=run.arch.image_size,
    )
