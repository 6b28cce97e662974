"""Structured output, tools and reasoning over HTTP: what reaches the model, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mooncake.core.types import FinishReason
from mooncake.engine.grammar import Grammars
from mooncake.frontend.tokenizer import Tokenizer
from tests.tiny_tokenizer import byte_level

from .harness import CHAT, COMPLETIONS, Site, events, run, site

END = "<|im_end|>"
OBJECT: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
BROKEN: dict[str, Any] = {"type": "objct"}
ODD: dict[str, Any] = {"type": "string", "format": "nobody knows"}


def tool(name: str = "f", parameters: Any = OBJECT, **words: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **words}}


def schema(inner: Any, **words: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": inner, **words}}}


def speaker(template: str, *special: str) -> Tokenizer:
    """A tokenizer with that chat template, and these words among its special tokens."""
    library = byte_level()
    library.add_special_tokens(list(special))
    return Tokenizer(library, chat_template=template, eos_ids=[library.token_to_id(END)])


TALK = "{% for m in messages %}{{ m.role }}: {{ m.content + '\n' }}{% endfor %}"
FULL = (
    "{% if tools %}TOOLS {{ tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}{{ m.tool_call_id }}: {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} {{ c.function.arguments.x }}</tool_call>{% endfor %}"
    "{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return grammars_of(speaker(TALK))


def grammars_of(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer.vocabulary, tokenizer.vocab_size, tokenizer.eos_ids)


def prompt_of(s: Site, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(s.backend.started[-1].token_ids)


def accepts(grammars: Grammars, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether a model that is guided by the grammar could write the text and end."""
    matcher = grammars.matcher(grammar)
    for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_ids[0]]:
        logits = np.zeros(tokenizer.vocab_size, dtype=np.float32)
        matcher.forbid(logits)
        if matcher.fault or np.isneginf(logits[token]):
            return False
        matcher.advance(token)
    return True


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (schema([]), "response_format.json_schema.schema"),
    (schema(BROKEN), "response_format.json_schema.schema"),
    (schema(ODD, strict=True), "response_format.json_schema.schema"),
    (schema({"enum": ["x" * 70_000]}), "response_format.json_schema.schema"),
    (schema(json.loads('{"items": ' * 900 + "{}" + "}" * 900)), "response_format.json_schema.schema"),
    (schema({"type": "integer", "multipleOf": 1000003}), "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "response_format.json_schema.name"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar"),
    ({"guided_regex": "a", "structured_outputs": {"json": OBJECT}}, "guided_regex"),
    (schema(OBJECT) | {"min_tokens": 3}, "min_tokens"),
    (schema(OBJECT) | {"ignore_eos": True}, "ignore_eos"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool(parameters=3)]}, "tools[0].function.parameters"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name"),
    ({"tools": [tool()] * 129}, "tools"),
    ({"tools": [tool(parameters={"enum": ["x" * 70_000]})]}, "tools[0].function.parameters"),
    ({"tools": [tool("g"), tool(parameters=BROKEN)], "tool_choice": "required"}, "tools[1].function.parameters"),
    ({"tools": [tool(f"f{at}", {"enum": ["x" * 60_000]}) for at in range(9)]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"guided_regex": "(" * 5000}, "guided_regex"),
    ({"tools": [tool()], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}]},
     "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": '{"x": ' * 900 + "1" + "}" * 900}}]}]},
     "messages[0].tool_calls[0].function.arguments"),
]  # fmt: skip


def test_refusals_name_the_field(tokenizer: Tokenizer, grammars: Grammars) -> None:
    async def test() -> None:
        async with site(tokenizer, grammars=grammars) as s:
            for fields, param in REFUSALS:
                answer = await s.chat(**fields)
                assert answer.status_code == 400, (fields, answer.text)
                assert answer.json()["error"]["param"] == param, answer.text
                assert len(answer.text) < 700, "what is wrong is not repeated at length"
            answer = await s.complete(tools=[tool()])
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
            assert s.backend.started == []

    run(test)


