"""The clients of a node as its core knows them: what each holds, whose quota it fills, how it leases and releases.

A lease is in its client's claims, and counted: the same client may lease twice. A client begins with its first event and ends
when it is gone; then what it holds is given back by `StoreCore`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooncake.store.answers import faults, join, nowhere, reply
from mooncake.store.claims import Claims
from mooncake.store.events import MAX_BATCH, ClientTenant, Command, Lease, Release, Reply, Reserve
from mooncake.store.objects import Objects
from mooncake.store.quotas import Tenant
from mooncake.store.types import Places


class Clients:
    """by_number: their claims. counters: of the core. capacity: of the segment."""

    def __init__(self, objects: Objects, counters: dict[str, int], capacity: int) -> None:
        self.by_number: dict[int, Claims] = {}
        self._objects = objects
        self._tenants = objects.quotas.tenants
        self._counters = counters
        self._capacity = capacity

    def claims(self, client: int) -> Claims:
        claims = self.by_number.get(client)
        if claims is None:
            claims = self.by_number[client] = Claims()
        return claims

    def reserved_rows(self) -> list[int]:
        """Of all of them."""
        return [row for claims in self.by_number.values() for _, row in claims.reserved_rows()]

    @property
    def num_leases(self) -> int:
        return sum([claims.num_leases + len(claims.aliases) for claims in self.by_number.values()])

    # ------------------------------------------------------------ tenants

    def set_tenant(self, event: ClientTenant, now: int) -> list[Command]:
        self.claims(event.client).tenant = self._tenants.get(event.tenant)
        return []

    def payer(self, event: Reserve | Lease) -> Tenant | None:
        """Whose quota what the call brings into memory counts for."""
        if event.tenant:
            return self._tenants.get(event.tenant)
        return self.claims(event.client).tenant

    # ------------------------------------------------------------ lease and release

    def lease(self, event: Lease, now: int) -> list[Command]:
        rows = self._objects.find_all(event.keys) if event.keys else None
        if rows is None or len(rows) > MAX_BATCH:
            return self._lease_some(event)
        self._counters["hits"] += len(rows)
        self._objects.hold(rows)
        return [Reply(event.client, event.request_id, self.lease_to(self.claims(event.client), rows))]

    def _lease_some(self, event: Lease) -> list[Command]:
        fault = faults(event, self._capacity)
        if fault:
            return fault
        found = self._objects.find(event.keys)
        self._objects.hold([row for row in found if row is not None])
        return [Reply(event.client, event.request_id, self.lease_found(event.client, found))]

    def lease_found(self, client: int, found: Sequence[int | None]) -> Places:
        """What the call holds already, None for what is missed, becomes leases of the client."""
        hits = [at for at, row in enumerate(found) if row is not None]
        misses = [at for at, row in enumerate(found) if row is None]
        self._counters["hits"] += len(hits)
        self._counters["misses"] += len(misses)
        if not hits:
            return nowhere(len(found))
        there = self.lease_to(self.claims(client), [row for row in found if row is not None])
        return join((there, nowhere(len(misses))), hits + misses)

    def lease_to(self, claims: Claims, rows: Sequence[int]) -> Places:
        """What the call holds already becomes a lease of the client."""
        places = self._objects.places(rows)
        claims.lease(places.numbers, rows)  # type: ignore[arg-type]  # none is nowhere
        return places

    def release(self, event: Release, now: int) -> list[Command]:
        claims, numbers = self.claims(event.client), event.numbers
        rows = claims.release_whole(numbers) if len(numbers) <= MAX_BATCH else None
        if rows:
            self._objects.unhold(rows)
            return [Reply(event.client, event.request_id, (True,) * len(rows))]
        fault = faults(event, self._capacity)
        if fault:
            return fault
        found = claims.release_singly(numbers)
        self._objects.unhold([row for row in found if row is not None])
        return reply(event, tuple([row is not None for row in found]))
