"""OpenAI's own client for Python. See common/shared.py."""

from __future__ import annotations

from typing import Any

import openai
from shared import Facts, Gathered, gather, http_fault, main


def client(base_url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)


def chat(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    answer = client(base_url, key).chat.completions.create(**body, **streaming(stream))
    return gather(Gathered.add_chat, answer, stream)


def text(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    answer = client(base_url, key).completions.create(**body, **streaming(stream))
    return gather(Gathered.add_text, answer, stream)


def streaming(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


def responses(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    if not stream:
        return response_facts(client(base_url, key).responses.create(**body))
    with client(base_url, key).responses.stream(**body) as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        facts = response_facts(events.get_final_response())
    assert "".join(pieces) == facts["choices"][0]["text"]
    return facts


def response_facts(answer: Any) -> Facts:
    usage = answer.usage
    tokens = [usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens]
    return {"choices": [{"text": answer.output_text, "finish": answer.status}], "usage": tokens}


def models(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    return {"models": [model.id for model in client(base_url, key).models.list()]}


def embeddings(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    return {"vectors": [found.embedding for found in client(base_url, key).embeddings.create(**body).data]}


if __name__ == "__main__":
    kinds = {"chat": chat, "text": text, "responses": responses, "models": models, "embeddings": embeddings}
    main(kinds, http_fault)
