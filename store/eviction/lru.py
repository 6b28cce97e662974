from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from operator import itemgetter

_SHARE = 64
"""A 64th of the candidates is fetched at once, so that passing the deleted ones costs each victim 0.1 us."""


class Lru:
    """Least recently used first. Within a batch the chain's first block counts as the most recent, so suffixes go first.

    `_order` has the candidates, the next to go first. But the very next are fetched from it, a share at a time, to `_next`,
    of which those from `_at` on are left: whoever looks for the first entry of a dict passes every one that was deleted
    before it, which pays only if many are wanted. `_held`: what is left of `_next` and was leased since."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}
        self._next: list[int] = []
        self._at = 0
        self._held: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._order) + len(self._next) - self._at - len(self._held)

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        pass

    def hold(self, rows: Sequence[int]) -> None:
        order = self._order
        for row in rows:
            try:
                del order[row]
            except KeyError:
                self._held[row] = None

    def idle(self, rows: Sequence[int]) -> None:
        order = self._order
        for row in reversed(rows):
            order[row] = None

    def discard(self, rows: Sequence[int]) -> None:
        pass

    def take(self, num_bytes: int, sizes: Sequence[int]) -> list[int]:
        taken: list[int] = []
        while num_bytes > 0 and (self._at < len(self._next) or self._fetch()):
            size = sizes[self._next[self._at]]
            rows = self._next[self._at : self._at - (-num_bytes // size)]
            if self._held or (len(rows) > 1 and itemgetter(*rows)(sizes).count(size) < len(rows)):
                rows = rows[:1]
            self._at += len(rows)
            if self._held and rows[0] in self._held:
                del self._held[rows[0]]
                continue
            taken += rows
            num_bytes -= size * len(rows)
        return taken

    def _fetch(self) -> bool:
        order = self._order
        self._next = list(islice(order, len(order) // _SHARE + 1))
        self._at = 0
        for row in self._next:
            del order[row]
        return bool(self._next)
