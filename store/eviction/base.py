"""The shape that all policies share.

An object's number is its generation. The core tells a policy of every object from its commit to its end:

    add ──▶ leased ──idle──▶ candidate ──hold──▶ leased ──idle──▶ candidate ──discard──▶ (gone)

so that leased objects are never looked at and choosing needs no scan. Batches come in chain order, prefix first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    def add(self, number: int, key: bytes, size: int) -> None:
        """A new object was committed; it is leased until `idle` says otherwise."""
        ...

    def hold(self, number: int) -> None:
        """A candidate was leased: a use."""
        ...

    def idle(self, numbers: Sequence[int]) -> None:
        """The last leases of these went, in chain order; they are candidates."""
        ...

    def discard(self, number: int) -> None:
        """The object is gone, whether it was a candidate or leased."""
        ...

    def victim(self) -> int | None:
        """The candidate to evict next, or None if there is none. Choosing changes nothing."""
        ...
