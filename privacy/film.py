"""Several pictures of one scene, as a camera takes them one after the other, in a hand or on a stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SENSOR_STD = 2.0  # of a sensor's own noise, of 255


@dataclass(frozen=True)
class Camera:
    """How pictures of one scene differ, beside the sensor's noise.

    Attributes:
        name: of the attack that has its pictures, before their number.
        words: for people, with an article.
        shift_pixels: by which one is moved at most, up or down and to either side.
        brightness: by which share of itself one may be brighter or darker.
    """

    name: str
    words: str
    shift_pixels: int
    brightness: float


HAND_HELD = Camera("frames", "a hand-held camera", shift_pixels=2, brightness=0.05)
MOUNTED = Camera("still", "a camera that stands still", shift_pixels=0, brightness=0.0)


@dataclass(frozen=True)
class Film:
    """How often one scene is seen, and by what.

    Attributes:
        frames: at least one.
        camera: that takes them.
    """

    frames: int
    camera: Camera


def frames_of(images: Tensor, film: Film, generator: torch.Generator) -> Tensor:
    """Returns the frames of a film of each image, ``(B, film.frames, 3, H, W)`` uint8; the first is the image itself.

    The others are moved, a little brighter or darker, and as noisy as a sensor. Borders are mirrored, since there is
    nothing beyond them.

    Args:
        images: ``(B, 3, H, W)`` uint8, H and W greater than the camera's ``shift_pixels``.
        film: of each.
        generator: on the CPU.
    """
    batch, _, height, width = images.shape
    count, shift = film.frames, film.camera.shift_pixels
    wide = F.pad(images.float(), [shift] * 4, mode="reflect")
    corners = torch.randint(2 * shift + 1, (batch, count, 2), generator=generator).to(images.device)
    rows = corners[..., 0, None] + torch.arange(height, device=images.device)  # (B, K, H)
    columns = corners[..., 1, None] + torch.arange(width, device=images.device)  # (B, K, W)
    which = torch.arange(batch, device=images.device)[:, None, None, None]
    # The indices come first and the channels last: (B, K, H, W, 3).
    moved = wide.permute(0, 2, 3, 1)[which, rows[..., None], columns[:, :, None]].permute(0, 1, 4, 2, 3)
    brighter = 1 + film.camera.brightness * (2 * torch.rand(batch, count, 1, 1, 1, generator=generator) - 1)
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
