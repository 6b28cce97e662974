"""Clients that leave or do not read, backends that refuse or fail, and a server that ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import Any

import pytest

from mooncake.core.errors import ConfigError
from mooncake.frontend.backend import BackendError, Failed, GrammarLost, Overloaded, PromptTooLong, Unavailable
from mooncake.frontend.errors import from_backend
from mooncake.frontend.server import HttpServer
from mooncake.frontend.tokenizer import Tokenizer

from .harness import CHAT, COMPLETIONS, events, run, site, until

pytestmark = pytest.mark.quiet

ENDLESS = {"model": "tiny", "prompt": "hello", "ignore_eos": True}
LONG = 2**30


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled(tokenizer: Tokenizer, stream: bool) -> None:
    async def test() -> None:
        async with site(tokenizer, max_context=LONG, step_s=0.005) as s:
            _, writer = await s.open(COMPLETIONS, {**ENDLESS, "stream": stream})
            await until(lambda: s.backend.num_running == 1)
            await asyncio.sleep(0.02)
            writer.close()
            await until(lambda: s.backend.num_cancelled == 1, 1.0)
            assert s.backend.num_running == 0
            code = "" if stream else 'requests_total{code="499",'
            await until_metric(s, code + 'endpoint="completions"} 1.0')

    run(test)


async def until_metric(s: Any, line: str) -> None:
    async with asyncio.timeout(2):
        while line not in (await s.client.get("/metrics")).text:
            await asyncio.sleep(0.01)


def test_a_client_that_leaves_before_the_first_token(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, step_s=30.0) as s:
            _, writer = await s.open(COMPLETIONS, {**ENDLESS, "stream": True})
            await until(lambda: s.backend.num_running == 1)
            writer.close()
            await until(lambda: s.backend.num_cancelled == 1, 1.0)
            await until_metric(s, 'code="499"')

    run(test)


def test_a_client_that_does_not_read_is_dropped_and_hinders_nobody(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, max_context=LONG, stall_s=0.3) as s:
            reader, writer = await s.open(COMPLETIONS, {**ENDLESS, "stream": True})
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: s.backend.num_cancelled == 1, 8.0)
            answer = await s.complete("hello")
            assert answer.json()["choices"][0]["text"] == "hello"
            await until_metric(s, "dropped_clients_total 1.0")

    run(test)


def test_waiting_tokens_are_merged(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, max_context=LONG, stall_s=5.0) as s:
            reader, writer = await s.open(COMPLETIONS, {**ENDLESS, "stream": True, "max_tokens": 40_000})
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            # the whole answer waits, but decode did not
            await until(lambda: bool(s.backend.started) and s.backend.num_running == 0, 8.0)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            data = await read_all(reader)
            assert data.count(b"hello") == 40_000
            assert data.count(b"data: ") < 30_000
            assert data.count(b'"text":"hello"') > 100  # one event a token while the client kept up

    run(test)


async def read_all(reader: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while b"[DONE]" not in data[-64:]:
        data += await asyncio.wait_for(reader.read(2**20), 5)
    return bytes(data)


REFUSALS: list[tuple[BackendError, int, str]] = [
    (Overloaded(2.3, "TTFT would be 40 s", "overloaded_ttft"), 429, "overloaded_ttft"),
    (PromptTooLong("9,000 tokens do not fit"), 400, "context_length_exceeded"),
    (GrammarLost("too many items"), 400, "grammar_lost"),
    (Unavailable("no instance"), 503, "unavailable"),
    (Failed("all attempts failed"), 500, "failed"),
]


@pytest.mark.parametrize(("error", "status", "code"), REFUSALS)
def test_errors_before_the_first_token_have_a_status(
    tokenizer: Tokenizer, error: BackendError, status: int, code: str
) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            for refusal, failure in ((error, None), (None, (0, error))):
                s.backend.refusal, s.backend.failure = refusal, failure
                for stream in (False, True):
                    answer = await s.chat(stream=stream)
                    assert answer.status_code == status
                    assert answer.json()["error"]["code"] == code
                    assert answer.json()["error"]["message"].endswith(str(error))
                    assert answer.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)

    run(test)


def test_every_backend_error_has_an_answer() -> None:
    assert {type(error) for error, _, _ in REFUSALS} == set(BackendError.__subclasses__())
    with pytest.raises(TypeError):
        from_backend(BackendError("unnamed"))


def test_errors_after_the_first_token_are_events(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.failure = (2, Failed("the last instance died"))
            parts = events(await s.complete("hello, world", stream=True))
            assert [part["choices"][0]["text"] for part in parts[:-1]] == ["hello", ","]
            assert parts[-1]["error"]["message"] == "the last instance died"
            answer = await s.complete("hello, world")
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "failed")

    run(test)


def test_too_many_requests(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, max_context=LONG, step_s=0.01, max_running=2) as s:
            held = [await s.open(COMPLETIONS, {**ENDLESS, "stream": True}) for _ in range(2)]
            await until(lambda: s.backend.num_running == 2)
            start = time.perf_counter()
            answer = await s.chat()
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert time.perf_counter() - start < 0.05
            held[0][1].close()
            await until(lambda: s.backend.num_running == 1)
            assert (await s.chat(max_tokens=1)).status_code == 200

    run(test)


def test_a_body_that_does_not_come(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, body_timeout_s=0.05) as s:
            reader, writer = await s.connect()
            writer.write(b"POST %b HTTP/1.1\r\ncontent-length: 10\r\n\r\n{" % CHAT.encode())
            assert (await asyncio.wait_for(reader.readline(), 2)).startswith(b"HTTP/1.1 408")

    run(test)


def test_bodies_that_are_received_at_once_are_bounded_together(tokenizer: Tokenizer) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" % COMPLETIONS.encode()
    body = b'{"model":"tiny","prompt":"hello","max_tokens":1}'.ljust(1000)

    async def test() -> None:
        async with site(tokenizer, max_body_bytes=1000) as s:
            opened = [await s.connect() for _ in range(16)]
            for _, writer in opened:
                writer.write(head + body[:-1])
            reader, writer = await s.connect()
            await s.client.get("/health")  # so all that was written is read
            writer.write(head + body[:20])
            assert (await asyncio.wait_for(reader.readline(), 2)).startswith(b"HTTP/1.1 429")
            for each, writer in opened:
                writer.write(body[-1:])
                assert (await asyncio.wait_for(each.readline(), 2)).startswith(b"HTTP/1.1 200")
            assert (await s.complete(max_tokens=1)).status_code == 200

    run(test)


def test_stopping_tells_the_clients(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with site(tokenizer, max_context=LONG, step_s=0.01) as s:
            reader, writer = await s.open(COMPLETIONS, {**ENDLESS, "stream": True})
            await reader.readuntil(b"hello")
            start = time.perf_counter()
            s.server.stop()
            data = await asyncio.wait_for(reader.read(), 3)
            while chunk := await asyncio.wait_for(reader.read(2**16), 3):
                data += chunk
            assert b"the server is shutting down" in data
            assert time.perf_counter() - start < 1.5
            assert s.backend.num_running == 0

    with caplog.at_level(logging.WARNING):
        run(test)
    assert "Exception in ASGI application" not in caplog.text


def test_a_port_in_use_is_a_clear_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
            HttpServer(None, "127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"no\.such\.host"):
        HttpServer(None, "no.such.host.invalid", 0)
    with pytest.raises(ConfigError, match="99999"):
        HttpServer(None, "127.0.0.1", 99999)


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_of_ours_tells_nothing_of_its_inside(
    tokenizer: Tokenizer, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.failure = (1, RuntimeError("the secret"))  # type: ignore[assignment]
            answer = await s.complete("hello, world", stream=stream)
            assert answer.status_code == (200 if stream else 500)
            assert '"code":"internal_error"' in answer.text and "secret" not in answer.text

    run(test)
    assert "the secret" in caplog.text


def test_request_and_token_cost(tokenizer: Tokenizer) -> None:
    """A guard against a lost order of magnitude, not a benchmark: CPU of 16 streams, clients included."""

    async def test() -> None:
        async with site(tokenizer, max_context=LONG) as s:
            start = time.process_time()
            answers = [s.complete("hello", stream=True, ignore_eos=True, max_tokens=200) for _ in range(16)]
            assert all(len(events(answer)) == 201 for answer in await asyncio.gather(*answers))
            assert (time.process_time() - start) / (16 * 200) < 500e-6

    run(test)
