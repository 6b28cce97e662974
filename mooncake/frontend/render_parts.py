"""Chat answers whose text has parts: reasoning, calls of tools, content. See `mooncake.frontend.render`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from mooncake.core.types import FinishReason
from mooncake.frontend.assembly import Delta
from mooncake.frontend.parts import CallArguments, CallBegun, Content, Part, PartParser, Reasoning
from mooncake.frontend.render import ChatRenderer, Head, Usage
from mooncake.frontend.tokenizer import Tokenizer

_CALLED = "tool_calls"
"""The reason of an answer that ends with calls."""
_encode = msgspec.json.Encoder().encode


class PartsRenderer(ChatRenderer):
    def __init__(
        self,
        head: Head,
        tokenizer: Tokenizer,
        include_usage: bool,
        num_choices: int,
        make_parser: Callable[[], PartParser],
    ) -> None:
        super().__init__(head, tokenizer, include_usage, num_choices)
        self._parsers = [make_parser() for _ in range(num_choices)]
        self._messages: dict[int, dict[str, Any]] = {}

    def delta(self, delta: Delta) -> bytes:
        """An event for each part; log probabilities come with the first, or alone while the text is held back."""
        parts: list[Part | None] = [*self._parsers[delta.choice].push(delta.text)]
        if delta.logprobs and not parts:
            parts = [None]
        logprobs = self._logprobs(delta) if delta.logprobs else None
        return b"".join(
            self._event(delta.choice, part, logprobs if index == 0 else None) for index, part in enumerate(parts)
        )

    def finish(self, choice: int, reason: str) -> bytes:
        rest = b"".join(self._event(choice, part) for part in self._parsers[choice].flush())
        return rest + super().finish(choice, self._reason(choice, reason))

    def whole(self, choices: Sequence[tuple[Delta, str]], usage: Usage) -> bytes:
        for delta, _ in choices:
            parser = self._parsers[delta.choice]
            self._messages[delta.choice] = message(parser.push(delta.text) + parser.flush())
        return super().whole([(delta, self._reason(delta.choice, reason)) for delta, reason in choices], usage)

    def _answer(self, delta: Delta) -> dict[str, Any]:
        return {"message": self._messages[delta.choice]}

    def _event(self, choice: int, part: Part | None, logprobs: dict[str, Any] | None = None) -> bytes:
        fields = {"delta": {} if part is None else _delta(part), "logprobs": logprobs, "finish_reason": None}
        return self._open[choice] + _encode(fields)[1:-1] + self._close

    def _reason(self, choice: int, reason: str) -> str:
        return _CALLED if reason == FinishReason.STOP and self._parsers[choice].num_calls else reason


def message(parts: Iterable[Part]) -> dict[str, Any]:
    """The assistant's message of a whole answer."""
    content, reasoning = "", ""
    calls: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Content():
                content += part.text
            case Reasoning():
                reasoning += part.text
            case CallBegun():
                calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
            case CallArguments():
                calls[part.index]["function"]["arguments"] += part.text
    found: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    if reasoning:
        found["reasoning_content"] = reasoning
    return found | {"tool_calls": calls} if calls else found


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Content():
            return {"content": part.text}
        case Reasoning():
            return {"reasoning_content": part.text}
        case CallBegun():
            function = {"name": part.name, "arguments": ""}
            return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
        case CallArguments():
            return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
