"""A real Ray cluster of two nodes on this machine, of which the second may lose its power. For tests, too."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}

# As docs/operator.md advises. Ray reads them when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


class TwoNodes:
    """The cluster: a head, where the gateway is, and another node, each with one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie below it
        self._cluster = Cluster(initialize_head=True, head_node_args={**NODE, "temp_dir": self._folder})
        self._other: Any = None
        self.complete()

    @property
    def address(self) -> str:
        """What to connect to."""
        return str(self._cluster.address)

    def kill_other(self) -> None:
        """Ends everything on the second node with SIGKILL: Ray's own processes and the actors."""
        own = [info.process.pid for infos in self._other.all_processes.values() for info in infos]
        # The actors first: their parent would replace them, and they outlive it for a while.
        for process in (*(child for parent in own for child in _children(parent)), *own):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._cluster.remove_node(self._other, allow_graceful=False)
        self._other = None

    def complete(self) -> None:
        """Starts a second node if there is none."""
        if self._other is None:
            self._other = self._cluster.add_node(**NODE)

    def close(self) -> None:
        """Ends the cluster."""
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def _children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []
