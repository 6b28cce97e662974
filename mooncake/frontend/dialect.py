"""How one model is spoken to and understood: tools and reasoning by the marks of its chat template, forms by grammars."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mooncake.engine.grammar import escape, json_grammar, literal, nested
from mooncake.frontend.parts import PartParser, TextParser
from mooncake.frontend.reasoning import CLOSE, OPEN, ReasoningParser
from mooncake.frontend.schema import ChatMessage, ChatRequest, Request
from mooncake.frontend.structured import Form
from mooncake.frontend.tokenizer import Detokenizer, Tokenizer
from mooncake.frontend.tool_calls import CallParser
from mooncake.frontend.tool_formats import FORMATS, ToolFormat, describe, detect
from mooncake.frontend.tools import ToolUse, arguments_of

_MAX_CALLS = 1024
"""Of one answer: a bound, not a limit that somebody will meet."""
_TAIL_TOKENS = 8
"""Of a prompt: the mark that opens the reasoning is among them."""
_ID_CHARS = string.ascii_letters + string.digits


class Reading(msgspec.Struct, frozen=True):
    """How the output of one request is guided and read. form: what it must look like; None: as it likes. make_parser: None
    where all of it is the text of the answer. shown: special tokens that the parser wants to see."""

    form: Form | None = None
    make_parser: Callable[[], PartParser] | None = None
    shown: dict[int, str] = {}

    def detokenizer(self, tokenizer: Tokenizer) -> Detokenizer:
        return tokenizer.detokenizer(self.shown)


class Dialect:
    """tool_format, reasoning: how the model writes calls, and whether it reasons between marks."""

    def __init__(self, tokenizer: Tokenizer, tool_format: ToolFormat, reasoning: bool, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._format = tool_format
        self._reasoning = reasoning
        self._rng = rng
        self._knows_tools = re.search(r"\btools\b", tokenizer.chat_template) is not None
        self._knows_calls = "tool_calls" in tokenizer.chat_template
        self._knows_developers = "developer" in tokenizer.chat_template
        self._marks = self._special(tool_format.marks())
        self._reasoning_marks = self._special((OPEN, CLOSE)) if reasoning else {}

    @classmethod
    def of(cls, tokenizer: Tokenizer, tool_parser: str, reasoning_parser: str, rng: random.Random) -> Dialect:
        """By the names in the configuration; auto: by the chat template."""
        template = tokenizer.chat_template
        tool_format = detect(template) if tool_parser == "auto" else FORMATS[tool_parser]
        reasoning = CLOSE in template if reasoning_parser == "auto" else reasoning_parser == "think"
        return cls(tokenizer, tool_format, reasoning, rng)

    # ------------------------------------------------------------ the prompt

    def prompt(self, request: ChatRequest) -> str:
        """Raises TemplateFailed, or ApiError naming the field."""
        messages = [self._message(f"messages[{index}]", each) for index, each in enumerate(request.messages)]
        functions = request.tool_use().tools
        if not functions:
            return self._tokenizer.render_chat(messages)
        if self._knows_tools:
            tools = [{"type": "function", "function": msgspec.to_builtins(function)} for function in functions]
            return self._tokenizer.render_chat(messages, tools=tools)
        return self._tokenizer.render_chat(_with_system(messages, describe(functions, self._format)))

    def _message(self, field: str, message: ChatMessage) -> dict[str, Any]:
        found = message.as_template_input()
        if message.role == "developer" and not self._knows_developers:
            found["role"] = "system"  # OpenAI's newer word for it, which templates ignore or refuse
        calls = message.tool_calls or []
        if not calls:
            return found
        arguments = [arguments_of(f"{field}.tool_calls[{index}]", call) for index, call in enumerate(calls)]
        if not self._knows_calls:
            text = self._format.write(
                [(call.function.name, words) for call, words in zip(calls, arguments, strict=True)]
            )
            return found | {"content": "\n".join(filter(None, (found["content"], text)))}
        written = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": words}}
            for call, words in zip(calls, arguments, strict=True)
        ]
        return found | {"tool_calls": written}

    # ------------------------------------------------------------ the output

    def reading(self, request: Request, prompt: Sequence[int]) -> Reading:
        """prompt: token ids. Raises ApiError naming the field."""
        form = request.form()
        if not isinstance(request, ChatRequest):
            return Reading(form)
        use = request.tool_use()
        opened = self._reasoning and self._opens_reasoning(prompt)
        form = self._form(form, use, opened)
        if not use.tools and not self._reasoning:
            return Reading(form)
        marks = (self._marks if use.tools else {}) | self._reasoning_marks
        shown = {token_id: mark for mark, token_id in marks.items()}
        return Reading(form, lambda: self._parser(use, opened), shown)

    def _parser(self, use: ToolUse, opened: bool) -> PartParser:
        parser: PartParser = TextParser()
        if use.tools:
            names = {function.name for function in use.tools}
            parser = CallParser(self._format, names, _MAX_CALLS if use.parallel else 1, self._new_id)
        return ReasoningParser(parser, opened) if self._reasoning else parser

    def _form(self, form: Form | None, use: ToolUse, opened: bool) -> Form | None:
        """The whole output's: reasoning, then a call or what the client wants of the text."""
        if use.forced:
            calls = self._format.grammar(use.forced, use.parallel, self._marks)
            form = Form("tool_choice", calls, _sources(use))
        elif form is not None and use.tools:
            calls = self._format.grammar(use.tools, use.parallel, self._marks)
            either = f"start: answer | calls\nanswer: {nested(form.grammar)}\ncalls: {nested(calls)}"
            form = Form(form.field, either, ((form.field, form.grammar), *_sources(use)))
        if form is None or not self._reasoning:
            return form
        sources = form.sources or ((form.field, form.grammar),)
        return Form(form.field, self._after_reasoning(form.grammar, opened), sources)

    def _after_reasoning(self, grammar: str, opened: bool) -> str:
        marks = self._reasoning_marks
        close = f"<[{marks[CLOSE]}]>" if CLOSE in marks else ""
        text = r"thinking: /(.|\n)*/" if close else rf"thinking[lazy]: /(.|\n)*{escape(CLOSE)}/"
        begin = f"<[{marks[OPEN]}]>" if OPEN in marks else literal(OPEN)
        reasoned = f"thinking {close} gap?" if opened else f"({begin} thinking {close} gap?)?"
        return f"start: {reasoned} answer\n{text}\ngap: /\\n{{1,2}}/\nanswer: {nested(grammar)}"

    def _opens_reasoning(self, prompt: Sequence[int]) -> bool:
        tail = b"".join(self._tokenizer.token_bytes(token) for token in prompt[-_TAIL_TOKENS:])
        return tail.rstrip().endswith(OPEN.encode())

    def _new_id(self) -> str:
        drawn = "".join(self._rng.choices(_ID_CHARS, k=self._format.id_chars))
        return drawn if self._format.id_chars < 10 else f"call_{drawn}"

    def _special(self, marks: Sequence[str]) -> dict[str, int]:
        found = {mark: self._tokenizer.special_id(mark) for mark in marks}
        return {mark: token_id for mark, token_id in found.items() if token_id is not None}


def _sources(use: ToolUse) -> tuple[tuple[str, str], ...]:
    """The grammar of each tool's arguments, by the field that it comes from."""
    return tuple(
        (use.schema_field(index), json_grammar(function.schema, strict=bool(function.strict)))
        for index, function in enumerate(use.tools)
    )


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Behind what the first message says if that is the system's, else before all."""
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    first = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
    return [first, *messages[1:]]
