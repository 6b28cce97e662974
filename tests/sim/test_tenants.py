"""Tenants under load: a flood of one leaves the others what they would have alone, nearly, and wastes nothing."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Slo
from mooncake.scheduler.config import ConductorConfig
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.frontend import RequestRecord, SimRequest

from .workload import BLOCK, check_run

SPAN_S = 10
PREFILL_MS = 22.5
"""Of 512 tokens in this cluster: so one instance prefills 44 requests a second."""
FLOOD_PER_S = 100
LIGHT_PER_S = 4


def one_of_each(**conductor: Any) -> ClusterConfig:
    settings = {"block_tokens": BLOCK, "kv_token_bytes": 1024, "admission": "off", **conductor}
    return ClusterConfig(prefill=1, decode=1, nodes=1, conductor=ConductorConfig(**settings))


def load(tenant: str, per_s: float, *, seed: int = 0, num_tokens: int = 512, **fields: Any) -> list[SimRequest]:
    """Requests without anything in common, at random times."""
    rng = random.Random(f"{tenant} {seed}")
    return [
        SimRequest(
            arrival_ns=2 * NANOS_PER_S + rng.randrange(SPAN_S * NANOS_PER_S),
            num_tokens=num_tokens,
            output_length=8,
            block_keys=tuple(rng.randbytes(16) for _ in range(num_tokens // BLOCK)),
            tenant=tenant,
            **fields,
        )
        for _ in range(int(per_s * SPAN_S))
    ]


def run(config: ClusterConfig, *loads: Sequence[SimRequest]) -> dict[str, list[RequestRecord]]:
    cluster = SimCluster(config, seed=1)
    cluster.submit(sorted((request for each in loads for request in each), key=lambda request: request.arrival_ns))
    cluster.run(400 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    found: dict[str, list[RequestRecord]] = {}
    for record in cluster.records:
        found.setdefault(record.request.tenant, []).append(record)
    return found


def ttfts_ms(records: Sequence[RequestRecord]) -> list[float]:
    return sorted((record.times[0] - record.request.arrival_ns) / NANOS_PER_MS for record in records if record.times)


def end_s(records: Sequence[RequestRecord]) -> float:
    return max(record.times[-1] for record in records if record.times) / NANOS_PER_S


def test_a_flood_leaves_a_light_tenant_its_ttft() -> None:
    """2.5 times what the instance can do, of which the light tenant has 4 %: its requests wait for the prefill that is under
    way, and for few of the flood's between its own."""
    flood, light = load("flood", FLOOD_PER_S), load("light", LIGHT_PER_S)
    alone = ttfts_ms(run(one_of_each(), light)["light"])
    both = run(one_of_each(), flood, light)
    beside = ttfts_ms(both["light"])
    assert len(beside) == len(light) and all(record.completed for record in both["light"])
    print(f"alone {statistics.fmean(alone):.1f} ms, beside {statistics.fmean(beside):.1f} ms, max {max(beside):.1f} ms")
    assert statistics.fmean(beside) <= statistics.fmean(alone) + 2 * PREFILL_MS
    assert max(beside) <= max(alone) + 4 * PREFILL_MS
    assert statistics.fmean(ttfts_ms(both["flood"])) > 5000


def test_without_tenants_it_would_wait_like_all_others() -> None:
    """So the test above shows something."""
    flood, light = load("", FLOOD_PER_S), load("", LIGHT_PER_S, seed=1)
    assert statistics.fmean(ttfts_ms(run(one_of_each(), flood, light)[""])) > 5000


def test_what_nobody_else_wants_the_flood_gets() -> None:
    """As many tokens are computed in the same time, whoever they are for."""
    one_tenant = run(one_of_each(), load("x", FLOOD_PER_S), load("x", LIGHT_PER_S, seed=1))
    two_tenants = run(one_of_each(), load("x", FLOOD_PER_S), load("y", LIGHT_PER_S, seed=1))
    ends = [end_s([record for each in found.values() for record in each]) for found in (one_tenant, two_tenants)]
    assert ends[1] == pytest.approx(ends[0], rel=0.01)
    alone = run(one_of_each(), load("x", FLOOD_PER_S))
    assert end_s(alone["x"]) <= ends[1]


def test_floods_share_by_weight() -> None:
    """Of what was done while both waited, three quarters are of the tenant that weighs three times as much."""
    found = run(one_of_each(), load("a", 60, weight=3.0), load("b", 60, weight=1.0))
    until = 2 * NANOS_PER_S + 9 * NANOS_PER_S
    done = {name: sum(record.times[0] <= until for record in records) for name, records in found.items()}
    share = done["a"] / (done["a"] + done["b"])
    print(done)
    assert share == pytest.approx(0.75, abs=0.04)


def test_large_prompts_count_as_what_they_are() -> None:
    """Eight times longer prompts, an eighth as many get their turn."""
    found = run(one_of_each(), load("long", 10, num_tokens=4096), load("short", 80))
    until = 2 * NANOS_PER_S + 9 * NANOS_PER_S
    tokens = {
        name: sum(record.request.num_tokens for record in records if record.times[0] <= until)
        for name, records in found.items()
    }
    assert tokens["long"] / tokens["short"] == pytest.approx(1.0, abs=0.2)


def test_a_tenant_that_fills_its_quota_takes_nothing_of_the_others_and_loses_no_request() -> None:
    """A store of thirty prompts, of which the flood may have four; it brings two hundred."""
    prompt_bytes = 512 * 1024
    flood, light = load("flood", 20), load("light", 1)
    later = [msgspec.structs.replace(each, arrival_ns=each.arrival_ns + 20 * NANOS_PER_S) for each in light]

    def reused(quotas: dict[str, int]) -> int:
        base = one_of_each()
        node = msgspec.structs.replace(base.node, capacity_bytes=30 * prompt_bytes, quotas=quotas)
        found = run(msgspec.structs.replace(base, node=node, num_pages=40), flood, light, later)
        assert all(record.completed for records in found.values() for record in records)
        return sum([record.cached_tokens for record in found["light"]])

    whole = sum([each.num_tokens - BLOCK for each in later])  # the last block is computed: it gives the first token
    assert reused({"flood": 4 * prompt_bytes}) == whole
    assert reused({}) <= whole / 4


def test_priority_stays_inside_a_tenant() -> None:
    flood = load("flood", FLOOD_PER_S, priority=9)
    light, urgent = load("light", 2), load("light", 2, seed=1, priority=1)
    found = run(one_of_each(), flood, light, urgent)
    assert max(ttfts_ms(found["light"])) <= 200
    crowd = run(one_of_each(), load("x", FLOOD_PER_S), load("x", 2, seed=1, priority=1))["x"]
    by_priority = {
        priority: statistics.fmean(ttfts_ms([r for r in crowd if r.request.priority == priority]))
        for priority in (0, 1)
    }
    assert by_priority[1] < 100 < 5000 < by_priority[0]


def test_admission_refuses_the_flood_and_not_the_light_tenant() -> None:
    slo = Slo(ttft_ns=400 * NANOS_PER_MS)
    flood, light = load("flood", FLOOD_PER_S, slo=slo), load("light", LIGHT_PER_S, slo=slo)
    found = run(one_of_each(admission="hard"), flood, light)
    assert all(record.completed for record in found["light"])
    refused = sum(record.outcome == "overloaded" for record in found["flood"])
    assert refused > len(flood) // 3
    for records in found.values():
        met = [ttft <= 400 for ttft in ttfts_ms(records)]
        assert sum(met) >= 0.95 * len(met)
