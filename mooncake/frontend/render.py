"""Answers as OpenAI's clients expect them: whole bodies and server-sent events.

Two siblings of one shape, `ChatRenderer` and `CompletionRenderer`; one instance per request. All of an event but its
text is rendered once per request, so that a token costs one JSON string and one concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from mooncake.frontend.assembly import Delta
from mooncake.frontend.errors import ApiError
from mooncake.frontend.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_MIN_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot say."""

_encode = msgspec.json.Encoder().encode


class Usage(msgspec.Struct, frozen=True):
    num_prompt: int
    num_output: int
    num_cached: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_output,
            "total_tokens": self.num_prompt + self.num_output,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


class Head(msgspec.Struct, frozen=True):
    """What every part of an answer repeats."""

    request_id: str
    created: int
    model: str
    fingerprint: str


class Renderer(Protocol):
    def opening(self) -> bytes:
        """Events before the first text."""
        ...

    def delta(self, delta: Delta) -> bytes: ...

    def finish(self, choice: int, reason: str) -> bytes:
        """The event after a choice's last text."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """Events after the end of all choices, the end mark included."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """How a stream tells of a failure after its status was sent, and ends."""
        ...

    def whole(self, choices: Sequence[tuple[Delta, str]], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        ...


class _Renderer:
    """What the siblings share: the pieces of an event around its text, and the envelope of a whole answer."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    text_open: ClassVar[bytes]
    """Of a chunk's choice, what stands before its text and, below, after it; then what stands for no text."""
    text_close: ClassVar[bytes]
    no_text: ClassVar[bytes]

    def __init__(self, head: Head, tokenizer: Tokenizer, include_usage: bool, num_choices: int) -> None:
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._fields = {
            "id": self.id_prefix + head.request_id,
            "object": self.chunk_kind,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        before_index = b'data: %b,"choices":[{"index":' % _encode(self._fields)[:-1]
        self._open = [b"%b%d," % (before_index, choice) for choice in range(num_choices)]
        self._close = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._before = [opened + self.text_open for opened in self._open]
        self._after = self.text_close + b',"logprobs":null,"finish_reason":null' + self._close

    def opening(self) -> bytes:
        return b""

    def delta(self, delta: Delta) -> bytes:
        if not delta.logprobs:
            return self._before[delta.choice] + _encode(delta.text) + self._after
        logprobs = b'%b,"logprobs":%b,"finish_reason":null' % (self.text_close, _encode(self._logprobs(delta)))
        return self._before[delta.choice] + _encode(delta.text) + logprobs + self._close

    def finish(self, choice: int, reason: str) -> bytes:
        end = b'%b,"logprobs":null,"finish_reason":%b' % (self.no_text, _encode(reason))
        return self._open[choice] + end + self._close

    def closing(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return b"data: %b\n\n" % _encode(self._fields | {"choices": [], "usage": usage.as_dict()}) + DONE

    def failed(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n" + DONE

    def whole(self, choices: Sequence[tuple[Delta, str]], usage: Usage) -> bytes:
        rendered = [
            {
                "index": delta.choice,
                **self._answer(delta),
                "logprobs": self._logprobs(delta) if delta.logprobs else None,
                "finish_reason": reason,
            }
            for delta, reason in choices
        ]
        return _encode(self._fields | {"object": self.kind, "choices": rendered, "usage": usage.as_dict()})

    def _answer(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError


class ChatRenderer(_Renderer):
    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    text_open, text_close, no_text = b'"delta":{"content":', b"}", b'"delta":{}'

    def opening(self) -> bytes:
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return b"".join([opened + delta + self._close for opened in self._open])

    def _answer(self, delta: Delta) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        content = [
            self._entry(token_id, found.logprob) | {"top_logprobs": [self._entry(*pair) for pair in found.top]}
            for token_id, found in delta.logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(data)}


class CompletionRenderer(_Renderer):
    id_prefix = "cmpl-"
    kind = chunk_kind = "text_completion"
    text_open, text_close, no_text = b'"text":', b"", b'"text":""'

    def __init__(self, head: Head, tokenizer: Tokenizer, include_usage: bool, num_choices: int) -> None:
        super().__init__(head, tokenizer, include_usage, num_choices)
        self._offsets = [0] * num_choices

    def _answer(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        """Offsets count from the start of the choice, in characters of the tokens by themselves."""
        tokens, offsets = [], []
        for token_id, _ in delta.logprobs:
            tokens.append(self._token(token_id))
            offsets.append(self._offsets[delta.choice])
            self._offsets[delta.choice] += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [max(found.logprob, _MIN_LOGPROB) for _, found in delta.logprobs],
            "top_logprobs": [
                {self._token(token_id): max(logprob, _MIN_LOGPROB) for token_id, logprob in found.top}
                for _, found in delta.logprobs
            ],
            "text_offset": offsets,
        }

    def _token(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
