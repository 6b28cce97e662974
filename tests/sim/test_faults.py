"""The whole cluster under kills, cuts, resets, delays, lost and repeated messages, failing copies and failing steps."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from mooncake.core.types import NANOS_PER_S
from mooncake.sim.faults import FaultRates
from tests.sim.workload import ENDINGS, FAULTY, count_outcomes, run_with_faults

HARSH = FaultRates(kills=14, cuts=4, resets=8)


def test_a_thousand_requests_under_a_hundred_seeds_end_exactly_once() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(100):
        outcomes += count_outcomes(run_with_faults(FAULTY, seed, 1000, 20 * NANOS_PER_S, check=False))
    assert outcomes.total() == 100_000
    print(dict(outcomes))
    assert sum(outcomes[ending] for ending in ENDINGS) >= 99_990, outcomes
    assert outcomes["stop"] + outcomes["length"] >= 90_000, outcomes


def test_all_laws_hold_after_every_event() -> None:
    for seed in range(100, 130):
        outcomes = count_outcomes(run_with_faults(FAULTY, seed, 80, 2 * NANOS_PER_S, check=True))
        assert outcomes.total() == 80


NETWORKS = {
    "lossy": msgspec.structs.replace(FAULTY.network, loss=0.02, repeat=0.03, delay=0.05),
    "overtaking": msgspec.structs.replace(FAULTY.network, loss=0.01, repeat=0.02, delay=0.05, reorder=True),
    "far": msgspec.structs.replace(FAULTY.network, latency_ns=20_000_000, jitter_ns=20_000_000),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_harsher_networks(network: str, seed: int) -> None:
    config = msgspec.structs.replace(FAULTY, network=NETWORKS[network])
    outcomes = count_outcomes(run_with_faults(config, seed, 150, 4 * NANOS_PER_S, HARSH, check=True))
    assert sum(outcomes[ending] for ending in ENDINGS) >= 148, outcomes


def test_without_faults_nothing_fails_and_nothing_is_tried_twice() -> None:
    config = msgspec.structs.replace(FAULTY, network=msgspec.structs.replace(FAULTY.network, loss=0, repeat=0, delay=0))
    config = msgspec.structs.replace(config, node=msgspec.structs.replace(config.node, fault=0), engine_fault=0)
    cluster = run_with_faults(
        config, 5, 300, 10 * NANOS_PER_S, FaultRates(kills=0, cuts=0, resets=0, slows=0), check=True
    )
    assert set(count_outcomes(cluster)) <= {"stop", "length", "cancelled"}
    assert {record.num_attempts for record in cluster.records} == {1}


def test_sequences_that_gave_their_pages_back_lose_no_token_when_somebody_dies() -> None:
    node = msgspec.structs.replace(FAULTY.node, nic_bytes_per_s=4e6, capacity_bytes=4 << 20)
    few_pages = msgspec.structs.replace(FAULTY, prefill=2, decode=3, nodes=4, num_pages=96, node=node)
    for seed in (21, 23, 341):
        rates = HARSH if seed % 2 else FaultRates()
        cluster = run_with_faults(few_pages, seed, 150, 5 * NANOS_PER_S, rates, num_choices=(1, 1, 2))
        assert count_outcomes(cluster).total() == 150
