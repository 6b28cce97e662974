"""Everything a store node decides: who gets space, what is visible, who holds what, what is evicted, what is reported.

Sans-IO: `handle(event, now)` gives commands, `deadline()` the time of the next Tick. The core never sees a byte of an
object.

In EQUIVALENT mode a key may have several writers, since waiting for each other would let a slow or dying one stop the
rest: the first commit wins, and those that come later get leases of the winner, under the numbers of their own
reservations (`Claims.aliases`). Every claim has an owner: a reservation is in its client's `reservations`, a lease in its
client's claims (counted, the same client may lease twice), and an object's `refs` is the sum of them, and of what jobs of the
SSD tier and leases that wait for one hold.

With an SSD tier (`ssd`), what is leased and only there is read first, as far as the keys lead from the first on without a miss:
nothing behind one is of use. The call is answered when all of it is read. A reservation waits too if another call has made the
node read what it asks for. And calls that find too little room ready wait until enough is written to SSD. Each waits for a
bounded time, and then goes ahead with what there is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import msgspec

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Tier
from mooncake.store.allocator import Allocator, BytesAllocator
from mooncake.store.claims import Claims, Reservations
from mooncake.store.events import (
    MAX_BATCH,
    Adopted,
    Cancel,
    ClientGone,
    ClientTenant,
    Command,
    Commit,
    Event,
    Exists,
    Fault,
    Flush,
    Grant,
    Lease,
    Name,
    Release,
    Remove,
    Reply,
    Report,
    Request,
    Reserve,
    Results,
    Snapshot,
    SnapshotWanted,
    SsdRead,
    SsdRecovered,
    SsdWritten,
    Tick,
    Usage,
    Used,
    UsedElsewhere,
    fault_of,
    fault_of_reserve,
)
from mooncake.store.eviction import EvictionPolicy, Lru
from mooncake.store.lifecycle import State, Trigger
from mooncake.store.objects import Objects, pick
from mooncake.store.quotas import Quotas, Tenant
from mooncake.store.readers import NoReaders, Readers
from mooncake.store.ssd import SsdConfig, SsdTier
from mooncake.store.types import CommitStatus, Places, PutMode, Puts, PutStatus
from mooncake.store.waiting import Waiting, WaitingCall, WaitingLease

_T = TypeVar("_T")
_STRICT, _RESERVED, _EXISTS, _COMMITTED = PutMode.STRICT, PutStatus.RESERVED, PutStatus.EXISTS, CommitStatus.COMMITTED
"""Members of an enum are looked up slowly."""
RESERVATION_NS = 600 * NANOS_PER_S
"""A reservation's time to live, longer than the longest prefill, whose objects are reserved before it starts. A writer that
died is seen by its connection long before."""
_FEW_RESERVED = 64
_COUNTERS = (
    "hits",
    "local_hits",  # of them, those that readers took by themselves
    "local_bytes",
    "misses",
    "commits",
    "committed_bytes",
    "removals",
    "refusals",
    "conflicts",
    "expired",
    "damaged",
)
REPORT_NS = 20 * NANOS_PER_MS
"""Deltas are gathered this long: a control message costs 100 us, a prediction covers the gap."""
LOOK_NS = 50 * NANOS_PER_MS
"""How often it is looked whether what readers have without asking is free again."""


class StoreCore:
    """allocator: of the segment; by default one of `capacity` bytes that places objects. readers: those who do not ask; by
    default there are none. last_number: objects are numbered from the next on; readers know them by that, so it must be none of
    a life before. quotas: bytes of memory of all nodes by tenant; the others may have all there is."""

    def __init__(
        self,
        capacity: int,
        *,
        epoch: int,
        alignment: int = 4096,
        policy: EvictionPolicy | None = None,
        allocator: BytesAllocator | None = None,
        reservation_ns: int = RESERVATION_NS,
        report_ns: int = REPORT_NS,
        ssd: SsdConfig | None = None,
        readers: Readers | None = None,
        last_number: int = 0,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        self.epoch = epoch
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self.readers = NoReaders() if readers is None else readers
        self._allocator = allocator or Allocator(capacity, alignment)
        self._quotas = Quotas(quotas or {})
        self._objects = Objects(
            self._allocator, Lru() if policy is None else policy, self.readers, last_number, self._quotas
        )
        self._reservation_ns = reservation_ns
        self._report_ns = report_ns
        self._clients: dict[int, Claims] = {}
        self._reserved: deque[Reservations] = deque()  # one time to live, so in the order in which they run out
        self._num_reserved_max = _FEW_RESERVED
        """When there are more, those that are closed behind one that stays open are dropped."""
        self._writers: Counter[bytes] | None = None
        """Live reservations by key. Only strict writers ask for them, so they are counted from the first strict put on."""
        self._report_at: int | None = None
        self._has_granted = False
        self._look_at: int | None = None
        """When to see whether objects linger still."""
        self._handlers: dict[type[Event], Callable[[Any, int], list[Command]]] = {
            Reserve: self._reserve,
            Commit: self._commit_keyed,
            Grant: self._grant,
            Name: self._name,
            Cancel: self._cancel,
            Lease: self._lease,
            Release: self._release,
            Exists: self._exists,
            Remove: self._remove,
            ClientTenant: self._client_tenant,
            UsedElsewhere: self._used_elsewhere,
            ClientGone: self._client_gone,
            Used: self._used,
            Adopted: self._adopt,
            SnapshotWanted: self._snapshot,
            Flush: lambda event, now: self._flush(),
            Tick: self._tick,
        }
        self._ssd: SsdTier | None = None
        self._waiting = Waiting(self._objects)
        if ssd is not None and ssd.capacity_bytes:
            self._ssd = SsdTier(ssd, self._objects, self._allocator.capacity)
            self._handlers |= {
                Reserve: self._reserve_in_time,
                Lease: self._lease_in_time,
                SsdWritten: self._ssd_written,
                SsdRead: self._ssd_read,
                SsdRecovered: self._ssd_recovered,
            }

    def handle(self, event: Event, now: int) -> list[Command]:
        commands = self._handlers[type(event)](event, now)
        if self._ssd is not None:
            commands += self._go_on(self._ssd, now)
        changes = self._objects.changes
        if self._report_at is None and (changes.gained or changes.lost):
            self._report_at = now + self._report_ns
        if self._report_at is not None and now >= self._report_at:
            commands += self._flush()
        if self._look_at is None and self._objects.lingering:
            self._look_at = now + LOOK_NS
        return commands

    def deadline(self) -> int | None:
        reserved, earliest = self._reserved, self._report_at
        while reserved and not reserved[0].num_open:
            reserved.popleft()
        if reserved and (earliest is None or reserved[0].expires_at < earliest):
            earliest = reserved[0].expires_at
        if self._look_at is not None and (earliest is None or self._look_at < earliest):
            earliest = self._look_at
        if self._ssd is not None:
            until = self._waiting.deadline()
            if until is not None and (earliest is None or until < earliest):
                earliest = until
        return earliest

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return (Tier.DRAM,) if self._ssd is None else (Tier.DRAM, Tier.SSD)

    def allows(self, client: int, number: int, offset: int, size: int, write: bool) -> bool:
        """Whether [offset, offset + size) of the segment lies in an object that the client may write (its live
        reservation) or read (its lease)."""
        claims = self._clients.get(client)
        if claims is None:
            return False
        row = claims.writable_row(number) if write else claims.leased_row(number)
        if row is None:
            return False
        start = self._objects.offsets[row]
        return start <= offset and offset + size <= start + self._objects.sizes[row]

    def metrics(self) -> dict[str, int]:
        """Bytes are rounded to the alignment. `evictable_bytes`: of committed, unleased objects. With SSD, its own too."""
        objects, clients = self._objects, self._clients.values()
        reserved = [row for claims in clients for _, row in claims.reserved_rows()]
        granted = sum([not objects.keys[row] for row in reserved])
        below = {} if self._ssd is None else self._ssd.metrics() | {"waiting": len(self._waiting)}
        return (
            self.counters
            | below
            | {
                "evictions": objects.num_evictions,
                "evicted_bytes": objects.evicted_bytes,
                "capacity_bytes": self._allocator.capacity,
                "used_bytes": self._allocator.capacity - self._allocator.free_bytes,
                "evictable_bytes": objects.idle_bytes,
                "objects": len(objects.by_key),
                "lingering": len(objects.lingering),
                "reservations": len(reserved) - granted,
                "granted": granted,
                "leases": sum([claims.num_leases + len(claims.aliases) for claims in clients]),
            }
        )

    def tenants(self) -> Sequence[Tenant]:
        """Those that have a quota."""
        return list(self._quotas.tenants.values())

    def ssd_contents(self) -> SsdRecovered | None:
        """For drivers without a disk: what it would tell the next life."""
        return None if self._ssd is None else self._ssd.log.contents()

    # ------------------------------------------------------------ reserve and commit

    def _reserve(self, event: Reserve, now: int) -> list[Command]:
        objects, keys = self._objects, event.keys
        found = objects.find(keys)
        num_known = len(found) - found.count(None)
        known: list[Any] = found[:num_known]
        if event.mode is _STRICT or None in known:
            return self._reserve_any(event, found, now)
        if fault_of_reserve(event, num_known, self._allocator.capacity) is not None:
            return self._fault(event)
        claims = self._claims(event.client)
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
        fault = self._fault(event)
        if fault:
            return fault
        objects, claims = self._objects, self._claims(event.client)
        others = self._judge_strictly(event, found) if event.mode is _STRICT else {}
        same_at = [at for at, row in enumerate(found) if row is not None and at not in others]
        new_at = [at for at, row in enumerate(found) if row is None and at not in others]
        held = [row for row in found if row is not None]
        objects.hold(held)
        made = self._make(event, claims, new_at, now)
        if made is None:
            return self._refuse(event, held)
        there = _nowhere(len(same_at))
        if event.lease_existing and same_at:
            there = self._lease_to(
                claims, [row for at, row in enumerate(found) if row is not None and at not in others]
            )
            held = [row for at, row in enumerate(found) if row is not None and at in others]
        objects.unhold(held)
        at = [*same_at, *new_at, *others]
        places = _join((there, made, _nowhere(len(others))), at)
        statuses = (_EXISTS,) * len(same_at) + _statuses_of(made.numbers) + tuple(others.values())
        in_order = tuple([status for _, status in sorted(zip(at, statuses, strict=True))])
        return _reply(event, _with_statuses(places, in_order))

    def _refuse(self, event: Reserve, known: Sequence[int]) -> list[Command]:
        self.counters["refusals"] += 1
        self._objects.unhold(known)
        count = len(event.keys)
        return _reply(event, _with_statuses(_nowhere(count), (PutStatus.REFUSED,) * count))

    def _lease_known(self, event: Reserve, claims: Claims, rows: Sequence[int]) -> Places:
        """Where those that exist are, if the client wants a lease of them."""
        if event.lease_existing and rows:
            return self._lease_to(claims, rows)
        self._objects.unhold(rows)
        return _nowhere(len(rows))

    def _judge_strictly(self, event: Reserve, found: list[int | None]) -> dict[int, PutStatus]:
        """By index, what becomes of keys that are neither to be made nor the same as what exists."""
        if self._writers is None:
            self._writers = self._count_writers()
        others: dict[int, PutStatus] = {}
        for at, row in enumerate(found):
            if row is None:
                if event.keys[at] in self._writers:
                    others[at] = PutStatus.BUSY
                elif self._ssd is not None and self._ssd.differs(event.keys[at], event.checksums[at]):
                    others[at] = PutStatus.CONFLICT
                    self.counters["conflicts"] += 1
            elif self._objects.checksums.get(row) != event.checksums[at]:
                others[at] = PutStatus.CONFLICT
                self.counters["conflicts"] += 1
        return others

    def _make(self, event: Reserve, claims: Claims, new: Sequence[int], now: int) -> Places | None:
        """Reserve space for these keys; nowhere for one that finds none, and None alone if then nothing is wanted."""
        if not new:
            return _nowhere(0)
        tenant = self._payer(event)
        if tenant is None:
            return self._make_unbounded(event, claims, new, now)
        if event.tenant:
            return self._make_for(tenant, event, claims, new, now)
        num_fitting = self._num_within_quota(tenant, _select(event.sizes, new), whole=event.all_or_nothing)
        num_over = len(new) - num_fitting
        if num_over:
            self.counters["refusals"] += num_over
            tenant.num_refused += num_over
        if num_over and event.all_or_nothing:
            return None
        made = self._make_unbounded(event, claims, new[:num_fitting], now) if num_fitting else _nowhere(0)
        if made is None:
            return None
        rows = [row for number in made.numbers if number and (row := claims.writable_row(number)) is not None]
        self._quotas.charge(tenant, rows)
        return _join((made, _nowhere(num_over)), range(len(new)))

    def _payer(self, event: Reserve | Lease) -> Tenant | None:
        """Whose quota what the call brings into memory counts for."""
        if event.tenant:
            return self._quotas.tenants.get(event.tenant)
        return self._claims(event.client).tenant

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
        extents = list(map(self._allocator.rounded, sizes))
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
            self.counters["refusals"] += len(refused)
            lost = dict.fromkeys(refused)
            made = [at for index, at in enumerate(new) if index not in lost]
        if rows:
            self._enter(Reservations(numbers, rows, now + self._reservation_ns), claims)
            self._mark(event, rows, made)
        if not refused:
            return Places(pick(objects.offsets, rows), tuple(sizes), numbers)
        there = objects.places(rows) if rows else _nowhere(0)
        return _join((there, _nowhere(len(refused))), [*made, *[new[index] for index in refused]])

    def _enter(self, reservations: Reservations, claims: Claims) -> None:
        claims.reserve(reservations)
        self._reserved.append(reservations)
        if len(self._reserved) > self._num_reserved_max:
            self._reserved = deque([reservations for reservations in self._reserved if reservations.num_open])
            self._num_reserved_max = 2 * len(self._reserved) + _FEW_RESERVED

    def _mark(self, event: Reserve, rows: Sequence[int], made: Sequence[int]) -> None:
        """What the call says of its new objects. made: their indices."""
        transient, before = self._objects.transient, self._objects.before
        for row, key in zip(rows, _select((b"", *event.keys), made), strict=True):
            before[row] = key
        if self._writers is not None:
            self._writers.update(_select(event.keys, made))
        if event.checksums:
            self._objects.checksums.update(zip(rows, _select(event.checksums, made), strict=True))
        if event.ephemeral:
            transient.update(dict.fromkeys(rows))
        elif event.ephemeral_last and made[-1] == len(event.keys) - 1:
            transient[rows[-1]] = None

    def _commit(self, event: Commit, now: int) -> list[Command]:
        objects, numbers = self._objects, event.numbers
        if event.checksums:
            fault = self._fault(event)
            if fault:
                return fault
        claims = self._claims(event.client)
        reservations = claims.reserved_with(numbers[0]) if numbers else None
        rows = None if reservations is None else reservations.live_rows(numbers)
        if reservations is None or rows is None:
            return self._commit_singly(event, claims)
        keys = [objects.keys[row] for row in rows]
        if not objects.by_key.keys().isdisjoint(keys):
            return self._commit_singly(event, claims)
        claims.close(reservations, numbers[0], len(numbers))
        self._forget_writers(keys)
        if event.checksums:
            pairs = zip(rows, event.checksums, strict=True)
            objects.checksums.update([(row, checksum) for row, checksum in pairs if checksum is not None])
        objects.publish(rows, keys)
        self._keep(event, claims, numbers, rows)
        return [Reply(event.client, event.request_id, (_COMMITTED,) * len(numbers))]

    def _commit_singly(self, event: Commit, claims: Claims) -> list[Command]:
        fault = self._fault(event)
        if fault:
            return fault
        objects = self._objects
        results: list[CommitStatus] = []
        committed: dict[int, int] = {}
        for at, number in enumerate(event.numbers):
            row = claims.take_reserved(number)
            if row is None:
                results.append(CommitStatus.UNKNOWN)
            elif objects.states[row] is State.FENCED:
                objects.end(row, Trigger.COMMIT)
                results.append(CommitStatus.EXPIRED)
            elif (winner := objects.by_key.get(objects.keys[row])) is not None:
                if event.lease:
                    objects.hold((winner,))
                    claims.aliases[number] = winner
                self._end_reservation(row, Trigger.CANCEL)
                results.append(CommitStatus.EXISTS)
            else:
                self._forget_writers((objects.keys[row],))
                checksum = event.checksums[at] if event.checksums else None
                if checksum is not None:
                    objects.checksums[row] = checksum
                objects.publish((row,), (objects.keys[row],))
                committed[number] = row
                results.append(CommitStatus.COMMITTED)
        if committed:
            self._keep(event, claims, tuple(committed), list(committed.values()))
        return _reply(event, tuple(results))

    def _commit_keyed(self, event: Commit, now: int) -> list[Command]:
        """What was reserved under a key, unlike granted space."""
        if self._has_granted:
            claims, keys = self._claims(event.client), self._objects.keys
            rows = [claims.writable_row(number) for number in event.numbers]
            if any(row is not None and not keys[row] for row in rows):
                return [Fault(event.client, event.request_id, "numbers: granted space has no key; it is to be named")]
        return self._commit(event, now)

    def _grant(self, event: Grant, now: int) -> list[Command]:
        """Space without keys, if that need not wait for anything."""
        self._has_granted = True
        fault, sizes = self._fault(event), event.sizes
        if fault:
            return fault
        if self._ssd is not None and self._objects.rounded(sizes) > self._objects.spare_bytes:
            return _reply(event, _nowhere(len(sizes)))
        blank = Reserve(event.client, event.request_id, (b"",) * len(sizes), sizes)
        made = self._make(blank, self._claims(event.client), range(len(sizes)), now)
        assert made is not None  # it is not all or nothing
        return _reply(event, made)

    def _name(self, event: Name, now: int) -> list[Command]:
        fault = self._fault(event)
        if fault:
            return fault
        claims = self._claims(event.client)
        reservations = claims.reserved_with(event.numbers[0])
        rows: Sequence[int | None] | None = None if reservations is None else reservations.live_rows(event.numbers)
        if rows is None:
            rows = [claims.writable_row(number) for number in event.numbers]
        return self._commit(
            Commit(event.client, event.request_id, self._named(event, rows), False, event.checksums), now
        )

    def _named(self, event: Name, rows: Sequence[int | None]) -> tuple[int, ...]:
        """The numbers of those that have their keys now; 0 for one that had a key before, or has too little space."""
        objects, numbers, before = self._objects, list(event.numbers), b""
        for at, (row, key, size) in enumerate(zip(rows, event.keys, event.sizes, strict=True)):
            if row is not None and not objects.keys[row] and size <= objects.extents[row]:
                objects.keys[row], objects.sizes[row], objects.before[row] = key, size, before
                if self._writers is not None:
                    self._forget_writers((b"",))
                    self._writers[key] += 1
            elif row is not None:
                numbers[at] = 0
            before = key
        return tuple(numbers)

    def _keep(self, event: Commit, claims: Claims, numbers: tuple[int, ...], rows: list[int]) -> None:
        """What was committed is held by the call; now the client has a lease of it, or nobody."""
        self.counters["commits"] += len(rows)
        self.counters["committed_bytes"] += sum(pick(self._objects.sizes, rows))
        if event.lease:
            claims.lease(numbers, rows)
        else:
            self._objects.unhold(rows)

    def _cancel(self, event: Cancel, now: int) -> list[Command]:
        fault = self._fault(event)
        if fault:
            return fault
        claims = self._claims(event.client)
        rows = [claims.take_reserved(number) for number in event.numbers]
        for row in rows:
            if row is not None:
                self._end_reservation(row, Trigger.CANCEL)
        return _reply(event, tuple([row is not None for row in rows]))

    # ------------------------------------------------------------ lease, release, and the rest

    def _lease(self, event: Lease, now: int) -> list[Command]:
        rows = self._objects.find_all(event.keys) if event.keys else None
        if rows is None or len(rows) > MAX_BATCH:
            return self._lease_some(event)
        self.counters["hits"] += len(rows)
        self._objects.hold(rows)
        return [Reply(event.client, event.request_id, self._lease_to(self._claims(event.client), rows))]

    def _lease_some(self, event: Lease) -> list[Command]:
        fault = self._fault(event)
        if fault:
            return fault
        found = self._objects.find(event.keys)
        self._objects.hold([row for row in found if row is not None])
        return [Reply(event.client, event.request_id, self._lease_found(event.client, found))]

    def _lease_found(self, client: int, found: Sequence[int | None]) -> Places:
        """What the call holds already, None for what is missed, becomes leases of the client."""
        hits = [at for at, row in enumerate(found) if row is not None]
        misses = [at for at, row in enumerate(found) if row is None]
        self.counters["hits"] += len(hits)
        self.counters["misses"] += len(misses)
        if not hits:
            return _nowhere(len(found))
        there = self._lease_to(self._claims(client), [row for row in found if row is not None])
        return _join((there, _nowhere(len(misses))), hits + misses)

    def _release(self, event: Release, now: int) -> list[Command]:
        claims, numbers = self._claims(event.client), event.numbers
        rows = claims.release_whole(numbers) if len(numbers) <= MAX_BATCH else None
        if rows:
            self._objects.unhold(rows)
            return [Reply(event.client, event.request_id, (True,) * len(rows))]
        fault = self._fault(event)
        if fault:
            return fault
        found = claims.release_singly(numbers)
        self._objects.unhold([row for row in found if row is not None])
        return _reply(event, tuple([row is not None for row in found]))

    def _exists(self, event: Exists, now: int) -> list[Command]:
        fault = self._fault(event)
        if fault:
            return fault
        by_key, ssd = self._objects.by_key, self._ssd
        if ssd is not None:
            return _reply(event, tuple([key in by_key or ssd.has(key) for key in event.keys]))
        return _reply(event, tuple([key in by_key for key in event.keys]))

    def _remove(self, event: Remove, now: int) -> list[Command]:
        fault = self._fault(event)
        if fault:
            return fault
        results = []
        for key in event.keys:
            row = self._objects.by_key.get(key)
            if row is not None:
                self._objects.remove(row)
            was_below = self._ssd is not None and self._ssd.remove(key)
            results.append(row is not None or was_below)
            self.counters["damaged" if event.damaged else "removals"] += results[-1]
        return _reply(event, tuple(results))

    # ------------------------------------------------------------ other events

    def _client_tenant(self, event: ClientTenant, now: int) -> list[Command]:
        self._claims(event.client).tenant = self._quotas.tenants.get(event.tenant)
        return []

    def _used_elsewhere(self, event: UsedElsewhere, now: int) -> list[Command]:
        self._quotas.set_elsewhere(event.usage)
        return []

    def _client_gone(self, event: ClientGone, now: int) -> list[Command]:
        self._waiting.drop(event.client)
        claims = self._clients.pop(event.client, None)
        if claims is not None:
            for number, row in claims.reserved_rows():
                claims.take_reserved(number)
                self._end_reservation(row, Trigger.CANCEL)
            self._objects.unhold(list(claims.leased_rows()))
        return []

    def _snapshot(self, event: SnapshotWanted, now: int) -> list[Command]:
        objects = self._objects
        keys = tuple([key for key, row in objects.by_key.items() if row not in objects.transient])
        commands = [*self._flush(), Snapshot(self.epoch, objects.changes.seq, keys)]
        if self._ssd is not None:
            log = self._ssd.log
            commands.append(Snapshot(self.epoch, log.changes.seq, tuple(log.copies), Tier.SSD))
        if self._quotas.tenants:
            commands.append(Usage(self.epoch, self._quotas.usage()))
        return commands

    def _used(self, event: Used, now: int) -> list[Command]:
        objects, states = self._objects, self._objects.states
        for batch in event.batches:
            rows = [row for row in batch if row < len(states) and states[row] is State.COMMITTED]
            self.counters["hits"] += len(rows)
            self.counters["local_hits"] += len(rows)
            self.counters["local_bytes"] += sum(pick(objects.sizes, rows))
            objects.hold(rows)
            objects.unhold(rows)
        return []

    def _adopt(self, event: Adopted, now: int) -> list[Command]:
        """Raises ValueError if they cannot all be where they are said to be."""
        if event.keys:
            self._objects.restore(event.keys, event.sizes, event.offsets, event.numbers, event.checksums, event.owners)
        return []

    def _tick(self, event: Tick, now: int) -> list[Command]:
        objects = self._objects
        if self._look_at is not None and self._look_at <= now:
            self._look_at = None
            objects.settle_readers()
        while self._reserved and self._reserved[0].expires_at <= now:
            reservations = self._reserved.popleft()
            reservations.is_late = True
            rows = reservations.open_rows()
            for row in rows:
                objects.move(row, Trigger.EXPIRE)
            self._forget_writers([objects.keys[row] for row in rows])
            self.counters["expired"] += len(rows)
        return []

    def _flush(self) -> list[Command]:
        self._report_at = None
        changes = self._objects.changes
        added, removed = changes.take()
        commands: list[Command] = [Report(self.epoch, changes.seq, added, removed)] if added or removed else []
        if self._ssd is not None:
            below = self._ssd.log.changes
            added, removed = below.take()
            commands += [Report(self.epoch, below.seq, added, removed, Tier.SSD)] if added or removed else []
        usage = self._quotas.take_usage()
        if usage is not None:
            commands.append(Usage(self.epoch, usage))
        return commands

    # ------------------------------------------------------------ the SSD tier

    def _reserve_in_time(self, event: Reserve, now: int, began_at: int | None = None) -> list[Command]:
        """began_at: when the call came, if it has waited."""
        ssd, began_at = self._ssd, now if began_at is None else began_at
        assert ssd is not None
        fault = self._fault(event)
        if fault:
            return fault
        found = self._objects.find(event.keys)
        new = [at for at, row in enumerate(found) if row is None]
        wanted = self._objects.rounded([event.sizes[at] for at in new])
        load_until, room_until = began_at + ssd.config.load_wait_ns, began_at + ssd.config.room_wait_ns
        if self._waiting.is_full:
            return self._reserve(event, now)
        if now < load_until and any(event.keys[at] in ssd.loading for at in new):
            return self._put_off(event, began_at, load_until, 0)
        if now < room_until and self._lacks_room(wanted, now):
            return self._put_off(event, began_at, room_until, wanted)
        return self._reserve(event, now)

    def _lease_in_time(self, event: Lease, now: int, began_at: int | None = None) -> list[Command]:
        """As `_reserve_in_time`."""
        ssd, began_at = self._ssd, now if began_at is None else began_at
        assert ssd is not None
        fault = self._fault(event)
        if fault:
            return fault
        objects, keys = self._objects, event.keys
        found = objects.find(keys)
        leading = self._num_leading(keys, found)
        missing = list(dict.fromkeys([keys[at] for at in range(leading) if found[at] is None]))
        if not missing or self._waiting.is_full:
            return self._lease(event, now)
        new = [key for key in missing if key not in ssd.loading]
        wanted = objects.rounded(ssd.sizes(new)) if new else 0
        room_until = began_at + ssd.config.room_wait_ns
        if now < room_until and self._lacks_room(wanted, now):
            ssd.log.spare(new, room_until)
            return self._put_off(event, began_at, room_until, wanted)
        objects.hold([row for row in found if row is not None])
        commands: list[Command] = [*ssd.load(new)] if new else []
        tenant = self._payer(event)
        if tenant is not None:  # it comes to memory for this one, and is not refused: what follows has less room
            self._quotas.charge(tenant, [ssd.loading[key] for key in new if key in ssd.loading])
        loads = 0
        for at in range(leading):
            row = ssd.loading.get(keys[at]) if found[at] is None else None
            if row is not None:
                found[at] = row
                objects.before[row] = keys[at - 1] if at else b""
                objects.hold((row,))
                loads += 1
        if loads:
            self._waiting.wait(WaitingLease(event, found, loads, now + ssd.config.load_wait_ns))
            return commands
        return [Reply(event.client, event.request_id, self._lease_found(event.client, found))]

    def _num_leading(self, keys: Sequence[bytes], found: Sequence[int | None]) -> int:
        """Keys before the first that is in no tier."""
        ssd = self._ssd
        assert ssd is not None
        for at, key in enumerate(keys):
            if found[at] is None and key not in ssd.loading and not ssd.has(key):
                return at
        return len(keys)

    def _lacks_room(self, wanted_bytes: int, now: int) -> bool:
        """Whether there is not so much room ready, but can be expected."""
        assert self._ssd is not None
        return wanted_bytes > self._objects.spare_bytes and self._ssd.can_save(now)

    def _put_off(self, event: Reserve | Lease, began_at: int, until: int, wanted_bytes: int) -> list[Command]:
        self._waiting.calls.append(WaitingCall(event, began_at, until, wanted_bytes))
        return []

    def _ssd_written(self, event: SsdWritten, now: int) -> list[Command]:
        assert self._ssd is not None
        return self._ssd.written(event, now)

    def _ssd_read(self, event: SsdRead, now: int) -> list[Command]:
        assert self._ssd is not None
        self._ssd.read(event, self._waiting.resolve)
        return []

    def _ssd_recovered(self, event: SsdRecovered, now: int) -> list[Command]:
        assert self._ssd is not None
        self._ssd.recover(event)
        return []

    def _go_on(self, ssd: SsdTier, now: int) -> list[Command]:
        """After each event: answer and try again what has waited, then write ahead."""
        commands: list[Command] = []
        for lease in self._waiting.take_done(now):
            places = self._lease_found(lease.client, lease.rows)
            places = msgspec.structs.replace(places, num_loaded=lease.num_loaded)
            commands.append(Reply(lease.client, lease.request_id, places))
        calls, self._waiting.calls = self._waiting.calls, []
        for call in calls:
            if isinstance(call.event, Reserve):
                commands += self._reserve_in_time(call.event, now, call.began_at)
            else:
                commands += self._lease_in_time(call.event, now, call.began_at)
        commands += ssd.save(sum([call.wanted_bytes for call in self._waiting.calls]), now)
        changes = ssd.log.changes
        if self._report_at is None and (changes.gained or changes.lost):
            self._report_at = now + self._report_ns
        return commands

    # ------------------------------------------------------------ claims

    def _claims(self, client: int) -> Claims:
        claims = self._clients.get(client)
        if claims is None:
            claims = self._clients[client] = Claims()
        return claims

    def _fault(self, event: Request) -> list[Command]:
        fault = fault_of(event, self._allocator.capacity)
        return [] if fault is None else [Fault(event.client, event.request_id, fault)]

    def _lease_to(self, claims: Claims, rows: Sequence[int]) -> Places:
        """What the call holds already becomes a lease of the client."""
        places = self._objects.places(rows)
        claims.lease(places.numbers, rows)  # type: ignore[arg-type]  # none is nowhere
        return places

    def _end_reservation(self, row: int, trigger: Trigger) -> None:
        if self._objects.states[row] is State.RESERVED:
            self._forget_writers((self._objects.keys[row],))
        self._objects.end(row, trigger)

    def _count_writers(self) -> Counter[bytes]:
        objects, clients = self._objects, self._clients.values()
        rows = [row for claims in clients for _, row in claims.reserved_rows()]
        return Counter([objects.keys[row] for row in rows if objects.states[row] is State.RESERVED])

    def _forget_writers(self, keys: Sequence[bytes]) -> None:
        if self._writers is not None:
            for key in keys:
                left = self._writers.pop(key) - 1
                if left:
                    self._writers[key] = left

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """Raises AssertionError if a law is broken. O(objects)."""
        objects, clients = self._objects, self._clients.values()
        objects.check_integrity()
        states = objects.states
        reserved = Counter([row for claims in clients for _, row in claims.reserved_rows()])
        owned = Counter([row for row in objects.used_rows() if states[row] in (State.RESERVED, State.FENCED)])
        _require(reserved == owned, "a reservation has no owner, or an owner no reservation")
        _require(sum([claims.num_reservations for claims in clients]) == len(owned), "reservations are miscounted")
        _require(self._writers in (None, self._count_writers()), "a key's writers are miscounted")
        waiting = Counter([row for reservations in self._reserved for row in reservations.open_rows()])
        live = Counter([row for row in owned if states[row] is State.RESERVED])
        _require(waiting == live, "a reservation runs out never, or twice")
        leased = Counter([row for claims in clients for row in claims.leased_rows()])
        numbers = sum([claims.num_leases + len(claims.aliases) for claims in clients])
        _require(numbers == leased.total(), "leases are miscounted")
        leased.update(self._waiting.held_rows())
        leased.update(objects.lingering.keys())
        if self._ssd is not None:
            self._ssd.check_integrity()
            leased.update(self._ssd.held_rows())
        _require(leased == {row: count for row, count in enumerate(objects.refs) if count}, "leases do not add up")


def _nowhere(count: int) -> Places:
    nothing = (None,) * count
    return Places(nothing, nothing, nothing)


def _with_statuses(places: Places, statuses: tuple[PutStatus, ...]) -> Puts:
    return Puts(places.offsets, places.sizes, places.numbers, statuses=statuses)


def _join(parts: Sequence[Places], at: Sequence[int]) -> Places:
    """One after the other; the i-th of them goes to at[i]."""
    order = sorted(range(len(at)), key=at.__getitem__)
    columns = zip(*[(part.offsets, part.sizes, part.numbers) for part in parts], strict=True)
    offsets, sizes, numbers = [pick(tuple(chain(*column)), order) for column in columns]
    if not any(part.checksums for part in parts):
        return Places(offsets, sizes, numbers)
    checksums = [part.checksums or (None,) * len(part) for part in parts]
    return Places(offsets, sizes, numbers, pick(tuple(chain(*checksums)), order))


def _statuses_of(numbers: tuple[int | None, ...]) -> tuple[PutStatus, ...]:
    if None in numbers:
        return tuple([PutStatus.REFUSED if number is None else _RESERVED for number in numbers])
    return (_RESERVED,) * len(numbers)


def _select(values: Sequence[_T], positions: Sequence[int]) -> Sequence[_T]:
    if isinstance(positions, range):
        return values[positions.start : positions.stop]
    return [values[at] for at in positions]


def _reply(event: Request, results: Results) -> list[Command]:
    return [Reply(event.client, event.request_id, results)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"store: {message}")
