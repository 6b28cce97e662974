"""Copies between nodes: what comes next, and that everything claimed for it is given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from mooncake.core.keys import block_keys_of, object_key
from mooncake.core.messages import CopyBlocks
from mooncake.core.types import NANOS_PER_S, KvSource
from mooncake.store.client import StoreClient
from mooncake.store.copier import Copier
from mooncake.store.copies import CHUNK_OBJECTS, Copies, Wish
from mooncake.store.events import Event, Lease, Report, Snapshot
from mooncake.store.node import StoreNode
from tests.store.helpers import TOKEN, eventually, run, running_node

SHARD = b"a shard "
SIZE = 1000


def blocks(first: int, last: int) -> tuple[bytes, ...]:
    return tuple(number.to_bytes(16, "big") for number in range(first, last))


def wish(first: int, last: int, addresses: tuple[str, ...] = ("unix:a",), node: str = "a") -> Wish:
    return Wish(node, addresses, blocks(first, last))


def of_conductor(first: int, last: int, addresses: tuple[str, ...], node: str = "a") -> CopyBlocks:
    return CopyBlocks(KvSource(node, 4 * (last - first), blocks(first, last), addresses=addresses), SHARD)


# ---------------------------------------------------------------- what comes next


def test_chunk_by_chunk_and_wish_by_wish() -> None:
    copies, long = Copies(), 2 * CHUNK_OBJECTS + 1
    copies.wish(wish(0, long), 0)
    copies.wish(wish(1000, 1001), 0)
    ranges = [(0, CHUNK_OBJECTS), (CHUNK_OBJECTS, 2 * CHUNK_OBJECTS), (2 * CHUNK_OBJECTS, long), (1000, 1001)]
    for first, last in ranges:
        assert copies.next(0) == wish(first, last)
        assert copies.next(0) is None, "one at a time"
        copies.done(whole=True)
    assert copies.next(0) is None and len(copies) == 0


def test_what_follows_a_chunk_that_is_not_whole_is_not_copied() -> None:
    copies = Copies()
    copies.wish(wish(0, 2 * CHUNK_OBJECTS), 0)
    copies.wish(wish(1000, 1001), 0)
    assert copies.next(0) == wish(0, CHUNK_OBJECTS)
    copies.done(whole=False)
    assert copies.next(0) == wish(1000, 1001)


def test_the_queue_is_bounded_and_knows_what_waits() -> None:
    copies = Copies()
    for _ in range(3):
        copies.wish(wish(0, 1), 0)
    assert (len(copies), copies.num_dropped) == (1, 0)
    for at in range(68):
        copies.wish(wish(at, at + 1), 0)
    assert (len(copies), copies.num_dropped) == (64, 4)
    copies.wish(wish(0, 0), 0)
    assert len(copies) == 64, "of nothing there is no copy"


def test_objects_that_are_no_chain_are_copied_as_far_as_they_are_there() -> None:
    copies = Copies()
    single = msgspec.structs.replace(wish(0, 2 * CHUNK_OBJECTS), is_chain=False)
    copies.wish(single, 0)
    for first in (0, CHUNK_OBJECTS):
        chunk = copies.next(0)
        assert chunk is not None and chunk.keys == blocks(first, first + CHUNK_OBJECTS)
        copies.done(whole=False)
    assert copies.next(0) is None


def test_an_old_wish_is_not_carried_out() -> None:
    copies = Copies()
    copies.wish(wish(0, 2 * CHUNK_OBJECTS), 0)
    copies.wish(wish(1, 2), 10 * NANOS_PER_S)
    assert copies.next(29 * NANOS_PER_S) == wish(0, CHUNK_OBJECTS)
    copies.done(whole=True)
    assert copies.next(30 * NANOS_PER_S) == wish(1, 2), "the second half of the first is too late"
    copies.done(whole=True)
    assert (copies.next(30 * NANOS_PER_S), copies.num_dropped) == (None, 1)


# ---------------------------------------------------------------- two nodes


class Pair:
    """Node a has `blocks` 0 to num_blocks; node b copies."""

    def __init__(self, a: StoreNode, b: StoreNode, client: StoreClient, reports: list[Report | Snapshot]) -> None:
        self.a, self.b, self.client = a, b, client
        self.reports = reports
        self.copier = Copier(b)

    async def copy(self, first: int, last: int, at: int) -> None:
        """at: by which of a's addresses."""
        self.copier.wish_blocks(of_conductor(first, last, (self.a.addresses[at],)))
        await eventually(lambda: not len(self.copier.copies))

    async def contents(self, first: int, last: int) -> list[bytes | None]:
        client = await StoreClient.connect(self.b.addresses, token=TOKEN, name="test")
        leased = await client.lease([object_key(key, SHARD) for key in blocks(first, last)])
        found: list[bytes | None] = []
        for index, location in enumerate(leased.locations):
            data = bytearray(SIZE)
            if location is not None:
                await asyncio.to_thread(leased.read, index, 0, data)
            found.append(bytes(data) if location is not None else None)
        await client.close()
        return found


def content(number: int) -> bytes:
    return bytes([number % 251]) * SIZE


