"""Free pages of a pool: siblings of one shape, which differ in what lies beside what.

`take` is asked only for what is there; `after` is the last page that the sequence has already, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class FreePages(Protocol):
    num_free: int

    def take(self, count: int, after: int | None) -> list[int]: ...

    def give(self, pages: Sequence[int]) -> None: ...

    def check_integrity(self, used: np.ndarray) -> None:
        """used: a flag per page. Raises AssertionError unless all others, and only they, are free."""
        ...


class AnyPages:
    """Where it does not matter: the latest freed page is the next one taken."""

    def __init__(self, num_pages: int) -> None:
        self.num_free = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    def take(self, count: int, after: int | None) -> list[int]:
        if not count:
            return []
        self.num_free -= count
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        return taken

    def give(self, pages: Sequence[int]) -> None:
        self.num_free += len(pages)
        self._free.extend(pages)

    def check_integrity(self, used: np.ndarray) -> None:
        assert sorted(self._free) == np.flatnonzero(~used).tolist(), "a page is free and used, or neither"
        assert len(self._free) == self.num_free


class PageRuns:
    """Contiguous runs that start on row boundaries where there is room, because an engine can then attend to a batch of
    sequences through one strided view (`mooncake.engine.torch.attention`). row_pages: distance of the boundaries."""

    def __init__(self, num_pages: int, row_pages: int) -> None:
        self.num_free = num_pages
        self._num_pages = num_pages
        self._row_pages = max(1, row_pages)
        self._padded = np.zeros(num_pages + 2, dtype=bool)
        self._is_free = self._padded[1:-1]
        self._is_free[:] = True

    def take(self, count: int, after: int | None) -> list[int]:
        taken = self._run_after(after, count) if after is not None else []
        while len(taken) < count:
            start, length = self._find_run(count - len(taken))
            self._is_free[start : start + length] = False
            taken.extend(range(start, start + length))
        self.num_free -= count
        return taken

    def give(self, pages: Sequence[int]) -> None:
        self._is_free[np.asarray(pages, dtype=np.int64)] = True
        self.num_free += len(pages)

    def _run_after(self, last: int, count: int) -> list[int]:
        end = last + 1
        while end < self._num_pages and end - last <= count and self._is_free[end]:
            end += 1
        self._is_free[last + 1 : end] = False
        return list(range(last + 1, end))

    def _find_run(self, count: int) -> tuple[int, int]:
        """(start, length <= count) of free pages: a whole run on a row boundary, else the first whole run, else the longest."""
        edges = np.flatnonzero(self._padded[1:] != self._padded[:-1])
        starts, ends = edges[::2], edges[1::2]
        aligned = -(-starts // self._row_pages) * self._row_pages
        for candidates in (aligned, starts):
            fits = np.flatnonzero(ends - candidates >= count)
            if fits.size:
                return int(candidates[fits[0]]), count
        longest = int(np.argmax(ends - starts))
        return int(starts[longest]), int(ends[longest] - starts[longest])

    def check_integrity(self, used: np.ndarray) -> None:
        assert (self._is_free == ~used).all(), "a page is free and used, or neither"
        assert int(self._is_free.sum()) == self.num_free
