"""A client's table: what it reads just now, and what it has read. The client is the only writer, the node reads.

    header  magic | process id | claims in use, at most so many | copies under way | uses so far | 0 ...    8 words
    claims  the number of each leased object, 0 for none                                                  CLAIMS words
    uses    a ring of rows, the first of each batch marked: what the node's eviction should know          USES words

The file belongs to the client, which holds an exclusive lock of it as long as it lives. So a node sees the end of a client,
however it came about, by trying the lock; and a node that starts anew finds the claims of clients that still live.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import stat
from collections.abc import Iterable, Sequence

from mooncake.core.errors import SegmentError
from mooncake.store.local.memory import Fence, words
from mooncake.transport.shm import try_lock

CLAIMS = 16_384
"""Leases of one client at a time; for more it asks the node, who counts them without a bound."""
USES = 8192
"""Uses between two looks of the node. Of more only the last are known, which is what matters to eviction."""
WORD = 8
TABLE_BYTES = WORD * (8 + CLAIMS + USES)
FIRST_OF_BATCH = 1 << 63
_MAGIC = int.from_bytes(b"MOONTAB1", "little")
_PID, _IN_USE, _COPYING, _USED = 1, 2, 3, 4
_SEPARATOR = "@"
"""Between the segment's path and what tells its clients apart; in no name of a cluster or node."""


def table_prefix(segment_path: str) -> str:
    return segment_path + _SEPARATOR


class ClientTable:
    """The client's side. Not for several threads at once: its owner has a lock."""

    def __init__(self, segment_path: str) -> None:
        """Raises SegmentError if there is no room for it."""
        self.path = f"{table_prefix(segment_path)}{os.getpid():x}-{secrets.token_hex(4)}"
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try_lock(self._fd)
            os.posix_fallocate(self._fd, 0, TABLE_BYTES)
            self._map = mmap.mmap(self._fd, TABLE_BYTES)
        except OSError as error:
            raise SegmentError(f"cannot make {self.path}: {error.strerror}") from error
        self._header, self._claims, self._uses = _parts(memoryview(self._map))
        self._free = list(range(CLAIMS - 1, -1, -1))
        """A stack: those used before come first, so the node has few to look at."""
        self._fence = Fence()
        self._header[_PID] = os.getpid()
        self._header[0] = _MAGIC

    @property
    def num_claims(self) -> int:
        return CLAIMS - len(self._free)

    def claim(self, numbers: Sequence[int]) -> list[int] | None:
        """Slots, one for each; None if there are not so many. They count only if the entries, looked at after this, still have
        these numbers."""
        free, claims = self._free, self._claims
        if len(numbers) > len(free):
            return None
        slots = free[-len(numbers) :]
        del free[-len(numbers) :]
        highest = max(slots)
        if highest >= self._header[_IN_USE]:
            self._header[_IN_USE] = highest + 1
        for slot, number in zip(slots, numbers, strict=True):
            claims[slot] = number
        self._fence()
        return slots

    def release(self, slots: Iterable[int]) -> None:
        claims, free = self._claims, self._free
        for slot in slots:
            claims[slot] = 0
            free.append(slot)
        if len(free) == CLAIMS:
            self._header[_IN_USE] = 0  # the node has nothing to look at

    def begin_copy(self) -> None:
        """Into the segment. Whoever begins looks at the segment's epoch afterwards: if that is another, there may be a node
        that did not see this, and the space may be somebody else's."""
        self._header[_COPYING] += 1
        self._fence()

    def end_copy(self) -> None:
        self._header[_COPYING] -= 1

    def use(self, rows: Sequence[int]) -> None:
        """These were read, in chain order."""
        ring, at = self._uses, self._header[_USED]
        mark = FIRST_OF_BATCH
        for row in rows:
            ring[at % USES] = row | mark
            mark = 0
            at += 1
        self._header[_USED] = at

    def close(self) -> None:
        """Claims go with it. Nobody may read a leased view any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        for view in (self._header, self._claims, self._uses):
            view.release()
        os.close(self._fd)
        with contextlib.suppress(BufferError):
            self._map.close()


class TableReader:
    """The node's side. Raises SegmentError for a file that is no client's table of this segment."""

    def __init__(self, path: str, segment_path: str) -> None:
        name = path.removeprefix(table_prefix(segment_path))
        if name == path or "/" in name:
            raise SegmentError(f"{path} is no client's table of {segment_path}")
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise SegmentError(f"cannot open {path}: {error.strerror}") from error
        try:
            status = os.fstat(self._fd)
            if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode) or status.st_size != TABLE_BYTES:
                raise SegmentError(f"{path} is no client's table")
            self._map = mmap.mmap(self._fd, TABLE_BYTES, prot=mmap.PROT_READ)
            self._header, self._claims, self._uses = _parts(memoryview(self._map))
            if self._header[0] != _MAGIC:
                raise SegmentError(f"{path} is not ready")
        except BaseException:
            os.close(self._fd)
            raise
        self._seen = 0

    def claims(self) -> list[int]:
        """What the client has claimed now, and zeros: a copy, as it may change at any moment."""
        return self._claims[: min(self._header[_IN_USE], CLAIMS)].tolist()

    @property
    def num_copies(self) -> int:
        """Into the segment, under way."""
        return self._header[_COPYING]

    def take_uses(self) -> list[list[int]]:
        """Batches of rows, since the last time. What the client writes meanwhile may be torn between two batches, which costs
        nothing but a little order."""
        used = self._header[_USED]
        if used == self._seen:
            return []
        batches: list[list[int]] = []
        for at in range(max(self._seen, used - USES), used):
            word = self._uses[at % USES]
            if word & FIRST_OF_BATCH or not batches:
                batches.append([])
            batches[-1].append(word & ~FIRST_OF_BATCH)
        self._seen = used
        return batches

    def is_abandoned(self) -> bool:
        """Whether the client is dead, or has closed the table."""
        return try_lock(self._fd)

    def close(self, *, unlink: bool) -> None:
        if unlink:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        for view in (self._header, self._claims, self._uses):
            view.release()
        os.close(self._fd)
        with contextlib.suppress(BufferError):
            self._map.close()


def _parts(memory: memoryview) -> tuple[memoryview, memoryview, memoryview]:
    table = words(memory)
    return table[:8], table[8 : 8 + CLAIMS], table[8 + CLAIMS :]
