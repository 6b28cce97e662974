"""The page pool: which pages of an engine's KV memory belong to which sequence, and which blocks they hold.

A block is a whole number of pages. A page is free, or held by sequences (counted), or holds a cached block that nobody uses;
the last kind is evicted, least recently used and suffix first, when free pages run out.

    free --allocate--> held --free--> cached (if its block was published) or free
    cached --acquire--> held          cached --evict--> free

Pages are placed in contiguous runs that start on row boundaries where there is room, because an engine can then attend to a
batch of sequences through one strided view (`mooncake.engine.torch.attention`). Placement never decides whether an
allocation succeeds; only the number of pages does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PagePool:
    """row_pages: distance of preferred starting pages; 1 where contiguity does not matter."""

    def __init__(self, num_pages: int, page_tokens: int, block_tokens: int, row_pages: int = 1) -> None:
        if block_tokens % page_tokens:
            raise ValueError(f"block_tokens {block_tokens} is not a multiple of page_tokens {page_tokens}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.block_pages = block_tokens // page_tokens
        self.row_pages = max(1, row_pages)
        self._padded = np.zeros(num_pages + 2, dtype=bool)
        self._is_free = self._padded[1:-1]
        self._is_free[:] = True
        self._num_free = num_pages
        self._refs = np.zeros(num_pages, dtype=np.int32)
        self._held: dict[int, list[int]] = {}
        self._blocks: dict[bytes, tuple[int, ...]] = {}
        self._key_of_page: dict[int, bytes] = {}
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def num_free(self) -> int:
        """Pages that an allocation can get: free ones and those of unused cached blocks."""
        return self._num_free + len(self._unused) * self.block_pages

    def pages(self, seq: int) -> list[int]:
        return self._held[seq]

    def holders(self) -> set[int]:
        return set(self._held)

    def match(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks that are cached here."""
        count = 0
        for key in keys:
            if key not in self._blocks:
                break
            count += 1
        return count

    def allocate(self, seq: int, keys: Sequence[bytes], num_tokens: int) -> bool:
        """Give a new sequence the cached blocks `keys` (all cached, see `match`) and pages up to num_tokens.

        All or nothing: False changes nothing."""
        wanted = self._pages_for(num_tokens) - len(keys) * self.block_pages
        reusable = sum(1 for key in keys if key in self._unused)
        if wanted > self.num_free - reusable * self.block_pages:
            return False
        pages: list[int] = []
        for key in keys:
            self._unused.pop(key, None)
            pages.extend(self._blocks[key])
        self._held[seq] = pages
        self._refs[pages] += 1
        self._append(pages, wanted)
        return True

    def extend(self, seq: int, num_tokens: int) -> bool:
        """Make the sequence's pages hold num_tokens tokens. False, and nothing changed, if there are not enough pages."""
        pages = self._held[seq]
        wanted = self._pages_for(num_tokens) - len(pages)
        if wanted <= 0:
            return True
        if wanted > self.num_free:
            return False
        self._append(pages, wanted)
        return True

    def publish(self, seq: int, index: int, key: bytes) -> None:
        """Block `index` of the sequence is computed: others may reuse it. A key that is cached already is left alone."""
        if key in self._blocks:
            return
        pages = tuple(self._held[seq][index * self.block_pages : (index + 1) * self.block_pages])
        if any(page in self._key_of_page for page in pages):
            return
        self._blocks[key] = pages
        for page in pages:
            self._key_of_page[page] = key
        self._note(key, self._added, self._removed)

    def free(self, seq: int) -> None:
        """The sequence lets go of its pages. Published blocks stay cached while nobody needs the room."""
        pages = self._held.pop(seq)
        self._refs[pages] -= 1
        # Backwards, so that the suffix is the least recently used.
        for page in reversed(pages):
            if self._refs[page]:
                continue
            key = self._key_of_page.get(page)
            if key is None:
                self._release(page)
            elif page == self._blocks[key][0]:
                self._unused[key] = None

    def drain_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys (added, removed) since the last call; one that came and went is in neither."""
        added, removed = tuple(self._added), tuple(self._removed)
        self._added.clear()
        self._removed.clear()
        return added, removed

    def cached_keys(self) -> tuple[bytes, ...]:
        return tuple(self._blocks)

    def check_integrity(self) -> None:
        """Raises AssertionError if a conservation law is broken: free + held + unused = all; counts agree."""
        refs = np.zeros(self.num_pages, dtype=np.int32)
        for pages in self._held.values():
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            refs[pages] += 1
        assert (refs == self._refs).all(), "reference counts differ from holders"
        unused = [page for key in self._unused for page in self._blocks[key]]
        assert not self._refs[unused].any(), "an unused block is held"
        assert not self._is_free[unused].any() and not self._is_free[refs > 0].any(), "a free page is in use"
        assert int(self._is_free.sum()) == self._num_free
        assert self._num_free + len(unused) + int((refs > 0).sum()) == self.num_pages, "pages leaked"

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def _append(self, pages: list[int], count: int) -> None:
        while self._num_free < count:
            self._evict()
        taken: list[int] = []
        if pages:
            taken = self._run_after(pages[-1], count)
        while len(taken) < count:
            start, length = self._find_run(count - len(taken))
            run = range(start, start + length)
            self._is_free[start : start + length] = False
            taken.extend(run)
        self._num_free -= count
        self._refs[taken] += 1
        pages.extend(taken)

    def _run_after(self, last: int, count: int) -> list[int]:
        end = last + 1
        while end < self.num_pages and end - last <= count and self._is_free[end]:
            end += 1
        self._is_free[last + 1 : end] = False
        return list(range(last + 1, end))

    def _find_run(self, count: int) -> tuple[int, int]:
        """(start, length <= count) of free pages: a whole run on a row boundary, else the first whole run, else the longest."""
        edges = np.flatnonzero(self._padded[1:] != self._padded[:-1])
        starts, ends = edges[::2], edges[1::2]
        aligned = -(-starts // self.row_pages) * self.row_pages
        for candidates in (aligned, starts):
            fits = np.flatnonzero(ends - candidates >= count)
            if fits.size:
                return int(candidates[fits[0]]), count
        longest = int(np.argmax(ends - starts))
        return int(starts[longest]), int(ends[longest] - starts[longest])

    def _evict(self) -> None:
        key, _ = self._unused.popitem(last=False)
        for page in self._blocks.pop(key):
            del self._key_of_page[page]
            self._release(page)
        self._note(key, self._removed, self._added)

    def _release(self, page: int) -> None:
        self._is_free[page] = True
        self._num_free += 1

    @staticmethod
    def _note(key: bytes, into: dict[bytes, None], opposite: dict[bytes, None]) -> None:
        if key in opposite:
            del opposite[key]
        else:
            into[key] = None
