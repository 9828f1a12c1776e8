"""A TCP relay between a device and its server whose line a test can spoil, and mend again.

``up`` is from the device to the server, ``down`` the other way. Every method may be called from any thread and returns
when it has been done; ``until`` waits for something to have happened. Nothing in here knows what the bytes mean.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Literal

Direction = Literal["up", "down"]
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
END = b""  # what a flow carries when its source has closed its end
PATIENCE_S = 60.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close sends RST and drops what was not sent


def put(end: asyncio.Transport, data: bytes) -> None:
    """Writes to an end, or closes it for writing; one that has gone takes nothing."""
    if end.is_closing():
        return
    if data == END:
        with suppress(OSError):  # reset by its peer, which the loop has not noticed yet
            end.write_eof()
    else:
        end.write(data)


class Flow:
    """The bytes of one direction of one link, on their way to ``target``."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.target: asyncio.Transport | None = None
        self.twin: asyncio.Transport | None = None  # gets the same bytes
        self.held = False
        self.arrived = self.passed = 0
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._free_s = 0.0  # from when the throttle lets the next bytes pass

    def feed(self, data: bytes) -> None:
        """Takes what arrived from the source."""
        self.arrived += len(data)
        self._waiting.append((self.relay.loop.time() + self.relay.delay_s, data))
        self.pump()

    def pump(self) -> None:
        """Passes on what is due."""
        loop, rate = self.relay.loop, self.relay.bytes_per_s
        while self._waiting and not self.held and self.target is not None:
            due, data = self._waiting[0]
            due = max(due, self._free_s)
            if due > loop.time():
                loop.call_at(due, self.pump)
                return
            self._waiting.popleft()
            if rate is not None and len(data) > (piece := max(1, int(rate / 50))):
                self._waiting.appendleft((due, data[piece:]))
                data = data[:piece]
            self._free_s = loop.time() + (len(data) / rate if rate is not None else 0.0)
            self._pass(data)

    def end(self) -> None:
        """Closes this direction alone; what still arrives is dropped."""
        if self.target is not None:
            put(self.target, END)
        self.held = True

    def _pass(self, data: bytes) -> None:
        self.passed += len(data)
        for end in (self.target, self.twin):
            if end is not None:
                put(end, data)
        self.relay.changed()


class End(asyncio.Protocol):
    """One socket of a link: what it receives goes into ``flow``."""

    def __init__(self, link: Link, flow: Flow | None) -> None:
        self._link, self._flow = link, flow

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._link.ends.append(transport)

    def data_received(self, data: bytes) -> None:
        if self._flow is not None:
            self._flow.feed(data)
        self._link.relay.changed()

    def eof_received(self) -> bool:
        if self._flow is not None:
            self._flow.feed(END)
        return True  # the other direction stays open

    def connection_lost(self, error: Exception | None) -> None:
        # A twin has no flow: whatever becomes of it, the link goes on.
        if self._flow is not None:
            self._link.cut(reset=isinstance(error, ConnectionResetError))
        else:
            self._link.twins_lost += 1
        self._link.relay.changed()


class Link:
    """One connection of the device, and the one to the server that was made for it."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.flows: dict[Direction, Flow] = {direction: Flow(relay) for direction in DIRECTIONS}
        self.ends: list[asyncio.Transport] = []
        self.twins_lost = 0

    def near(self) -> End:
        """Makes the device's end."""
        end = End(self, self.flows["up"])
        self.relay.loop.call_soon(lambda: self.relay.tasks.append(self.relay.loop.create_task(self.open())))
        return end

    async def open(self) -> None:
        """Connects to the server, where nobody forbids it."""
        if self.relay.refusing:
            self.cut(reset=True)
            return
        near = self.ends[0]
        try:
            far, _ = await self.relay.loop.create_connection(lambda: End(self, self.flows["down"]), *self.relay.target)
            if self.relay.duplicating:
                self.flows["up"].twin, _ = await self.relay.loop.create_connection(
                    lambda: End(self, None), *self.relay.target
                )
        except OSError:  # nobody listens: neither does this relay, then
            self.cut(reset=True)
            return
        self.flows["up"].target, self.flows["down"].target = far, near
        for direction in DIRECTIONS:
            self.flows[direction].held |= direction in self.relay.held
            self.flows[direction].pump()
        self.relay.changed()

    def cut(self, *, reset: bool) -> None:
        """Ends the link: with RST, what was on its way is lost; else with FIN, behind what was passed on."""
        for end in self.ends:
            if not end.is_closing():
                if reset:
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    end.abort()
                else:
                    end.close()


