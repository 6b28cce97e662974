"""/v1/responses: whole and streamed, items in and out, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mooncake.frontend.backend import Failed
from mooncake.frontend.tokenizer import Tokenizer

from .harness import Site, run, site

PATH = "/v1/responses"


async def ask(s: Site, given: Any = "hello, world", **fields: Any) -> Any:
    return await s.post(PATH, {"model": "tiny", "input": given, **fields})


def sent(answer: Any) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its data says."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_a_text_is_answered_by_an_object_of_items(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.cached_tokens = 2
            answer = (await ask(s, instructions="be brief", metadata={"a": "b"}, x_request_id="r1")).json()
            assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "tiny")
            [item] = answer["output"]
            assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
            [part] = item["content"]
            prompt = s.backend.started[-1].token_ids
            assert part["type"] == "output_text" and part["text"] == "system\nbe brief"
            messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello, world"}]
            assert prompt == tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
            assert answer["usage"]["input_tokens"] == len(prompt)
            assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 2}
            assert (answer["instructions"], answer["metadata"], answer["store"]) == ("be brief", {"a": "b"}, False)

    run(test)


def test_events_build_what_a_whole_answer_is(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            whole = (await ask(s)).json()
            found = sent(await ask(s, stream=True))
            kinds = [event["type"].removeprefix("response.") for event in found]
            deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
            begin = ["created", "in_progress", "output_item.added", "content_part.added"]
            end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
            assert kinds == begin + ["output_text.delta"] * len(deltas) + end and len(deltas) > 2
            text = whole["output"][0]["content"][0]["text"]
            assert "".join(deltas) == found[-4]["text"] == text
            last = found[-1]["response"]
            assert last["usage"] == whole["usage"] and last["output"][0]["content"] == whole["output"][0]["content"]
            assert found[0]["response"]["status"] == "in_progress" and "usage" not in found[0]["response"]

    run(test)


def test_an_answer_that_was_cut_is_incomplete(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            whole = (await ask(s, max_output_tokens=3)).json()
            assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
            assert whole["output"][0]["status"] == "incomplete"
            assert sent(await ask(s, max_output_tokens=3, stream=True))[-1]["type"] == "response.incomplete"

    run(test)


def test_a_failure_on_the_way_ends_the_stream(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.failure = (3, Failed("broken"))
            last = sent(await ask(s, stream=True))[-1]
            assert last["type"] == "response.failed"
            assert last["response"]["error"] == {"code": "failed", "message": "broken"}
            assert (await ask(s)).status_code == 500

    run(test)


def test_a_conversation_is_a_list_of_items(tokenizer: Tokenizer) -> None:
    items = [
        {"role": "developer", "content": "rules"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "yes?", "annotations": []}]},
        {"role": "user", "content": "more"},
    ]
    messages = [
        {"role": "system", "content": "rules"},  # the template does not know of developers
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "more"},
    ]

    async def test() -> None:
        async with site(tokenizer) as s:
            assert (await ask(s, items)).status_code == 200
            text = tokenizer.render_chat(messages)
            assert s.backend.started[-1].token_ids == tokenizer.encode(text, add_special_tokens=False)

    run(test)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def test_a_call_is_an_item_of_its_own(tokenizer: Tokenizer) -> None:
    """The echo says what it was told, the call in it included."""

    async def test() -> None:
        async with site(tokenizer, tool_parser="hermes") as s:
            whole = (await ask(s, f"so {CALL}", tools=[TOOL])).json()
            calls = [item for item in whole["output"] if item["type"] == "function_call"]
            assert [(call["name"], json.loads(call["arguments"])) for call in calls][-1] == ("add", {"a": 1})
            found = sent(await ask(s, f"so {CALL}", tools=[TOOL], stream=True))
            assert [event["item"]["type"] for event in found if event["type"] == "response.output_item.done"] == [
                item["type"] for item in whole["output"]
            ]
            pieces = [event["delta"] for event in found if event["type"] == "response.function_call_arguments.delta"]
            done = [event["arguments"] for event in found if event["type"] == "response.function_call_arguments.done"]
            assert "".join(pieces) == "".join(done)

    run(test)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "x"}, 3]}, "input[1]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": "hello " * 10_000}, "input"),
        ({"input": "hello " * 200_000}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 5000}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "refused by the template"}]}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL | {"parameters": {"x": "y" * 2**17}}]}, "tools[0].parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"x": "y" * 2**17}}}},
            "text.format.schema",
        ),
    ],
)
def test_what_is_wrong_is_named(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            answer = await s.post(PATH, {"model": "tiny", "input": "hi", **fields})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param
            assert s.backend.started == []

    run(test)
