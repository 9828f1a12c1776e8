"""A Ray cluster of two nodes on this machine, whose second node a test may kill."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from two_nodes import TwoNodes


@pytest.fixture(scope="session")
def _two_nodes():
    nodes = TwoNodes()
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(_two_nodes):
    """Both nodes."""
    _two_nodes.complete()
    return _two_nodes
