"""Page pools and a store for about three requests, under fifty at once: all finish, the oldest first, and nothing is left."""

from __future__ import annotations

import asyncio
import time

from mooncake.engine.models import resolve_model
from mooncake.engine.simulated import draw_token
from mooncake.frontend.tokenizer import Tokenizer
from tests.live.harness import MODEL, Client, Cluster

NUM_REQUESTS = 50
NUM_PROMPT, NUM_OUTPUT = 1200, 100
"""Long enough for decode to be told of a part while the rest is computed."""
KV_TOKENS = 3 * 11 * 128
STORE = "1MiB"
"""The simulated engine's KV has 256 bytes a token: 300 KiB a request."""
OVERTAKEN_MAX = 8


def test_fifty_requests_in_room_for_three() -> None:
    tokenizer = Tokenizer.load(resolve_model(MODEL).path)
    ended: list[int] = []

    async def one(client: Client, at: int) -> None:
        prompt = [2000 + (at * 7 + index) % 1000 for index in range(NUM_PROMPT)]
        found = await client.complete(prompt, NUM_OUTPUT, seed=at)
        detokenizer = tokenizer.detokenizer()
        tokens = [draw_token(at, 0, NUM_PROMPT + index) for index in range(NUM_OUTPUT)]
        assert (found.error, found.text) == ("", "".join(map(detokenizer.push, tokens)) + detokenizer.flush())
        ended.append(at)

    async def scenario() -> None:
        async with Client(cluster, timeout_s=120) as client, asyncio.TaskGroup() as group:
            for at in range(NUM_REQUESTS):
                group.create_task(one(client, at))
                await asyncio.sleep(0.002)

    options = ("--kv-tokens", str(KV_TOKENS), "--store-memory", STORE, "--simulated-speed", "4")
    with Cluster("--engine", "simulated", *options) as cluster:
        asyncio.run(scenario())
        time.sleep(1)
        cluster.checkpoint("after fifty requests")
        cluster.stop()
        [log] = [path for path in cluster.event_logs.iterdir() if path.name.startswith("decode")]
        assert b"LoadBlocks" in log.read_bytes(), "nothing was loaded ahead"
    assert max(place - at for place, at in enumerate(ended)) <= OVERTAKEN_MAX, ended
