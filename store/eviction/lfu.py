from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence


class Lfu:
    """Least often used first; of those the least recently used. The textbook policy: uses are forgotten with the object, and
    chains mean nothing, so a prefix may go before its suffix."""

    def __init__(self) -> None:
        self._num_uses: dict[int, int] = {}
        self._candidates: dict[int, OrderedDict[int, None]] = {}  # by number of uses, least recent first; none is empty
        self._counts: list[int] = []  # keys of _candidates, ascending

    def __len__(self) -> int:
        return sum(map(len, self._candidates.values()))

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        self._num_uses.update(dict.fromkeys(rows, 1))

    def hold(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._remove(row)
            self._num_uses[row] += 1

    def idle(self, rows: Sequence[int]) -> None:
        for row in rows:
            count = self._num_uses[row]
            group = self._candidates.get(count)
            if group is None:
                group = self._candidates[count] = OrderedDict()
                insort(self._counts, count)
            group[row] = None

    def discard(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self._num_uses[row]

    def take(self, num_bytes: int, sizes: Sequence[int]) -> list[int]:
        taken: list[int] = []
        while num_bytes > 0 and self._counts:
            row = next(iter(self._candidates[self._counts[0]]))
            self._remove(row)
            del self._num_uses[row]
            taken.append(row)
            num_bytes -= sizes[row]
        return taken

    def _remove(self, row: int) -> None:
        """It is a candidate."""
        count = self._num_uses[row]
        group = self._candidates[count]
        del group[row]
        if not group:
            del self._candidates[count]
            del self._counts[bisect_left(self._counts, count)]
