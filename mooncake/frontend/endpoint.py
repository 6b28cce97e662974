"""One generating endpoint as a raw ASGI application: the path of every request, from its bytes to a generation that runs."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from mooncake.core.types import Slo
from mooncake.frontend.answer import FAULT, SHUTTING_DOWN, Answer, Choose, Question
from mooncake.frontend.assembly import Assemblies, Assembly
from mooncake.frontend.backend import Backend, BackendError, Generate, Generation
from mooncake.frontend.best_of import best
from mooncake.frontend.connection import Bodies, Client, ClientGone, Receive, Scope, Send, send_error
from mooncake.frontend.dialect import Dialect, Reading
from mooncake.frontend.errors import ApiError, from_backend
from mooncake.frontend.guidance import Guidance
from mooncake.frontend.instruments import Instruments
from mooncake.frontend.params import build_generates, check_model_name, check_request_id, read_headers, read_request_id
from mooncake.frontend.parts import PartParser
from mooncake.frontend.prompts import PromptEncoder
from mooncake.frontend.render import Head, Renderer
from mooncake.frontend.schema import CompletionRequest, Request
from mooncake.frontend.several import Several
from mooncake.frontend.tenants import CALLER, Caller, Visit
from mooncake.frontend.tokenizer import Tokenizer

CLIENT_GONE = 499
logger = logging.getLogger("mooncake.frontend")


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


MakeRenderer = Callable[[Head, Tokenizer, Any, int, Callable[[], PartParser] | None], Renderer]
"""Of a request and its number of choices; the last argument: what tells the parts of the text apart, if it has any."""


class Kind(msgspec.Struct, frozen=True):
    """What tells the generating endpoints apart."""

    name: str
    parse: Callable[[bytes], Request]
    renderer: MakeRenderer


class _Asked(msgspec.Struct, frozen=True):
    """A request that can be started. generates: one for each prompt. echoes: of each prompt, if they are wanted."""

    request: Request
    generates: list[Generate]
    reading: Reading
    echoes: tuple[str, ...] = ()

    @property
    def per_prompt(self) -> int:
        return self.generates[0].n

    @property
    def num_choices(self) -> int:
        return len(self.generates) * self.per_prompt

    def question(self) -> Question:
        num_prompt = sum([len(generate.token_ids) for generate in self.generates])
        openings = [echo for echo in self.echoes for _ in range(self.per_prompt)]
        request_id, form = self.generates[0].request_id, self.reading.form
        form_field = form.field if form else None
        return Question(request_id, self.request.prompt_field, form_field, num_prompt, tuple(openings), self._choose())

    def _choose(self) -> Choose | None:
        n, per_prompt = self.request.n or 1, self.per_prompt
        if n == per_prompt:
            return None
        assert isinstance(self.request, CompletionRequest)
        keep_logprobs = self.request.logprobs is not None
        return lambda choices: best(choices, per_prompt, n, keep_logprobs=keep_logprobs)


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
        self._bodies = Bodies(settings.max_body_bytes, settings.body_timeout_s)
        self._rng = rng

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.perf_counter()
        self._instruments.num_running += 1
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = read_request_id(headers, self._rng)
        code = 500
        try:
            check_request_id(headers)
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
            body = await self._bodies.read(headers, receive)
            asked = await self._prepare(request_id, body, headers)
            del body  # not to be kept while the answer is generated
            announced = asked.request.max_output
            generates = [visit.admit(generate, announced) for generate in asked.generates]
            asked = msgspec.structs.replace(asked, generates=generates)
            return await self._generate(asked, visit, scope, receive, send, started_at)

    async def _generate(
        self, asked: _Asked, visit: Visit, scope: Scope, receive: Receive, send: Send, started_at: float
    ) -> int:
        generation = self._start(asked)
        assemblies = self._assemblies(asked)
        client = Client(scope, receive, send, generation, self._settings.stall_s, visit.headers())
        renderer = self._renderer(asked)
        answer = Answer(client, generation, asked.question(), renderer, assemblies, self._instruments, started_at)
        try:
            if asked.request.stream:
                return await answer.stream(self._settings.merge_tokens)
            return await answer.whole()
        finally:
            generation.cancel()
            client.close()
            visit.num_output = assemblies.num_tokens
            self._instruments.dropped.add(client.dropped)
            self._instruments.output_tokens.add(assemblies.num_tokens)

    def _start(self, asked: _Asked) -> Generation:
        """All prompts or none. Raises ApiError."""
        started: list[Generation] = []
        try:
            for generate in asked.generates:
                started += [self._backend.start(generate)]
        except BackendError as error:
            for generation in started:
                generation.cancel()
            raise from_backend(error, asked.request.prompt_field) from None
        return started[0] if len(started) == 1 else Several(started, asked.per_prompt)

    def _assemblies(self, asked: _Asked) -> Assemblies:
        request, sampling = asked.request, asked.generates[0].sampling
        stops, stop_ids, min_tokens = request.stops, sampling.stop_token_ids, sampling.min_tokens
        keeps_stop = bool(request.include_stop_str_in_output)
        detokenizers = [asked.reading.detokenizer(self._tokenizer) for _ in range(asked.num_choices)]
        made = [
            Assembly(detokenizer, stops, stop_ids, min_tokens, choice, keeps_stop=keeps_stop)
            for choice, detokenizer in enumerate(detokenizers)
        ]
        return Assemblies(made, asked.per_prompt)

    def _renderer(self, asked: _Asked) -> Renderer:
        model = self._backend.model
        head = Head(asked.generates[0].request_id, int(time.time()), model.name, model.fingerprint)
        return self._kind.renderer(head, self._tokenizer, asked.request, asked.num_choices, asked.reading.make_parser)

    async def _prepare(self, request_id: str, body: bytes, headers: Mapping[bytes, bytes]) -> _Asked:
        directives = read_headers(request_id, headers, self._settings.default_slo)
        request = self._kind.parse(body)
        model = self._backend.model
        check_model_name(request.model, model)
        prompts = await self._prompts.encode(request)
        reading = self._dialect.reading(request, prompts[0])
        timeout_s, eos_ids = self._settings.request_timeout_s, self._tokenizer.eos_ids
        grammar = reading.form.grammar if reading.form else ""
        generates = build_generates(request, directives, prompts, model, eos_ids, timeout_s, self._rng, grammar)
        if reading.form:
            await self._guidance.check(request, reading.form)
        return _Asked(request, generates, reading, self._echoes(request, prompts))

    def _echoes(self, request: Request, prompts: list[list[int]]) -> tuple[str, ...]:
        """What stands before the output of each prompt."""
        if not isinstance(request, CompletionRequest) or not request.echo:
            return ()
        given = zip(request.prompts, prompts, strict=True)
        return tuple([prompt if isinstance(prompt, str) else self._tokenizer.decode(ids) for prompt, ids in given])
