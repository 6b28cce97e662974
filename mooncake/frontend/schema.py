"""Requests as clients send them, checked field by field.

A field that is known but not served is refused by name, unless its value asks for nothing; an unknown field is
ignored, so that clients made for other servers work. Ranges that depend on the model are checked in `params`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from mooncake.core.types import MAX_CHOICES
from mooncake.frontend.errors import ApiError, bad_field
from mooncake.frontend.structured import (
    Choices,
    Form,
    GrammarText,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Text,
    form_of,
)
from mooncake.frontend.tools import MAX_TOOLS, ToolCall, ToolChoice, Tools, ToolUse, check_tools, tool_use

MAX_STOPS = 4
"""OpenAI's limit."""
MAX_STOP_CHARS = 512
"""Bounds the text that a stream holds back."""
MAX_PROMPTS = 64
"""Of one request; each is placed by itself."""
MAX_BIASED_TOKENS = 1024
MAX_SALT_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Metadata = Annotated[dict[str, str | int | float | bool | None], Meta(max_length=16)]
"""OpenAI's limit."""
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
}
"""Refused fields, with the values that ask for nothing and pass. The rest passes only as null."""


class _Refused(msgspec.Struct, kw_only=True):
    """Parameters of OpenAI's and of other servers' API that are not served."""

    best_of: Any = None
    functions: Any = None
    function_call: Any = None
    echo: Any = None
    suffix: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    skip_special_tokens: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    prompt_logprobs: Any = None
    prompt_embeds: Any = None
    truncate_prompt_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    documents: Any = None
    store: Any = None
    service_tier: Any = None
    verbosity: Any = None


_REFUSED_NAMES = _Refused.__struct_fields__


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    """Padding against who listens to the lengths of events: there is none."""


class _Common(_Refused, kw_only=True):
    """What both endpoints take. None: not given."""

    refused: ClassVar[tuple[str, ...]]
    format_field: ClassVar[str] = "response_format"
    schema_field: ClassVar[str] = "response_format.json_schema.schema"
    model: str
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1: off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASED_TOKENS)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT_CHARS)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    """Hints, like `user`: what is reused is decided by what prompts have in common."""
    metadata: Metadata | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None

    def form(self) -> Form | None:
        """What the text must look like. Raises ApiError naming the field."""
        return form_of(self)

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_choices(self) -> int:
        """Of each prompt, that are generated."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ContentPart(msgspec.Struct):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    """Of a tool's message: the call that it answers."""
    reasoning_content: str | None = None
    function_call: Any = None

    def as_template_input(self) -> dict[str, Any]:
        """All but the calls, which the model's dialect writes."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        optional = {name: getattr(self, name) for name in ("name", "tool_call_id", "reasoning_content")}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"role": self.role, "content": content or "", **given}


class ChatRequest(_Common, kw_only=True):
    prompt_field: ClassVar[str] = "messages"
    function_field: ClassVar[str] = "function"
    """Within a tool, and within `tool_choice`; empty: they are what a function is."""
    refused: ClassVar[tuple[str, ...]] = _REFUSED_NAMES
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def tool_use(self) -> ToolUse:
        """Raises ApiError naming the field."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls, self.function_field)

    @property
    def max_output(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Common, kw_only=True):
    prompt_field: ClassVar[str] = "prompt"
    refused: ClassVar[tuple[str, ...]] = (
        *[name for name in _REFUSED_NAMES if name not in ("best_of", "echo")],
        "tools",
        "tool_choice",
    )
    prompt: str | list[int | str | list[Any]]
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    tools: Any = None
    tool_choice: Any = None

    @property
    def max_output(self) -> int | None:
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        return max(self.n or 1, self.best_of or 1)

    @property
    def num_logprobs(self) -> int | None:
        """Those of the tokens tell which of several are the best."""
        return 0 if self.logprobs is None and self.num_choices > (self.n or 1) else self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts and token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or all(isinstance(token, int) for token in prompt):
            return [_token_ids("prompt", prompt)]
        if len(prompt) > MAX_PROMPTS:
            raise bad_field("prompt", f"a request has up to {MAX_PROMPTS} prompts, got {len(prompt)}")
        return [part if isinstance(part, str) else _token_ids(f"prompt[{at}]", part) for at, part in enumerate(prompt)]


def _token_ids(field: str, prompt: Any) -> list[int]:
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return prompt
    raise bad_field(field, "must be a text or a list of token ids")


Request = ChatRequest | CompletionRequest

_Kind = TypeVar("_Kind", bound=_Common)

_decode_chat = msgspec.json.Decoder(ChatRequest).decode
_decode_completion = msgspec.json.Decoder(CompletionRequest).decode


