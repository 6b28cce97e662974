"""Which objects are where, in about 130 bytes for each of a million.

A key leads to a small number, the number of a *set* of holders. There are few different sets, as most objects are held by one
node in one tier; and how one set becomes another is remembered, so that a change costs two look-ups. Dictionaries of bytes and
numbers are no work for the garbage collector, however long they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from mooncake.core.types import Tier

NOBODY = 0
"""The empty set, which no key has."""
SWEEP_KEYS = 50_000
"""Looked at in one step of a sweep: some 5 ms."""


class Holder(NamedTuple):
    """A tier of one life of a node. node: a number that no other life has."""

    node: int
    tier: Tier


class Holders:
    def __init__(self) -> None:
        self.sets: list[tuple[Holder, ...]] = [()]
        """By number. A set that has lost members of dead nodes keeps its number."""
        self._numbers: dict[tuple[Holder, ...], int] = {(): NOBODY}
        self._by_key: dict[bytes, int] = {}
        self._with: dict[Holder, dict[int, int]] = {}
        self._without: dict[Holder, dict[int, int]] = {}
        self._dead: dict[int, None] = {}
        """Nodes whose keys are still to be swept."""
        self._swept = 0
        self._found = False

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, holder: Holder, keys: Iterable[bytes]) -> None:
        by_key, after = self._by_key, self._with.setdefault(holder, {})
        for key in keys:
            before = by_key.get(key, NOBODY)
            number = after.get(before)
            if number is None:
                number = after[before] = self._number((*self.sets[before], holder))
            by_key[key] = number

    def remove(self, holder: Holder, keys: Iterable[bytes]) -> None:
        """Keys that it does not have are passed over."""
        by_key, after = self._by_key, self._without.setdefault(holder, {})
        for key in keys:
            before = by_key.get(key)
            if before is None:
                continue
            number = after.get(before)
            if number is None:
                rest = tuple([each for each in self.sets[before] if each != holder])
                number = after[before] = self._number(rest)
            if number == NOBODY:
                del by_key[key]
            else:
                by_key[key] = number

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """By key, the number of its set."""
        get = self._by_key.get
        return [get(key, NOBODY) for key in keys]

    def of(self, holder: Holder) -> Iterator[bytes]:
        """All its keys: looks at every key there is."""
        numbers = {number for number, each in enumerate(self.sets) if holder in each}
        if not numbers:
            return iter(())
        return (key for key, number in self._by_key.items() if number in numbers)

    # ------------------------------------------------------------ dead nodes

    def bury(self, node: int) -> None:
        """Nobody finds it any more. Its keys go by and by, by `sweep`."""
        self._dead[node] = None
        for number, members in enumerate(self.sets):
            if any(each.node == node for each in members):
                self.sets[number] = tuple([each for each in members if each.node != node])
        for table in (self._with, self._without):
            for holder in [holder for holder in table if holder.node == node]:
                del table[holder]
            for after in table.values():
                after.clear()
        self._numbers = {members: number for number, members in reversed(list(enumerate(self.sets)))}
        self._swept, self._found = 0, False

    @property
    def sweeping(self) -> bool:
        return bool(self._dead)

    def sweep(self) -> None:
        """One step. A pass is repeated if it found anything, since keys that came and went meanwhile make it miss some."""
        empty = {number for number, members in enumerate(self.sets) if not members}
        part = list(islice(self._by_key.items(), self._swept, self._swept + SWEEP_KEYS))
        gone = [key for key, number in part if number in empty]
        for key in gone:
            del self._by_key[key]
        self._found = self._found or bool(gone)
        self._swept += len(part) - len(gone)
        if len(part) < SWEEP_KEYS:
            if not self._found:
                self._dead.clear()
            self._swept, self._found = 0, False

    def _number(self, members: Iterable[Holder]) -> int:
        """Of a set, in order: memory before SSD, then by node."""
        ordered = tuple(sorted(set(members), key=lambda each: (each.tier, each.node)))
        number = self._numbers.get(ordered)
        if number is None:
            number = self._numbers[ordered] = len(self.sets)
            self.sets.append(ordered)
        return number

    def check_integrity(self) -> None:
        assert all(0 < number < len(self.sets) for number in self._by_key.values()), "a key of no set"
        if not self._dead:
            assert all(self.sets[number] for number in self._by_key.values()), "a key that nobody holds"
