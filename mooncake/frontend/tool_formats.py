"""How models write calls of tools: four formats, each with the grammar of a forced call and the text of an earlier one.

hermes    <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>     Hermes, Qwen 2.5 and 3
mistral   [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]              Mistral, from its second tokenizer on
llama3    {"name": "f", "parameters": {...}}; ...                           Llama 3.1 to 3.3
json      {"name": "f", "arguments": {...}}                                 models that were not trained on any
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from mooncake.engine.grammar import json_value, literal
from mooncake.frontend.tools import Function

ToolFormatName = Literal["hermes", "mistral", "llama3", "json"]
MAX_FORCED_CALLS = 16
"""Of one answer, where a call is forced and several are allowed: a weak model would never stop."""


class ToolFormat(msgspec.Struct, frozen=True):
    """An answer with calls is: head, then calls with `separator` between them, then tail; a call is `before`, object, `after`.

    opening: what tells that calls follow; empty: nothing does, and an answer that begins with an object of a call's form is
    one. closing: what ends them. skipped: characters that may stand between calls. arguments: the key. id_chars: of a call's
    id."""

    name: ToolFormatName
    opening: str = ""
    closing: str = ""
    skipped: str = " \t\r\n"
    head: str = ""
    tail: str = ""
    before: str = ""
    after: str = ""
    separator: str = "\n"
    arguments: str = "arguments"
    id_chars: int = 24

    def write(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """Names and arguments as the model would have written them."""
        objects = [json.dumps({"name": name, self.arguments: words}, ensure_ascii=False) for name, words in calls]
        return self.head + self.separator.join(self.before + each + self.after for each in objects) + self.tail

    def grammar(self, functions: Sequence[Function], parallel: bool, marks: Mapping[str, int]) -> str:
        """Of one call or, if parallel, more. marks: special tokens among the words of the format."""
        rules = [f"call: {' | '.join(f'call{index}' for index in range(len(functions)))}"]
        for index, function in enumerate(functions):
            opening = f'{self.before}{{"name": {json.dumps(function.name)}, "{self.arguments}": '
            schema = json_value(function.schema, strict=bool(function.strict))
            rules.append(f"call{index}: {_terms(opening, marks)} {schema} {_terms('}' + self.after, marks)}")
        more = f"({_terms(self.separator, marks)} call){{0,{MAX_FORCED_CALLS - 1}}}" if parallel else ""
        start = f"start: {_terms(self.head, marks)} call {more} {_terms(self.tail, marks)}"
        return "\n".join([start, *rules])

    def marks(self) -> tuple[str, ...]:
        """Its words that a tokenizer may have special tokens for."""
        return tuple(mark for mark in (self.opening, self.closing) if len(mark) > 1)


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", before="<tool_call>\n", after="\n</tool_call>")
MISTRAL = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    "]",
    " \t\r\n[,",
    head="[TOOL_CALLS][",
    tail="]",
    separator=", ",
    id_chars=9,  # its templates insist
)
LLAMA3 = ToolFormat("llama3", skipped=" \t\r\n[],;", separator="; ", arguments="parameters")
PLAIN = ToolFormat("json", skipped=" \t\r\n[],;")
FORMATS: dict[str, ToolFormat] = {each.name: each for each in (HERMES, MISTRAL, LLAMA3, PLAIN)}


def detect(template: str) -> ToolFormat:
    """By what the model's chat template says of calls."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or re.search(r'"parameters"\s*:', template):
        return LLAMA3
    return PLAIN


def describe(functions: Sequence[Function], form: ToolFormat) -> str:
    """For models whose chat template does not know of tools."""
    lines = [json.dumps(msgspec.to_builtins(function), ensure_ascii=False) for function in functions]
    example = form.write([("NAME", {"PARAMETER": "VALUE"})])
    return (
        "You can call these functions, described by JSON schemas:\n"
        + "\n".join(lines)
        + f"\nTo call one, answer with nothing but:\n{example}"
    )


def _terms(text: str, marks: Mapping[str, int]) -> str:
    """Text as terms of a rule, its marks as tokens."""
    pattern = "|".join(map(re.escape, marks))
    pieces = re.split(f"({pattern})", text) if pattern else [text]
    return " ".join(f"<[{marks[piece]}]>" if piece in marks else literal(piece) for piece in pieces if piece)
