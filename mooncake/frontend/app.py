"""The OpenAI-compatible HTTP application: its routes, and the few that need no generation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mooncake.engine.grammar import Grammars
from mooncake.frontend.answer import FAULT
from mooncake.frontend.backend import Backend
from mooncake.frontend.connection import ClientGone, PageAnswer, Receive, Scope, Send, send_error
from mooncake.frontend.dialect import Dialect
from mooncake.frontend.endpoint import CLIENT_GONE, Endpoint, Kind, Settings
from mooncake.frontend.errors import ApiError
from mooncake.frontend.guidance import Guidance
from mooncake.frontend.instruments import Instruments
from mooncake.frontend.openapi import document
from mooncake.frontend.params import check_model_name, read_request_id
from mooncake.frontend.parts import PartParser
from mooncake.frontend.prompts import PromptEncoder
from mooncake.frontend.render import ChatRenderer, CompletionRenderer, Head, Renderer
from mooncake.frontend.render_parts import PartsRenderer
from mooncake.frontend.render_responses import ResponsesRenderer
from mooncake.frontend.responses import ResponsesRequest, parse_responses
from mooncake.frontend.schema import ChatRequest, CompletionRequest, parse_chat, parse_completion
from mooncake.frontend.tenants import CALLER, Door, OpenDoor
from mooncake.frontend.tokenizer import Tokenizer
from mooncake.frontend.tokens import TokenPages
from mooncake.metrics import CONTENT_TYPE, Registry

MakeParser = Callable[[], PartParser] | None


def _chat_renderer(
    head: Head, tokenizer: Tokenizer, request: ChatRequest, num_choices: int, make_parser: MakeParser
) -> Renderer:
    shared = (head, tokenizer, request.include_usage, num_choices)
    return ChatRenderer(*shared) if make_parser is None else PartsRenderer(*shared, make_parser)


def _completion_renderer(
    head: Head, tokenizer: Tokenizer, request: CompletionRequest, num_choices: int, make_parser: MakeParser
) -> Renderer:
    return CompletionRenderer(head, tokenizer, request.include_usage, num_choices)


def _responses_renderer(
    head: Head, tokenizer: Tokenizer, request: ResponsesRequest, num_choices: int, make_parser: MakeParser
) -> Renderer:
    return ResponsesRenderer(head, request, make_parser)


GENERATING = {
    "/v1/chat/completions": Kind("chat", parse_chat, _chat_renderer),
    "/v1/completions": Kind("completions", parse_completion, _completion_renderer),
    "/v1/responses": Kind("responses", parse_responses, _responses_renderer),
}
_PAGES = ("tokenize", "detokenize", "openapi.json", "health", "ready", "metrics", "dashboard")
_PATHS = {path: kind.name for path, kind in GENERATING.items()} | {f"/{page}": page for page in _PAGES}
_PREFIXES = {"/v1/models": "models", "/v1/embeddings": "embeddings", "/dashboard/": "dashboard", "/admin/": "admin"}
"""What requests are counted by."""
_SHOWN_HEADERS = (
    *("x-request-id", "retry-after", "retry-after-ms", "x-mooncake-predicted-ttft-ms", "x-mooncake-actual-ttft-ms"),
    *("x-mooncake-cached-tokens", "x-mooncake-prefill", "x-mooncake-decode"),
)
"""Of answers, to web pages of other origins."""


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    settings: Settings | None = None,
    *,
    registry: Registry | None = None,
    rng: random.Random | None = None,
    door: Door | None = None,
    grammars: Grammars | None = None,
    origins: Sequence[str] = (),
    more_routes: Sequence[Route] = (),
) -> App:
    """registry: where /metrics reads, for a process that has metrics of its own. rng: draws seeds and ids. door: who may come
    in; everybody if not given. grammars: None if the engines follow none. origins: whose web pages may read answers, or `*`.
    more_routes: the operator's."""
    registry = registry or Registry()
    instruments = Instruments(registry, backend.status)
    settings, rng = settings or Settings(), rng or random.Random()
    dialect = Dialect.of(tokenizer, settings.tool_parser, settings.reasoning_parser, rng)
    prompts = PromptEncoder(tokenizer, dialect, backend.model.max_context)
    pages, tokens = _Pages(backend, registry), TokenPages(backend.model, tokenizer, prompts, settings)
    shared = (backend, tokenizer, prompts, dialect, Guidance(grammars), instruments, settings, rng)
    generating = {path: Endpoint(kind, *shared) for path, kind in GENERATING.items()}
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in generating.items()),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/v1/embeddings", pages.embeddings, methods=["POST"]),
        Route("/openapi.json", pages.openapi),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/metrics", pages.metrics),
        *more_routes,
    ]
    handlers: dict[Any, Any] = {
        HTTPException: _on_http_error,
        ApiError: _on_api_error,
        ClientGone: _on_client_gone,
        Exception: _on_fault,
    }
    rest = Starlette(routes=routes, exception_handlers=handlers)
    rest.router.redirect_slashes = False  # a redirect names a scheme and a host that only the client knows
    return App(generating, rest, door or OpenDoor(), instruments, rng, origins)


