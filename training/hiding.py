"""What makes features tell less of the images: losses that a defence adds while head and bodies train.

There are three, each with a weight, and they add up: what passes a noisy channel beyond the class, after CEM; the
correlation of distances between images and between features, as in NoPeek; and a decoder that learns to rebuild the
images while the head learns to prevent it, as in ResSFL. Whether they hide anything is for attacks trained anew to say.
Start reading at ``Hiding``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensembler.protocol.errors import ConfigError
from ensembler.training.config import TrainConfig
from ensembler.training.models import ArchSpec, feature_shape, placed

WIDTHS = {8: 64, 16: 32}  # of the decoder, by the side of the map; the first for smaller ones
WIDTH = 16  # and for larger ones


class Hiding:
    """The losses that a config asks for.

    Attributes:
        decoder: the one in the loop; None where it has no weight.
    """

    def __init__(self, config: TrainConfig, arch: ArchSpec, device: torch.device) -> None:
        self._config = config
        self.decoder: Adversary | None = None
        if config.decoder_weight:
            self.decoder = placed(Adversary(feature_shape(arch), arch.image_size), device)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained beside head, bodies and tail."""
        return [] if self.decoder is None else list(self.decoder.train().parameters())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep."""
        return {} if self.decoder is None else {f"decoder.{name}": t for name, t in self.decoder.state_dict().items()}

    def loss(self, images: Tensor, features: Tensor, targets: Tensor) -> Tensor | float:
        """Returns what is added to the task's loss.

        Args:
            images: normalised, ``(B, 3, H, W)``.
            features: what the head makes of them, before noise and codes, ``(B, ...)``.
            targets: classes ``(B,)`` int64.
        """
        config = self._config
        total: Tensor | float = 0.0
        if config.information_weight:
            total = total + config.information_weight * information_bits(features, targets, config.information_noise)
        if config.nopeek_weight:
            total = total + config.nopeek_weight * distance_correlation(images, features)
        if self.decoder is not None:
            # The decoder descends, the head ascends: one step for both.
            rebuilt = self.decoder(_Reversed.apply(features))  # type: ignore[no-untyped-call]
            total = total + config.decoder_weight * F.mse_loss(rebuilt.float(), images)
        return total


def information_bits(features: Tensor, targets: Tensor, noise_std: float) -> Tensor:
    """Returns how much features tell of an image beyond its class, in bits for each number.

    The mean over numbers of ``log2(1 + var / noise_std^2) / 2``, with the variance within a class: if noise of that
    deviation is added, no more than so much passes (a Gaussian channel). It is the idea of CEM (Xia et al., CVPR 2025:
    conditional entropy maximisation), with the classes as the mixture's parts. What the few images of a class in a
    batch cannot say of its variance, one of them nothing at all, all the classes say together: the loss is as strong
    with a thousand classes as with two, as long as some class has two images in a batch.

    Args:
        features: ``(B, ...)``, before noise and codes.
        targets: classes ``(B,)`` int64.
        noise_std: of the noise that is added, or in its place a fraction of the features' own deviation.

    Returns:
        A scalar, at least 0.
    """
    # Variances are differences of large numbers: not in bfloat16.
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(1)
        members = F.one_hot(targets).to(flat.dtype)  # (B, K)
        counts = members.sum(0)  # (K,)
        means = (members.T @ flat) / counts.clamp_min(1)[:, None]
        squares = members.T @ (flat - means[targets]).square()
        # A class of n images has n - 1 of its own: the pooled variance in the place of the last leaves no bias.
        pooled = squares.sum(0) / (counts - 1).clamp_min(0).sum().clamp_min(1)
        spread = (squares + pooled) / counts.clamp_min(1)[:, None]
        bits = torch.log2(1 + spread / noise_std**2).mean(1) / 2  # (K,)
        return (bits * counts).sum() / counts.sum()


def distance_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Returns the squared distance correlation of two samples of pairs (Szekely et al., 2007), as NoPeek has it.

    Vepakomma et al., "NoPeek: Information leakage reduction to share activations in distributed deep learning", 2020.

    Args:
        first: ``(B, ...)``.
        second: ``(B, ...)``.

    Returns:
        A scalar from 0, which independent variables have, to 1.
    """
    with torch.autocast(first.device.type, enabled=False):
        a, b = _centred_distances(first), _centred_distances(second)
        scale = (a.square().mean() * b.square().mean()).clamp_min(1e-12).sqrt()
        return (a * b).mean().clamp_min(0) / scale


def _centred_distances(x: Tensor) -> Tensor:
    """Returns the distances of all pairs ``(B, B)``, less the means of rows and columns."""
    flat = x.float().flatten(1)
    squares = flat.square().sum(1)
    # The root has no gradient at 0, which the diagonal is.
    distances = (squares[:, None] + squares - 2 * flat @ flat.T).clamp_min(1e-6).sqrt()
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()


class Adversary(nn.Module):
    """A small decoder, features ``(B, C, h, w)`` -> normalised images ``(B, 3, H, W)``.

    Args:
        shape: of one image's features.
        image_size: H and W.

    Raises:
        ConfigError: the features are no map.
    """

    def __init__(self, shape: tuple[int, ...], image_size: tuple[int, int]) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ConfigError(f"--decoder-weight needs features (C, h, w) at the cut, these have shape {shape}")
        self.image_size = image_size
        channels, side = shape[0], min(shape[1:])
        layers: list[nn.Module] = []
        while True:
            width = next((width for most, width in WIDTHS.items() if side <= most), WIDTH)
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
            if side >= min(image_size):
                break
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            side *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Returns the images."""
        images: Tensor = self.layers(features)
        return images if images.shape[-2:] == self.image_size else F.interpolate(images, self.image_size)


class _Reversed(torch.autograd.Function):
    """Passes features on as they are, and their gradient back turned round (Ganin and Lempitsky, 2015)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:  # noqa: ARG004 (torch's)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return -gradients[0]
