from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Lru:
    """Least recently used first. Within a batch the chain's first block counts as the most recent, so suffixes go
    first."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def add(self, number: int, key: bytes, size: int) -> None:
        pass

    def hold(self, number: int) -> None:
        del self._order[number]

    def idle(self, numbers: Sequence[int]) -> None:
        for number in reversed(numbers):
            self._order[number] = None

    def discard(self, number: int) -> None:
        self._order.pop(number, None)

    def victim(self) -> int | None:
        return next(iter(self._order), None)
