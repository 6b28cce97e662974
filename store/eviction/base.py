"""The shape that all policies share.

An object is named by its row, a small number that another object gets when this one is gone. The core tells a policy of every
object from its commit to its end:

    add ──▶ leased ──idle──▶ candidate ──hold──▶ leased ──discard──▶ (gone)
                                │
                                └──take──▶ (gone)

so that leased objects are never looked at and choosing needs no scan. Everything comes in batches, which are in chain order,
prefix first. `sizes` is a column: the bytes of an object by its row.

A block behind a missing one is worth nothing, so a suffix should go before its prefix. `Lru` and `Learned` do so; `Lru` as far
as leases are of whole chains, so that a prefix is used whenever a suffix is. The others are textbook policies, which know
nothing of chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    def __len__(self) -> int:
        """How many candidates there are."""
        ...

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        """New objects were committed; they are leased until `idle` says otherwise. parents: one for each, the row of the block
        before it in its chain. None: it is the first, or nobody knows, or that block is gone."""
        ...

    def hold(self, rows: Sequence[int]) -> None:
        """Candidates were leased: a use."""
        ...

    def idle(self, rows: Sequence[int]) -> None:
        """The last leases of these went; they are candidates."""
        ...

    def discard(self, rows: Sequence[int]) -> None:
        """Leased objects are gone, or need not be thought of any more."""
        ...

    def take(self, num_bytes: int, sizes: Sequence[int]) -> list[int]:
        """The candidates to evict next, no more than make up so many bytes, or all. They are gone with it."""
        ...
