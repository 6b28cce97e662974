"""litellm, as `openai/...` (chat) and `text-completion-openai/...` with a base URL of its own. See common/shared.py."""

from __future__ import annotations

import os
from typing import Any

from shared import Facts, Gathered, classes_of, gather, main

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # else it asks the network for prices when it is imported
import litellm


def chat(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    answer = litellm.completion(**options("openai", base_url, key, body, stream))
    return gather(Gathered.add_chat, answer, stream)


def text(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    answer = litellm.text_completion(**options("text-completion-openai", base_url, key, body, stream))
    return gather(Gathered.add_text, answer, stream)


def options(provider: str, base_url: str, key: str, body: dict[str, Any], stream: bool) -> dict[str, Any]:
    given = body | {"model": f"{provider}/{body['model']}", "api_base": base_url, "api_key": key, "max_retries": 0}
    return given | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


def fault_of(error: Any) -> Facts:
    """litellm's errors keep the status and the text; field and code are in the text."""
    return {"classes": classes_of(error), "status": error.status_code}


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    main({"chat": chat, "text": text}, fault_of)
