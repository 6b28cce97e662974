"""Three times what a real cluster can do, for a short while: what is accepted is in time, the rest hears at once.

`benchmarks/overload.py` measures it; the bounds here leave room for a machine that is busy with something else."""

from __future__ import annotations

import asyncio
import random
import time
from typing import NamedTuple

from mooncake.core.stats import percentile
from tests.live.harness import Client, Cluster, Completion

TTFT_S, TBT_S = 2.0, 0.15
CAPACITY_PER_S = 9.6
"""Prompts of 1,000 tokens on half an H100; see docs/measurements.md."""
CALIBRATE_S, OVERLOAD_S, WARM_S = 6.0, 20.0, 4.0


class Outcome(NamedTuple):
    """answered_s: until the refusal, or the end."""

    at_s: float
    error: str
    ttft_s: float
    answered_s: float


def arrivals(rng: random.Random) -> list[float]:
    times: list[float] = []
    at = rng.expovariate(0.6 * CAPACITY_PER_S)
    while at < CALIBRATE_S + OVERLOAD_S:
        times.append(at)
        at += rng.expovariate((0.6 if at < CALIBRATE_S else 3.0) * CAPACITY_PER_S)
    return times


async def load(cluster: Cluster, rng: random.Random) -> list[Outcome]:
    async with Client(cluster) as client:
        began = time.perf_counter() + 0.2

        async def ask(at: float) -> Outcome:
            prompt = [rng.randrange(1000, 5000) for _ in range(1000)]
            num_output = rng.randrange(16, 48)
            await asyncio.sleep(began + at - time.perf_counter())
            sent = time.perf_counter()
            found: Completion = await client.complete(prompt, num_output)
            return Outcome(at, found.error, found.ttft_s, time.perf_counter() - sent)

        return list(await asyncio.gather(*(ask(at) for at in arrivals(rng))))


def test_three_times_capacity() -> None:
    half = ("--simulated-hardware", "h100", "--simulated-speed", "0.5", "--prefill", "1", "--decode", "1")
    slo = ("--slo-ttft-s", str(TTFT_S), "--slo-tbt-s", str(TBT_S))
    with Cluster("--engine", "simulated", *half, *slo) as cluster:
        outcomes = asyncio.run(load(cluster, random.Random(3)))
        time.sleep(1)
        cluster.checkpoint("after the overload")
    counted = [each for each in outcomes if each.at_s >= CALIBRATE_S + WARM_S]
    refused = [each.answered_s for each in counted if each.error.startswith("429")]
    accepted = [each for each in counted if not each.error.startswith("429")]
    assert [each.error for each in accepted if each.error] == []
    in_time = sum(each.ttft_s <= TTFT_S for each in accepted)
    goodput = in_time / (OVERLOAD_S - WARM_S)
    median, late = percentile(refused, 0.5), percentile(refused, 0.99)
    print(f"{len(refused)} refused after {median} s, {late} s; {in_time} of {len(accepted)} in time, {goodput:.1f}/s")
    assert len(refused) > len(accepted)
    assert in_time >= 0.9 * len(accepted)
    assert goodput >= 0.8 * CAPACITY_PER_S
    assert median is not None and median <= 0.05
    assert late is not None and late <= 0.5
