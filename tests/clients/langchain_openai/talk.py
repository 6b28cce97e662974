"""langchain-openai's ChatOpenAI and OpenAI. See common/shared.py."""

from __future__ import annotations

from typing import Any

from langchain_openai import ChatOpenAI, OpenAI
from shared import Facts, http_fault, main, text_logprobs


def chat(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    given = dict(body)
    messages, tools = given.pop("messages"), given.pop("tools", None)
    call = {name: given.pop(name) for name in ("response_format", "tool_choice") if name in given}
    model = ChatOpenAI(base_url=base_url, api_key=key, max_retries=0, stream_usage=True, **given)
    bound = model.bind_tools(tools, **call) if tools else model.bind(**call)
    if not stream and given.get("n", 1) > 1:
        return many(model, messages)
    message = sum_of(bound.stream(messages)) if stream else bound.invoke(messages)
    return {"choices": [message_facts(message)], "usage": usage_of(message)}


def many(model: ChatOpenAI, messages: list[Any]) -> Facts:
    """All choices; `invoke` gives only the first."""
    from langchain_core.messages import convert_to_messages

    result = model.generate([convert_to_messages(messages)])
    [generations] = result.generations
    choices = [message_facts(each.message) | {"finish": each.generation_info["finish_reason"]} for each in generations]
    usage = result.llm_output["token_usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {"choices": choices, "usage": [usage["prompt_tokens"], usage["completion_tokens"], cached]}


def sum_of(pieces: Any) -> Any:
    first, *others = pieces
    for piece in others:
        first = first + piece
    return first


def message_facts(message: Any) -> Facts:
    said = message.response_metadata
    entries = (said.get("logprobs") or {}).get("content") or ()
    return {
        "text": message.content,
        "tools": [[call["name"], call["args"]] for call in message.tool_calls],
        "logprobs": [
            [entry["token"], entry["logprob"], [[top["token"], top["logprob"]] for top in entry["top_logprobs"]]]
            for entry in entries
        ],
        "finish": said.get("finish_reason"),
    }


def usage_of(message: Any) -> list[int]:
    usage = message.usage_metadata
    return [usage["input_tokens"], usage["output_tokens"], usage["input_token_details"]["cache_read"]]


def text(base_url: str, key: str, body: dict[str, Any], stream: bool) -> Facts:
    given = dict(body)
    prompt = given.pop("prompt")
    model = OpenAI(base_url=base_url, api_key=key, max_retries=0, **given)
    if stream:
        return {"choices": [{"text": "".join(model.stream(prompt))}]}
    result = model.generate([prompt])
    choices = [
        {
            "text": generation.text,
            "tools": [],
            "logprobs": text_logprobs(generation.generation_info["logprobs"]),
            "finish": generation.generation_info["finish_reason"],
        }
        for generation in result.generations[0]
    ]
    return {"choices": choices}


if __name__ == "__main__":
    main({"chat": chat, "text": text}, http_fault)
