"""The SSD tier of a store: which objects are copied to it and back, and which of its copies make room for others.

    memory   idle ── taken, coldest first ──▶ written ──▶ ready: the next to be evicted, or leased again
                                                 │
    SSD                                       a copy ──── evicted with the oldest extent, or dropped by a failed read
                                                 │
    memory                                    leased: read into new space, and now in both tiers

Written behind: as long as less than `ready_bytes` could be had at once, the coldest idle objects are written, so that
those who want room need not wait for the disk. What is written stays where it is and can be leased all the while. An
object that has a copy already is not written again, unless that one is old (`ssd_log`). One whose write failed, or for
which SSD has no room, is evicted unsaved when its time comes. After FAILURES_MAX jobs that failed whole nothing is
written for REST_NS; then one is tried.

A job is one command to the shell and its answer. Both of its ranges belong to it until then: it leases what it reads, and
what it writes is a place in the log, or LOADING.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.store.events import Command, ReadSsd, SsdRead, SsdRecovered, SsdRests, SsdWritten, WriteSsd
from mooncake.store.lifecycle import State, Trigger
from mooncake.store.objects import Objects, pick
from mooncake.store.ssd_layout import Geometry, geometry_of
from mooncake.store.ssd_log import Copy, SsdLog

READY_SHARE = 4
"""By default a quarter of the memory is kept ready, which is no loss to readers. Writers reserve in bursts: with an eighth,
three times as much was evicted unsaved in a replay, for 6 to 16 % fewer writes."""
WRITES_MAX = 2
"""Writes under way: one on the disk and one to follow it, so that a read never waits for more."""
FAILURES_MAX = 3
REST_NS = 30 * NANOS_PER_S
"""A disk that is full or broken seldom mends itself sooner, and each try makes those who want room wait."""


class SsdConfig(msgspec.Struct, frozen=True):
    """capacity_bytes: 0, there is no SSD tier. extent_bytes: None, what suits the capacity. ready_bytes: None, a quarter
    of the memory."""

    capacity_bytes: int = 0
    alignment: int = 4096
    extent_bytes: int | None = None
    ready_bytes: int | None = None
    job_bytes: int = 256 << 20
    """A disk is at its best rate far below; a lease that waits too long has what the jobs done by then have read."""
    room_wait_ns: int = 100 * NANOS_PER_MS
    """How long a call waits until enough is written. Then it evicts what is not saved: a slow disk must not hold prefill
    up."""
    load_wait_ns: int = 4 * NANOS_PER_S
    """How long a lease waits until its objects are read: less than a client's own deadline for the call."""

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self.capacity_bytes, self.extent_bytes, self.alignment)


class _Job:
    """rows: of memory, none if it only notes that keys were removed; copies: on SSD. removed: keys whose removal goes without
    saying once this is written."""

    __slots__ = ("copies", "keys", "removed", "rows")

    def __init__(self, keys: Sequence[bytes], rows: Sequence[int], copies: Sequence[Copy]) -> None:
        self.keys = keys
        self.rows = rows
        self.copies = copies
        self.removed: dict[bytes, None] = {}


