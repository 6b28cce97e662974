"""Byte allocator over one segment: best fit, neighbours coalesced at once.

Extents tile the segment: [used][free][used][used][free]; two free extents never touch.
Free extents are found by size through a sorted list of the distinct free sizes (a store has few of them) and by either
end through two dictionaries, for coalescing. Both operations are O(log n) in the number of distinct free sizes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Protocol


class BytesAllocator(Protocol):
    """What the store core wants of one; see `Allocator`."""

    capacity: int
    used: int

    @property
    def free_bytes(self) -> int: ...

    def rounded(self, size: int) -> int: ...

    def allocate(self, size: int) -> int | None: ...

    def free(self, offset: int) -> None: ...

    def extents(self) -> dict[int, int]: ...

    def check_integrity(self) -> None: ...


class Allocator:
    """Offsets and rounded sizes are multiples of `alignment`. Not thread-safe."""

    def __init__(self, capacity: int, alignment: int = 4096) -> None:
        if alignment < 64 or alignment & (alignment - 1):
            raise ValueError(f"alignment must be a power of two and at least 64, got {alignment}")
        self.alignment = alignment
        self.capacity = capacity // alignment * alignment
        if self.capacity <= 0:
            raise ValueError(f"capacity must be at least one alignment unit of {alignment} bytes, got {capacity}")
        self.used = 0
        self._used_at: dict[int, int] = {}
        self._free_at: dict[int, int] = {}
        self._free_end: dict[int, int] = {}
        self._sizes: list[int] = []
        self._by_size: dict[int, dict[int, None]] = {}
        self._insert(0, self.capacity)

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used

    def rounded(self, size: int) -> int:
        """Bytes that an object of `size` bytes takes."""
        return (size + self.alignment - 1) & -self.alignment

    def allocate(self, size: int) -> int | None:
        """Offset of a new extent of at least `size` bytes, or None if no free extent is long enough."""
        need = self.rounded(size)
        at = bisect_left(self._sizes, need)
        if at == len(self._sizes):
            return None
        length = self._sizes[at]
        # The latest freed of that size: its lines are the likeliest to be in cache. popitem() is O(1), next(iter()) is not.
        offset, _ = self._by_size[length].popitem()
        self._forget(offset, length)
        if length > need:
            self._insert(offset + need, length - need)
        self._used_at[offset] = need
        self.used += need
        return offset

    def free(self, offset: int) -> None:
        """Raises KeyError if no extent was allocated at that offset."""
        size = self._used_at.pop(offset)
        self.used -= size
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

    def extents(self) -> dict[int, int]:
        """Used extents, offset to rounded size (a copy)."""
        return dict(self._used_at)

    def check_integrity(self) -> None:
        """Extents tile the segment, free neighbours are coalesced, indexes agree. Raises AssertionError; O(n log n)."""
        at, last_free = 0, False
        for offset, size, free in sorted(
            [(o, s, False) for o, s in self._used_at.items()] + [(o, s, True) for o, s in self._free_at.items()]
        ):
            _require(offset == at, f"gap or overlap at {at}: next extent begins at {offset}")
            _require(size > 0 and size % self.alignment == 0, f"extent at {offset} has size {size}")
            _require(not (free and last_free), f"free extents touch at {offset}")
            at, last_free = at + size, free
        _require(at == self.capacity, f"extents end at {at}, capacity is {self.capacity}")
        _require(self.used == sum(self._used_at.values()), "used bytes do not add up")
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
        self.used = 0
        self._used_at: dict[int, int] = {}
        self._last = 0

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used

    def rounded(self, size: int) -> int:
        return (size + self.alignment - 1) & -self.alignment

    def allocate(self, size: int) -> int | None:
        need = (size + self.alignment - 1) & -self.alignment
        if self.used + need > self.capacity:
            return None
        self.used += need
        self._last += 1
        self._used_at[self._last] = need
        return self._last

    def free(self, offset: int) -> None:
        self.used -= self._used_at.pop(offset)

    def extents(self) -> dict[int, int]:
        return dict(self._used_at)

    def check_integrity(self) -> None:
        _require(self.used == sum(self._used_at.values()) <= self.capacity, "used bytes do not add up")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"allocator: {message}")
