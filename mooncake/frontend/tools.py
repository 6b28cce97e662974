"""What a request says of tools: which there are, which must be called, and what was called before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mooncake.frontend.errors import bad_field

MAX_TOOLS = 128
"""OpenAI's limit."""
MAX_SCHEMA_BYTES = 64 * 1024
"""Of one JSON schema."""
MAX_TOOLS_BYTES = 512 * 1024
"""Of the schemas of all tools: the chat template writes them into the prompt."""
MAX_DEPTH = 64
"""Of objects and lists in schemas and arguments."""
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}(?!\n)$")]
"""Python's `$` would let a line break stand behind it."""


class Function(msgspec.Struct, omit_defaults=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; none: it has no parameters."""
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """Arguments that are not named are none, unless the schema speaks of them."""
        return {"type": "object", "properties": {}, "additionalProperties": False} | (self.parameters or {})


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(msgspec.Struct):
    name: Name
    arguments: str
    """A JSON object as text."""


class ToolCall(msgspec.Struct):
    """A call that the assistant made earlier in the conversation."""

    id: Annotated[str, Meta(max_length=256)]
    function: CalledFunction
    type: Literal["function"] = "function"


class ToolUse(msgspec.Struct, frozen=True):
    """tools: those that may be called. forced: those of which one must be; empty: the model may answer with text. parallel:
    whether there may be several calls. field: where a function is within a tool."""

    tools: tuple[Function, ...] = ()
    forced: tuple[Function, ...] = ()
    parallel: bool = True
    field: str = "function"

    def schema_field(self, index: int) -> str:
        return _within(f"tools[{index}]", self.field, "parameters")


NO_TOOLS = ToolUse()


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None, field: str) -> ToolUse:
    """field: see `ToolUse`. Raises ApiError naming what is wrong."""
    functions = tuple(tool.function for tool in tools or ())
    if choice == "none" or (not functions and choice in (None, "auto")):
        return NO_TOOLS
    if not functions:
        raise bad_field("tool_choice", "needs tools, and there are none")
    if choice in (None, "auto"):
        return ToolUse(functions, (), parallel is not False, field)
    if choice == "required":
        return ToolUse(functions, functions, parallel is not False, field)
    assert isinstance(choice, NamedTool)
    forced = tuple(function for function in functions if function.name == choice.function.name)
    if not forced:
        name = _within("tool_choice", field, "name")
        raise bad_field(name, f"{choice.function.name[:80]!r} is none of the tools")
    return ToolUse(functions, forced, False, field)


def check_tools(tools: Sequence[Tool], field: str) -> None:
    """field: see `ToolUse`. Raises ApiError naming what is wrong."""
    seen: dict[str, int] = {}
    num_bytes = 0
    for index, function in enumerate(tool.function for tool in tools):
        first = seen.setdefault(function.name, index)
        if first != index:
            name = _within(f"tools[{index}]", field, "name")
            raise bad_field(name, f"{function.name!r} is the name of tools[{first}] too")
        num_bytes += check_schema(_within(f"tools[{index}]", field, "parameters"), function.schema)
    if num_bytes > MAX_TOOLS_BYTES:
        raise bad_field("tools", f"have schemas of {num_bytes} bytes; at most {MAX_TOOLS_BYTES} are supported")


def _within(*fields: str) -> str:
    return ".".join(filter(None, fields))


def check_schema(field: str, schema: dict[str, Any]) -> int:
    """Gives its size in bytes. Raises ApiError."""
    _check_depth(field, schema)
    num_bytes = len(msgspec.json.encode(schema))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise bad_field(field, f"is a schema of {num_bytes} bytes; at most {MAX_SCHEMA_BYTES} are supported")
    return num_bytes


def _check_depth(field: str, value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return
    raise bad_field(field, f"is nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def arguments_of(field: str, call: ToolCall) -> dict[str, Any]:
    """Chat templates want the arguments as an object. Raises ApiError."""
    field = f"{field}.function.arguments"
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise bad_field(field, f"is not the text of a JSON object: {error}", "invalid_value") from None
    _check_depth(field, arguments)
    return arguments
