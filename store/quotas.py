"""How much of the nodes' memory each tenant may fill, and what makes room for a tenant whose share is full: its own oldest.

A quota is of all nodes together. Each node counts what its clients have reserved and committed, and hears from the directory
what a tenant has elsewhere, so nodes may exceed it together by what they give away within a report or two. Tenants without a
quota are not counted. Memory only: what is copied to SSD counts until it leaves memory.

A client acts for one tenant, or names one with each call. What exceeds the quota is refused to the first kind. To the second,
an engine that must hand KV over, it is given all the same, counts, and is gone with its last lease (`Reserving`).

A tenant is known by a number, which the index of a segment keeps beside each object, so a node that adopts its memory still
knows whose it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import xxhash

CODE_BITS = 48


class Tenant:
    """used, elsewhere: bytes here and on other nodes. idle: rows of committed objects that nobody leases, oldest first;
    idle_bytes: theirs."""

    __slots__ = ("code", "elsewhere", "idle", "idle_bytes", "name", "num_evictions", "num_refused", "quota", "used")

    def __init__(self, name: str, quota: int) -> None:
        self.name = name
        self.code = xxhash.xxh3_64_intdigest(name.encode()) & ((1 << CODE_BITS) - 1) or 1
        self.quota = quota
        self.used = 0
        self.elsewhere = 0
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.idle_bytes = 0
        self.num_evictions = 0
        self.num_refused = 0

    @property
    def left(self) -> int:
        """Bytes; less than none if the quota is exceeded."""
        return self.quota - self.used - self.elsewhere


class Quotas:
    """owners: rows of tenants with a quota, empty if there is none. extents: the column of the objects that are counted."""

    def __init__(self, quotas: Mapping[str, int]) -> None:
        self.extents: Sequence[int] = ()
        self.tenants = {name: Tenant(name, quota) for name, quota in quotas.items()}
        self.owners: dict[int, Tenant] = {}
        self._by_code = {tenant.code: tenant for tenant in self.tenants.values()}
        self._told: dict[str, int] = {}

    def charge(self, tenant: Tenant, rows: Sequence[int]) -> None:
        """These are leased, or reserved."""
        for row in rows:
            self.owners[row] = tenant
            tenant.used += self.extents[row]

    def charge_adopted(self, rows: Sequence[int], codes: Sequence[int]) -> None:
        """What a life of the node before has left."""
        for row, code in zip(rows, codes, strict=True):
            tenant = self._by_code.get(code)
            if tenant is not None:
                self.charge(tenant, (row,))

    def release(self, rows: Sequence[int]) -> None:
        """They are gone."""
        self.hold(rows)
        for row in rows:
            tenant = self.owners.pop(row, None)
            if tenant is not None:
                tenant.used -= self.extents[row]

    def hold(self, rows: Sequence[int]) -> None:
        for row in rows:
            tenant = self.owners.get(row)
            if tenant is not None and row in tenant.idle:
                del tenant.idle[row]
                tenant.idle_bytes -= self.extents[row]

    def idle(self, rows: Sequence[int]) -> None:
        """In chain order: a suffix goes before its prefix."""
        for row in reversed(rows):
            tenant = self.owners.get(row)
            if tenant is not None:
                tenant.idle[row] = None
                tenant.idle_bytes += self.extents[row]

    def idle_again(self, row: int) -> None:
        """As it was before a `hold` that was no use of it: among the oldest."""
        tenant = self.owners.get(row)
        if tenant is not None:
            self.idle((row,))
            tenant.idle.move_to_end(row, last=False)

    def code(self, row: int) -> int:
        """Of its owner; 0: nobody who is counted."""
        tenant = self.owners.get(row)
        return 0 if tenant is None else tenant.code

    def set_elsewhere(self, used: Mapping[str, int]) -> None:
        for name, tenant in self.tenants.items():
            tenant.elsewhere = used.get(name, 0)

    def usage(self) -> dict[str, int]:
        """Bytes used here, of those who use any."""
        return {name: tenant.used for name, tenant in self.tenants.items() if tenant.used}

    def take_usage(self) -> dict[str, int] | None:
        """The usage, if it is not what was taken last."""
        usage = self.usage()
        if usage == self._told:
            return None
        self._told = usage
        return usage

    def check_integrity(self, refs: Sequence[int]) -> None:
        """Raises AssertionError if a law is broken. O(objects of tenants)."""
        for tenant in self.tenants.values():
            name, rows = tenant.name, [row for row, owner in self.owners.items() if owner is tenant]
            assert sum([self.extents[row] for row in rows]) == tenant.used, f"quotas: bytes of {name} do not add up"
            assert tenant.idle.keys() <= set(rows), f"quotas: an idle object of {name} is not its"
            assert not any(refs[row] for row in tenant.idle), f"quotas: a leased object of {name} is idle"
            idle_bytes = sum([self.extents[row] for row in tenant.idle])
            assert idle_bytes == tenant.idle_bytes, f"quotas: idle bytes of {name} do not add up"
