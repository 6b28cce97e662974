"""The same-machine read path: index, tables, what the node does with them, and the order in memory that it all stands on."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mooncake.core.errors import HandleLost, SegmentError
from mooncake.core.event_log import EventLogWriter
from mooncake.sim.replay_log import replay_log
from mooncake.store.api import Absent, LeasedView, PutResult, Store
from mooncake.store.client import StoreClient
from mooncake.store.local.index import Columns, Found, IndexReader, IndexWriter, index_bytes
from mooncake.store.local.memory import Fence, ordered, words
from mooncake.store.local.segment import take_segment
from mooncake.store.local.table import CLAIMS, USES, ClientTable, TableReader
from mooncake.store.node import StoreNode
from mooncake.store.service import StoreSettings
from tests.store.helpers import TOKEN, die, eventually, key, keys, node_config, run, running_node

pytestmark = pytest.mark.skipif(not ordered(), reason="this processor may reorder stores: clients ask the node instead")

# ---------------------------------------------------------------- index


def index(num_entries: int) -> tuple[IndexWriter, IndexReader]:
    memory = memoryview(bytearray(index_bytes(num_entries)))
    writer = IndexWriter(memory, num_entries)
    writer.format()
    return writer, IndexReader(memory, num_entries)


def list_object(writer: IndexWriter, entry: Found, name: bytes) -> None:
    row, number, offset, size, checksum = entry
    sums = {} if checksum is None else {row: checksum}
    writer.publish([row], Columns({row: number}, {row: name}, {row: offset}, {row: size}, sums, (), lambda row: 0))


def test_the_index_says_what_is_published_and_nothing_else() -> None:
    """Thousands of random changes, the table nearly full, against a dictionary."""
    rng, num_rows = random.Random(5), 50
    writer, reader = index(num_rows)
    rows: dict[int, bytes] = {}
    for number in range(1, 5000):
        row = rng.randrange(num_rows)
        if row in rows:
            writer.hide([row])
            assert not reader.contains(rows[row])
            writer.remove([row])
            del rows[row]
        elif len(set(rows.values())) < num_rows:
            name = key(rng.randrange(10_000))
            if name not in rows.values():
                list_object(writer, Found(row, number, row * 64, number, None if number % 3 else number * 7), name)
                rows[row] = name
                assert reader.find(name) == Found(row, number, row * 64, number, None if number % 3 else number * 7)
        for row, name in rows.items():
            found = reader.find(name)
            assert found is not None and found.row == row and reader.is_current(found) and reader.contains(name)
        assert reader.find(key(20_000)) is None and not reader.contains(key(20_000))
    assert {name for name, _ in writer.listed()} == set(rows.values())


def test_deleted_cells_are_cleared_so_that_misses_stay_short() -> None:
    writer, reader = index(64)
    for turn in range(200):
        for row in range(64):
            list_object(writer, Found(row, turn * 64 + row + 1, 0, 1, None), key(turn * 64 + row))
        writer.hide(range(64))
        writer.remove(range(64))
    assert not any(reader._cells)


def test_rows_without_an_entry_are_left_out_and_memory_that_is_no_index_is_refused() -> None:
    writer, reader = index(64)
    list_object(writer, Found(64, 1, 0, 1, None), key(1))
    writer.hide([64])
    writer.remove([64])
    assert reader.find(key(1)) is None
    with pytest.raises(SegmentError, match="no index of 64 entries"):
        IndexReader(memoryview(bytearray(index_bytes(64))), 64)
    with pytest.raises(SegmentError, match="does not fit"):
        IndexReader(memoryview(bytearray(100)), 64)


def test_what_is_replaced_between_two_looks_is_seen() -> None:
    writer, reader = index(64)
    list_object(writer, Found(3, 11, 640, 64, None), key(1))
    found = reader.find(key(1))
    assert found is not None and reader.are_current([found])
    writer.hide([3])
    writer.remove([3])
    list_object(writer, Found(3, 12, 1280, 64, None), key(1))
    assert not reader.is_current(found) and reader.find(key(1)) == Found(3, 12, 1280, 64, None)


# ---------------------------------------------------------------- tables


@pytest.fixture
def segment_path(tmp_path: Path) -> str:
    return str(tmp_path / "mooncake-c-n")


def test_claims_and_uses_reach_the_node(segment_path: str) -> None:
    client = ClientTable(segment_path)
    node = TableReader(client.path, segment_path)
    assert node.claims() == [] and not node.is_abandoned()
    slots = client.claim([5, 6, 7])
    assert slots is not None
    assert sorted(node.claims()) == [5, 6, 7]
    client.release(slots[:2])
    assert sorted(node.claims()) == [0, 0, 7]
    client.use([1, 2, 3])
    client.use([9])
    assert node.take_uses() == [[1, 2, 3], [9]] and node.take_uses() == []
    client.use(list(range(USES + 3)))
    assert node.take_uses() == [list(range(3, USES + 3))]
    client.release(slots[2:])
    assert client.claim(range(1, CLAIMS + 1)) is not None and client.claim([1]) is None
    client.begin_copy()
    assert node.num_copies == 1
    client.end_copy()
    client.close()
    assert node.is_abandoned() and not os.path.exists(client.path)
    node.close(unlink=True)


def test_only_a_clients_table_of_this_segment_is_attached(segment_path: str, tmp_path: Path) -> None:
    other = tmp_path / "mooncake-c-n@short"
    other.write_bytes(b"x")
    for path in (str(other), segment_path, f"{segment_path}@../../x", f"{segment_path}@none", "/etc/passwd"):
        with pytest.raises(SegmentError):
            TableReader(path, segment_path)
    link = tmp_path / "mooncake-c-n@link"
    client = ClientTable(segment_path)
    link.symlink_to(client.path)
    with pytest.raises(SegmentError):
        TableReader(str(link), segment_path)
    client.close()


# ---------------------------------------------------------------- what the node does with it


def _connect(node: StoreNode) -> Store:
    return Store.connect(node.addresses[:1], token=TOKEN)


def test_reads_ask_nobody_and_count_as_uses() -> None:
    async def main() -> None:
        async with running_node(capacity_bytes=4 * 64) as node:
            store = await asyncio.to_thread(_connect, node)
            for number in range(4):
                assert await asyncio.to_thread(store.put, key(number), bytes([number]) * 64) is PutResult.STORED
            before = node.core.metrics()
            node.handle = None  # type: ignore[method-assign, assignment]
            assert store.get(key(0)) == bytes(64)
            assert store.get_into(key(1), out := bytearray(64)) == 64 and out == bytes([1]) * 64
            with store.view(key(2)) as view:
                assert view == bytes([2]) * 64
            assert store.exists(key(3))
            del node.handle
            assert (
                await asyncio.to_thread(store.put, key(9), bytes(64)) is PutResult.STORED
            )  # evicts the only unread one
            assert [await asyncio.to_thread(store.exists, key(number)) for number in range(4)] == [
                True,
                True,
                True,
                False,
            ]
            assert node.core.metrics()["hits"] == before["hits"] + 3
            await asyncio.to_thread(store.close)

    run(main())


def test_what_is_viewed_is_neither_evicted_nor_freed_when_it_is_removed() -> None:
    async def main() -> None:
        async with running_node(capacity_bytes=2 * 64) as node:
            store = await asyncio.to_thread(_connect, node)
            ask = asyncio.to_thread
            for number in (1, 2):
                await ask(store.put, key(number), bytes([number]) * 64)
            with store.view(key(1)) as one:
                with store.view(key(2)) as two:
                    assert await ask(store.put, key(3), bytes(64)) is PutResult.REFUSED
                    assert node.core.metrics()["lingering"] >= 1
                    node.core.check_integrity()
                assert two and await ask(store.put, key(3), b"3" * 64) is PutResult.STORED
                assert await ask(store.remove, key(1)) and not await ask(store.exists, key(1))
                assert await ask(store.put, key(4), b"4" * 64) is PutResult.STORED  # in the place of 3
                assert await ask(store.put, key(5), b"5" * 64) is PutResult.STORED
                assert one == bytes([1]) * 64
                node.core.check_integrity()
            await eventually(lambda: node.core.metrics()["lingering"] == 0)
            assert await ask(store.put, key(6), b"6" * 64) is PutResult.STORED
            assert store.get(key(5)) == b"5" * 64 and store.get(key(6)) == b"6" * 64
            await ask(store.close)

    run(main())


def test_leases_of_an_async_client_are_taken_locally_and_given_back() -> None:
    async def main() -> None:
        async with running_node(capacity_bytes=2 * 64) as node:
            client = await StoreClient.connect(node.addresses[:1], token=TOKEN, name="test")
            reservation = await client.reserve(keys(1, 2), [64, 64])
            await client.commit(reservation)
            objects = await client.lease(keys(1, 2))
            assert objects.slots is not None and objects.hits == 2 and node.core.metrics()["leases"] == 0
            other = await client.reserve(keys(3), [64])
            assert other.locations == (None,)
            await client.release(objects, [1])
            other = await client.reserve(keys(3), [64])
            assert other.locations[0] is not None
            assert (await client.lease(keys(1, 2))).slots is None, "one is gone: the node is asked"
            await client.close()

    run(main())


def test_a_lease_taken_locally_outlives_the_nodes_connection_and_writes_do_not() -> None:
    async def main() -> None:
        async with running_node() as node:
            client = await StoreClient.connect(node.addresses[:1], token=TOKEN, name="test")
            written = await client.reserve(keys(1, 2), [64, 64])
            await asyncio.to_thread(written.write, 0, 0, b"1" * 64)
            await client.commit(written, [0])
            objects = await client.lease(keys(1))
            for connection in tuple(node.connections):
                connection.abort()
            await eventually(lambda: objects.link.lost is not None)
            with pytest.raises(HandleLost):
                written.write(1, 0, b"2" * 64)
            assert objects.view(0) == b"1" * 64
            assert objects.link.local is not None and os.path.exists(objects.link.local.table.path)
            await client.release(objects)
            assert not os.path.exists(objects.link.local.table.path)
            await client.close()

    run(main())


_KILLED = """
import sys, os, signal
from mooncake.store.api import Store
store = Store.connect([sys.argv[1]], token=sys.argv[2])
with store.view((1).to_bytes(24, "big")) as view:
    print(bytes(view[:1]).hex(), flush=True)
    signal.pause()
