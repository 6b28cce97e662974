"""Everything a store node decides: who gets space, what is visible, who holds what, what is evicted, what is reported.

Sans-IO: `handle(event, now)` gives commands, `deadline()` the time of the next Tick. The core never sees a byte of an
object.

An object is in `_by_number` from reservation to end, and in `_by_key` while it is committed; `_num_writers` counts a
key's live reservations. In EQUIVALENT mode a key may have several writers, since waiting for each other would let a
slow or dying one stop the rest: the first commit wins, and those that come later get leases of the winner, under the
numbers of their own reservations (`aliases`). Every claim has an owner: a reservation is in its client's
`reservations`, a lease in its client's `leases` (counted, the same client may lease twice) or `aliases`, and an
object's `refs` is the sum of both.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.store.allocator import Allocator, BytesAllocator
from mooncake.store.events import (
    Cancel,
    ClientGone,
    Command,
    Commit,
    Event,
    Exists,
    Fault,
    Lease,
    Release,
    Remove,
    Reply,
    Report,
    Request,
    Reserve,
    Results,
    Snapshot,
    SnapshotWanted,
    Tick,
    fault_of,
)
from mooncake.store.eviction import EvictionPolicy, Lru
from mooncake.store.lifecycle import TABLE, State, Trigger, advance
from mooncake.store.types import MISS, CommitStatus, Location, Put, PutMode, PutStatus

RESERVATION_NS = 600 * NANOS_PER_S
"""A reservation's time to live, longer than the longest prefill, whose objects are reserved before it starts. A writer that
died is seen by its connection long before."""
REPORT_NS = 20 * NANOS_PER_MS
"""Deltas are gathered this long: a control message costs 100 us, a prediction covers the gap."""

_REFUSED = Put(PutStatus.REFUSED)
_BUSY = Put(PutStatus.BUSY)
_TO_MAKE = Put(PutStatus.RESERVED)
"""Stands for an answer until there is a location."""
_CONFLICT = Put(PutStatus.CONFLICT)
_RESERVED = TABLE[State.FREE, Trigger.RESERVE]
_COMMITTED = TABLE[State.RESERVED, Trigger.COMMIT]


class StoredObject(msgspec.Struct, gc=False):
    """One reservation or object. `number` is its generation; num_bytes are rounded to the allocator's alignment."""

    number: int
    key: bytes
    location: Location
    num_bytes: int
    state: State
    writer: int | None
    ephemeral: bool
    checksum: int | None
    batch: _Batch
    refs: int = 0


class _Batch:
    """Reservations of one call, which run out together. num_open: those that are still reserved."""

    __slots__ = ("expires_at", "num_open", "numbers")

    def __init__(self, expires_at: int) -> None:
        self.expires_at = expires_at
        self.num_open = 0
        self.numbers = range(0)


class _Claims:
    """What one client holds: numbers of its reservations, and how often it leased which number. aliases: numbers of
    reservations that lost against another writer -> the number of which it has a lease instead, beside `leases`."""

    __slots__ = ("aliases", "leases", "reservations")

    def __init__(self) -> None:
        self.reservations: dict[int, None] = {}
        self.leases: dict[int, int] = {}
        self.aliases: dict[int, int] = {}


