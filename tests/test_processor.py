"""What helps training on a processor."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from ensembler.training.config import CHOICES
from ensembler.training.processor import computes_narrow, has_bfloat16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({}, False),
    ],
)
def test_a_processor_has_bfloat16_if_it_says_so(capabilities, has):
    assert has_bfloat16(capabilities) is has


def test_precision_says_where_training_is_in_bfloat16():
    assert {name for name in CHOICES["precision"] if computes_narrow(name, CUDA)} == {"auto", "fast", "bfloat16"}
    assert {name for name in CHOICES["precision"] if computes_narrow(name, CPU)} - {"fast"} == {"bfloat16"}
    assert computes_narrow("fast", CPU) is has_bfloat16()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
def test_a_process_that_keeps_its_memory_is_not_handed_it_page_by_page_again():
    assert faults(keep=True) < faults(keep=False) / 4


def faults(*, keep: bool) -> int:
    """Returns the page faults of a process that frees 10 tensors of 10 MB and takes them again, ten times."""
    program = (
        "import resource, sys, torch\n"
        "from ensembler.training.processor import keep_freed_memory\n"
        "if sys.argv[1] == 'True': assert keep_freed_memory()\n"
        "def step(): return [torch.ones(2_500_000) for _ in range(10)]\n"
        "step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    return int(subprocess.check_output([sys.executable, "-c", program, str(keep)], timeout=120))
