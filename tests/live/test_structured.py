"""Grammars live: random weights under the real tokenizer write what was asked for, also when an instance dies meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.live.harness import Client, Cluster
from tests.live.models import save_tiny_model
from tests.live.test_exact import FLOAT32, ask, ask_and_kill, prompt

NUMBERS: dict[str, Any] = {
    "type": "array", "minItems": 60, "maxItems": 60, "items": {"type": "integer", "minimum": 10_000, "maximum": 99_999},
}  # fmt: skip
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PERSON}} for name in ("greet", "find")]
GUIDED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "ignore_eos": False, "guided_json": NUMBERS}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    with Cluster(
        "--model", str(model), *FLOAT32, "--prefill", "1", "--decode", "2", "--store-memory", "64MiB"
    ) as found:
        yield found


def chat(cluster: Cluster, **fields: Any) -> Any:
    body = {"model": cluster.config["model_name"], "messages": [{"role": "user", "content": "Who is it?"}]} | fields
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def deltas(answer: httpx.Response) -> list[dict[str, Any]]:
    """Of a streamed answer, its choices one after the other; each with its finish_reason, if it ends there."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line)["choices"][0] for line in lines[:-2]]


def check(person: Any) -> None:
    assert list(person) == ["name", "age"]
    assert len(person["name"]) <= 20 and 0 <= person["age"] <= 150


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}])
def test_a_schema_is_followed(cluster: Cluster, sampling: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = chat(cluster, response_format=wanted, n=3, max_tokens=200, **sampling).json()
    assert len(answer["choices"]) == 3
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        check(json.loads(choice["message"]["content"]))
    streamed = deltas(chat(cluster, response_format=wanted, max_tokens=200, stream=True, **sampling))
    text = "".join(each["delta"].get("content", "") for each in streamed)
    assert text == answer["choices"][0]["message"]["content"]
    assert streamed[-1]["finish_reason"] == "stop"


def test_a_required_call_is_made(cluster: Cluster) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "seed": 1, "max_tokens": 1000}
    answer = chat(cluster, **fields).json()["choices"][0]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    made = [(call["function"]["name"], call["function"]["arguments"]) for call in answer["message"]["tool_calls"]]
    for name, arguments in made:
        assert name in ("greet", "find")
        check(json.loads(arguments))
    calls: list[list[str]] = []
    streamed = deltas(chat(cluster, stream=True, **fields))
    for piece in [piece for each in streamed for piece in each["delta"].get("tool_calls", ())]:
        if "id" in piece:
            calls.append([piece["function"]["name"], ""])
        calls[piece["index"]][1] += piece["function"]["arguments"]
    assert [tuple(call) for call in calls] == made
    assert streamed[-1]["finish_reason"] == "tool_calls"
    named = {"type": "function", "function": {"name": "find"}}
    [call] = chat(cluster, **fields | {"tool_choice": named}).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "find"


def test_a_schema_is_followed_where_another_instance_goes_on(cluster: Cluster) -> None:
    calls = [(prompt(at, 60 + 40 * at), 700) for at in range(3)]
    alone = [ask(cluster, call, **GUIDED)[0] for call in calls]
    for found in alone:
        numbers = json.loads(found.text)
        assert (found.error, found.finish) == ("", "stop")
        assert len(numbers) == 60 and all(10_000 <= number <= 99_999 for number in numbers)
    after_kill = ask_and_kill(cluster, 2, *calls, **GUIDED)
    assert [(found.error, found.text) for found in after_kill] == [("", found.text) for found in alone]


def test_a_grammar_that_is_lost_on_the_way_ends_its_request_only(cluster: Cluster) -> None:
    async def scenario() -> tuple[Any, Any]:
        async with Client(cluster) as client:
            lost = client.complete(
                list(prompt(1, 40)), 50, ignore_eos=False, guided_grammar='start: "x" s{400}\ns: "a" | "a" s'
            )
            return await asyncio.gather(lost, client.complete(list(prompt(2, 40)), 50))

    lost, other = asyncio.run(scenario())
    assert "grammar_lost" in lost.error and "Too many items" in lost.error
    assert (other.error, other.num_output) == ("", 50)
