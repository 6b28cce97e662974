"""Everything a store node decides: who gets space, what is visible, who holds what, what is evicted, what is reported.

Sans-IO: `handle(event, now)` gives commands, `deadline()` the time of the next Tick. The core never sees a byte of an
object.

Each event goes to the part that decides it. `Reserving` gives space to writers, `Committing` makes visible what they wrote, and
`ReservationBook` has what is between the two. `Clients` leases to readers and takes back. With an SSD tier (`ssd`), `SsdCalls`
lets reservations and leases wait for it. The rest is here: what exists, what is removed, who is gone, what is reported.

Every claim has an owner: a reservation and a lease are in their client's `Claims`, and an object's `refs` is the sum of them,
and of what jobs of the SSD tier and leases that wait for one hold, and of those that linger (`Objects`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mooncake.core.types import NANOS_PER_MS, Tier
from mooncake.store.allocator import Allocator, BytesAllocator
from mooncake.store.answers import faults, reply
from mooncake.store.clients import Clients
from mooncake.store.committing import Committing
from mooncake.store.events import (
    Adopted,
    Cancel,
    ClientGone,
    ClientTenant,
    Command,
    Commit,
    Event,
    Exists,
    Flush,
    Grant,
    Lease,
    Name,
    Release,
    Remove,
    Report,
    Reserve,
    Snapshot,
    SnapshotWanted,
    SsdRead,
    SsdRecovered,
    SsdWritten,
    Tick,
    Usage,
    Used,
    UsedElsewhere,
)
from mooncake.store.eviction import EvictionPolicy, Lru
from mooncake.store.lifecycle import State
from mooncake.store.objects import Objects, pick
from mooncake.store.quotas import Quotas, Tenant
from mooncake.store.readers import NoReaders, Readers
from mooncake.store.reservations import RESERVATION_NS, ReservationBook
from mooncake.store.reserving import Reserving
from mooncake.store.ssd import SsdConfig, SsdTier
from mooncake.store.ssd_calls import SsdCalls

_Handler = Callable[[Any, int], list[Command]]
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
        self.counters = counters = dict.fromkeys(_COUNTERS, 0)
        self.readers = NoReaders() if readers is None else readers
        self._allocator = allocator = allocator or Allocator(capacity, alignment)
        self._quotas = Quotas(quotas or {})
        self._objects = objects = Objects(
            allocator, Lru() if policy is None else policy, self.readers, last_number, self._quotas
        )
        self._clients = clients = Clients(objects, counters, allocator.capacity)
        self._book = book = ReservationBook(objects, clients, counters, reservation_ns)
        self._ssd = SsdTier(ssd, objects, allocator.capacity) if ssd is not None and ssd.capacity_bytes else None
        reserving = Reserving(objects, allocator, clients, book, counters, self._ssd)
        committing = Committing(objects, clients, book, counters, allocator.capacity)
        self._ssd_calls = (
            None if self._ssd is None else SsdCalls(self._ssd, objects, clients, reserving, allocator.capacity)
        )
        self._report_ns = report_ns
        self._report_at: int | None = None
        self._look_at: int | None = None
        """When to see whether objects linger still."""
        self._handlers = self._table(reserving, committing)

    def _table(self, reserving: Reserving, committing: Committing) -> dict[type[Event], _Handler]:
        clients, calls = self._clients, self._ssd_calls
        table: dict[type[Event], _Handler] = {
            Reserve: reserving.reserve,
            Grant: reserving.grant,
            Commit: committing.commit,
            Name: committing.name,
            Cancel: committing.cancel,
            Lease: clients.lease,
            Release: clients.release,
            Exists: self._exists,
            Remove: self._remove,
            ClientTenant: clients.set_tenant,
            ClientGone: self._client_gone,
            UsedElsewhere: self._used_elsewhere,
            Used: self._used,
            Adopted: self._adopt,
            SnapshotWanted: self._snapshot,
            Flush: lambda event, now: self._flush(),
            Tick: self._tick,
        }
        if calls is not None:
            table |= {
                Reserve: calls.reserve,
                Lease: calls.lease,
                SsdWritten: calls.written,
                SsdRead: calls.read,
                SsdRecovered: calls.recovered,
            }
        return table

    def handle(self, event: Event, now: int) -> list[Command]:
        commands = self._handlers[type(event)](event, now)
        if self._ssd_calls is not None:
            commands += self._ssd_calls.go_on(now)
            changes = self._ssd_calls.changes
            if self._report_at is None and (changes.gained or changes.lost):
                self._report_at = now + self._report_ns
        changes = self._objects.changes
        if self._report_at is None and (changes.gained or changes.lost):
            self._report_at = now + self._report_ns
        if self._report_at is not None and now >= self._report_at:
            commands += self._flush()
        if self._look_at is None and self._objects.lingering:
            self._look_at = now + LOOK_NS
        return commands

    def deadline(self) -> int | None:
        earliest = self._report_at
        if self._book.in_order:
            expires_at = self._book.expires_at()
            if expires_at is not None and (earliest is None or expires_at < earliest):
                earliest = expires_at
        if self._look_at is not None and (earliest is None or self._look_at < earliest):
            earliest = self._look_at
        if self._ssd_calls is not None:
            until = self._ssd_calls.waiting.deadline()
            if until is not None and (earliest is None or until < earliest):
                earliest = until
        return earliest

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return (Tier.DRAM,) if self._ssd is None else (Tier.DRAM, Tier.SSD)

    def allows(self, client: int, number: int, offset: int, size: int, write: bool) -> bool:
        """Whether [offset, offset + size) of the segment lies in an object that the client may write (its live
        reservation) or read (its lease)."""
        claims = self._clients.by_number.get(client)
        if claims is None:
            return False
        row = claims.writable_row(number) if write else claims.leased_row(number)
        if row is None:
            return False
        start = self._objects.offsets[row]
        return start <= offset and offset + size <= start + self._objects.sizes[row]

    def metrics(self) -> dict[str, int]:
        """Bytes are rounded to the alignment. `evictable_bytes`: of committed, unleased objects. With SSD, its own too."""
        objects, reserved = self._objects, self._clients.reserved_rows()
        granted = sum([not objects.keys[row] for row in reserved])
        below = {} if self._ssd_calls is None else self._ssd_calls.metrics()
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
                "leases": self._clients.num_leases,
            }
        )

    def tenants(self) -> Sequence[Tenant]:
        """Those that have a quota."""
        return list(self._quotas.tenants.values())

    def ssd_contents(self) -> SsdRecovered | None:
        """For drivers without a disk: what it would tell the next life."""
        return None if self._ssd is None else self._ssd.log.contents()

    # ------------------------------------------------------------ events that need no part

    def _exists(self, event: Exists, now: int) -> list[Command]:
        fault = faults(event, self._allocator.capacity)
        if fault:
            return fault
        by_key, ssd = self._objects.by_key, self._ssd
        if ssd is not None:
            return reply(event, tuple([key in by_key or ssd.has(key) for key in event.keys]))
        return reply(event, tuple([key in by_key for key in event.keys]))

    def _remove(self, event: Remove, now: int) -> list[Command]:
        fault = faults(event, self._allocator.capacity)
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
        return reply(event, tuple(results))

    def _used_elsewhere(self, event: UsedElsewhere, now: int) -> list[Command]:
        self._quotas.set_elsewhere(event.usage)
        return []

    def _client_gone(self, event: ClientGone, now: int) -> list[Command]:
        if self._ssd_calls is not None:
            self._ssd_calls.waiting.drop(event.client)
        claims = self._clients.by_number.pop(event.client, None)
        if claims is not None:
            self._book.end_all(claims)
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
        if self._look_at is not None and self._look_at <= now:
            self._look_at = None
            self._objects.settle_readers()
        self._book.expire(now)
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

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """Raises AssertionError if a law is broken. O(objects)."""
        objects, clients = self._objects, self._clients
        objects.check_integrity()
        self._book.check_integrity()
        leased = Counter([row for claims in clients.by_number.values() for row in claims.leased_rows()])
        _require(clients.num_leases == leased.total(), "leases are miscounted")
        leased.update(objects.lingering.keys())
        if self._ssd_calls is not None:
            self._ssd_calls.check_integrity()
            leased.update(self._ssd_calls.held_rows())
        _require(leased == {row: count for row, count in enumerate(objects.refs) if count}, "leases do not add up")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"store: {message}")
