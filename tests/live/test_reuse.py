"""The default model in float32: exact, and a prefix that one prefill instance computed is read, not computed, by another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake.engine.models import resolve_model
from tests.live.harness import MODEL, Client, Cluster, Completion
from tests.live.models import Reference

ROOT = Path(__file__).parent.parent.parent
NUM_TOKENS = 16
PREFIX_TOKENS = 2000
REUSED_TOKENS = PREFIX_TOKENS // 128 * 128
RATIO_MAX = 0.5
"""Of the times to first token. benchmarks/serve.py holds it to 0.25 on an idle machine."""


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(resolve_model(MODEL).path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    small = ("--max-batch", "4", "--max-step-tokens", "256", "--kv-tokens", "4096", "--store-memory", "256MiB")
    with Cluster("--engine", "torch", "--dtype", "float32", "--prefill", "2", *small) as found:
        yield found


@pytest.fixture(scope="module")
def words(reference: Reference) -> list[int]:
    """Text that the model would meet: our licence."""
    return reference.encode((ROOT / "LICENSE").read_text())


def ask(cluster: Cluster, *prompts: list[int]) -> list[Completion]:
    async def scenario() -> list[Completion]:
        async with Client(cluster) as client:
            return list(await asyncio.gather(*(client.complete(prompt, NUM_TOKENS) for prompt in prompts)))

    return asyncio.run(scenario())


def test_exact(cluster: Cluster, reference: Reference, words: list[int]) -> None:
    prompts = [words[:5], words[50:178], words[300:1200]]
    batched = ask(cluster, *prompts)
    [alone] = ask(cluster, prompts[0])
    for prompt, found in zip((*prompts, prompts[0]), (*batched, alone), strict=True):
        assert (found.error, found.text) == ("", reference.text(prompt, NUM_TOKENS)), len(prompt)


def test_a_prefix_is_read_by_another_instance(cluster: Cluster, reference: Reference, words: list[int]) -> None:
    prefix = words[-PREFIX_TOKENS:]
    first, second = prefix + words[:40], prefix + words[40:80]
    busy_before = {name: cluster.cpu_s(name) for name in ("prefill-0", "prefill-1")}
    [cold] = ask(cluster, first)
    owner = max(busy_before, key=lambda name: cluster.cpu_s(name) - busy_before[name])
    before_ns = time.monotonic_ns()
    pid = cluster.kill(owner)
    [warm] = ask(cluster, second)

    assert (cold.error, warm.error) == ("", "")
    assert warm.text == reference.text(second, NUM_TOKENS)
    assert (cold.num_cached, warm.num_cached) == (0, REUSED_TOKENS)
    ratio = warm.ttft_s / cold.ttft_s
    print(f"TTFT cold {1000 * cold.ttft_s:.0f} ms, reused {1000 * warm.ttft_s:.0f} ms: ratio {ratio:.3f}")
    assert ratio < RATIO_MAX

    cluster.until_back(owner, pid)
    cluster.stop()
    [other] = {"prefill-0", "prefill-1"} - {owner}
    before, after = cluster.replay_all(before_ns)[other].load, cluster.replay_all()[other].load
    assert after is not None
    loaded_before, computed_before = (before.num_loaded_tokens, before.num_computed_tokens) if before else (0, 0)
    assert after.num_loaded_tokens - loaded_before == REUSED_TOKENS
    assert after.num_computed_tokens - computed_before == len(second) - REUSED_TOKENS