class Relay:
    """Listens on ``endpoint`` and passes everything on to a server on this machine. A context manager.

    Args:
        target: ``tcp://host:port`` of the server, which need not run.
    """

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self.target = (host, int(port))
        self.links: list[Link] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.held: set[Direction] = set()
        self.duplicating = self.refusing = False
        self.loop = asyncio.new_event_loop()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(self._listen(), self.loop)
        self._server = started.result(PATIENCE_S)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    # --- faults; they hold for links that are there and for new ones, until they are lifted ---

    def delay(self, seconds: float) -> None:
        """Lets everything that arrives from now on wait for so long, in both directions."""
        self._do(lambda: setattr(self, "delay_s", seconds))

    def throttle(self, bytes_per_s: float | None) -> None:
        """Lets no more pass in each direction of each link; None lifts it."""
        self._do(lambda: setattr(self, "bytes_per_s", bytes_per_s))

    def hold(self, *directions: Direction) -> None:
        """Lets nothing pass until ``release``."""

        def work() -> None:
            self.held = set(directions)
            for link in self.links:
                for direction in directions:
                    link.flows[direction].held = True

        self._do(work)

    def release(self) -> None:
        """Lets pass what was held, of links that were held one by one as well."""

        def work() -> None:
            self.held = set()
            for link in self.links:
                for flow in link.flows.values():
                    flow.held = False
                    flow.pump()

        self._do(work)

    def refuse(self, refusing: bool = True) -> None:
        """Resets new connections; those that are there stay."""
        self._do(lambda: setattr(self, "refusing", refusing))

    def duplicate(self, duplicating: bool = True) -> None:
        """Opens a second connection to the server for each new link, which gets the same bytes up."""
        self._do(lambda: setattr(self, "duplicating", duplicating))

    # --- faults of one moment ---

    def cut(self, *, reset: bool) -> None:
        """Ends every link there is."""
        self._do(lambda: [link.cut(reset=reset) for link in self.links])

    def half_close(self, direction: Direction) -> None:
        """Ends one direction of every link there is."""
        self._do(lambda: [link.flows[direction].end() for link in self.links])

    def hold_link(self, link: Link, direction: Direction) -> None:
        """Holds one link alone, so that others overtake it."""
        self._do(lambda: setattr(link.flows[direction], "held", True))

    # --- what tests wait for ---

    def arrived(self, direction: Direction) -> int:
        """Returns how many bytes of that direction have reached the relay, on all links together."""
        return sum(link.flows[direction].arrived for link in self.links)

    def until(self, happened: Callable[[], object]) -> None:
        """Waits until ``happened`` returns something true."""
        with self._change:
            assert self._change.wait_for(happened, PATIENCE_S)

    def changed(self) -> None:
        """Wakes those who wait."""
        with self._change:
            self._change.notify_all()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything."""
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(PATIENCE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()

    async def _listen(self) -> asyncio.Server:
        def accept() -> End:
            self.links.append(Link(self))
            return self.links[-1].near()

        return await self.loop.create_server(accept, "127.0.0.1", 0)

    async def _end(self) -> None:
        self._server.close()
        await asyncio.gather(*self.tasks)
        for link in self.links:
            link.cut(reset=True)
        await asyncio.sleep(0)  # connection_lost of each is called in the loop's next turn

    def _do(self, work: Callable[[], object]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self.loop.call_soon_threadsafe(run)
        done.result(PATIENCE_S)
