"""Space that a client has been granted and has not used: so a put asks the node once, to name what it has written.

    put:  take ──▶ write, and on the way ask for as much again ──▶ Name: committed ──▶ collect

By the time that what was written has its name, the space for the next put is there.

A grant is a reservation like any other: it ends with the connection. It is known by the bytes that it has, which are a size
rounded up to the node's alignment.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from mooncake.store.handles import Link
from mooncake.store.types import Places

GRANTED_BYTES_MAX = 64 << 20
GRANTED_SHARE = 32
"""Of one client: not more than a 32nd of the node's memory. A batch of more than half of that reserves as it comes, which
costs little beside writing it."""


def granted_max(capacity: int) -> int:
    return min(GRANTED_BYTES_MAX, capacity // GRANTED_SHARE)


class Slot(NamedTuple):
    number: int
    offset: int


class Grants:
    """Of one connection at a time, the present one. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._slots: dict[int, list[Slot]] = {}
        self._num_bytes = 0
        self._posted: list[tuple[int, tuple[int, ...]]] = []

    @property
    def num_bytes(self) -> int:
        """That are here, or on their way."""
        with self._lock:
            return self._num_bytes + sum([sum(extents) for _, extents in self._posted])

    def note_posted(self, link: Link, number: int, extents: tuple[int, ...]) -> None:
        """A Grant of these is on its way, under that number."""
        with self._lock:
            if link is self._link:
                self._posted.append((number, extents))

    def take_posted(self, link: Link) -> list[tuple[int, tuple[int, ...]]]:
        """To be collected now, by whoever asks first."""
        with self._lock:
            posted: list[tuple[int, tuple[int, ...]]] = []
            if link is self._link:
                posted, self._posted = self._posted, posted
            return posted

    def take(self, link: Link, extents: Sequence[int]) -> list[Slot] | None:
        """A slot for each, or None if there is not one for each."""
        with self._lock:
            if link is not self._link:
                self._link, self._slots, self._num_bytes, self._posted = link, {}, 0, []
            taken: list[Slot] = []
            for at, extent in enumerate(extents):
                slots = self._slots.get(extent)
                if not slots:
                    for other, slot in zip(extents[:at], taken, strict=True):
                        self._slots[other].append(slot)
                    return None
                taken.append(slots.pop())
            self._num_bytes -= sum(extents)
            return taken

    def give(self, link: Link, extents: Sequence[int], slots: Sequence[Slot | None]) -> None:
        """None for one that was not granted. They are taken as they come here, so that a batch has numbers in a row."""
        with self._lock:
            if link is not self._link:
                return
            for extent, slot in zip(reversed(extents), reversed(slots), strict=True):
                if slot is not None:
                    self._slots.setdefault(extent, []).append(slot)
                    self._num_bytes += extent


def slots_of(granted: Places) -> list[Slot | None]:
    return [
        None if number is None or offset is None else Slot(number, offset)
        for number, offset in zip(granted.numbers, granted.offsets, strict=True)
    ]
