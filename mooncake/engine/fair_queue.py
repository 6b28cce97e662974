"""Whose turn it is among tenants that wait for the same instance: start-time fair queuing. Sans-IO, without a clock.

    push --> waits with its tenant, by priority --pop, with a turn--> in service --served--> gone

Each tenant has a virtual time, the work that it was given by its weight. The tenant that has had least goes next; what it takes
is added. A tenant that comes anew begins where the one in service is, so nobody saves up turns while it is away, and nobody who
floods the queue delays others by more than its share. Where one tenant waits alone it gets everything.

Inside a tenant, a higher priority goes first, then who came first. With one tenant that is the whole order.

The *turn* of what was popped orders what is in service, such as the chunks of an engine's steps: a newcomer's turn is that of
the oldest one there, so it passes the others that were popped before it. A higher priority takes the turn of its own tenant's
lower ones.
"""

from __future__ import annotations

from bisect import insort

import msgspec

NUM_TENANTS_MAX = 1024
"""Tenants remembered that have nothing here; of more, all are forgotten, and begin anew."""
_UNIT = 1024
"""Parts of a token that turns are counted in, so that weights need not divide the work."""


class _Entry(msgspec.Struct):
    """start: the tenant's virtual time when it was popped; turn: that, or the one it took of a lower priority."""

    seq: int
    tenant: str
    priority: int
    cost: int
    start: int = 0
    turn: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return (-self.priority, self.seq)


class _Tenant:
    __slots__ = ("num_serving", "time", "waiting")

    def __init__(self) -> None:
        self.time = 0
        self.waiting: list[tuple[tuple[int, int], int]] = []
        self.num_serving = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.num_serving


class FairQueue:
    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: dict[int, _Entry] = {}
        self._serving: dict[int, _Entry] = {}
        self._time = 0
        """Virtual time: the start of the earliest one in service, or of the last one that was."""

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, seq: int, tenant: str, weight: float, priority: int, num_tokens: int) -> None:
        """seq grows with arrival; weight > 0."""
        entry = _Entry(seq, tenant, priority, max(1, int(max(1, num_tokens) * _UNIT / weight)))
        if tenant not in self._tenants:
            self._make_room()
            self._tenants[tenant] = _Tenant()
        self._wait(entry)

    def head(self) -> int | None:
        """Who is popped next."""
        if not self._waiting:
            return None
        if len(self._tenants) == 1:
            [only] = self._tenants.values()
            return only.waiting[0][1]
        now = self._now()
        starts = [(max(each.time, now), each.waiting[0][1]) for each in self._tenants.values() if each.waiting]
        return min(starts)[1]

    def pop(self) -> tuple[int, int]:
        """(seq, turn) of the next one; there must be one. It is in service until `served`."""
        seq = self.head()
        assert seq is not None
        entry = self._waiting.pop(seq)
        tenant = self._tenants[entry.tenant]
        del tenant.waiting[0]
        entry.start = entry.turn = max(tenant.time, self._now())
        for other in self._serving.values():
            if other.tenant == entry.tenant and other.priority < entry.priority:
                entry.turn = min(entry.turn, other.turn)
        tenant.time = entry.start + entry.cost
        tenant.num_serving += 1
        self._serving[seq] = entry
        return seq, entry.turn

    def remove(self, seq: int) -> None:
        """It waits no more."""
        entry = self._waiting.pop(seq)
        self._tenants[entry.tenant].waiting.remove((entry.order, seq))
        self._forget_if_idle(entry.tenant)

    def give_back(self, seq: int) -> None:
        """It was popped and could not be served: it waits again, as if it had not been."""
        entry = self._serving.pop(seq)
        tenant = self._tenants[entry.tenant]
        tenant.time -= entry.cost
        tenant.num_serving -= 1
        self._wait(entry)

    def served(self, seq: int) -> None:
        """It needs no turn any more. Others are ignored."""
        entry = self._serving.get(seq)
        if entry is not None:
            self._time = self._now()
            del self._serving[seq]
            self._time = self._now() if self._serving else max(self._time, entry.start)
            self._tenants[entry.tenant].num_serving -= 1
            self._forget_if_idle(entry.tenant)

    def check_integrity(self) -> None:
        """Raises AssertionError: every entry is known to its tenant, once."""
        waiting = sorted(seq for tenant in self._tenants.values() for _, seq in tenant.waiting)
        assert waiting == sorted(self._waiting)
        assert sum(tenant.num_serving for tenant in self._tenants.values()) == len(self._serving)

    def _wait(self, entry: _Entry) -> None:
        self._waiting[entry.seq] = entry
        insort(self._tenants[entry.tenant].waiting, (entry.order, entry.seq))

    def _now(self) -> int:
        if not self._serving:
            return self._time
        return max(self._time, min([entry.start for entry in self._serving.values()]))

    def _forget_if_idle(self, name: str) -> None:
        """Once it owes nothing; when nobody is here, nobody does. Turns never go back, as engines still have older ones."""
        if not self._waiting and not self._serving:
            self._time = max(self._time, *[tenant.time for tenant in self._tenants.values()])
            self._tenants.clear()
        elif self._tenants[name].idle and self._tenants[name].time <= self._time:
            del self._tenants[name]

    def _make_room(self) -> None:
        if len(self._tenants) >= NUM_TENANTS_MAX:
            self._tenants = {name: tenant for name, tenant in self._tenants.items() if not tenant.idle}