def test_an_engine_without_grammars_refuses_by_name(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            for fields, param in [
                (schema(OBJECT), "response_format.json_schema.schema"),
                ({"response_format": {"type": "json_object"}}, "response_format"),
                ({"guided_choice": ["a"]}, "guided_choice"),
                ({"tools": [tool()], "tool_choice": "required"}, "tool_choice"),
            ]:
                error = (await s.chat(**fields)).json()["error"]
                assert (error["param"], error["code"]) == (param, "unsupported_parameter")
            assert s.backend.started == []
            assert (await s.chat(tools=[tool()])).status_code == 200
            assert (await s.chat(response_format={"type": "text"})).status_code == 200

    run(test)


FORMS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1, null]}'], ["[]", '{"a":1}', "{} "]),
    (schema(OBJECT), ['{"x": 1}'], ['{"x": "1"}', "{}"]),
    (schema({"allOf": [ODD], "maxLength": 2}), ['"ab"'], ["1"]),
    ({"structured_outputs": {"choice": ["a", "b c"]}}, ["a", "b c"], ["b", "ab"]),
    ({"structured_outputs": {"json": json.dumps(OBJECT)}}, ['{"x": 1}'], ["{}"]),
    ({"guided_regex": "[a-c]+/"}, ["abc/"], ["abc"]),
    ({"guided_grammar": 'start: "a" | "b"'}, ["a"], ["ab"]),
    ({"tools": [tool(), tool("g", None)], "tool_choice": "required"},
     ['{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}\n{"name": "g", "arguments": {}}'],
     ["hello", '{"name": "h", "arguments": {}}', '{"name": "f", "arguments": {}}', '{"name": "g", "arguments": {"x": 1}}']),
    ({"tools": [tool(), tool("g")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
     ['{"name": "g", "arguments": {"x": 1}}'], ['{"name": "f", "arguments": {"x": 1}}']),
    ({"tools": [tool(), tool("g", None)], "tool_choice": "required", "parallel_tool_calls": False},
     ['{"name": "g", "arguments": {}}'], ['{"name": "g", "arguments": {}}\n{"name": "g", "arguments": {}}']),
    ({"tools": [tool()]} | schema({"const": 7}), ["7", '{"name": "f", "arguments": {"x": 1}}'], ["8"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "right", "wrong"), FORMS)
def test_grammars_say_what_was_asked_for(
    tokenizer: Tokenizer, grammars: Grammars, fields: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    async def test() -> None:
        async with site(tokenizer, grammars=grammars) as s:
            assert (await s.chat(**fields)).status_code == 200
            grammar = s.backend.started[-1].sampling.grammar
            assert [accepts(grammars, tokenizer, grammar, text) for text in right] == [True] * len(right)
            assert [accepts(grammars, tokenizer, grammar, text) for text in wrong] == [False] * len(wrong)

    run(test)


def test_completions_take_forms_too(tokenizer: Tokenizer, grammars: Grammars) -> None:
    async def test() -> None:
        async with site(tokenizer, grammars=grammars) as s:
            answer = await s.post(COMPLETIONS, {"model": "tiny", "prompt": "hi", "guided_choice": ["a"]})
            assert answer.status_code == 200
            assert accepts(grammars, tokenizer, s.backend.started[-1].sampling.grammar, "a")

    run(test)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_reasoning_comes_before_what_was_asked_for(grammars: Grammars, opened: bool, special: bool) -> None:
    template = TALK + "{# </think> #}" + ("assistant: <think>\n" if opened else "assistant: ")
    marks = ("</think>", "<mark>") if special else ()
    tokenizer = speaker(template, *marks)
    own = grammars_of(tokenizer)

    async def test() -> None:
        async with site(tokenizer, grammars=own) as s:
            assert (await s.chat(**schema(OBJECT))).status_code == 200
            grammar = s.backend.started[-1].sampling.grammar
            begin = "" if opened else "<think>"
            assert accepts(own, tokenizer, grammar, begin + 'Hm.\n{"x": 2}\n</think>\n\n{"x": 1}')
            assert accepts(own, tokenizer, grammar, '{"x": 1}') is not opened
            assert not accepts(own, tokenizer, grammar, begin + "Hm.</think>Hm.")
            error = (await s.chat(**schema(BROKEN))).json()["error"]
            assert error["param"] == "response_format.json_schema.schema"

    run(test)


CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_calls_come_back_whole_and_streamed(tokenizer: Tokenizer) -> None:
    """The echo says the prompt: a turn's role, then the text."""

    async def test() -> None:
        async with site(tokenizer, tool_parser="hermes") as s:
            text = f"{CALLED}\n{CALLED}"
            answer = (await s.chat(text, tools=[tool()])).json()["choices"][0]
            assert answer["finish_reason"] == "tool_calls"
            assert answer["message"]["content"].startswith("user")
            calls = answer["message"]["tool_calls"]
            assert [call["function"] for call in calls] == [{"name": "f", "arguments": '{"x": 1}'}] * 2
            assert len({call["id"] for call in calls}) == 2 and all(call["type"] == "function" for call in calls)
            streamed = await s.chat(text, tools=[tool()], stream=True, logprobs=True)
            assert gather(events(streamed)) == [("f", '{"x": 1}'), ("f", '{"x": 1}')]
            num_said = s.backend.started[0].token_ids.index(tokenizer.eos_ids[0]) + 1
            logged = [(event["choices"][0]["logprobs"] or {}).get("content", ()) for event in events(streamed)]
            assert sum(map(len, logged)) == num_said, "log probabilities of every token"
            assert events(streamed)[-1]["choices"][0]["finish_reason"] == "tool_calls"
            cut = (await s.chat(text, tools=[tool()], max_tokens=20)).json()["choices"][0]
            assert cut["finish_reason"] == FinishReason.LENGTH
            plain = (await s.chat(text, tools=[tool()], tool_choice="none")).json()["choices"][0]
            assert "tool_calls" not in plain["message"] and CALLED in plain["message"]["content"]

    run(test)


def gather(stream: list[Any]) -> list[tuple[str, str]]:
    calls: list[list[str]] = []
    for event in stream:
        for piece in event["choices"][0]["delta"].get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls) and piece["function"]["arguments"] == ""
                calls.append([piece["function"]["name"], ""])
            else:
                calls[piece["index"]][1] += piece["function"]["arguments"]
    return [(name, arguments) for name, arguments in calls]


def test_marks_that_are_special_tokens_are_seen() -> None:
    tokenizer = speaker("{# tools [TOOL_CALLS] #}{{ messages[0].content }}", "[TOOL_CALLS]")

    async def test() -> None:
        async with site(tokenizer) as s:
            text = '[TOOL_CALLS][{"name": "f", "arguments": {}}]'
            answer = (await s.chat(text, tools=[tool()])).json()["choices"][0]
            assert answer["message"]["content"] is None
            [call] = answer["message"]["tool_calls"]
            assert (call["function"], len(call["id"])) == ({"name": "f", "arguments": "{}"}, 9)
            assert "TOOL_CALLS" not in (await s.chat(text)).json()["choices"][0]["message"]["content"]

    run(test)


def test_reasoning_is_apart(grammars: Grammars) -> None:
    tokenizer = speaker("{# </think> #}{{ messages[0].content }}")

    async def test() -> None:
        async with site(tokenizer) as s:
            text = "<think>\nHm.\n</think>\n\nYes."
            message = (await s.chat(text)).json()["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
            deltas = [event["choices"][0]["delta"] for event in events(await s.chat(text, stream=True))]
            assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
            assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
        async with site(tokenizer, reasoning_parser="off") as s:
            assert (await s.chat(text)).json()["choices"][0]["message"]["content"] == text

    run(test)


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "five"},
]  # fmt: skip


def test_a_template_that_knows_tools_gets_them() -> None:
    tokenizer = speaker(FULL)

    async def test() -> None:
        async with site(tokenizer) as s:
            body = {"model": "tiny", "messages": CONVERSATION, "tools": [tool(description="é")]}
            assert (await s.post(CHAT, body)).status_code == 200
            first, *rest = prompt_of(s, tokenizer).splitlines()
            assert json.loads(first.removeprefix("TOOLS ")) == [tool(description="é")]
            assert rest == ["user: hi", "assistant: <tool_call>f 5</tool_call>", "toolc1: five"]
            await s.post(CHAT, body | {"tool_choice": "none"})
            assert prompt_of(s, tokenizer).startswith("user: hi")

    run(test)


def test_a_template_that_does_not_is_helped() -> None:
    tokenizer = speaker(TALK)

    async def test() -> None:
        async with site(tokenizer) as s:
            body = {"model": "tiny", "messages": CONVERSATION, "tools": [tool()]}
            assert (await s.post(CHAT, body)).status_code == 200
            text = prompt_of(s, tokenizer)
            assert text.startswith("system: You can call these functions")
            assert json.dumps(tool()["function"]) in text
            assert 'assistant: {"name": "f", "arguments": {"x": 5}}\ntool: five' in text
            messages = [{"role": "system", "content": "Be kind."}, *CONVERSATION]
            await s.post(CHAT, body | {"messages": messages})
            assert prompt_of(s, tokenizer).startswith("system: Be kind.\n\nYou can call")

    run(test)
