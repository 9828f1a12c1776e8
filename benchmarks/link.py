"""A network link of a known rate: two network namespaces with a pair of virtual devices and a token bucket on each.

    python benchmarks/link.py ADDRESS TARGET MILLISECONDS

is a relay that passes connections to ADDRESS on to TARGET, each byte MILLISECONDS later, both ways: a kernel may lack
netem. ADDRESS and TARGET are HOST:PORT; a port of 0 takes a free one, and the relay prints it.

Needs root, ``ip`` and ``tc`` (Debian's iproute2). Nothing outside the two namespaces is touched, and both are removed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# What passes unslowed after a pause: of one large segment, since smaller buckets cut the rate short.
BURST_BYTES = 65536
QUEUE_MS = 500
# Of the relay: more than a link of 400 MB/s has on its way in 40 ms.
QUEUED_PIECES = 256


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


@contextmanager
def delayed(at: Link, target: str, one_way_ms: float) -> Iterator[str]:
    """Runs the relay at the server's end, and gives its address ``HOST:PORT``.

    Args:
        at: the link.
        target: ``HOST:PORT`` at the server's end.
        one_way_ms: that it adds.
    """
    command = [*at.server, sys.executable, __file__, f"{at.address}:0", target, str(one_way_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"{at.address}:{int(process.stdout.readline())}"
        finally:
            process.terminate()


async def _relayed(address: str, target: str, delay_s: float) -> None:
    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_PIECES)

        async def deliver() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    return writer.close()
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while data := await reader.read(1 << 18):
                await waiting.put((loop.time() + delay_s, data))
            await waiting.put((loop.time() + delay_s, b""))
            await delivering
        except ConnectionError:
            delivering.cancel()
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(*_split(target))
        await asyncio.gather(passed(reader, there[1]), passed(there[0], writer))

    server = await asyncio.start_server(connected, *_split(address))
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _split(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host, int(port)


if __name__ == "__main__":
    asyncio.run(_relayed(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000))
