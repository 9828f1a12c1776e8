"""How much of an image a reconstruction shows: SSIM, PSNR, MSE, for each image.

SSIM is pinned, since its variants differ by up to 0.3: Wang et al. 2004 on RGB in [0, 1], an 11x11 Gaussian window of
sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, only windows that lie inside the image, the mean over windows
and channels. It is scikit-image's ``structural_similarity(gaussian_weights=True, sigma=1.5,
use_sample_covariance=False, data_range=1)`` (a test compares the two). Negative values are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ensembler.protocol.errors import ConfigError

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03
BATCH = 256
PART_BYTES = 1 << 26  # of counts at once


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Returns the structural similarity of each pair.

    Args:
        images: ``(B, 3, H, W)`` float in [0, 1], sides of 11 pixels or more.
        others: of the same shape.

    Returns:
        ``(B,)``; 1 for equal images, about 0 for unrelated ones, negative for inverted structure. Differentiable.

    Raises:
        ConfigError: shapes differ, or images are smaller than the window.
    """
    if images.shape != others.shape or images.dim() != 4:
        raise ConfigError(
            f"SSIM of shapes {tuple(images.shape)} and {tuple(others.shape)}: give two equal (B, 3, H, W)"
        )
    if min(images.shape[-2:]) < WINDOW:
        raise ConfigError(f"SSIM needs images of {WINDOW}x{WINDOW} pixels or more, not {tuple(images.shape[-2:])}")
    return torch.cat([_ssim(x, y) for x, y in zip(torch.split(images, BATCH), torch.split(others, BATCH), strict=True)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _blurred(x: Tensor) -> Tensor:
    """Returns Gaussian means over every window inside, one axis after the other."""
    steps = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-(steps**2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, WINDOW)
    rows = F.conv2d(x, kernel.unsqueeze(-1), groups=x.shape[1])
    return F.conv2d(rows, kernel.unsqueeze(-2), groups=x.shape[1])


def mse(images: Tensor, others: Tensor) -> Tensor:
    """Returns the mean squared error of each pair ``(B, 3, H, W)``, ``(B,)``."""
    return (images - others).square().flatten(1).mean(1)


def psnr_db(images: Tensor, others: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each pair in decibels, ``(B,)``; equal images give 100."""
    return -10 * torch.log10(mse(images, others).clamp_min(1e-10))


def entropy_bits(codes: Tensor, count: int) -> float:
    """Returns the entropies of all numbers of an image, added up: no less than what they tell together.

    Each is estimated from how often its codes occur, with Miller and Madow's correction (1955) for what is seldom seen.

    Args:
        codes: ``(B, ...)`` integers in 0..count - 1.
        count: of different codes.
    """
    flat = codes.flatten(1).long()
    total = 0.0
    for part in torch.split(flat, PART_BYTES // (8 * count), dim=1):
        places = count * torch.arange(part.shape[1], device=part.device) + part
        seen = torch.bincount(places.flatten(), minlength=count * part.shape[1]).double()
        share = seen / len(flat)
        correction = ((seen > 0).sum() - part.shape[1]) / (2 * len(flat))
        total += float((-torch.xlogy(share, share).sum() + correction) / math.log(2))
    return total
