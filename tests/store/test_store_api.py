"""The store for programs of their own: what each call promises, by shared memory and by TCP, blocking and awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mooncake.core.errors import AuthError, BadArgument, DeadlineExceeded, HandleLost, StoreError, StoreUnavailable
from mooncake.store.aio import AsyncStore
from mooncake.store.api import Absent, PutResult, Stat, Store, named_key
from mooncake.store.node import StoreNode
from tests.store.helpers import TOKEN, key, keys, run, running_node

STORED, EXISTS, REFUSED, CONFLICT, BUSY = (
    PutResult.STORED,
    PutResult.EXISTS,
    PutResult.REFUSED,
    PutResult.CONFLICT,
    PutResult.BUSY,
)


def with_store(at: int, act: Callable[[Store, StoreNode], None], **options: Any) -> None:
    """at: by which of the node's addresses."""

    async def main() -> None:
        async with running_node(**options) as node:
            store = await asyncio.to_thread(lambda: Store.connect([node.addresses[at]], token=TOKEN))
            try:
                await asyncio.to_thread(act, store, node)
            finally:
                await asyncio.to_thread(store.close)

    run(main())


pytestmark = pytest.mark.parametrize("at", [0, 1], ids=["unix", "tcp"])


def test_what_is_put_is_there_until_it_is_removed(at: int) -> None:
    def act(store: Store, node: StoreNode) -> None:
        array = np.arange(1000, dtype=np.float32).reshape(10, 100)
        assert store.put_batch(keys(1, 2), [b"one", array]) == [STORED, STORED]
        assert store.put(key(1), b"something else") is EXISTS
        assert store.get_batch(keys(1, 2, 3)) == [b"one", array.tobytes(), Absent.MISS]
        out = np.zeros((10, 100), np.float32)
        assert store.get_into_batch(keys(2), [out]) == [4000] and (out == array).all()
        assert store.exists_batch(keys(1, 3)) == [True, False] and store.exists(key(1)) and not store.exists(key(3))
        stat = store.stat(key(2))
        assert isinstance(stat, Stat) and stat.size == 4000 and stat.node == "n0" and stat.checksum is not None
        assert store.stat(key(3)) is None
        assert store.remove_batch(keys(1, 3)) == [True, False] and store.get(key(1)) is Absent.MISS
        assert not Absent.MISS and not Absent.UNKNOWN
        node.core.check_integrity()

    with_store(at, act)


def test_strict_puts_are_compared(at: int) -> None:
    def act(store: Store, node: StoreNode) -> None:
        assert store.put(key(1), b"one", strict=True) is STORED
        assert store.put(key(1), b"one", strict=True) is EXISTS
        assert store.put(key(1), b"two", strict=True) is CONFLICT and store.get(key(1)) == b"one"
        with store.writing(key(2), 10):
            assert store.put(key(2), b"two", strict=True) is BUSY
        assert store.put(key(2), b"two", strict=True) is STORED

    with_store(at, act)


def test_an_object_is_written_range_by_range_and_seen_when_it_is_committed(at: int) -> None:
    def act(store: Store, node: StoreNode) -> None:
        with store.writing(key(1), 3000) as session:
            assert not isinstance(session, PutResult)
            session.write(0, b"a" * 1000)
            session.fill(1000, 1000, lambda view: view.__setitem__(slice(None), b"b" * 1000))
            session.write(2000, b"c" * 1000)
            assert store.get(key(1)) is Absent.MISS
            with pytest.raises(BadArgument, match="offset"):
                session.write(2500, b"x" * 1000)
            assert session.commit() is STORED
        assert store.get(key(1)) == b"a" * 1000 + b"b" * 1000 + b"c" * 1000
        stat = store.stat(key(1))
        assert stat is not None and stat.checksum is not None, "it was written in order"
        with store.writing(key(1), 3000) as session:
            assert session is EXISTS
        with store.writing(key(2), 100) as session:
            assert not isinstance(session, PutResult)
            session.write(0, b"half")
        assert node.core.metrics()["reservations"] == 0 and store.get(key(2)) is Absent.MISS
        with store.leased(keys(1, 2)) as objects:
            part = bytearray(10)
            objects.read(0, 995, part)
            assert part == b"aaaaabbbbb" and objects.locations[1] is None

    with_store(at, act)


