"""The SSD tier in the simulated cluster: a working set larger than memory, what the Conductor knows of it, and faults."""

from __future__ import annotations

import random

import msgspec

from mooncake.core.keys import block_keys_of
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, CostModel
from mooncake.scheduler.config import ConductorConfig, Rates
from mooncake.scheduler.prefix_index import ANY, FAST
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.collect import RequestLine
from mooncake.sim.faults import FaultRates
from mooncake.sim.frontend import SimRequest
from mooncake.sim.network import NetworkConfig
from mooncake.sim.node import NodeConfig
from mooncake.sim.replay import Replay, run_replay
from mooncake.sim.workload import START_NS
from tests.sim.workload import BLOCK, ENDINGS, FAULTY, check_core, check_run, count_outcomes, run_with_faults

BLOCK_BYTES = BLOCK * 1024
SSD_RATE = BLOCK_BYTES * 1e3
"""A block in a millisecond."""
EXACT = ClusterConfig(
    prefill=1,
    decode=1,
    nodes=1,
    num_pages=20,
    cost=CostModel((0.0, 1000.0, 0.0), (10.0, 0.0, 0.0)),
    network=NetworkConfig(latency_ns=0, jitter_ns=0),
    node=NodeConfig(
        capacity_bytes=16 * BLOCK_BYTES,
        call_ns=0,
        local_bytes_per_s=1e18,
        ssd_bytes=100 * BLOCK_BYTES,
        ssd_bytes_per_s=SSD_RATE,
    ),
    conductor=ConductorConfig(
        block_tokens=BLOCK, kv_token_bytes=1024, admission="off", rates=Rates(1e15, ssd_bytes_per_s=SSD_RATE)
    ),
)
"""A prefilled token takes 1 ms; memory holds 16 blocks, four of them ready to go, and the pages of an instance five."""


def request(at_ms: int, num_tokens: int, *keys: int) -> SimRequest:
    block_keys = tuple([key.to_bytes(16, "little") for key in keys])
    return SimRequest(START_NS + at_ms * NANOS_PER_MS, num_tokens, 1, block_keys)


def replay(config: ClusterConfig, *requests: SimRequest) -> tuple[Replay, list[RequestLine]]:
    lines: list[bytes] = []
    done = run_replay(config, iter(requests), 10 * NANOS_PER_S, write=lines.append)
    return done, [msgspec.json.decode(line, type=RequestLine) for line in lines]


def without_ssd(config: ClusterConfig) -> ClusterConfig:
    return msgspec.structs.replace(config, node=msgspec.structs.replace(config.node, ssd_bytes=0))


STRANGERS = [request(1000 * at, 256, *range(10 * at, 10 * at + 4)) for at in range(1, 6)]
REQUESTS = [request(0, 192, 1, 2, 3), *STRANGERS, request(6000, 256, 1, 2, 3, 4)]
"""Five strangers push the first prompt out of pages and memory. The last one begins like it, with three of its four blocks."""


def test_a_prefix_comes_back_from_ssd_in_the_time_it_takes() -> None:
    """3 ms, of which nothing is hidden, as a prefill begins when its source is open. The other 64 tokens are computed."""
    done, lines = replay(EXACT, *REQUESTS)
    last = lines[-1]
    assert (last.cached_tokens, last.reused.ssd, last.reused.dram_local, last.reused.hbm) == (192, 192, 0, 0)
    assert (last.ttft_ms, last.predicted_ttft_ms) == (64.0 + 3.0, 64.0 + 3.0)
    assert done.collector.total("ssd") == 192
    [ssd] = [link for link in done.links if link.name == "node-0.ssd"]
    counters = done.nodes[0].counters
    assert ssd.num_bytes == (counters["ssd_writes"] + counters["ssd_reads"]) * BLOCK_BYTES
    assert (counters["ssd_reads"], counters["lost_evictions"]) == (3, 0)


def test_without_ssd_it_is_computed_again() -> None:
    done, lines = replay(without_ssd(EXACT), *REQUESTS)
    assert (lines[-1].cached_tokens, lines[-1].ttft_ms, done.collector.total("ssd")) == (0, 256.0, 0)
    assert not [link for link in done.links if link.name == "node-0.ssd"]


def test_the_conductor_prices_ssd_by_its_rate() -> None:
    """On a disk where these blocks take 300 ms, computing them is quicker: then nobody asks for them. Policy joint hides loads
    behind computing, but not what is read from SSD before."""
    joint = msgspec.structs.replace(EXACT.conductor, policy="joint")
    slow = msgspec.structs.replace(joint, rates=Rates(1e15, ssd_bytes_per_s=SSD_RATE / 100))
    _, lines = replay(msgspec.structs.replace(EXACT, conductor=joint), *REQUESTS)
    assert (lines[-1].cached_tokens, lines[-1].ttft_ms, lines[-1].predicted_ttft_ms) == (192, 67.0, 67.0)
    done, lines = replay(msgspec.structs.replace(EXACT, conductor=slow), *REQUESTS)
    assert (lines[-1].cached_tokens, lines[-1].ttft_ms, lines[-1].predicted_ttft_ms) == (0, 256.0, 256.0)
    assert done.nodes[0].counters["ssd_reads"] == 0


