"""The operator's endpoints, with a real Conductor core behind them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mooncake.core.messages import CONDUCTOR, AskStatus
from mooncake.frontend.inquiries import NUM_OPEN_MAX, Inquiries, Unanswered
from mooncake.frontend.tokenizer import Tokenizer
from tests.frontend.conductor import TOKEN, Site, site
from tests.frontend.harness import run


def test_the_status_has_the_conductors_numbers_and_the_frontends(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            await opened.complete("first")
            found = await opened.json("GET", "/admin/status")
            assert (found["name"], found["frontend"], found["model"]) == ("test", "frontend-0", "tiny")
            assert (found["ready"], found["detail"], found["num_running"]) == (True, "", 0)
            assert found["requests"]["num_ended"] == 1 and found["requests"]["ttft"]["met"] == 1.0
            cluster = found["cluster"]
            assert cluster["counts"] == {"placed": 1} and cluster["num_bookings"] == 0
            assert [each["name"] for each in cluster["instances"]] == ["prefill-0", "decode-0", "decode-10"]
            assert {each["state"] for each in cluster["instances"]} == {"ready"}

    run(check)


def test_a_request_is_explained_by_its_id_and_by_its_number(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            await opened.complete("or/der-7")
            by_id = await opened.json("GET", "/admin/explain?id=or/der-7")
            assert by_id["request"] == "frontend-0/100"
            assert by_id["text"].startswith(
                "or/der-7 completed: 3 prompt tokens (0 reused), 1 output tokens, 1 attempt\n"
            )
            assert "stages, ms: received 0.0, placed" in by_id["text"] and "-> prefill prefill-0: TTFT" in by_id["text"]
            by_number = await opened.json("GET", "/admin/explain?id=frontend-0/100")
            assert by_number["text"] == by_id["text"]
            other = await opened.json("GET", "/admin/explain?id=frontend-9/4", 404)
            assert other["error"]["message"] == "no placement of frontend-9/4 is known; the last 512 are kept"

    run(check)


@pytest.mark.parametrize(
    ("query", "status", "part"), [("", 400, "is needed"), ("?id=", 400, "id:"), ("?id=x", 404, "'x'")]
)
def test_ids_that_lead_nowhere_are_refused(tokenizer: Tokenizer, query: str, status: int, part: str) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            error = (await opened.json("GET", f"/admin/explain{query}", status))["error"]
            assert error["param"] == "id" and part in error["message"]

    run(check)


async def states(opened: Site) -> dict[str, str]:
    found = await opened.json("GET", "/admin/status")
    return {each["name"]: each["state"] for each in found["cluster"]["instances"]}


def test_an_instance_is_drained_and_takes_requests_again(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            found = await opened.json("POST", "/admin/drain/decode-0")
            assert found == {"instance": "decode-0", "text": "decode-0 is drained"}
            assert await states(opened) == {"prefill-0": "ready", "decode-0": "drained", "decode-10": "ready"}
            assert opened.cluster.backend.status().instances == {"prefill": 1, "decode": 1}
            await opened.json("POST", "/admin/undrain/decode-0")
            assert (await states(opened))["decode-0"] == "ready"

    run(check)


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_an_unknown_instance_is_answered_with_those_that_there_are(tokenizer: Tokenizer, verb: str) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            error = (await opened.json("POST", f"/admin/{verb}/decode-7", 404))["error"]
            assert error["message"] == "there is no instance 'decode-7'; there are: decode-0, decode-10, prefill-0"
            assert (error["param"], error["code"]) == ("instance", "unknown")
            assert (await opened.json("GET", f"/admin/{verb}/decode-0", 405))["error"]["code"] == "method_not_allowed"

    run(check)


def test_without_answers_of_the_conductor_the_frontends_own_numbers_are_shown(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            await opened.complete("first")
            opened.cluster.silent = True
            found = await opened.json("GET", "/admin/status")
            assert found["cluster"] is None and found["detail"] == "the Conductor did not answer within 0.3 s"
            assert found["requests"]["num_ended"] == 1
            error = (await opened.json("POST", "/admin/drain/decode-0", 503))["error"]
            assert error["message"] == "the Conductor did not answer within 0.3 s"
            opened.cluster.backend.closed(CONDUCTOR, opened.cluster.backend._links[CONDUCTOR])
            found = await opened.json("GET", "/admin/status")
            assert found["detail"] == "there is no connection to the Conductor"

    run(check)


def test_questions_are_bounded_and_late_answers_are_nobodys() -> None:
    async def check() -> None:
        asked: list[Any] = []

        def send(message: Any) -> bool:
            asked.append(message)
            return True

        inquiries = Inquiries(send, timeout_s=0.05)
        waiting = [asyncio.create_task(inquiries.status()) for _ in range(NUM_OPEN_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(Unanswered, match="64 questions"):
            await inquiries.status()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, Unanswered) for result in results)
        assert asked == [AskStatus(number) for number in range(1, NUM_OPEN_MAX + 1)]
        inquiries.answered(_status(5))
        later = asyncio.create_task(inquiries.status())
        await asyncio.sleep(0)
        inquiries.answered(_status(65))
        assert await later == _status(65)

    run(check)


def _status(number: int) -> Any:
    from mooncake.core.messages import ClusterStatus
    from mooncake.core.types import ReusedTokens

    return ClusterStatus(number, "joint", 0, 0, (), ReusedTokens(), (), ())


# ---------------------------------------------------------------- who may


CASES: list[tuple[dict[str, str], int]] = [
    ({}, 200),
    ({"host": "localhost:8000"}, 200),
    ({"host": "[::1]:8000"}, 200),
    ({"authorization": f"Bearer {TOKEN}"}, 200),
    ({"authorization": f"bearer {TOKEN}", "x_forwarded_for": "8.8.8.8"}, 200),
    ({"authorization": "Bearer wrong"}, 401),
    ({"authorization": f"Basic {TOKEN}"}, 401),
    ({"x_forwarded_for": "127.0.0.1"}, 403),
    ({"forwarded": "for=127.0.0.1"}, 403),
    ({"host": "rebound.example:8000"}, 403),
    ({"host": "rebound.example:8000", "origin": "http://rebound.example:8000"}, 403),
    ({"origin": "https://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"sec_fetch_site": "cross-site"}, 403),
]


@pytest.mark.parametrize(("headers", "status"), CASES)
def test_only_this_machine_and_those_with_the_token_may_ask(
    tokenizer: Tokenizer, headers: dict[str, str], status: int
) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            for method, path in (("GET", "/admin/status"), ("POST", "/admin/drain/decode-0")):
                body = await opened.json(method, path, status, **headers)
                if status != 200:
                    assert body["error"]["type"] == "invalid_request_error" and "Bearer" in body["error"]["message"]
            drained = opened.cluster.core.view.instances["decode-0"].held
            assert drained is (status == 200), "who may not ask changes nothing"

    run(check)


def test_the_page_and_its_files_are_served_without_data(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            for path in ("", "/dashboard.css", "/dashboard.js", "/charts.js", "/format.js"):
                answer = await opened.client.get(f"/dashboard{path}", headers={"x-forwarded-for": "8.8.8.8"})
                assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
                assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", ""), "nothing from elsewhere"
            assert (await opened.client.get("/dashboard/../app.py")).status_code == 404

    run(check)
