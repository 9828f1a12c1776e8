"""Crypto-clear inference (C2PI): the first layers under two-party computation, the others in the clear.

May import ``ensembler.protocol`` and ``ensembler.transport``; what exports also ``training`` and ``export``. Start
reading at ``engine``.
"""

from __future__ import annotations

if __name__ != "ensembler.crypto":
    raise ImportError(f"import ensembler.crypto, not {__name__}: a second copy of its classes would not match")
