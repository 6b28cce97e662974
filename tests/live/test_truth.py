"""The simulator tells the truth: the same requests, live and in virtual time, end alike and as fast."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import NamedTuple

import msgspec

from mooncake.config import Config
from mooncake.core.keys import block_keys, root_key
from mooncake.core.types import NANOS_PER_S, tokens_to_bytes
from mooncake.sim.cluster import SimCluster
from mooncake.sim.frontend import SimRequest
from mooncake.sim.live_config import cluster_config
from tests.live.harness import Client, Cluster, Completion

NUM_REQUESTS = 500
SPAN_S = 50.0
DEVIATION_MAX = 0.10
SPEED = 0.25
"""Of an H100: steps long enough that what this machine's processors do between them, twice as slow on some as on others, is not
what the two runs differ by."""
NEVER = 1 << 20
"""Tokens after which the model would stop by itself."""


class Planned(NamedTuple):
    at_s: float
    prompt: list[int]
    num_output: int


class Outcome(NamedTuple):
    finish: str | None
    num_output: int
    ttft_s: float
    itl_s: float


def plan(rng: random.Random) -> list[Planned]:
    """Prompts of 150 to 1,500 tokens, half of which begin like one of a dozen documents."""
    documents = [[rng.randrange(1000, 5000) for _ in range(512)] for _ in range(12)]
    planned = []
    for _ in range(NUM_REQUESTS):
        shared = rng.choice(documents)[: rng.randrange(1, 512)] if rng.random() < 0.5 else []
        own = [rng.randrange(1000, 5000) for _ in range(rng.randrange(150, 1000))]
        planned.append(Planned(rng.uniform(0, SPAN_S), shared + own, rng.randrange(2, 60)))
    return sorted(planned)


def run_live(cluster: Cluster, planned: list[Planned]) -> list[Outcome]:
    async def one(client: Client, request: Planned, began: float) -> Outcome:
        await asyncio.sleep(began + request.at_s - time.perf_counter())
        found = Completion()
        started = last = time.perf_counter()
        async for _ in client.stream(request.prompt, request.num_output, found):
            last = time.perf_counter()
        assert not found.error, found.error
        itl = (last - started - found.ttft_s) / (found.num_output - 1)
        return Outcome(found.finish, found.num_output, found.ttft_s, itl)

    async def scenario() -> list[Outcome]:
        async with Client(cluster) as client:
            await client.complete([1000] * 200, 4)
            began = time.perf_counter()
            return list(await asyncio.gather(*(one(client, request, began) for request in planned)))

    return asyncio.run(scenario())


def run_simulated(config: Config, planned: list[Planned]) -> list[Outcome]:
    cluster = SimCluster(cluster_config(config), seed=1)
    cluster.run(NANOS_PER_S)
    start = cluster.loop.now
    root = root_key("any")
    cluster.submit(
        SimRequest(
            arrival_ns=start + int(request.at_s * NANOS_PER_S),
            num_tokens=len(request.prompt),
            output_length=NEVER,
            block_keys=block_keys(root, tokens_to_bytes(request.prompt), config.block_tokens),
            max_tokens=request.num_output,
            client_max_tokens=request.num_output,
        )
        for request in planned
    )
    cluster.run(start + 600 * NANOS_PER_S)
    return [
        Outcome(
            record.outcome,
            len(record.tokens),
            (record.times[0] - record.request.arrival_ns) / NANOS_PER_S,
            (record.times[-1] - record.times[0]) / (len(record.tokens) - 1) / NANOS_PER_S,
        )
        for record in cluster.records
    ]


def test_live_and_simulated_agree() -> None:
    planned = plan(random.Random(5))
    slow_h100 = ("--simulated-hardware", "h100", "--simulated-speed", str(SPEED))
    with Cluster("--engine", "simulated", "--prefill", "2", "--decode", "2", *slow_h100) as cluster:
        config = msgspec.convert(cluster.config, Config)
        live = run_live(cluster, planned)
    simulated = run_simulated(config, planned)
    assert [outcome[:2] for outcome in live] == [outcome[:2] for outcome in simulated]
    for name in ("ttft_s", "itl_s"):
        real, virtual = (statistics.fmean(getattr(outcome, name) for outcome in run) for run in (live, simulated))
        deviation = virtual / real - 1
        print(f"mean {name}: live {1000 * real:.1f} ms, simulated {1000 * virtual:.1f} ms, deviation {deviation:+.1%}")
        assert abs(deviation) <= DEVIATION_MAX, name
