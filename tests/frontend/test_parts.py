"""Calls and reasoning in a text: what is found does not depend on how the text is cut."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence

import pytest

from mooncake.frontend.parts import CallArguments, CallBegun, Content, Part, PartParser, Reasoning, TextParser
from mooncake.frontend.reasoning import ReasoningParser
from mooncake.frontend.tool_calls import CallParser
from mooncake.frontend.tool_formats import FORMATS, HERMES, LLAMA3, MISTRAL, PLAIN, ToolFormat, detect

Found = tuple[str, str, list[tuple[str, str]]]
"""Content, reasoning, calls."""
NAMES = ("f", "get_weather")
DEEP = '{"a": {"b": [1, {"c": "}]\\"{"}]}, "d": "\\\\"}'


def gather(parts: Iterable[Part]) -> Found:
    content = reasoning = ""
    calls: list[tuple[str, str]] = []
    for part in parts:
        match part:
            case Content():
                content += part.text
            case Reasoning():
                reasoning += part.text
            case CallBegun():
                assert part.index == len(calls)
                calls.append((part.name, ""))
            case CallArguments():
                assert part.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return content, reasoning, calls


def parse(parser: PartParser, pieces: Sequence[str]) -> Found:
    return gather([part for piece in pieces for part in parser.push(piece)] + parser.flush())


def cuts(text: str) -> Iterable[list[str]]:
    """Whole, by the character, at every place, and at random ones."""
    yield [text]
    yield list(text)
    yield from ([text[:at], text[at:]] for at in range(len(text)))
    rng = random.Random(1)
    for _ in range(30):
        places = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(2, 6))))
        yield [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


def check(make: Callable[[], PartParser], text: str, expected: Found) -> None:
    for pieces in cuts(text):
        assert parse(make(), pieces) == expected, pieces


def calls_in(form: ToolFormat, max_calls: int = 9) -> Callable[[], CallParser]:
    ids = map(str, itertools.count())
    return lambda: CallParser(form, NAMES, max_calls, lambda: next(ids))


def call(name: str = "f", arguments: str = '{"x": 1}', key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


TEXTS: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Hello, world\n", "Hello, world\n", []),
    (HERMES, f"<tool_call>\n{call()}\n</tool_call>", "", [("f", '{"x": 1}')]),
    (HERMES, f"Let me see.\n<tool_call>{call('g', DEEP)}</tool_call>\n", "Let me see.", [("g", DEEP)]),
    (HERMES, f"<tool_call>{call()}</tool_call>\n<tool_call>\n{call('g', '{}')}\n</tool_call>", "",
     [("f", '{"x": 1}'), ("g", "{}")]),
    (HERMES, f"<tool_call>{call()}</tool_call> and more", " and more", [("f", '{"x": 1}')]),
    (HERMES, f'<tool_call>{call()}</tool_call>\n<tool_call>\n{{"name": "g", "arg', "", [("f", '{"x": 1}')]),
    (HERMES, f"<tool_call>{call()}</tool_call>\n<tool_call>", "", [("f", '{"x": 1}')]),
    (HERMES, f"<tool_call>{call()}</tool_call> and <tool", " and", [("f", '{"x": 1}')]),
    (HERMES, "a < b <tool> <tool_calls", "a < b <tool> <tool_calls", []),
    (HERMES, "<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", []),
    (HERMES, '<tool_call>{"no": "call"}</tool_call>', '<tool_call>{"no": "call"}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    (HERMES, f"<tool_call>\n{call()[:-4]}", "", [("f", '{"x":')]),
    (HERMES, f"<tool_call>\n{call()}\n</tool", "", [("f", '{"x": 1}')]),
    (HERMES, '<tool_call>{"arguments": {"x": [1]}, "name": "f"}</tool_call>', "", [("f", '{"x": [1]}')]),
    (HERMES, '<tool_call>{"id": 1, "name": "f", "arguments": "{\\"x\\": 2}"}</tool_call>', "", [("f", '{"x": 2}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 1}, "id": "y{"}</tool_call>', "", [("f", '{"x": 1}')]),
    (HERMES, '<tool_call>{"name": "a\\xb", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "a\\xb", "arguments": {}}</tool_call>', []),
    (MISTRAL, f"[TOOL_CALLS][{call()}, {call('g')}]", "", [("f", '{"x": 1}'), ("g", '{"x": 1}')]),
    (MISTRAL, f"[TOOL_CALLS] [{call()}, ", "", [("f", '{"x": 1}')]),
    (MISTRAL, "[TOOL_CALLS]f{}", "[TOOL_CALLS]f{}", []),
    (LLAMA3, call("get_weather", key="parameters"), "", [("get_weather", '{"x": 1}')]),
    (LLAMA3, f"{call(key='parameters')}; {call('get_weather')}", "", [("f", '{"x": 1}'), ("get_weather", '{"x": 1}')]),
    (LLAMA3, f"Call: {call()}", f"Call: {call()}", []),
    (LLAMA3, call("unknown"), call("unknown"), []),
    (PLAIN, f"\n [{call()}\n,{call('f', '{}')}]", "", [("f", '{"x": 1}'), ("f", "{}")]),
    (PLAIN, '{"answer": {"name": "f", "arguments": {}}}', '{"answer": {"name": "f", "arguments": {}}}', []),
    (PLAIN, "[1, 2]", "[1, 2]", []),
    (PLAIN, "{}", "{}", []),
    (PLAIN, f"{call()} is it", "is it", [("f", '{"x": 1}')]),
    (PLAIN, f'{call()}\n{{"name": "f", "arguments"', "", [("f", '{"x": 1}')]),
    (PLAIN, "  ", "  ", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), TEXTS)
def test_calls(form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(calls_in(form), text, (content, "", calls))


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = CallParser(HERMES, NAMES, 9, lambda: "id")
    assert parser.push('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.push('{"x": ') == [CallBegun(0, "id", "f"), CallArguments(0, '{"x": ')]
    assert parser.push('[1, "}') == [CallArguments(0, '[1, "}')]
    assert parser.push('"]}}</tool_call>') == [CallArguments(0, '"]}')]
    assert (parser.flush(), parser.num_calls) == ([], 1)


def test_content_is_held_back_only_where_a_mark_may_begin() -> None:
    parser = CallParser(HERMES, NAMES, 9, lambda: "id")
    assert parser.push("if a <") == [Content("if a")]
    assert parser.push(" b") == [Content(" < b")]
    plain = CallParser(PLAIN, NAMES, 9, lambda: "id")
    assert plain.push('{"answer": ') == [Content('{"answer":')]
    assert plain.push("42}") == [Content(" 42}")]


def test_later_calls_are_dropped_where_only_one_is_wanted() -> None:
    text = f"<tool_call>{call()}</tool_call><tool_call>{call('g')}</tool_call>"
    check(calls_in(HERMES, 1), text, ("", "", [("f", '{"x": 1}')]))


REASONING: list[tuple[bool, str, str, str]] = [
    (False, "<think>\nHm, 1 < 2.\n</think>\n\nYes.", "Hm, 1 < 2.", "Yes."),
    (False, "\n<think></think>Yes.", "", "Yes."),
    (False, " Yes.", "", " Yes."),
    (False, "<thin", "", "<thin"),
    (False, "Yes <think>no</think>", "", "Yes <think>no</think>"),
    (True, "\nHm.\n</think>\nYes.\n", "Hm.", "Yes.\n"),
    (True, "Hm, </thin", "Hm, </thin", ""),
    (True, "Hm, \n", "Hm,", ""),
    (True, "</think>", "", ""),
]


@pytest.mark.parametrize(("opened", "text", "reasoning", "content"), REASONING)
def test_reasoning(opened: bool, text: str, reasoning: str, content: str) -> None:
    check(lambda: ReasoningParser(TextParser(), opened), text, (content, reasoning, []))


def test_calls_after_reasoning() -> None:
    text = f"<think>{call()}</think>\n\n<tool_call>\n{call('g')}\n</tool_call>"
    make = calls_in(HERMES)
    check(lambda: ReasoningParser(make(), False), text, ("", call(), [("g", '{"x": 1}')]))


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_what_a_format_writes_is_what_its_parser_finds(form: ToolFormat) -> None:
    calls = [("f", {"x": 'a\n"}é</tool_call>]', "y": [1.5, None]}), ("get_weather", {})]
    text = form.write(calls)
    for pieces in cuts(text):
        content, _, found = parse(calls_in(form)(), pieces)
        assert content == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '[TOOL_CALLS]' }}", MISTRAL),
        ("{{ '<tool_call>' }}", HERMES),
        ('{{ \'{"name": "\' + name + \'", "parameters": \' }}', LLAMA3),
        ("{{ message.content }}", PLAIN),
    ],
)
def test_formats_are_known_by_the_template(template: str, form: ToolFormat) -> None:
    assert detect(template) is form
