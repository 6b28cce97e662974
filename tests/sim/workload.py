"""Requests with shared prefixes, and the laws that every run must obey."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mooncake.core.types import NANOS_PER_S
from mooncake.sim.cluster import ClusterConfig, SimCluster, Watch
from mooncake.sim.faults import FaultRates, draw_faults, schedule
from mooncake.sim.frontend import CANCELLED, FRONTEND_LOST, SimRequest
from mooncake.sim.network import NetworkConfig
from mooncake.sim.node import NodeConfig

BLOCK = 64
LOSSY = NetworkConfig(loss=0.002, repeat=0.005, delay=0.01)
FAULTY = ClusterConfig(frontends=2, network=LOSSY, node=NodeConfig(fault=0.01), engine_fault=0.002)
USUAL = FaultRates()
ENDINGS = ("stop", "length", CANCELLED, FRONTEND_LOST)


def requests(
    rng: random.Random, count: int, span_ns: int, *, max_output: int = 16, num_choices: Sequence[int] = (1,)
) -> Iterator[SimRequest]:
    """Prompts of 1 to 600 tokens, most of which begin like one of a dozen documents."""
    documents = [[rng.randbytes(16) for _ in range(6)] for _ in range(12)]
    for _ in range(count):
        num_tokens = rng.randrange(1, 500)
        num_blocks = num_tokens // BLOCK
        shared = rng.choice(documents)[: min(num_blocks, rng.randrange(7))]
        keys = (*shared, *(rng.randbytes(16) for _ in range(num_blocks - len(shared))))
        yield SimRequest(
            arrival_ns=rng.randrange(span_ns),
            num_tokens=num_tokens,
            output_length=rng.randrange(1, max_output),
            block_keys=keys,
            max_tokens=rng.choice((1, 8, 1000, 1000)),
            cancel_after_ns=rng.randrange(100_000_000) if rng.random() < 0.02 else None,
            num_choices=rng.choice(num_choices) if len(num_choices) > 1 else num_choices[0],
        )


def run_with_faults(
    config: ClusterConfig,
    seed: int,
    count: int,
    span_ns: int,
    rates: FaultRates = USUAL,
    *,
    check: bool = False,
    watch: Watch | None = None,
    num_choices: Sequence[int] = (1,),
) -> SimCluster:
    """check: the laws of the core that was touched, after every event. Cores share nothing, so the others still hold theirs."""
    cluster = SimCluster(config, seed, check_core if check else watch)
    rng = random.Random(seed)
    cluster.submit(requests(rng, count, span_ns, num_choices=num_choices))
    schedule(cluster, draw_faults(rng, cluster.names, span_ns, rates))
    cluster.run(2000 * NANOS_PER_S)
    cluster.settle(25 * NANOS_PER_S)
    check_run(cluster)
    return cluster


def check_core(now: int, name: str, core: Any, event: Any, commands: list[Any]) -> None:
    core.check_integrity()


def check_run(cluster: SimCluster) -> None:
    """Every request ended once, with exactly its tokens; nothing is held any more. Ending twice fails where it happens."""
    cluster.check_integrity()
    for record in cluster.records:
        assert record.outcome, f"request {record.number} never ended"
        for index, choice in enumerate(record.choices):
            expected = record.expected_tokens(index)
            assert choice.tokens == expected[: len(choice.tokens)], f"request {record.number} has wrong tokens"
            if record.completed:
                stops = record.request.output_length + index <= record.request.max_tokens
                assert choice.tokens == expected and choice.finish == ("stop" if stops else "length")
    assert cluster.leftovers() == {}


def count_outcomes(cluster: SimCluster) -> Counter[str]:
    return Counter(record.outcome for record in cluster.records)
