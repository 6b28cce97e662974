"""The SSD tier of a live cluster: more than memory holds, kill -9, and everything that was on SSD is back, byte for byte."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from mooncake.core.event_log import read_log
from mooncake.core.keys import block_keys_of
from mooncake.core.types import ReusedTokens, Tier
from mooncake.engine.models import resolve_model
from mooncake.engine.simulated import draw_token
from mooncake.frontend.tokenizer import Tokenizer
from mooncake.scheduler.prefix_index import ANY
from mooncake.sim.replay_log import Replayed, replay_log
from mooncake.store.client import StoreClient
from mooncake.store.types import PutStatus
from tests.live.harness import MODEL, READY_S, Client, Cluster, Completion
from tests.live.prometheus import free_ports

NUM_OBJECTS = 600
SIZE_MAX = 300_000
"""Of an object: 90 MB in all, of which memory holds 16 MiB."""
BLOCKS = 12
NUM_PROMPTS = 60
"""Of 12 blocks of 32 KiB, the simulated engine's KV: 23 MB, and the pages of an instance hold two of them."""
FIXED = ("--engine", "simulated", "--admission", "off", "--store-ssd", "512MiB", "--kv-tokens", "4096")


def contents(number: int) -> bytes:
    rng = random.Random(number)
    return rng.randbytes(rng.randrange(1, SIZE_MAX))


def key(number: int) -> bytes:
    return random.Random(-1 - number).randbytes(24)


def logs_of_node(cluster: Cluster) -> list[Path]:
    return sorted(cluster.event_logs.glob("node-0-*"))


def last_life(cluster: Cluster) -> Replayed:
    """The store node's core as it is, told everything again; so its log is checked too."""
    return replay_log(logs_of_node(cluster)[-1])


def told_to_conductor(cluster: Cluster) -> dict[bytes, None]:
    """Keys that the node has reported as on SSD."""
    found: dict[bytes, None] = {}
    with logs_of_node(cluster)[-1].open("rb") as file:
        _, entries = read_log(file)
        for entry in entries:
            for name, command in msgspec.msgpack.decode(entry.commands, type=list[tuple[str, dict[str, Any]]]):
                if name == "Report" and command.get("tier") == Tier.SSD.value:
                    found |= dict.fromkeys(command["added"])
                    for lost in command["removed"]:
                        del found[lost]
    return found


def kill_and_wait(cluster: Cluster) -> None:
    """Until the next life of the store node has told the Conductor what it has."""
    old = cluster.kill("node-0")
    cluster.until_back("node-0", old)
    deadline = time.monotonic() + READY_S
    while len(logs_of_node(cluster)) < 2 or last_life(cluster).num_events < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def connect(cluster: Cluster) -> StoreClient:
    address = f"unix:{cluster.run_dir}/node-0.sock"
    return await StoreClient.connect([address], token=cluster.config["token"], name="test", node="node-0")


async def put_all(cluster: Cluster) -> None:
    client = await connect(cluster)
    for number in range(NUM_OBJECTS):
        data = contents(number)
        made = await client.reserve([key(number)], [len(data)])
        assert made.statuses == (PutStatus.RESERVED,)
        made.write(0, 0, data)
        await client.commit(made)
    await client.close()


async def read_all(cluster: Cluster, numbers: Sequence[int]) -> list[int]:
    """Those that are missed. All others must be what was put."""
    client, missed = await connect(cluster), []
    for number in numbers:
        leased = await client.lease([key(number)])
        if leased.hits:
            assert bytes(leased.view(0)) == contents(number)
            await client.release(leased)
        else:
            missed.append(number)
    await client.close()
    return missed


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(*FIXED, "--store-memory", "16MiB", "--store-ssd-dir", str(tmp_path / "ssd")) as running:
        yield running


