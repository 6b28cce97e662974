"""`llm`, through its file of OpenAI-compatible models. It shows one choice: its text and tool calls. See common/shared.py."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import llm
from shared import Facts, http_fault, main

HOME = tempfile.TemporaryDirectory(prefix="llm-")
KEY_NAME = "mooncake"


def chat(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    given = dict(body)
    model = declare(base_url, given.pop("model"), supports_tools=True, supports_schema=True)
    system, user = given.pop("messages")
    if "response_format" in given:
        given["schema"] = given.pop("response_format")["json_schema"]["schema"]
    if "tools" in given:
        given["tools"] = [tool(entry["function"]) for entry in given["tools"]]
    return facts(model.prompt(user["content"], system=system["content"], stream=stream, key=key, **given))


def text(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    given = dict(body)
    model = declare(base_url, given.pop("model"), completion=True)
    return facts(model.prompt(given.pop("prompt"), stream=stream, key=key, **given))


def declare(base_url: str, name: str, **abilities: bool) -> Any:
    """A model as users declare it; llm reads the file at every look-up."""
    entry = {"model_id": "here", "model_name": name, "api_base": base_url, "api_key_name": KEY_NAME, **abilities}
    (Path(HOME.name) / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML too
    return llm.get_model("here")


def tool(function: dict[str, Any]) -> Any:
    return llm.Tool(function["name"], function["description"], function["parameters"])


def facts(response: Any) -> Facts:
    said = response.text()
    tools = [[call.name, call.arguments] for call in response.tool_calls()]
    usage = response.response_json["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "choices": [{"text": said, "tools": tools}],
        "usage": [usage["prompt_tokens"], usage["completion_tokens"], cached],
    }


if __name__ == "__main__":
    os.environ["LLM_USER_PATH"] = HOME.name
    main({"chat": chat, "text": text}, http_fault)