def parse_chat(body: bytes) -> ChatRequest:
    request = _parse(body, _decode_chat)
    check_chat(request)
    return request


def check_chat(request: ChatRequest) -> None:
    """What no single field can say. Raises ApiError."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_field("top_logprobs", "needs logprobs to be true")
    for index, message in enumerate(request.messages):
        _check_message(f"messages[{index}]", message)
    check_tools(request.tools or (), request.function_field)


def _check_message(field: str, message: ChatMessage) -> None:
    """Only the assistant may have said nothing: it may have called tools."""
    if message.function_call:
        text = "is not supported by this server; use tool_calls"
        raise bad_field(f"{field}.function_call", text, "unsupported_parameter")
    if message.content is None and message.role != "assistant":
        raise bad_field(f"{field}.content", "is required", "missing_required_parameter")
    if message.tool_call_id is None and message.role == "tool":
        raise bad_field(f"{field}.tool_call_id", "is required", "missing_required_parameter")


def parse_completion(body: bytes) -> CompletionRequest:
    request = _parse(body, _decode_completion)
    if request.best_of is not None and request.best_of < (request.n or 1):
        raise bad_field("best_of", f"must not be less than n, got {request.best_of} and n = {request.n}")
    if request.stream and request.num_choices > (request.n or 1):
        raise bad_field("best_of", "cannot be streamed: which choices are the best is known at the end")
    if request.echo and request.logprobs is not None:
        message = "cannot be combined with logprobs: those of prompts are not computed"
        raise bad_field("echo", message, "unsupported_parameter")
    return request


_Any = TypeVar("_Any")


def parse_as(body: bytes, kind: type[_Any]) -> _Any:
    """Raises ApiError naming the field and its value."""
    return _decode(body, msgspec.json.Decoder(kind).decode)


MAX_CONTAINERS = 500_000
"""Lists and objects of a body, counted by their brackets, those within texts too. Millions of small ones hold the event loop
for seconds, and a text with so many brackets is longer than any context."""


def _decode(body: bytes, decode: Callable[[bytes], _Any]) -> _Any:
    if len(body) > MAX_CONTAINERS and body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {MAX_CONTAINERS} lists and objects", code="invalid_json")
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        read = partial(msgspec.json.decode, body) if len(body) <= _MAX_SHOWN_BYTES else None
        raise explain(error, read) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # malformed JSON and malformed UTF-8 alike
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _parse(body: bytes, decode: Callable[[bytes], _Kind]) -> _Kind:
    """Raises ApiError naming the field and its value."""
    request = _decode(body, decode)
    for name in request.refused:
        value = getattr(request, name)
        if value is not None and not any(type(value) is type(v) and value == v for v in NEUTRAL.get(name, ())):
            message = f"is not supported by this server; the value is {show(value)}"
            raise bad_field(name, message, "unsupported_parameter")
    if request.stream_options is not None and not request.stream:
        raise bad_field("stream_options", "needs stream to be true")
    return request


_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_MAX_EXPECTED_CHARS = 200
"""msgspec repeats values that are none of those it knows."""
_MAX_SHOWN_BYTES = 256 * 1024
"""Of a body that is read again to show the value: a few milliseconds."""


def explain(error: msgspec.ValidationError, read: Callable[[], Any] | None, within: str = "") -> ApiError:
    """msgspec says what it expected and where; OpenAI's clients want the field by name, people want the value.

    read: gives what was checked, as plain objects; None: the value is not shown. within: the field that it is; empty: the
    body."""
    expected, _, path = str(error).rpartition(" - at `$")
    if not expected:
        expected, path = str(error), ""
    path = path.removeprefix(".").removesuffix("`").partition("[...]")[0]  # which key of several, msgspec does not say
    missing = _MISSING.fullmatch(expected)
    if missing is not None:
        field = ".".join(filter(None, (within, path, missing[1])))
        return bad_field(field, "is required", "missing_required_parameter")
    field = ".".join(filter(None, (within, path)))
    if not field:
        message = f"the body is not a JSON object of a request: {expected[:_MAX_EXPECTED_CHARS]}"
        return ApiError(400, message, code="invalid_json")
    message = f"{expected[:1].lower()}{expected[1:_MAX_EXPECTED_CHARS]}"
    # What follows the bad field may not even be JSON, or be the same key again with another value.
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        message += f"; the value is {show(_look_up(read(), path))}" if read is not None else ""
    return bad_field(field, message, "invalid_value")


def _look_up(value: Any, path: str) -> Any:
    """Follows a path such as messages[0].content."""
    for step in re.findall(r"[^.\[\]]+", path):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def show(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
