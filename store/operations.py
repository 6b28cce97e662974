"""The calls of a store client, the same for every way of reaching a node: in this process, by shared memory, by TCP."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mooncake.core.errors import BadArgument, DeadlineExceeded
from mooncake.store.events import Cancel, Commit, Exists, Lease, Release, Remove, Request, Reserve
from mooncake.store.handles import Hold, LeasedObjects, Link, Reservation
from mooncake.store.types import CommitStatus, Places, PutMode, Puts

DEADLINE_S = 5.0
_POLL_S = 0.0005


class StoreOperations(ABC):
    """Batch-first. Keys are 24-byte object keys, prefix first; sizes, offsets in bytes; deadlines in seconds from the
    call.

    Every call raises BadArgument for the caller's fault, StoreUnavailable if the node cannot be reached or is lost on
    the way, DeadlineExceeded if it does not answer in time; claims it took for such a call are given back when its
    answer comes. Calls come from the event loop that connected; data calls of the handles from any thread."""

    @abstractmethod
    async def _call(self, request: Request, deadline_s: float) -> Any: ...

    @abstractmethod
    def _link_or_raise(self) -> Link: ...

    async def reserve(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        *,
        mode: PutMode = PutMode.EQUIVALENT,
        lease_existing: bool = False,
        all_or_nothing: bool = False,
        ephemeral: bool = False,
        ephemeral_last: bool = False,
        checksums: Sequence[int] = (),
        tenant: str = "",
        deadline_s: float = DEADLINE_S,
    ) -> Reservation:
        """Space for new objects; what became of each key is in `statuses`. For flags and tenant see `events.Reserve`."""
        link = self._link_or_raise()
        request = Reserve(
            0,
            0,
            tuple(keys),
            tuple(sizes),
            mode,
            lease_existing,
            all_or_nothing,
            ephemeral,
            tuple(checksums),
            ephemeral_last,
            tenant if link.charges_tenants else "",
        )
        puts: Puts = await self._call(request, deadline_s)
        return Reservation(link, puts.locations(), puts.statuses)

    async def commit(
        self,
        reservation: Reservation,
        indices: Iterable[int] | None = None,
        *,
        lease: bool = False,
        checksums: Sequence[int] = (),
        deadline_s: float = DEADLINE_S,
    ) -> dict[int, CommitStatus]:
        """Make reserved objects visible, those given or all; by index, what became of them. Indices that are not
        reserved are passed over. lease: keep a lease of each. checksums: one per index that is committed; by default of those
        that were written in order through this handle."""
        async with self._closing(reservation, Hold.WRITING, indices, deadline_s) as open_at:
            if not open_at:
                return {}
            sums = tuple(checksums) or reservation.written_checksums(open_at)
            request = Commit(0, 0, reservation.numbers(open_at), lease, sums)
            statuses = dict(zip(open_at, await self._call_of(reservation, request, deadline_s), strict=True))
        if lease:
            for status, hold in ((CommitStatus.COMMITTED, Hold.LEASED), (CommitStatus.EXISTS, Hold.ELSEWHERE)):
                reservation.mark((at for at, found in statuses.items() if found is status), hold)
        return statuses

    async def cancel(
        self, reservation: Reservation, indices: Iterable[int] | None = None, *, deadline_s: float = DEADLINE_S
    ) -> None:
        """Give up what is reserved and not committed, of those given or of all."""
        async with self._closing(reservation, Hold.WRITING, indices, deadline_s) as open_at:
            if open_at and reservation.link.lost is None:
                await self._call_of(reservation, Cancel(0, 0, reservation.numbers(open_at)), deadline_s)

    async def lease(self, keys: Sequence[bytes], *, tenant: str = "", deadline_s: float = DEADLINE_S) -> LeasedObjects:
        """Claim objects for reading: they stay where they are until released. tenant: see `events.Lease`."""
        link = self._link_or_raise()
        leased = link.local.lease(keys) if link.local is not None else None
        if leased is not None:
            return LeasedObjects.found(link, *leased)
        request = Lease(0, 0, tuple(keys), tenant if link.charges_tenants else "")
        places: Places = await self._call(request, deadline_s)
        return LeasedObjects.placed(link, places)

    async def release(
        self, objects: LeasedObjects, indices: Sequence[int] | None = None, *, deadline_s: float = DEADLINE_S
    ) -> None:
        """Give leases back, those given or all. Leases of a lost connection are gone already."""
        if objects.slots is not None and objects.link.local is not None:
            async with self._closing(objects, Hold.LEASED, indices, deadline_s) as open_at:
                objects.link.local.release([objects.slots[at] for at in open_at])
            return
        for hold in (Hold.LEASED, Hold.ELSEWHERE):
            async with self._closing(objects, hold, indices, deadline_s) as open_at:
                if open_at and objects.link.lost is None:
                    await self._call_of(objects, Release(0, 0, objects.numbers(open_at)), deadline_s)

    async def exists(self, keys: Sequence[bytes], *, deadline_s: float = DEADLINE_S) -> tuple[bool, ...]:
        results: tuple[bool, ...] = await self._call(Exists(0, 0, tuple(keys)), deadline_s)
        return results

    async def remove(
        self, keys: Sequence[bytes], *, damaged: bool = False, deadline_s: float = DEADLINE_S
    ) -> tuple[bool, ...]:
        """By key, whether an object was removed. Who leased it before keeps it. damaged: because of that; it is counted."""
        results: tuple[bool, ...] = await self._call(Remove(0, 0, tuple(keys), damaged), deadline_s)
        return results

    async def _call_of(self, objects: LeasedObjects, request: Request, deadline_s: float) -> Any:
        with objects.link.call():  # raises HandleLost; numbers of an old connection mean nothing on a new one
            pass
        return await self._call(request, deadline_s)

    @asynccontextmanager
    async def _closing(
        self, objects: LeasedObjects, hold: Hold, indices: Iterable[int] | None, deadline_s: float
    ) -> AsyncIterator[list[int]]:
        """Stop data calls on what is held so, wait for those under way, and give its indices. If they do not end in
        time, or the node is not asked because the call is wrong, the indices are as before."""
        open_at = objects.held(hold, indices)
        objects.mark(open_at, Hold.CLOSED)
        try:
            await _drained(objects, open_at, deadline_s)
            yield open_at
        except (BadArgument, DataCallsRunning):
            objects.mark(open_at, hold)
            raise


class DataCallsRunning(DeadlineExceeded):
    """The call was not made."""


async def _drained(objects: LeasedObjects, indices: list[int], deadline_s: float) -> None:
    if not objects.busy(indices):
        return
    try:
        async with asyncio.timeout(deadline_s):
            await until(lambda: not objects.busy(indices))
    except TimeoutError:
        raise DataCallsRunning("data calls on these objects are still running") from None


async def until(condition: Callable[[], bool]) -> None:
    """Waits for copy threads. It is rare that they run then, so a poll is simpler than waking the loop from each copy."""
    while not condition():
        await asyncio.sleep(_POLL_S)
