"""Beyond capacity what is accepted keeps its objectives, as much is done as at best, and the rest hears at once that it is not
served. `benchmarks/overload.py` shows the same of real processes."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from mooncake.config import Config, SimulatedConfig
from mooncake.core.stats import tbt
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Slo, Stage
from mooncake.sim.cluster import SimCluster
from mooncake.sim.frontend import RequestRecord, SimRequest
from mooncake.sim.live_config import cluster_config

from .workload import check_run

BLOCK = Config().block_tokens
CALIBRATE_S, WARM_S, SPAN_S = 20, 10, 60
"""At the first rate, so that predictions are trusted; then at the rate in question until queues are full; then it counts."""


class Shape(NamedTuple):
    """A workload, and the rates at which its peak is looked for."""

    name: str
    num_tokens: int
    num_output: tuple[int, int]
    slo: Slo
    rates: tuple[float, ...]


SHAPES = (
    Shape("prefill is short", 1000, (16, 80), Slo(2 * NANOS_PER_S, 150 * NANOS_PER_MS), (7, 9, 11)),
    Shape("places are short", 100, (200, 400), Slo(2 * NANOS_PER_S, 100 * NANOS_PER_MS), (7, 8.5, 10)),
    Shape("steps are long", 100, (200, 400), Slo(2 * NANOS_PER_S, 25 * NANOS_PER_MS), (3, 5, 7, 9)),
)


class Outcome(NamedTuple):
    """Of what arrived after the first seconds. goodput: output tokens per second, as long outputs are accepted in place of
    short ones, which bear less delay, when there are too many. refused_ms: how long each refusal took."""

    goodput: float
    slo_of_accepted: float
    refused_ms: list[float]
    num_failed: int


def arrivals(rng: random.Random, rate: float, shape: Shape) -> list[SimRequest]:
    found: list[SimRequest] = []
    at = rng.expovariate(shape.rates[0])
    while at < CALIBRATE_S + WARM_S + SPAN_S:
        output = rng.randrange(*shape.num_output)
        found.append(
            SimRequest(
                arrival_ns=NANOS_PER_S + int(at * NANOS_PER_S),
                num_tokens=shape.num_tokens,
                output_length=output,
                block_keys=tuple(rng.randbytes(16) for _ in range(shape.num_tokens // BLOCK)),
                max_tokens=output,
                client_max_tokens=output,
                slo=shape.slo,
            )
        )
        at += rng.expovariate(rate if at > CALIBRATE_S else shape.rates[0])
    return found


def run(shape: Shape, rate: float) -> Outcome:
    config = Config(engine="simulated", simulated=SimulatedConfig("h100", 0.5), admission="soft")
    cluster = SimCluster(cluster_config(config), seed=1)
    rng = random.Random(7)
    cluster.submit(arrivals(rng, rate, shape))
    cluster.run(1000 * NANOS_PER_S)
    cluster.settle()
    check_run(cluster)
    counted = [each for each in cluster.records if each.request.arrival_ns >= (1 + CALIBRATE_S + WARM_S) * NANOS_PER_S]
    accepted = [record for record in counted if record.outcome != "overloaded"]
    effective = [record for record in accepted if is_effective(record)]
    num_tokens = sum(len(record.times) for record in effective)
    refused = [latency_ms(record) for record in counted if record.outcome == "overloaded"]
    num_failed = sum(not record.completed for record in accepted)
    return Outcome(num_tokens / SPAN_S, len(effective) / len(accepted), refused, num_failed)


def latency_ms(record: RequestRecord) -> float:
    end = record.timeline[Stage.END]
    assert end is not None
    return (end - record.request.arrival_ns) / NANOS_PER_MS


def is_effective(record: RequestRecord) -> bool:
    slo, times = record.request.slo, record.times
    assert slo.ttft_ns is not None and slo.tbt_ns is not None
    if not record.completed or times[0] - record.request.arrival_ns > slo.ttft_ns:
        return False
    measured = tbt(times)
    return measured is None or measured <= slo.tbt_ns


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_beyond_capacity(shape: Shape) -> None:
    goodput, rate = max((run(shape, rate).goodput, rate) for rate in shape.rates)
    for factor in (1.5, 3.0):
        found = run(shape, factor * rate)
        refused = sorted(found.refused_ms)
        p99 = refused[int(0.99 * len(refused))]
        print(
            f"{shape.name}: peak {goodput:.0f} at {rate}/s; x{factor}: {found.goodput / goodput:.2f} of it, "
            f"{100 * found.slo_of_accepted:.1f} % of accepted in time, {len(refused)} refused, p99 after {p99:.1f} ms"
        )
        assert found.num_failed == 0
        assert found.slo_of_accepted >= 0.95
        assert found.goodput >= 0.9 * goodput
        assert p99 <= 50
