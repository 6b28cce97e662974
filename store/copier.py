"""Carries out a node's `Copies`: reads from the source node and writes into our own, as a client of both like any other.

The two connections live as long as one chunk. Whatever goes wrong, their ends give back all that was claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence

from mooncake.core.errors import StoreError
from mooncake.core.keys import object_keys
from mooncake.core.messages import CopyBlocks
from mooncake.store.client import StoreClient
from mooncake.store.copies import Copies
from mooncake.store.handles import LeasedObjects, Reservation
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

    def wish(self, message: CopyBlocks) -> None:
        self.copies.wish(message, time.monotonic_ns())
        self._wished.set()

    async def close(self) -> None:
        """Waits for data calls that are running."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            chunk = self.copies.next(time.monotonic_ns())
            if chunk is None:
                self._wished.clear()
                await self._wished.wait()
                continue
            whole = False
            try:
                async with asyncio.timeout(_CHUNK_S):
                    whole = await self._copy(chunk)
            except TimeoutError:
                log.warning("copy from %s: not done within %g s", chunk.source.node, _CHUNK_S)
            except StoreError as error:
                log.warning("copy from %s: %s", chunk.source.node, error)
            self.copies.done(whole=whole)

    async def _copy(self, chunk: CopyBlocks) -> bool:
        """Whether all blocks of the chunk are here now. Raises StoreError."""
        source, node = chunk.source, self._node
        keys = object_keys(source.block_keys, chunk.shard)
        async with (
            self._client(source.addresses, source.node) as theirs,
            self._client(node.addresses, node.config.node) as ours,
        ):
            leased = await theirs.lease(keys)
            there = [location for location in leased.locations[: leased.hits] if location is not None]
            if not there:
                return False
            sizes = [location.size for location in there]
            reserved = await ours.reserve(keys[: len(there)], sizes, all_or_nothing=True)
            wanted = [at for at, status in enumerate(reserved.statuses) if status is PutStatus.RESERVED]
            if len(wanted) + reserved.statuses.count(PutStatus.EXISTS) < len(there):
                return False
            await asyncio.to_thread(_transfer, leased, reserved, [(at, sizes[at]) for at in wanted])
            await ours.commit(reserved, wanted)
            node.count("blocks_copied", len(wanted))
            return len(there) == len(keys)

    @contextlib.asynccontextmanager
    async def _client(self, addresses: Sequence[str], node: str) -> AsyncIterator[StoreClient]:
        config = self._node.config
        client = await StoreClient.connect(addresses, token=config.token, name=f"{config.node}-copier", node=node)
        try:
            yield client
        finally:
            await client.close()


def _transfer(leased: LeasedObjects, reserved: Reservation, wanted: Sequence[tuple[int, int]]) -> None:
    """From segment to segment, without a copy in between where ours is mapped."""
    for at, size in wanted:
        reserved.fill(at, 0, size, lambda view, at=at: leased.read(at, 0, view))  # type: ignore[misc]
