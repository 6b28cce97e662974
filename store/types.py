"""The contracts of the store: what a client asks for and what it gets. See `mooncake.store.client.StoreClient`.

Objects are immutable and visible only after commit. A miss, a refusal, an unknown and an error are different things: a
miss and a refusal are values, an error is an exception of `mooncake.core.errors`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec


class PutMode(enum.IntEnum):
    """EQUIVALENT: the first commit wins, later ones are told EXISTS (KV blocks). STRICT: contents are compared by
    checksum and a difference is reported as CONFLICT."""

    EQUIVALENT = 0
    STRICT = 1


class PutStatus(enum.IntEnum):
    RESERVED = 0
    """Space is reserved; write the ranges, then commit."""
    EXISTS = 1
    """Committed already; with `lease` it is leased to the caller. Nothing to write."""
    REFUSED = 2
    """No room now (everything evictable is gone, the rest is leased, pinned or reserved)."""
    BUSY = 3
    """Strict puts only: another live writer has it reserved. Equivalent writers do not wait for each other: each gets
    space, and the first commit wins."""
    CONFLICT = 4
    """Strict put of other contents than those committed, or than can be compared: they were committed without a
    checksum."""


def num_existing(statuses: Sequence[PutStatus]) -> int:
    """How many leading objects of a put that was granted exist already."""
    return statuses.index(PutStatus.RESERVED) if PutStatus.RESERVED in statuses else len(statuses)


class CommitStatus(enum.IntEnum):
    COMMITTED = 0
    EXPIRED = 1
    """The reservation had run out; another writer may have the key. Its space is free now."""
    UNKNOWN = 2
    """Not a reservation of this client: never made, committed or cancelled before."""
    EXISTS = 3
    """Another writer's commit was first. This one's space is free again, and a lease that was asked for is of the other's."""


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where an object lies: offset in the segment of its node. `generation` changes whenever the space is reused."""

    offset: int
    size: int
    generation: int


class Places(msgspec.Struct, frozen=True):
    """Locations column by column, by key; numbers are generations. None in all three: there is none, as for a miss. checksums:
    if they were asked for, of the objects that have one. num_loaded: how many were read from SSD for the call."""

    offsets: tuple[int | None, ...]
    sizes: tuple[int | None, ...]
    numbers: tuple[int | None, ...]
    checksums: tuple[int | None, ...] = ()
    num_loaded: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def locations(self) -> list[Location | None]:
        return [
            None if offset is None or size is None or number is None else Location(offset, size, number)
            for offset, size, number in zip(self.offsets, self.sizes, self.numbers, strict=True)
        ]


class Puts(Places, frozen=True):
    """Answer to a reserve call. A place is there for those RESERVED, and for those that EXIST and were leased."""

    statuses: tuple[PutStatus, ...] = ()
