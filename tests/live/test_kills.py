"""kill -9 of each kind of process during twenty streams, on simulated engines: DESIGN section 8, live.

The simulated engine's tokens are a pure function of seed and position, so every stream's text is known beforehand; and it
checks the KV that it is given, so a stream that went on from wrong KV would fail.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from mooncake.engine.models import resolve_model
from mooncake.engine.simulated import draw_token
from mooncake.frontend.tokenizer import Tokenizer
from tests.live.harness import MODEL, Client, Cluster, Completion

NUM_STREAMS = 20
NUM_TOKENS = 200
"""At 11 ms a step the streams last two to three seconds."""
KILL_AFTER_S = 0.8
OPTIONS = ("--engine", "simulated", "--prefill", "2", "--decode", "2", "--store-memory", "64MiB")
SETTLE_S = {"frontend-0": 7.0}
"""How long until everything is free. The bookings of a dead frontend may be young, so they are held on to for 5 s."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(MODEL).path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(*OPTIONS) as found:
        yield found


def prompt(stream: int) -> list[int]:
    return [2000 + (stream * 31 + at) % 1000 for at in range(100 + 20 * stream)]


def expected(tokenizer: Tokenizer, num_prompt: int, seed: int, num_tokens: int = NUM_TOKENS) -> str:
    detokenizer = tokenizer.detokenizer()
    tokens = [draw_token(seed, 0, num_prompt + at) for at in range(num_tokens)]
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()


async def streams(client: Client, num_tokens: int = NUM_TOKENS) -> list[Completion]:
    calls = (client.complete(prompt(at), num_tokens, seed=at) for at in range(NUM_STREAMS))
    return list(await asyncio.gather(*calls))


async def streams_with_a_kill(cluster: Cluster, name: str) -> tuple[list[Completion], int]:
    async with Client(cluster) as client:
        running = asyncio.create_task(streams(client))
        await asyncio.sleep(KILL_AFTER_S)
        pid = await asyncio.to_thread(cluster.kill, name)
        return await running, pid


def assert_right(tokenizer: Tokenizer, completions: list[Completion], num_tokens: int = NUM_TOKENS) -> None:
    for at, found in enumerate(completions):
        assert found.error == "", f"stream {at}"
        assert found.text == expected(tokenizer, len(prompt(at)), at, num_tokens), f"stream {at}"
        assert (found.finish, found.num_output) == ("length", num_tokens)


async def _fresh_streams(cluster: Cluster, num_tokens: int) -> list[Completion]:
    async with Client(cluster) as client:
        return await streams(client, num_tokens)


def assert_works(cluster: Cluster, tokenizer: Tokenizer) -> None:
    assert_right(tokenizer, asyncio.run(_fresh_streams(cluster, 5)), 5)


@pytest.mark.parametrize("name", ["decode-0", "prefill-0", "node-0", "conductor"])
def test_streams_outlive_it(cluster: Cluster, tokenizer: Tokenizer, name: str) -> None:
    """No client notices more than a pause, and what comes after is served as ever."""
    completions, pid = asyncio.run(streams_with_a_kill(cluster, name))
    assert_right(tokenizer, completions)
    cluster.until_back(name, pid)
    assert_works(cluster, tokenizer)
    time.sleep(SETTLE_S.get(name, 1.0))
    cluster.checkpoint(f"after {name} was killed")


def test_requests_wait_for_a_new_conductor(cluster: Cluster, tokenizer: Tokenizer) -> None:
    pid = cluster.kill("conductor")
    assert_works(cluster, tokenizer)
    cluster.until_back("conductor", pid)


def test_a_prefill_that_dies_has_its_queue_placed_anew(cluster: Cluster, tokenizer: Tokenizer) -> None:
    """Killed while prompts are computed: nothing of them was answered yet, and nobody is told."""

    async def scenario() -> list[Completion]:
        async with Client(cluster) as client:
            long = [[3000 + (at * 17 + index) % 900 for index in range(6000)] for at in range(6)]
            calls = [asyncio.create_task(client.complete(tokens, 5, seed=at)) for at, tokens in enumerate(long)]
            await asyncio.sleep(0.15)
            pids.append(await asyncio.to_thread(cluster.kill, "prefill-1"))
            return list(await asyncio.gather(*calls))

    pids: list[int] = []
    for at, found in enumerate(asyncio.run(scenario())):
        assert (found.error, found.text) == ("", expected(tokenizer, 6000, at, 5))
    cluster.until_back("prefill-1", pids[0])
    time.sleep(1)
    cluster.checkpoint("after prefill-1 was killed")


def test_frontend(cluster: Cluster, tokenizer: Tokenizer) -> None:
    """Its clients lose their connections; what they asked for is given up, and it comes back on the same port."""
    completions, pid = asyncio.run(streams_with_a_kill(cluster, "frontend-0"))
    for at, found in enumerate(completions):
        assert found.error.startswith(("RemoteProtocolError", "ReadError"))
        assert expected(tokenizer, len(prompt(at)), at).startswith(found.text)
    cluster.until_back("frontend-0", pid)
    assert_works(cluster, tokenizer)
    time.sleep(SETTLE_S["frontend-0"])
    cluster.checkpoint("after frontend-0 was killed")


def test_clients_that_leave_free_everything_within_a_second(cluster: Cluster, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with Client(cluster) as client:
            calls = [asyncio.create_task(client.complete(prompt(at), 2000, seed=at)) for at in range(NUM_STREAMS)]
            await asyncio.sleep(0.7)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())
    time.sleep(1)
    cluster.checkpoint("after all clients left")
    assert_works(cluster, tokenizer)


def test_supervisor(tokenizer: Tokenizer) -> None:
    """Its children end with it, and the next start finds a clean machine."""
    with Cluster(*OPTIONS) as first:
        first.pids()

        async def scenario() -> list[Completion]:
            async with Client(first) as client:
                running = asyncio.create_task(streams(client, 100))
                await asyncio.sleep(0.5)
                first.process.kill()
                return await running

        completions = asyncio.run(scenario())
        assert all(expected(tokenizer, len(prompt(at)), at).startswith(c.text) for at, c in enumerate(completions))
        first.process.wait()
        with Cluster(*OPTIONS, folder=first.folder, name=first.name) as second:
            assert_works(second, tokenizer)
            second.stop()
            first.assert_gone()
