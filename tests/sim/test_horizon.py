"""Runs of many steps as one event give every token the time it has one step at a time."""

from __future__ import annotations

import random

import msgspec
import pytest

from mooncake.core.types import NANOS_PER_S
from mooncake.sim.cluster import ClusterConfig, SimCluster
from tests.sim.workload import check_run, requests


def _run(one_step: bool, seed: int, num_pages: int, num_choices: int) -> SimCluster:
    """One instance of each role: load reports, which come less often from long runs, then change no placement. Of policy joint
    they would: it asks decode instances whether they have room to prefill in place."""
    config = ClusterConfig(prefill=1, decode=1, nodes=1, num_pages=num_pages, one_step=one_step)
    conductor = msgspec.structs.replace(config.conductor, policy="algorithm1")
    config = msgspec.structs.replace(config, conductor=conductor)
    quiet = msgspec.structs.replace(config.network, jitter_ns=0)  # random draws would not line up
    cluster = SimCluster(msgspec.structs.replace(config, network=quiet), seed)
    cluster.submit(requests(random.Random(seed), 100, 4 * NANOS_PER_S, max_output=200, num_choices=(num_choices,)))
    cluster.run(600 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    return cluster


@pytest.mark.parametrize(("seed", "num_pages", "num_choices"), [(1, 2048, 1), (2, 2048, 1), (3, 300, 1), (4, 2048, 3)])
def test_every_token_has_the_same_time(seed: int, num_pages: int, num_choices: int) -> None:
    single, runs = _run(True, seed, num_pages, num_choices), _run(False, seed, num_pages, num_choices)
    for one, other in zip(single.records, runs.records, strict=True):
        if one.outcome != "cancelled":
            assert one.outcome == other.outcome
            for choice, same in zip(one.choices, other.choices, strict=True):
                assert choice.tokens == same.tokens
                assert choice.computed == same.computed, f"request {one.number}"
                assert choice.times == same.times, f"request {one.number}"
    assert runs.loop.num_events < single.loop.num_events
