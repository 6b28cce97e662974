"""Answers of /v1/responses: an object of items, or the events that build it one after the other.

created, in_progress
    for each item:   output_item.added  [content_part.added]  ....delta …  ....done  [content_part.done]  output_item.done
completed, or incomplete if the limit of tokens was reached
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mooncake.core.types import FinishReason
from mooncake.frontend.assembly import Delta
from mooncake.frontend.errors import ApiError
from mooncake.frontend.parts import CallArguments, CallBegun, Content, Part, PartParser, Reasoning, TextParser
from mooncake.frontend.render import Head, Usage
from mooncake.frontend.responses import ResponsesBody, ResponsesRequest

_encode = msgspec.json.Encoder().encode
_NO_USAGE = Usage(0, 0, 0)
_TEXT, _REASONING, _CALL = "message", "reasoning", "function_call"


class ResponsesRenderer:
    """One choice: this API has no more."""

    def __init__(self, head: Head, request: ResponsesRequest, make_parser: Callable[[], PartParser] | None) -> None:
        self._head = head
        self._asked: ResponsesBody = request.asked
        self._parser: PartParser = TextParser() if make_parser is None else make_parser()
        self._numbers = itertools.count()
        self._items: list[dict[str, Any]] = []
        self._open = ""
        """The type of the last item, as long as it goes on."""
        self._reason: str = FinishReason.STOP

    # ------------------------------------------------------------ streamed

    def opening(self) -> bytes:
        begun = self._response("in_progress", None)
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def delta(self, delta: Delta) -> bytes:
        return b"".join(map(self._part, self._parser.push(delta.text)))

    def finish(self, choice: int, reason: str) -> bytes:
        self._reason = reason
        return b"".join(map(self._part, self._parser.flush())) + self._close()

    def closing(self, usage: Usage) -> bytes:
        response = self._response(self._status(), usage)
        return self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream whose request failed on the way."""
        response = self._response("failed", None)
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    # ------------------------------------------------------------ whole

    def whole(self, choices: Sequence[tuple[Delta, str]], usage: Usage) -> bytes:
        [(delta, reason)] = choices
        self.delta(delta)
        self.finish(0, reason)
        return _encode(self._response(self._status(), usage))

    # ------------------------------------------------------------ items

    def _part(self, part: Part) -> bytes:
        match part:
            case Content():
                return self._begin(_TEXT) + self._more(self._items[-1]["content"][0], "output_text", "text", part.text)
            case Reasoning():
                opened = self._begin(_REASONING)
                return opened + self._more(self._items[-1]["content"][0], "reasoning_text", "text", part.text)
            case CallBegun():
                return self._close() + self._begin(_CALL, call_id=part.id, name=part.name)
            case CallArguments():
                return self._more(self._items[-1], "function_call_arguments", "arguments", part.text)

    def _begin(self, kind: str, **fields: Any) -> bytes:
        if self._open == kind and kind != _CALL:
            return b""
        events = self._close()
        self._open = kind
        prefix = {_TEXT: "msg", _REASONING: "rs", _CALL: "fc"}[kind]
        item: dict[str, Any] = {
            "id": f"{prefix}_{self._head.request_id}_{len(self._items)}",
            "type": kind,
            "status": "in_progress",
        }
        own: dict[str, dict[str, Any]] = {_TEXT: {"role": "assistant"}, _REASONING: {"summary": []}}
        item |= own.get(kind, {"arguments": "", **fields})
        shown: dict[str, Any] = item if kind == _CALL else item | {"content": []}
        self._items.append(item)
        events += self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)
        if kind == _CALL:
            return events
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part if kind == _TEXT else {"type": "reasoning_text", "text": ""}]
        return events + self._event("response.content_part.added", **self._place(), part=item["content"][0])

    def _more(self, holder: dict[str, Any], kind: str, field: str, text: str) -> bytes:
        holder[field] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        return self._event(f"response.{kind}.delta", **self._place(), delta=text, **extra)

    def _close(self) -> bytes:
        """The last item is whole."""
        if not self._open:
            return b""
        item, kind, self._open = self._items[-1], self._open, ""
        item["status"] = "incomplete" if self._reason == FinishReason.LENGTH else "completed"
        place = self._place(kind)
        if kind == _CALL:
            named = {"name": item["name"], "arguments": item["arguments"]}
            events = self._event("response.function_call_arguments.done", **place, **named)
        else:
            [part] = item["content"]
            extra: dict[str, Any] = {"logprobs": []} if kind == _TEXT else {}
            events = self._event(f"response.{part['type']}.done", **place, text=part["text"], **extra)
            events += self._event("response.content_part.done", **place, part=part)
        return events + self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _place(self, kind: str = "") -> dict[str, Any]:
        at = len(self._items) - 1
        place = {"item_id": self._items[at]["id"], "output_index": at}
        return place if (kind or self._open) == _CALL else place | {"content_index": 0}

    # ------------------------------------------------------------ the object

    def _status(self) -> str:
        return "incomplete" if self._reason == FinishReason.LENGTH else "completed"

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        asked = self._asked
        known: dict[str, Any] = {} if asked.user is None else {"user": asked.user}
        if usage is not None:
            known["usage"] = _usage(usage)
        return known | {
            "id": f"resp_{self._head.request_id}",
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._head.model,
            "output": list(self._items),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": _format_of(asked)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [_shown_tool(tool) for tool in asked.tools or ()],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "metadata": asked.metadata or {},
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = _encode({"type": kind, "sequence_number": next(self._numbers), **fields})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _format_of(asked: ResponsesBody) -> Any:
    given = asked.text.format if asked.text is not None else None
    return {"type": "text"} if given is None else given


def _shown_tool(tool: Any) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(tool)
    return shown | {"strict": bool(tool.strict), "parameters": tool.parameters or {"type": "object", "properties": {}}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt + usage.num_output,
    }
