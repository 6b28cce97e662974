"""Calls to a node with an SSD tier: which wait, for what and how long.

What is leased and only on SSD is read first, as far as the keys lead from the first on without a miss: nothing behind one is
of use. The call is answered when all of it is read. A reservation waits too if another call has made the node read what it
asks for. And calls that find too little room ready wait until enough is written to SSD. Each waits for a bounded time, and
then goes ahead with what there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from mooncake.store.answers import faults
from mooncake.store.clients import Clients
from mooncake.store.events import Command, Lease, Reply, Reserve, SsdRead, SsdRecovered, SsdWritten
from mooncake.store.objects import Objects
from mooncake.store.reserving import Reserving
from mooncake.store.ssd import SsdTier
from mooncake.store.waiting import Waiting, WaitingCall, WaitingLease


class SsdCalls:
    """In place of `Reserving.reserve` and `Clients.lease`, which it goes ahead with. capacity: of the segment. changes: of what
    is on SSD, for the directory."""

    def __init__(self, ssd: SsdTier, objects: Objects, clients: Clients, reserving: Reserving, capacity: int) -> None:
        self.waiting = Waiting(objects)
        self.changes = ssd.log.changes
        self._ssd = ssd
        self._objects = objects
        self._clients = clients
        self._reserving = reserving
        self._capacity = capacity

    def reserve(self, event: Reserve, now: int, began_at: int | None = None) -> list[Command]:
        """began_at: when the call came, if it has waited."""
        ssd, began_at = self._ssd, now if began_at is None else began_at
        fault = faults(event, self._capacity)
        if fault:
            return fault
        found = self._objects.find(event.keys)
        new = [at for at, row in enumerate(found) if row is None]
        wanted = self._objects.rounded([event.sizes[at] for at in new])
        load_until, room_until = began_at + ssd.config.load_wait_ns, began_at + ssd.config.room_wait_ns
        if self.waiting.is_full:
            return self._reserving.reserve(event, now)
        if now < load_until and any(event.keys[at] in ssd.loading for at in new):
            return self._put_off(event, began_at, load_until, 0)
        if now < room_until and self._lacks_room(wanted, now):
            return self._put_off(event, began_at, room_until, wanted)
        return self._reserving.reserve(event, now)

    def lease(self, event: Lease, now: int, began_at: int | None = None) -> list[Command]:
        """As `reserve`."""
        ssd, began_at = self._ssd, now if began_at is None else began_at
        fault = faults(event, self._capacity)
        if fault:
            return fault
        objects, keys = self._objects, event.keys
        found = objects.find(keys)
        leading = self._num_leading(keys, found)
        missing = list(dict.fromkeys([keys[at] for at in range(leading) if found[at] is None]))
        if not missing or self.waiting.is_full:
            return self._clients.lease(event, now)
        new = [key for key in missing if key not in ssd.loading]
        wanted = objects.rounded(ssd.sizes(new)) if new else 0
        room_until = began_at + ssd.config.room_wait_ns
        if now < room_until and self._lacks_room(wanted, now):
            ssd.log.spare(new, room_until)
            return self._put_off(event, began_at, room_until, wanted)
        objects.hold([row for row in found if row is not None])
        commands: list[Command] = [*ssd.load(new)] if new else []
        tenant = self._clients.payer(event)
        if tenant is not None:  # it comes to memory for this one, and is not refused: what follows has less room
            objects.quotas.charge(tenant, [ssd.loading[key] for key in new if key in ssd.loading])
        loads = 0
        for at in range(leading):
            row = ssd.loading.get(keys[at]) if found[at] is None else None
            if row is not None:
                found[at] = row
                objects.before[row] = keys[at - 1] if at else b""
                objects.hold((row,))
                loads += 1
        if loads:
            self.waiting.wait(WaitingLease(event, found, loads, now + ssd.config.load_wait_ns))
            return commands
        return [Reply(event.client, event.request_id, self._clients.lease_found(event.client, found))]

    def _num_leading(self, keys: Sequence[bytes], found: Sequence[int | None]) -> int:
        """Keys before the first that is in no tier."""
        ssd = self._ssd
        for at, key in enumerate(keys):
            if found[at] is None and key not in ssd.loading and not ssd.has(key):
                return at
        return len(keys)

    def _lacks_room(self, wanted_bytes: int, now: int) -> bool:
        """Whether there is not so much room ready, but can be expected."""
        return wanted_bytes > self._objects.spare_bytes and self._ssd.can_save(now)

    def _put_off(self, event: Reserve | Lease, began_at: int, until: int, wanted_bytes: int) -> list[Command]:
        self.waiting.calls.append(WaitingCall(event, began_at, until, wanted_bytes))
        return []

    def written(self, event: SsdWritten, now: int) -> list[Command]:
        return self._ssd.written(event, now)

    def read(self, event: SsdRead, now: int) -> list[Command]:
        self._ssd.read(event, self.waiting.resolve)
        return []

    def recovered(self, event: SsdRecovered, now: int) -> list[Command]:
        self._ssd.recover(event)
        return []

    def go_on(self, now: int) -> list[Command]:
        """After each event: answer and try again what has waited, then write ahead."""
        commands: list[Command] = []
        for lease in self.waiting.take_done(now):
            places = self._clients.lease_found(lease.client, lease.rows)
            places = msgspec.structs.replace(places, num_loaded=lease.num_loaded)
            commands.append(Reply(lease.client, lease.request_id, places))
        calls, self.waiting.calls = self.waiting.calls, []
        for call in calls:
            if isinstance(call.event, Reserve):
                commands += self.reserve(call.event, now, call.began_at)
            else:
                commands += self.lease(call.event, now, call.began_at)
        commands += self._ssd.save(sum([call.wanted_bytes for call in self.waiting.calls]), now)
        return commands

    def metrics(self) -> dict[str, int]:
        return self._ssd.metrics() | {"waiting": len(self.waiting)}

    # ------------------------------------------------------------ conservation

    def held_rows(self) -> Counter[int]:
        """Leases that are nobody's yet: of jobs, and of calls that wait for them."""
        return self._ssd.held_rows() + Counter(self.waiting.held_rows())

    def check_integrity(self) -> None:
        self._ssd.check_integrity()
