"""What one client holds: reservations to write, leases to read. Numbers are what it knows of an object, rows are where it is.

A call reserves or leases a batch, and most of them are committed and released as they came, in whole batches or slices of them.
So a batch stays in one piece, and numbers are looked at one by one only where a client does it another way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from mooncake.store.quotas import Tenant

_Lease = tuple[tuple[int, ...], Sequence[int]]
"""numbers, rows"""


class Reservations:
    """Of one call: numbers in a row, which run out together. rows: None for those that are committed or cancelled.
    is_late: they have run out."""

    __slots__ = ("expires_at", "is_late", "num_open", "numbers", "rows")

    def __init__(self, numbers: tuple[int, ...], rows: Sequence[int], expires_at: int) -> None:
        self.numbers = numbers
        self.rows: list[int | None] = [*rows]
        self.num_open = len(rows)
        self.expires_at = expires_at
        self.is_late = False

    def open_rows(self) -> list[int]:
        return [row for row in self.rows if row is not None]

    def row_of(self, number: int) -> int | None:
        """number: one of them, open or not."""
        return self.rows[number - self.numbers[0]]

    def live_rows(self, numbers: tuple[int, ...]) -> list[int] | None:
        """The rows, if all of these are open, follow each other and have not run out."""
        at = numbers[0] - self.numbers[0]
        end = at + len(numbers)
        rows = self.rows[at:end]
        if self.is_late or None in rows or self.numbers[at:end] != numbers:
            return None
        return rows  # type: ignore[return-value]

    def close(self, number: int, count: int) -> None:
        """That many from this one on, all of them open."""
        at = number - self.numbers[0]
        self.rows[at : at + count] = [None] * count
        self.num_open -= count


class Claims:
    """aliases: numbers of reservations that lost against another writer, to the row of the winner, of which the client has
    a lease instead. num_leases: aliases not included. tenant: whose quota what it puts counts for."""

    __slots__ = ("_counts", "_firsts", "_leases", "_reserved", "_rows", "aliases", "num_leases", "tenant")

    def __init__(self) -> None:
        self.tenant: Tenant | None = None
        self.aliases: dict[int, int] = {}
        self.num_leases = 0
        self._reserved: list[Reservations] = []
        self._firsts: list[int] = []
        """Their first numbers, ascending."""
        self._leases: dict[int, list[_Lease]] = {}
        """By the last number of each, which is its most special one: chains begin alike."""
        self._rows: dict[int, int] = {}
        """By number, what is leased one by one, and in `_counts` how often."""
        self._counts: dict[int, int] = {}

    # ------------------------------------------------------------ reservations

    @property
    def num_reservations(self) -> int:
        return sum([reservations.num_open for reservations in self._reserved])

    def reserve(self, reservations: Reservations) -> None:
        """Numbers grow from call to call."""
        self._reserved.append(reservations)
        self._firsts.append(reservations.numbers[0])

    def reserved_with(self, number: int) -> Reservations | None:
        """The call that this number was reserved by, if not all of that is closed."""
        at = bisect_right(self._firsts, number) - 1
        if at < 0:
            return None
        reservations = self._reserved[at]
        return reservations if number <= reservations.numbers[-1] else None

    def close(self, reservations: Reservations, number: int, count: int) -> None:
        """That many from this one on are reserved no more."""
        reservations.close(number, count)
        if not reservations.num_open:
            at = bisect_left(self._firsts, reservations.numbers[0])
            del self._reserved[at], self._firsts[at]

    def take_reserved(self, number: int) -> int | None:
        """The row of a reservation that is closed with it, or None if there is none."""
        reservations = self.reserved_with(number)
        row = None if reservations is None else reservations.row_of(number)
        if reservations is not None and row is not None:
            self.close(reservations, number, 1)
        return row

    def writable_row(self, number: int) -> int | None:
        reservations = self.reserved_with(number)
        return None if reservations is None or reservations.is_late else reservations.row_of(number)

    def reserved_rows(self) -> list[tuple[int, int]]:
        """(number, row)"""
        pairs = [pair for each in self._reserved for pair in zip(each.numbers, each.rows, strict=True)]
        return [(number, row) for number, row in pairs if row is not None]

    # ------------------------------------------------------------ leases

    def lease(self, numbers: tuple[int, ...], rows: Sequence[int]) -> None:
        """Not empty. The same object may be leased any number of times."""
        self.num_leases += len(numbers)
        self._put((numbers, rows))

    def release_whole(self, numbers: tuple[int, ...]) -> Sequence[int] | None:
        """The rows, if the numbers are those of one lease call after the other; else nothing is done."""
        taken: list[_Lease] = []
        end = len(numbers)
        while end:
            lease = self._take(numbers, end)
            if lease is None:
                for one in taken:
                    self._put(one)
                return None
            taken.append(lease)
            end -= len(lease[0])
        self.num_leases -= len(numbers)
        if len(taken) == 1:
            return taken[0][1]
        released: list[int] = []
        for _, rows in reversed(taken):
            released += rows
        return released

    def release_singly(self, numbers: tuple[int, ...]) -> list[int | None]:
        """By number, the row that a lease or alias was given back of; None if there is none."""
        self._take_apart()
        return [self._release_one(number) for number in numbers]

    def leased_row(self, number: int) -> int | None:
        self._take_apart()
        return self._rows.get(number)

    def leased_rows(self) -> Iterator[int]:
        """One for each lease, aliases included."""
        for peers in self._leases.values():
            for _, rows in peers:
                yield from rows
        for number, row in self._rows.items():
            for _ in range(self._counts[number]):
                yield row
        yield from self.aliases.values()

    def _take(self, numbers: tuple[int, ...], end: int) -> _Lease | None:
        """One that numbers[:end] ends with."""
        last = numbers[end - 1]
        peers = self._leases.get(last, ())
        for lease in peers:
            leased = lease[0]
            if leased == numbers[max(0, end - len(leased)) : end]:
                if len(peers) == 1:
                    del self._leases[last]
                else:
                    self._leases[last].remove(lease)
                return lease
        return None

    def _put(self, lease: _Lease) -> None:
        self._leases.setdefault(lease[0][-1], []).append(lease)

    def _take_apart(self) -> None:
        if not self._leases:
            return
        leases, self._leases = self._leases, {}
        for peers in leases.values():
            for numbers, rows in peers:
                for number, row in zip(numbers, rows, strict=True):
                    self._rows[number] = row
                    self._counts[number] = self._counts.get(number, 0) + 1

    def _release_one(self, number: int) -> int | None:
        row = self.aliases.pop(number, None)
        if row is not None:
            return row
        row = self._rows.get(number)
        if row is not None:
            self.num_leases -= 1
            self._counts[number] -= 1
            if not self._counts[number]:
                del self._counts[number], self._rows[number]
        return row
