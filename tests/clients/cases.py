"""What every client asks: requests with a name, a kind (what of the API), a body, streamed or not, and what is wrong in it."""

from __future__ import annotations

from typing import Any

Request = dict[str, Any]

MESSAGES = [
    {
        "role": "system",
        "content": "You are a careful guide who knows every city of Europe and answers in short sentences.",
    },
    {"role": "user", "content": "What is the capital of France, and what is it known for?"},
]
GREEDY: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}
STORY = [MESSAGES[0], {"role": "user", "content": "Tell me a story of the most beautiful street that you know."}]
NUM_SEEDED = 12
SEEDED: dict[str, Any] = {"max_tokens": NUM_SEEDED, "temperature": 1.2, "seed": 7}
NUM_CHOICES = 3
NUM_TOP = 2
CITIES = ["Paris", "Rome"]
FUNCTION = {
    "name": "weather",
    "description": "The weather of a city today.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": CITIES}, "hours": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "hours"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris", "hours": 3}'},
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def both(name: str, kind: str, body: dict[str, Any], **wrong: str) -> list[Request]:
    """The request whole, and streamed."""
    request = {"kind": kind, "body": body, **wrong}
    return [{"name": name, "stream": False, **request}, {"name": f"{name}, streamed", "stream": True, **request}]


def content(stop: str) -> list[Request]:
    """stop: a piece of the text that `GREEDY` is answered with."""
    prompt = {"prompt": "Once upon a time there was", "max_tokens": 12}
    structured = {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA}}
    answered = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain until noon."},
    ]
    return [
        *both("chat", "chat", GREEDY),
        *both("stop", "chat", GREEDY | {"stop": stop}),
        *both("logprobs", "chat", GREEDY | {"logprobs": True, "top_logprobs": NUM_TOP, "max_tokens": 6}),
        *both("n", "chat", {"messages": STORY, "n": NUM_CHOICES, **SEEDED}),
        *both("tools", "chat", GREEDY | {"tools": TOOLS, "tool_choice": "required", "max_tokens": 64}),
        *both("tools, if it wants", "chat", GREEDY | {"tools": TOOLS, "max_tokens": 8}),
        *both("tool results", "chat", GREEDY | {"messages": answered, "tools": TOOLS, "max_tokens": 8}),
        *both("structured", "chat", GREEDY | {"response_format": structured, "max_tokens": 64}),
        *both("text", "text", prompt | {"temperature": 0}),
        *both("text logprobs", "text", prompt | {"temperature": 0, "logprobs": NUM_TOP}),
        *both("text n", "text", prompt | SEEDED | {"n": NUM_CHOICES}),
        *both(
            "responses",
            "responses",
            {
                "input": "What is the capital of France?",
                "max_output_tokens": 64,
                "temperature": 0,
                "text": {"format": {"type": "json_schema", "name": "output", "schema": SCHEMA}},
            },
        ),
        {"name": "embeddings", "kind": "embeddings", "stream": False, "body": {"input": "a city"}},
        {"name": "models", "kind": "models", "stream": False, "body": {}},
    ]


def faults(max_context: int) -> list[Request]:
    """What is wrong with each is its name; the last two are right, and refused by a cluster that cannot serve them in time."""
    long = [MESSAGES[0], {"role": "user", "content": "city " * max_context}]
    return [
        *both("bad value", "chat", GREEDY | {"logit_bias": {"99999": 5}}),
        *both("not served", "text", {"prompt": "Rome", "suffix": "Paris"}),
        *both("too long", "chat", GREEDY | {"messages": long}),
        *both("unknown model", "chat", GREEDY, model="no-such-model"),
        *both("wrong key", "chat", GREEDY, key="mk-wrong"),
        *both("overloaded", "chat", GREEDY),
        *both("text overloaded", "text", {"prompt": "Rome", "max_tokens": 8}),
    ]
