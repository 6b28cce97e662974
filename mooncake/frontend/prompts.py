"""Prompts to token ids without holding up the event loop: short ones at once, long ones in a few threads."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mooncake.frontend.dialect import Dialect
from mooncake.frontend.errors import ApiError, bad_field, too_long
from mooncake.frontend.schema import ChatRequest, Request
from mooncake.frontend.tokenizer import TemplateFailed, Tokenizer

INLINE_CHARS = 2048
"""About 0.3 ms of work, three times what a thread switch costs."""
THREADS = 2
MAX_WAITING = 256
"""Long prompts in the threads or waiting for one; more are told to come back."""
_HEADS = (3, 8)
"""Of a text with more characters per token of context than the last of these, heads of so many are tokenised first: nearly
always one of them tells that not all fits."""
_HEAD_SLACK = 64
"""How many tokens of a head may differ from those of the whole text, at the cut."""


class PromptEncoder:
    def __init__(self, tokenizer: Tokenizer, dialect: Dialect, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._max_context = max_context
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._num_waiting = 0

    async def encode(self, request: Request) -> list[list[int]]:
        """The request's prompts. Raises ApiError if the template refuses the messages or a prompt is certain not to fit."""
        if isinstance(request, ChatRequest):
            name = request.prompt_field
            if len(request.messages) > self._max_context:  # each is a token at least; not to run the template for them
                raise too_long(name, f"more than {self._max_context}", 1, self._max_context)
            return [await self.encode_text(name, self._chat_text(request), add_special_tokens=False)]
        prompts = request.prompts
        field = "prompt" if len(prompts) == 1 else "prompt[{}]"
        return [
            await self.encode_text(field.format(at), prompt, add_special_tokens=True)
            if isinstance(prompt, str)
            else prompt
            for at, prompt in enumerate(prompts)
        ]

    async def encode_text(self, field: str, text: str, *, add_special_tokens: bool) -> list[int]:
        """field: where it came from. Raises ApiError."""
        if len(text) <= INLINE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if self._num_waiting >= MAX_WAITING:
            message = "too many long prompts are being tokenised"
            raise ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._encode_long, field, text, add_special_tokens)
        finally:
            self._num_waiting -= 1

    def _chat_text(self, request: ChatRequest) -> str:
        try:
            return self._dialect.prompt(request)
        except TemplateFailed as error:
            raise bad_field(request.prompt_field, str(error)) from None

    def _encode_long(self, field: str, text: str, add_special_tokens: bool) -> list[int]:
        heads = [self._max_context * num_chars for num_chars in _HEADS]
        for num_head in heads if len(text) > heads[-1] else ():
            num_tokens = len(self._tokenizer.encode(text[:num_head], add_special_tokens=False))
            if num_tokens > self._max_context + _HEAD_SLACK:
                raise too_long(field, f"more than {num_tokens - _HEAD_SLACK}", 1, self._max_context)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
