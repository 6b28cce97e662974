"""`mooncake serve --engine vllm`: our pools, Conductor and store around vLLM, with the default model in float32.

What is right are the greedy tokens of plain transformers, and of the torch engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mooncake.core.types import SamplingParams
from mooncake.engine.base import EngineLimits
from mooncake.engine.grammar import json_grammar, regex_grammar
from mooncake.engine.models import resolve_model
from mooncake.engine.torch.build import build_from_folder
from tests.engine.tiny_models import generate
from tests.live.harness import MODEL, Client, Cluster
from tests.live.models import Reference
from tests.live.test_exact import Call, ask, kill_under
from tests.live.test_structured import PERSON
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
PATTERN = r"([a-z]{2,5}-){20}[a-z]"
WORDS: dict[str, Any] = {"guided_regex": PATTERN}
GUIDED: dict[str, Any] = {**WORDS, "temperature": 0, "ignore_eos": False}
END = 2
"""The default model's end of a text."""
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
        assert sum(each.num_attempts > 1 for each in found.replay_all()["frontend-0"].ended) >= 2
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


def test_a_grammar_is_followed_as_by_the_torch_engine(cluster: Cluster, reference: Reference) -> None:
    """The first token comes from the prefill instance, the others from a decode instance, one state of the grammar."""
    prompt = reference.encode(TEXTS[1])
    engine = build_from_folder(resolve_model(MODEL).path, "float32", TORCH_LIMITS)
    for field, grammar in (
        ({"guided_json": PERSON}, json_grammar(PERSON, strict=True)),
        (WORDS, regex_grammar(PATTERN)),
    ):
        greedy = SamplingParams(temperature=0.0, stop_token_ids=(END,), grammar=grammar)
        [expected] = generate(engine, [prompt], 60, greedy)
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 60, "temperature": 0, "n": 2, **field}
        found = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).json()
        whole = expected[-1] == END
        text = reference.decode(expected[:-1] if whole else expected)
        for choice in found["choices"]:
            assert (choice["text"], choice["finish_reason"]) == (text, "stop" if whole else "length")
    checkpoint(cluster)


def test_a_call_is_forced_and_drawn_choices_differ(cluster: Cluster) -> None:
    tools = [{"type": "function", "function": {"name": "greet", "parameters": PERSON}}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Who is it?"}], "tools": tools, "max_tokens": 200}
    body |= {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0, "seed": 4, "n": 3}
    found = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=60).json()
    calls = [call["function"] for choice in found["choices"] for call in choice["message"]["tool_calls"]]
    assert [call["name"] for call in calls] == ["greet"] * 3
    people = [json.loads(call["arguments"]) for call in calls]
    assert all(list(person) == ["name", "age"] and 0 <= person["age"] <= 150 for person in people), people
    assert len({person["name"] for person in people}) > 1
    checkpoint(cluster)


def test_a_grammar_that_is_lost_on_the_way_ends_its_request_only(cluster: Cluster, reference: Reference) -> None:
    prompt = reference.encode(TEXTS[0])

    async def run() -> None:
        async with Client(cluster) as client:
            lost, other = await asyncio.gather(
                client.complete(prompt, 50, ignore_eos=False, guided_grammar='start: "x" s{400}\ns: "a" | "a" s'),
                client.complete(prompt, 24, temperature=0, ignore_eos=True),
            )
            assert "grammar_lost" in lost.error and "Too many items" in lost.error
            assert (other.error, other.text) == ("", reference.text(prompt, 24))

    asyncio.run(run())
    checkpoint(cluster)


def test_clients_that_go_away_leave_nothing(cluster: Cluster, reference: Reference) -> None:
    async def leave(client: Client, at: int) -> None:
        prompt = reference.encode(f"Number {at}. {TEXTS[2]}")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.complete(prompt, 500, temperature=0, ignore_eos=True), 0.1 + 0.3 * at)

    async def run() -> None:
        async with Client(cluster) as client:
            await asyncio.gather(*(leave(client, at) for at in range(6)))
            # It comes after the steps that are under way.
            found = await client.complete(reference.encode(TEXTS[0]), 4, temperature=0, ignore_eos=True)
            assert found.error == ""

    asyncio.run(run())
    checkpoint(cluster)


def test_a_stream_goes_on_elsewhere_when_its_engine_is_killed(cluster: Cluster, reference: Reference) -> None:
    """Guided ones, too. The instance with all its processes, and vLLM's alone, which its instance does not survive."""
    prompt = tuple(reference.encode(TEXTS[1]))
    before = cluster.pids()
    engines = {name: engine_processes(before[name]) for name in ("decode-0", "decode-1")}
    assert all(len(found) == 1 for found in engines.values())

    [alone] = ask(cluster, (prompt, 150), **GUIDED)
    assert re.fullmatch(PATTERN, alone.text)
    guided: Call = (prompt, 150, GUIDED)
    free: Call = (prompt, 150, {"temperature": 0, "ignore_eos": True})
    found, killed, _ = kill_under(cluster, 3, guided, free, guided, guided, free, guided)
    text = reference.text(prompt, 150)
    assert [each.error for each in found] == [""] * 6
    assert [each.text for each in found] == [alone.text, text, alone.text, alone.text, text, alone.text]
    assert not any(map(lives, engines.pop(killed)))
    [(other, [engine])] = engines.items()
    os.kill(engine, signal.SIGKILL)
    cluster.until_back(other, before[other])
    checkpoint(cluster)
