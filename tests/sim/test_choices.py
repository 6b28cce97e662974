"""Requests of several choices: one prefill, one hand-over, shared pages; and every choice ends once, with its own tokens."""

from __future__ import annotations

import random

import msgspec
import pytest

from mooncake.core.types import NANOS_PER_S
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.frontend import SimRequest
from tests.sim.test_faults import HARSH, NETWORKS
from tests.sim.workload import BLOCK, ENDINGS, FAULTY, check_core, check_run, count_outcomes, requests, run_with_faults

NUM_CHOICES = (1, 2, 3, 8)
IN_PLACE = msgspec.structs.replace(FAULTY, prefill=0, decode=0, colocated=2)


def test_the_prompt_is_computed_once_and_its_blocks_are_loaded_once() -> None:
    config = ClusterConfig(prefill=1, decode=1, nodes=1)
    cluster = SimCluster(config, 1, check_core)
    rng = random.Random(1)
    prompts, span, output = (300, 320, 40), 5, 100
    for at, num_tokens in enumerate(prompts):
        keys = tuple(rng.randbytes(16) for _ in range(num_tokens // BLOCK))
        request = SimRequest((1 + span * at) * NANOS_PER_S, num_tokens, output, keys, num_choices=4)
        cluster.submit([request])
    held: list[int] = []
    pool = cluster.instances["decode-0"].engine.core.pool
    for at, num_tokens in enumerate(prompts):
        cluster.loop.run((1 + span * at) * NANOS_PER_S + NANOS_PER_S // 2)
        pages = {page for seq in pool.holders() for page in pool.pages(seq)}
        shared = num_tokens // BLOCK * (BLOCK // config.page_tokens)
        [context] = {len(pool.pages(seq)) for seq in pool.holders()}
        assert len(pages) == shared + 4 * (context - shared)
        held.append(len(pages))
    cluster.run(600 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    assert [record.num_attempts for record in cluster.records] == [1, 1, 1]
    assert cluster.instances["prefill-0"].engine.core.num_computed_tokens == sum(prompts)
    partial = sum(num_tokens % BLOCK for num_tokens in prompts)
    assert cluster.instances["decode-0"].engine.core.num_loaded_tokens == sum(prompts) + 3 * partial


@pytest.mark.parametrize("config", [ClusterConfig(), ClusterConfig(prefill=0, decode=0, colocated=2)])
def test_without_faults_nothing_is_tried_twice(config: ClusterConfig) -> None:
    cluster = SimCluster(config, 3, check_core)
    cluster.submit(requests(random.Random(3), 150, 10 * NANOS_PER_S, num_choices=NUM_CHOICES))
    cluster.run(600 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    assert {record.num_attempts for record in cluster.records} == {1}
    assert all(record.completed or record.outcome == "cancelled" for record in cluster.records)


@pytest.mark.parametrize("config", [FAULTY, IN_PLACE], ids=["apart", "in place"])
def test_every_choice_ends_once_under_faults(config: ClusterConfig) -> None:
    for seed in range(12):
        cluster = run_with_faults(config, seed, 80, 2 * NANOS_PER_S, check=True, num_choices=NUM_CHOICES)
        outcomes = count_outcomes(cluster)
        assert outcomes.total() == 80 and sum(outcomes[ending] for ending in ENDINGS) >= 79, (seed, outcomes)


@pytest.mark.parametrize("network", NETWORKS)
def test_harsher_networks(network: str) -> None:
    config = msgspec.structs.replace(FAULTY, network=NETWORKS[network])
    for seed in range(3):
        cluster = run_with_faults(config, seed, 100, 3 * NANOS_PER_S, HARSH, check=True, num_choices=NUM_CHOICES)
        outcomes = count_outcomes(cluster)
        assert sum(outcomes[ending] for ending in ENDINGS) >= 98, (seed, outcomes)
