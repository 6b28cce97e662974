"""Stock vLLM servers that share KV through a store of ours: a pair of prefill and decode, beside one without any connector.

Greedy in float32, on a tiny random model: whatever is loaded, computed, lost or damaged on the way, the tokens are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mooncake.core.keys import object_keys
from mooncake.engine.models import fingerprint
from mooncake.engine.vllm.layout import KvShape
from mooncake.engine.vllm.options import read_layout
from mooncake.engine.vllm.requests import KeyMaker
from mooncake.sim.replay_log import replay_log
from mooncake.store.api import Store
from tests.live.models import save_tiny_model
from tests.live.stores import Stores, until
from tests.live.vllm_harness import PAGE_TOKENS, VllmServer, connector, needs_vllm, through_pair

pytestmark = needs_vllm

NODE = "n0"
NUM_TOKENS = 24
LOADED = "external_prefix_cache_hits_total"


class Pair:
    """prefill and decode share the store; alone has no connector."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_tiny_model(folder, head_dim=32)
        self.stores = Stores("512MiB")
        self.servers: list[VllmServer] = []

    def start(self) -> None:
        self.stores.start_directory()
        self.stores.start(NODE, "--event-log", str(self.folder / "events"))
        self.prefill = self._server(0, "kv_producer")
        self.decode = self._server(1, "kv_consumer")
        self.alone = self._server(0, None)
        with ThreadPoolExecutor() as pool:
            list(pool.map(VllmServer.until_ready, self.servers))

    def replace_prefill(self) -> None:
        """By a fresh engine that stores and loads, as a shared cache does, and loads all before it computes."""
        self.prefill.kill()
        self.prefill = self._server(0, "kv_both", overlap_bytes=0)
        self.prefill.until_ready()

    def stop(self) -> None:
        for server in self.servers:
            server.kill()
        self.stores.__exit__()

    def client(self) -> Store:
        return self.stores.client(NODE)

    def check_idle(self) -> None:
        """Nothing is held: no page of vLLM, no reservation and no lease of the store but one for each engine's layout."""
        for server in (self.prefill, self.decode):
            server.until_idle()
        until(lambda: not self.store_metrics()["reservations"])
        assert self.store_metrics()["leases"] <= 2

    def store_metrics(self) -> dict[str, int]:
        [log] = (self.folder / "events").glob(f"{NODE}-*")
        metrics: dict[str, int] = replay_log(log).core.metrics()
        return metrics

    def _server(self, core: int, role: str | None, **extra: int) -> VllmServer:
        settings = None if role is None else connector(self.stores, role, **extra)
        server = VllmServer(self.folder, self.model, core, settings)
        self.servers.append(server)
        return server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    found = Pair(tmp_path_factory.mktemp("vllm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


def prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(num_tokens)]


async def check(pair: Pair, *prompts: Sequence[int]) -> None:
    """All at once, through the pair: the tokens of an engine that has no connector."""
    expected = await pair.alone.complete_all(prompts, NUM_TOKENS)
    found = await asyncio.gather(*(through_pair(pair.prefill, pair.decode, each, NUM_TOKENS) for each in prompts))
    assert [first.tokens for first, _ in found] == [each.tokens[:1] for each in expected]
    assert [rest.tokens for _, rest in found] == [each.tokens for each in expected]


def test_decode_says_what_one_engine_says_and_computes_one_token(pair: Pair) -> None:
    lengths = (30, PAGE_TOKENS, PAGE_TOKENS + 1, 300, 1280, 3000)
    before = pair.decode.metric(LOADED)
    for length in lengths:
        asyncio.run(check(pair, prompt(length, length)))
    assert pair.decode.metric(LOADED) - before == sum(lengths) - len(lengths)
    pair.check_idle()


def test_eight_at_once_with_a_shared_prefix(pair: Pair) -> None:
    shared = prompt(1, 1000)
    prompts = [shared + prompt(100 + at, 50 + 200 * at) for at in range(8)]
    asyncio.run(check(pair, *prompts))
    pair.check_idle()


def test_a_damaged_block_is_computed_again_and_dropped(pair: Pair) -> None:
    text = prompt(2, 1000)
    asyncio.run(pair.prefill.complete(text, 1, {"do_remote_decode": True}))
    with pair.client() as store:
        keys = _object_keys(pair, store, text)
        until(lambda: all(store.exists_batch(keys)))
        _damage(store, keys[3])
        asyncio.run(check(pair, text))
        until(lambda: pair.store_metrics()["damaged"] == 1)
    pair.check_idle()


def test_clients_that_go_away_leave_nothing(pair: Pair) -> None:
    """In the middle of a prefill, of a load, of decoding."""

    async def leave(server: VllmServer, seed: int, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.complete(prompt(seed, 3000), 64, {"do_remote_decode": True}), delay_s)

    async def leave_often(server: VllmServer) -> None:
        await asyncio.gather(*(leave(server, 300 + at, 0.02 + 0.03 * at) for at in range(8)))

    asyncio.run(leave_often(pair.prefill))
    asyncio.run(leave_often(pair.decode))
    pair.check_idle()
    asyncio.run(check(pair, *[prompt(300 + at, 3000) for at in range(4)]))
    pair.check_idle()


def test_a_fresh_engine_finds_what_a_killed_one_left(pair: Pair) -> None:
    """It is killed while it computes and stores: what it had committed is there, and what it had not is computed."""
    known, cut_off = prompt(4, 2000), prompt(5, 3000)
    asyncio.run(check(pair, known))

    async def kill_in_the_middle() -> None:
        running = asyncio.create_task(pair.prefill.complete(cut_off, 1, {"do_remote_decode": True}))
        await asyncio.sleep(0.06)
        pair.prefill.kill()
        with contextlib.suppress(httpx.TransportError):
            await running

    asyncio.run(kill_in_the_middle())
    answer = asyncio.run(pair.decode.complete(cut_off, NUM_TOKENS))
    assert answer.tokens == asyncio.run(pair.alone.complete(cut_off, NUM_TOKENS)).tokens
    pair.replace_prefill()
    again = asyncio.run(pair.prefill.complete(known, NUM_TOKENS))
    assert again.num_cached == len(known) - 1
    assert again.tokens == asyncio.run(pair.alone.complete(known, NUM_TOKENS)).tokens
    pair.check_idle()


def test_a_node_that_does_not_answer_costs_time_and_no_tokens(pair: Pair) -> None:
    pair.stores.stop(NODE)
    began = time.monotonic()
    asyncio.run(check(pair, *[prompt(20 + at, 1000) for at in range(4)]))
    assert time.monotonic() - began < 20
    pair.stores.go_on(NODE)
    asyncio.run(check(pair, prompt(30, 1000)))  # what the node granted too late is given back with the next call
    pair.check_idle()


def test_without_its_node_all_is_computed_and_with_it_shared_again(pair: Pair) -> None:
    pair.stores.kill(NODE)
    asyncio.run(check(pair, prompt(6, 1000), prompt(7, 300)))
    for server in (pair.prefill, pair.decode):
        server.until_idle()
    pair.stores.start(NODE)
    text = prompt(8, 1000)
    before = pair.decode.metric(LOADED)
    until(lambda: _shared(pair, text, before), 20)
    asyncio.run(check(pair, text))


def _shared(pair: Pair, text: list[int], loaded_before: float) -> bool:
    asyncio.run(through_pair(pair.prefill, pair.decode, text, 1))
    return pair.decode.metric(LOADED) > loaded_before


def _object_keys(pair: Pair, store: Store, text: list[int]) -> tuple[bytes, ...]:
    model = fingerprint(pair.model, "float32")
    shape: KvShape = read_layout(store, model)
    keys = KeyMaker(model, shape.block_tokens, loads=True, saves=True, saves_tails=True).keys(text)
    return object_keys((*keys.blocks, keys.tail), shape.shard(0, 0))


def _damage(store: Store, key: bytes) -> None:
    with store.leased([key]) as objects:
        [place] = objects.locations
        assert place is not None
        memory = objects.link.path.view(place.offset + place.size // 2, 8)
        assert memory is not None
        memory[:] = bytes(each ^ 0xFF for each in memory)
