"""One set of tests for every way of reaching a node: in process, shared memory, range frames over Unix and over TCP."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import xxhash

from mooncake.core.errors import BadArgument, Damaged, DeadlineExceeded, HandleLost, StoreUnavailable, TransferTimeout
from mooncake.store.events import Lease, Release
from mooncake.store.handles import Hold
from mooncake.store.types import CommitStatus, PutMode, PutStatus
from mooncake.transport.base import DONE
from tests.store.helpers import KINDS, MAPPED, Store, eventually, keys, run, running_store

pytestmark = pytest.mark.parametrize("kind", KINDS)
SIZES = (1, 63, 4096, 100_000, 300_001)


def test_what_was_written_is_read_by_another_client(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            writer, reader = await store.client(), await store.client()
            contents = [os.urandom(size) for size in SIZES]
            names = keys(*range(len(SIZES)))
            reservation = await writer.reserve(names, SIZES)
            assert set(reservation.statuses) == {PutStatus.RESERVED}
            for index, data in enumerate(contents):
                half = len(data) // 2
                pieces = [(index, half, data[half:])] + ([(index, 0, data[:half])] if half else [])
                await asyncio.to_thread(reservation.write_batch, pieces)
            assert (await reader.lease(names)).hits == 0
            assert set((await writer.commit(reservation)).values()) == {CommitStatus.COMMITTED}
            objects = await reader.lease(names)
            assert objects.hits == len(SIZES)
            out = [bytearray(size) for size in SIZES]
            await asyncio.to_thread(objects.read_batch, [(index, 0, buffer) for index, buffer in enumerate(out)])
            assert out == contents
            part = np.zeros((2, 500), np.uint16)
            await asyncio.to_thread(objects.read, 3, 77, part)
            assert part.tobytes() == contents[3][77:2077]
            await reader.release(objects)
            assert store.core.metrics()["leases"] == 0 and store.core.metrics()["reservations"] == 0

    run(main())


def test_a_view_needs_no_copy_where_the_segment_is_mapped(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1), [5])
            await asyncio.to_thread(reservation.write, 0, 0, b"12345")
            await client.commit(reservation, lease=True)
            assert reservation.mapped == (kind in MAPPED)
            if reservation.mapped:
                view = reservation.view(0)
                assert view == b"12345" and view.readonly
                del view
            else:
                with pytest.raises(BadArgument, match="view"):
                    reservation.view(0)
            await client.release(reservation)

    run(main())


def test_use_and_fill_give_the_segment_where_it_is_mapped_and_a_copy_elsewhere(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1, 2), [100_000, 10])
            data, seen = os.urandom(70_000), []

            def fill(out: memoryview) -> None:
                assert len(out) == len(data) and reservation.busy([0]) == (kind in MAPPED)
                out[:] = data

            await asyncio.to_thread(reservation.fill, 0, 30_000, 70_000, fill)
            await client.commit(reservation, [0], lease=True)
            other = await (await store.client()).lease(keys(1))
            for objects in (reservation, other):
                await asyncio.to_thread(objects.use, 0, 30_001, 20_000, lambda piece: seen.append(bytes(piece)))
            assert seen == [data[1:20_001]] * 2

    run(main())


def test_use_and_fill_check_their_range_before_they_call(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1, 2), [10, 10])
            await client.commit(reservation, [1], lease=True)

            def never(view: memoryview) -> None:
                raise AssertionError("called")

            for index, offset, size, why in ((0, 5, 6, "offset"), (0, -1, 1, "offset"), (0, 0, 0, "offset")):
                with pytest.raises(BadArgument, match=why):
                    reservation.fill(index, offset, size, never)
                with pytest.raises(BadArgument, match=why):
                    reservation.use(index + 1, offset, size, never)
            for call, index in ((reservation.fill, 1), (reservation.use, 0), (reservation.fill, 2)):
                with pytest.raises(BadArgument, match="index"):
                    call(index, 0, 1, never)

    run(main())


def test_a_callback_that_raises_leaves_the_claim_as_it_was(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1), [10])

            def broken(view: memoryview) -> None:
                raise ValueError("broken")

            with pytest.raises(ValueError, match="broken"):
                await asyncio.to_thread(reservation.fill, 0, 0, 10, broken)
            assert not reservation.busy([0]) and reservation.link.idle()
            assert await client.commit(reservation, lease=True) == {0: CommitStatus.COMMITTED}
            with pytest.raises(ValueError, match="broken"):
                await asyncio.to_thread(reservation.use, 0, 0, 10, broken)
            assert not reservation.busy([0]) and reservation.link.idle()

    run(main())


@pytest.mark.parametrize("lease", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_writers_the_first_commit_wins_and_the_other_may_hold_it(kind: str, first: int, lease: bool) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            clients = [await store.client(), await store.client()]
            held = [await client.reserve(keys(1), [64]) for client in clients]
            for at, reservation in enumerate(held):
                assert reservation.statuses == (PutStatus.RESERVED,)
                await asyncio.to_thread(reservation.write, 0, 0, bytes([at]) * 64)
            second = 1 - first
            winner, loser = held[first], held[second]
            assert await clients[first].commit(winner) == {0: CommitStatus.COMMITTED}
            assert await clients[second].commit(loser, lease=lease) == {0: CommitStatus.EXISTS}
            assert loser.held(Hold.ELSEWHERE if lease else Hold.CLOSED) == [0] and loser.hits == 0
            metrics = store.core.metrics()
            assert (metrics["used_bytes"], metrics["leases"], metrics["reservations"]) == (64, lease, 0)
            with pytest.raises(BadArgument, match="ELSEWHERE" if lease else "CLOSED"):
                loser.read(0, 0, bytearray(1))
            there, out = await clients[second].lease(keys(1)), bytearray(64)
            await asyncio.to_thread(there.read, 0, 0, out)
            assert out == bytes([first]) * 64
            await clients[second].release(there)
            await clients[second].release(loser)
            await clients[second].release(loser)
            assert loser.held(Hold.CLOSED) == [0] and store.core.metrics()["leases"] == 0

    run(main())


def test_the_losers_lease_keeps_the_winner_until_the_loser_closes(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            one, two = await store.client(), await store.client()
            first, second = await one.reserve(keys(1), [64]), await two.reserve(keys(1), [64])
            await one.commit(first)
            await two.commit(second, lease=True)
            assert await one.remove(keys(1)) == (True,)
            assert store.core.metrics()["used_bytes"] == 64
            await two.close()  # type: ignore[attr-defined]
            await eventually(lambda: store.core.metrics()["used_bytes"] == 0)

    run(main())


def test_chunks_are_committed_one_by_one_and_the_rest_cancelled(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            names = keys(*range(6))
            reservation = await client.reserve(names, [100] * 6, all_or_nothing=True)
            assert await client.commit(reservation, [0, 1], lease=True) == dict.fromkeys([0, 1], CommitStatus.COMMITTED)
            assert await client.commit(reservation, [1, 2]) == {2: CommitStatus.COMMITTED}
            assert await client.exists(names) == (True, True, True, False, False, False)
            await client.cancel(reservation)
            await client.release(reservation)
            assert [reservation.held(hold) for hold in Hold] == [[], [], [], [0, 1, 2, 3, 4, 5], []]
            again = await client.reserve(names, [100] * 6, lease_existing=True)
            assert again.statuses == (PutStatus.EXISTS,) * 3 + (PutStatus.RESERVED,) * 3
            assert again.held(Hold.LEASED) == [0, 1, 2] and again.held(Hold.WRITING) == [3, 4, 5]
            assert await client.remove(names[:4]) == (True, True, True, False)

    run(main())


def test_refusal_and_busy_are_values(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind, capacity=4096) as store:
            one, two = await store.client(), await store.client()
            held = await one.reserve(keys(1), [4000])
            busy = await two.reserve(keys(1, 2), [64, 64], mode=PutMode.STRICT, checksums=[5, 5])
            assert busy.statuses == (PutStatus.BUSY, PutStatus.RESERVED)
            assert (await two.reserve(keys(1), [64])).statuses == (PutStatus.REFUSED,)
            await one.cancel(held)
            strict = await two.reserve(keys(3), [64], mode=PutMode.STRICT, checksums=[5])
            await two.commit(strict)
            refused = await one.reserve(keys(3), [64], mode=PutMode.STRICT, checksums=[6])
            assert refused.statuses == (PutStatus.CONFLICT,)

    run(main())


def test_wrong_arguments_are_named_and_leave_the_client_usable(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            for wrong, argument in (
                (client.reserve(keys(1), [0]), "sizes"),
                (client.reserve(keys(1), [1 << 40]), "sizes"),
                (client.reserve(keys(1, 1), [1, 1]), "keys"),
                (client.lease([b"short"]), "keys"),
                (client.exists([]), "keys"),
            ):
                with pytest.raises(BadArgument, match=argument):
                    await wrong
            reservation = await client.reserve(keys(1), [10])
            for index, offset, data, argument in (
                (0, 0, b"", "offset"),
                (0, 5, b"123456", "offset"),
                (0, -1, b"1", "offset"),
                (1, 0, b"1", "index"),
                (0, 0, 17, "data"),
                (0, 0, np.zeros((4, 4))[:, ::2], "data"),
            ):
                with pytest.raises(BadArgument, match=argument):
                    reservation.write(index, offset, data)
            with pytest.raises(BadArgument, match="WRITING"):
                reservation.read(0, 0, bytearray(1))
            with pytest.raises(BadArgument, match="checksums"):
                await client.commit(reservation, checksums=[1, 2])
            assert await client.commit(reservation, checksums=[1], lease=True) == {0: CommitStatus.COMMITTED}
            with pytest.raises(BadArgument, match="LEASED"):
                reservation.write(0, 0, b"1")
            with pytest.raises(BadArgument, match="read-only"):
                reservation.read(0, 0, b"1")

    run(main())


def test_closing_a_client_frees_all_it_holds(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1, 2, 3), [100] * 3)
            await client.commit(reservation, [0], lease=True)
            await client.close()  # type: ignore[attr-defined]
            await eventually(lambda: store.core.metrics()["reservations"] == 0)
            assert store.core.metrics()["leases"] == 0
            with pytest.raises(HandleLost):
                reservation.write(1, 0, b"1")
            with pytest.raises(HandleLost):
                await client.commit(reservation)
            with pytest.raises(StoreUnavailable):
                await client.exists(keys(1))

    run(main())


class _Gate:
    """A path whose transfers wait until they are let through."""

    def __init__(self, path: object) -> None:
        self.path = path
        self.open = threading.Event()

    def write(self, pieces: object) -> object:
        self.open.wait(5)
        return DONE

    def __getattr__(self, name: str) -> object:
        return getattr(self.path, name)


def test_no_claim_ends_under_a_running_copy(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1, 2), [100] * 2)
            gate = reservation.link.path = _Gate(reservation.link.path)  # type: ignore[assignment]
            copy = asyncio.create_task(asyncio.to_thread(reservation.write, 0, 0, b"1"))
            await eventually(lambda: reservation.busy([0]))
            with pytest.raises(DeadlineExceeded):
                await client.cancel(reservation, [0], deadline_s=0.02)
            assert reservation.held(Hold.WRITING) == [0, 1]
            assert await client.commit(reservation, [1]) == {1: CommitStatus.COMMITTED}
            cancel = asyncio.create_task(client.cancel(reservation))
            await asyncio.sleep(0.02)
            assert not cancel.done() and store.core.metrics()["reservations"] == 1
            with pytest.raises(BadArgument, match="CLOSED"):
                reservation.write(0, 0, b"1")
            gate.open.set()
            await asyncio.gather(copy, cancel)
            assert store.core.metrics()["reservations"] == 0

    run(main())


def test_no_claim_ends_under_a_callback_that_has_the_segment(kind: str) -> None:
    async def main() -> None:
        if kind not in MAPPED:
            return
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1), [100])
            gate = threading.Event()
            filling = asyncio.create_task(asyncio.to_thread(reservation.fill, 0, 0, 100, lambda view: gate.wait(5)))
            await eventually(lambda: reservation.busy([0]))
            with pytest.raises(DeadlineExceeded):
                await client.commit(reservation, deadline_s=0.02)
            assert reservation.held(Hold.WRITING) == [0] and store.core.metrics()["reservations"] == 1
            gate.set()
            await filling
            assert await client.commit(reservation) == {0: CommitStatus.COMMITTED}

    run(main())


def test_transport_errors_come_out_as_store_errors(kind: str) -> None:
    class Broken:
        def write(self, pieces: object) -> None:
            raise TransferTimeout("no progress")

        def close(self) -> None: ...

    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            reservation = await client.reserve(keys(1), [100])
            reservation.link.path = Broken()  # type: ignore[assignment]
            with pytest.raises(DeadlineExceeded, match="no progress"):
                reservation.write(0, 0, b"1")

    run(main())


def test_eight_threads_write_and_read_at_once(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind, capacity=1 << 22) as store:
            client = await store.client()
            names, size = keys(*range(8)), 200_000
            contents = [os.urandom(size) for _ in names]
            reservation = await client.reserve(names, [size] * 8)
            await asyncio.gather(
                *(asyncio.to_thread(reservation.write, at, 0, data) for at, data in enumerate(contents))
            )
            await client.commit(reservation, lease=True)
            out = [bytearray(size) for _ in names]
            await asyncio.gather(*(asyncio.to_thread(reservation.read, at, 0, buffer) for at, buffer in enumerate(out)))
            assert out == contents

    run(main())


def test_calls_are_pipelined(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            await asyncio.gather(*(_put_one(client, at) for at in range(100)))
            assert await client.exists(keys(*range(101))) == (True,) * 100 + (False,)

    run(main())


async def _put_one(client: Store, at: int) -> None:
    reservation = await client.reserve(keys(at), [64])  # type: ignore[attr-defined]
    await client.commit(reservation)  # type: ignore[attr-defined]


def test_the_core_under_the_client_sees_the_same_claims(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            client = await store.client()
            await _put_one(client, 1)  # type: ignore[arg-type]
            objects = await client.lease(keys(1, 2))
            assert objects.locations[1] is None and objects.hits == 1 and len(objects) == 2
            [answer] = store.core.handle(Lease(99, 0, keys(1, 2)), time.monotonic_ns())[:1]
            assert answer.results.locations() == [objects.locations[0], None]  # type: ignore[attr-defined]
            store.core.handle(Release(99, 0, objects.numbers([0])), time.monotonic_ns())

    run(main())


def test_ranges_in_order_are_checked_as_a_whole(kind: str) -> None:
    async def main() -> None:
        async with running_store(kind) as store:
            writer, reader = await store.client(), await store.client()
            data = os.urandom(4000)
            reservation = await writer.reserve(keys(1, 2, 3), [4000, 4000, 4000])
            for layer in range(4):
                part = slice(layer * 1000, layer * 1000 + 1000)
                await asyncio.to_thread(reservation.write, 0, part.start, data[part])
                await asyncio.to_thread(reservation.fill, 1, part.start, 1000, _filler(data[part]))
                await asyncio.to_thread(reservation.write, 2, 3000 - part.start, data[part])
            await writer.commit(reservation)
            objects = await reader.lease(keys(1, 2, 3))
            assert objects.checksums == (xxhash.xxh3_64_intdigest(data),) * 2 + (None,), "the last one came backwards"
            rows = store.core._objects.find(keys(1, 2))
            for at in (0, 1):
                out = [bytearray(1000) for _ in range(4)]
                for layer in range(4):
                    await asyncio.to_thread(objects.read, at, layer * 1000, out[layer])
                assert b"".join(out) == data
            await reader.release(objects)
            assert rows[1] is not None
            store.core._objects.checksums[rows[1]] ^= 1
            objects = await reader.lease(keys(1, 2, 9))
            for layer in range(3):
                await asyncio.to_thread(objects.read, 1, layer * 1000, bytearray(1000))
            with pytest.raises(Damaged, match=r"objects \[1\] of 3"):
                await asyncio.to_thread(objects.read, 1, 3000, bytearray(1000))
            assert list(objects.damaged) == [1]
            assert await reader.remove(keys(2), damaged=True) == (True,) and store.core.metrics()["damaged"] == 1
            await reader.release(objects)

    run(main())


def _filler(data: bytes) -> Callable[[memoryview], None]:
    def fill(view: memoryview) -> None:
        view[:] = data

    return fill
