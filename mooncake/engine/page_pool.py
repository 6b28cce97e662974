"""The page pool: which pages of an engine's KV memory belong to which sequence, and which blocks they hold.

A block is a whole number of pages. A page is free, or held by sequences (counted), or holds a cached block that nobody uses;
the last kind is evicted, least recently used and suffix first, when free pages run out.

    free --allocate--> held --free--> cached (if its block was published) or free
    cached --acquire--> held          cached --evict--> free

Where pages lie is the business of `mooncake.engine.free_pages`. It never decides whether an allocation succeeds; only the
number of pages does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mooncake.engine.free_pages import AnyPages, FreePages, PageRuns


class PagePool:
    """row_pages: distance of preferred starting pages, or None where contiguity does not matter."""

    def __init__(self, num_pages: int, page_tokens: int, block_tokens: int, row_pages: int | None = 1) -> None:
        if block_tokens % page_tokens:
            raise ValueError(f"block_tokens {block_tokens} is not a multiple of page_tokens {page_tokens}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.block_pages = block_tokens // page_tokens
        self._free: FreePages = AnyPages(num_pages) if row_pages is None else PageRuns(num_pages, row_pages)
        self._refs = [0] * num_pages
        self._held: dict[int, list[int]] = {}
        self._blocks: dict[bytes, list[int]] = {}
        self._key_of_page: list[bytes | None] = [None] * num_pages
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def num_free(self) -> int:
        """Pages that an allocation can get: free ones and those of unused cached blocks."""
        return self._free.num_free + len(self._unused) * self.block_pages

    def pages(self, seq: int) -> list[int]:
        return self._held[seq]

    def holders(self) -> set[int]:
        return set(self._held)

    def match(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks that are cached here."""
        blocks = self._blocks
        for count, key in enumerate(keys):
            if key not in blocks:
                return count
        return len(keys)

    def allocate(self, seq: int, keys: Sequence[bytes], num_tokens: int) -> bool:
        """Give a new sequence the cached blocks `keys` (all cached, see `match`) and pages up to num_tokens.

        All or nothing: False changes nothing."""
        wanted = -(-num_tokens // self.page_tokens) - len(keys) * self.block_pages
        unused, refs = self._unused, self._refs
        reusable = [key for key in keys if key in unused]
        if wanted > self.num_free - len(reusable) * self.block_pages:
            return False
        for key in reusable:
            del unused[key]
        pages: list[int] = []
        for key in keys:
            pages += self._blocks[key]
        for page in pages:
            refs[page] += 1
        self._held[seq] = pages
        self._append(pages, wanted)
        return True

    def extend(self, seq: int, num_tokens: int) -> bool:
        """Make the sequence's pages hold num_tokens tokens. False, and nothing changed, if there are not enough pages."""
        pages = self._held[seq]
        wanted = -(-num_tokens // self.page_tokens) - len(pages)
        if wanted <= 0:
            return True
        if wanted > self.num_free:
            return False
        self._append(pages, wanted)
        return True

    def publish(self, seq: int, first: int, keys: Sequence[bytes]) -> None:
        """Blocks from `first` on are computed: others may reuse them. A key that is cached already is left alone."""
        blocks, key_of_page, size = self._blocks, self._key_of_page, self.block_pages
        pages = self._held[seq][first * size : (first + len(keys)) * size]
        new: list[bytes] = []
        for index, key in enumerate(keys):
            if key in blocks:
                continue
            its_pages = pages[index * size : (index + 1) * size]
            if key_of_page[its_pages[0]] is None:
                blocks[key] = its_pages
                for page in its_pages:
                    key_of_page[page] = key
                new.append(key)
        note_changes(new, self._added, self._removed)

    def free(self, seq: int) -> None:
        """The sequence lets go of its pages. Published blocks stay cached while nobody needs the room."""
        refs, key_of_page, blocks, unused = self._refs, self._key_of_page, self._blocks, self._unused
        freed: list[int] = []
        # Backwards, so that the suffix is the least recently used.
        for page in reversed(self._held.pop(seq)):
            refs[page] -= 1
            if refs[page]:
                continue
            key = key_of_page[page]
            if key is None:
                freed.append(page)
            elif page == blocks[key][0]:
                unused[key] = None
        if freed:
            self._free.give(freed)

    def drain_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys (added, removed) since the last call; one that came and went is in neither."""
        if not self._added and not self._removed:
            return (), ()
        added, removed = tuple(self._added), tuple(self._removed)
        self._added.clear()
        self._removed.clear()
        return added, removed

    def cached_keys(self) -> tuple[bytes, ...]:
        return tuple(self._blocks)

    def check_integrity(self) -> None:
        """Raises AssertionError if a conservation law is broken: free + held + unused = all; counts agree."""
        refs = np.zeros(self.num_pages, dtype=np.int64)
        for pages in self._held.values():
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            refs[pages] += 1
        assert refs.tolist() == self._refs, "reference counts differ from holders"
        used = refs > 0
        unused = [page for key in self._unused for page in self._blocks[key]]
        assert not used[unused].any(), "an unused block is held"
        used[unused] = True
        self._free.check_integrity(used)
        keys = {page: key for key, pages in self._blocks.items() for page in pages}
        assert [keys.get(page) for page in range(self.num_pages)] == self._key_of_page, "a page holds another block"

    def _append(self, pages: list[int], count: int) -> None:
        if count > self._free.num_free:
            self._evict(count - self._free.num_free)
        taken = self._free.take(count, pages[-1] if pages else None)
        refs = self._refs
        for page in taken:
            refs[page] += 1
        pages += taken

    def _evict(self, num_pages: int) -> None:
        unused, blocks, key_of_page = self._unused, self._blocks, self._key_of_page
        freed: list[int] = []
        gone: list[bytes] = []
        while len(freed) < num_pages:
            key, _ = unused.popitem(last=False)
            pages = blocks.pop(key)
            for page in pages:
                key_of_page[page] = None
            freed += pages
            gone.append(key)
        self._free.give(freed)
        note_changes(gone, self._removed, self._added)


def note_changes(keys: Sequence[bytes], into: dict[bytes, None], opposite: dict[bytes, None]) -> None:
    """What comes and goes between two reports is in neither."""
    if not opposite or opposite.keys().isdisjoint(keys):
        into.update(dict.fromkeys(keys))
        return
    for key in keys:
        if key in opposite:
            del opposite[key]
        else:
            into[key] = None
