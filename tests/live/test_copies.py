"""A hot prefix is copied to one more store node before anybody there asks for it, and read from there when the others are
gone. Real processes on one machine; three more store nodes and two prefill instances are added by hand."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx

from mooncake.engine.models import resolve_model
from mooncake.engine.simulated import draw_token
from mooncake.frontend.tokenizer import Tokenizer
from mooncake.sim.replay_log import Replayed, replay_log
from tests.live.harness import MODEL, ROOT, Client, Cluster, Completion, clean_environment

BLOCKS = 52
"""Each instance that pulls them books 31 ms of a NIC, by the Conductor's prices. More than 50 ms it may not be behind."""
NUM_TOKENS = BLOCKS * 128
NUM_USES = 9
"""One less than that, within a minute, is not hot."""
BURST = 12
COPIED_S = 35
"""The node itself gives a copy up after 30 s."""
RELEASED_S = 10
NUM_ROUNDS = 8
"""Of two pulls the second must come while the first is under way: on a busy machine that takes more than one prefix."""
OPTIONS = (
    "--engine", "simulated", "--replicate", "on", "--admission", "off", "--policy", "algorithm1",
    "--rates-remote-bytes-per-s", "55MB", "--rates-nic-bytes-per-s", "55MB",
)  # fmt: skip
"""Of the simulated engine's 256 bytes a token. By Algorithm 1 a prefix is pulled, whatever it takes."""


@contextlib.contextmanager
def process(cluster: Cluster, role: str, name: str, node: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more process of the cluster; told to stop at the end."""
    command = [sys.executable, "-m", "mooncake", role, "--name", name, "--node", node]
    command += ["--config", str(cluster.run_dir / "config.json")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=clean_environment(), cwd=ROOT, **quiet) as running:  # type: ignore[call-overload]
        try:
            yield running
        finally:
            running.terminate()


def prompt(number: int, tail: int, num_tail: int) -> list[int]:
    """Of the prefix of that number."""
    return [1500 + number, *(2000 + at % 1000 for at in range(NUM_TOKENS - 1)), *([4000 + tail] * num_tail)]


def ask(cluster: Cluster, *prompts: list[int]) -> list[Completion]:
    async def scenario() -> list[Completion]:
        async with Client(cluster) as client:
            calls = (client.complete(tokens, 3, seed=at) for at, tokens in enumerate(prompts))
            return list(await asyncio.gather(*calls))

    completions = asyncio.run(scenario())
    tokenizer = Tokenizer.load(resolve_model(MODEL).path)
    for at, found in enumerate(completions):
        detokenizer = tokenizer.detokenizer()
        tokens = [draw_token(at, 0, len(prompts[at]) + position) for position in range(3)]
        assert found.error == "" and found.text == "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    return completions


def until_ready(cluster: Cluster, counts: dict[str, int]) -> None:
    deadline = time.monotonic() + 30
    while httpx.get(f"{cluster.url}/ready").json()["instances"] != counts:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(cluster: Cluster, name: str) -> Replayed | None:
    """What that process has done so far."""
    logs = sorted(cluster.event_logs.glob(f"{name}-*"))
    return replay_log(logs[-1]) if logs else None


def num_objects(cluster: Cluster, node: str) -> int:
    found = told(cluster, node)
    return found.core.metrics()["objects"] if found is not None else -1


def until_copied(cluster: Cluster, node: str) -> int:
    """Number of the first prefix that was copied there."""
    for number in range(NUM_ROUNDS):
        for use in range(NUM_USES):
            ask(cluster, prompt(number, use, 5))
        ask(cluster, *(prompt(number, NUM_USES + at, 1400) for at in range(BURST)))
        begun_by, done_by = time.monotonic() + 2, time.monotonic() + COPIED_S
        while time.monotonic() < (done_by if num_objects(cluster, node) > 0 else begun_by):
            if num_objects(cluster, node) == BLOCKS:
                return number
            time.sleep(0.1)
    raise AssertionError(f"{node} has no copy")


def until_released(cluster: Cluster, node: str) -> None:
    deadline = time.monotonic() + RELEASED_S
    while (found := told(cluster, node)) is None or found.leftovers() != {}:
        assert time.monotonic() < deadline, found and found.leftovers()
        time.sleep(0.1)


def test_a_replica_is_made_ahead_and_read_later() -> None:
    with Cluster(*OPTIONS) as cluster:
        with contextlib.ExitStack() as others, process(cluster, "store", "node-3", "node-3"):
            for at in (1, 2):
                others.enter_context(process(cluster, "store", f"node-{at}", f"node-{at}"))
                others.enter_context(process(cluster, "prefill", f"prefill-{at}", f"node-{at}"))
            until_ready(cluster, {"prefill": 3, "decode": 1})
            number = until_copied(cluster, "node-3")

            others.close()
            pids = [(name, cluster.kill(name)) for name in ("prefill-0", "node-0")]
            for name, pid in pids:
                cluster.until_back(name, pid)
            [found] = ask(cluster, prompt(number, 99, 5))
            assert found.num_cached == NUM_TOKENS, "only node-3 has it"
            until_released(cluster, "node-3")
            prefill = told(cluster, "prefill-0")
            assert prefill is not None and prefill.load is not None
            assert prefill.load.num_loaded_tokens == NUM_TOKENS
        cluster.stop()
