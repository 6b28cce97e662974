"""The objects of a node as columns: `keys[row]`, `offsets[row]` and so on belong to one reservation or object.

A Python object per block, written a dozen times in its life, costs more than all there is to decide about it. So what is
done, is done for a batch, in as few steps as the life cycle allows; the states that they write are those of its table. A row
is given to another object when its own is gone; a number, which is what clients know it by, never.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from mooncake.store.allocator import BytesAllocator
from mooncake.store.eviction import EvictionPolicy
from mooncake.store.lifecycle import TABLE, State, Trigger, advance
from mooncake.store.quotas import Quotas, Tenant
from mooncake.store.readers import NoReaders, Readers
from mooncake.store.reports import Changes
from mooncake.store.types import Places

_RESERVED = TABLE[State.FREE, Trigger.RESERVE]
_COMMITTED = TABLE[State.RESERVED, Trigger.COMMIT]
_CONDEMNED = TABLE[State.COMMITTED, Trigger.CONDEMN]
_EVICTED = TABLE[State.COMMITTED, Trigger.EVICT]
_RECYCLED = TABLE[_EVICTED, Trigger.RESERVE]


class Objects:
    """Of one tier. Columns by row: keys; numbers; offsets in the segment; sizes in bytes; extents, the bytes taken of the
    segment; refs, how often it is leased; states; before, the key of the block before it in its chain, b"" if there is none or
    nobody knows.

    by_key: rows of committed objects. transient: rows that end with their last lease, being ephemeral or removed; the
    directory does not hear of them. checksums: of those that have one. changes: for the directory. idle_bytes: extents of
    committed objects that nobody leases: what eviction could free.

    Before objects are evicted from a tier with another one below it, they are saved there, coldest first: `take` leases the
    policy's next candidates for that, `settle` makes them *ready*, which are evicted before all others, and of which
    ready_bytes are idle_bytes too. saved: keys in the tier below, if there is one.

    last_number: they are numbered from the next on. quotas: whose they are, of tenants that have a quota.

    Before space is given away, the readers that did not ask for a lease are asked whether they have it. What they have
    *lingers*: it is held like by a lease until they do not."""

    def __init__(
        self,
        allocator: BytesAllocator,
        policy: EvictionPolicy,
        readers: Readers | None = None,
        last_number: int = 0,
        quotas: Quotas | None = None,
    ) -> None:
        self.keys: list[bytes] = []
        self.numbers: list[int] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.extents: list[int] = []
        self.refs: list[int] = []
        self.states: list[State] = []
        self.before: list[bytes] = []
        self.by_key: dict[bytes, int] = {}
        self.transient: dict[int, None] = {}
        self.checksums: dict[int, int] = {}
        self.changes = Changes()
        self.idle_bytes = 0
        self.num_evictions = 0
        self.num_lost = 0
        """Evictions for room, not for a quota, of objects that were not in the tier below."""
        self.evicted_bytes = 0
        self.saved: Container[bytes] | None = None
        self.ready: OrderedDict[int, None] = OrderedDict()
        self.ready_bytes = 0
        self._leaving: dict[int, None] = {}
        """Taken, not settled. The policy knows neither these nor those that are ready."""
        self.lingering: dict[int, None] = {}
        self._allocator = allocator
        self._policy = policy
        self._readers = NoReaders() if readers is None else readers
        self.quotas = Quotas({}) if quotas is None else quotas
        self.quotas.extents = self.extents
        self._owned = self.quotas.owners
        self._free: list[int] = []
        self._last_number = last_number

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        return list(map(self.by_key.get, keys))

    def find_all(self, keys: Sequence[bytes]) -> Sequence[int] | None:
        """None if one of them is not there."""
        try:
            rows: Sequence[int] = pick(self.by_key, keys)
        except KeyError:
            return None
        return rows

    def places(self, rows: Sequence[int]) -> Places:
        """Not empty."""
        checksums = tuple(map(self.checksums.get, rows)) if self.checksums else ()
        return Places(pick(self.offsets, rows), pick(self.sizes, rows), pick(self.numbers, rows), checksums)

    # ------------------------------------------------------------ leases

    def hold(self, rows: Sequence[int]) -> None:
        """One lease of each, as often as it is named."""
        refs = self.refs
        woken: list[int] = []
        for row in rows:
            if refs[row]:
                refs[row] += 1
            else:
                refs[row] = 1
                woken.append(row)
        if woken:
            self.idle_bytes -= sum(pick(self.extents, woken))
            self._policy.hold(self._recall(woken) if self.ready else woken)
            if self._owned:
                self.quotas.hold(woken)

    def unhold(self, rows: Sequence[int]) -> None:
        """The opposite of hold, in chain order. What nobody holds can be evicted, or ends if it was waiting to."""
        refs = self.refs
        released: list[int] = []
        for row in rows:
            left = refs[row] = refs[row] - 1
            if not left:
                released.append(row)
        idle = self._lasting(released) if self.transient else released
        if len(idle) < len(released):
            self._end_transient(released)
        if idle:
            self._policy.idle(idle)
            self.idle_bytes += sum(pick(self.extents, idle))
            if self._owned:
                self.quotas.idle(idle)

    def _lasting(self, rows: Sequence[int]) -> Sequence[int]:
        """Those that are not transient. It is the last one if any."""
        transient = self.transient
        if transient.keys().isdisjoint(rows):
            return rows
        if transient.keys().isdisjoint(rows[:-1]):
            return rows[:-1]
        return [row for row in rows if row not in transient]

    def _end_transient(self, rows: Sequence[int]) -> None:
        for row in [row for row in rows if row in self.transient]:
            self._end_committed(row, Trigger.LAST_RELEASE if self.states[row] is _CONDEMNED else Trigger.REMOVE)

    # ------------------------------------------------------------ to and from the tier below

    @property
    def spare_bytes(self) -> int:
        """What can be had at once, and costs nothing that is not saved."""
        return self._allocator.free_bytes + self.ready_bytes

    def rounded(self, sizes: Sequence[int]) -> int:
        """Bytes that objects of these sizes take."""
        return sum([self._allocator.rounded(size) for size in sizes])

    def take(self, num_bytes: int) -> list[int]:
        """Lease the next candidates, no more than make up so many bytes. It is no use of them."""
        rows = self._policy.take(num_bytes, self.extents)
        for row in rows:
            self.refs[row] = 1
        self._leaving.update(dict.fromkeys(rows))
        self.idle_bytes -= sum([self.extents[row] for row in rows])
        self.quotas.hold(rows)
        return rows

    def settle(self, rows: Sequence[int]) -> None:
        """Give back leases that `take` made; what nobody else holds goes next."""
        rest: list[int] = []
        for row in rows:
            if row not in self._leaving:  # removed meanwhile
                rest.append(row)
                continue
            del self._leaving[row]
            self.refs[row] -= 1
            if self.refs[row]:
                self._enter((row,), (self.keys[row],))
            else:
                self.ready[row] = None
                self.ready_bytes += self.extents[row]
                self.idle_bytes += self.extents[row]
                self.quotas.idle_again(row)
        self.unhold(rest)

    def _recall(self, rows: Sequence[int]) -> list[int]:
        """Those that are ready are the policy's again, as new and leased ones; the others are given back."""
        others: list[int] = []
        for row in rows:
            if row in self.ready:
                self._unready(row)
                self._enter((row,), (self.keys[row],))
            else:
                others.append(row)
        return others

    def _unready(self, row: int) -> None:
        del self.ready[row]
        self.ready_bytes -= self.extents[row]

    def _take_ready(self, num_bytes: int) -> list[int]:
        """As the policies' `take`."""
        rows: list[int] = []
        while num_bytes > 0 and self.ready:
            row = next(iter(self.ready))
            self._unready(row)
            rows.append(row)
            num_bytes -= self.extents[row]
        return rows

    def start_load(self, rows: Sequence[int]) -> None:
        """RESERVED to LOADING, leased once by the load."""
        for row in rows:
            self.move(row, Trigger.LOAD)
            self.refs[row] = 1
            self.before[row] = b""

    def finish_load(self, row: int) -> None:
        """LOADING to COMMITTED, leased as before."""
        key = self.keys[row]
        self.move(row, Trigger.LOADED)
        self.by_key[key] = row
        self._enter((row,), (key,))
        self._readers.publish(self, (row,))
        self.changes.gained.append((key,))

    # ------------------------------------------------------------ life

    def publish(self, rows: Sequence[int], keys: Sequence[bytes]) -> None:
        """RESERVED to COMMITTED, held once by whoever commits them."""
        by_key, refs, states = self.by_key, self.refs, self.states
        for row, key in zip(rows, keys, strict=True):
            by_key[key] = row
            states[row] = _COMMITTED
            refs[row] = 1
        self._readers.publish(self, rows)
        if self.transient:
            lasting = self._lasting(rows)
            if len(lasting) < len(rows):
                rows, keys = lasting, [self.keys[row] for row in lasting]
        if rows:
            self._enter(rows, keys)
            self.changes.gained.append(keys)

    def _enter(self, rows: Sequence[int], keys: Sequence[bytes]) -> None:
        """The policy hears of committed objects."""
        parents = list(map(self.by_key.get, pick(self.before, rows)))
        self._policy.add(rows, keys, self.extents, parents)

    def move(self, row: int, trigger: Trigger) -> None:
        before = self.states[row]
        after = advance(before, trigger)
        if after is None:
            raise AssertionError(f"object {self.numbers[row]}: {trigger.name} is illegal in {before.name}")
        self.states[row] = after

    def remove(self, row: int) -> None:
        """COMMITTED: nobody finds it any more; it is gone when nobody holds it."""
        if row in self._leaving:
            del self._leaving[row]
            self._enter((row,), (self.keys[row],))
        elif row not in self.transient and not self.refs[row]:
            self._policy.hold(self._recall((row,)))
            self.idle_bytes -= self.extents[row]
        if self.refs[row]:
            self._condemn(row)
            self._readers.withdraw(self, (row,))
        else:
            self._end_committed(row, Trigger.REMOVE)

    def _condemn(self, row: int) -> None:
        self.move(row, Trigger.CONDEMN)
        self._hide(row)
        self.transient[row] = None

    def _end_committed(self, row: int, trigger: Trigger) -> None:
        """COMMITTED or CONDEMNED, and leased by nobody: it is gone, unless it lingers."""
        is_read = bool(self._readers.withdraw(self, (row,)))
        if is_read:
            if self.states[row] is State.COMMITTED:
                self._condemn(row)
            self.refs[row] = 1
            self.lingering[row] = None
            self.quotas.hold((row,))
            return
        if self.states[row] is State.COMMITTED:
            self._hide(row)
        self.end(row, trigger)

    def end(self, row: int, trigger: Trigger) -> None:
        """Free the bytes of a reservation, or of an object that nobody finds or holds any more."""
        self.move(row, trigger)
        self.transient.pop(row, None)
        self.checksums.pop(row, None)
        if self._owned:
            self.quotas.release((row,))
        self._allocator.free(self.extents[row], (self.offsets[row],))
        self._free.append(row)

    def _hide(self, row: int) -> None:
        """It is no candidate."""
        key = self.keys[row]
        del self.by_key[key]
        if row not in self.transient:
            self._policy.discard((row,))
            self.changes.lost.append((key,))

    def restore(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        offsets: Sequence[int],
        numbers: Sequence[int],
        checksums: Sequence[int | None],
        owners: Sequence[int],
    ) -> None:
        """Objects of a life before, at the beginning of this one; those that come first are evicted first. Raises ValueError if
        two are in one place."""
        rounded = self._allocator.rounded
        self._allocator.occupy({offset: rounded(size) for offset, size in zip(offsets, sizes, strict=True)})
        self._add_rows(len(keys))
        rows = [self._free.pop() for _ in keys]
        for row, key, size, offset, number in zip(rows, keys, sizes, offsets, numbers, strict=True):
            self.keys[row] = key
            self.numbers[row] = number
            self.offsets[row] = offset
            self.sizes[row] = size
            self.extents[row] = rounded(size)
            self.states[row] = _RESERVED
        self.checksums.update(
            {row: checksum for row, checksum in zip(rows, checksums, strict=True) if checksum is not None}
        )
        if owners:
            self.quotas.charge_adopted(rows, owners)
        self._last_number = max(self._last_number, *numbers)
        self.publish(rows, keys)
        self.unhold(rows[::-1])

    # ------------------------------------------------------------ room

    def create(
        self, keys: Sequence[bytes], sizes: Sequence[int], *, all_or_nothing: bool
    ) -> tuple[tuple[int, ...], list[int], list[int]] | None:
        """Reserve space, evicting as little as it takes: numbers, rows, and indices of those that found no room. None if all or
        nothing is wanted and it is not all."""
        allocator, first = self._allocator, self._last_number + 1
        numbers = tuple(range(first, first + len(keys)))
        runs = [(size, allocator.rounded(size), count) for size, count in _runs(sizes)]
        if all_or_nothing:
            wanted = sum([extent * count for _, extent, count in runs])
            if wanted > allocator.free_bytes + self.idle_bytes:
                self.settle_readers()
            if wanted > allocator.free_bytes + self.idle_bytes:
                return None
        rows: list[int] = []
        refused: list[int] = []
        at = 0
        for size, extent, count in runs:
            made = self._create_equal(keys[at : at + count], size, extent, numbers[len(rows) : len(rows) + count])
            rows += made
            refused += range(at + len(made), at + count)
            at += count
        self._last_number += len(rows)
        if refused and all_or_nothing:  # there is room, but in pieces
            for row in rows:
                self.end(row, Trigger.CANCEL)
            return None
        return numbers[: len(rows)], rows, refused

    def _create_equal(self, keys: Sequence[bytes], size: int, extent: int, numbers: Sequence[int]) -> list[int]:
        """Rows of as many as find room. A full store evicts as many objects of that extent, and each new one gets the place of
        an old one; otherwise space goes through the allocator."""
        allocator, count = self._allocator, len(keys)
        rows: list[int] = []
        while True:
            if allocator.free_bytes >= extent:
                offsets = allocator.allocate(extent, count - len(rows))
                rows += self._fill(offsets, keys[len(rows) :], size, extent, numbers[len(rows) :])
            num_more = min(count - len(rows), (allocator.free_bytes + self.idle_bytes) // extent)
            if not num_more:
                if len(rows) < count and self.settle_readers():
                    continue
                return rows
            wanted = max(1, num_more * extent - allocator.free_bytes)
            victims = self._take_ready(wanted) if self.ready else self._policy.take(wanted, self.extents)
            if not victims:
                return rows
            read = self._readers.withdraw(self, victims)
            if read:
                victims = self._linger(victims, read)
                if not victims:
                    continue
            extents = pick(self.extents, victims)
            if extents.count(extent) == len(victims):
                self._recycle(victims, keys[len(rows) :], size, numbers[len(rows) :])
                rows += victims
            else:
                self._evict(victims, extents)

    def _fill(
        self, offsets: Sequence[int], keys: Sequence[bytes], size: int, extent: int, numbers: Sequence[int]
    ) -> list[int]:
        """FREE to RESERVED: the first keys, as many as there are offsets."""
        count = len(offsets)
        if not count:
            return []
        if len(self._free) < count:
            self._add_rows(count - len(self._free))
        rows = self._free[-count:]
        del self._free[-count:]
        for row, key, number, offset in zip(rows, keys, numbers, offsets, strict=False):
            self.keys[row] = key
            self.numbers[row] = number
            self.offsets[row] = offset
            self.sizes[row] = size
            self.extents[row] = extent
            self.states[row] = _RESERVED
        return rows

    def _recycle(self, rows: Sequence[int], keys: Sequence[bytes], size: int, numbers: Sequence[int]) -> None:
        """COMMITTED to FREE and at once, for the first keys, to RESERVED, where they are."""
        by_key, key_at, number_at, size_at, state_at = self.by_key, self.keys, self.numbers, self.sizes, self.states
        old = self._note_evicted(rows, self.extents[rows[0]] * len(rows))
        for row, gone, key, number in zip(rows, old, keys, numbers, strict=False):
            del by_key[gone]
            key_at[row] = key
            number_at[row] = number
            size_at[row] = size
            state_at[row] = _RECYCLED

    def _evict(self, rows: Sequence[int], extents: Sequence[int]) -> None:
        """COMMITTED to FREE."""
        keys = self._note_evicted(rows, sum(extents))
        for row, key, extent in zip(rows, keys, extents, strict=True):
            del self.by_key[key]
            self.states[row] = _EVICTED
            self._allocator.free(extent, (self.offsets[row],))
        self._free += rows

    def _linger(self, victims: Sequence[int], read: Sequence[int]) -> list[int]:
        """The rest of the policy's victims, if these are being read; they are no candidates until `settle_readers`."""
        for row in read:
            self.refs[row] = 1
            self.lingering[row] = None
            self.idle_bytes -= self.extents[row]
            self._enter((row,), (self.keys[row],))
        self.quotas.hold(read)
        self._readers.publish(self, read)
        return [row for row in victims if row not in self.lingering]

    def settle_readers(self) -> bool:
        """What lingers no more is idle again, or gone if it was removed. Whether there was such."""
        if not self.lingering:
            return False
        rows = list(self.lingering)
        reading = dict.fromkeys(self._readers.reading(self, rows))
        done = [row for row in rows if row not in reading]
        for row in done:
            del self.lingering[row]
        self.unhold(done)
        return bool(done)

    def _note_evicted(self, rows: Sequence[int], num_bytes: int) -> Sequence[bytes]:
        """The keys of those that the policy has let go."""
        keys: Sequence[bytes] = pick(self.keys, rows)
        if self.checksums:
            for row in rows:
                self.checksums.pop(row, None)
        if self._owned:
            self.quotas.release(rows)
        self.idle_bytes -= num_bytes
        self.evicted_bytes += num_bytes
        self.num_evictions += len(rows)
        if self.saved is not None:
            self.num_lost += sum([key not in self.saved for key in keys])
        self.changes.lost.append(keys)
        return keys

    def make_room_of(self, tenant: Tenant, num_bytes: int) -> None:
        """Evict as many of the tenant's own idle objects, the oldest, as it takes to have that many bytes left of its quota."""
        while tenant.left < num_bytes and tenant.idle:
            row = next(iter(tenant.idle))
            self.num_evictions += 1
            self.evicted_bytes += self.extents[row]
            tenant.num_evictions += 1
            self.remove(row)

    def _add_rows(self, count: int) -> None:
        first = len(self.keys)
        self.keys += [b""] * count
        for column in (self.numbers, self.offsets, self.sizes, self.extents, self.refs):
            column += [0] * count
        self.states += [State.FREE] * count
        self.before += [b""] * count
        self._free += range(first + count - 1, first - 1, -1)

    # ------------------------------------------------------------ conservation

    def used_rows(self) -> list[int]:
        return [row for row, state in enumerate(self.states) if state is not State.FREE]

    def check_integrity(self) -> None:
        rows, states = self.used_rows(), self.states
        _require(
            sorted(self._free) == [row for row, state in enumerate(states) if state is State.FREE], "rows are lost"
        )
        _require(not any(self.refs[row] for row in self._free), "a free row is leased")
        extents = {self.offsets[row]: self.extents[row] for row in rows}
        _require(len(extents) == len(rows), "two objects are at one place")
        _require(all(self.sizes[row] <= self.extents[row] for row in rows), "an object is larger than its extent")
        _require(len({self.numbers[row] for row in rows}) == len(rows), "a number is given twice")
        self._allocator.check_integrity(extents)
        self.quotas.check_integrity(self.refs)
        _require(all(states[row] is not State.FREE for row in self._owned), "a free row is a tenant's")
        committed = {self.keys[row]: row for row in rows if states[row] is State.COMMITTED}
        _require(self.by_key == committed, "key index disagrees")
        condemned = [row for row in rows if states[row] is State.CONDEMNED]
        _require(all(self.refs[row] and row in self.transient for row in condemned), "a condemned object nobody holds")
        _require(all(states[row] is not State.FREE for row in self.transient), "a free row is transient")
        _require(all(states[row] is not State.FREE for row in self.checksums), "a free row has a checksum")
        loading = [row for row in rows if states[row] is State.LOADING]
        _require(all(self.refs[row] for row in loading), "a load that nobody holds")
        idle = [row for row in committed.values() if not self.refs[row]]
        _require(self.ready.keys() <= set(idle), "an object that is not idle is ready to go")
        _require(sum([self.extents[row] for row in self.ready]) == self.ready_bytes, "ready bytes do not add up")
        lingering_held = all(
            self.refs[row] and states[row] in (State.COMMITTED, State.CONDEMNED) for row in self.lingering
        )
        _require(lingering_held, "an object that lingers is not held")
        leaving_held = all(states[row] is State.COMMITTED and self.refs[row] for row in self._leaving)
        _require(leaving_held, "an object that is written is not held")
        _require(not any(row in self.transient for row in idle), "an ephemeral object nobody holds")
        _require(sum([self.extents[row] for row in idle]) == self.idle_bytes, "evictable bytes do not add up")
        _require(
            len(self._policy) + len(self.ready) == len(idle),
            "the policy has other candidates than those that nobody leases",
        )


def pick(column: Any, at: Sequence[Any]) -> Any:
    """column[i] for each i: the quickest way there is."""
    return itemgetter(*at)(column) if len(at) > 1 else tuple([column[i] for i in at])


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """Equal neighbours: value and count."""
    first, count = values[0], len(values)
    num_equal = values.count(first)
    if num_equal == count:
        return [(first, count)]
    if num_equal == count - 1 and values[-1] != first:  # full blocks and a partial one
        return [(first, num_equal), (values[-1], 1)]
    return [(value, len(list(group))) for value, group in groupby(values)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"store: {message}")
