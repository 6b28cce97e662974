"""Carries out a node's `Copies`: reads from the source node and writes into our own, as a client of both like any other.

The two connections live as long as chunk follows chunk from the same node. When something goes wrong, their ends give back all
that was claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from mooncake.core.errors import StoreError
from mooncake.core.keys import object_keys
from mooncake.core.messages import CopyBlocks, NodeInfo
from mooncake.store import contents
from mooncake.store.client import StoreClient
from mooncake.store.copies import Copies, Wish
from mooncake.store.handles import Hold, LeasedObjects, Reservation
from mooncake.store.node import StoreNode
from mooncake.store.types import PutStatus

log = logging.getLogger(__name__)

_CHUNK_S = 10.0
"""Far more than a chunk takes on a path that is worth copying over."""


class Copier:
    """Of a node that has started."""

    def __init__(self, node: StoreNode) -> None:
        self.copies = Copies()
        self._node = node
        self._wished = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def wish_blocks(self, message: CopyBlocks) -> None:
        source = message.source
        self.wish(Wish(source.node, source.addresses, object_keys(source.block_keys, message.shard)))

    def wish_objects(self, source: NodeInfo, keys: tuple[bytes, ...]) -> None:
        self.wish(Wish(source.name, source.addresses, keys, is_chain=False))

    def wish(self, wish: Wish) -> None:
        self.copies.wish(wish, time.monotonic_ns())
        self._wished.set()

    async def close(self) -> None:
        """Waits for data calls that are running."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            link: _Link | None = None
            while True:
                chunk = self.copies.next(time.monotonic_ns())
                if link is not None and (chunk is None or chunk.node != link.node):
                    link = None
                    await stack.aclose()
                    if chunk is None:
                        continue  # somebody may have wished meanwhile
                if chunk is None:
                    self._wished.clear()
                    await self._wished.wait()
                    continue
                whole = False
                try:
                    async with asyncio.timeout(_CHUNK_S):
                        link = link or await self._connect(chunk, stack)
                        whole = await self._copy(chunk, link)
                except (TimeoutError, StoreError) as error:
                    log.warning("copy from %s: %s", chunk.node, str(error) or f"not done within {_CHUNK_S:g} s")
                    link = None
                    await stack.aclose()
                self.copies.done(whole=whole)

    async def _connect(self, chunk: Wish, stack: contextlib.AsyncExitStack) -> _Link:
        config = self._node.config
        clients = []
        for addresses, name in ((chunk.addresses, chunk.node), (self._node.addresses, config.node)):
            client = await StoreClient.connect(addresses, token=config.token, name=f"{config.node}-copier", node=name)
            stack.push_async_callback(client.close)
            clients.append(client)
        return _Link(chunk.node, *clients)

    async def _copy(self, chunk: Wish, link: _Link) -> bool:
        """Whether all objects of the chunk are here now. Raises StoreError."""
        leased = await link.theirs.lease(chunk.keys)
        found = leased.held(Hold.LEASED, range(leased.hits) if chunk.is_chain else None)
        places = [place for place in (leased.locations[at] for at in found) if place is not None]
        is_whole = False
        if places:
            keys, sizes = [chunk.keys[at] for at in found], [place.size for place in places]
            reserved = await link.ours.reserve(keys, sizes, all_or_nothing=chunk.is_chain)
            wanted = reserved.held(Hold.WRITING)
            pairs = [(found[at], at, sizes[at]) for at in wanted]
            began = time.monotonic_ns()
            checksums = await asyncio.to_thread(_transfer, leased, reserved, pairs)
            self._node.count("copy_ns", time.monotonic_ns() - began)
            self._node.count("bytes_copied", sum([size for _, _, size in pairs]))
            await link.ours.commit(reserved, wanted, checksums=checksums)
            self._node.count("blocks_copied", len(wanted))
            is_whole = len(wanted) + reserved.statuses.count(PutStatus.EXISTS) == len(chunk.keys)
        await link.theirs.release(leased)
        return is_whole


class _Link(NamedTuple):
    node: str
    theirs: StoreClient
    ours: StoreClient


def _transfer(leased: LeasedObjects, reserved: Reservation, pairs: Sequence[tuple[int, int, int]]) -> list[int]:
    """From segment to segment, without a copy in between where ours is mapped. pairs: an object's index there, here, and its
    size. Checksums, which are looked at on the way; taken now where there was none. Raises StoreError."""
    checksums: list[int] = []

    def receive(view: memoryview, there: int) -> None:
        leased.read(there, 0, view)
        checksum = leased.checksums[there]
        checksums.append(contents.checksum(view) if checksum is None else checksum)

    for there, here, size in pairs:
        reserved.fill(here, 0, size, lambda view, there=there: receive(view, there))  # type: ignore[misc]
    return checksums
