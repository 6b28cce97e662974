"""What the store's tests share: keys, cores, and a node with clients of each kind."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from mooncake.store.client import StoreClient
from mooncake.store.core import StoreCore
from mooncake.store.events import Event, Reply, Report, Snapshot
from mooncake.store.eviction import Lru
from mooncake.store.memory import MemoryNode, MemoryStore
from mooncake.store.node import NodeConfig, StoreNode
from mooncake.store.operations import StoreOperations
from mooncake.store.types import Location, Places, Puts, PutStatus

UNIT = 64
MAPPED = ("memory", "shm")
KINDS = ("memory", "shm", "stream", "tcp")
TOKEN = "cluster-secret"
_names = itertools.count()


def key(number: int) -> bytes:
    return number.to_bytes(24, "big")


def keys(*numbers: int) -> tuple[bytes, ...]:
    return tuple(map(key, numbers))


def ten_objects(**options: Any) -> StoreCore:
    """Room for ten objects of one unit."""
    return StoreCore(10 * UNIT, epoch=7, alignment=UNIT, **({"report_ns": 0} | options))


class Put(NamedTuple):
    """One key's part of `Puts`."""

    status: PutStatus
    location: Location | None


def by_key(results: Any) -> Any:
    """Results one by one: a Put per key of a reserve call, a Location or None (a miss) of a lease call."""
    if isinstance(results, Puts):
        return tuple(Put(*pair) for pair in zip(results.statuses, results.locations(), strict=True))
    return tuple(results.locations()) if isinstance(results, Places) else results


class Told(Lru):
    """parents: by key, the keys of those that it was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.parents: dict[bytes, bytes | None] = {}
        self._keys: dict[int, bytes] = {}

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        self._keys.update(zip(rows, keys, strict=True))
        found = [None if parent is None else self._keys[parent] for parent in parents]
        self.parents.update(zip(keys, found, strict=True))


class Driver:
    """Feeds a core, checks its conservation laws after every event, keeps what is not an answer."""

    def __init__(self, core: StoreCore) -> None:
        self.core = core
        self.now = 0
        self.reports: list[Any] = []

    def __call__(self, event: Event) -> Any:
        answer = None
        for command in self.core.handle(event, self.now):
            if isinstance(command, Reply):
                answer = by_key(command.results)
            elif hasattr(command, "client"):
                answer = command
            else:
                self.reports.append(command)
        self.core.check_integrity()
        return answer


def node_config(**options: Any) -> NodeConfig:
    name = f"t{os.getpid()}-{next(_names)}"
    unix_path = os.path.join(tempfile.gettempdir(), f"mooncake-{name}.sock")
    return NodeConfig(
        **(
            {
                "cluster": f"test-{name}",
                "node": "n0",
                "capacity_bytes": 1 << 20,
                "token": TOKEN,
                "unix_path": unix_path,
                "tcp_port": 0,
                "alignment": UNIT,
            }
            | options
        )
    )


@asynccontextmanager
async def running_node(reports: list[Report | Snapshot] | None = None, **options: Any) -> AsyncIterator[StoreNode]:
    node = StoreNode(node_config(**options), (reports if reports is not None else []).append)
    await node.start()
    try:
        yield node
    finally:
        await node.close()
        node.core.check_integrity()


class Store:
    """A node of one kind and its clients."""

    def __init__(self, core: StoreCore, make: Callable[[], Awaitable[StoreOperations]], node: StoreNode | None) -> None:
        self.core = core
        self.client = make
        self.node = node


@asynccontextmanager
async def running_store(kind: str, capacity: int = 1 << 20) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        if kind == "memory":
            memory = MemoryNode(capacity, core=StoreCore(capacity, epoch=1, alignment=UNIT))

            async def make_memory() -> StoreOperations:
                return MemoryStore(memory)

            yield Store(memory.core, make_memory, None)
            memory.core.check_integrity()
            return
        node = await stack.enter_async_context(running_node(capacity_bytes=capacity))
        address = node.addresses[1 if kind == "tcp" else 0]
        if kind == "stream":  # a Unix socket whose segment cannot be mapped: it is served over the socket
            assert node.segment is not None
            os.rename(node.segment.path, node.segment.path + ".hidden")
            stack.callback(os.unlink, node.segment.path + ".hidden")

        async def make() -> StoreOperations:
            client = await StoreClient.connect([address], token=TOKEN, name="test", node="n0")
            stack.push_async_callback(client.close)
            return client

        yield Store(node.core, make, node)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await main

    return asyncio.run(bounded(), debug=False)


def die(node: StoreNode) -> None:
    """As a process does that is killed: its file stays, without a lock."""
    assert node.segment is not None
    for server in node._servers:
        server.close()
    for connection in tuple(node.connections):
        connection.abort()
    if node._looking is not None:
        node._looking.cancel()
    fcntl.flock(node.segment._fd, fcntl.LOCK_UN)


async def eventually(condition: Callable[[], bool], within_s: float = 3.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
