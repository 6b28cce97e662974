"""Leases and reservations of the store as the KV of a sequence (`KvReader`, `KvWriter`)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from mooncake.core.errors import StoreError
from mooncake.core.keys import object_keys
from mooncake.core.types import KvSource
from mooncake.engine.base import KvLayout
from mooncake.store.handles import LeasedObjects, Reservation
from mooncake.store.operations import StoreOperations
from mooncake.store.types import CommitStatus, PutStatus, num_existing

STORED_S = 5.0
"""How long an engine that stores by itself takes at most, from its last token on."""
_FIRST_LOOK_S, _LOOK_S = 0.002, 0.05


class SourceReader:
    """The leading objects of a source that could be leased. num_tokens: how many tokens they cover; ssd_tokens: of these, those
    that were read from SSD for it."""

    def __init__(
        self, client: StoreOperations, leased: LeasedObjects, source: KvSource, keys: Sequence[bytes], block_tokens: int
    ) -> None:
        self._client = client
        self._leased = leased
        self._keys = keys
        whole = leased.hits == len(leased)
        self.num_tokens = source.num_tokens if whole else leased.hits * block_tokens
        self.ssd_tokens = min(self.num_tokens, leased.num_loaded * block_tokens)

    def use(self, index: int, offset: int, size: int, use: Callable[[memoryview], None]) -> None:
        self._leased.use(index, offset, size, use)

    async def close(self) -> None:
        await self._client.release(self._leased)
        if self._leased.damaged:
            await self._client.remove([self._keys[at] for at in self._leased.damaged], damaged=True)


async def open_source(
    client: StoreOperations, source: KvSource, shard: bytes, block_tokens: int, tenant: str = ""
) -> SourceReader:
    """Lease what there is of the source. Raises StoreError if the node cannot be asked."""
    keys = object_keys(_keys(source), shard)
    leased = await client.lease(keys, tenant=tenant)
    return SourceReader(client, leased, source, keys, block_tokens)


def _keys(source: KvSource) -> tuple[bytes, ...]:
    return (*source.block_keys, source.partial_key) if source.partial_key else source.block_keys


class TargetWriter:
    """Objects to be written for a sequence: shared blocks, and the partial last one, which lives as long as its leases."""

    def __init__(self, client: StoreOperations, reservation: Reservation, target: KvSource) -> None:
        self._client = client
        self._reservation = reservation
        self.num_tokens = target.num_tokens
        self.num_stored = num_existing(reservation.statuses)

    def wants(self, index: int) -> bool:
        return self._reservation.statuses[index] is PutStatus.RESERVED

    def fill(self, index: int, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        self._reservation.fill(index, offset, size, fill)

    async def commit(self, first: int, last: int) -> bool:
        """Commit and keep leased; whether all of [first, last) can be read now."""
        statuses = await self._client.commit(self._reservation, range(first, last), lease=True)
        return all(status in (CommitStatus.COMMITTED, CommitStatus.EXISTS) for status in statuses.values())

    async def close(self) -> None:
        """Cancel what is not committed, release the rest."""
        await _give_back(self._client, self._reservation)


class StoredTarget:
    """As TargetWriter, of an engine that stores by itself: nothing is written here, and a commit looks for what it stored."""

    def __init__(
        self,
        client: StoreOperations,
        existing: LeasedObjects,
        keys: Sequence[bytes],
        target: KvSource,
        stored_s: float,
    ) -> None:
        self.target = target
        self.num_tokens = target.num_tokens
        self.num_stored = existing.hits
        self._client = client
        self._keys = keys
        self._stored_s = stored_s
        self._leased = [existing]

    def wants(self, index: int) -> bool:
        return False

    def fill(self, index: int, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        raise AssertionError("nobody asked for it")

    async def commit(self, first: int, last: int) -> bool:
        """Lease them, as soon as they are there; False if one is not in time."""
        until, pause_s = time.monotonic() + self._stored_s, _FIRST_LOOK_S
        while True:
            leased = await self._client.lease(self._keys[first:last])
            if leased.hits == len(leased):
                self._leased.append(leased)
                return True
            await self._client.release(leased)
            if time.monotonic() > until:
                return False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S)

    async def close(self) -> None:
        for leased in self._leased:
            with contextlib.suppress(StoreError):
                await self._client.release(leased)


async def watch_target(
    client: StoreOperations, target: KvSource, shard: bytes, *, stored_s: float = STORED_S
) -> StoredTarget:
    """For an engine that stores by itself. Raises StoreError if the node cannot be asked."""
    keys = object_keys(_keys(target), shard)
    return StoredTarget(client, await client.lease(keys), keys, target, stored_s)


async def reserve_target(
    client: StoreOperations, target: KvSource, layout: KvLayout, shard: bytes, block_tokens: int, tenant: str = ""
) -> TargetWriter | None:
    """All or nothing; None if there is no room now. What exceeds the tenant's quota lives as long as its leases. Raises
    StoreError if the node cannot be asked."""
    num_blocks = len(target.block_keys)
    sizes = [layout.object_bytes(block_tokens)] * num_blocks
    if target.partial_key:
        sizes.append(layout.object_bytes(target.num_tokens - num_blocks * block_tokens))
    reservation = await client.reserve(
        object_keys(_keys(target), shard),
        sizes,
        lease_existing=True,
        all_or_nothing=True,
        ephemeral_last=bool(target.partial_key),
        tenant=tenant,
    )
    if all(status in (PutStatus.RESERVED, PutStatus.EXISTS) for status in reservation.statuses):
        return TargetWriter(client, reservation, target)
    await _give_back(client, reservation)
    return None


async def _give_back(client: StoreOperations, reservation: Reservation) -> None:
    """Each as far as it goes: a node that is gone takes everything back when it sees our connection end, but one that did not
    answer in time may well live on, and leases that are not released then stay."""
    with contextlib.suppress(StoreError):
        await client.cancel(reservation)
    with contextlib.suppress(StoreError):
        await client.release(reservation)
