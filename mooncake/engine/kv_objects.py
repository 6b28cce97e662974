"""Leases and reservations of the store as the KV of a sequence (`KvReader`, `KvWriter`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mooncake.core.errors import StoreError
from mooncake.core.keys import object_key
from mooncake.core.types import KvSource
from mooncake.engine.base import KvLayout
from mooncake.store.handles import LeasedObjects, Reservation
from mooncake.store.operations import StoreOperations
from mooncake.store.types import CommitStatus, PutStatus


class SourceReader:
    """The leading objects of a source that could be leased. num_tokens: how many tokens they cover."""

    def __init__(self, client: StoreOperations, leased: LeasedObjects, source: KvSource, block_tokens: int) -> None:
        self._client = client
        self._leased = leased
        whole = leased.hits == len(leased)
        self.num_tokens = source.num_tokens if whole else leased.hits * block_tokens

    def use(self, index: int, offset: int, size: int, use: Callable[[memoryview], None]) -> None:
        self._leased.use(index, offset, size, use)

    async def close(self) -> None:
        await self._client.release(self._leased)


async def open_source(client: StoreOperations, source: KvSource, shard: bytes, block_tokens: int) -> SourceReader:
    """Lease what there is of the source. Raises StoreError if the node cannot be asked."""
    leased = await client.lease([object_key(key, shard) for key in _keys(source)])
    return SourceReader(client, leased, source, block_tokens)


def _keys(source: KvSource) -> tuple[bytes, ...]:
    return (*source.block_keys, source.partial_key) if source.partial_key else source.block_keys


class TargetWriter:
    """Objects to be written for a sequence: shared blocks, and the partial last one, which lives as long as its leases. Each of
    the two, where there is one, is a reservation of its own."""

    def __init__(self, client: StoreOperations, parts: Sequence[Reservation], target: KvSource) -> None:
        self._client = client
        self._parts = parts
        self._places = [(part, at) for part in parts for at in range(len(part))]
        self.num_tokens = target.num_tokens

    def wants(self, index: int) -> bool:
        part, at = self._places[index]
        return part.statuses[at] is PutStatus.RESERVED

    def fill(self, index: int, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        part, at = self._places[index]
        part.fill(at, offset, size, fill)

    async def commit(self, first: int, last: int) -> bool:
        """Commit and keep leased; whether all of [first, last) can be read now."""
        wanted = [self._places[index] for index in range(first, last) if self.wants(index)]
        calls = [
            self._client.commit(part, [at for owner, at in wanted if owner is part], lease=True) for part in self._parts
        ]
        done = (CommitStatus.COMMITTED, CommitStatus.EXISTS)
        return all(status in done for statuses in await asyncio.gather(*calls) for status in statuses.values())

    async def close(self) -> None:
        """Cancel what is not committed, release the rest."""
        for part in self._parts:
            await _give_back(self._client, part)


async def reserve_target(
    client: StoreOperations, target: KvSource, layout: KvLayout, shard: bytes, block_tokens: int
) -> TargetWriter | None:
    """All or nothing; None if there is no room now. Raises StoreError if the node cannot be asked."""
    num_blocks = len(target.block_keys)
    calls = []
    if num_blocks:
        keys = [object_key(key, shard) for key in target.block_keys]
        sizes = [layout.object_bytes(block_tokens)] * num_blocks
        calls.append(client.reserve(keys, sizes, lease_existing=True, all_or_nothing=True))
    if target.partial_key:
        keys = [object_key(target.partial_key, shard)]
        sizes = [layout.object_bytes(target.num_tokens - num_blocks * block_tokens)]
        calls.append(client.reserve(keys, sizes, lease_existing=True, all_or_nothing=True, ephemeral=True))
    results = await asyncio.gather(*calls, return_exceptions=True)
    parts = [result for result in results if isinstance(result, Reservation)]
    if len(parts) == len(calls) and all(_granted(part) for part in parts):
        return TargetWriter(client, parts, target)
    for part in parts:
        await _give_back(client, part)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return None


def _granted(part: Reservation) -> bool:
    return all(status in (PutStatus.RESERVED, PutStatus.EXISTS) for status in part.statuses)


async def _give_back(client: StoreOperations, part: Reservation) -> None:
    try:
        await client.cancel(part)
        await client.release(part)
    except StoreError:
        # The node is gone or does not answer: it takes everything back when it sees our connection end.
        return
