"""A sequence's KV in the store: what of a source can be read, what of a target is written, and that all is given back."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from mooncake.core.errors import BadArgument, DeadlineExceeded, StoreUnavailable
from mooncake.core.keys import object_key
from mooncake.core.types import KvSource
from mooncake.engine.kv_objects import (
    SourceReader,
    StoredTarget,
    TargetWriter,
    open_source,
    reserve_target,
    watch_target,
)
from mooncake.store.core import StoreCore
from mooncake.store.events import Cancel, Request
from mooncake.store.memory import MemoryNode, MemoryStore
from mooncake.store.operations import StoreOperations
from mooncake.store.reservations import RESERVATION_NS
from tests.engine.fakes import BLOCK, LAYOUT, contents
from tests.engine.jobs import make_source

SHARD = bytes(8)
UNIT = 64
"""Room that an object takes: a block has 48 bytes, the partial one 30."""
SOURCE = make_source(1, 21)
KEYS = [object_key(key, SHARD) for key in (*SOURCE.block_keys, SOURCE.partial_key)]
CONTENTS = contents(21)


class Node:
    """A store in this process with room for so many objects. now: its time."""

    def __init__(self, num_objects: int = 10, *, quotas: dict[str, int] | None = None) -> None:
        self.now = 0
        core = StoreCore(num_objects * UNIT, epoch=1, alignment=UNIT, quotas=quotas)
        self.memory = MemoryNode(num_objects * UNIT, core=core, clock=lambda: self.now)

    def client(self) -> MemoryStore:
        return MemoryStore(self.memory)

    @property
    def held(self) -> tuple[int, int, int]:
        """Reservations, leases, objects."""
        metrics = self.memory.core.metrics()
        return metrics["reservations"], metrics["leases"], metrics["objects"]


async def put(client: StoreOperations, *indices: int) -> None:
    """Objects of the source that somebody has computed before."""
    reservation = await client.reserve([KEYS[at] for at in indices], [len(CONTENTS[at]) for at in indices])
    for number, at in enumerate(indices):
        reservation.write(number, 0, CONTENTS[at])
    await client.commit(reservation)


async def reserve(client: StoreOperations, target: KvSource = SOURCE) -> TargetWriter | None:
    return await reserve_target(client, target, LAYOUT, SHARD, BLOCK)


async def granted(client: StoreOperations, target: KvSource = SOURCE) -> TargetWriter:
    writer = await reserve(client, target)
    assert writer is not None
    return writer


def write(writer: TargetWriter, *indices: int) -> None:
    def fill(at: int, out: memoryview) -> None:
        out[:] = CONTENTS[at]

    for at in indices:
        writer.fill(at, 0, len(CONTENTS[at]), partial(fill, at))


def read(reader: SourceReader, index: int, offset: int, size: int) -> bytes:
    found = bytearray()
    reader.use(index, offset, size, found.extend)
    return bytes(found)


@pytest.mark.parametrize(("tenant", "kept"), [("acme", 1), ("other", 2)])
def test_what_is_over_the_quota_is_handed_over_and_not_kept(tenant: str, kept: int) -> None:
    """Acme may have one object: the first block stays."""

    async def main() -> None:
        node = Node(quotas={"acme": UNIT})
        client = node.client()
        writer = await reserve_target(client, SOURCE, LAYOUT, SHARD, BLOCK, tenant)
        assert writer is not None and all(writer.wants(at) for at in range(3))
        write(writer, 0, 1, 2)
        assert await writer.commit(0, 3)
        reader = await open_source(node.client(), SOURCE, SHARD, BLOCK, tenant)
        assert reader.num_tokens == 21
        await writer.close()
        assert [read(reader, at, 0, len(CONTENTS[at])) for at in range(3)] == CONTENTS
        await reader.close()
        assert node.held == (0, 0, kept)

    asyncio.run(main())


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(("present", "num_tokens"), [((0, 1, 2), 21), ((0, 1), 16), ((0, 2), 8), ((1, 2), 0), ((), 0)])
def test_a_source_has_the_tokens_of_its_leading_objects(present: tuple[int, ...], num_tokens: int) -> None:
    async def main() -> None:
        node = Node()
        if present:
            await put(node.client(), *present)
        reader = await open_source(node.client(), SOURCE, SHARD, BLOCK)
        assert reader.num_tokens == num_tokens
        assert node.held == (0, len(present), len(present))
        await reader.close()
        assert node.held == (0, 0, len(present)), "those behind the gap too"

    asyncio.run(main())


def test_ranges_of_leased_objects_can_be_read_and_no_others() -> None:
    async def main() -> None:
        node = Node()
        await put(node.client(), 0, 2)
        reader = await open_source(node.client(), SOURCE, SHARD, BLOCK)
        assert read(reader, 0, 16, 4) == CONTENTS[0][16:20]
        assert read(reader, 2, 0, 30) == CONTENTS[2]
        for index, offset, size in ((1, 0, 4), (0, 40, 9), (0, -1, 4)):
            with pytest.raises(BadArgument):
                read(reader, index, offset, size)
        await reader.close()
        with pytest.raises(BadArgument, match="CLOSED"):
            read(reader, 0, 16, 4)

    asyncio.run(main())


def test_a_source_of_whole_blocks_has_no_other_object() -> None:
    async def main() -> None:
        node = Node()
        await put(node.client(), 0, 1, 2)
        reader = await open_source(node.client(), make_source(1, 16), SHARD, BLOCK)
        assert (reader.num_tokens, node.held) == (16, (0, 2, 3))

    asyncio.run(main())


# ---------------------------------------------------------------- targets


def test_a_target_is_committed_in_parts_and_kept_for_whoever_fetches_it() -> None:
    async def main() -> None:
        node = Node()
        writer, other = await granted(node.client()), node.client()
        assert node.held == (3, 0, 0) and all(writer.wants(at) for at in range(3))
        write(writer, 0, 1, 2)
        assert await writer.commit(0, 1)
        assert (await open_source(other, SOURCE, SHARD, BLOCK)).num_tokens == 8
        assert await writer.commit(1, 3)
        assert node.held == (0, 3 + 1, 3)
        reader = await open_source(other, SOURCE, SHARD, BLOCK)
        assert [read(reader, at, 0, len(CONTENTS[at])) for at in range(3)] == CONTENTS
        await writer.close()
        assert node.held == (0, 4, 3), "the partial object lives as long as its reader's lease"
        await other.close()
        assert node.held == (0, 0, 2), "the blocks stay"

    asyncio.run(main())


def test_what_exists_is_leased_and_not_wanted() -> None:
    async def main() -> None:
        node = Node()
        await put(node.client(), 1)
        writer = await granted(node.client())
        assert [writer.wants(at) for at in range(3)] == [True, False, True]
        assert node.held == (2, 1, 1)
        write(writer, 0, 2)
        assert await writer.commit(0, 3)
        assert node.held == (0, 3, 3)
        await writer.close()
        assert node.held == (0, 0, 2)

    asyncio.run(main())


@pytest.mark.parametrize(("present", "num_stored"), [((0, 1), 2), ((0,), 1), ((1,), 0), ((), 0)])
def test_a_target_says_how_many_of_its_leading_objects_exist(present: tuple[int, ...], num_stored: int) -> None:
    async def main() -> None:
        node = Node()
        if present:
            await put(node.client(), *present)
        assert (await granted(node.client())).num_stored == num_stored

    asyncio.run(main())


def test_without_room_for_all_nothing_is_reserved_or_leased() -> None:
    async def main() -> None:
        node = Node(num_objects=3)
        keeper = node.client()
        await put(keeper, 1)
        kept = await granted(keeper, make_source(9, 8))
        assert await reserve(node.client()) is None
        assert node.held == (1, 0, 1)
        await kept.close()
        await (await granted(node.client())).close()
        assert node.held == (0, 0, 1)

    asyncio.run(main())


def test_what_is_not_committed_is_given_up_at_close() -> None:
    async def main() -> None:
        node = Node()
        writer = await granted(node.client())
        write(writer, 0)
        await writer.commit(0, 1)
        assert node.held == (2, 1, 1)
        await writer.close()
        assert node.held == (0, 0, 1)
        with pytest.raises(BadArgument):
            write(writer, 1)

    asyncio.run(main())


def test_another_writer_that_was_first_is_as_good() -> None:
    async def main() -> None:
        node = Node()
        slow, quick = await granted(node.client()), await granted(node.client())
        assert all(slow.wants(at) and quick.wants(at) for at in range(2))
        for writer in (quick, slow):
            write(writer, 0, 1, 2)
            assert await writer.commit(0, 2)
        assert node.held == (2, 4, 2)
        await quick.close()
        assert node.held == (1, 2, 2)
        await slow.close()
        assert node.held == (0, 0, 2)

    asyncio.run(main())


def test_a_reservation_that_ran_out_is_no_commit() -> None:
    async def main() -> None:
        node = Node()
        writer = await granted(node.client())
        write(writer, 0, 1, 2)
        node.now = RESERVATION_NS + 1
        assert not await writer.commit(0, 3)
        await writer.close()
        assert node.held == (0, 0, 0)

    asyncio.run(main())


class SlowToCancel(MemoryStore):
    """Its node does not answer to a cancel in time, but lives on."""

    async def _call(self, request: Request, deadline_s: float) -> Any:
        if isinstance(request, Cancel):
            raise DeadlineExceeded("cancel: no answer")
        return await super()._call(request, deadline_s)


def test_leases_are_given_back_though_a_cancel_got_no_answer() -> None:
    async def main() -> None:
        node = Node()
        client = SlowToCancel(node.memory)
        writer = await granted(client)
        write(writer, 0)
        await writer.commit(0, 1)
        await writer.close()
        assert node.held == (2, 0, 1)
        await client.close()
        assert node.held == (0, 0, 1)

    asyncio.run(main())


def test_of_a_connection_that_was_lost_nothing_is_left() -> None:
    async def main() -> None:
        node = Node()
        await put(node.client(), 0, 1)
        client = node.client()
        reader, writer = await open_source(client, SOURCE, SHARD, BLOCK), await granted(client)
        await client.close()
        assert node.held == (0, 0, 2)
        with pytest.raises(StoreUnavailable):
            read(reader, 0, 0, 4)
        with pytest.raises(StoreUnavailable):
            write(writer, 2)
        with pytest.raises(StoreUnavailable):
            await writer.commit(2, 3)
        await writer.close()
        await reader.close()

    asyncio.run(main())


def test_a_node_that_cannot_be_asked_is_an_error() -> None:
    async def main() -> None:
        client = Node().client()
        await client.close()
        with pytest.raises(StoreUnavailable):
            await open_source(client, SOURCE, SHARD, BLOCK)
        with pytest.raises(StoreUnavailable):
            await reserve(client)

    asyncio.run(main())


# ---------------------------------------------------------------- targets that the engine stores by itself


async def watch(client: StoreOperations) -> StoredTarget:
    return await watch_target(client, SOURCE, SHARD)


def test_what_an_engine_stores_by_itself_is_leased_as_soon_as_it_is_there() -> None:
    async def run() -> None:
        node = Node()
        client, engine = node.client(), node.client()
        await put(engine, 0)
        target = await watch(client)
        assert (target.num_tokens, target.num_stored, target.target) == (21, 1, SOURCE)
        assert not target.wants(1) and node.held == (0, 1, 1)
        committing = asyncio.create_task(target.commit(1, 3))
        await asyncio.sleep(0.01)
        assert not committing.done() and node.held[1] == 1
        await put(engine, 1, 2)
        assert await committing and node.held == (0, 3, 3)
        await target.close()
        assert node.held == (0, 0, 3)

    asyncio.run(run())


def test_what_an_engine_does_not_store_in_time_is_not_committed() -> None:
    async def run() -> None:
        node = Node()
        target = await watch_target(node.client(), SOURCE, SHARD, stored_s=0.02)
        await put(node.client(), 1)
        assert not await target.commit(0, 2) and node.held[1] == 0
        await target.close()

    asyncio.run(run())
