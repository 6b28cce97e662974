"""Calls that cannot be answered yet: those that wait for room, and leases that wait for loads.

A call that waits for room holds nothing and is simply tried again; what it finds may have changed meanwhile. A lease that waits
for loads holds every object that it has so far, and the space that the others are read into.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooncake.store.events import Lease, Reserve
from mooncake.store.lifecycle import State
from mooncake.store.objects import Objects

WAITING_MAX = 1024
"""Calls that wait at a time, as many as there can be connections. More go ahead with what there is: a client can ask for any
number of things at once."""


class WaitingCall:
    """Tried again after every event, and at the latest at `until`. wanted_bytes: what must be ready."""

    __slots__ = ("began_at", "event", "until", "wanted_bytes")

    def __init__(self, event: Reserve | Lease, began_at: int, until: int, wanted_bytes: int) -> None:
        self.event = event
        self.began_at = began_at
        self.until = until
        self.wanted_bytes = wanted_bytes


class WaitingLease:
    """rows: by key, None for what is missed. num_loads, num_loaded: of them, how many are not read yet; are or will be."""

    __slots__ = ("client", "is_over", "num_loaded", "num_loads", "request_id", "rows", "until")

    def __init__(self, event: Lease, rows: list[int | None], num_loads: int, until: int) -> None:
        self.client = event.client
        self.request_id = event.request_id
        self.rows = rows
        self.num_loads = num_loads
        self.num_loaded = num_loads
        self.until = until
        self.is_over = False


class Waiting:
    def __init__(self, objects: Objects) -> None:
        self.calls: list[WaitingCall] = []
        self._objects = objects
        self._leases: dict[WaitingLease, None] = {}
        """In the order in which their time is over."""
        self._done: list[WaitingLease] = []
        self._by_row: dict[int, list[tuple[WaitingLease, int]]] = {}
        """Who waits for a load, and with which of its keys."""

    def __len__(self) -> int:
        return len(self.calls) + len(self._leases)

    @property
    def is_full(self) -> bool:
        return len(self) >= WAITING_MAX

    def deadline(self) -> int | None:
        times = [call.until for call in self.calls]
        times += [next(iter(self._leases)).until] if self._leases else []
        return min(times, default=None)

    def wait(self, lease: WaitingLease) -> None:
        """What its rows name is held for it already."""
        self._leases[lease] = None
        for at, row in enumerate(lease.rows):
            if row is not None and self._objects.states[row] is State.LOADING:
                self._by_row.setdefault(row, []).append((lease, at))

    def resolve(self, row: int, found: int | None) -> None:
        """The load into that row is over, and the object is in that row, the same or another, or could not be had."""
        for lease, at in self._by_row.pop(row, ()):
            if lease.is_over:
                continue
            if found != row:
                self._objects.refs[row] -= 1  # never the last: the load holds it too
                lease.rows[at] = found
                lease.num_loaded -= 1
                if found is not None:
                    self._objects.hold((found,))
            lease.num_loads -= 1
            if not lease.num_loads:
                self._end(lease)
                self._done.append(lease)

    def take_done(self, now: int) -> Sequence[WaitingLease]:
        """Leases that can be answered: all is read, or their time is over; what is not read by then is missed."""
        late = []
        for lease in self._leases:
            if lease.until > now:
                break
            late.append(lease)
        for lease in late:
            self._end(lease)
            lease.num_loaded -= self._let_go(lease)
        done, self._done = self._done + late, []
        return done

    def drop(self, client: int) -> None:
        """It is gone, and with it what was held for it."""
        self.calls = [call for call in self.calls if call.event.client != client]
        for lease in [lease for lease in self._leases if lease.client == client]:
            self._end(lease)
            self._let_go(lease)
            self._objects.unhold([row for row in lease.rows if row is not None])

    def _end(self, lease: WaitingLease) -> None:
        lease.is_over = True
        del self._leases[lease]

    def _let_go(self, lease: WaitingLease) -> int:
        """Of what is still being read; how much that is."""
        objects, count = self._objects, 0
        for at, row in enumerate(lease.rows):
            if row is not None and objects.states[row] is State.LOADING:
                objects.refs[row] -= 1
                lease.rows[at] = None
                count += 1
        return count

    def held_rows(self) -> list[int]:
        """One for each hold, as of a lease."""
        return [row for lease in self._leases for row in lease.rows if row is not None]
