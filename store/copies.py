"""Copies that this node was asked for, of hot prefixes by the Conductor, of lost replicas by the directory: what to copy next.

    wished --next--> a chunk is under way --done--> its next chunk ... the last one, or one that was not whole --> over

One chunk at a time, the oldest wish first, so that requests come before copies at both nodes. A copy is a wish and no
promise: if the queue is full, the time is over, an object of a chain is missing or there is no room, it ends where it is. What
was copied until then is a shorter prefix, and good.
"""

from __future__ import annotations

from collections import deque

import msgspec

from mooncake.core.types import NANOS_PER_S

CHUNK_OBJECTS = 32
"""Claimed together at both nodes: some 100 MB of a large model."""
_NUM_WAITING_MAX = 64
"""Wishes come when links are behind or nodes are lost; more than this would come too late."""
_COPY_NS = 30 * NANOS_PER_S
"""From the wish to the last chunk's start. What is hot now need not be so then."""


class Wish(msgspec.Struct, frozen=True):
    """Objects of another node. is_chain: what is behind a missing one is of no use."""

    node: str
    addresses: tuple[str, ...]
    keys: tuple[bytes, ...]
    is_chain: bool = True


class _Waiting(msgspec.Struct):
    """num_done: objects of chunks that are copied or under way."""

    wish: Wish
    deadline: int
    num_done: int = 0


class Copies:
    """Sans-IO. `next` and `done` take turns."""

    def __init__(self) -> None:
        self.num_dropped = 0
        """Wishes that were not begun or not ended, because of the queue or the time."""
        self._wishes: deque[_Waiting] = deque()
        self._is_busy = False

    def __len__(self) -> int:
        return len(self._wishes)

    def wish(self, wish: Wish, now: int) -> None:
        """A wish that waits or is under way already is not a second one."""
        if not wish.keys or any(waiting.wish == wish for waiting in self._wishes):
            return
        if len(self._wishes) >= _NUM_WAITING_MAX:
            self.num_dropped += 1
            return
        self._wishes.append(_Waiting(wish, now + _COPY_NS))

    def next(self, now: int) -> Wish | None:
        """The chunk to copy now; None if one is under way or nobody wishes anything."""
        while self._wishes and not self._is_busy:
            waiting = self._wishes[0]
            if waiting.deadline > now:
                self._is_busy = True
                return _next_chunk(waiting)
            self._wishes.popleft()
            self.num_dropped += 1
        return None

    def done(self, *, whole: bool) -> None:
        """The chunk is over. whole: all its objects are here now."""
        assert self._is_busy
        self._is_busy = False
        waiting = self._wishes[0]
        if (waiting.wish.is_chain and not whole) or waiting.num_done >= len(waiting.wish.keys):
            self._wishes.popleft()


def _next_chunk(waiting: _Waiting) -> Wish:
    keys = waiting.wish.keys[waiting.num_done : waiting.num_done + CHUNK_OBJECTS]
    waiting.num_done += len(keys)
    return msgspec.structs.replace(waiting.wish, keys=keys)
