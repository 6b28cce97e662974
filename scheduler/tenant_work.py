"""How long a tenant's next request waits where several tenants' prefills are booked: what the fair queue of the instance
(`mooncake.engine.fair_queue`) will do, as a fluid.

    ahead = own work + for each other tenant min(its work, own work by the weights + one request that is under way)
"""

from __future__ import annotations

import msgspec


class _Work(msgspec.Struct):
    weight: float
    num_prefills: int = 0
    work_ns: int = 0


class TenantWork:
    """Prefill work that is booked at one instance, by tenant."""

    def __init__(self) -> None:
        self._work: dict[str, _Work] = {}

    def add(self, tenant: str, weight: float, work_ns: int) -> None:
        work = self._work.get(tenant)
        if work is None:
            work = self._work[tenant] = _Work(weight)
        work.weight = weight
        work.num_prefills += 1
        work.work_ns += work_ns

    def remove(self, tenant: str, work_ns: int) -> None:
        work = self._work[tenant]
        work.num_prefills -= 1
        work.work_ns -= work_ns
        if not work.num_prefills:
            del self._work[tenant]

    def num_prefills(self, tenant: str) -> int:
        work = self._work.get(tenant)
        return work.num_prefills if work is not None else 0

    def wait_ns(self, tenant: str, weight: float, queue_ns: int) -> int:
        """The part of the queue that passes before the tenant's next request has its turn: all, if nobody else is there."""
        if not self._work or (len(self._work) == 1 and tenant in self._work):
            return queue_ns
        own = self._work.get(tenant)
        own_ns = own.work_ns if own is not None else 0
        ahead = total = own_ns
        for name, other in self._work.items():
            if name != tenant:
                under_way = other.work_ns // other.num_prefills
                ahead += min(other.work_ns, int(own_ns * other.weight / weight) + under_way)
                total += other.work_ns
        return queue_ns * ahead // total if total else queue_ns

    def sum(self) -> tuple[int, int]:
        """(prefills, their work)."""
        works = self._work.values()
        return sum(work.num_prefills for work in works), sum(work.work_ns for work in works)