"""


def test_claims_of_a_killed_client_are_free_within_a_second_or_two() -> None:
    async def main() -> None:
        async with running_node(capacity_bytes=64) as node:
            store = await asyncio.to_thread(_connect, node)
            await asyncio.to_thread(store.put, key(1), b"1" * 64)
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _KILLED, node.addresses[0], TOKEN, stdout=subprocess.PIPE
            )
            assert child.stdout is not None and await child.stdout.readline() == b"31\n"
            assert await asyncio.to_thread(store.put, key(2), b"2" * 64) is PutResult.REFUSED
            child.send_signal(signal.SIGKILL)
            await child.wait()
            async with asyncio.timeout(3):
                while await asyncio.to_thread(store.put, key(2), b"2" * 64) is not PutResult.STORED:
                    await asyncio.sleep(0.02)
            assert node.metrics()["local_readers"] == 1
            await asyncio.to_thread(store.close)

    run(main())


@pytest.mark.parametrize("seed", range(4))
def test_a_history_of_puts_reads_views_and_removes_is_right_and_replays_the_same(seed: int, tmp_path: Path) -> None:
    """A tiny store that evicts all the time. A read gives what was put under that key, or a miss; a view never changes."""

    def act(node: StoreNode) -> None:
        rng, store = random.Random(seed), _connect(node)
        views: list[tuple[int, LeasedView, memoryview]] = []
        for _ in range(500):
            number, choice = rng.randrange(60), rng.random()
            if choice < 0.5:
                numbers = rng.sample(range(60), 3)
                store.put_batch([key(each) for each in numbers], [_content(each) for each in numbers])
            elif choice < 0.6:
                store.remove(key(number))
            elif choice < 0.8:
                assert store.get(key(number)) in (Absent.MISS, _content(number))
            elif choice < 0.9:
                opened = store.view(key(number))
                view = opened.__enter__()
                if isinstance(view, memoryview):
                    views.append((number, opened, view))
            elif views:
                number, opened, view = views.pop(rng.randrange(len(views)))
                assert view == _content(number)
                opened.__exit__(None, None, None)
        for number, opened, view in views:
            assert view == _content(number)
            opened.__exit__(None, None, None)
        store.close()

    async def main() -> None:
        config, log = node_config(capacity_bytes=64 * 64), tmp_path / "log"
        node = StoreNode(config, lambda report: None)
        settings = StoreSettings(config.capacity_bytes, node.epoch, config.alignment)
        node.event_log = EventLogWriter(log.open("wb"), "store", 0, settings)
        await node.start()
        await asyncio.to_thread(act, node)
        await node.close()
        node.event_log.close()
        metrics = node.core.metrics()
        assert metrics["evictions"] > 100 and metrics["leases"] == metrics["reservations"] == 0
        node.core.check_integrity()
        replay_log(log)

    run(main())


def _content(number: int) -> bytes:
    return bytes([number]) * (64, 100, 200)[number % 3]


# ---------------------------------------------------------------- adoption


def test_a_dead_nodes_objects_are_adopted_under_a_new_epoch(tmp_path: Path) -> None:
    async def main() -> None:
        config = node_config(shm_dir=str(tmp_path), unix_path=str(tmp_path / "s"))
        first = StoreNode(config, lambda report: None)
        await first.start()
        store = await asyncio.to_thread(_connect, first)
        for number in range(10):
            await asyncio.to_thread(store.put, key(number), bytes([number]) * 1000)
        await asyncio.to_thread(store.remove, key(3))
        mine = store.leased(keys(4))
        leased = mine.__enter__()
        die(first)
        os.unlink(config.unix_path)
        second = StoreNode(config, lambda report: None)
        await second.start()
        again = await asyncio.to_thread(_connect, second)
        there = [await asyncio.to_thread(again.get, key(number)) for number in range(10)]
        assert there == [bytes([number]) * 1000 if number != 3 else Absent.MISS for number in range(10)]
        assert leased.view(0) == bytes([4]) * 1000
        second.core.check_integrity()
        for number in range(100, 1300):
            assert await asyncio.to_thread(again.put, key(number), bytes(1000)) is PutResult.STORED
        assert second.core.metrics()["evictions"] > 0
        assert leased.view(0) == bytes([4]) * 1000, "a reader of the first life keeps its object"
        mine.__exit__(None, None, None)
        store.close()
        await asyncio.to_thread(again.close)
        await second.close()

    run(main())


def test_a_segment_is_not_adopted_while_somebody_copies_into_it_or_if_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mooncake.store.local.segment.ADOPT_S", 0.1)
    directory = str(tmp_path)
    first = take_segment("c", "n", 1, 1 << 20, 64, directory)
    writer = ClientTable(first.segment.path)
    writer.begin_copy()
    fcntl.flock(first.segment._fd, fcntl.LOCK_UN)
    second = take_segment("c", "n", 2, 1 << 20, 64, directory)
    assert second.adopted is None
    writer.end_copy()
    writer.close()
    assert second.readers is not None
    list_object(second.readers.index, Found(0, 5, 64, 64, None), key(1))
    list_object(second.readers.index, Found(1, 6, 96, 64, None), key(2))
    fcntl.flock(second.segment._fd, fcntl.LOCK_UN)
    third = take_segment("c", "n", 3, 1 << 20, 64, directory)
    assert third.adopted is None, "two objects overlap"
    fcntl.flock(third.segment._fd, fcntl.LOCK_UN)
    assert take_segment("c", "n", 4, 1 << 21, 64, directory).adopted is None, "of another size"


# ---------------------------------------------------------------- the order in memory

_ROUNDS = 30_000


def _litmus(memory: np.ndarray, mine: int, rounds: int) -> None:
    """Store buffering: write my word, fence, read the other's. Rounds begin together, by spinning."""
    shared = words(memoryview(memory).cast("B"))
    fence, seen = Fence(), memoryview(memory).cast("B").cast("Q")[64 + mine * rounds :]
    other = 1 - mine
    for turn in range(1, rounds + 1):
        shared[16 + 8 * mine] = turn
        while shared[16 + 8 * other] < turn:
            pass
        shared[32 + 8 * mine] = turn
        fence()
        seen[turn - 1] = shared[32 + 8 * other]


def test_of_two_who_write_fence_and_read_one_at_least_sees_the_other() -> None:
    """The store-buffering litmus: both missing each other's store is what the fence forbids."""
    context = multiprocessing.get_context("fork")
    raw = context.RawArray("Q", 64 + 2 * _ROUNDS)
    memory = np.frombuffer(raw, np.uint64)
    child = context.Process(target=_litmus, args=(memory, 1, _ROUNDS), daemon=True)
    child.start()
    with contextlib.ExitStack() as stack:
        stack.callback(child.kill)
        _litmus(memory, 0, _ROUNDS)
        child.join(60)
        assert child.exitcode == 0
    turns = np.arange(1, _ROUNDS + 1, dtype=np.uint64)
    missed_by_one, missed_by_other = memory[64 : 64 + _ROUNDS] < turns, memory[64 + _ROUNDS :] < turns
    assert not np.any(missed_by_one & missed_by_other)
