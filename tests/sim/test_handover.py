"""KV is on its way to decode while its prompt is prefilled: what is left when the first token is out is the last chunk."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Stage
from mooncake.scheduler.dispatcher import DispatcherLimits
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.faults import Kill, schedule
from mooncake.sim.frontend import SimRequest
from mooncake.sim.network import NetworkConfig
from mooncake.sim.node import NodeConfig
from tests.sim.workload import BLOCK, check_core, check_run

NUM_TOKENS = 16 * BLOCK + 10
CHUNK = 2 * BLOCK
NODE = NodeConfig(local_bytes_per_s=60e6, nic_bytes_per_s=60e6)
"""A chunk, which takes 7 ms to compute, is copied in 2.2 ms."""
CONFIG = ClusterConfig(
    prefill=1, decode=1, nodes=2, max_step_tokens=CHUNK, node=NODE, network=NetworkConfig(jitter_ns=0)
)
START = NANOS_PER_S


def keys(seed: int) -> tuple[bytes, ...]:
    rng = random.Random(seed)
    return tuple(rng.randbytes(16) for _ in range(NUM_TOKENS // BLOCK))


def run(config: ClusterConfig, *requests: SimRequest, watch: Any = check_core) -> SimCluster:
    cluster = SimCluster(config, 1, watch)
    cluster.submit(requests)
    cluster.run(600 * NANOS_PER_S)
    cluster.settle(25 * NANOS_PER_S)
    check_run(cluster)
    return cluster


def gap_ms(cluster: SimCluster, at: int = 0) -> float:
    first, second, *_ = cluster.records[at].times
    return (second - first) / NANOS_PER_MS


def without_parts(config: ClusterConfig) -> ClusterConfig:
    """All prompts are too short to be worth it."""
    return msgspec.structs.replace(config, dispatcher=DispatcherLimits(part_tokens=1 << 20))


def test_the_gap_is_that_of_the_last_chunk() -> None:
    request = SimRequest(START, NUM_TOKENS, 8, keys(1))
    streamed, whole = run(CONFIG, request), run(without_parts(CONFIG), request)
    copy_ms = 1e3 * NUM_TOKENS * NODE.token_bytes / NODE.nic_bytes_per_s
    assert gap_ms(whole) > copy_ms
    assert gap_ms(streamed) < gap_ms(whole) - 0.8 * copy_ms
    assert streamed.records[0].times[0] == whole.records[0].times[0], "the first token is not in its way"
    for cluster in (streamed, whole):
        assert cluster.instances["decode-0"].engine.core.num_loaded_tokens == NUM_TOKENS, "each token is copied once"


def test_a_reused_prefix_is_on_its_way_before_the_prefill_begins() -> None:
    """Both instances are new, so it is read from the node; another prompt is prefilled first."""

    def reused(config: ClusterConfig) -> SimCluster:
        cluster = SimCluster(config, 1, check_core)
        cluster.submit([SimRequest(START, NUM_TOKENS, 8, keys(1))])
        cluster.run(600 * NANOS_PER_S)
        for name in ("prefill-0", "decode-0"):
            cluster.kill(name)
            cluster.start(name)
        again = cluster.loop.now + NANOS_PER_S
        cluster.submit([SimRequest(again, NUM_TOKENS, 8, keys(2)), SimRequest(again + 1, NUM_TOKENS + 5, 8, keys(1))])
        cluster.run(600 * NANOS_PER_S)
        cluster.settle(25 * NANOS_PER_S)
        check_run(cluster)
        assert cluster.instances["prefill-0"].engine.core.num_loaded_tokens == NUM_TOKENS // BLOCK * BLOCK
        return cluster

    streamed, whole = gap_ms(reused(CONFIG), 2), gap_ms(reused(without_parts(CONFIG)), 2)
    assert streamed < whole - 10, (streamed, whole)


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0", "node-0", "node-1", "frontend-0", "conductor"])
def test_who_dies_while_parts_are_on_their_way_leaves_nothing_behind(victim: str) -> None:
    """At each of the many points of such a hand-over."""
    for at in range(0, 90, 3):
        cluster = SimCluster(CONFIG, 1, check_core)
        cluster.submit([SimRequest(START + 2 * index, NUM_TOKENS, 8, keys(index)) for index in range(2)])
        schedule(cluster, [Kill(START + at * NANOS_PER_MS, victim, 50 * NANOS_PER_MS)])
        cluster.run(600 * NANOS_PER_S)
        cluster.settle(25 * NANOS_PER_S)
        check_run(cluster)
        ended = "frontend_lost" if victim == "frontend-0" else "stop"
        assert {record.outcome for record in cluster.records} <= {"stop", ended}


def test_a_client_that_goes_in_the_middle_leaves_nothing_behind() -> None:
    for at in range(1, 90, 4):
        request = SimRequest(START, NUM_TOKENS, 8, keys(1), cancel_after_ns=at * NANOS_PER_MS)
        cluster = SimCluster(CONFIG, 1, check_core)
        cluster.submit([request])
        cluster.run(600 * NANOS_PER_S)
        assert cluster.leftovers() != {}
        cluster.settle(NANOS_PER_S)
        assert cluster.leftovers() == {}, "within a second"


def test_parts_that_are_lost_are_loaded_at_the_hand_over() -> None:
    network = msgspec.structs.replace(CONFIG.network, loss=0.05, repeat=0.05, delay=0.1, reorder=True)
    config = msgspec.structs.replace(CONFIG, network=network)
    cluster = run(config, *(SimRequest(START + at * NANOS_PER_S // 4, NUM_TOKENS, 8, keys(at)) for at in range(20)))
    assert {record.outcome for record in cluster.records} == {"stop"}


def test_a_pool_that_is_full_takes_nothing_ahead_and_preempts_nobody_for_it() -> None:
    """Room for three requests; twenty come at once, and decode is slow."""
    pages = 3 * (NUM_TOKENS + 40) // CONFIG.page_tokens
    config = msgspec.structs.replace(CONFIG, num_pages=pages, prefill=2)
    requests = [SimRequest(START + at, NUM_TOKENS, 40, keys(at)) for at in range(20)]
    cluster = run(config, *requests)
    assert {record.outcome for record in cluster.records} == {"stop"}
    assert {record.num_attempts for record in cluster.records} == {1}
    decode = cluster.instances["decode-0"].engine.core
    assert decode.num_loaded_tokens < 2 * 20 * NUM_TOKENS, "what is evicted before it is used is not loaded ahead again"


def test_stages_pass_in_their_order() -> None:
    [record] = run(CONFIG, SimRequest(START, NUM_TOKENS, 8, keys(1))).records
    times = [record.timeline[stage] for stage in Stage]
    assert None not in times and times == sorted(times)


def test_a_first_token_is_told_at_once_when_its_step_has_waited_for_a_load() -> None:
    """The second prompt's KV is read from the machine's memory, which takes longer than to compute the rest."""
    slow = msgspec.structs.replace(NODE, local_bytes_per_s=5e6)
    conductor = msgspec.structs.replace(CONFIG.conductor, policy="round_robin")
    config = msgspec.structs.replace(CONFIG, prefill=2, nodes=1, node=slow, conductor=conductor)
    cluster = run(config, *[SimRequest(at * START, NUM_TOKENS, 2, keys(1)) for at in (1, 5)])
    for record in cluster.records:
        assert record.times[0] - record.computed[0] == config.network.latency_ns
    later = cluster.records[1]
    started = later.timeline[Stage.PREFILL_START]
    assert started is not None and later.cached_tokens == 16 * BLOCK
    assert later.times[0] - started == 16 * BLOCK * slow.token_bytes / slow.local_bytes_per_s * NANOS_PER_S
