"""A Ray cluster of two nodes on this machine, whose second node a test may kill."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile

import pytest

# As docs/operator.md advises. Ray reads them when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


class TwoNodes:
    """The cluster: a head, where the gateway is, and another node."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={**NODE, "temp_dir": folder})
        self.other = self._cluster.add_node(**NODE)

    @property
    def address(self) -> str:
        return self._cluster.address

    def kill_other(self) -> None:
        """Ends the second node with SIGKILL."""
        self._cluster.remove_node(self.other, allow_graceful=False)
        self.other = None

    def complete(self) -> None:
        """Starts a second node if there is none."""
        if self.other is None:
            self.other = self._cluster.add_node(**NODE)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def _two_nodes():
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie below it
    nodes = TwoNodes(folder)
    yield nodes
    nodes.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(_two_nodes):
    """Both nodes."""
    _two_nodes.complete()
    return _two_nodes
