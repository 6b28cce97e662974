"""Whatever is answered, also at the door, has the request's id and is counted by its status."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from mooncake.frontend.tokenizer import Tokenizer

from .conductor import site as cluster_site
from .harness import CHAT, COMPLETIONS, Site, run, site
from .test_tenants import BODY, Keyed

NEW_ID = re.compile(r"[0-9a-f]{32}")


async def counted(s: Site, key: str = "") -> dict[tuple[str, str], int]:
    """Answers by endpoint and status, but for those to this question."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    text = (await s.client.get("/metrics", headers=headers)).text
    pattern = r'^mooncake_frontend_requests_total{code="(\d+)",endpoint="([a-z.]+)"} (\d+)'
    found = {(endpoint, code): int(count) for code, endpoint, count in re.findall(pattern, text, re.MULTILINE)}
    return {answer: count for answer, count in found.items() if answer[0] != "metrics"}


def test_what_is_refused_at_the_door(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json")
        async with keyed.open(tokenizer) as s:
            for given, expected in ((None, NEW_ID), ("mine-7", re.compile("mine-7")), ("not valid", NEW_ID)):
                own = {} if given is None else {"x_request_id": given}
                for answer, status in (
                    (await keyed.ask(None, **own), 401),
                    (await keyed.ask("mk-wrong", **own), 401),
                    (await keyed.ask(keyed.a, x_mooncake_tenant="b", **own), 403),
                ):
                    assert answer.status_code == status and expected.fullmatch(answer.headers["x-request-id"])
            answer = await s.client.get("/metrics", headers={"authorization": f"Bearer {keyed.a}"})
            assert answer.status_code == 403 and NEW_ID.fullmatch(answer.headers["x-request-id"])
            assert await counted(s, keyed.admin) == {("completions", "401"): 6, ("completions", "403"): 3}

    run(test)


def test_what_is_no_request_of_the_api(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, max_body_bytes=2000) as s:
            ask, own = s.client.request, {"x-request-id": "mine-7"}
            big = {**BODY, "prompt": "x" * 2000}
            for answer, status in [
                (await ask("GET", "/nope", headers=own), 404),
                (await ask("GET", CHAT, headers=own), 405),
                (await ask("DELETE", "/v1/models", headers=own), 405),
                (await ask("GET", "/v1/models/x", headers=own), 404),
                (await ask("POST", "/v1/embeddings", headers=own), 400),
                (await s.post(COMPLETIONS, big, x_request_id="mine-7"), 413),
                (await s.post(COMPLETIONS, b"{", x_request_id="mine-7"), 400),
                (await s.post("/tokenize", b"{", x_request_id="mine-7"), 400),
                (await s.post("/tokenize", big, x_request_id="mine-7"), 413),
                (await ask("GET", "/health", headers=own), 200),
                (await s.complete(max_tokens=1), 200),
            ]:
                sent = answer.request.headers.get("x-request-id")
                assert answer.status_code == status
                assert answer.headers.get_list("x-request-id") == [sent or answer.headers["x-request-id"]]
            answer = await s.post(COMPLETIONS, BODY, x_request_id="not valid")
            assert answer.status_code == 400 and NEW_ID.fullmatch(answer.headers["x-request-id"])
            assert await counted(s) == {
                ("other", "404"): 1,
                ("chat", "405"): 1,
                ("models", "405"): 1,
                ("models", "404"): 1,
                ("embeddings", "400"): 1,
                ("completions", "413"): 1,
                ("completions", "400"): 2,
                ("tokenize", "400"): 1,
                ("tokenize", "413"): 1,
                ("health", "200"): 1,
                ("completions", "200"): 1,
            }

    run(test)


def test_what_is_not_even_http(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            for sent in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 80_000):
                reader, writer = await s.connect()
                writer.write(sent)
                answer = await asyncio.wait_for(reader.read(), 2)
                assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", answer)
            assert await counted(s) == {("other", "400"): 2}

    run(test)


def test_what_only_operators_may_ask(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with cluster_site(tokenizer) as s:
            wrong = {"authorization": "Bearer wrong", "x-request-id": "mine-7"}
            answer = await s.client.get("/admin/status", headers=wrong)
            assert (answer.status_code, answer.headers["x-request-id"]) == (401, "mine-7")
            forwarded = {"x-forwarded-for": "10.0.0.1", "x-request-id": "mine-8"}
            answer = await s.client.post("/admin/drain/decode-0", headers=forwarded)
            assert (answer.status_code, answer.headers["x-request-id"]) == (403, "mine-8")
            s.cluster.silent = True
            answer = await s.client.get("/admin/explain", params={"id": "decode-0/1"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            text = (await s.client.get("/metrics")).text
            for code in (401, 403, 503):
                assert f'mooncake_frontend_requests_total{{code="{code}",endpoint="admin"}} 1.0' in text

    run(test)
