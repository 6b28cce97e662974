"""Where copies lie on SSD: which extent is written to, which is used again, and what is lost with it.

    extents by age   [oldest] [ ... ] [ ... ] [newest, open]     next: the oldest that no job reads or writes
                         │
                         └─ its copies are evicted, all at once

Extents go in the order of their age, so whatever voids an older copy of a key (a newer one, or the note of its removal)
outlives it, and a start after a crash finds the right one. The exception are extents that are passed over while they are read.
It is no loss to what is used: that is in memory meanwhile, and when it leaves memory again and its copy has become old, it is
written anew (`is_old`), at the head of the log.

A place belongs to its writer from `place` until `commit` or `discard`; an extent that a job reads from or writes to is held
(`hold`, `release`), once for each copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from mooncake.store.events import SsdRecovered, SsdRun
from mooncake.store.reports import Changes
from mooncake.store.ssd_layout import PAGE_ENTRIES, Geometry, num_pages


class Copy(msgspec.Struct, gc=False, eq=False):
    extent: int
    offset: int
    size: int
    checksum: int | None = None


class _Extent:
    """num_pages, num_bytes: of table and data, written or given to writers. live_bytes: of copies and of places that
    belong to a writer. keys: of all copies since it was opened, some of which may be gone. spared_until: not used again
    before then."""

    __slots__ = ("keys", "live_bytes", "num_bytes", "num_held", "num_pages", "sequence", "spared_until")

    def __init__(self) -> None:
        self.num_held = 0
        self.spared_until = 0
        self.open(0)

    def open(self, sequence: int) -> None:
        self.sequence = sequence
        self.num_pages = 1
        self.num_bytes = 0
        self.live_bytes = 0
        self.keys: list[bytes] = []


class SsdLog:
    """copies: by key, of those that can be read. changes: for the directory."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.copies: dict[bytes, Copy] = {}
        self.changes = Changes()
        self.num_evictions = 0
        self.evicted_bytes = 0
        self._extents = [_Extent() for _ in range(geometry.num_extents)]
        self._open: int | None = None
        self._last_sequence = 0

    @property
    def used_bytes(self) -> int:
        return sum([extent.live_bytes for extent in self._extents])

    @property
    def idle_bytes(self) -> int:
        """Of copies that could be evicted now."""
        return sum([extent.live_bytes for extent in self._extents if not extent.num_held])

    def fits(self, size: int) -> bool:
        """Whether an extent has room for such an object."""
        return self.geometry.rounded(size) <= self.geometry.data_bytes

    def is_old(self, key: bytes) -> bool:
        """Whether its copy is in the older half of a full log: soon enough to be evicted to be worth another write."""
        age = self._last_sequence - self._extents[self.copies[key].extent].sequence
        return 2 * age >= self.geometry.num_extents

    # ------------------------------------------------------------ places

    def place(self, sizes: Sequence[int], now: int) -> tuple[list[Copy], list[SsdRun]]:
        """Places for new objects that fit, held, and the runs they make up; for leading ones only, if no more extents can
        be had. Evicts."""
        copies: list[Copy] = []
        runs: list[SsdRun] = []
        while len(copies) < len(sizes):
            rest = sizes[len(copies) :]
            run = self._append(rest, copies)
            if run is None and self._open_next(now):
                run = self._append(rest, copies)
            if run is None:
                break
            runs.append(run)
        return copies, runs

    def _open_next(self, now: int) -> bool:
        """The open extent has no room: it stays as it is, and the oldest that can be had is opened."""
        extents = self._extents
        idle = [at for at, extent in enumerate(extents) if not extent.num_held and extent.spared_until <= now]
        if not idle:
            return False
        self._open = min(idle, key=lambda at: extents[at].sequence)
        self._evict(self._open)
        self._last_sequence += 1
        extents[self._open].open(self._last_sequence)
        return True

    def _append(self, sizes: Sequence[int], copies: list[Copy]) -> SsdRun | None:
        """The leading objects, as many as the open extent has room for, behind what is there; None if that is none."""
        if self._open is None:
            return None
        geometry, number, extent = self.geometry, self._open, self._extents[self._open]
        num_places = (geometry.table_pages - extent.num_pages) * PAGE_ENTRIES
        start, end, first = geometry.data_start(number), extent.num_bytes, len(copies)
        for size in sizes[:num_places]:
            after = end + geometry.rounded(size)
            if after > geometry.data_bytes:
                break
            copies.append(Copy(number, start + end, size))
            end = after
        count = len(copies) - first
        if not count:
            return None
        table_offset = number * geometry.extent_bytes + extent.num_pages * geometry.page_bytes
        run = SsdRun(count, number, extent.sequence, table_offset, opens=extent.num_pages == 1)
        extent.num_pages += num_pages(count)
        extent.live_bytes += end - extent.num_bytes
        extent.num_bytes = end
        extent.num_held += count
        return run

    def _evict(self, number: int) -> None:
        copies = self.copies
        lost = [key for key in self._extents[number].keys if key in copies and copies[key].extent == number]
        for key in dict.fromkeys(lost):
            copy = self._forget(key)
            self.num_evictions += 1
            self.evicted_bytes += self.geometry.rounded(copy.size)

    # ------------------------------------------------------------ copies

    def commit(self, key: bytes, copy: Copy) -> None:
        """It is written: from now on this is the copy of that key."""
        old = self.copies.pop(key, None)
        if old is None:
            self.changes.gained.append((key,))
        else:
            self.discard(old)
        self.copies[key] = copy
        self._extents[copy.extent].keys.append(key)

    def discard(self, copy: Copy) -> None:
        """Nobody wants that place any more. It is used again with its extent."""
        self._extents[copy.extent].live_bytes -= self.geometry.rounded(copy.size)

    def remove(self, key: bytes) -> bool:
        """Whether there was a copy."""
        if key not in self.copies:
            return False
        self._forget(key)
        return True

    def _forget(self, key: bytes) -> Copy:
        copy = self.copies.pop(key)
        self.discard(copy)
        self.changes.lost.append((key,))
        return copy

    def spare(self, keys: Iterable[bytes], until: int) -> None:
        """Somebody who waits for room wants to read these: writing, to make that room, must not evict them."""
        for key in keys:
            extent = self._extents[self.copies[key].extent]
            extent.spared_until = max(extent.spared_until, until)

    def hold(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            self._extents[copy.extent].num_held += 1

    def release(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            self._extents[copy.extent].num_held -= 1

    def restore(self, event: SsdRecovered) -> None:
        """Into an empty log, of that geometry. What extents have room for yet is left: nothing is written to them until
        they are used again."""
        assert not self._last_sequence and len(event.sequences) == len(self._extents)
        for extent, sequence in zip(self._extents, event.sequences, strict=True):
            extent.open(sequence)
        self._last_sequence = max(event.sequences)
        columns = zip(event.keys, event.sizes, event.ssd_offsets, event.checksums, strict=True)
        for key, size, offset, checksum in columns:
            copy = Copy(offset // self.geometry.extent_bytes, offset, size, checksum)
            extent = self._extents[copy.extent]
            extent.live_bytes += self.geometry.rounded(size)
            extent.keys.append(key)
            self.copies[key] = copy
        if event.keys:
            self.changes.gained.append(event.keys)

    def contents(self) -> SsdRecovered:
        """What the next life will be told if this one ends now."""
        copies = self.copies.values()
        return SsdRecovered(
            tuple(self.copies),
            tuple([copy.size for copy in copies]),
            tuple([copy.offset for copy in copies]),
            tuple([copy.checksum or 0 for copy in copies]),
            tuple([extent.sequence for extent in self._extents]),
        )

    # ------------------------------------------------------------ conservation

    def check_integrity(self, held: Sequence[Copy], placed: Sequence[Copy]) -> None:
        """held: once for each time. placed: of writers."""
        geometry = self.geometry
        counts = Counter([copy.extent for copy in held])
        _require(counts == {at: e.num_held for at, e in enumerate(self._extents) if e.num_held}, "holds do not add up")
        live = [0] * len(self._extents)
        end = 0
        for copy in sorted([*self.copies.values(), *placed], key=lambda copy: (copy.offset, copy.size)):
            _require(geometry.holds(copy.extent, copy.offset, copy.size), "a copy is not in its extent")
            _require(copy.offset >= end, "two copies are at one place")
            end = copy.offset + geometry.rounded(copy.size)
            live[copy.extent] += geometry.rounded(copy.size)
        _require(live == [extent.live_bytes for extent in self._extents], "bytes on SSD do not add up")
        for key, copy in self.copies.items():
            _require(key in self._extents[copy.extent].keys, "an extent does not know one of its copies")
        sequences = [extent.sequence for extent in self._extents if extent.sequence]
        _require(len(set(sequences)) == len(sequences), "two extents have the same age")
        _require(max(sequences, default=0) == self._last_sequence, "the newest extent is lost")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"ssd log: {message}")