@asynccontextmanager
async def running_pair(num_blocks: int, *, room: int = 1 << 20) -> AsyncIterator[Pair]:
    reports: list[Report | Snapshot] = []
    async with running_node(node="a") as a, running_node(reports, node="b", capacity_bytes=room) as b:
        client = await StoreClient.connect(a.addresses, token=TOKEN, name="test")
        put = await client.reserve([object_key(key, SHARD) for key in blocks(0, num_blocks)], [SIZE] * num_blocks)
        for number in range(num_blocks):
            put.write(number, 0, content(number))
        await client.commit(put)
        pair = Pair(a, b, client, reports)
        try:
            yield pair
            await eventually(lambda: b.metrics()["clients"] == 0 and a.metrics()["clients"] == 1)
            for node in (a, b):
                assert (node.metrics()["leases"], node.metrics()["reservations"]) == (0, 0)
        finally:
            await pair.copier.close()
            await client.close()


@pytest.mark.parametrize("at", [0, 1], ids=["unix", "tcp"])
def test_blocks_are_copied_and_reported(at: int) -> None:
    num_blocks = CHUNK_OBJECTS + 5

    async def main() -> None:
        async with running_pair(num_blocks) as pair:
            await pair.copy(0, num_blocks, at)
            assert await pair.contents(0, num_blocks) == [content(number) for number in range(num_blocks)]
            assert pair.b.metrics()["blocks_copied"] == num_blocks
            await eventually(lambda: sum(len(r.added) for r in pair.reports if isinstance(r, Report)) == num_blocks)
            added = [key for report in pair.reports if isinstance(report, Report) for key in report.added]
            assert sorted(block_keys_of(added)) == sorted(blocks(0, num_blocks))

    run(main())


def test_what_is_there_already_is_not_copied_again() -> None:
    async def main() -> None:
        async with running_pair(6) as pair:
            await pair.copy(0, 4, 0)
            await pair.copy(0, 6, 0)
            assert pair.b.metrics()["blocks_copied"] == 6
            assert await pair.contents(0, 6) == [content(number) for number in range(6)]

    run(main())


def test_a_missing_block_ends_the_copy_before_it() -> None:
    async def main() -> None:
        async with running_pair(8) as pair:
            await pair.client.remove([object_key(key, SHARD) for key in blocks(5, 6)])
            await pair.copy(0, 8, 0)
            assert await pair.contents(0, 8) == [content(number) for number in range(5)] + [None] * 3
            pair.copier.wish_objects(pair.a.info, tuple([object_key(key, SHARD) for key in blocks(5, 8)]))
            await eventually(lambda: not len(pair.copier.copies))
            there = [content(number) if number != 5 else None for number in range(8)]
            assert await pair.contents(0, 8) == there, "replicas are no chain"
            await pair.copy(100, 104, 0)
            assert pair.b.metrics()["blocks_copied"] == 7

    run(main())


def test_no_room_ends_it_and_frees_everything() -> None:
    async def main() -> None:
        async with running_pair(CHUNK_OBJECTS, room=CHUNK_OBJECTS * SIZE // 2) as pair:
            await pair.copy(0, CHUNK_OBJECTS, 0)
            assert pair.b.metrics()["blocks_copied"] == 0
            assert pair.b.metrics()["used_bytes"] == 0
            await pair.copy(0, 3, 0)
            assert pair.b.metrics()["blocks_copied"] == 3, "the next one is tried as ever"

    run(main())


@pytest.mark.parametrize(("addresses", "node"), [(("unix:/nowhere/at-all.sock",), "a"), ((), "a"), (None, "another")])
def test_a_source_that_is_not_there_ends_it(addresses: tuple[str, ...] | None, node: str) -> None:
    async def main() -> None:
        async with running_pair(4) as pair:
            where = pair.a.addresses[:1] if addresses is None else addresses
            pair.copier.wish_blocks(of_conductor(0, 4, where, node))
            await eventually(lambda: not len(pair.copier.copies))
            assert pair.b.metrics()["blocks_copied"] == 0
            await pair.copy(0, 4, 0)
            assert pair.b.metrics()["blocks_copied"] == 4

    run(main())


def test_a_source_that_dies_under_way_ends_it() -> None:
    async def main() -> None:
        async with running_pair(CHUNK_OBJECTS) as pair:
            handle, num_leased = pair.a.handle, 0

            def handle_and_cut(event: Event) -> None:
                nonlocal num_leased
                handle(event)
                if isinstance(event, Lease):
                    num_leased = pair.a.metrics()["leases"]
                    for connection in tuple(pair.a.connections):
                        if connection.client == event.client:
                            connection.abort()

            pair.a.handle = handle_and_cut  # type: ignore[method-assign]
            pair.copier.wish_blocks(of_conductor(0, CHUNK_OBJECTS, (pair.a.addresses[1],)))
            await eventually(lambda: not len(pair.copier.copies))
            assert num_leased == CHUNK_OBJECTS
            assert (pair.b.metrics()["blocks_copied"], pair.b.metrics()["used_bytes"]) == (0, 0)

    run(main())
