"""The SSD tier of a store: which objects are copied to it and back, and which of its copies make room for others.

    memory   idle ── taken, coldest first ──▶ written ──▶ ready: the next to be evicted, or leased again
                                                 │
    SSD                                       a copy ──── evicted for other copies, or dropped by a failed read
                                                 │
    memory                                    leased: read into new space, and now in both tiers

Written behind: as long as less than `ready_bytes` could be had at once, the coldest idle objects are written, so that those who
want room need not wait for the disk. What is written stays where it is and can be leased all the while. An object that has a
copy already is not written again. One whose write failed, or for which SSD has no room, is evicted unsaved when its time comes.

A job is one command to the shell and its answer. Both of its ranges belong to it until then: it leases what it reads, and what
it writes is RESERVED or LOADING.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.store.allocator import Allocator, BytesAllocator
from mooncake.store.events import ReadSsd, SsdRead, SsdWritten, WriteSsd
from mooncake.store.eviction import POLICIES
from mooncake.store.lifecycle import State, Trigger
from mooncake.store.objects import Objects, pick

READY_SHARE = 4
"""By default a quarter of the memory is kept ready, which is no loss to readers. Writers reserve in bursts: with an eighth,
three times as much was evicted unsaved in a replay, for 6 to 16 % fewer writes."""
WRITES_MAX = 2
"""Writes under way: one on the disk and one to follow it, so that a read never waits for more."""


class SsdConfig(msgspec.Struct, frozen=True):
    """capacity_bytes: 0, there is no SSD tier. ready_bytes: None, a quarter of the memory."""

    capacity_bytes: int = 0
    alignment: int = 4096
    policy: str = "lru"
    ready_bytes: int | None = None
    job_bytes: int = 256 << 20
    """A disk is at its best rate far below; a lease that waits too long has what the jobs done by then have read."""
    room_wait_ns: int = 100 * NANOS_PER_MS
    """How long a call waits until enough is written. Then it evicts what is not saved: a slow disk must not hold prefill up."""
    load_wait_ns: int = 4 * NANOS_PER_S
    """How long a lease waits until its objects are read: less than a client's own deadline for the call."""


class _Job:
    """rows: of memory; copies: rows of SSD."""

    __slots__ = ("copies", "keys", "rows")

    def __init__(self, keys: Sequence[bytes], rows: Sequence[int], copies: Sequence[int]) -> None:
        self.keys = keys
        self.rows = rows
        self.copies = copies


