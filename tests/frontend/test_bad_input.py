"""Bad input is refused at once, in OpenAI's shape, by the name of the field, and starts nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from mooncake.frontend import server
from mooncake.frontend.tokenizer import Tokenizer

from .harness import CHAT, COMPLETIONS, run, site

pytestmark = pytest.mark.quiet

MESSAGES = [{"role": "user", "content": "hi"}]
DEEP = b"[" * 100_000 + b"]" * 100_000
TOO_LONG = "context_length_exceeded"
REFUSED = "unsupported_parameter"

CHAT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [*MESSAGES, {"role": "system"}]}, "messages[1].content"),
    ({"messages": MESSAGES * 4097}, "messages"),
    ({"messages": [{"role": "k\nng", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "k" * 100_000, "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5000}, "messages"),
    ({"max_completion_tokens": True}, "max_completion_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": ["x"] * 5000}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": "x" * 1000}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [999_999]}, "stop_token_ids"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "f\n"}}]}, "tools[0].function.name"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "js\non"}}, "response_format.type"),
    ({"structured_outputs": {"a\nb": 1}}, "structured_outputs"),
    ({"user": 5}, "user"),
    ({"metadata": {"a": [1]}}, "metadata"),
    ({"metadata": {str(at): "x" for at in range(17)}}, "metadata"),
    ({"messages": [1] + [[]] * 400_000}, "messages[0]"),
]

COMPLETION_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": [[1], [2, -1]]}, "prompt[1]"),
    ({"prompt": [[1], [2, "a"]]}, "prompt[1]"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": ["a", "b " * 5000]}, "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [1] * 4096}, "prompt"),
    ({"prompt": "hello " * 10_000}, "prompt"),
    ({"prompt": "hello " * 200_000}, "prompt"),
    ({"logprobs": 50}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": 1, "model": None}, "model"),
]

BODIES: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"null", 400),
    (b'{"model":"tiny","messages":[{"role":"user","content":"\xff"}]}', 400),
    (b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', 400),
    (b'{"model":"tiny","temperature":NaN}', 400),
    (b'{"model":"tiny","temperature":1e999}', 400),
    (b'{"model":"tiny","messages":[{"role":"king"}],"messages":[]}', 400),
    (b'{"model":"tiny","stream_options":{"include_usage":1},"stream_options":3}', 400),
    (b'{"model":"tiny","metadata":' + DEEP + b"}", 400),
    (b'{"model":"tiny","unknown":' + DEEP + b"}", 400),
    (b'{"model":"' + b"x" * 2**20 + b'"}', 413),
]


def test_fields(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            await s.chat()
            s.backend.started.clear()
            cases: list[tuple[str, dict[str, Any], dict[str, Any], str]]
            cases = [(CHAT, {"messages": MESSAGES}, *case) for case in CHAT_FIELDS]
            cases += [(COMPLETIONS, {"prompt": "hi"}, *case) for case in COMPLETION_FIELDS]
            for path, base, fields, param in cases:
                start = time.perf_counter()
                answer = await s.post(path, {"model": "tiny", **base, **fields})
                elapsed = time.perf_counter() - start
                assert answer.status_code == 400, (fields, answer.text)
                error = answer.json()["error"]
                assert error["param"] == param, (fields, error)
                assert error["type"] == "invalid_request_error" and error["message"].startswith(param)
                assert len(error["message"]) < 400
                assert elapsed < 0.2, (str(fields)[:60], elapsed)
            assert s.backend.started == []

    run(test)


@pytest.mark.parametrize(("fields", "code"), [({"max_tokens": 5000}, TOO_LONG), ({"functions": [1]}, REFUSED)])
def test_codes(tokenizer: Tokenizer, fields: dict[str, Any], code: str) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            assert (await s.chat(**fields)).json()["error"]["code"] == code

    run(test)


def test_bodies(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, max_body_bytes=2**19) as s:
            for body, status in BODIES:
                answer = await s.post(CHAT, body)
                assert answer.status_code == status, (body[:60], answer.text)
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            async def endless() -> Any:
                for _ in range(64):
                    yield b"x" * 2**15

            answer = await s.client.post(CHAT, content=endless())
            assert answer.status_code == 413
            assert s.backend.started == []

    run(test)


def test_a_body_of_too_many_small_things_is_not_even_read(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, max_body_bytes=2**21) as s:
            few, many = ((b'{"model":"tiny","metadata":{"a":[' + b"[]," * count + b"[]]}}") for count in (9, 500_000))
            assert (await s.post(CHAT, few)).json()["error"]["param"] == "metadata"
            began = time.monotonic()
            answer = await s.post(CHAT, many)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
            assert "more than 500000 lists and objects" in answer.json()["error"]["message"]
            assert time.monotonic() - began < 0.1 and s.backend.started == []

    run(test)


def test_a_value_is_named_in_the_message(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            answer = await s.chat(temperature=3)
            assert answer.json()["error"]["message"] == "temperature: expected `float` <= 2.0; the value is 3"

    run(test)


def test_headers(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        body = {"model": "tiny", "messages": MESSAGES}
        async with site(tokenizer) as s:
            for name, value in [
                ("x-request-id", "a b"), ("x-request-id", "x" * 200), ("x-mooncake-ttft-ms", "-1"),
                ("x-mooncake-ttft-ms", "nan"), ("x-mooncake-tbt-ms", "soon"), ("x-mooncake-tbt-ms", "1_0"),
                ("x-mooncake-priority", "1000"), ("content-encoding", "gzip"),
            ]:  # fmt: skip
                answer = await s.post(CHAT, body, **{name: value})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
            answer = await s.post(CHAT, {}, x_request_id="mine")
            assert answer.headers["x-request-id"] == "mine"
            assert s.backend.started == []

    run(test)


def test_routes(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            for method, path, status in [
                ("GET", "/nope", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/x", 404),
                ("POST", CHAT + "/", 404),
            ]:  # fmt: skip
                answer = await s.client.request(method, path)
                assert answer.status_code == status and answer.json()["error"]["message"]
            answer = await s.post(CHAT, {"model": "gpt-9", "messages": MESSAGES})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    run(test)


def test_not_http(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            for sent in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 80_000, b"?" * 200_000):
                reader, writer = await s.connect()
                writer.write(sent)
                answer = await asyncio.wait_for(reader.read(), 2)
                assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b'"invalid_http"') == 1

    run(test)


def test_what_is_refused_while_it_is_sent_reads_why(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            reader, writer = await s.connect()
            for _ in range(64):
                writer.write(b"GET /health HTTP/1.1\r\nx: " + b"y" * 2**14)
                await writer.drain()
            answer = await asyncio.wait_for(reader.read(), 2)
            assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1

    run(test)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\n\r\nGET /he"])
def test_a_head_that_does_not_come(tokenizer: Tokenizer, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 0.1)

    async def test() -> None:
        async with site(tokenizer) as s:
            reader, writer = await s.connect()
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 2)
            assert answer.count(b"HTTP/1.1 200 ") == sent.count(b"\r\n\r\n")

    run(test)


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_wish_for_another_protocol_is_passed_over(tokenizer: Tokenizer, pieces: int) -> None:
    """As Java's client sends with its first request."""
    body = b'{"model":"tiny","prompt":"hello","max_tokens":1}'
    wish = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    first = b"POST %b HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (
        COMPLETIONS.encode(),
        wish,
        len(body),
        body,
    )
    sent = first + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

    async def test() -> None:
        async with site(tokenizer) as s:
            reader, writer = await s.connect()
            size = -(-len(sent) // pieces)
            for at in range(0, len(sent), size):
                writer.write(sent[at : at + size])
                await asyncio.sleep(0.001)
            answer = await asyncio.wait_for(reader.read(), 2)
            assert (
                answer.count(b"HTTP/1.1 200 ") == 2
                and b'"text":"hello"' in answer
                and answer.endswith(b'{"status":"ok"}')
            )

    run(test)
