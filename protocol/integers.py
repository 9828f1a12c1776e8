"""One setting of onnxruntime that device and cloud both make, so that int8 nets say the same on every processor.

x86-64 without VNNI (AVX2 alone: most processors before 2020, AMD's before 2022) multiplies unsigned by signed bytes in
pairs whose sum saturates at 16 bits, and onnxruntime lets it unless told otherwise. A head that has
29 dB with exact sums had 10 without, and its client lost eight points of accuracy.
"""

from __future__ import annotations

from typing import Any

_EXACT = "session.x64quantprecision"


def sum_exactly(options: Any) -> None:
    """Has a session of these ``onnxruntime.SessionOptions`` add up products of bytes exactly, on every processor.

    Only where they would saturate it takes longer (``benchmarks/integers.py``).
    """
    options.add_session_config_entry(_EXACT, "1")
