"""The page pool: which pages of an engine's KV memory belong to which sequence, and which blocks they hold.

A block is a whole number of pages. A page is free, or held by sequences (counted), or holds a cached block that nobody uses;
the last kind is evicted, least recently used and suffix first, when free pages run out.

    free --allocate--> held --free--> cached (if its block was published) or free
    cached --acquire--> held          cached --evict--> free

Where pages lie is the business of `mooncake.engine.free_pages`. It never decides whether an allocation succeeds; only the
number of pages does.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from mooncake.engine.free_pages import AnyPages, FreePages, PageRuns
from mooncake.store.reports import Changes


class _Held:
    """Pages of a sequence in order, and the keys of its leading blocks: of those that it found cached, and of those that it
    published. None where another copy of the same block is the cached one."""

    __slots__ = ("keys", "pages")

    def __init__(self, keys: Sequence[bytes], pages: list[int]) -> None:
        self.keys: list[bytes | None] = [*keys]
        self.pages = pages


class PagePool:
    """row_pages: distance of preferred starting pages, or None where contiguity does not matter.

    Most blocks have one holder at most, and a sequence's blocks come and go together. So what is done for a sequence is done for
    all its blocks at once; only blocks with several holders are counted one by one."""

    def __init__(self, num_pages: int, page_tokens: int, block_tokens: int, row_pages: int | None = 1) -> None:
        if block_tokens % page_tokens:
            raise ValueError(f"block_tokens {block_tokens} is not a multiple of page_tokens {page_tokens}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.block_pages = block_tokens // page_tokens
        self._free: FreePages = AnyPages(num_pages) if row_pages is None else PageRuns(num_pages, row_pages)
        self._held: dict[int, _Held] = {}
        self._blocks: dict[bytes, tuple[int, ...]] = {}
        """Pages of all cached blocks, held or not."""
        self._more_holders: dict[bytes, int] = {}
        """Of blocks with several holders: how many beside one."""
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        self._changes = Changes()

    @property
    def num_free(self) -> int:
        """Pages that an allocation can get: free ones and those of unused cached blocks."""
        return self._free.num_free + len(self._unused) * self.block_pages

    def pages(self, seq: int) -> list[int]:
        return self._held[seq].pages

    def holders(self) -> set[int]:
        return set(self._held)

    def match(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks that are cached here."""
        found = [*map(self._blocks.get, keys)]
        return found.index(None) if None in found else len(found)

    def allocate(self, seq: int, keys: Sequence[bytes], num_tokens: int) -> bool:
        """Give a new sequence the cached blocks `keys` (all cached, see `match`) and pages up to num_tokens.

        All or nothing: False changes nothing."""
        wanted = -(-num_tokens // self.page_tokens) - len(keys) * self.block_pages
        unused, more_holders = self._unused, self._more_holders
        num_unused = sum(map(unused.__contains__, keys))
        if wanted > self.num_free - num_unused * self.block_pages:
            return False
        for key in keys:
            if key in unused:
                del unused[key]
            else:
                more_holders[key] = more_holders.get(key, 0) + 1
        pages = [*chain.from_iterable(map(self._blocks.__getitem__, keys))]
        self._held[seq] = _Held(keys, pages)
        self._append(pages, wanted)
        return True

    def extend(self, seq: int, num_tokens: int) -> bool:
        """Make the sequence's pages hold num_tokens tokens. False, and nothing changed, if there are not enough pages."""
        pages = self._held[seq].pages
        wanted = -(-num_tokens // self.page_tokens) - len(pages)
        if wanted <= 0:
            return True
        if wanted > self.num_free:
            return False
        self._append(pages, wanted)
        return True

    def publish(self, seq: int, first: int, keys: Sequence[bytes]) -> None:
        """Blocks from `first` on, which follow those that were published before, are computed: others may reuse them. A key that
        is cached already is left alone."""
        held = self._held[seq]
        keys = keys[len(held.keys) - first :]
        first, size = len(held.keys), self.block_pages
        if not keys:
            return
        blocks = zip(keys, self._in_blocks(held.pages[first * size : (first + len(keys)) * size]), strict=True)
        if self._blocks.keys().isdisjoint(keys):
            held.keys += keys
        else:
            held.keys += [None if key in self._blocks else key for key in keys]
            blocks = [(key, pages) for key, pages in blocks if key not in self._blocks]
            keys = [key for key, _ in blocks]
        self._blocks.update(blocks)
        self._changes.gained.append(keys)

    def free(self, seq: int) -> None:
        """The sequence lets go of its pages. Published blocks stay cached while nobody needs the room."""
        held = self._held.pop(seq)
        freed = held.pages[len(held.keys) * self.block_pages :]
        keys: list[bytes] = held.keys
        if None in held.keys:
            blocks = zip(held.keys, self._in_blocks(held.pages), strict=False)
            freed += chain.from_iterable([pages for key, pages in blocks if key is None])
            keys = [key for key in held.keys if key is not None]
        if self._more_holders:
            keys = self._let_go_shared(keys)
        # Backwards, so that the suffix is the least recently used.
        self._unused.update(dict.fromkeys(reversed(keys)))
        if freed:
            self._free.give(freed)

    def drain_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys (added, removed) since the last call; one that came and went is in neither."""
        return self._changes.take()

    def cached_keys(self) -> tuple[bytes, ...]:
        return tuple(self._blocks)

    def check_integrity(self) -> None:
        """Raises AssertionError if a conservation law is broken: free + held + unused = all; counts agree."""
        holders = Counter([key for held in self._held.values() for key in held.keys if key is not None])
        assert self._unused.keys() | holders.keys() == self._blocks.keys(), "a cached block is neither held nor unused"
        assert self._unused.keys().isdisjoint(holders), "an unused block is held"
        more_holders = {key: count - 1 for key, count in holders.items() if count > 1}
        assert more_holders == self._more_holders, "counts differ from holders"
        used = np.zeros(self.num_pages, dtype=np.int64)
        for pages in self._blocks.values():
            used[[*pages]] += 1
        for held in self._held.values():
            assert len(set(held.pages)) == len(held.pages), "a sequence holds a page twice"
            for at in range(0, len(held.pages), self.block_pages):
                pages, index = held.pages[at : at + self.block_pages], at // self.block_pages
                key = held.keys[index] if index < len(held.keys) else None
                if key is None:
                    used[pages] += 1
                else:
                    assert self._blocks[key] == tuple(pages), "a sequence holds other pages than the block's"
        assert used.max(initial=0) <= 1, "a page is of two blocks"
        self._free.check_integrity(used > 0)

    def _in_blocks(self, pages: Sequence[int]) -> Iterable[tuple[int, ...]]:
        """The pages of each whole block."""
        return zip(*[iter(pages)] * self.block_pages, strict=False)

    def _let_go_shared(self, keys: list[bytes]) -> list[bytes]:
        """Of what a sequence lets go of, the blocks that nobody else holds."""
        more_holders = self._more_holders
        shared = [key for key in keys if key in more_holders]
        if not shared:
            return keys
        for key in shared:
            more_holders[key] -= 1
            if not more_holders[key]:
                del more_holders[key]
        still_held = dict.fromkeys(shared)
        return [key for key in keys if key not in still_held]

    def _append(self, pages: list[int], count: int) -> None:
        if count > self._free.num_free:
            self._evict(count - self._free.num_free)
        pages += self._free.take(count, pages[-1] if pages else None)

    def _evict(self, num_pages: int) -> None:
        unused, blocks = self._unused, self._blocks
        gone = [unused.popitem(last=False)[0] for _ in range(-(-num_pages // self.block_pages))]
        self._free.give([*chain.from_iterable(map(blocks.pop, gone))])
        self._changes.lost.append(gone)
