"""Ensembler: private collaborative inference for small devices.

The public API is the names in ``__all__``. They load on first use (PEP 562), so that
``import ensembler.protocol`` on a device costs nothing of the client, and never torch.
Start reading at ``ensembler.client``.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "ensembler":
    raise ImportError(f"import ensembler, not {__name__}: a second copy of its classes would not match")

# From 1.29 on onnxruntime reports to its maker, on Linux too: as soon as it is imported it makes an identity of the
# machine and starts a thread for it. What loads it here turns reports off as well, in case that was imported first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from ensembler.async_client import AsyncEdgeClient as AsyncEdgeClient
    from ensembler.client import EdgeClient as EdgeClient
    from ensembler.info import ClientInfo as ClientInfo
    from ensembler.prediction import Prediction as Prediction
    from ensembler.prediction import Timings as Timings
    from ensembler.protocol.errors import EnsemblerError as EnsemblerError
    from ensembler.statistics import ReplicaStatistics as ReplicaStatistics

__version__ = "0.1.0"

_LAZY = {
    "AsyncEdgeClient": "ensembler.async_client",
    "ClientInfo": "ensembler.info",
    "EdgeClient": "ensembler.client",
    "EnsemblerError": "ensembler.protocol.errors",
    "Prediction": "ensembler.prediction",
    "ReplicaStatistics": "ensembler.statistics",
    "Timings": "ensembler.prediction",
}

__all__ = [
    "AsyncEdgeClient",
    "ClientInfo",
    "EdgeClient",
    "EnsemblerError",
    "Prediction",
    "ReplicaStatistics",
    "Timings",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ensembler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
