"""Reserve and grant: who gets space, and what exists already.

A batch is made in one piece: what it finds is held first, so that what it adds evicts none of that, then there is room for the
rest of it, or for a part, or it is refused. In EQUIVALENT mode a key may have several writers, since waiting for each other
would let a slow or dying one stop the rest (`mooncake.store.committing` has what becomes of them); a strict one is told that
there is another.

Of a tenant with a quota, what is oldest of it makes room. What exceeds the quota even so is refused; or it is given and gone
with its last lease, if the call names the tenant (`mooncake.store.quotas`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from mooncake.store.allocator import BytesAllocator
from mooncake.store.answers import faults, join, nowhere, reply
from mooncake.store.claims import Claims
from mooncake.store.clients import Clients
from mooncake.store.events import Command, Grant, Reply, Reserve, fault_of_reserve
from mooncake.store.objects import Objects, pick
from mooncake.store.quotas import Tenant
from mooncake.store.reservations import ReservationBook
from mooncake.store.ssd import SsdTier
from mooncake.store.types import Places, PutMode, Puts, PutStatus

_T = TypeVar("_T")
_STRICT, _RESERVED, _EXISTS = PutMode.STRICT, PutStatus.RESERVED, PutStatus.EXISTS
"""Members of an enum are looked up slowly."""


class Reserving:
    """allocator: of the objects. ssd: the tier below, if there is one. counters: of the core."""

    def __init__(
        self,
        objects: Objects,
        allocator: BytesAllocator,
        clients: Clients,
        book: ReservationBook,
        counters: dict[str, int],
        ssd: SsdTier | None,
    ) -> None:
        self._objects = objects
        self._quotas = objects.quotas
        self._rounded = allocator.rounded
        self._capacity = allocator.capacity
        self._clients = clients
        self._book = book
        self._counters = counters
        self._ssd = ssd

    def reserve(self, event: Reserve, now: int) -> list[Command]:
        objects, keys = self._objects, event.keys
        found = objects.find(keys)
        num_known = len(found) - found.count(None)
        known: list[Any] = found[:num_known]
        if event.mode is _STRICT or None in known:
            return self._reserve_any(event, found, now)
        if fault_of_reserve(event, num_known, self._capacity) is not None:
            return faults(event, self._capacity)
        claims = self._clients.claims(event.client)
        objects.hold(known)  # so that the batch's new objects do not evict those it found
        made = self._make(event, claims, range(num_known, len(found)), now)
        if made is None:
            return self._refuse(event, known)
        there = self._lease_known(event, claims, known)
        statuses = (_EXISTS,) * num_known + _statuses_of(made.numbers)
        offsets, sizes, numbers = there.offsets + made.offsets, there.sizes + made.sizes, there.numbers + made.numbers
        puts = Puts(offsets, sizes, numbers, statuses=statuses)
        return [Reply(event.client, event.request_id, puts)]

    def _reserve_any(self, event: Reserve, found: list[int | None], now: int) -> list[Command]:
        """What is known is more than a prefix, or contents are compared."""
        fault = faults(event, self._capacity)
        if fault:
            return fault
        objects, claims = self._objects, self._clients.claims(event.client)
        others = self._judge_strictly(event, found) if event.mode is _STRICT else {}
        same_at = [at for at, row in enumerate(found) if row is not None and at not in others]
        new_at = [at for at, row in enumerate(found) if row is None and at not in others]
        held = [row for row in found if row is not None]
        objects.hold(held)
        made = self._make(event, claims, new_at, now)
        if made is None:
            return self._refuse(event, held)
        there = nowhere(len(same_at))
        if event.lease_existing and same_at:
            there = self._clients.lease_to(
                claims, [row for at, row in enumerate(found) if row is not None and at not in others]
            )
            held = [row for at, row in enumerate(found) if row is not None and at in others]
        objects.unhold(held)
        at = [*same_at, *new_at, *others]
        places = join((there, made, nowhere(len(others))), at)
        statuses = (_EXISTS,) * len(same_at) + _statuses_of(made.numbers) + tuple(others.values())
        in_order = tuple([status for _, status in sorted(zip(at, statuses, strict=True))])
        return reply(event, _with_statuses(places, in_order))

    def _refuse(self, event: Reserve, known: Sequence[int]) -> list[Command]:
        self._counters["refusals"] += 1
        self._objects.unhold(known)
        count = len(event.keys)
        return reply(event, _with_statuses(nowhere(count), (PutStatus.REFUSED,) * count))

    def _lease_known(self, event: Reserve, claims: Claims, rows: Sequence[int]) -> Places:
        """Where those that exist are, if the client wants a lease of them."""
        if event.lease_existing and rows:
            return self._clients.lease_to(claims, rows)
        self._objects.unhold(rows)
        return nowhere(len(rows))

    def _judge_strictly(self, event: Reserve, found: list[int | None]) -> dict[int, PutStatus]:
        """By index, what becomes of keys that are neither to be made nor the same as what exists."""
        writers = self._book.known_writers()
        others: dict[int, PutStatus] = {}
        for at, row in enumerate(found):
            if row is None:
                if event.keys[at] in writers:
                    others[at] = PutStatus.BUSY
                elif self._ssd is not None and self._ssd.differs(event.keys[at], event.checksums[at]):
                    others[at] = PutStatus.CONFLICT
                    self._counters["conflicts"] += 1
            elif self._objects.checksums.get(row) != event.checksums[at]:
                others[at] = PutStatus.CONFLICT
                self._counters["conflicts"] += 1
        return others

    def grant(self, event: Grant, now: int) -> list[Command]:
        """Space without keys, if that need not wait for anything."""
        self._book.has_granted = True
        fault, sizes = faults(event, self._capacity), event.sizes
        if fault:
            return fault
        if self._ssd is not None and self._objects.rounded(sizes) > self._objects.spare_bytes:
            return reply(event, nowhere(len(sizes)))
        blank = Reserve(event.client, event.request_id, (b"",) * len(sizes), sizes)
        made = self._make(blank, self._clients.claims(event.client), range(len(sizes)), now)
        assert made is not None  # it is not all or nothing
        return reply(event, made)

    # ------------------------------------------------------------ room

    def _make(self, event: Reserve, claims: Claims, new: Sequence[int], now: int) -> Places | None:
        """Reserve space for these keys; nowhere for one that finds none, and None alone if then nothing is wanted."""
        if not new:
            return nowhere(0)
        tenant = self._clients.payer(event)
        if tenant is None:
            return self._make_unbounded(event, claims, new, now)
        if event.tenant:
            return self._make_for(tenant, event, claims, new, now)
        num_fitting = self._num_within_quota(tenant, _select(event.sizes, new), whole=event.all_or_nothing)
        num_over = len(new) - num_fitting
        if num_over:
            self._counters["refusals"] += num_over
            tenant.num_refused += num_over
        if num_over and event.all_or_nothing:
            return None
        made = self._make_unbounded(event, claims, new[:num_fitting], now) if num_fitting else nowhere(0)
        if made is None:
            return None
        rows = [row for number in made.numbers if number and (row := claims.writable_row(number)) is not None]
        self._quotas.charge(tenant, rows)
        return join((made, nowhere(num_over)), range(len(new)))

    def _make_for(self, tenant: Tenant, event: Reserve, claims: Claims, new: Sequence[int], now: int) -> Places | None:
        """As `_make`, for a tenant that the call names. All of it counts as long as it is there."""
        num_kept = self._num_within_quota(tenant, _select(event.sizes, new), whole=False)
        made = self._make_unbounded(event, claims, new, now)
        if made is None:
            return None
        rows = [None if number is None else claims.writable_row(number) for number in made.numbers]
        self._quotas.charge(tenant, [row for row in rows if row is not None])
        over = [row for row in rows[num_kept:] if row is not None and row not in self._objects.transient]
        self._objects.transient.update(dict.fromkeys(over))
        tenant.num_refused += len(over)
        return made

    def _num_within_quota(self, tenant: Tenant, sizes: Sequence[int], *, whole: bool) -> int:
        """How many of these, from the first on, the tenant has room for, after what is oldest of it was evicted. whole: all of
        them are wanted, or none."""
        extents = list(map(self._rounded, sizes))
        wanted = sum(extents)
        if not whole or wanted <= tenant.left + tenant.idle_bytes:
            self._objects.make_room_of(tenant, wanted)
        left, num_fitting = tenant.left, 0
        for extent in extents:
            left -= extent
            num_fitting += left >= 0
        return num_fitting

    def _make_unbounded(self, event: Reserve, claims: Claims, new: Sequence[int], now: int) -> Places | None:
        """As `_make`, for who has no quota. Not empty."""
        objects = self._objects
        keys, sizes = _select(event.keys, new), _select(event.sizes, new)
        created = objects.create(keys, sizes, all_or_nothing=event.all_or_nothing)
        if created is None:
            return None
        numbers, rows, refused = created
        made = new
        if refused:
            self._counters["refusals"] += len(refused)
            lost = dict.fromkeys(refused)
            made = [at for index, at in enumerate(new) if index not in lost]
        if rows:
            self._book.enter(claims, numbers, rows, now)
            self._mark(event, rows, made)
        if not refused:
            return Places(pick(objects.offsets, rows), tuple(sizes), numbers)
        there = objects.places(rows) if rows else nowhere(0)
        return join((there, nowhere(len(refused))), [*made, *[new[index] for index in refused]])

    def _mark(self, event: Reserve, rows: Sequence[int], made: Sequence[int]) -> None:
        """What the call says of its new objects. made: their indices."""
        transient, before = self._objects.transient, self._objects.before
        for row, key in zip(rows, _select((b"", *event.keys), made), strict=True):
            before[row] = key
        if self._book.writers is not None:
            self._book.writers.update(_select(event.keys, made))
        if event.checksums:
            self._objects.checksums.update(zip(rows, _select(event.checksums, made), strict=True))
        if event.ephemeral:
            transient.update(dict.fromkeys(rows))
        elif event.ephemeral_last and made[-1] == len(event.keys) - 1:
            transient[rows[-1]] = None


def _with_statuses(places: Places, statuses: tuple[PutStatus, ...]) -> Puts:
    return Puts(places.offsets, places.sizes, places.numbers, statuses=statuses)


def _statuses_of(numbers: tuple[int | None, ...]) -> tuple[PutStatus, ...]:
    if None in numbers:
        return tuple([PutStatus.REFUSED if number is None else _RESERVED for number in numbers])
    return (_RESERVED,) * len(numbers)


def _select(values: Sequence[_T], positions: Sequence[int]) -> Sequence[_T]:
    if isinstance(positions, range):
        return values[positions.start : positions.stop]
    return [values[at] for at in positions]
