"""What the server says, read from plain HTTP without any client, in the words of `common/shared.py`: what clients must show."""

from __future__ import annotations

import json
from typing import Any

import httpx

Facts = dict[str, Any]
PATHS = {
    "chat": "/chat/completions",
    "text": "/completions",
    "responses": "/responses",
    "embeddings": "/embeddings",
    "models": "/models",
}


def ask(base_url: str, model: str, key: str, request: dict[str, Any]) -> Facts:
    """request: as the scripts get it."""
    kind, stream = request["kind"], request["stream"]
    url, headers = base_url + PATHS[kind], {"authorization": f"Bearer {request.get('key', key)}"}
    if kind == "models":
        answer = httpx.get(url, headers=headers, timeout=60)
    else:
        body = {"model": request.get("model", model), **request["body"]}
        if stream:
            body |= {"stream": True} | ({} if kind == "responses" else {"stream_options": {"include_usage": True}})
        answer = httpx.post(url, json=body, headers=headers, timeout=60)
    if answer.status_code != 200:
        return {"error": _fault(answer)}
    return _FACTS[kind](_events(answer.text) if stream else [answer.json()])


def _fault(answer: httpx.Response) -> Facts:
    error = answer.json()["error"]
    retry_after = answer.headers.get("retry-after")
    told = {"param": error["param"], "code": error["code"], "retry_after": retry_after and int(retry_after)}
    return {"status": answer.status_code} | told


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def _chat(pieces: list[Any]) -> Facts:
    choices: dict[int, Facts] = {}
    for given in (choice for piece in pieces for choice in piece["choices"]):
        choice = choices.setdefault(given["index"], {"text": "", "tools": [], "logprobs": [], "finish": None})
        said = given.get("delta") or given.get("message") or {}
        choice["text"] += said.get("content") or ""
        for call in said.get("tool_calls") or ():
            if call.get("id"):
                choice["tools"].append(["", ""])
            function = call["function"]
            name, arguments = choice["tools"][call.get("index", -1)]
            new = [name + (function.get("name") or ""), arguments + (function.get("arguments") or "")]
            choice["tools"][call.get("index", -1)] = new
        for entry in (given.get("logprobs") or {}).get("content") or ():
            tops = [[top["token"], top["logprob"]] for top in entry["top_logprobs"]]
            choice["logprobs"].append([entry["token"], entry["logprob"], tops])
        choice["finish"] = given.get("finish_reason") or choice["finish"]
    for choice in choices.values():
        choice["tools"] = [[name, json.loads(arguments)] for name, arguments in choice["tools"]]
    return {"choices": [choices[index] for index in sorted(choices)], "usage": _usage(pieces[-1])}


def _text(pieces: list[Any]) -> Facts:
    choices: dict[int, Facts] = {}
    for given in (choice for piece in pieces for choice in piece["choices"]):
        choice = choices.setdefault(given["index"], {"text": "", "tools": [], "logprobs": [], "finish": None})
        choice["text"] += given["text"]
        if logprobs := given["logprobs"]:
            columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
            for token, logprob, tops in zip(*columns, strict=True):
                choice["logprobs"].append([token, logprob, [list(top) for top in tops.items()]])
        choice["finish"] = given["finish_reason"] or choice["finish"]
    return {"choices": [choices[index] for index in sorted(choices)], "usage": _usage(pieces[-1])}


def _usage(piece: Any) -> list[int]:
    usage = piece["usage"]
    return [usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]]


def _response(pieces: list[Any]) -> Facts:
    """The last event of a stream has the whole answer."""
    answer = pieces[-1].get("response", pieces[-1])
    text = "".join(part["text"] for item in answer["output"] for part in item.get("content") or ())
    usage = answer["usage"]
    tokens = [usage["input_tokens"], usage["output_tokens"], usage["input_tokens_details"]["cached_tokens"]]
    return {"choices": [{"text": text, "finish": answer["status"]}], "usage": tokens}


def _models(pieces: list[Any]) -> Facts:
    return {"models": [model["id"] for model in pieces[0]["data"]]}


def _embeddings(pieces: list[Any]) -> Facts:
    return {"vectors": [found["embedding"] for found in pieces[0]["data"]]}


_FACTS = {"chat": _chat, "text": _text, "responses": _response, "models": _models, "embeddings": _embeddings}
