"""What helps torch on a processor: numbers that it computes with by itself, and memory that is kept from step to step.

Start reading at ``computes_narrow``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from ensembler.training.config import Computing

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def has_bfloat16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Returns whether a processor multiplies matrices of bfloat16; others emulate it, ten times slower than float32.

    Args:
        capabilities: as ``torch.cpu.get_capabilities`` says them; None is this processor.
    """
    if capabilities is None:  # older releases of torch cannot say
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def computes_narrow(precision: Computing, device: torch.device) -> bool:
    """Returns whether ``device`` trains in bfloat16: see ``TrainConfig.precision``."""
    if precision == "fast":
        return device.type == "cuda" or has_bfloat16()
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees, and returns whether it does: with glibc alone.

    A step of training frees tensors of megabytes and wants them again in the next one. glibc gives them back to the
    system meanwhile, which then hands out pages anew, each by a fault and filled with zeros: about a tenth of the time
    of a small net's step. The process's peak stays what it was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    options = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 2**20),
    )
    return all(mallopt(option, value) for option, value in options)
