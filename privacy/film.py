"""Several pictures of one scene, as a camera that is held in a hand takes them one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT_PIXELS = 2  # at most, up or down and to either side
BRIGHTNESS = 0.05  # by which a picture may be brighter or darker
SENSOR_STD = 2.0  # of a sensor's own noise, of 255


def frames_of(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns ``count`` frames of each image, ``(B, count, 3, H, W)`` uint8; the first is the image itself.

    The others are moved by up to ``SHIFT_PIXELS``, a little brighter or darker, and as noisy as a sensor. Borders are
    mirrored, since there is nothing beyond them.

    Args:
        images: ``(B, 3, H, W)`` uint8, H and W greater than ``SHIFT_PIXELS``.
        count: of frames, at least one.
        generator: on the CPU.
    """
    batch, _, height, width = images.shape
    wide = F.pad(images.float(), [SHIFT_PIXELS] * 4, mode="reflect")
    corners = torch.randint(2 * SHIFT_PIXELS + 1, (batch, count, 2), generator=generator).to(images.device)
    rows = corners[..., 0, None] + torch.arange(height, device=images.device)  # (B, K, H)
    columns = corners[..., 1, None] + torch.arange(width, device=images.device)  # (B, K, W)
    which = torch.arange(batch, device=images.device)[:, None, None, None]
    # The indices come first and the channels last: (B, K, H, W, 3).
    moved = wide.permute(0, 2, 3, 1)[which, rows[..., None], columns[:, :, None]].permute(0, 1, 4, 2, 3)
    brighter = 1 + BRIGHTNESS * (2 * torch.rand(batch, count, 1, 1, 1, generator=generator) - 1)
    noise = SENSOR_STD * torch.randn(moved.shape, generator=generator)
    seen = (moved * brighter.to(images.device) + noise.to(images.device)).round().clamp(0, 255).to(torch.uint8)
    seen[:, 0] = images
    return seen


def sent(film: Tensor, send: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns what a device makes of each frame of ``film``, ``(B, K, *feature_shape)``.

    Args:
        film: ``(B, K, 3, H, W)`` uint8.
        send: from images ``(B, 3, H, W)`` to features ``(B, *feature_shape)``.
    """
    features = send(film.flatten(0, 1))
    return features.reshape(*film.shape[:2], *features.shape[1:])