class App:
    """Starlette's middleware would wrap every send, so of every token too: the generating endpoints go past it. Nobody goes
    past the door. Whatever is answered has the request's id and is counted."""

    def __init__(
        self,
        generating: dict[str, Endpoint],
        rest: Starlette,
        door: Door,
        instruments: Instruments,
        rng: random.Random,
        origins: Sequence[str],
    ) -> None:
        self._generating = generating
        self._rest = rest
        self._door = door
        self._instruments = instruments
        self._rng = rng
        # ASGI's types are not nameable: each library has its own.
        self._for_pages = _cross_origin(cast(Any, self._answer), origins) if origins else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._rest(scope, receive, cast(Any, send))
            return
        if self._for_pages is None:
            await self._answer(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if b"origin" not in headers:
            await self._answer(scope, receive, send)
        elif scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await self._answer_by(self._for_pages, scope, receive, send)  # a browser asks without the page's key
        else:
            await self._for_pages(scope, receive, cast(Any, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        try:
            scope[CALLER] = self._door.admit(path, headers)
        except ApiError as error:
            self._count(path, error.status)
            await send_error(send, error, read_request_id(headers, self._rng))
            return
        if scope["method"] == "POST" and path in self._generating:
            await self._generating[path](scope, receive, send)
            return
        await self._answer_by(self._rest, scope, receive, send)

    async def _answer_by(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        answer = PageAnswer(send, read_request_id(dict(scope["headers"]), self._rng))
        try:
            await app(scope, receive, cast(Any, answer))
        finally:
            if answer.status is not None:
                self._count(scope["path"], answer.status)

    def not_http(self, status: int) -> str:
        """Something came that is no request, and is answered so by the server. The id of the answer."""
        self._count("", status)
        return read_request_id({}, self._rng)

    def _count(self, path: str, status: int) -> None:
        self._instruments.requests.add(1, _endpoint_name(path), str(status))


def _cross_origin(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Keys come in headers that the page sets itself, never in cookies."""
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=_SHOWN_HEADERS
    )


def _endpoint_name(path: str) -> str:
    """One of few: what clients ask for by other names is `other`."""
    found = next((name for prefix, name in _PREFIXES.items() if path.startswith(prefix)), None)
    return found or _PATHS.get(path, "other")


class _Pages:
    def __init__(self, backend: Backend, registry: Registry) -> None:
        self._backend = backend
        self._registry = registry

    async def health(self, request: Request) -> Response:
        """The process lives; whether it can serve is /ready's question."""
        return _json(200, {"status": "ok"})

    async def ready(self, request: Request) -> Response:
        status = self._backend.status()
        body = {"ready": status.ready, "reason": status.reason or None, "instances": status.instances}
        return _json(200 if status.ready else 503, body)

    async def models(self, request: Request) -> Response:
        return _json(200, {"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        check_model_name(request.path_params["name"], self._backend.model)
        return _json(200, self._card())

    async def openapi(self, request: Request) -> Response:
        return _json(200, document())

    async def embeddings(self, request: Request) -> Response:
        message = f"{self._backend.model.name} generates text; this server makes no embeddings"
        raise ApiError(400, message, param="model", code="unsupported_endpoint")

    async def metrics(self, request: Request) -> Response:
        return Response(self._registry.render(), media_type=CONTENT_TYPE)

    def _card(self) -> dict[str, Any]:
        model = self._backend.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "mooncake",
            "max_model_len": model.max_context,
            "fingerprint": model.fingerprint,
        }


def _json(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}"
    headers = dict(error.headers) if error.headers else None
    api_error = ApiError(error.status_code, message, code=error.detail.lower().replace(" ", "_"))
    return Response(api_error.body(), error.status_code, headers, media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers, media_type="application/json")


async def _on_client_gone(request: Request, error: Exception) -> Response:
    """While its body was awaited; nobody reads this."""
    return Response(status_code=CLIENT_GONE)


async def _on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours: the client learns nothing of its inside; the server's log has the traceback."""
    return Response(FAULT.body(), FAULT.status, media_type="application/json")
