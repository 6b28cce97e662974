"""Commit, name and cancel: how reservations end, and what becomes visible.

Of several writers of a key the first commit wins, and those that come later get leases of the winner, under the numbers of
their own reservations (`Claims.aliases`). Granted space gets its key when it is named, and is committed by that.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooncake.store.answers import faults, reply
from mooncake.store.claims import Claims
from mooncake.store.clients import Clients
from mooncake.store.events import Cancel, Command, Commit, Fault, Name, Reply
from mooncake.store.lifecycle import State, Trigger
from mooncake.store.objects import Objects, pick
from mooncake.store.reservations import ReservationBook
from mooncake.store.types import CommitStatus

_COMMITTED = CommitStatus.COMMITTED
"""Members of an enum are looked up slowly."""


class Committing:
    """counters: of the core. capacity: of the segment."""

    def __init__(
        self, objects: Objects, clients: Clients, book: ReservationBook, counters: dict[str, int], capacity: int
    ) -> None:
        self._objects = objects
        self._clients = clients
        self._book = book
        self._counters = counters
        self._capacity = capacity

    def commit(self, event: Commit, now: int) -> list[Command]:
        """What was reserved under a key, unlike granted space."""
        if self._book.has_granted:
            claims, keys = self._clients.claims(event.client), self._objects.keys
            rows = [claims.writable_row(number) for number in event.numbers]
            if any(row is not None and not keys[row] for row in rows):
                return [Fault(event.client, event.request_id, "numbers: granted space has no key; it is to be named")]
        return self._commit(event, now)

    def _commit(self, event: Commit, now: int) -> list[Command]:
        objects, numbers = self._objects, event.numbers
        if event.checksums:
            fault = faults(event, self._capacity)
            if fault:
                return fault
        claims = self._clients.claims(event.client)
        reservations = claims.reserved_with(numbers[0]) if numbers else None
        rows = None if reservations is None else reservations.live_rows(numbers)
        if reservations is None or rows is None:
            return self._commit_singly(event, claims)
        keys = [objects.keys[row] for row in rows]
        if not objects.by_key.keys().isdisjoint(keys):
            return self._commit_singly(event, claims)
        claims.close(reservations, numbers[0], len(numbers))
        self._book.forget_writers(keys)
        if event.checksums:
            pairs = zip(rows, event.checksums, strict=True)
            objects.checksums.update([(row, checksum) for row, checksum in pairs if checksum is not None])
        objects.publish(rows, keys)
        self._keep(event, claims, numbers, rows)
        return [Reply(event.client, event.request_id, (_COMMITTED,) * len(numbers))]

    def _commit_singly(self, event: Commit, claims: Claims) -> list[Command]:
        fault = faults(event, self._capacity)
        if fault:
            return fault
        objects = self._objects
        results: list[CommitStatus] = []
        committed: dict[int, int] = {}
        for at, number in enumerate(event.numbers):
            row = claims.take_reserved(number)
            if row is None:
                results.append(CommitStatus.UNKNOWN)
            elif objects.states[row] is State.FENCED:
                objects.end(row, Trigger.COMMIT)
                results.append(CommitStatus.EXPIRED)
            elif (winner := objects.by_key.get(objects.keys[row])) is not None:
                if event.lease:
                    objects.hold((winner,))
                    claims.aliases[number] = winner
                self._book.end(row, Trigger.CANCEL)
                results.append(CommitStatus.EXISTS)
            else:
                self._book.forget_writers((objects.keys[row],))
                checksum = event.checksums[at] if event.checksums else None
                if checksum is not None:
                    objects.checksums[row] = checksum
                objects.publish((row,), (objects.keys[row],))
                committed[number] = row
                results.append(CommitStatus.COMMITTED)
        if committed:
            self._keep(event, claims, tuple(committed), list(committed.values()))
        return reply(event, tuple(results))

    def _keep(self, event: Commit, claims: Claims, numbers: tuple[int, ...], rows: list[int]) -> None:
        """What was committed is held by the call; now the client has a lease of it, or nobody."""
        self._counters["commits"] += len(rows)
        self._counters["committed_bytes"] += sum(pick(self._objects.sizes, rows))
        if event.lease:
            claims.lease(numbers, rows)
        else:
            self._objects.unhold(rows)

    def cancel(self, event: Cancel, now: int) -> list[Command]:
        fault = faults(event, self._capacity)
        if fault:
            return fault
        claims = self._clients.claims(event.client)
        rows = [claims.take_reserved(number) for number in event.numbers]
        for row in rows:
            if row is not None:
                self._book.end(row, Trigger.CANCEL)
        return reply(event, tuple([row is not None for row in rows]))

    def name(self, event: Name, now: int) -> list[Command]:
        fault = faults(event, self._capacity)
        if fault:
            return fault
        claims = self._clients.claims(event.client)
        reservations = claims.reserved_with(event.numbers[0])
        rows: Sequence[int | None] | None = None if reservations is None else reservations.live_rows(event.numbers)
        if rows is None:
            rows = [claims.writable_row(number) for number in event.numbers]
        return self._commit(
            Commit(event.client, event.request_id, self._named(event, rows), False, event.checksums), now
        )

    def _named(self, event: Name, rows: Sequence[int | None]) -> tuple[int, ...]:
        """The numbers of those that have their keys now; 0 for one that had a key before, or has too little space."""
        objects, writers = self._objects, self._book.writers
        numbers, before = list(event.numbers), b""
        for at, (row, key, size) in enumerate(zip(rows, event.keys, event.sizes, strict=True)):
            if row is not None and not objects.keys[row] and size <= objects.extents[row]:
                objects.keys[row], objects.sizes[row], objects.before[row] = key, size, before
                if writers is not None:
                    self._book.forget_writers((b"",))
                    writers[key] += 1
            elif row is not None:
                numbers[at] = 0
            before = key
        return tuple(numbers)