class SsdTier:
    """memory: the objects of the tier above. loading: their rows by key, of what is being read."""

    def __init__(
        self, config: SsdConfig, memory: Objects, memory_bytes: int, allocator: BytesAllocator | None = None
    ) -> None:
        self.config = config
        self.loading: dict[bytes, int] = {}
        self._allocator = allocator or Allocator(config.capacity_bytes, config.alignment)
        self.copies = Objects(self._allocator, POLICIES[config.policy]())
        self._memory = memory
        memory.saved = self.copies.by_key
        self._ready_bytes = memory_bytes // READY_SHARE if config.ready_bytes is None else config.ready_bytes
        self._batch_bytes = min(config.job_bytes, max(1, self._ready_bytes // 4))
        """Less is not written unless somebody waits for it."""
        self._writes: dict[int, _Job] = {}
        self._reads: dict[int, _Job] = {}
        self._writing: dict[bytes, int] = {}
        """Rows of copies by key, of what is being written and was not removed."""
        self._writing_bytes = 0
        """Extents in memory of what is being written."""
        self._last_job = 0
        self._counters = dict.fromkeys(("ssd_writes", "ssd_write_errors", "ssd_reads", "ssd_read_errors"), 0)

    def has(self, key: bytes) -> bool:
        """Whether it can be read from SSD now."""
        return key in self.copies.by_key

    def sizes(self, keys: Sequence[bytes]) -> Sequence[int]:
        """Of objects that it has."""
        return [self.copies.sizes[self.copies.by_key[key]] for key in keys]

    def use(self, keys: Sequence[bytes]) -> None:
        """Somebody wants these, who cannot have them yet: others are to be evicted before them. The first is the warmest."""
        rows = [self.copies.by_key[key] for key in keys]
        self.copies.hold(rows)
        self.copies.unhold(rows)

    def differs(self, key: bytes, checksum: int) -> bool:
        """Whether it has that object with other contents, or such that cannot be compared."""
        row = self.copies.by_key.get(key)
        return row is not None and self.copies.checksums.get(row) != checksum

    def remove(self, key: bytes) -> bool:
        """Whether there was a copy. One that is being read or written goes when that is done."""
        copies = self.copies
        writing = self._writing.pop(key, None)
        if writing is not None:
            copies.move(writing, Trigger.EXPIRE)
        row = copies.by_key.get(key)
        if row is not None:
            copies.remove(row)
        return row is not None

    def metrics(self) -> dict[str, int]:
        copies = self.copies
        return self._counters | {
            "lost_evictions": self._memory.num_lost,
            "ready_bytes": self._memory.ready_bytes,
            "ssd_evictions": copies.num_evictions,
            "ssd_evicted_bytes": copies.evicted_bytes,
            "ssd_capacity_bytes": self._allocator.capacity,
            "ssd_used_bytes": self._allocator.capacity - self._allocator.free_bytes,
            "ssd_evictable_bytes": copies.idle_bytes,
            "ssd_objects": len(copies.by_key),
            "ssd_jobs": len(self._writes) + len(self._reads),
        }

    # ------------------------------------------------------------ writes

    @property
    def can_save(self) -> bool:
        """Whether more room will be ready, as far as one can see: something is being written, or could be."""
        return bool(self._writes) or self._memory.idle_bytes > self._memory.ready_bytes

    def save(self, wanted_bytes: int) -> list[WriteSsd]:
        """Write ahead. wanted_bytes: what calls wait for, beside what should be ready always."""
        memory, commands = self._memory, []
        least = 1 if wanted_bytes else self._batch_bytes
        while len(self._writes) < WRITES_MAX:
            missing = self._ready_bytes + wanted_bytes - memory.spare_bytes - self._writing_bytes
            rows = memory.take(min(missing, self.config.job_bytes)) if missing >= least else []
            if not rows:
                break
            commands += self._write(rows)
        return commands

    def _write(self, rows: Sequence[int]) -> list[WriteSsd]:
        memory, copies, saved = self._memory, self.copies, self.copies.by_key
        old = [row for row in rows if memory.keys[row] in saved]
        if old:  # as new on SSD as what is written now
            memory.settle(old)
            self.use([memory.keys[row] for row in reversed(old)])
        new = [row for row in rows if memory.keys[row] not in saved]
        if not new:
            return []
        keys: Sequence[bytes] = pick(memory.keys, new)
        made = copies.create(keys, pick(memory.sizes, new), all_or_nothing=False)
        assert made is not None
        _, written, refused = made
        if refused:
            memory.settle([new[at] for at in refused])
            lost = dict.fromkeys(refused)
            new = [row for at, row in enumerate(new) if at not in lost]
            keys = [memory.keys[row] for row in new]
        if not new:
            return []
        for row, copy in zip(new, written, strict=True):
            if row in memory.checksums:
                copies.checksums[copy] = memory.checksums[row]
        self._writing.update(zip(keys, written, strict=True))
        self._writing_bytes += sum(pick(memory.extents, new))
        number = self._start(self._writes, keys, new, written)
        return [WriteSsd(number, *self._columns(keys, new, written))]

    def written(self, event: SsdWritten) -> None:
        job = self._writes.pop(event.job, None)
        if job is None:
            return
        memory, copies = self._memory, self.copies
        failed = dict.fromkeys(event.failed)
        good: list[int] = []
        for at, (key, copy) in enumerate(zip(job.keys, job.copies, strict=True)):
            if copies.states[copy] is not State.FENCED:
                del self._writing[key]
            if at in failed or copies.states[copy] is State.FENCED:
                copies.end(copy, Trigger.CANCEL)
            else:
                good.append(copy)
        self._counters["ssd_writes"] += len(good)
        self._counters["ssd_write_errors"] += len(failed)
        self._writing_bytes -= sum(pick(memory.extents, job.rows))
        memory.settle(job.rows)
        if good:
            copies.publish(good, pick(copies.keys, good))
            copies.unhold(good[::-1])  # the first was the coldest

    # ------------------------------------------------------------ reads

    def load(self, keys: Sequence[bytes]) -> list[ReadSsd]:
        """Start to read objects that are only on SSD, as many as memory has room for; `loading` says which."""
        memory, copies = self._memory, self.copies
        sources = [copies.by_key[key] for key in keys]
        made = memory.create(keys, pick(copies.sizes, sources), all_or_nothing=False)
        assert made is not None
        _, rows, refused = made
        lost = dict.fromkeys(refused)
        keys = [key for at, key in enumerate(keys) if at not in lost]
        sources = [copy for at, copy in enumerate(sources) if at not in lost]
        if not rows:
            return []
        copies.hold(sources)
        memory.start_load(rows)
        self.loading.update(zip(keys, rows, strict=True))
        for row, copy in zip(rows, sources, strict=True):
            if copy in copies.checksums:
                memory.checksums[row] = copies.checksums[copy]
        commands = []
        for part in self._parts(sources):
            number = self._start(self._reads, keys[part], rows[part], sources[part])
            commands.append(ReadSsd(number, *self._columns(keys[part], rows[part], sources[part])))
        return commands

    def _parts(self, copies: Sequence[int]) -> list[slice]:
        """One after the other, each as large as a job should be."""
        parts: list[slice] = []
        first, num_bytes = 0, 0
        for at, copy in enumerate(copies):
            num_bytes += self.copies.extents[copy]
            if num_bytes >= self.config.job_bytes:
                parts.append(slice(first, at + 1))
                first, num_bytes = at + 1, 0
        if first < len(copies):
            parts.append(slice(first, len(copies)))
        return parts

    def read(self, event: SsdRead, resolve: Callable[[int, int | None], None]) -> None:
        """resolve(row, found): told of each row that waited for its bytes, and of the row that has them: itself, that of a
        writer who was first, or None. Whoever leases the row leases the other now, or nothing."""
        job = self._reads.pop(event.job, None)
        if job is None:
            return
        memory, copies = self._memory, self.copies
        failed = dict.fromkeys(event.failed)
        for at, (key, row, copy) in enumerate(zip(job.keys, job.rows, job.copies, strict=True)):
            del self.loading[key]
            is_there = at not in failed and copies.states[copy] is State.COMMITTED
            if is_there and key not in memory.by_key:
                memory.finish_load(row)
            resolve(row, memory.by_key.get(key) if is_there else None)
            if at in failed and copies.states[copy] is State.COMMITTED:
                copies.remove(copy)
        self._counters["ssd_reads"] += len(job.rows) - len(failed)
        self._counters["ssd_read_errors"] += len(failed)
        copies.unhold(job.copies)
        memory.unhold([row for row in job.rows if memory.states[row] is State.COMMITTED])
        for row in job.rows:
            if memory.states[row] is State.LOADING:
                memory.refs[row] -= 1
                memory.end(row, Trigger.LOAD_FAILED)

    # ------------------------------------------------------------ jobs

    def _start(self, jobs: dict[int, _Job], keys: Sequence[bytes], rows: Sequence[int], copies: Sequence[int]) -> int:
        self._last_job += 1
        jobs[self._last_job] = _Job(keys, rows, copies)
        return self._last_job

    def _columns(
        self, keys: Sequence[bytes], rows: Sequence[int], copies: Sequence[int]
    ) -> tuple[tuple[bytes, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int | None, ...]]:
        memory = self._memory
        checksums = tuple([memory.checksums.get(row) for row in rows])
        offsets, ssd_offsets = pick(memory.offsets, rows), pick(self.copies.offsets, copies)
        return tuple(keys), pick(memory.sizes, rows), offsets, ssd_offsets, checksums

    # ------------------------------------------------------------ conservation

    def held_rows(self) -> Counter[int]:
        """Leases of objects in memory that are jobs'."""
        return Counter([row for job in (*self._writes.values(), *self._reads.values()) for row in job.rows])

    def check_integrity(self) -> None:
        memory, copies = self._memory, self.copies
        copies.check_integrity()
        states = copies.states
        read = Counter([copy for job in self._reads.values() for copy in job.copies])
        _require(read == {row: count for row, count in enumerate(copies.refs) if count}, "reads do not add up")
        written = sorted([copy for job in self._writes.values() for copy in job.copies])
        open_rows = [row for row in copies.used_rows() if states[row] in (State.RESERVED, State.FENCED)]
        _require(written == open_rows, "a write has no job, or a job no write")
        reserved = {copies.keys[row]: row for row in open_rows if states[row] is State.RESERVED}
        _require(self._writing == reserved, "index of writes disagrees")
        loading = {memory.keys[row]: row for row in memory.used_rows() if memory.states[row] is State.LOADING}
        _require(self.loading == loading, "index of loads disagrees")
        _require(sorted(loading.values()) == sorted([row for job in self._reads.values() for row in job.rows]), "loads")
        extents = [memory.extents[row] for job in self._writes.values() for row in job.rows]
        _require(sum(extents) == self._writing_bytes, "bytes being written do not add up")
        _require(len(self._writes) <= WRITES_MAX, "too many writes are under way")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"store: {message}")
