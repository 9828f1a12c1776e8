"""A network link of a known rate: two network namespaces with a pair of virtual devices and a token bucket on each.

Needs root, ``ip`` and ``tc`` (Debian's iproute2). Nothing outside the two namespaces is touched, and both are removed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# What passes unslowed after a pause: of one large segment, since smaller buckets cut the rate short.
BURST_BYTES = 65536
QUEUE_MS = 500


@dataclass(frozen=True)
class Link:
    """Two ends that reach each other and nothing else.

    Attributes:
        device: the prefix of a command that is to run at the device's end.
        server: and at the server's.
        address: the server's.
    """

    device: tuple[str, ...]
    server: tuple[str, ...]
    address: str


def possible() -> str | None:
    """Returns why there can be no such link here, or None."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} missing; install iproute2" if missing else None


@contextmanager
def link(up_bytes_s: float, down_bytes_s: float) -> Iterator[Link]:
    """Makes the two ends.

    Args:
        up_bytes_s: from the device to the server, bytes a second with all headers.
        down_bytes_s: the other way.
    """
    device, server = f"ens-{os.getpid()}-d", f"ens-{os.getpid()}-s"
    ends = (device, "ens0", "10.75.0.1", up_bytes_s), (server, "ens1", "10.75.0.2", down_bytes_s)
    made = []
    try:
        for name, *_ in ends:
            _run("ip", "netns", "add", name)
            made.append(name)
        _run("ip", "-n", device, "link", "add", "ens0", "type", "veth", "peer", "name", "ens1", "netns", server)
        for name, nic, address, rate in ends:
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", nic)
            for each in ("lo", nic):
                _run("ip", "-n", name, "link", "set", each, "up")
            shaped = ("rate", f"{8 * rate:.0f}bit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", nic, "root", "tbf", *shaped)
        inside = [("ip", "netns", "exec", name) for name in (device, server)]
        yield Link(inside[0], inside[1], ends[1][2])
    finally:
        for name in made:
            _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
