from __future__ import annotations

from collections.abc import Sequence

from mooncake.store.eviction.arrivals import Arrivals
from mooncake.store.eviction.ghosts import Ghosts

SMALL_SHARE = 10
"""The small queue is a tenth of all bytes, as published."""
USES_MAX = 3


class _Object:
    __slots__ = ("key", "queue", "size", "uses")

    def __init__(self, key: bytes, size: int, queue: Arrivals) -> None:
        self.key = key
        self.size = size
        self.queue = queue
        self.uses = 0


class S3Fifo:
    """Three FIFO queues (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023). What is
    new comes to a small queue, and goes on to the main one if it is used there more than once, or is wanted again while it is
    remembered. What is used in the main queue comes to its end again. Chains mean nothing to it."""

    def __init__(self) -> None:
        self._objects: dict[int, _Object] = {}
        self._small, self._main = Arrivals(), Arrivals()
        self._small_bytes = 0
        self._bytes = 0
        self._ghosts: Ghosts[bool] = Ghosts()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        for row, key in zip(reversed(rows), reversed(keys), strict=True):
            queue = self._main if self._ghosts.recall(key) else self._small
            self._objects[row] = _Object(key, sizes[row], queue)
            queue.push(row, is_leased=True)
            self._count(queue, sizes[row])

    def hold(self, rows: Sequence[int]) -> None:
        for row in rows:
            found = self._objects[row]
            found.queue.hold(row)
            found.uses = min(found.uses + 1, USES_MAX)

    def idle(self, rows: Sequence[int]) -> None:
        for row in reversed(rows):
            self._objects[row].queue.idle(row)

    def discard(self, rows: Sequence[int]) -> None:
        for row in rows:
            gone = self._objects.pop(row)
            gone.queue.discard(row)
            self._count(gone.queue, -gone.size)

    def take(self, num_bytes: int, sizes: Sequence[int]) -> list[int]:
        taken: list[int] = []
        while num_bytes > 0 and len(self):
            is_small_full = self._small_bytes * SMALL_SHARE > self._bytes
            from_small = len(self._small) > 0 and (is_small_full or not len(self._main))
            row = self._pop_small() if from_small else self._pop_main()
            if row is not None:
                taken.append(row)
                num_bytes -= sizes[row]
        return taken

    def _pop_small(self) -> int | None:
        """None if the first one goes on."""
        row = self._small.pop()
        found = self._objects[row]
        self._count(self._small, -found.size)
        if found.uses > 1:
            found.uses = 0
            found.queue = self._main
            self._main.push(row, is_leased=False)
            self._count(self._main, found.size)
            return None
        del self._objects[row]
        self._ghosts.remember(found.key, True, len(self._objects) // 2)
        return row

    def _pop_main(self) -> int | None:
        """None if the first one stays."""
        row = self._main.pop()
        found = self._objects[row]
        if found.uses:
            found.uses -= 1
            self._main.push(row, is_leased=False)
            return None
        self._count(self._main, -found.size)
        del self._objects[row]
        return row

    def _count(self, queue: Arrivals, size: int) -> None:
        self._bytes += size
        if queue is self._small:
            self._small_bytes += size
