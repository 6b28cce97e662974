"""Byte allocator over one segment: best fit, neighbours coalesced.

Extents tile the segment: [used][free][used][used][free]; two free extents never touch, but for the recent ones. Who has used
which is the caller's to know; sizes are rounded up to the alignment by the caller too, once for all that happens to an object.

Free extents are found by size through a sorted list of the distinct free sizes (a store has few of them) and by either
end through two dictionaries, for coalescing. Both operations are O(log n) in the number of distinct free sizes. Mostly neither
is needed, as a full store frees extents for objects of the same size: what is freed waits by its size, as it is, until it is
wanted or nothing else is long enough.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Protocol

RECENT_MAX = 1024
"""Extents of one size that wait uncoalesced: bounds the time it takes to coalesce them all at once, about 2 ms."""


class BytesAllocator(Protocol):
    """What the store core wants of one; see `Allocator`."""

    capacity: int
    free_bytes: int

    def rounded(self, size: int) -> int: ...

    def occupy(self, extents: Mapping[int, int]) -> None: ...

    def allocate(self, size: int, count: int) -> list[int]: ...

    def free(self, size: int, offsets: Sequence[int]) -> None: ...

    def check_integrity(self, used: Mapping[int, int]) -> None: ...


class Allocator:
    """Offsets and sizes are multiples of `alignment`. Not thread-safe."""

    def __init__(self, capacity: int, alignment: int = 4096) -> None:
        if alignment < 64 or alignment & (alignment - 1):
            raise ValueError(f"alignment must be a power of two and at least 64, got {alignment}")
        self.alignment = alignment
        self.capacity = capacity // alignment * alignment
        if self.capacity <= 0:
            raise ValueError(f"capacity must be at least one alignment unit of {alignment} bytes, got {capacity}")
        self.free_bytes = self.capacity
        self._recent: dict[int, list[int]] = {}
        self._free_at: dict[int, int] = {}
        self._free_end: dict[int, int] = {}
        self._sizes: list[int] = []
        self._by_size: dict[int, dict[int, None]] = {}
        self._insert(0, self.capacity)

    def rounded(self, size: int) -> int:
        """Bytes that an object of `size` bytes takes."""
        return (size + self.alignment - 1) & -self.alignment

    def occupy(self, extents: Mapping[int, int]) -> None:
        """Take these, offset to size, of a segment of which nothing is taken yet. Raises ValueError if two overlap or one is
        outside; then nothing is taken."""
        gaps: list[tuple[int, int]] = []
        at = 0
        for offset, size in [*sorted(extents.items()), (self.capacity, 0)]:
            if offset < at or offset + size > self.capacity or (offset | size) % self.alignment:
                raise ValueError(f"extent at {offset} of {size} bytes is in another's place, or in none")
            if offset > at:
                gaps.append((at, offset - at))
            at = offset + size
        self._remove(0, self.capacity)
        for offset, size in gaps:
            self._insert(offset, size)
        self.free_bytes -= sum(extents.values())

    def allocate(self, size: int, count: int) -> list[int]:
        """Offsets of `count` new extents of `size` bytes, or of as many as there is room for in one piece each."""
        recent = self._recent.get(size)
        offsets: list[int] = []
        if recent:
            offsets = recent[-count:]
            del recent[-count:]
        while len(offsets) < count:
            cut = self._cut(size, count - len(offsets))
            if not cut and not self._coalesce():
                break
            offsets += cut
        self.free_bytes -= size * len(offsets)
        return offsets

    def free(self, size: int, offsets: Sequence[int]) -> None:
        """Give extents of one size back."""
        self.free_bytes += size * len(offsets)
        recent = self._recent.setdefault(size, [])
        num_waiting = max(0, RECENT_MAX - len(recent))
        recent += offsets[:num_waiting]
        for offset in offsets[num_waiting:]:
            self._merge(offset, size)

    def _cut(self, size: int, count: int) -> range:
        """Up to `count` extents from the shortest free one that is long enough; what is left of it is the shortest again."""
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes):
            return range(0)
        length = self._sizes[at]
        # The latest freed of that size: its lines are the likeliest to be in cache. popitem() is O(1), next(iter()) is not.
        offset, _ = self._by_size[length].popitem()
        self._forget(offset, length)
        taken = size * min(count, length // size)
        if length > taken:
            self._insert(offset + taken, length - taken)
        return range(offset, offset + taken, size)

    def _coalesce(self) -> bool:
        """All that wait; False if none do."""
        recent, self._recent = self._recent, {}
        for size, offsets in recent.items():
            for offset in offsets:
                self._merge(offset, size)
        return any(recent.values())

    def _merge(self, offset: int, size: int) -> None:
        before = self._free_end.get(offset)
        if before is not None:
            self._remove(before, self._free_at[before])
            size += offset - before
            offset = before
        after = self._free_at.get(offset + size)
        if after is not None:
            self._remove(offset + size, after)
            size += after
        self._insert(offset, size)

    def _insert(self, offset: int, size: int) -> None:
        self._free_at[offset] = size
        self._free_end[offset + size] = offset
        peers = self._by_size.get(size)
        if peers is None:
            self._by_size[size] = {offset: None}
            insort(self._sizes, size)
        else:
            peers[offset] = None

    def _remove(self, offset: int, size: int) -> None:
        del self._by_size[size][offset]
        self._forget(offset, size)

    def _forget(self, offset: int, size: int) -> None:
        del self._free_at[offset]
        del self._free_end[offset + size]
        if not self._by_size[size]:
            del self._by_size[size]
            del self._sizes[bisect_left(self._sizes, size)]

    def check_integrity(self, used: Mapping[int, int]) -> None:
        """used: offsets to sizes. Extents tile the segment, free neighbours are coalesced, indexes agree. Raises
        AssertionError; O(n log n)."""
        recent = [(offset, size) for size, offsets in self._recent.items() for offset in offsets]
        at, last_free = 0, False
        for offset, size, free in sorted(
            [(o, s, False) for o, s in (*used.items(), *recent)] + [(o, s, True) for o, s in self._free_at.items()]
        ):
            _require(offset == at, f"gap or overlap at {at}: next extent begins at {offset}")
            _require(size > 0 and size % self.alignment == 0, f"extent at {offset} has size {size}")
            _require(not (free and last_free), f"free extents touch at {offset}")
            at, last_free = at + size, free
        _require(at == self.capacity, f"extents end at {at}, capacity is {self.capacity}")
        _require(self.free_bytes == self.capacity - sum(used.values()), "free bytes do not add up")
        by_size = {(size, offset) for size, peers in self._by_size.items() for offset in peers}
        _require(by_size == {(s, o) for o, s in self._free_at.items()}, "size index disagrees")
        _require(self._sizes == sorted(self._by_size), "list of sizes disagrees")
        _require(self._free_end == {o + s: o for o, s in self._free_at.items()}, "end index disagrees")


class Budget:
    """Counts bytes and places nothing: an allocator for simulated memory, which has no addresses and so no fragments.
    Offsets are running numbers."""

    def __init__(self, capacity: int, alignment: int = 4096) -> None:
        self.alignment = alignment
        self.capacity = capacity // alignment * alignment
        self.free_bytes = self.capacity
        self._last = 0

    def rounded(self, size: int) -> int:
        return (size + self.alignment - 1) & -self.alignment

    def occupy(self, extents: Mapping[int, int]) -> None:
        self.free_bytes -= sum(extents.values())

    def allocate(self, size: int, count: int) -> list[int]:
        count = min(count, self.free_bytes // size)
        first = self._last + 1
        self._last += count
        self.free_bytes -= size * count
        return list(range(first, first + count))

    def free(self, size: int, offsets: Sequence[int]) -> None:
        self.free_bytes += size * len(offsets)

    def check_integrity(self, used: Mapping[int, int]) -> None:
        _require(0 <= self.free_bytes == self.capacity - sum(used.values()), "free bytes do not add up")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"allocator: {message}")
