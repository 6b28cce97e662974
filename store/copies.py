"""Copies of hot prefixes that the Conductor asked this node for: what to copy next.

    wished --next--> a chunk is under way --done--> its next chunk ... the last one, or one that was not whole --> over

One chunk at a time, the oldest wish first, so that requests come before copies at both nodes. A copy is a wish and no
promise: if the queue is full, the time is over, a block is missing or there is no room, it ends where it is. What was
copied until then is a shorter prefix, and good.
"""

from __future__ import annotations

from collections import deque

import msgspec

from mooncake.core.messages import CopyBlocks
from mooncake.core.types import NANOS_PER_S, KvSource

CHUNK_BLOCKS = 32
"""Claimed together at both nodes: some 100 MB of a large model."""
_NUM_WAITING_MAX = 16
"""The Conductor wishes when links are behind; more than this would come too late."""
_COPY_NS = 30 * NANOS_PER_S
"""From the wish to the last chunk's start. What is hot now need not be so then."""


class _Wish(msgspec.Struct):
    """num_done: blocks of chunks that are copied or under way."""

    message: CopyBlocks
    deadline: int
    num_done: int = 0


class Copies:
    """Sans-IO. `next` and `done` take turns."""

    def __init__(self) -> None:
        self.num_dropped = 0
        """Wishes that were not begun or not ended, because of the queue or the time."""
        self._wishes: deque[_Wish] = deque()
        self._is_busy = False

    def __len__(self) -> int:
        return len(self._wishes)

    def wish(self, message: CopyBlocks, now: int) -> None:
        """A wish that waits or is under way already is not a second one."""
        if not message.source.block_keys or any(wish.message == message for wish in self._wishes):
            return
        if len(self._wishes) >= _NUM_WAITING_MAX:
            self.num_dropped += 1
            return
        self._wishes.append(_Wish(message, now + _COPY_NS))

    def next(self, now: int) -> CopyBlocks | None:
        """The chunk to copy now; None if one is under way or nobody wishes anything."""
        while self._wishes and not self._is_busy:
            wish = self._wishes[0]
            if wish.deadline > now:
                self._is_busy = True
                return _next_chunk(wish)
            self._wishes.popleft()
            self.num_dropped += 1
        return None

    def done(self, *, whole: bool) -> None:
        """The chunk is over. whole: all its blocks are here now."""
        assert self._is_busy
        self._is_busy = False
        wish = self._wishes[0]
        if not whole or wish.num_done >= len(wish.message.source.block_keys):
            self._wishes.popleft()


def _next_chunk(wish: _Wish) -> CopyBlocks:
    source = wish.message.source
    block_tokens = source.num_tokens // len(source.block_keys)
    keys = source.block_keys[wish.num_done : wish.num_done + CHUNK_BLOCKS]
    wish.num_done += len(keys)
    chunk = KvSource(source.node, len(keys) * block_tokens, keys, addresses=source.addresses)
    return CopyBlocks(chunk, wish.message.shard)
