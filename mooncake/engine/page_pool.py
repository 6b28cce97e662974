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
from collections.abc import Iterator, Sequence

import numpy as np

from mooncake.engine.free_pages import AnyPages, FreePages, PageRuns
from mooncake.store.reports import Changes

Keys = tuple[bytes, ...]


class _Run:
    """Cached blocks that follow each other in a chain, always have had the same holders, and were let go of together."""

    __slots__ = ("keys", "num_holders", "pages")

    def __init__(self, keys: Keys, pages: list[int], num_holders: int) -> None:
        self.keys = keys
        self.pages = pages
        self.num_holders = num_holders


class _Held:
    """Pages of a sequence in order: first those of num_known blocks, which it found cached or published; then its own. parts:
    keys of the known blocks as far as it is their copy that is cached; of the others, duplicates has the pages."""

    __slots__ = ("duplicates", "num_known", "pages", "parts")

    def __init__(self, keys: Keys, pages: list[int]) -> None:
        self.pages = pages
        self.num_known = len(keys)
        self.parts = [keys]
        self.duplicates: list[int] = []


class PagePool:
    """row_pages: distance of preferred starting pages, or None where contiguity does not matter.

    Blocks are cached by runs: what a sequence finds, takes and lets go of is a few of them, however long it is. A run is split
    where a sequence shares only its beginning."""

    def __init__(self, num_pages: int, page_tokens: int, block_tokens: int, row_pages: int | None = 1) -> None:
        if block_tokens % page_tokens:
            raise ValueError(f"block_tokens {block_tokens} is not a multiple of page_tokens {page_tokens}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.block_pages = block_tokens // page_tokens
        self._free: FreePages = AnyPages(num_pages) if row_pages is None else PageRuns(num_pages, row_pages)
        self._held: dict[int, _Held] = {}
        self._run_of: dict[bytes, _Run] = {}
        """By key, of all cached blocks."""
        self._unused: OrderedDict[_Run, None] = OrderedDict()
        """Runs that nobody holds, the least recently used first."""
        self._unused_pages = 0
        self._changes = Changes()

    @property
    def num_free(self) -> int:
        """Pages that an allocation can get: free ones and those of unused cached blocks."""
        return self._free.num_free + self._unused_pages

    def pages(self, seq: int) -> list[int]:
        return self._held[seq].pages

    def holders(self) -> set[int]:
        return set(self._held)

    def match(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks that are cached here."""
        return sum([count for _, _, count in self._find(tuple(keys))])

    def allocate(self, seq: int, keys: Sequence[bytes], num_tokens: int) -> bool:
        """Give a new sequence the cached blocks `keys` (all cached, see `match`) and pages up to num_tokens.

        All or nothing: False changes nothing."""
        keys = tuple(keys)
        found = [*self._find(keys)]
        reused_pages = sum([count for run, _, count in found if not run.num_holders]) * self.block_pages
        wanted = -(-num_tokens // self.page_tokens) - len(keys) * self.block_pages
        if wanted > self.num_free - reused_pages:
            return False
        pages: list[int] = []
        for run, first, count in found:
            held = run if count == len(run.keys) else self._cut_out(run, first, count)
            self._unused.pop(held, None)
            held.num_holders += 1
            pages += held.pages
        self._unused_pages -= reused_pages
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
        """Blocks from `first` on, which follow those that are known already, are computed: others may reuse them. A key that is
        cached already is left alone."""
        held = self._held[seq]
        new = tuple(keys[held.num_known - first :])
        if self._run_of.keys().isdisjoint(new):
            self._publish(held, new)
        else:
            for key in new:
                self._publish(held, (key,))

    def free(self, seq: int) -> None:
        """The sequence lets go of its pages. Published blocks stay cached while nobody needs the room."""
        held = self._held.pop(seq)
        for keys in reversed(held.parts):
            # Backwards, so that the suffix is the least recently used.
            for run in reversed([*self._runs(keys)]):
                run.num_holders -= 1
                if not run.num_holders:
                    self._unused[run] = None
                    self._unused_pages += len(run.pages)
        self._free.give(held.pages[held.num_known * self.block_pages :] + held.duplicates)

    def drain_changes(self) -> tuple[Keys, Keys]:
        """Keys (added, removed) since the last call; one that came and went is in neither."""
        return self._changes.take()

    def cached_keys(self) -> Keys:
        return tuple(self._run_of)

    def check_integrity(self) -> None:
        """Raises AssertionError if a conservation law is broken: free + held + unused = all; counts agree."""
        size, runs = self.block_pages, dict.fromkeys(self._run_of.values())
        assert Counter([key for run in runs for key in run.keys]) == Counter([*self._run_of]), "a key is in two runs"
        assert all(len(run.pages) == len(run.keys) * size for run in runs), "a run has other pages than its blocks"
        parts = [keys for held in self._held.values() for keys in held.parts]
        holders = Counter([run for keys in parts for run in self._runs(keys)])
        assert {run: run.num_holders for run in runs if run.num_holders} == holders, "counts differ from holders"
        assert self._unused.keys() == runs.keys() - holders.keys(), (
            "an unused run is held, or one that nobody holds is not unused"
        )
        assert self._unused_pages == sum([len(run.pages) for run in self._unused]), "unused pages do not add up"
        used = [page for run in runs for page in run.pages]
        for held in self._held.values():
            cached = [page for keys in held.parts for run in self._runs(keys) for page in run.pages]
            known = held.pages[: held.num_known * size]
            assert sorted(cached + held.duplicates) == sorted(known), "a sequence has other pages than its blocks"
            used += held.duplicates + held.pages[held.num_known * size :]
        assert len(set(used)) == len(used), "a page is of two blocks"
        is_used = np.zeros(self.num_pages, dtype=np.bool_)
        is_used[used] = True
        self._free.check_integrity(is_used)

    def _find(self, keys: Keys) -> Iterator[tuple[_Run, int, int]]:
        """The runs that the leading keys lie in, from where (from the first block on, if keys are those of one chain), and how
        many in each."""
        at = 0
        while at < len(keys) and (run := self._run_of.get(keys[at])) is not None:
            first = run.keys.index(keys[at])
            theirs = run.keys[first:] if first else run.keys
            count = _num_equal(keys[at : at + len(theirs)], theirs)
            yield run, first, count
            if count < len(theirs):
                return
            at += count

    def _runs(self, keys: Keys) -> Iterator[_Run]:
        """Those that somebody holds who holds these keys: none of them goes beyond."""
        at = 0
        while at < len(keys):
            run = self._run_of[keys[at]]
            yield run
            at += len(run.keys)

    def _cut_out(self, run: _Run, first: int, count: int) -> _Run:
        """A run of these blocks alone, which somebody is about to hold."""
        if first:
            before = self._split(run, first)
            if not before.num_holders:
                self._unused[before] = None
        return run if count == len(run.keys) else self._split(run, count)

    def _split(self, run: _Run, count: int) -> _Run:
        """A new run of its first blocks. The rest remains where it is in the order of use."""
        num_pages = count * self.block_pages
        front = _Run(run.keys[:count], run.pages[:num_pages], run.num_holders)
        run.keys, run.pages = run.keys[count:], run.pages[num_pages:]
        self._run_of.update(dict.fromkeys(front.keys, front))
        return front

    def _publish(self, held: _Held, keys: Keys) -> None:
        """All of them new, or one that is cached already."""
        first, size = held.num_known, self.block_pages
        pages = held.pages[first * size : (first + len(keys)) * size]
        held.num_known += len(keys)
        if not keys or keys[0] in self._run_of:
            held.duplicates += pages
            return
        self._run_of.update(dict.fromkeys(keys, _Run(keys, pages, 1)))
        held.parts.append(keys)
        self._changes.gained.append(keys)

    def _append(self, pages: list[int], count: int) -> None:
        if count > self._free.num_free:
            self._evict(count - self._free.num_free)
        pages += self._free.take(count, pages[-1] if pages else None)

    def _evict(self, num_pages: int) -> None:
        freed: list[int] = []
        while len(freed) < num_pages:
            run = next(iter(self._unused))
            num_kept = max(0, len(run.keys) - -(-(num_pages - len(freed)) // self.block_pages))
            gone, kept_pages = run.keys[num_kept:], num_kept * self.block_pages
            freed += run.pages[kept_pages:]
            run.keys, run.pages = run.keys[:num_kept], run.pages[:kept_pages]
            if not num_kept:
                del self._unused[run]
            for key in gone:
                del self._run_of[key]
            self._changes.lost.append(gone[::-1])
        self._unused_pages -= len(freed)
        self._free.give(freed)


def _num_equal(ours: Keys, theirs: Keys) -> int:
    """Leading keys in common; there are no more of ours than of theirs."""
    if ours == theirs[: len(ours)]:
        return len(ours)
    return next(at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