def test_kill_9_loses_nothing_that_was_said_to_be_on_ssd(cluster: Cluster) -> None:
    asyncio.run(put_all(cluster))
    kill_and_wait(cluster)
    killed = replay_log(logs_of_node(cluster)[0]).core
    numbers = {key(number): number for number in range(NUM_OBJECTS)}
    known = [numbers[name] for name in killed._ssd.log.copies]
    assert len(known) > NUM_OBJECTS * 3 // 4
    back = last_life(cluster).core
    assert set(back._ssd.log.copies) >= set(killed._ssd.log.copies)
    assert asyncio.run(read_all(cluster, known)) == []
    metrics = last_life(cluster).core.metrics()
    assert metrics["ssd_reads"] > len(known) // 2
    assert metrics["ssd_corrupt"] == metrics["ssd_read_errors"] == metrics["ssd_write_errors"] == 0


def test_the_conductor_hears_of_what_came_back(cluster: Cluster) -> None:
    asyncio.run(put_all(cluster))
    deadline = time.monotonic() + READY_S
    while len(before := told_to_conductor(cluster)) < NUM_OBJECTS * 3 // 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kill_and_wait(cluster)
    while missing := unknown_to_conductor(cluster, tuple(before)):
        assert time.monotonic() < deadline, f"{len(missing)} of {len(before)} are not known"
        time.sleep(0.1)


def unknown_to_conductor(cluster: Cluster, keys: tuple[bytes, ...]) -> list[bytes]:
    core = replay_log(next(cluster.event_logs.glob("conductor-*"))).core
    slot = core.view.slot("node-0")
    return [block for block in block_keys_of(keys) if not core.index.match([block]).length(slot, ANY)]


def prompt(number: int) -> list[int]:
    return [1500 + number, *(2000 + at % 1000 for at in range(BLOCKS * 128 - 1)), 4000]


def ask(cluster: Cluster, numbers: Sequence[int]) -> list[Completion]:
    async def scenario() -> list[Completion]:
        async with Client(cluster) as client:
            return [await client.complete(prompt(number), 3, seed=number) for number in numbers]

    completions = asyncio.run(scenario())
    tokenizer = Tokenizer.load(resolve_model(MODEL).path)
    for number, found in zip(numbers, completions, strict=True):
        detokenizer = tokenizer.detokenizer()
        tokens = [draw_token(number, 0, len(prompt(number)) + position) for position in range(3)]
        assert found.error == "" and found.text == "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    return completions


def reused(cluster: Cluster, num_prompt: int) -> ReusedTokens:
    """What instances have reused, as soon as the Conductor has heard of so many prompt tokens; their metrics say the same."""
    deadline = time.monotonic() + READY_S
    while True:
        found = httpx.get(f"{cluster.url}/admin/status").json()["cluster"]["reused"]
        if found["prompt"] == num_prompt:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    lines = httpx.get(f"http://127.0.0.1:{cluster.config['metrics_port'] + 2}/metrics").text.splitlines()
    for tier in ("hbm", "dram", "ssd"):
        assert f'mooncake_instance_reused_tokens_total{{tier="{tier}"}} {float(found[tier])}' in lines
    return msgspec.convert(found, ReusedTokens)


def test_prompts_that_left_memory_are_served_from_ssd_also_after_kill_9(tmp_path: Path) -> None:
    metrics = ("--metrics-port", str(free_ports(5)))
    options = ("--store-memory", "4MiB", "--store-ssd-dir", str(tmp_path / "ssd"), *metrics)
    with Cluster(*FIXED, *options) as cluster:
        ask(cluster, range(NUM_PROMPTS))
        reads = last_life(cluster).core.metrics()["ssd_reads"]
        again = ask(cluster, range(10))
        assert [found.num_cached for found in again] == [BLOCKS * 128] * 10
        assert last_life(cluster).core.metrics()["ssd_reads"] >= reads + 9 * BLOCKS
        assert reused(cluster, (NUM_PROMPTS + 10) * len(prompt(0))).ssd >= 9 * BLOCKS * 128
        kill_and_wait(cluster)
        after = ask(cluster, range(20, 30))
        assert [found.num_cached for found in after] == [BLOCKS * 128] * 10
        assert last_life(cluster).core.metrics()["ssd_reads"] >= 10 * BLOCKS
        cluster.stop()
        cluster.replay_all()