def test_objects_of_a_batch_are_written_together_and_committed_one_by_one(at: int) -> None:
    def act(store: Store, node: StoreNode) -> None:
        assert store.put(key(2), b"there") is STORED
        batch = store.write_batch(keys(1, 2, 3), [100, 5, 100])
        assert batch.results == [None, EXISTS, None]
        for offset in (0, 50):
            for index, byte in ((0, b"a"), (2, b"c")):
                batch.fill(index, offset, 50, lambda view, byte=byte: view.__setitem__(slice(None), byte * 50))
        assert batch.commit([2]) == [STORED] and batch.results == [None, EXISTS, STORED]
        assert store.get_batch(keys(1, 3)) == [Absent.MISS, b"c" * 100]
        stat = store.stat(key(3))
        assert stat is not None and stat.checksum is not None, "it was written in order"
        assert store.put(key(1), b"another") is STORED
        assert batch.commit([0]) == [EXISTS] and store.get(key(1)) == b"another"
        with pytest.raises(BadArgument, match="CLOSED, must be WRITING"):
            batch.fill(0, 0, 50, lambda view: None)
        given_up = store.write_batch(keys(4, 5), [1 << 19, 1 << 20])
        assert given_up.results == [None, REFUSED]
        given_up.close()
        given_up.close()
        assert node.core.metrics()["reservations"] == 0 and store.get(key(4)) is Absent.MISS

    with_store(at, act)


