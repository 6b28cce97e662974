"""/tokenize and /detokenize, in vLLM's shapes: what the model's tokenizer makes of a prompt, and back."""

from __future__ import annotations

from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from mooncake.frontend.backend import ModelInfo
from mooncake.frontend.connection import Bodies, Receive
from mooncake.frontend.endpoint import Settings
from mooncake.frontend.errors import bad_field
from mooncake.frontend.params import check_model_name
from mooncake.frontend.prompts import PromptEncoder
from mooncake.frontend.schema import ChatMessage, ChatRequest, TokenId, check_chat, parse_as
from mooncake.frontend.tokenizer import Tokenizer


class TokenizeRequest(msgspec.Struct):
    """Either a prompt, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct):
    tokens: list[TokenId]
    model: str | None = None


class TokenPages:
    def __init__(self, model: ModelInfo, tokenizer: Tokenizer, prompts: PromptEncoder, settings: Settings) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._bodies = Bodies(settings.max_body_bytes, settings.body_timeout_s)

    async def tokenize(self, request: Request) -> Response:
        asked = parse_as(await self._body(request), TokenizeRequest)
        self._check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_field("prompt", "exactly one of prompt and messages must be given")
        token_ids = await self._encode(asked)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": self._model.max_context,
            "tokens": token_ids,
            "token_strs": None,
        }
        if asked.return_token_strs:
            names = [self._tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
            answer["token_strs"] = names
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        asked = parse_as(await self._body(request), DetokenizeRequest)
        self._check_model(asked.model)
        for at, token_id in enumerate(asked.tokens):
            if token_id >= self._model.vocab_size:
                raise bad_field(f"tokens[{at}]", f"must be below {self._model.vocab_size}, got {token_id}")
        return _json({"prompt": self._tokenizer.decode(asked.tokens, skip_special_tokens=False)})

    async def _encode(self, asked: TokenizeRequest) -> list[int]:
        if asked.messages is not None:
            request = ChatRequest(model="", messages=asked.messages)
            check_chat(request)
            [token_ids] = await self._prompts.encode(request)
            return token_ids
        text = asked.prompt or ""
        return await self._prompts.encode_text("prompt", text, add_special_tokens=asked.add_special_tokens)

    async def _body(self, request: Request) -> bytes:
        return await self._bodies.read(dict(request.scope["headers"]), cast(Receive, request.receive))

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            check_model_name(name, self._model)


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
