"""The reservations of all clients: when they run out, who else writes a key, how one ends that is not committed.

Every reservation has an owner, and is in the claims of its client. It runs out if it is not committed in time; its space is
then fenced, for its writer may still write, and free when the client commits, cancels or is gone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from mooncake.core.types import NANOS_PER_S
from mooncake.store.claims import Claims, Reservations
from mooncake.store.clients import Clients
from mooncake.store.lifecycle import State, Trigger
from mooncake.store.objects import Objects

RESERVATION_NS = 600 * NANOS_PER_S
"""A reservation's time to live, longer than the longest prefill, whose objects are reserved before it starts. A writer that
died is seen by its connection long before."""
_FEW_RESERVED = 64


class ReservationBook:
    """in_order: in which they run out, as all have one time to live, `reservation_ns`; closed ones may be among them. writers:
    live reservations by key. Only strict writers ask for them, so they are counted from the first strict put on. has_granted:
    there may be reservations of space that has no key yet."""

    def __init__(self, objects: Objects, clients: Clients, counters: dict[str, int], reservation_ns: int) -> None:
        self.in_order: deque[Reservations] = deque()
        self.writers: Counter[bytes] | None = None
        self.has_granted = False
        self._objects = objects
        self._clients = clients
        self._counters = counters
        self._reservation_ns = reservation_ns
        self._num_reserved_max = _FEW_RESERVED
        """When there are more, those that are closed behind one that stays open are dropped."""

    def enter(self, claims: Claims, numbers: tuple[int, ...], rows: Sequence[int], now: int) -> None:
        """Of one call of a client."""
        reservations = Reservations(numbers, rows, now + self._reservation_ns)
        claims.reserve(reservations)
        self.in_order.append(reservations)
        if len(self.in_order) > self._num_reserved_max:
            self.in_order = deque([reservations for reservations in self.in_order if reservations.num_open])
            self._num_reserved_max = 2 * len(self.in_order) + _FEW_RESERVED

    def end(self, row: int, trigger: Trigger) -> None:
        """Free its space. It is in nobody's claims any more."""
        if self._objects.states[row] is State.RESERVED:
            self.forget_writers((self._objects.keys[row],))
        self._objects.end(row, trigger)

    def end_all(self, claims: Claims) -> None:
        """The client is gone."""
        for number, row in claims.reserved_rows():
            claims.take_reserved(number)
            self.end(row, Trigger.CANCEL)

    # ------------------------------------------------------------ time

    def expires_at(self) -> int | None:
        """When the next ones run out."""
        in_order = self.in_order
        while in_order and not in_order[0].num_open:
            in_order.popleft()
        return in_order[0].expires_at if in_order else None

    def expire(self, now: int) -> None:
        while self.in_order and self.in_order[0].expires_at <= now:
            reservations = self.in_order.popleft()
            reservations.is_late = True
            rows = reservations.open_rows()
            for row in rows:
                self._objects.move(row, Trigger.EXPIRE)
            self.forget_writers([self._objects.keys[row] for row in rows])
            self._counters["expired"] += len(rows)

    # ------------------------------------------------------------ writers

    def known_writers(self) -> Counter[bytes]:
        """`writers`, counted from now on."""
        if self.writers is None:
            self.writers = self._count_writers()
        return self.writers

    def forget_writers(self, keys: Sequence[bytes]) -> None:
        if self.writers is not None:
            for key in keys:
                left = self.writers.pop(key) - 1
                if left:
                    self.writers[key] = left

    def _count_writers(self) -> Counter[bytes]:
        objects = self._objects
        rows = self._clients.reserved_rows()
        return Counter([objects.keys[row] for row in rows if objects.states[row] is State.RESERVED])

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        """Raises AssertionError if a law is broken. O(objects)."""
        states, clients = self._objects.states, self._clients
        reserved = Counter(clients.reserved_rows())
        owned = Counter([row for row in self._objects.used_rows() if states[row] in (State.RESERVED, State.FENCED)])
        _require(reserved == owned, "a reservation has no owner, or an owner no reservation")
        num_reservations = sum([claims.num_reservations for claims in clients.by_number.values()])
        _require(num_reservations == len(owned), "reservations are miscounted")
        _require(self.writers in (None, self._count_writers()), "a key's writers are miscounted")
        waiting = Counter([row for reservations in self.in_order for row in reservations.open_rows()])
        live = Counter([row for row in owned if states[row] is State.RESERVED])
        _require(waiting == live, "a reservation runs out never, or twice")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"store: {message}")
