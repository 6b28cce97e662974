"""The answer to one request that the backend took: streamed or whole.

The status is held until the first token or an error. A stream has one event a token; after a wait, all that came meanwhile,
merged into one event beyond `merge_tokens`. While a write is blocked the tokens wait as ids in the generation, so decode never
waits for a client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from mooncake.core.types import NANOS_PER_MS, FinishReason
from mooncake.frontend.assembly import Assemblies, Assembly, Delta, merge
from mooncake.frontend.backend import BackendError, Generation, Unavailable
from mooncake.frontend.connection import JSON_HEADERS, Client, ClientGone, HeaderList
from mooncake.frontend.errors import ApiError, from_backend
from mooncake.frontend.instruments import Instruments
from mooncake.frontend.render import Renderer, Usage

logger = logging.getLogger("mooncake.frontend")
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

FAULT = ApiError(500, "internal error", kind="server_error", code="internal_error")
"""A fault of ours: the client learns nothing of its inside; the log has the traceback."""
SHUTTING_DOWN = from_backend(Unavailable("the server is shutting down"))


_End = tuple[int, FinishReason]
"""A choice, and why it ended."""


Choose = Callable[[list[tuple[Delta, FinishReason]]], list[tuple[Delta, FinishReason]]]


class Question(msgspec.Struct, frozen=True):
    """form_field: what asked for the form of the output. num_prompt: tokens of all prompts. openings: by choice, text before
    its own. choose: which choices of a whole answer the client gets; None: all."""

    request_id: str
    prompt_field: str
    form_field: str | None
    num_prompt: int
    openings: tuple[str, ...] = ()
    choose: Choose | None = None


class Answer:
    """The answer to one request that the backend took."""

    def __init__(
        self,
        client: Client,
        generation: Generation,
        question: Question,
        renderer: Renderer,
        assemblies: Assemblies,
        instruments: Instruments,
        started_at: float,
    ) -> None:
        self._client = client
        self._generation = generation
        self._question = question
        self._renderer = renderer
        self._assemblies = assemblies
        self._instruments = instruments
        self._started_at = self._last_at = started_at
        self._ttft_s = 0.0

    async def stream(self, merge_tokens: int) -> int:
        """Failures before the first token raise ApiError; later ones become an event of the stream."""
        deltas, ended = await self._first()
        await self._client.start(200, _STREAM_HEADERS + self._headers())
        opening = self._renderer.opening()
        render, finish = self._renderer.delta, self._renderer.finish
        try:
            while True:
                if len(deltas) > merge_tokens:
                    deltas = merge(deltas)
                events = opening + b"".join([render(delta) for delta in deltas])
                for choice, reason in ended:
                    events += finish(choice, reason)
                if not self._assemblies.running:
                    break
                opening = b""
                if events:
                    await self._client.send(events, True)
                deltas, ended = await self._next()
            events += self._renderer.closing(self._usage())
        except ApiError as error:
            events = self._renderer.failed(error)
        except ClientGone:
            raise
        except Exception:
            logger.exception("request %s failed", self._question.request_id)
            events = self._renderer.failed(FAULT)
        self._generation.cancel()
        await self._client.send(events, False)
        return 200

    async def whole(self) -> int:
        deltas, ended = await self._first()
        while self._assemblies.running:
            more, more_ended = await self._next()
            deltas += more
            ended += more_ended
        self._generation.cancel()
        texts = {delta.choice: delta for delta in merge(deltas)}
        choices = [(texts.get(choice, Delta("", choice=choice)), reason) for choice, reason in sorted(ended)]
        if self._question.choose is not None:
            choices = self._question.choose(choices)
        body = self._renderer.whole(choices, self._usage())
        length = b"%d" % len(body)
        await self._client.start(200, [*JSON_HEADERS, (b"content-length", length), *self._headers()])
        await self._client.send(body, False)
        return 200

    def _headers(self) -> HeaderList:
        """What is known of the request with its first token."""
        headers = [(b"x-request-id", self._question.request_id.encode())]
        headers.append((b"x-mooncake-actual-ttft-ms", b"%.3f" % (self._ttft_s * 1e3)))
        headers.append((b"x-mooncake-cached-tokens", b"%d" % self._assemblies.cached_tokens))
        route = self._generation.route
        if route is not None:
            headers.append((b"x-mooncake-predicted-ttft-ms", b"%.3f" % (route.predicted_ttft_ns / NANOS_PER_MS)))
            headers.append((b"x-mooncake-prefill", route.prefill.encode()))
            headers.append((b"x-mooncake-decode", route.decode.encode()))
        return headers

    async def _first(self) -> tuple[list[Delta], list[_End]]:
        found = await self._next()
        self._ttft_s = time.perf_counter() - self._started_at
        self._instruments.ttft.observe(self._ttft_s)
        self._instruments.prompt_tokens.add(self._question.num_prompt)
        self._instruments.cached_tokens.add(self._assemblies.cached_tokens)
        deltas, ended = found
        return [Delta(text, choice=choice) for choice, text in enumerate(self._question.openings)] + deltas, ended

    async def _next(self) -> tuple[list[Delta], list[_End]]:
        """Deltas, and the choices that ended with them. Raises ClientGone after a cancel, ApiError if the backend failed."""
        try:
            outputs = await self._generation.next()
        except BackendError as error:
            raise from_backend(error, self._question.prompt_field, self._question.form_field) from None
        except asyncio.CancelledError:
            raise SHUTTING_DOWN from None
        if not outputs:
            raise ClientGone
        all_choices = self._assemblies
        num_before, num_running = all_choices.num_tokens, len(all_choices.running)
        deltas, ended = all_choices.take(outputs)
        now, num_new = time.perf_counter(), all_choices.num_tokens - num_before
        if num_before and num_new:
            self._instruments.itl.observe((now - self._last_at) * num_running / num_new, num_new)
        self._last_at = now
        return deltas, [self._end(assembly) for assembly in ended]

    def _end(self, assembly: Assembly) -> _End:
        """A stop string ends a choice before the backend does."""
        if assembly.finish is None or assembly.finish in (FinishReason.ABORT, FinishReason.ERROR):
            raise ApiError(500, "the request was given up", kind="server_error", code="failed")
        self._generation.cancel(assembly.choice)
        return assembly.choice, assembly.finish

    def _usage(self) -> Usage:
        all_choices = self._assemblies
        return Usage(self._question.num_prompt, all_choices.num_tokens, all_choices.cached_tokens)
