"""/tokenize and /detokenize, /v1/embeddings, and what the headers of an answer tell."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mooncake.frontend import prompts
from mooncake.frontend.tokenizer import Tokenizer
from mooncake.scheduler.dispatcher import Route

from .harness import COMPLETIONS, run, site

TEXT = "hello, 世界 🎉"


def test_a_text_becomes_tokens_and_a_text_again(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            answer = await s.post("/tokenize", {"model": "tiny", "prompt": TEXT, "return_token_strs": True})
            found = answer.json()
            assert found["tokens"] == tokenizer.encode(TEXT, add_special_tokens=True)
            assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 4096)
            assert len(found["token_strs"]) == found["count"] and found["token_strs"][:2] == ["hello", ","]
            back = await s.post("/detokenize", {"tokens": found["tokens"]})
            assert back.json() == {"prompt": TEXT}
            assert (await s.post("/tokenize", {"prompt": ""})).json()["tokens"] == []

    run(test)


def test_messages_become_what_a_chat_is_made_of(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            messages = [{"role": "user", "content": "hi"}]
            found = (await s.post("/tokenize", {"messages": messages})).json()
            await s.chat("hi")
            assert found["tokens"] == s.backend.started[-1].token_ids
            text = (await s.post("/detokenize", {"tokens": found["tokens"]})).json()["prompt"]
            assert text == tokenizer.render_chat(messages), "special tokens too"

    run(test)


def test_a_client_that_leaves_is_no_fault(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            _, writer = await s.connect()
            writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
            await writer.drain()
            await s.client.get("/health")  # so the other's head was read
            writer.close()
            await asyncio.sleep(0.05)

    run(test)
    assert not caplog.records


def test_too_many_long_prompts_are_told_to_come_back(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_WAITING", 0)

    async def test() -> None:
        async with site(tokenizer) as s:
            for path, body in (("/tokenize", {}), (COMPLETIONS, {"model": "tiny"})):
                answer = await s.post(path, {"prompt": "hello " * 1000, **body})
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"model": "other", "prompt": "x"}, 404, "model"),
        ("/tokenize", {"prompt": "x " * 100_000}, 400, "prompt"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 10**6]}, 400, "tokens[1]"),
        ("/v1/embeddings", {"model": "tiny", "input": "x"}, 400, "model"),
    ],
)
def test_what_is_wrong_is_named(tokenizer: Tokenizer, path: str, body: Any, status: int, param: str) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            answer = await s.post(path, body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
            assert (await s.client.get(path)).status_code == 405

    run(test)


def test_an_answer_tells_where_it_came_from_and_when(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.cached_tokens = 3
            plain = await s.complete(x_request_id="r1")
            assert "x-mooncake-prefill" not in plain.headers, "the echo has no instances"
            s.backend.route = Route("prefill-0", "decode-1", 12_340_000)
            for stream in (False, True):
                headers = (await s.complete(stream=stream)).headers
                assert float(headers["x-mooncake-actual-ttft-ms"]) > 0
                assert headers["x-mooncake-predicted-ttft-ms"] == "12.340"
                assert (headers["x-mooncake-prefill"], headers["x-mooncake-decode"]) == ("prefill-0", "decode-1")
                assert headers["x-mooncake-cached-tokens"] == "3"

    run(test)


def test_a_salt_may_come_in_a_header(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            await s.complete("a", cache_salt="body")
            await s.post("/v1/completions", {"model": "tiny", "prompt": "a"}, x_mooncake_salt="header")
            body = {"model": "tiny", "prompt": "a", "cache_salt": "body"}
            await s.post("/v1/completions", body, x_mooncake_salt="header")
            assert [generate.salt for generate in s.backend.started] == ["body", "header", "body"]
            answer = await s.post("/v1/completions", {"model": "tiny", "prompt": "a"}, x_mooncake_salt="x" * 1025)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-mooncake-salt")

    run(test)
