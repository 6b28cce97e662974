from __future__ import annotations

from collections import OrderedDict


class Arrivals:
    """A first-in-first-out queue of objects, leased ones among them. One that is leased when its turn comes is put aside, once,
    and is the next as soon as it is not leased any more: so nothing is ever passed twice."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()
        self._leased: dict[int, None] = {}
        self._aside: dict[int, None] = {}
        """Of those leased."""

    def __len__(self) -> int:
        """Of those that are not leased."""
        return len(self._order) + len(self._aside) - len(self._leased)

    def push(self, row: int, *, is_leased: bool) -> None:
        self._order[row] = None
        if is_leased:
            self._leased[row] = None

    def hold(self, row: int) -> None:
        self._leased[row] = None

    def idle(self, row: int) -> None:
        del self._leased[row]
        if row in self._aside:
            del self._aside[row]
            self._order[row] = None
            self._order.move_to_end(row, last=False)

    def discard(self, row: int) -> None:
        """It is leased."""
        del self._leased[row]
        queue = self._aside if row in self._aside else self._order
        del queue[row]

    def pop(self) -> int:
        """The first that is not leased; there is one."""
        while True:
            row, _ = self._order.popitem(last=False)
            if row not in self._leased:
                return row
            self._aside[row] = None
