"""What users see when one process dies for a long time (DESIGN section 8), on an otherwise quiet cluster."""

from __future__ import annotations

import random

import pytest

from mooncake.core.types import NANOS_PER_S
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.faults import Fault, Kill, Slow, schedule
from tests.sim.workload import check_core, check_run, requests


def run(config: ClusterConfig, *faults: Fault) -> SimCluster:
    cluster = SimCluster(config, 1, check_core)
    cluster.submit(requests(random.Random(1), 150, 10 * NANOS_PER_S, max_output=60))
    schedule(cluster, faults)
    cluster.run(600 * NANOS_PER_S)
    cluster.settle(70 * NANOS_PER_S)
    check_run(cluster)
    return cluster


def worst_gap_s(cluster: SimCluster) -> float:
    """Longest wait of a client, for its first token or between two."""
    records = [record for record in cluster.records if record.times]
    waits = [record.times[0] - record.request.arrival_ns for record in records]
    waits += [after - before for r in records for before, after in zip(r.times, r.times[1:], strict=False)]
    return max(waits) / NANOS_PER_S


@pytest.mark.parametrize("victim", ["prefill-0", "decode-1", "node-0", "node-1"])
def test_one_of_two_is_gone_for_a_minute_and_nobody_waits_for_it(victim: str) -> None:
    cluster = run(ClusterConfig(), Kill(3 * NANOS_PER_S, victim, 60 * NANOS_PER_S))
    assert all(record.completed or record.outcome == "cancelled" for record in cluster.records)
    assert worst_gap_s(cluster) < 1


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "node-0"])
def test_the_only_one_is_waited_for_until_it_is_back(victim: str) -> None:
    config = ClusterConfig(prefill=1, decode=1, nodes=1)
    cluster = run(config, Kill(3 * NANOS_PER_S, victim, 4 * NANOS_PER_S))
    assert all(record.completed or record.outcome == "cancelled" for record in cluster.records)
    assert worst_gap_s(cluster) < 8


def test_streams_go_on_without_the_conductor_and_new_requests_wait_for_it() -> None:
    cluster = run(ClusterConfig(), Kill(3 * NANOS_PER_S, "conductor", 4 * NANOS_PER_S))
    assert all(record.completed or record.outcome == "cancelled" for record in cluster.records)
    for record in cluster.records:
        if record.times and record.request.arrival_ns < 2_900_000_000:
            assert record.times[-1] - record.request.arrival_ns < NANOS_PER_S
    assert 3 < worst_gap_s(cluster) < 6


def test_a_slow_instance_gets_less_to_do() -> None:
    """Its queue shows in its load, and placement goes by that."""
    config = ClusterConfig(prefill=2, decode=2)
    slowed = run(config, Slow(0, "prefill-0", 0.1, 60 * NANOS_PER_S))
    placed = [sum(record.prefill == name for record in slowed.records) for name in ("prefill-0", "prefill-1")]
    assert placed[0] < 0.6 * placed[1]
    assert all(record.completed or record.outcome == "cancelled" for record in slowed.records)
