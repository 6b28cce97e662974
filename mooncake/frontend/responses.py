"""/v1/responses: what OpenAI's newer API asks, said as a chat. Nothing is kept: a conversation is sent whole each time."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from mooncake.frontend.errors import bad_field
from mooncake.frontend.schema import (
    MAX_SALT_CHARS,
    ChatMessage,
    ChatRequest,
    ContentPart,
    Count,
    Metadata,
    StreamOptions,
    check_chat,
    explain,
    parse_as,
    show,
)
from mooncake.frontend.structured import JsonObjectFormat, JsonSchema, JsonSchemaFormat, ResponseFormat
from mooncake.frontend.tools import CalledFunction, Function, Name, NamedFunction, NamedTool, Tool, ToolCall, ToolChoice

MAX_ITEMS = 10_000
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([],),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "reasoning": ({}, {"effort": None, "summary": None}),
    "context_management": ([],),
}
"""Refused fields, with the values that ask for nothing and pass; the rest passes only as null."""


class _Refused(msgspec.Struct, kw_only=True):
    background: Any = None
    include: Any = None
    conversation: Any = None
    context_management: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    reasoning: Any = None
    top_logprobs: Any = None
    truncation: Any = None
    max_tool_calls: Any = None


class InputText(msgspec.Struct):
    text: str
    type: Literal["input_text", "output_text", "text"] = "input_text"


class Message(msgspec.Struct, tag="message"):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]


class FunctionCall(msgspec.Struct, tag="function_call"):
    call_id: Annotated[str, Meta(max_length=256)]
    name: Name
    arguments: str


class FunctionCallOutput(msgspec.Struct, tag="function_call_output"):
    call_id: Annotated[str, Meta(max_length=256)]
    output: str | list[InputText]


class ReasoningItem(msgspec.Struct, tag="reasoning"):
    """Of an earlier answer; it is not told to the model again."""


Item = Message | FunctionCall | FunctionCallOutput | ReasoningItem


class PlainFormat(msgspec.Struct, tag="text"):
    pass


class ObjectFormat(msgspec.Struct, tag="json_object"):
    pass


class SchemaFormat(msgspec.Struct, tag="json_schema"):
    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    format: PlainFormat | ObjectFormat | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None
    """Models here know no other."""


class FunctionTool(msgspec.Struct):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(msgspec.Struct):
    type: Literal["function"]
    name: Name


class ResponsesBody(_Refused, kw_only=True):
    """As clients send it. `input` is read in two steps, since items of type message need not say so."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    """Taken, and nothing is stored: the answer says so."""
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT_CHARS)] | None = None


class ResponsesRequest(ChatRequest, kw_only=True):
    """The chat that it is. asked: what the answer repeats."""

    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text.format"
    schema_field: ClassVar[str] = "text.format.schema"
    function_field: ClassVar[str] = ""
    asked: ResponsesBody


def refused_names() -> tuple[str, ...]:
    return _Refused.__struct_fields__


def parse_responses(body: bytes) -> ResponsesRequest:
    """Raises ApiError naming the field."""
    asked = parse_as(body, ResponsesBody)
    for name in refused_names():
        value = getattr(asked, name)
        if value is not None and value not in NEUTRAL.get(name, ()):
            raise bad_field(
                name, f"is not supported by this server; the value is {show(value)}", "unsupported_parameter"
            )
    request = ResponsesRequest(
        model=asked.model,
        messages=_messages(asked),
        max_completion_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        stream=asked.stream,
        seed=asked.seed,
        cache_salt=asked.cache_salt,
        response_format=_format(asked.text),
        tools=[_tool(tool) for tool in asked.tools or ()] or None,
        tool_choice=_choice(asked.tool_choice),
        parallel_tool_calls=asked.parallel_tool_calls,
        asked=asked,
    )
    check_chat(request)
    return request


def _messages(asked: ResponsesBody) -> list[ChatMessage]:
    """Calls of one turn become one message of the assistant's."""
    messages = [ChatMessage("system", asked.instructions)] if asked.instructions else []
    for item in _items(asked.input):
        match item:
            case Message():
                messages.append(ChatMessage(item.role, _content(item.content)))
            case FunctionCall():
                if not messages or messages[-1].role != "assistant":
                    messages.append(ChatMessage("assistant", tool_calls=[]))
                calls = messages[-1].tool_calls or []
                messages[-1].tool_calls = [*calls, ToolCall(item.call_id, CalledFunction(item.name, item.arguments))]
            case FunctionCallOutput():
                messages.append(ChatMessage("tool", _content(item.output), tool_call_id=item.call_id))
            case ReasoningItem():
                pass
    if not messages:
        raise bad_field("input", "must not be empty")
    return messages


def _items(given: str | list[dict[str, Any]]) -> list[Item]:
    if isinstance(given, str):
        return [Message("user", given)] if given else []
    if len(given) > MAX_ITEMS:
        raise bad_field("input", f"has up to {MAX_ITEMS} items, got {len(given)}")
    return [_item(f"input[{at}]", item) for at, item in enumerate(given)]


def _item(field: str, given: dict[str, Any]) -> Item:
    try:
        found: Item = msgspec.convert({"type": "message", **given}, Item)
    except msgspec.ValidationError as error:
        raise explain(error, lambda: given, field) from None
    return found


def _content(content: str | list[InputText]) -> str | list[ContentPart]:
    return content if isinstance(content, str) else [ContentPart("text", part.text) for part in content]


def _format(text: TextOptions | None) -> ResponseFormat | None:
    match text.format if text is not None else None:
        case ObjectFormat():
            return JsonObjectFormat()
        case SchemaFormat() as given:
            return JsonSchemaFormat(JsonSchema(given.name, given.schema, given.description, given.strict))
        case _:
            return None


def _tool(tool: FunctionTool) -> Tool:
    return Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))


def _choice(choice: Any) -> ToolChoice | None:
    if isinstance(choice, ChosenFunction):
        return NamedTool("function", NamedFunction(choice.name))
    found: ToolChoice | None = choice
    return found
