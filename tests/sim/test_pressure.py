"""Pages and store room for three requests, fifty requests at once: all finish, the oldest first."""

from __future__ import annotations

import random

import msgspec

from mooncake.core.types import NANOS_PER_S
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.faults import FaultRates
from mooncake.sim.frontend import SimRequest
from mooncake.sim.node import NodeConfig
from tests.sim.workload import BLOCK, check_core, check_run, run_with_faults

TOKENS, OUTPUT = 300, 60
"""A request begins with 19 pages and 300 kB of KV, and ends with 23 pages."""
TIGHT = ClusterConfig(
    prefill=1, decode=1, nodes=1, num_pages=60, node=NodeConfig(capacity_bytes=3 * 77 * 4096), max_step_tokens=128
)


def test_fifty_requests_in_room_for_three_finish_oldest_first() -> None:
    cluster = SimCluster(TIGHT, 1, check_core)
    rng = random.Random(1)
    keys = [tuple(rng.randbytes(16) for _ in range(TOKENS // BLOCK)) for _ in range(50)]
    cluster.submit(SimRequest(NANOS_PER_S + at, TOKENS, OUTPUT, keys[at]) for at in range(50))
    cluster.run(600 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    assert {record.outcome for record in cluster.records} == {"stop"}
    assert {record.num_attempts for record in cluster.records} == {1}
    firsts = [record.times[0] for record in cluster.records]
    ends = [record.times[-1] for record in cluster.records]
    assert firsts == sorted(firsts)
    assert ends == sorted(ends)
    assert cluster.instances["decode-0"].engine.core.num_preempted > 0


def test_tight_room_with_faults_and_shared_prefixes() -> None:
    config = ClusterConfig(num_pages=130, node=NodeConfig(capacity_bytes=2_200_000, fault=0.01), engine_fault=0.002)
    for seed in range(5):
        cluster = run_with_faults(config, seed, 100, NANOS_PER_S, FaultRates(kills=4, cuts=2), check=True)
        assert all(record.completed or record.outcome in ("cancelled", "frontend_lost") for record in cluster.records)


def test_a_sequence_that_outgrows_all_pages_ends_and_lets_the_next_one_in() -> None:
    cluster = SimCluster(msgspec.structs.replace(TIGHT, num_pages=20, max_step_tokens=512), 1, check_core)
    keys = tuple(bytes([at]) * 16 for at in range(TOKENS // BLOCK))
    cluster.submit(SimRequest(NANOS_PER_S + at, TOKENS, OUTPUT, keys) for at in range(2))
    cluster.run(600 * NANOS_PER_S)
    cluster.settle()
    capacity = 20 * TIGHT.page_tokens
    for record in cluster.records:
        assert (record.outcome, record.num_attempts) == ("length", 1)
        assert record.tokens == record.expected_tokens()[: capacity - TOKENS]
    assert cluster.leftovers() == {}
