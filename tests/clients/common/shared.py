"""What the Python scripts of this folder share. They run in their clients' environments, where nothing of ours is installed.

A script takes the base URL and the model as arguments, the key from OPENAI_API_KEY, and a JSON list of requests from standard
input: name, kind (`chat`, `text`, ...), body, stream, and another key or model where the request is to be wrong. It prints one
JSON object: by name, what the client showed, in one shape for all clients. What a client does not show is left out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

Facts = dict[str, Any]
Ask = Callable[[str, str, dict[str, Any], bool], Facts]
"""Base URL, key, body (the model is in it) and whether it is to be streamed; gives what came of it."""


def main(kinds: dict[str, Ask], fault_of: Callable[[Exception], Facts]) -> None:
    base_url, model = sys.argv[1:]
    key = os.environ["OPENAI_API_KEY"]
    found: dict[str, Facts] = {}
    for request in json.load(sys.stdin):
        body = {"model": request.get("model", model), **request["body"]}
        ask = kinds[request["kind"]]
        try:
            found[request["name"]] = ask(base_url, request.get("key", key), body, request["stream"])
        except Exception as error:
            if not hasattr(error, "status_code"):  # not an answer of the server: a fault of the script or of the client
                raise
            found[request["name"]] = {"error": fault_of(error)}
    json.dump(found, sys.stdout)


def http_fault(error: Any) -> Facts:
    """An openai.APIStatusError, or one that was made after it."""
    retry_after = error.response.headers.get("retry-after")
    told = {"param": error.param, "code": error.code, "retry_after": retry_after and int(retry_after)}
    return {"classes": classes_of(error), "status": error.status_code} | told


def classes_of(error: Exception) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def usage_of(usage: Any) -> list[int]:
    """Tokens of the prompt, of the output, and of the prompt those that were cached."""
    return [usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens]


class Gathered:
    """An answer put together of the pieces of a stream, or of the one piece of an answer that is not streamed."""

    def __init__(self) -> None:
        self._choices: dict[int, Facts] = {}
        self._usage: list[int] | None = None

    def choice(self, index: int) -> Facts:
        return self._choices.setdefault(index, {"text": "", "tools": [], "logprobs": [], "finish": None})

    def add_chat(self, piece: Any) -> None:
        """A ChatCompletion or one of its chunks."""
        for given in piece.choices:
            said = getattr(given, "delta", None) or given.message
            choice = self.choice(given.index)
            choice["text"] += said.content or ""
            for number, call in enumerate(said.tool_calls or ()):
                _add_tool_call(choice["tools"], getattr(call, "index", None) or number, call.function)
            logprobs = getattr(given, "logprobs", None)
            choice["logprobs"] += map(_chat_logprob, (logprobs and logprobs.content) or ())
            choice["finish"] = given.finish_reason or choice["finish"]
        self._take_usage(piece)

    def add_text(self, piece: Any) -> None:
        """A Completion, whole or a piece of it."""
        for given in piece.choices:
            choice = self.choice(given.index)
            choice["text"] += given.text or ""
            logprobs = getattr(given, "logprobs", None)
            choice["logprobs"] += text_logprobs(logprobs.model_dump() if logprobs else None)
            choice["finish"] = given.finish_reason or choice["finish"]
        self._take_usage(piece)

    def facts(self) -> Facts:
        for choice in self._choices.values():
            choice["tools"] = [[name, json.loads(arguments)] for name, arguments in choice["tools"]]
        return {"choices": [self._choices[index] for index in sorted(self._choices)], "usage": self._usage}

    def _take_usage(self, piece: Any) -> None:
        usage = getattr(piece, "usage", None)
        if usage is not None:
            self._usage = usage_of(usage)


def gather(add: Callable[[Gathered, Any], None], answer: Any, stream: bool) -> Facts:
    """add: Gathered.add_chat or Gathered.add_text."""
    gathered = Gathered()
    pieces: Iterable[Any] = answer if stream else (answer,)
    for piece in pieces:
        add(gathered, piece)
    return gathered.facts()


def _add_tool_call(tools: list[list[str]], index: int, function: Any) -> None:
    if index == len(tools):
        tools.append(["", ""])
    tools[index][0] += function.name or ""
    tools[index][1] += function.arguments or ""


def _chat_logprob(entry: Any) -> list[Any]:
    return [entry.token, entry.logprob, [[top.token, top.logprob] for top in entry.top_logprobs or ()]]


def text_logprobs(logprobs: dict[str, Any] | None) -> list[list[Any]]:
    if logprobs is None:
        return []
    columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    return [
        [token, logprob, [list(pair) for pair in top.items()]] for token, logprob, top in zip(*columns, strict=True)
    ]
