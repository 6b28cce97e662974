"""The cluster says, token for token, what plain transformers say: float32, a tiny random model, every way that KV can go."""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.live.harness import Client, Cluster, Completion
from tests.live.models import Reference, save_tiny_model

FLOAT32 = ("--engine", "torch", "--dtype", "float32", "--block-tokens", "32", "--page-tokens", "16")
NUM_TOKENS = 24
NUM_LOST = 3
"""Streams that lose their decode instance each time that one is killed."""
REPORTED_S = 0.2
"""By then an instance that is idle has said so."""
Expect = Callable[[tuple[int, ...], int], str]
Call = tuple[tuple[int, ...], int] | tuple[tuple[int, ...], int, dict[str, Any]]
"""A prompt, the most tokens to generate, and its own options."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expect(model: Path) -> Expect:
    reference = Reference(model)
    return functools.cache(reference.text)


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    """Two of each, and prefill in chunks of two blocks."""
    options = ("--prefill", "2", "--decode", "2", "--max-step-tokens", "64", "--store-memory", "128MiB")
    with Cluster("--model", str(model), *FLOAT32, *options) as found:
        yield found
        found.stop()
        assert_continued(found)


def assert_continued(cluster: Cluster) -> None:
    """Not only were the texts right: two instances were killed, and each left streams that went on elsewhere."""
    ended = cluster.replay_all()["frontend-0"].ended
    assert sum(each.num_attempts > 1 for each in ended) >= 2 * (NUM_LOST - 1)
    logs = [path.read_bytes() for path in cluster.event_logs.iterdir() if path.name.startswith("decode")]
    assert sum(log.count(b"LoadBlocks") for log in logs) >= 3, "KV of long prompts was not loaded ahead"


def prompt(seed: int, num_tokens: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1000, 40_000) for _ in range(num_tokens))


def ask(cluster: Cluster, *calls: tuple[tuple[int, ...], int], **options: Any) -> list[Completion]:
    """All at once."""

    async def scenario() -> list[Completion]:
        async with Client(cluster) as client:
            return list(await asyncio.gather(*(client.complete(list(p), n, **options) for p, n in calls)))

    return asyncio.run(scenario())


@pytest.mark.parametrize("num_tokens", [5, 31, 32, 33, 500, 4000])
def test_alone_and_cold(cluster: Cluster, expect: Expect, num_tokens: int) -> None:
    tokens = prompt(num_tokens, num_tokens)
    [found] = ask(cluster, (tokens, NUM_TOKENS))
    assert (found.error, found.text) == ("", expect(tokens, NUM_TOKENS))
    assert (found.num_prompt, found.num_output, found.num_cached) == (num_tokens, NUM_TOKENS, 0)


def test_batched(cluster: Cluster, expect: Expect) -> None:
    sizes = [5, 17, 64, 65, 96, 130, 200, 333, 700, 1000, 1500, 4000]
    calls = [(prompt(100 + at, size), 10 + 7 * at) for at, size in enumerate(sizes)]
    for (tokens, num_tokens), found in zip(calls, ask(cluster, *calls), strict=True):
        assert (found.error, found.text) == ("", expect(tokens, num_tokens)), len(tokens)


def test_prefix_reused_by_the_same_instance(cluster: Cluster, expect: Expect) -> None:
    first = prompt(1, 640)
    ask(cluster, (first, 1))
    time.sleep(REPORTED_S)  # else the other instance may be the better choice
    for tokens, reused in ((first[:600] + prompt(2, 100), 576), (first, 608), (first[:320], 288)):
        [found] = ask(cluster, (tokens, NUM_TOKENS))
        assert (found.error, found.text) == ("", expect(tokens, NUM_TOKENS))
        assert found.num_cached == reused


def test_prefix_read_from_the_store_by_an_instance_that_never_saw_it(cluster: Cluster, expect: Expect) -> None:
    first = prompt(3, 3000)
    ask(cluster, (first, 1))
    for name, pid in [(name, cluster.kill(name)) for name in ("prefill-0", "prefill-1")]:
        cluster.until_back(name, pid)
    tokens = first[:2900] + prompt(4, 100)
    [found] = ask(cluster, (tokens, NUM_TOKENS))
    assert (found.error, found.text) == ("", expect(tokens, NUM_TOKENS))
    assert found.num_cached == 2880


class Killed(NamedTuple):
    """What clients got, and the instance that was killed meanwhile, with the pid that it had."""

    found: list[Completion]
    name: str
    pid: int


def kill_under(cluster: Cluster, num_lost: int, *calls: Call, **options: Any) -> Killed:
    """All calls at once; the decode instance that is the first to be well into num_lost streams is killed."""
    running = defaultdict[str, set[int]](set)

    async def follow(client: Client, at: int, victim: asyncio.Future[str]) -> Completion:
        found = Completion()
        num_pieces = 0
        tokens, num_tokens, *own = calls[at]
        async for _ in client.stream(list(tokens), num_tokens, found, **dict(options, **(own[0] if own else {}))):
            num_pieces += 1
            if num_pieces == 10:
                running[found.decode].add(at)
                if len(running[found.decode]) == num_lost and not victim.done():
                    victim.set_result(found.decode)
        running[found.decode].discard(at)
        return found

    async def scenario() -> Killed:
        victim = asyncio.get_running_loop().create_future()
        async with Client(cluster, timeout_s=90) as client:
            answers = asyncio.gather(*(follow(client, at, victim) for at in range(len(calls))))
            name = await asyncio.wait_for(victim, 60)
            pid = await asyncio.to_thread(cluster.kill, name)
            return Killed(list(await answers), name, pid)

    return asyncio.run(scenario())


def ask_and_kill(cluster: Cluster, num_lost: int, *calls: Call, **options: Any) -> list[Completion]:
    """As `kill_under`, until the instance is back."""
    found, name, pid = kill_under(cluster, num_lost, *calls, **options)
    cluster.until_back(name, pid)
    return found


def test_continued_after_a_decode_instance_was_killed(cluster: Cluster, expect: Expect) -> None:
    calls = [(prompt(200 + at, 40 + 50 * at), 480) for at in range(8)]
    for (tokens, num_tokens), found in zip(calls, ask_and_kill(cluster, NUM_LOST, *calls), strict=True):
        assert (found.error, found.text) == ("", expect(tokens, num_tokens))
        assert found.num_output == num_tokens


def test_seeded_sampling(cluster: Cluster) -> None:
    """The same text alone, in a busy batch, and when it goes on at another instance."""
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 1234}
    calls = [(prompt(300 + at, 30 + 40 * at), 360) for at in range(6)]
    alone = [ask(cluster, call, **sampling)[0].text for call in calls]
    assert [found.text for found in ask(cluster, *calls, **sampling)] == alone
    assert [found.text for found in ask_and_kill(cluster, NUM_LOST, *calls, **sampling)] == alone
    other = ask(cluster, calls[0], **sampling | {"seed": 1235})
    assert other[0].text != alone[0]


def test_preempted(model: Path, expect: Expect) -> None:
    """Eight sequences that fit when they begin and not when they have grown."""
    calls = [(prompt(400 + at, 60), 100 + at) for at in range(8)]
    with Cluster("--model", str(model), *FLOAT32, "--kv-tokens", "640", "--store-memory", "64MiB") as cluster:
        for (tokens, num_tokens), found in zip(calls, ask(cluster, *calls), strict=True):
            assert (found.error, found.text) == ("", expect(tokens, num_tokens))
        cluster.stop()
        load = cluster.replay_all()["decode-0"].load
        assert load is not None and load.num_preempted > 0