def test_pinned_objects_stay_and_a_full_store_refuses(at: int) -> None:
    def act(store: Store, node: StoreNode) -> None:
        assert store.put_batch(keys(1, 2), [bytes(64)] * 2) == [STORED, STORED]
        assert store.pin(key(1)) and store.pin(key(1)) and not store.pin(key(9))
        assert store.put_batch(keys(3, 4), [bytes(64)] * 2) == [STORED, REFUSED]
        assert store.exists_batch(keys(1, 2, 3, 4)) == [True, False, True, False]
        assert store.unpin(key(1)) and not store.unpin(key(1))
        assert store.put_batch(keys(5, 6), [bytes(64)] * 2) == [STORED, STORED]
        assert store.put(key(7), bytes(64)) is STORED

    with_store(at, act, capacity_bytes=128)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: store.put(b"short", b"x"), r"keys\[0\]: must have 24 bytes, got 5"),
        (lambda store: store.put(key(1), b""), r"data\[0\]: is empty"),
        (lambda store: store.put(key(1), 5), r"data\[0\]: must be a C-contiguous buffer"),
        (lambda store: store.put(key(1), None), r"data\[0\]: must be a C-contiguous buffer"),
        (lambda store: store.put(key(1), np.ones((4, 4))[:, 1]), r"data\[0\]: must be a C-contiguous buffer"),
        (lambda store: store.put(key(1), bytes(2 << 20)), r"sizes\[0\]: must be between 1 and the segment's 1048576"),
        (lambda store: store.put_batch(keys(1, 2), [b"x"]), "data: 1 buffers for 2 keys"),
        (lambda store: store.put_batch(keys(1, 1), [b"x", b"y"]), "keys: a key is in the batch twice"),
        (lambda store: store.put_batch([], []), "keys: a batch has 1 to"),
        (lambda store: store.get_batch([]), "keys: a batch has 1 to"),
        (lambda store: store.put(key(1), b"x", replicas=0), "replicas: must be 1 to 16, got 0"),
        (lambda store: store.put(key(1), b"x", replicas=2), "directory: this client was connected without one"),
        (lambda store: store.get_into(key(0), b"read-only"), r"buffers\[0\]: the buffer is read-only"),
        (lambda store: store.get_into(key(0), bytearray(1)), r"buffers\[0\]: 1 bytes for an object of 3"),
        (lambda store: store.get_into_batch(keys(0, 1), [bytearray(9)]), "buffers: 1 for 2 keys"),
        (lambda store: store.writing(key(1), 0).__enter__(), r"sizes\[0\]: must be between 1"),
        (lambda store: store.locate(keys(1)), "directory: this client was connected without one"),
        (lambda store: store.exists_batch([b"x"]), r"keys\[0\]: must have 24 bytes, got 1"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_done(at: int, call: Callable[[Store], Any], message: str) -> None:
    def act(store: Store, node: StoreNode) -> None:
        store.put(key(0), b"abc")
        with pytest.raises(BadArgument, match=message):
            call(store)
        metrics = node.core.metrics()
        assert (metrics["objects"], metrics["reservations"], metrics["leases"]) == (1, 0, 0)
        assert store.get(key(0)) == b"abc"

    with_store(at, act)


def test_a_view_is_of_shared_memory_only(at: int) -> None:
    def act(store: Store, node: StoreNode) -> None:
        store.put(key(1), b"abc")
        if at:
            with pytest.raises(BadArgument, match="not mapped"), store.view(key(1)):
                pass
        else:
            with store.view(key(1)) as view, store.view(key(2)) as other:
                assert view == b"abc" and other is Absent.MISS
                assert isinstance(view, memoryview) and view.readonly

    with_store(at, act)


def test_after_a_node_began_anew_calls_go_on_and_old_claims_do_not(at: int) -> None:
    def act(store: Store, node: StoreNode) -> None:
        context = store.writing(key(1), 10)
        session = context.__enter__()
        assert not isinstance(session, PutResult)
        for connection in tuple(node.connections):
            asyncio.run_coroutine_threadsafe(_abort(connection), loop).result()
        assert store.put(key(2), b"two") is STORED and store.get(key(2)) == b"two"
        with pytest.raises(HandleLost):
            session.write(0, b"1234567890")
        context.__exit__(None, None, None)
        assert node.core.metrics()["reservations"] == 0

    async def _abort(connection: Any) -> None:
        connection.abort()

    async def main() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        async with running_node() as node:
            store = await asyncio.to_thread(lambda: Store.connect([node.addresses[at]], token=TOKEN))
            await asyncio.to_thread(act, store, node)
            await asyncio.to_thread(store.close)

    loop: asyncio.AbstractEventLoop
    run(main())


def test_who_cannot_be_reached_or_does_not_know_us_is_an_error(at: int) -> None:
    async def main() -> None:
        async with running_node() as node:
            where = [node.addresses[at]]
            with pytest.raises(AuthError, match="token"):
                await asyncio.to_thread(lambda: Store.connect(where, token="wrong"))
            store = await asyncio.to_thread(lambda: Store.connect(where, token=TOKEN, deadline_s=0.3))
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(store.put, key(1), b"x")
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(store.exists_batch, keys(1))
        await asyncio.to_thread(store.close)
        with pytest.raises(StoreUnavailable):
            await asyncio.to_thread(lambda: Store.connect(where, token=TOKEN))

    run(main())


def test_a_node_that_does_not_answer_is_not_waited_for_and_its_late_answer_is_undone(at: int) -> None:
    async def main() -> None:
        async with running_node() as node:
            store = await asyncio.to_thread(lambda: Store.connect([node.addresses[at]], token=TOKEN, deadline_s=0.2))
            handle, late = node.handle, []
            node.handle = late.append  # type: ignore[method-assign, assignment]
            with pytest.raises(DeadlineExceeded, match=r"no answer in 0\.2 s"):
                await asyncio.to_thread(store.put, key(1), b"x")
            node.handle = handle  # type: ignore[method-assign]
            for event in late:
                node.handle(event)
            assert await asyncio.to_thread(store.put, key(2), b"two") is STORED
            assert node.core.metrics()["reservations"] == 0
            await asyncio.to_thread(store.close)

    run(main())


def test_the_same_calls_awaited(at: int) -> None:
    async def main() -> None:
        async with running_node() as node, await AsyncStore.connect([node.addresses[at]], token=TOKEN) as store:
            name = named_key("x")
            assert await store.put(name, b"one") is STORED and await store.get(name) == b"one"
            assert await store.put_batch(keys(1, 2), [b"1", b"2"]) == [STORED, STORED]
            assert await asyncio.gather(*(store.get(key(number)) for number in (1, 2, 3))) == [b"1", b"2", Absent.MISS]
            assert await store.get_into(key(1), out := bytearray(1)) == 1 and out == b"1"
            assert await store.get_batch(keys(1, 3)) == [b"1", Absent.MISS]
            assert await store.exists(name) and await store.exists_batch(keys(1, 3)) == [True, False]
            if not at:
                async with store.view(name) as view:
                    assert view == b"one"
            async with store.leased(keys(1)) as objects:
                assert objects.hits == 1
            [stat] = await store.stat_batch([name])
            assert stat is not None and stat.size == 3
            assert await store.pin(name) and await store.unpin(name) and await store.remove(name)
            assert await store.remove_batch(keys(1, 3)) == [True, False]
            with pytest.raises(StoreError):
                await store.locate([name])

    run(main())