def documents(rounds: int) -> list[SimRequest]:
    """Thirty documents of six blocks, each asked about in each round: six times what memory holds."""
    rng = random.Random(3)
    texts = [[rng.randbytes(16) for _ in range(6)] for _ in range(30)]
    asked = [SimRequest(0, 6 * BLOCK + 70, 8, (*text, rng.randbytes(16))) for _ in range(rounds) for text in texts]
    return [msgspec.structs.replace(each, arrival_ns=START_NS + at * 20_000_000) for at, each in enumerate(asked)]


def large(ssd_bytes: int) -> ClusterConfig:
    node = NodeConfig(capacity_bytes=30 * BLOCK_BYTES, ssd_bytes=ssd_bytes, ssd_bytes_per_s=1e9)
    return ClusterConfig(prefill=1, decode=1, nodes=1, num_pages=200, node=node)


def test_a_working_set_larger_than_memory_is_found_on_ssd() -> None:
    cached = {}
    for ssd_bytes in (0, 1000 * BLOCK_BYTES):
        cluster = SimCluster(large(ssd_bytes), 1, check_core)
        cluster.submit(documents(3))
        cluster.run(100 * NANOS_PER_S)
        cluster.settle()
        check_run(cluster)
        assert {record.outcome for record in cluster.records} == {"stop"}
        cached[ssd_bytes] = sum(record.cached_tokens for record in cluster.records)
    everything = 2 * 30 * 6 * BLOCK
    assert cached[0] == 0
    assert cached[1000 * BLOCK_BYTES] > 0.9 * everything


def test_the_conductor_knows_each_tier() -> None:
    cluster = SimCluster(large(1000 * BLOCK_BYTES), 1)
    cluster.submit(documents(2))
    cluster.run(100 * NANOS_PER_S)
    cluster.settle()
    check_index(cluster)
    store = cluster.nodes["node-0"].core
    assert len(store._ssd.log.copies) > len(store._objects.by_key) > 20  # type: ignore[union-attr]
    cluster.kill("conductor")
    cluster.start("conductor")
    cluster.settle()
    check_index(cluster)


def test_a_node_that_was_killed_has_its_ssd_back() -> None:
    cluster = SimCluster(large(1000 * BLOCK_BYTES), 1, check_core)
    cluster.submit(documents(1))
    cluster.run(100 * NANOS_PER_S)
    cluster.settle()
    known = list(cluster.nodes["node-0"].core._ssd.log.copies)  # type: ignore[union-attr]
    cluster.kill("node-0")
    cluster.start("node-0")
    cluster.settle()
    store = cluster.nodes["node-0"].core
    assert list(store._ssd.log.copies) == known and len(known) > 100  # type: ignore[union-attr]
    assert not store._objects.by_key
    check_index(cluster)


def check_index(cluster: SimCluster) -> None:
    assert cluster.conductor is not None
    core = cluster.conductor.core
    for name, node in cluster.nodes.items():
        slot, store = core.view.slot(name), node.core
        memory = dict.fromkeys(block_keys_of(tuple(store._objects.by_key)))
        ssd = dict.fromkeys(block_keys_of(tuple(store._ssd.log.copies)))  # type: ignore[union-attr]
        for key in memory | ssd:
            match = core.index.match([key])
            assert (match.length(slot, FAST), match.length(slot, ANY)) == (key in memory, 1)
        assert core.index.num_held(slot) == len(memory | ssd)


TIERED = msgspec.structs.replace(
    FAULTY,
    num_pages=160,
    node=NodeConfig(
        capacity_bytes=40 * BLOCK_BYTES, ssd_bytes=80 * BLOCK_BYTES, ssd_bytes_per_s=2e8, fault=0.01, ssd_fault=0.05
    ),
)


def test_kills_and_faults_leave_nothing_behind() -> None:
    reads = errors = 0
    for seed in range(8):
        cluster = run_with_faults(TIERED, seed, 100, 3 * NANOS_PER_S, FaultRates(kills=8), check=True)
        assert sum(count_outcomes(cluster)[ending] for ending in ENDINGS) >= 98
        for node in cluster.nodes.values():
            metrics = node.core.metrics()
            reads += metrics["ssd_reads"]
            errors += metrics["ssd_read_errors"] + metrics["ssd_write_errors"]
    assert reads > 40 and errors > 10


def test_a_disk_that_fails_half_the_time_costs_hits_only() -> None:
    config = large(1000 * BLOCK_BYTES)
    cluster = SimCluster(msgspec.structs.replace(config, node=msgspec.structs.replace(config.node, ssd_fault=0.5)), 1)
    cluster.submit(documents(2))
    cluster.run(100 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    check_index(cluster)
    assert {(record.outcome, record.num_attempts) for record in cluster.records} == {("stop", 1)}
    metrics = cluster.nodes["node-0"].core.metrics()
    assert metrics["ssd_read_errors"] > 0 and metrics["ssd_write_errors"] > 0
    assert 0 < sum(record.cached_tokens for record in cluster.records) < 0.5 * 30 * 6 * BLOCK
