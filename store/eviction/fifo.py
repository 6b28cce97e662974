from __future__ import annotations

from collections.abc import Sequence

from mooncake.store.eviction.arrivals import Arrivals


class Fifo:
    """First in, first out, used or not. Of a batch the suffix goes first; but a chain that grows loses its beginning first."""

    def __init__(self) -> None:
        self._arrivals = Arrivals()

    def __len__(self) -> int:
        return len(self._arrivals)

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        for row in reversed(rows):
            self._arrivals.push(row, is_leased=True)

    def hold(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._arrivals.hold(row)

    def idle(self, rows: Sequence[int]) -> None:
        for row in reversed(rows):
            self._arrivals.idle(row)

    def discard(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._arrivals.discard(row)

    def take(self, num_bytes: int, sizes: Sequence[int]) -> list[int]:
        taken: list[int] = []
        while num_bytes > 0 and len(self._arrivals):
            row = self._arrivals.pop()
            taken.append(row)
            num_bytes -= sizes[row]
        return taken
