"""Web pages of other origins: who may read answers, and that nobody else's answers are any different."""

from __future__ import annotations

from pathlib import Path

import pytest

from mooncake.config import parse_origins
from mooncake.core.errors import ConfigError
from mooncake.frontend.tokenizer import Tokenizer

from .harness import CHAT, COMPLETIONS, events, run, site
from .test_every_answer import counted
from .test_tenants import BODY, Keyed

PAGE, OTHER = "https://chat.example", "https://evil.example"
ALLOWED = "access-control-allow-origin"


def test_a_page_of_an_allowed_origin_reads_answers_streams_and_errors(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, origins=(PAGE,)) as s:
            for answer in (
                await s.post(COMPLETIONS, BODY, origin=PAGE),
                await s.post(COMPLETIONS, {**BODY, "stream": True}, origin=PAGE),
                await s.post(COMPLETIONS, {**BODY, "n": 0}, origin=PAGE),
                await s.client.get("/v1/models", headers={"origin": PAGE}),
                await s.client.get("/nope", headers={"origin": PAGE}),
            ):
                assert answer.headers[ALLOWED] == PAGE and "Origin" in answer.headers["vary"]
                assert "x-request-id" in answer.headers["access-control-expose-headers"]
                assert len(answer.headers.get_list("x-request-id")) == 1
            streamed = await s.post(COMPLETIONS, {**BODY, "stream": True}, origin=PAGE)
            assert "".join(event["choices"][0]["text"] for event in events(streamed) if event["choices"])
            assert ALLOWED not in (await s.post(COMPLETIONS, BODY, origin=OTHER)).headers
            assert ALLOWED not in (await s.post(COMPLETIONS, BODY)).headers

    run(test)


def test_a_browser_asks_before_it_sends_what_the_page_wants(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json")
        async with keyed.open(tokenizer, origins=(PAGE,)) as s:
            asked = {
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,x-stainless-os",
            }
            allowed = await s.client.options(CHAT, headers={"origin": PAGE, **asked})
            assert (allowed.status_code, allowed.headers[ALLOWED]) == (200, PAGE)
            assert allowed.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
            assert "access-control-allow-credentials" not in allowed.headers
            refused = await s.client.options(CHAT, headers={"origin": OTHER, **asked, "x-request-id": "mine"})
            assert refused.status_code == 400 and ALLOWED not in refused.headers
            assert refused.headers["x-request-id"] == "mine"
            without = await s.client.options(CHAT, headers={"origin": PAGE})
            assert without.status_code == 401 and without.headers[ALLOWED] == PAGE
            expected = {("chat", "200"): 1, ("chat", "400"): 1, ("chat", "401"): 1}
            assert await counted(s, keyed.admin) == expected

    run(test)


def test_without_origins_nothing_is_said_of_them(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            answer = await s.post(COMPLETIONS, BODY, origin=PAGE)
            assert answer.status_code == 200
            assert not [name for name in answer.headers if name.startswith("access-control")]
            asked = await s.client.options(
                COMPLETIONS, headers={"origin": PAGE, "access-control-request-method": "POST"}
            )
            assert asked.status_code == 405

    run(test)


def test_origins_are_checked() -> None:
    assert parse_origins("") == () and parse_origins("*") == ("*",)
    assert parse_origins("https://a.example, http://localhost:3000") == ("https://a.example", "http://localhost:3000")
    for wrong in ("a.example", "https://a.example/", "https://a.example,", "ftp://a.example"):
        with pytest.raises(ConfigError, match="cors_origins"):
            parse_origins(wrong)
