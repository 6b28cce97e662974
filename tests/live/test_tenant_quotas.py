"""Quotas of the key file in a real cluster: a tenant that fills its own takes nothing of the others, and loses no request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mooncake.engine.simulated import LAYOUT
from tests.live.harness import Client, Cluster
from tests.live.prometheus import free_ports
from tests.live.test_tenants import keys

BLOCK = 128
TOKEN_BYTES = LAYOUT.object_bytes(1)
NUM_BLOCKS = 64
"""That the store has room for."""
QUOTA = 8
PROMPT_BLOCKS = 6


class Shared:
    """A store of 64 blocks, of which tenant a may have eight and b as many as there are, and pages for few prompts."""

    def __init__(self, path: Path) -> None:
        quota = str(QUOTA * BLOCK * TOKEN_BYTES)
        self.texts = {
            "a": keys(path, "add", "--tenant", "a", "--store-bytes", quota),
            "b": keys(path, "add", "--tenant", "b"),
        }
        self.metrics_port = free_ports(5)
        self.cluster: Cluster

    async def ask(self, tenant: str, *numbers: int) -> list[int]:
        """Prompts of six blocks and a half, all at once; how many tokens of each were reused."""
        async with Client(self.cluster, key=self.texts[tenant]) as client:
            prompts = [[1000 + number] * (PROMPT_BLOCKS * BLOCK + BLOCK // 2) for number in numbers]
            found = await asyncio.gather(*[client.complete(prompt, 4) for prompt in prompts])
        assert [(each.error, each.num_output) for each in found] == [("", 4)] * len(found)
        return [each.num_cached for each in found]

    def metric(self, name: str) -> float:
        """Of the store node."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        [value] = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"mooncake_store_{name} ")]
        return float(value)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    found = Shared(path)
    options = ("--engine", "simulated", "--simulated-hardware", "h100", "--metrics-port", str(found.metrics_port))
    sizes = ("--store-memory", str(NUM_BLOCKS * BLOCK * TOKEN_BYTES), "--kv-tokens", "2048")
    with Cluster(*options, *sizes, "--api-keys", str(path)) as found.cluster:
        yield found
        time.sleep(1)
        found.cluster.checkpoint("at the end")


def test_a_tenant_that_fills_its_quota_takes_nothing_of_the_others_and_loses_no_request(shared: Shared) -> None:
    async def run() -> list[int]:
        await shared.ask("b", 1, 2)
        for first in range(0, 24, 3):  # more than the whole store has room for, three at once
            await shared.ask("a", *range(first, first + 3))
        return await shared.ask("b", 1, 2)

    assert asyncio.run(run()) == [PROMPT_BLOCKS * BLOCK] * 2
    assert 0 < shared.metric('tenant_used_bytes{tenant="a"}') <= QUOTA * BLOCK * TOKEN_BYTES
    assert shared.metric('tenant_refusals_total{tenant="a"}') > 0
    assert shared.metric('evictions_total{cause="quota",tier="dram"}') > 0
    assert shared.metric('evictions_total{cause="room",tier="dram"}') == 0


def test_what_is_within_the_quota_is_reused(shared: Shared) -> None:
    async def run() -> list[int]:
        await shared.ask("a", 30)
        return await shared.ask("a", 30)

    assert asyncio.run(run()) == [PROMPT_BLOCKS * BLOCK]
