"""Blocks that are loaded before their sequence comes, while it is still being prefilled elsewhere.

    waiting --its next block is loaded by nobody else, and there is room--> loading --> published, and let go
       |
       +--- no room, or what came before it is gone: dropped

Such a load holds pages only while it is under way. After that its blocks are cached like those of a sequence that ended:
whoever needs the pages evicts them, and the sequence finds what is left. So nothing depends on it, nobody needs to take it
back, and each block is loaded ahead at most once.
"""

from __future__ import annotations

from collections.abc import Iterator

from mooncake.engine.page_pool import PagePool

_RESERVE = 4
"""Of so many pages, one is left to sequences: they must not have to wait for a load that is not theirs."""


class AheadLoad:
    """The blocks [first, len(keys)) of a sequence; before it is loading, `first` is how many must be here already."""

    __slots__ = ("first", "keys", "seq")

    def __init__(self, seq: int, keys: tuple[bytes, ...], first: int) -> None:
        self.seq = seq
        self.keys = keys
        self.first = first


class AheadLoads:
    """loading_blocks: keys of all blocks that anybody is loading, shared with the engine core."""

    def __init__(self, pool: PagePool, loading_blocks: dict[bytes, None]) -> None:
        self.waiting: list[AheadLoad] = []
        self.loading: dict[int, AheadLoad] = {}
        self._pool = pool
        self._loading_blocks = loading_blocks
        self._reserved = pool.num_pages // _RESERVE

    def __len__(self) -> int:
        return len(self.waiting) + len(self.loading)

    def start(self, room: bool) -> tuple[list[AheadLoad], list[int]]:
        """room: no sequence waits for pages. Those that begin to load now, and the numbers of those that were dropped."""
        started: list[AheadLoad] = []
        dropped: list[int] = []
        still: list[AheadLoad] = []
        for load in self.waiting:
            keys = load.keys
            matched = self._pool.match(keys)
            if matched < len(keys) and keys[matched] in self._loading_blocks:
                still.append(load)
            elif room and load.first <= matched < len(keys) and self._allocate(load, matched):
                started.append(load)
            else:
                dropped.append(load.seq)
        self.waiting = still
        return started, dropped

    def end(self, seq: int, ok: bool) -> int:
        """The load is over; how many blocks came."""
        load = self.loading.pop(seq)
        new = load.keys[load.first :]
        for key in new:
            del self._loading_blocks[key]
        if ok:
            self._pool.publish(seq, load.first, new)
        self._pool.free(seq)
        return len(new) if ok else 0

    def loading_keys(self) -> Iterator[bytes]:
        for load in self.loading.values():
            yield from load.keys[load.first :]

    def _allocate(self, load: AheadLoad, matched: int) -> bool:
        pool, keys = self._pool, load.keys
        num_pages = len(keys) * pool.block_pages
        if num_pages + self._reserved > pool.num_free:
            return False
        if not pool.allocate(load.seq, keys[:matched], num_pages * pool.page_tokens):
            return False
        load.first = matched
        self.loading[load.seq] = load
        self._loading_blocks.update(dict.fromkeys(keys[matched:]))
        return True
