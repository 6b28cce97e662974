"""The OpenAPI document, made of the same declarations that requests are checked by, so that it says what is served."""

from __future__ import annotations

from typing import Any

import msgspec

from mooncake import __version__
from mooncake.frontend.responses import ResponsesBody
from mooncake.frontend.responses import refused_names as refused_of_responses
from mooncake.frontend.schema import MAX_SALT_CHARS, ChatRequest, CompletionRequest
from mooncake.frontend.tokens import DetokenizeRequest, TokenizeRequest

_REF = "#/components/schemas/{name}"
_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_ERRORS = {
    400: "A parameter is wrong, or not supported; it is named.",
    401: "No API key, or one that is not valid.",
    403: "The key does not allow this.",
    404: "No such model or path.",
    405: "Not with this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too much to do, or a limit of the tenant is reached; Retry-After says when to come back.",
    500: "A fault of the server.",
    503: "Nothing to run it on, or shutting down.",
}
_GENERATING = (400, 401, 403, 404, 408, 413, 429, 500, 503)
_READING = (400, 401, 403, 404, 408, 413, 429)
_PLAIN = (401, 403)


def document() -> dict[str, Any]:
    kinds = [ChatRequest, CompletionRequest, ResponsesBody, TokenizeRequest, DetokenizeRequest]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    _drop(components["ChatRequest"], ChatRequest.refused)
    _drop(components["CompletionRequest"], CompletionRequest.refused)
    _drop(components["ResponsesBody"], refused_of_responses())
    return {
        "openapi": "3.1.0",
        "info": {"title": "Mooncake", "version": __version__, "description": "OpenAI-compatible serving."},
        "paths": _paths(),
        "components": {
            "schemas": components | _answers(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "where API keys are on"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> dict[str, Any]:
    chat = _post("ChatRequest", "ChatCompletion", "Answer a conversation.", _GENERATING, stream=True)
    completion = _post("CompletionRequest", "Completion", "Continue texts.", _GENERATING, stream=True)
    responses = _post("ResponsesBody", "Response", "Answer a conversation, by items.", _GENERATING, stream=True)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    status = _get("Health", "The process lives.", ())
    ready = _get("Ready", "Whether requests can be served.", ())
    ready["responses"]["503"] = _content("Not now, and why.", "Ready")
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/completions": {"post": completion},
        "/v1/responses": {"post": responses},
        "/v1/embeddings": {"post": _post("Embeddings", None, "Refused: the model generates text.", _READING)},
        "/v1/models": {"get": _get("ModelList", "The models, of which there is one.", _PLAIN)},
        "/v1/models/{name}": {"get": _get("Model", "One of them.", (*_PLAIN, 404)) | {"parameters": [name]}},
        "/tokenize": {"post": _post("TokenizeRequest", "Tokens", "What a prompt is to the model.", _READING)},
        "/detokenize": {"post": _post("DetokenizeRequest", "Text", "The text of tokens.", _READING)},
        "/health": {"get": status},
        "/ready": {"get": ready},
    }


def _post(
    request: str, answer: str | None, summary: str, errors: tuple[int, ...], *, stream: bool = False
) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    responses: dict[str, Any] = {str(code): _content(_ERRORS[code], "Error") for code in errors}
    if answer is not None:
        responses["200"] = _content(
            "Whole, or as server-sent events if `stream` is true." if stream else "Done.", answer
        )
    if stream:
        responses["200"]["content"]["text/event-stream"] = {"schema": _TEXT}
    headers = [_header(*each) for each in _HEADERS] if stream else []
    return {"summary": summary, "requestBody": body, "responses": responses} | (
        {"parameters": headers} if headers else {}
    )


def _get(answer: str, summary: str, errors: tuple[int, ...]) -> dict[str, Any]:
    responses = {"200": _content("Here.", answer)} | {str(code): _content(_ERRORS[code], "Error") for code in errors}
    return {"summary": summary, "responses": responses}


_MILLISECONDS: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9}
_HEADERS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("x-request-id", {"type": "string", "pattern": "^[!-~]{1,128}$"}, "Comes back in the answer."),
    ("x-mooncake-ttft-ms", _MILLISECONDS, "Objective of the time to the first token."),
    ("x-mooncake-tbt-ms", _MILLISECONDS, "Objective of the mean of the longest tenth of token gaps."),
    ("x-mooncake-salt", {"type": "string", "maxLength": MAX_SALT_CHARS}, "Only requests of the same salt share KV."),
    ("x-mooncake-priority", {"type": "integer", "minimum": -100, "maximum": 100}, "Higher ones go first."),
)


def _header(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


def _content(text: str, name: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ref(name)}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}


def _drop(schema: dict[str, Any], names: tuple[str, ...]) -> None:
    """What is refused by name is not offered."""
    for name in names:
        schema["properties"].pop(name, None)


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _answers() -> dict[str, Any]:
    text_or_null = {"type": ["string", "null"]}
    error = _object({"message": _TEXT, "type": _TEXT, "param": text_or_null, "code": text_or_null})
    finish = {"enum": ["stop", "length", "tool_calls"]}
    usage = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
    message = _object({"role": {"const": "assistant"}, "content": text_or_null})
    choice = {"index": _COUNT, "logprobs": {"type": ["object", "null"]}, "finish_reason": finish}

    def answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        choices = {"type": "array", "items": _object(choice)}
        head = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT}
        return _object({**head, "choices": choices, "usage": usage})

    model = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
    status = {"enum": ["completed", "incomplete"]}
    items = {"type": "array", "items": _ANY_OBJECT}
    return {
        "Error": _object({"error": error}),
        "ChatCompletion": answer("chat.completion", {**choice, "message": message}),
        "Completion": answer("text_completion", {**choice, "text": _TEXT}),
        "Response": _object({"id": _TEXT, "object": {"const": "response"}, "status": status, "output": items}),
        "Embeddings": _object({"model": _TEXT, "input": {}}),
        "Model": model,
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}}),
        "Tokens": _object({"count": _COUNT, "max_model_len": _COUNT, "tokens": {"type": "array", "items": _COUNT}}),
        "Text": _object({"prompt": _TEXT}),
        "Health": _object({"status": {"const": "ok"}}),
        "Ready": _object({"ready": {"type": "boolean"}, "reason": text_or_null, "instances": _ANY_OBJECT}),
    }
