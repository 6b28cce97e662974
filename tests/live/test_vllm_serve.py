"""`mooncake serve --engine vllm`: our pools, Conductor and store around vLLM, with the default model in float32.

What is right are the greedy tokens of plain transformers, and of the torch engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mooncake.engine.base import EngineLimits
from mooncake.engine.models import resolve_model
from mooncake.engine.torch.build import build_from_folder
from tests.engine.tiny_models import generate
from tests.live.harness import MODEL, Client, Cluster
from tests.live.models import Reference
from tests.live.vllm_harness import PYTHON, READY_S, needs_vllm

pytestmark = needs_vllm

OPTIONS = (
    *("--engine", "vllm", "--engine-python", str(PYTHON), "--dtype", "float32", "--prefill", "1", "--decode", "2"),
    *("--max-context", "2048", "--kv-tokens", "8192", "--store-memory", "256MiB", "--threads", "1"),
)
TEXTS = ("The capital of France is", "Why is the sky blue? Because " * 5, "Once upon a time, in a land far away. " * 90)
TORCH_LIMITS = EngineLimits(
    num_pages=256, page_tokens=16, block_tokens=128, max_batch=4, max_step_tokens=512, max_context=2048
)
REPORTED_S = 0.3
"""By then an instance that is idle has said so."""


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(resolve_model(MODEL).path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("--model", MODEL, *OPTIONS, ready_s=READY_S) as found:
        yield found
        found.stop()
        logs = [path.read_bytes() for path in found.event_logs.iterdir() if path.name.startswith(("prefill", "decode"))]
        assert any(b"CacheDelta" in log for log in logs), "vLLM's KV events did not reach the Conductor"


def checkpoint(cluster: Cluster) -> None:
    time.sleep(REPORTED_S)
    cluster.checkpoint(os.environ.get("PYTEST_CURRENT_TEST", ""))


def engine_processes(pid: int) -> list[int]:
    """Of vLLM, under that instance."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "VLLM"], capture_output=True, text=True, check=False)
    return list(map(int, found.stdout.split()))


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_greedy_tokens_are_those_of_the_torch_engine_and_of_transformers_and_prefixes_are_found_again(
    cluster: Cluster, reference: Reference
) -> None:
    prompts = [reference.encode(text) for text in TEXTS]
    engine = build_from_folder(resolve_model(MODEL).path, "float32", TORCH_LIMITS)
    by_torch = [reference.decode(tokens) for tokens in generate(engine, prompts, 24)]
    assert by_torch == [reference.text(prompt, 24) for prompt in prompts]

    async def run() -> None:
        async with Client(cluster) as client:
            for prompt, expected in zip(prompts, by_torch, strict=True):
                for _ in range(2):
                    found = await client.complete(prompt, 24, temperature=0, ignore_eos=True)
                    assert (found.text, found.finish) == (expected, "length"), found
                assert found.num_cached >= (len(prompt) - 1) // 128 * 128

    asyncio.run(run())
    checkpoint(cluster)


_STOCK_CLIENT = """
import sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
[model] = [each.id for each in client.models.list()]
stream = client.chat.completions.create(model=model, temperature=0, max_tokens=12, stream=True,
    messages=[{"role": "user", "content": "Say hello."}])
print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
"""


def test_a_stock_openai_client_chats(cluster: Cluster) -> None:
    command = [str(PYTHON), "-c", _STOCK_CLIENT, cluster.url]
    streamed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    body = {"temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": "Say hello."}]}
    whole = httpx.post(f"{cluster.url}/v1/chat/completions", json={"model": MODEL, **body}, timeout=60).json()
    assert streamed.strip() == whole["choices"][0]["message"]["content"].strip() != ""


def test_choices_share_one_prefill_and_tell_log_probabilities(cluster: Cluster, reference: Reference) -> None:
    prompt = reference.encode(TEXTS[2] + "Then")
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, "n": 3, "logprobs": 2}
    found = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).json()
    assert [each["text"] for each in found["choices"]] == [reference.text(prompt, 8)] * 3
    for each in found["choices"]:
        best = [max(position.values()) for position in each["logprobs"]["top_logprobs"]]
        assert best == each["logprobs"]["token_logprobs"]
    checkpoint(cluster)


def test_clients_that_go_away_leave_nothing(cluster: Cluster, reference: Reference) -> None:
    async def leave(client: Client, at: int) -> None:
        prompt = reference.encode(f"Number {at}. {TEXTS[2]}")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.complete(prompt, 500, temperature=0, ignore_eos=True), 0.1 + 0.3 * at)

    async def run() -> None:
        async with Client(cluster) as client:
            await asyncio.gather(*(leave(client, at) for at in range(6)))

    asyncio.run(run())
    time.sleep(1.0)
    checkpoint(cluster)


def test_a_stream_goes_on_elsewhere_when_its_engine_is_killed(cluster: Cluster, reference: Reference) -> None:
    """The instance with all of vLLM's processes, and vLLM's process alone, which its instance does not survive."""
    prompt = reference.encode(TEXTS[1])
    before = cluster.pids()
    engines = {name: engine_processes(before[name]) for name in ("decode-0", "decode-1")}
    assert all(len(found) == 1 for found in engines.values())

    async def run() -> None:
        async with Client(cluster, timeout_s=90) as client:
            running = [
                asyncio.create_task(client.complete(prompt, 150, temperature=0, ignore_eos=True)) for _ in range(4)
            ]
            await asyncio.sleep(1.0)
            cluster.kill("decode-0")
            found = await asyncio.gather(*running)
            assert [each.error for each in found] == [""] * 4
            assert [each.text for each in found] == [reference.text(prompt, 150)] * 4

    asyncio.run(run())
    assert not any(map(lives, engines["decode-0"]))
    [engine] = engines["decode-1"]
    os.kill(engine, signal.SIGKILL)
    cluster.until_back("decode-1", before["decode-1"])
    checkpoint(cluster)
