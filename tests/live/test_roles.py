"""An instance changes its role while requests run, live on simulated engines: nothing is lost, and it works in its new role."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import httpx

from mooncake.core.event_log import read_log
from mooncake.core.types import NANOS_PER_S
from mooncake.engine.models import resolve_model
from mooncake.engine.simulated import draw_token
from mooncake.frontend.tokenizer import Tokenizer
from mooncake.sim.replay_log import replay_log
from tests.live.harness import MODEL, Client, Cluster, Completion

NUM_STREAMS = 6
NUM_LOADERS = 6
"""Prompts of 0.3 s that are always under way: far more than 0.3 s of waiting, which is the objective."""
OPTIONS = ("--engine", "simulated", "--prefill", "1", "--decode", "2", "--switch-roles", "on")
OBJECTIVE = ("--slo-ttft-s", "0.3", "--admission", "off")
CHANGED_S = 60.0


def prompt(first: int, num_tokens: int) -> list[int]:
    return [2000 + (first * 31 + at) % 1000 for at in range(num_tokens)]


def num_tokens(stream: int) -> int:
    """At 11 ms a step they last some eighteen seconds; the Conductor has seen enough after fifteen."""
    return 1600 + 20 * stream


def expected(tokenizer: Tokenizer, num_prompt: int, seed: int, count: int) -> str:
    detokenizer = tokenizer.detokenizer()
    tokens = [draw_token(seed, 0, num_prompt + at) for at in range(count)]
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()


async def until_changed(cluster: Cluster) -> float:
    """Seconds until there are two prefill instances."""
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=cluster.url) as http:
        while time.monotonic() < began + CHANGED_S:
            if (await http.get("/ready")).json()["instances"] == {"prefill": 2, "decode": 1}:
                return time.monotonic() - began
            await asyncio.sleep(0.05)
    raise AssertionError("no instance changed its role")


async def scenario(cluster: Cluster) -> tuple[list[Completion], list[Completion], float]:
    """Streams, all of the prompts that came meanwhile, and when the role had changed. Prompts go on until a second later."""
    numbers, stop, prompts = itertools.count(), asyncio.Event(), []

    async def load(client: Client) -> None:
        while not stop.is_set():
            number = next(numbers)
            prompts.append(await client.complete([1000 + number, *prompt(number, 6000)], 1, seed=number))

    async with Client(cluster) as client:
        loaders = [asyncio.create_task(load(client)) for _ in range(NUM_LOADERS)]
        streams = [
            asyncio.create_task(client.complete(prompt(at, 100 + at), num_tokens(at), seed=at))
            for at in range(NUM_STREAMS)
        ]
        changed_s = await until_changed(cluster)
        await asyncio.sleep(1)
        stop.set()
        await asyncio.gather(*loaders)
        return list(await asyncio.gather(*streams)), prompts, changed_s


def test_a_decode_instance_becomes_a_prefill_instance_under_load() -> None:
    tokenizer = Tokenizer.load(resolve_model(MODEL).path)
    with Cluster(*OPTIONS, *OBJECTIVE) as cluster:
        pids = cluster.pids()
        completions, prompts, changed_s = asyncio.run(scenario(cluster))
        print(f"changed after {changed_s:.1f} s; {len(prompts)} prompts")
        for at, found in enumerate(completions):
            assert found.error == "", f"stream {at}"
            assert found.text == expected(tokenizer, 100 + at, at, num_tokens(at)), f"stream {at}"
        for number, found in enumerate(prompts):
            assert (found.error, found.num_output) == ("", 1), f"prompt {number}"
        assert cluster.pids() == pids, "no process was started again"
        time.sleep(1)
        cluster.checkpoint("after the change")
        cluster.stop()
        [(before, after)] = [
            logs for at in range(2) if len(logs := sorted(cluster.event_logs.glob(f"decode-{at}-*"))) == 2
        ]
        assert drained_for_ns(before) > NANOS_PER_S, "its streams went on to their ends"
        old, new = replay_log(before), replay_log(after)
        assert (old.kind, new.kind) == ("decode", "prefill") and old.leftovers() == {}
        assert old.load is not None and new.load is not None
        assert new.load.num_computed_tokens - old.load.num_computed_tokens > 6000, "it prefills"


def drained_for_ns(log: Path) -> int:
    """From the Conductor's message to the last request's end."""
    with log.open("rb") as file:
        _, entries = read_log(file)
        times = [(entry.now, bytes(entry.event), entry.commands) for entry in entries]
    [told] = [now for now, event, _ in times if b"ChangeRole" in event]
    [taken] = [now for now, _, commands in times if b"TakeRole" in commands]
    return taken - told