class StoreCore:
    """allocator: of the segment; by default one of `capacity` bytes that places objects."""

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
    ) -> None:
        self.epoch = epoch
        self.seq = 0
        self.counters = dict.fromkeys(
            ("hits", "misses", "commits", "evictions", "evicted_bytes", "refusals", "conflicts", "expired"), 0
        )
        self._allocator = allocator or Allocator(capacity, alignment)
        self._policy: EvictionPolicy = policy or Lru()
        self._reservation_ns = reservation_ns
        self._report_ns = report_ns
        self._by_key: dict[bytes, StoredObject] = {}
        self._num_writers: dict[bytes, int] = {}
        self._by_number: dict[int, StoredObject] = {}
        self._clients: dict[int, _Claims] = {}
        self._batches: deque[_Batch] = deque()  # one time to live, so in the order in which they run out
        self._idle_bytes = 0  # rounded bytes of committed, unleased objects: what eviction could free
        self._delta: dict[bytes, bool] = {}  # key -> added (else removed), net since the last report
        self._report_at: int | None = None
        self._last_number = 0
        self._handlers: dict[type[Event], Callable[[Any, int], list[Command]]] = {
            Reserve: self._reserve,
            Commit: self._commit,
            Cancel: self._cancel,
            Lease: self._lease,
            Release: self._release,
            Exists: self._exists,
            Remove: self._remove,
            ClientGone: self._client_gone,
            SnapshotWanted: self._snapshot,
            Tick: self._tick,
        }

    def handle(self, event: Event, now: int) -> list[Command]:
        if isinstance(event, Request):
            fault = fault_of(event, self._allocator.capacity)
            if fault is not None:
                return [Fault(event.client, event.request_id, fault)]
        commands = self._handlers[type(event)](event, now)
        if self._delta and self._report_at is None:
            self._report_at = now + self._report_ns
        if self._report_at is not None and now >= self._report_at:
            commands += self._flush()
        return commands

    def deadline(self) -> int | None:
        batches = self._batches
        while batches and not batches[0].num_open:
            batches.popleft()
        if not batches:
            return self._report_at
        expires_at = batches[0].expires_at
        return expires_at if self._report_at is None else min(expires_at, self._report_at)

    def allows(self, client: int, number: int, offset: int, size: int, write: bool) -> bool:
        """Whether [offset, offset + size) of the segment lies in an object that the client may write (its live
        reservation) or read (its lease)."""
        obj = self._by_number.get(number)
        if obj is None:
            return False
        if write:
            owned = obj.writer == client and obj.state is State.RESERVED
        else:
            owned = client in self._clients and number in self._clients[client].leases
        return owned and obj.location.offset <= offset and offset + size <= obj.location.offset + obj.location.size

    def metrics(self) -> dict[str, int]:
        """Bytes are rounded to the alignment. `evictable_bytes`: of committed, unleased objects."""
        return self.counters | {
            "capacity_bytes": self._allocator.capacity,
            "used_bytes": self._allocator.used,
            "evictable_bytes": self._idle_bytes,
            "objects": len(self._by_key),
            "reservations": sum(len(claims.reservations) for claims in self._clients.values()),
            "leases": sum(sum(claims.leases.values()) + len(claims.aliases) for claims in self._clients.values()),
        }

    # ------------------------------------------------------------ requests

    def _reserve(self, event: Reserve, now: int) -> list[Command]:
        found = [self._by_key.get(key) for key in event.keys]
        held = [obj for obj in found if obj is not None]
        self._hold(held)  # so that the batch's new objects do not evict those it found
        results: list[Put] = [
            _TO_MAKE if obj is None else _answer_for_known(event, at, obj) for at, obj in enumerate(found)
        ]
        new = [at for at, obj in enumerate(found) if obj is None]
        if event.mode is PutMode.STRICT:
            self.counters["conflicts"] += sum(result is _CONFLICT for result in results)
            new = self._without_busy(event, new, results)
        offsets = self._place([event.sizes[at] for at in new], all_or_nothing=event.all_or_nothing)
        if offsets is None:
            self.counters["refusals"] += 1
            self._unhold(held)
            return _reply(event, (_REFUSED,) * len(event.keys))
        self._make(event, new, offsets, results, now)
        if held:
            self._settle_existing(self._claims(event.client), held, results)
        return _reply(event, tuple(results))

    def _without_busy(self, event: Reserve, new: list[int], results: list[Put]) -> list[int]:
        for at in new:
            if event.keys[at] in self._num_writers:
                results[at] = _BUSY
        return [at for at in new if results[at] is _TO_MAKE]

    def _settle_existing(self, claims: _Claims, held: list[StoredObject], results: list[Put]) -> None:
        """The holds of a reserve call become the client's leases where it asked for them, and end elsewhere."""
        leased = {put.location.generation for put in results if put.location is not None}
        for obj in held:
            if obj.number in leased:
                claims.leases[obj.number] = claims.leases.get(obj.number, 0) + 1
        self._unhold([obj for obj in held if obj.number not in leased])

    def _place(self, sizes: list[int], *, all_or_nothing: bool) -> list[int | None] | None:
        """Where to put objects of these sizes; None for one that finds no room, and None alone if all or nothing is wanted."""
        allocator = self._allocator
        if all_or_nothing and sum(map(allocator.rounded, sizes)) > allocator.free_bytes + self._idle_bytes:
            return None
        offsets: list[int | None] = []
        for size in sizes:
            offset = allocator.allocate(size)
            if offset is None:
                offset = self._evict_for(size)
                if offset is None and all_or_nothing:
                    for given in offsets:
                        allocator.free(given)  # type: ignore[arg-type]
                    return None
            offsets.append(offset)
        return offsets

    def _make(self, event: Reserve, new: list[int], offsets: list[int | None], results: list[Put], now: int) -> None:
        """FREE to RESERVED, for each that found room."""
        claims, rounded, writers = self._claims(event.client), self._allocator.rounded, self._num_writers
        batch = _Batch(now + self._reservation_ns)
        last = len(event.keys) - 1
        number = self._last_number
        for at, offset in zip(new, offsets, strict=True):
            if offset is None:
                self.counters["refusals"] += 1
                results[at] = _REFUSED
                continue
            number += 1
            key, size = event.keys[at], event.sizes[at]
            location = Location(offset, size, number)
            ephemeral = event.ephemeral or (event.ephemeral_last and at == last)
            checksum = event.checksums[at] if event.checksums else None
            self._by_number[number] = StoredObject(
                number, key, location, rounded(size), _RESERVED, event.client, ephemeral, checksum, batch
            )
            writers[key] = writers.get(key, 0) + 1
            results[at] = Put(PutStatus.RESERVED, location)
        numbers = batch.numbers = range(self._last_number + 1, number + 1)
        self._last_number = number
        claims.reservations.update(dict.fromkeys(numbers))
        if numbers:
            batch.num_open = len(numbers)
            self._batches.append(batch)

    def _commit(self, event: Commit, now: int) -> list[Command]:
        claims = self._claims(event.client)
        results: list[CommitStatus] = []
        committed: list[StoredObject] = []
        for at, number in enumerate(event.numbers):
            if number not in claims.reservations:
                results.append(CommitStatus.UNKNOWN)
                continue
            obj = self._by_number[number]
            if obj.state is State.FENCED:
                self._end(obj, Trigger.COMMIT)
                results.append(CommitStatus.EXPIRED)
            elif (winner := self._by_key.get(obj.key)) is not None:
                self._yield_to(winner, obj, lease=event.lease)
                results.append(CommitStatus.EXISTS)
            else:
                if event.checksums:
                    obj.checksum = event.checksums[at]
                self._publish(obj, claims)
                committed.append(obj)
                results.append(CommitStatus.COMMITTED)
        self.counters["commits"] += len(committed)
        if event.lease:
            claims.leases.update([(obj.number, 1) for obj in committed])
        else:
            self._unhold(committed)
        return _reply(event, tuple(results))

    def _yield_to(self, winner: StoredObject, obj: StoredObject, *, lease: bool) -> None:
        if lease:
            assert obj.writer is not None
            self._hold((winner,))
            self._claims(obj.writer).aliases[obj.number] = winner.number
        self._end(obj, Trigger.CANCEL)

    def _publish(self, obj: StoredObject, claims: _Claims) -> None:
        """RESERVED to COMMITTED, held once by whoever commits it."""
        obj.state = _COMMITTED
        obj.batch.num_open -= 1
        del claims.reservations[obj.number]
        self._forget_writer(obj)
        obj.writer = None
        self._by_key[obj.key] = obj
        obj.refs = 1
        self._policy.add(obj.number, obj.key, obj.location.size)
        self._note(obj, added=True)

    def _cancel(self, event: Cancel, now: int) -> list[Command]:
        results = []
        for number in event.numbers:
            obj = self._reservation(event.client, number)
            if obj is not None:
                self._end(obj, Trigger.CANCEL)
            results.append(obj is not None)
        return _reply(event, tuple(results))

    def _lease(self, event: Lease, now: int) -> list[Command]:
        leases = self._claims(event.client).leases
        found = [self._by_key.get(key) for key in event.keys]
        hits = [obj for obj in found if obj is not None]
        self._hold(hits)
        for obj in hits:
            leases[obj.number] = leases.get(obj.number, 0) + 1
        self.counters["hits"] += len(hits)
        self.counters["misses"] += len(found) - len(hits)
        return _reply(event, tuple([MISS if obj is None else obj.location for obj in found]))

    def _release(self, event: Release, now: int) -> list[Command]:
        claims = self._claims(event.client)
        leases = claims.leases
        released: list[StoredObject] = []
        results = []
        for named in event.numbers:
            number = claims.aliases.pop(named, None) if claims.aliases else None
            if number is None and named in leases:
                number = named
                leases[number] -= 1
                if not leases[number]:
                    del leases[number]
            results.append(number is not None)
            if number is not None:
                released.append(self._by_number[number])
        self._unhold(released)
        return _reply(event, tuple(results))

    def _exists(self, event: Exists, now: int) -> list[Command]:
        found = map(self._by_key.get, event.keys)
        return _reply(event, tuple(obj is not None for obj in found))

    def _remove(self, event: Remove, now: int) -> list[Command]:
        results = []
        for key in event.keys:
            obj = self._by_key.get(key)
            if obj is None:
                results.append(False)
                continue
            if obj.refs:
                self._move(obj, Trigger.CONDEMN)
                del self._by_key[key]
                self._note(obj, added=False)
            else:
                self._end(obj, Trigger.REMOVE)
            results.append(True)
        return _reply(event, tuple(results))

    # ------------------------------------------------------------ other events

    def _client_gone(self, event: ClientGone, now: int) -> list[Command]:
        claims = self._clients.pop(event.client, None)
        if claims is not None:
            for number in tuple(claims.reservations):
                self._end(self._by_number[number], Trigger.CANCEL)
            self._unhold([self._by_number[n] for n, count in claims.leases.items() for _ in range(count)])
            self._unhold([self._by_number[n] for n in claims.aliases.values()])
        return []

    def _snapshot(self, event: SnapshotWanted, now: int) -> list[Command]:
        keys = tuple(obj.key for obj in self._by_key.values() if not obj.ephemeral)
        return [*self._flush(), Snapshot(self.epoch, self.seq, keys)]

    def _tick(self, event: Tick, now: int) -> list[Command]:
        while self._batches and self._batches[0].expires_at <= now:
            for number in self._batches.popleft().numbers:
                obj = self._by_number.get(number)
                if obj is not None and obj.state is State.RESERVED:
                    self._move(obj, Trigger.EXPIRE)
                    self._forget_writer(obj)
                    obj.batch.num_open -= 1
                    self.counters["expired"] += 1
        return []

    def _flush(self) -> list[Command]:
        self._report_at = None
        if not self._delta:
            return []
        self.seq += 1
        added = tuple(key for key, is_added in self._delta.items() if is_added)
        removed = tuple(key for key, is_added in self._delta.items() if not is_added)
        self._delta = {}
        return [Report(self.epoch, self.seq, added, removed)]

    # ------------------------------------------------------------ objects

    def _evict_for(self, size: int) -> int | None:
        """Space for `size` bytes, evicting as little as it takes; evicts nothing where even all of it would not do."""
        allocator = self._allocator
        if allocator.rounded(size) > allocator.free_bytes + self._idle_bytes:
            return None
        offset: int | None = None
        while offset is None:
            victim = self._policy.victim()
            if victim is None:
                return None
            obj = self._by_number[victim]
            self._end(obj, Trigger.EVICT)
            self.counters["evictions"] += 1
            self.counters["evicted_bytes"] += obj.location.size
            offset = allocator.allocate(size)
        return offset

    def _hold(self, objects: Iterable[StoredObject]) -> None:
        for obj in objects:
            obj.refs += 1
            if obj.refs == 1:
                self._policy.hold(obj.number)
                self._idle_bytes -= obj.num_bytes

    def _unhold(self, objects: Sequence[StoredObject]) -> None:
        """The opposite of _hold, in chain order. What nobody holds becomes evictable, or ends if it was waiting to."""
        idle: list[int] = []
        ephemeral: list[StoredObject] = []
        for obj in objects:
            obj.refs -= 1
            if obj.refs:
                continue
            if obj.state is State.CONDEMNED:
                self._end(obj, Trigger.LAST_RELEASE)
                continue
            idle.append(obj.number)
            self._idle_bytes += obj.num_bytes
            if obj.ephemeral:
                ephemeral.append(obj)
        if idle:
            self._policy.idle(idle)
        for obj in ephemeral:
            self._end(obj, Trigger.REMOVE)

    def _end(self, obj: StoredObject, trigger: Trigger) -> None:
        """Free the bytes of an object or reservation that nobody holds any more."""
        before = obj.state
        self._move(obj, trigger)
        if before is State.COMMITTED:
            self._policy.discard(obj.number)
            self._idle_bytes -= obj.num_bytes
            self._note(obj, added=False)
            del self._by_key[obj.key]
        elif before is State.CONDEMNED:
            self._policy.discard(obj.number)
        else:
            if before is State.RESERVED:
                self._forget_writer(obj)
                obj.batch.num_open -= 1
            self._forget_reservation(obj)
        del self._by_number[obj.number]
        self._allocator.free(obj.location.offset)

    def _forget_writer(self, obj: StoredObject) -> None:
        left = self._num_writers.pop(obj.key) - 1
        if left:
            self._num_writers[obj.key] = left

    def _move(self, obj: StoredObject, trigger: Trigger) -> None:
        after = advance(obj.state, trigger)
        if after is None:
            raise AssertionError(f"object {obj.number}: {trigger.name} is illegal in {obj.state.name}")
        obj.state = after

    def _forget_reservation(self, obj: StoredObject) -> None:
        if obj.writer in self._clients:
            self._clients[obj.writer].reservations.pop(obj.number, None)
        obj.writer = None

    def _note(self, obj: StoredObject, *, added: bool) -> None:
        """Remember a change for the next report; a change and its opposite cancel out."""
        if not obj.ephemeral and self._delta.pop(obj.key, None) is None:
            self._delta[obj.key] = added

    def _claims(self, client: int) -> _Claims:
        claims = self._clients.get(client)
        if claims is None:
            claims = self._clients[client] = _Claims()
        return claims

    def _reservation(self, client: int, number: int) -> StoredObject | None:
        obj = self._by_number.get(number)
        return obj if obj is not None and obj.writer == client else None

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """Raises AssertionError if a law is broken. O(objects)."""
        self._allocator.check_integrity()
        objects = self._by_number
        extents = {o.location.offset: o.num_bytes for o in objects.values()}
        _require(len(extents) == len(objects) and extents == self._allocator.extents(), "index and allocator disagree")
        committed = [o for o in objects.values() if o.state is State.COMMITTED]
        _require(len({o.key for o in committed}) == len(committed), "a key is committed twice")
        _require(self._by_key == {o.key: o for o in committed}, "key index disagrees")
        live = Counter(o.key for o in objects.values() if o.state is State.RESERVED)
        _require(self._num_writers == live, "a key's writers are miscounted")
        reserved = {(c, n) for c, claims in self._clients.items() for n in claims.reservations}
        writers = {(o.writer, o.number) for o in objects.values() if o.state in (State.RESERVED, State.FENCED)}
        _require(reserved == writers, "a reservation has no owner, or an owner no reservation")
        waiting = Counter(o.batch for o in objects.values() if o.state is State.RESERVED)
        _require(waiting == {batch: batch.num_open for batch in self._batches if batch.num_open}, "expiry disagrees")
        refs = dict.fromkeys(objects, 0)
        for claims in self._clients.values():
            for number, count in (*claims.leases.items(), *((n, 1) for n in claims.aliases.values())):
                _require(number in refs and count > 0, f"lease of {number}, which is not there")
                refs[number] += count
        _require(refs == {n: o.refs for n, o in objects.items()}, "leases do not add up to reference counts")
        _require(all(o.refs for o in objects.values() if o.state is State.CONDEMNED), "a condemned object nobody holds")
        idle = [extents[o.location.offset] for o in committed if not o.refs]
        _require(sum(idle) == self._idle_bytes, "evictable bytes do not add up")
        _require((self._policy.victim() is None) == (not idle), "the policy has no victim, or one it should not have")


def _answer_for_known(event: Reserve, at: int, obj: StoredObject) -> Put:
    if event.mode is PutMode.STRICT and obj.checksum != event.checksums[at]:
        return _CONFLICT
    return Put(PutStatus.EXISTS, obj.location if event.lease_existing else None)


def _reply(event: Request, results: Results) -> list[Command]:
    return [Reply(event.client, event.request_id, results)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"store: {message}")