class SsdTier:
    """memory: the objects of the tier above. loading: their rows by key, of what is being read."""

    def __init__(self, config: SsdConfig, memory: Objects, memory_bytes: int) -> None:
        self.config = config
        self.log = SsdLog(config.geometry)
        self.loading: dict[bytes, int] = {}
        self._memory = memory
        memory.saved = self.log.copies
        self._ready_bytes = memory_bytes // READY_SHARE if config.ready_bytes is None else config.ready_bytes
        self._batch_bytes = min(config.job_bytes, max(1, self._ready_bytes // 4))
        """Less is not written unless somebody waits for it."""
        self._writes: dict[int, _Job] = {}
        self._reads: dict[int, _Job] = {}
        self._writing: dict[bytes, int] = {}
        """Jobs by key, of what is being written and was not removed."""
        self._removed: dict[bytes, None] = {}
        """Keys whose removal is to be noted on SSD."""
        self._writing_bytes = 0
        """Extents in memory of what is being written."""
        self._last_job = 0
        self._num_failures = 0
        """Writes in a row of which nothing was good."""
        self._rests_until = 0
        names = (
            "ssd_writes",
            "ssd_write_errors",
            "ssd_reads",
            "ssd_read_errors",
            "ssd_corrupt",
            "ssd_recovered",
            "ssd_rests",
            "ssd_refused",
        )
        self._counters = dict.fromkeys(names, 0)

    def has(self, key: bytes) -> bool:
        """Whether it can be read from SSD now."""
        return key in self.log.copies

    def sizes(self, keys: Sequence[bytes]) -> Sequence[int]:
        """Of objects that it has."""
        return [self.log.copies[key].size for key in keys]

    def differs(self, key: bytes, checksum: int) -> bool:
        """Whether it has that object with other contents, or such that cannot be compared."""
        copy = self.log.copies.get(key)
        return copy is not None and copy.checksum != checksum

    def remove(self, key: bytes) -> bool:
        """Whether there was a copy. What an entry names already is noted, or it would be back after a crash."""
        was_writing = self._writing.pop(key, None) is not None
        was_there = self.log.remove(key)
        if was_writing or was_there:
            self._removed[key] = None
        return was_there

    def recover(self, event: SsdRecovered) -> None:
        self.log.restore(event)
        self._counters["ssd_recovered"] = len(event.keys)

    def metrics(self) -> dict[str, int]:
        log = self.log
        return self._counters | {
            "lost_evictions": self._memory.num_lost,
            "ready_bytes": self._memory.ready_bytes,
            "ssd_evictions": log.num_evictions,
            "ssd_evicted_bytes": log.evicted_bytes,
            "ssd_capacity_bytes": log.geometry.capacity_bytes,
            "ssd_used_bytes": log.used_bytes,
            "ssd_evictable_bytes": log.idle_bytes,
            "ssd_objects": len(log.copies),
            "ssd_jobs": len(self._writes) + len(self._reads),
        }

    # ------------------------------------------------------------ writes

    def can_save(self, now: int) -> bool:
        """Whether more room will be ready, as far as one can see: something is being written, or could be."""
        if self._writes:
            return True
        return now >= self._rests_until and self._memory.idle_bytes > self._memory.ready_bytes

    def save(self, wanted_bytes: int, now: int) -> list[WriteSsd]:
        """Write ahead. wanted_bytes: what calls wait for, beside what should be ready always."""
        memory, commands = self._memory, []
        least = 1 if wanted_bytes else self._batch_bytes
        num_jobs_max = 1 if self._num_failures else WRITES_MAX
        if now < self._rests_until:
            return []
        if self._removed and len(self._writes) < num_jobs_max:
            commands += self._note_removed(now)
        while len(self._writes) < num_jobs_max:
            missing = self._ready_bytes + wanted_bytes - memory.spare_bytes - self._writing_bytes
            rows = memory.take(min(missing, self.config.job_bytes)) if missing >= least else []
            if not rows:
                break
            commands += self._write(rows, now)
        return commands

    def _write(self, rows: Sequence[int], now: int) -> list[WriteSsd]:
        memory, log = self._memory, self.log
        new = [row for row in rows if self._is_worth_writing(row)]
        copies, runs = log.place([memory.sizes[row] for row in new], now)
        new = new[: len(copies)]
        written = dict.fromkeys(new)
        self._counters["ssd_refused"] += sum(
            [row not in written and memory.keys[row] not in log.copies for row in rows]
        )
        memory.settle([row for row in rows if row not in written])
        if not new:
            return []
        for row, copy in zip(new, copies, strict=True):
            copy.checksum = memory.checksums.get(row)
        keys = pick(memory.keys, new)
        number = self._start(self._writes, keys, new, copies)
        self._take_removed(number)
        self._writing.update(dict.fromkeys(keys, number))
        self._writing_bytes += sum(pick(memory.extents, new))
        return [WriteSsd(number, *self._columns(keys, new, copies), tuple(runs))]

    def _note_removed(self, now: int) -> list[WriteSsd]:
        keys = tuple(self._removed)
        notes, runs = self.log.place([0] * len(keys), now)
        if not notes:
            return []
        keys, nothing = keys[: len(notes)], (0,) * len(notes)
        number = self._start(self._writes, keys, (), notes)
        self._take_removed(number)
        offsets = tuple([note.offset for note in notes])
        return [WriteSsd(number, keys, nothing, nothing, offsets, (None,) * len(keys), tuple(runs))]

    def _take_removed(self, number: int) -> None:
        """What that write makes known: notes of removals, and newer copies."""
        job = self._writes[number]
        job.removed = dict.fromkeys([key for key in job.keys if key in self._removed])
        for key in job.removed:
            del self._removed[key]

    def _is_worth_writing(self, row: int) -> bool:
        log, key = self.log, self._memory.keys[row]
        return log.fits(self._memory.sizes[row]) and (key not in log.copies or log.is_old(key))

    def written(self, event: SsdWritten, now: int) -> list[Command]:
        job = self._writes.pop(event.job, None)
        if job is None:
            return []
        memory, log = self._memory, self.log
        bad = dict.fromkeys((*event.failed, *event.corrupt))
        for at, (key, copy) in enumerate(zip(job.keys, job.copies, strict=True)):
            is_wanted = self._writing.get(key) == event.job
            if is_wanted:
                del self._writing[key]
            if at in bad or not is_wanted:
                log.discard(copy)
                if at in bad and key in job.removed and not self._is_newer(key):
                    self._removed[key] = None
                continue
            if event.checksums:
                copy.checksum = event.checksums[at]
            log.commit(key, copy)
            self._counters["ssd_writes"] += 1
        log.release(job.copies)
        self._writing_bytes -= sum([memory.extents[row] for row in job.rows])
        self._counters["ssd_write_errors"] += len(event.failed) if job.rows else 0
        self._drop_corrupt([job.rows[at] for at in event.corrupt])
        memory.settle(job.rows)
        return self._judge_disk(len(event.failed) == len(job.keys), now)

    def _is_newer(self, key: bytes) -> bool:
        """Whether that key was written since it was removed, or is being written."""
        return key in self.log.copies or key in self._writing

    def _drop_corrupt(self, rows: Sequence[int]) -> None:
        """Their contents in memory are not what was committed. Who has leased one keeps it; nobody finds it any more."""
        self._counters["ssd_corrupt"] += len(rows)
        for row in rows:
            if self._memory.states[row] is State.COMMITTED:
                self._memory.remove(row)

    def _judge_disk(self, failed: bool, now: int) -> list[Command]:
        """Whether nothing of a write was good."""
        self._num_failures = self._num_failures + 1 if failed else 0
        if self._num_failures < FAILURES_MAX:
            return []
        self._rests_until = now + REST_NS
        self._counters["ssd_rests"] += 1
        return [SsdRests(self._num_failures, REST_NS)]

    # ------------------------------------------------------------ reads

    def load(self, keys: Sequence[bytes]) -> list[ReadSsd]:
        """Start to read objects that are only on SSD, as many as memory has room for; `loading` says which."""
        memory, log = self._memory, self.log
        made = memory.create(keys, self.sizes(keys), all_or_nothing=False)
        assert made is not None
        _, rows, refused = made
        lost = dict.fromkeys(refused)
        keys = [key for at, key in enumerate(keys) if at not in lost]
        if not rows:
            return []
        sources = [log.copies[key] for key in keys]
        log.hold(sources)
        memory.start_load(rows)
        self.loading.update(zip(keys, rows, strict=True))
        for row, copy in zip(rows, sources, strict=True):
            if copy.checksum is not None:
                memory.checksums[row] = copy.checksum
        commands = []
        for part in self._parts(sources):
            number = self._start(self._reads, keys[part], rows[part], sources[part])
            commands.append(ReadSsd(number, *self._columns(keys[part], rows[part], sources[part])))
        return commands

    def _parts(self, copies: Sequence[Copy]) -> list[slice]:
        """One after the other, each as large as a job should be."""
        parts: list[slice] = []
        first, num_bytes = 0, 0
        for at, copy in enumerate(copies):
            num_bytes += copy.size
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
        memory, log = self._memory, self.log
        bad = dict.fromkeys((*event.failed, *event.corrupt))
        for at, (key, row, copy) in enumerate(zip(job.keys, job.rows, job.copies, strict=True)):
            del self.loading[key]
            is_current = log.copies.get(key) is copy
            if is_current and at not in bad and key not in memory.by_key:
                memory.finish_load(row)
            resolve(row, memory.by_key.get(key) if at not in bad and log.copies.get(key) is not None else None)
            if is_current and at in bad:
                log.remove(key)
        self._counters["ssd_reads"] += len(job.rows) - len(bad)
        self._counters["ssd_read_errors"] += len(event.failed)
        self._counters["ssd_corrupt"] += len(event.corrupt)
        log.release(job.copies)
        memory.unhold([row for row in job.rows if memory.states[row] is State.COMMITTED])
        for row in job.rows:
            if memory.states[row] is State.LOADING:
                memory.refs[row] -= 1
                memory.end(row, Trigger.LOAD_FAILED)

    # ------------------------------------------------------------ jobs

    def _start(self, jobs: dict[int, _Job], keys: Sequence[bytes], rows: Sequence[int], copies: Sequence[Copy]) -> int:
        self._last_job += 1
        jobs[self._last_job] = _Job(keys, rows, copies)
        return self._last_job

    def _columns(
        self, keys: Sequence[bytes], rows: Sequence[int], copies: Sequence[Copy]
    ) -> tuple[tuple[bytes, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int | None, ...]]:
        memory = self._memory
        ssd_offsets, checksums = tuple([copy.offset for copy in copies]), tuple([copy.checksum for copy in copies])
        return tuple(keys), pick(memory.sizes, rows), pick(memory.offsets, rows), ssd_offsets, checksums

    # ------------------------------------------------------------ conservation

    def held_rows(self) -> Counter[int]:
        """Leases of objects in memory that are jobs'."""
        return Counter([row for job in (*self._writes.values(), *self._reads.values()) for row in job.rows])

    def check_integrity(self) -> None:
        memory, reads, writes = self._memory, self._reads.values(), self._writes.values()
        placed = [copy for job in writes for copy in job.copies]
        self.log.check_integrity([*placed, *[copy for job in reads for copy in job.copies]], placed)
        written = {key: number for number, job in self._writes.items() for key in job.keys}
        _require(all(number in self._writes for number in self._writing.values()), "a write has no job")
        _require(self._writing.items() <= written.items(), "index of writes disagrees")
        loading = {memory.keys[row]: row for row in memory.used_rows() if memory.states[row] is State.LOADING}
        _require(self.loading == loading, "index of loads disagrees")
        _require(sorted(loading.values()) == sorted([row for job in reads for row in job.rows]), "loads")
        extents = [memory.extents[row] for job in writes for row in job.rows]
        _require(sum(extents) == self._writing_bytes, "bytes being written do not add up")
        _require(len(writes) <= WRITES_MAX, "too many writes are under way")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"store: {message}")
