"""Copies of hot prefixes between store nodes: carried out, of use, and harmless when processes die meanwhile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mooncake.core.keys import object_keys
from mooncake.core.messages import CopyBlocks, Send
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.scheduler.config import ConductorConfig, Rates, ReplicationConfig
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.copier import SimCopier
from mooncake.sim.faults import FaultRates
from mooncake.sim.frontend import SimRequest
from mooncake.sim.network import NetworkConfig
from mooncake.sim.node import SHARD, NodeConfig, SimNode
from mooncake.store.events import Exists, Reply
from tests.sim.workload import BLOCK, ENDINGS, FAULTY, check_core, check_run, count_outcomes, run_with_faults

NIC = 80e6
"""Of 64 blocks of 64 KiB, one copy takes 52 ms."""
EAGER = ReplicationConfig(num_uses_min=2, num_blocks_min=2, nic_share=0.0001, rest_ns=NANOS_PER_S // 10)
PREFIX_BLOCKS = 64
HARSH = FaultRates(kills=14, cuts=4, resets=8)


def config(*, replicate: bool) -> ClusterConfig:
    return ClusterConfig(
        prefill=6,
        decode=2,
        nodes=6,
        num_pages=384,
        network=NetworkConfig(jitter_ns=0),
        node=NodeConfig(nic_bytes_per_s=NIC),
        conductor=ConductorConfig(
            block_tokens=BLOCK,
            kv_token_bytes=1024,
            rates=Rates(remote_bytes_per_s=NIC, nic_bytes_per_s=NIC),
            replicate=replicate,
            replication=EAGER,
        ),
    )


def uses_of_one_prefix(rng: random.Random) -> Iterator[SimRequest]:
    """Now and then one, each followed by another long prompt on each instance, so that it stays in the store but not in the
    pages; and then many at once."""
    prefix = [rng.randbytes(16) for _ in range(PREFIX_BLOCKS)]

    def request(at_ms: int, keys: list[bytes]) -> SimRequest:
        own = (*keys, *(rng.randbytes(16) for _ in range(8)))
        return SimRequest(at_ms * NANOS_PER_MS, len(own) * BLOCK + 5, 4, own, max_tokens=100)

    for at in range(12):
        yield request(1000 + 1000 * at, prefix)
        for _ in range(6):
            yield request(1500 + 1000 * at, [rng.randbytes(16) for _ in range(PREFIX_BLOCKS)])
    for _ in range(18):
        yield request(BURST_NS // NANOS_PER_MS, prefix)


BURST_NS = 14 * NANOS_PER_S


class Run:
    """num_holders: nodes that have the prefix before the burst. waited_ms: what transfers waited for NICs in it, all
    together; ttft_ms: mean time to the first token of its requests."""

    def __init__(self, *, replicate: bool) -> None:
        cluster = SimCluster(config(replicate=replicate), 1)
        cluster.submit(uses_of_one_prefix(random.Random(1)))
        cluster.loop.run(BURST_NS - 1)
        [last] = cluster.records[-1:]
        self.num_holders = sum(holds(node, last.request) for node in cluster.nodes.values())
        before_ns = waited_ns(cluster)
        cluster.run(60 * NANOS_PER_S)
        cluster.settle()
        check_run(cluster)
        self.waited_ms = (waited_ns(cluster) - before_ns) / NANOS_PER_MS
        burst = [record for record in cluster.records if record.request.arrival_ns == BURST_NS]
        waits = [record.times[0] - record.request.arrival_ns for record in burst]
        self.ttft_ms = sum(waits) / len(waits) / NANOS_PER_MS
        assert cluster.conductor is not None
        self.num_copies = cluster.conductor.core.counts["replicated"]


def holds(node: SimNode, request: SimRequest) -> bool:
    """Whether the node has the whole prefix."""
    keys = object_keys(request.block_keys[:PREFIX_BLOCKS], SHARD)
    [reply] = node.core.handle(Exists(0, 0, keys), node.loop.now)
    assert isinstance(reply, Reply)
    return all(reply.results)


def waited_ns(cluster: SimCluster) -> int:
    return sum(node.nic_out.waited_ns for node in cluster.nodes.values())


def test_a_hot_prefix_gets_more_holders_and_nobody_waits_for_one_nic() -> None:
    off, on = Run(replicate=False), Run(replicate=True)
    print(f"waited for NICs {off.waited_ms:.0f} ms, with copies {on.waited_ms:.0f} ms")
    print(f"mean TTFT {off.ttft_ms:.0f} ms, with copies {on.ttft_ms:.0f} ms")
    assert (off.num_holders, off.num_copies) == (1, 0) and (on.num_holders, on.num_copies) == (6, 5)
    assert off.waited_ms > 500 and on.waited_ms < 50
    assert on.ttft_ms < 0.6 * off.ttft_ms


@pytest.mark.parametrize("victim", ["source", "target", "conductor", "cut"])
def test_nothing_is_held_after_a_copy_that_was_cut_short(victim: str) -> None:
    cluster = SimCluster(config(replicate=True), 1)
    cluster.submit(uses_of_one_prefix(random.Random(1)))
    copying: list[SimCopier] = []
    while not copying:
        cluster.loop.run(cluster.loop.now + NANOS_PER_MS)
        copiers = [(name, node.copier) for name, node in cluster.nodes.items()]
        copying = [copier for _, copier in copiers if isinstance(copier, SimCopier) and copier.running is not None]
    [target] = [name for name, copier in copiers if copier in copying]
    assert copying[0].running is not None
    source = copying[0].running.source.node
    if victim == "cut":
        cluster.cut(source, target, NANOS_PER_S)
    else:
        name = {"source": source, "target": target}.get(victim, victim)
        cluster.kill(name)
        cluster.loop.after(NANOS_PER_S, cluster.start, name)
    cluster.run(60 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    assert all(record.completed for record in cluster.records)
    assert any(holds(node, cluster.records[-1].request) for node in cluster.nodes.values())


def test_copies_under_faults_of_all_kinds() -> None:
    """The usual laws and promises, while copies are made now and then."""
    faulty = msgspec.structs.replace(
        FAULTY,
        nodes=4,
        num_pages=64,
        node=msgspec.structs.replace(FAULTY.node, nic_bytes_per_s=4e6, capacity_bytes=4 << 20),
        conductor=msgspec.structs.replace(config(replicate=True).conductor, rates=Rates(nic_bytes_per_s=4e6)),
    )
    outcomes: Counter[str] = Counter()
    num_copies = 0

    def count(now: int, name: str, core: Any, event: Any, commands: list[Any]) -> None:
        nonlocal num_copies
        check_core(now, name, core, event, commands)
        num_copies += sum(isinstance(each, Send) and isinstance(each.message, CopyBlocks) for each in commands)

    for seed in range(8):
        outcomes += count_outcomes(run_with_faults(faulty, seed, 150, 4 * NANOS_PER_S, HARSH, watch=count))
    assert sum(outcomes[ending] for ending in ENDINGS) >= 1195, outcomes
    assert num_copies > 60
