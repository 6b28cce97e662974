"""The state of a cluster as one frontend can tell it: what GET /admin/status answers, and the status command and the
dashboard show. Times end with their unit.
"""

from __future__ import annotations

import msgspec

from mooncake.core.messages import ClusterStatus, InstanceStatus, NodeStatus
from mooncake.core.types import ReusedTokens
from mooncake.frontend.outcomes import Summary

_ROLE_ORDER = {"prefill": 0, "decode": 1}


class Cluster(msgspec.Struct, frozen=True):
    """What the Conductor tells. counts: its answers by kind, since its start. reused: since that of the instances."""

    policy: str
    num_waiting: int
    num_bookings: int
    counts: dict[str, int]
    reused: ReusedTokens
    instances: tuple[InstanceStatus, ...]
    nodes: tuple[NodeStatus, ...]

    @staticmethod
    def of(status: ClusterStatus) -> Cluster:
        return Cluster(
            status.policy,
            status.num_waiting,
            status.num_bookings,
            dict(status.counts),
            status.reused,
            tuple(sorted(status.instances, key=lambda each: (_ROLE_ORDER.get(each.role, 2), *_by_number(each.name)))),
            tuple(sorted(status.nodes, key=lambda each: _by_number(each.name))),
        )


def _by_number(name: str) -> tuple[int, str]:
    """decode-2 before decode-10."""
    return len(name), name


class Overview(msgspec.Struct, frozen=True):
    """num_running: requests under way at this frontend; requests: what became of its last ones. cluster is None while the
    Conductor does not answer, and detail says why."""

    version: str
    name: str
    frontend: str
    model: str
    ready: bool
    detail: str
    uptime_s: float
    num_running: int
    requests: Summary
    cluster: Cluster | None
