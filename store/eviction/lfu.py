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

    def add(self, number: int, key: bytes, size: int) -> None:
        self._num_uses[number] = 1

    def hold(self, number: int) -> None:
        self._remove(number)
        self._num_uses[number] += 1

    def idle(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            count = self._num_uses[number]
            group = self._candidates.get(count)
            if group is None:
                group = self._candidates[count] = OrderedDict()
                insort(self._counts, count)
            group[number] = None

    def discard(self, number: int) -> None:
        self._remove(number)
        del self._num_uses[number]

    def victim(self) -> int | None:
        return next(iter(self._candidates[self._counts[0]])) if self._counts else None

    def _remove(self, number: int) -> None:
        count = self._num_uses[number]
        group = self._candidates.get(count)
        if group is None or number not in group:
            return
        del group[number]
        if not group:
            del self._candidates[count]
            del self._counts[bisect_left(self._counts, count)]
