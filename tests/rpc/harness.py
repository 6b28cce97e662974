"""Two ends of a control stream in one event loop, and a wire between them that can be cut or go dead."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from mooncake.core.errors import Refused
from mooncake.core.messages import AnyMessage
from mooncake.rpc.stream import Hello, Link, RpcClient, RpcServer

TOKEN = "the cluster's token"
WAIT_S = 10.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(4 * WAIT_S):
            await test()

    asyncio.run(bounded())


def hello(peer: str, **fields: str) -> Hello:
    return Hello(**{"peer": peer, "kind": "test", "token": TOKEN, "compat": "", **fields})


class End:
    """What one end saw, in order. `events`: open PEER, close PEER, or refused."""

    def __init__(self, me: Hello) -> None:
        self.me = me
        self.events: list[str] = []
        self.links: list[Link] = []
        self.inbox: list[AnyMessage] = []
        self.envelopes: list[int] = []
        """The number of messages of each."""
        self.refusals: list[Refused] = []
        self.fail_next: Exception | None = None
        """What the next messages make `received` raise."""
        self._changed = asyncio.Event()

    @property
    def link(self) -> Link:
        return self.links[-1]

    @property
    def callbacks(self) -> dict[str, Any]:
        return {"on_open": self.opened, "on_message": self.received, "on_close": self.closed}

    def opened(self, link: Link) -> None:
        self.links.append(link)
        self._note(f"open {link.peer}")

    def received(self, link: Link, messages: list[AnyMessage]) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.envelopes.append(len(messages))
        self.inbox.extend(messages)
        self._changed.set()

    def closed(self, link: Link) -> None:
        assert link.closed
        self._note(f"close {link.peer}")

    def refused(self, why: Refused) -> None:
        self.refusals.append(why)
        self._note("refused")

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, holds: Callable[[End], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds(self):
                self._changed.clear()
                await self._changed.wait()

    async def until_event(self, event: str, count: int = 1) -> None:
        await self.until(lambda end: end.events.count(event) >= count)

    async def until_received(self, count: int) -> None:
        await self.until(lambda end: len(end.inbox) >= count)


@contextlib.asynccontextmanager
async def serving(end: End, address: str = "127.0.0.1:0", **options: Any) -> AsyncIterator[RpcServer]:
    server = RpcServer(address, end.me, **{**end.callbacks, **options})
    await server.start()
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def dialling(end: End, address: str, **options: Any) -> AsyncIterator[RpcClient]:
    client = RpcClient(
        address, end.me, **{**end.callbacks, "on_refused": end.refused, "rng": random.Random(1), **options}
    )
    client.start()
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def pair(address: str = "127.0.0.1:0", **options: Any) -> AsyncIterator[tuple[End, End]]:
    """A serving and a dialling end with an open link. options: of both, such as tls."""
    server_end, client_end = End(hello("server")), End(hello("client"))
    async with serving(server_end, address, **options) as server, dialling(client_end, server.address, **options):
        await asyncio.gather(server_end.until_event("open client"), client_end.until_event("open server"))
        yield server_end, client_end


class Wire:
    """A TCP proxy: `cut` breaks all connections, `freeze` leaves them open and passes nothing more."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.num_connections = 0

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Yields the address to dial."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.cut()
            await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def freeze(self) -> None:
        self._flowing.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._pass(source, sink)))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                await self._flowing.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
