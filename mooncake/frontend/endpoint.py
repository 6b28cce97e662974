"""One generating endpoint as a raw ASGI application: the path of every request and of every token.

The status is held until the first token or an error. A stream is written as fast as the client reads: normally one
event a token; after a wait, all that came meanwhile, merged into one event beyond `merge_tokens`. While a write is
blocked the tokens wait as ids in the generation, so decode never waits for a client. A client is dropped, and its
request cancelled, once its 64 KiB here (uvicorn's high-water mark) and the kernel's buffers were full for `stall_s`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from mooncake.core.types import NANOS_PER_MS, FinishReason, Slo
from mooncake.frontend.assembly import Assemblies, Assembly, Delta, merge
from mooncake.frontend.backend import Backend, BackendError, Generate, Generation, Unavailable
from mooncake.frontend.dialect import Dialect, Reading
from mooncake.frontend.errors import ApiError, from_backend
from mooncake.frontend.guidance import Guidance
from mooncake.frontend.instruments import Instruments
from mooncake.frontend.params import build_generate, check_model_name, read_headers, read_request_id
from mooncake.frontend.prompts import PromptEncoder
from mooncake.frontend.render import Head, Renderer, Usage, error_event
from mooncake.frontend.render_parts import PartsRenderer
from mooncake.frontend.schema import Request
from mooncake.frontend.tenants import CALLER, Caller, Visit
from mooncake.frontend.tokenizer import Tokenizer

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ABORT_EXTENSION = "mooncake.abort"
"""Scope extension of our server: a function that drops the connection, unsent bytes included."""
CLIENT_GONE = 499
logger = logging.getLogger("mooncake.frontend")
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_JSON_HEADERS = [(b"content-type", b"application/json")]


FAULT = ApiError(500, "internal error", kind="server_error", code="internal_error")
"""A fault of ours: the client learns nothing of its inside; the log has the traceback."""
SHUTTING_DOWN = from_backend(Unavailable("the server is shutting down"))


class Settings(msgspec.Struct, frozen=True):
    max_body_bytes: int = 16 * 2**20
    max_running: int = 4096
    """Requests received and not yet ended; more are told to come back before they are read."""
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    stall_s: float = 30.0
    merge_tokens: int = 64
    default_slo: Slo = Slo()
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"


class Kind(msgspec.Struct, frozen=True):
    """What tells the two endpoints apart."""

    name: str
    parse: Callable[[bytes], Request]
    renderer: Callable[[Head, Tokenizer, bool, int], Renderer]


class Endpoint:
    def __init__(
        self,
        kind: Kind,
        backend: Backend,
        tokenizer: Tokenizer,
        prompts: PromptEncoder,
        dialect: Dialect,
        guidance: Guidance,
        instruments: Instruments,
        settings: Settings,
        rng: random.Random,
    ) -> None:
        self._kind = kind
        self._backend = backend
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._dialect = dialect
        self._guidance = guidance
        self._instruments = instruments
        self._settings = settings
        self._rng = rng

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.perf_counter()
        self._instruments.num_running += 1
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id: str | None = None
        code = 500
        try:
            request_id = read_request_id(headers, self._rng)
            code = await self._serve(request_id, scope, headers, receive, send, started_at)
        except ApiError as error:
            code = error.status
            await send_error(send, error, request_id)
        except ClientGone:
            code = CLIENT_GONE
        except Exception:
            logger.exception("request %s failed", request_id)
            await send_error(send, FAULT, request_id)
        except asyncio.CancelledError:  # only before the generation started; `Client` and `Answer` handle it later
            code = SHUTTING_DOWN.status
            await send_error(send, SHUTTING_DOWN, request_id)
        finally:
            self._instruments.num_running -= 1
            self._instruments.requests.add(1, self._kind.name, str(code))
            self._instruments.duration.observe(time.perf_counter() - started_at)

    async def _serve(
        self,
        request_id: str,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
        started_at: float,
    ) -> int:
        """Everything up to the start of the generation fails with ApiError and starts nothing. Gives the status."""
        if self._instruments.num_running > self._settings.max_running:
            message = f"{self._settings.max_running} requests are being served"
            raise ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=1.0)
        caller: Caller = scope[CALLER]
        with caller.enter() as visit:
            body = await read_body(headers, receive, self._settings)
            request, generate, reading = await self._prepare(request_id, body, headers)
            generate = visit.admit(generate, request.max_output)
            return await self._generate(request, generate, reading, visit, scope, receive, send, started_at)

    async def _generate(
        self,
        request: Request,
        generate: Generate,
        reading: Reading,
        visit: Visit,
        scope: Scope,
        receive: Receive,
        send: Send,
        started_at: float,
    ) -> int:
        try:
            generation = self._backend.start(generate)
        except BackendError as error:
            raise from_backend(error, request.prompt_field) from None
        model, sampling = self._backend.model, generate.sampling
        head = Head(generate.request_id, int(time.time()), model.name, model.fingerprint)
        renderer = self._renderer(head, request, generate.n, reading)
        stop_ids, min_tokens = sampling.stop_token_ids, sampling.min_tokens
        detokenizers = [reading.detokenizer(self._tokenizer) for _ in range(generate.n)]
        assemblies = Assemblies(
            [
                Assembly(detokenizer, request.stops, stop_ids, min_tokens, choice)
                for choice, detokenizer in enumerate(detokenizers)
            ]
        )
        client = Client(scope, receive, send, generation, self._settings.stall_s, visit.headers())
        field = request.prompt_field
        answer = Answer(client, generation, generate, field, renderer, assemblies, self._instruments, started_at)
        try:
            if request.stream:
                return await answer.stream(self._settings.merge_tokens)
            return await answer.whole()
        finally:
            generation.cancel()
            client.close()
            visit.num_output = assemblies.num_tokens
            self._instruments.dropped.add(client.dropped)
            self._instruments.output_tokens.add(assemblies.num_tokens)

    def _renderer(self, head: Head, request: Request, num_choices: int, reading: Reading) -> Renderer:
        shared = (head, self._tokenizer, request.include_usage, num_choices)
        if reading.make_parser is None:
            return self._kind.renderer(*shared)
        return PartsRenderer(*shared, reading.make_parser)

    async def _prepare(
        self, request_id: str, body: bytes, headers: Mapping[bytes, bytes]
    ) -> tuple[Request, Generate, Reading]:
        directives = read_headers(request_id, headers, self._settings.default_slo)
        request = self._kind.parse(body)
        model = self._backend.model
        check_model_name(request.model, model)
        token_ids = await self._prompts.encode(request)
        reading = self._dialect.reading(request, token_ids)
        timeout_s, eos_ids = self._settings.request_timeout_s, self._tokenizer.eos_ids
        grammar = reading.form.grammar if reading.form else ""
        generate = build_generate(request, directives, token_ids, model, eos_ids, timeout_s, self._rng, grammar)
        if reading.form:
            await self._guidance.check(request, reading.form)
        return request, generate, reading


class ClientGone(Exception):
    """The client closed the connection, or was dropped because it did not read."""


class Client:
    """The connection of one request once its body is read: sends, and cancels the generation when the client is gone.

    A blocked send is noticed by a timer that looks twice per `stall_s`, so that other sends cost nothing. headers: those of
    every answer to it."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        generation: Generation,
        stall_s: float,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._headers = headers
        self._send = send
        self._generation = generation
        self._abort: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT_EXTENSION)
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._half_stall_s = stall_s / 2
        self._num_sent = 0
        self._sending = False
        self._num_sent_before = -1
        self._timer: asyncio.TimerHandle | None = None
        self.gone = False
        self.dropped = False
        self._watcher = self._loop.create_task(self._watch(receive))

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self._headers})

    async def send(self, body: bytes, more: bool) -> None:
        """Raises ClientGone if the client is."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._half_stall_s, self._look)
        self._sending = True
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except asyncio.CancelledError:  # by `_look`, or shutting down while this client does not read
            self._drop()
        self._sending = False
        self._num_sent += 1
        if self.gone:
            raise ClientGone

    def close(self) -> None:
        self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._generation.cancel()

    def _look(self) -> None:
        stalled = self._sending and self._num_sent == self._num_sent_before
        if stalled and self._task is not None:
            self._task.cancel()
            return
        self._num_sent_before = self._num_sent if self._sending else -1
        self._timer = self._loop.call_later(self._half_stall_s, self._look)

    def _drop(self) -> None:
        self.gone = self.dropped = True
        self._generation.cancel()
        if self._abort is not None:
            self._abort()


_End = tuple[int, FinishReason]
"""A choice, and why it ended."""


class Answer:
    """The answer to one request that the backend took."""

    def __init__(
        self,
        client: Client,
        generation: Generation,
        generate: Generate,
        prompt_field: str,
        renderer: Renderer,
        assemblies: Assemblies,
        instruments: Instruments,
        started_at: float,
    ) -> None:
        self._client = client
        self._generation = generation
        self._generate = generate
        self._prompt_field = prompt_field
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
            events = error_event(error)
        except ClientGone:
            raise
        except Exception:
            logger.exception("request %s failed", self._generate.request_id)
            events = error_event(FAULT)
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
        body = self._renderer.whole(choices, self._usage())
        length = b"%d" % len(body)
        await self._client.start(200, [*_JSON_HEADERS, (b"content-length", length), *self._headers()])
        await self._client.send(body, False)
        return 200

    def _headers(self) -> list[tuple[bytes, bytes]]:
        """What is known of the request with its first token."""
        headers = [(b"x-request-id", self._generate.request_id.encode())]
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
        self._instruments.prompt_tokens.add(len(self._generate.token_ids))
        self._instruments.cached_tokens.add(self._assemblies.cached_tokens)
        return found

    async def _next(self) -> tuple[list[Delta], list[_End]]:
        """Deltas, and the choices that ended with them. Raises ClientGone after a cancel, ApiError if the backend failed."""
        try:
            outputs = await self._generation.next()
        except BackendError as error:
            raise from_backend(error, self._prompt_field) from None
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
        return Usage(len(self._generate.token_ids), all_choices.num_tokens, all_choices.cached_tokens)


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, settings: Settings) -> bytes:
    """Raises ApiError 413 before anything beyond the limit is kept, ClientGone if the client leaves."""
    limit = settings.max_body_bytes
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise _body_too_large(limit)
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                num_bytes += len(parts[-1])
                if num_bytes > limit:
                    raise _body_too_large(limit)
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_timeout_s:g} s", code="timeout") from None
    return b"".join(parts)


def _body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body exceeds the limit of {limit} bytes", code="body_too_large")


async def send_error(send: Send, error: ApiError, request_id: str | None) -> None:
    body = error.body()
    headers = [*_JSON_HEADERS, (b"content-length", b"%d" % len(body)), *error.headers()]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
