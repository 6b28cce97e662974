"""The door as clients meet it: who may come in, whose request it is, and what is too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mooncake.frontend.keyring import Keyring
from mooncake.frontend.keys import TenantChanges, add_key, revoke_key
from mooncake.frontend.tenants import KeyedDoor
from mooncake.frontend.tokenizer import Tokenizer

from .harness import Site, run, site, until

NOW = 1_800_000_000
BODY = {"model": "tiny", "prompt": "hello"}


class Keyed:
    """A site with a key file: tenants `a` and `b` with a key each, and an admin key of `ops`."""

    def __init__(self, path: Path, **limits: Any) -> None:
        self.path = path
        self.now = float(NOW)
        self.a = add_key(path, "a", TenantChanges(**limits), NOW, NOW + 1000, admin=False)
        self.b = add_key(path, "b", TenantChanges(priority_max=5), NOW, None, admin=False)
        self.admin = add_key(path, "ops", TenantChanges(), NOW, None, admin=True)

    @asynccontextmanager
    async def open(self, tokenizer: Tokenizer, num_running_max: int = 100, **options: Any) -> AsyncIterator[Site]:
        door = KeyedDoor(Keyring(self.path), num_running_max, lambda: self.now)
        async with site(tokenizer, door=door, **options) as opened:
            self.site = opened
            yield opened

    async def ask(self, key: str | None, body: Any = None, **headers: str) -> httpx.Response:
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        return await self.site.post("/v1/completions", body or BODY, **headers)


def test_without_a_valid_key_nobody_comes_in(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json")
        async with keyed.open(tokenizer) as s:
            assert (await keyed.ask(keyed.a)).status_code == 200
            wrong = keyed.a[:-1] + ("0" if keyed.a[-1] != "0" else "1")
            for text in (None, wrong, "sk-123", "mk-", "x"):
                answer = await keyed.ask(text)
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["type"], error["param"]) == (
                    401, "invalid_api_key", "invalid_request_error", None,
                )  # fmt: skip
                assert answer.headers["www-authenticate"] == "Bearer"
                assert text is None or len(text) < 10 or text not in answer.text
            for path in ("/v1/models", "/v1/chat/completions", "/metrics", "/nowhere"):
                assert (await s.client.get(path)).status_code == 401
            assert (await s.client.get("/health")).status_code == (await s.client.get("/ready")).status_code == 200
            keyed.now = NOW + 1000
            assert (await keyed.ask(keyed.a)).status_code == 401
            assert len(s.backend.started) == 1

    run(test)


def test_a_revoked_key_is_refused_within_a_second(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json")
        async with keyed.open(tokenizer):
            assert (await keyed.ask(keyed.a)).status_code == 200
            revoke_key(keyed.path, keyed.a, NOW)
            async with asyncio.timeout(1.0):
                while (await keyed.ask(keyed.a)).status_code != 401:
                    await asyncio.sleep(0.05)
            assert (await keyed.ask(keyed.b)).status_code == 200

    run(test)


def test_metrics_are_the_operators(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json")
        async with keyed.open(tokenizer) as s:
            codes = [
                (await s.client.get("/metrics", headers={"authorization": f"Bearer {key}"})).status_code
                for key in (keyed.a, keyed.admin)
            ]
            assert codes == [403, 200]

    run(test)


def test_the_key_says_whose_request_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json", weight=2.0)
        async with keyed.open(tokenizer) as s:
            assert (await keyed.ask(keyed.a)).status_code == 200
            assert (await keyed.ask(keyed.a, x_mooncake_tenant="a")).status_code == 200
            refused = await keyed.ask(keyed.a, x_mooncake_tenant="b")
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "tenant_not_allowed")
            assert (await keyed.ask(keyed.admin, x_mooncake_tenant="b")).status_code == 200
            assert (await keyed.ask(keyed.admin, x_mooncake_tenant="somebody-else")).status_code == 200
            bad = await keyed.ask(keyed.admin, x_mooncake_tenant="a/b")
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "x-mooncake-tenant")
            seen = [(each.tenant, each.share_scope, each.weight) for each in s.backend.started]
            assert seen == [
                ("a", "tenant/a", 2.0), ("a", "tenant/a", 2.0), ("b", "tenant/b", 1.0),
                ("somebody-else", "tenant/somebody-else", 1.0),
            ]  # fmt: skip

    run(test)


def test_without_a_key_file_the_header_names_the_tenant(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            assert (await s.post("/v1/completions", BODY)).status_code == 200
            assert (await s.post("/v1/completions", BODY, x_mooncake_tenant="x")).status_code == 200
            assert [(each.tenant, each.share_scope) for each in s.backend.started] == [("", ""), ("x", "tenant/x")]
            assert (await s.post("/v1/completions", BODY, x_mooncake_tenant="")).status_code == 400

    run(test)


def test_tenants_of_a_share_group_have_one_scope(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json", share_group="friends")
        add_key(keyed.path, "b", TenantChanges(share_group="friends"), NOW, None, admin=False)
        async with keyed.open(tokenizer) as s:
            await keyed.ask(keyed.a)
            await keyed.ask(keyed.b, {**BODY, "cache_salt": "mine"})
            assert [(each.share_scope, each.salt) for each in s.backend.started] == [
                ("group/friends", ""), ("group/friends", "mine"),
            ]  # fmt: skip

    run(test)


def test_priority_needs_permission(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json")
        async with keyed.open(tokenizer):
            assert (await keyed.ask(keyed.b, x_mooncake_priority="5")).status_code == 200
            assert (await keyed.ask(keyed.a, x_mooncake_priority="-1")).status_code == 200
            for key, value in ((keyed.b, "6"), (keyed.a, "1")):
                answer = await keyed.ask(key, x_mooncake_priority=value)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-mooncake-priority")

    run(test)


# ---------------------------------------------------------------- limits


def test_requests_per_minute(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json", requests_per_minute=2)
        async with keyed.open(tokenizer) as s:
            first = await keyed.ask(keyed.a)
            names = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")
            assert [first.headers[name] for name in names] == ["2", "1"]
            assert first.headers["x-ratelimit-reset-requests"] in ("30s", *[f"29.{ms}s" for ms in range(900, 1000)])
            stream = await keyed.ask(keyed.a, {**BODY, "stream": True})
            assert stream.headers["x-ratelimit-remaining-requests"] == "0"
            refused = await keyed.ask(keyed.a)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "requests")
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            assert 25 < int(refused.headers["retry-after"]) <= 30
            ms = int(refused.headers["retry-after-ms"])
            assert 0 <= int(refused.headers["retry-after"]) * 1000 - ms < 1000
            assert (await keyed.ask(keyed.b)).status_code == 200
            assert "x-ratelimit-limit-requests" not in (await keyed.ask(keyed.b)).headers
            assert len(s.backend.started) == 4

    run(test)


def test_tokens_per_minute(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json", tokens_per_minute=1000)
        async with keyed.open(tokenizer) as s:
            answer = await keyed.ask(keyed.a, {**BODY, "max_tokens": 600, "stop": ["e"]})
            num_prompt = answer.json()["usage"]["prompt_tokens"]
            assert answer.headers["x-ratelimit-remaining-tokens"] == str(400 - num_prompt)
            whole = {**BODY, "max_tokens": 900, "ignore_eos": True}  # what was not generated was given back
            assert (await keyed.ask(keyed.a, whole)).status_code == 200
            refused = await keyed.ask(keyed.a, {**BODY, "max_tokens": 600})
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
            assert len(s.backend.started) == 2 and 20 <= int(refused.headers["retry-after"]) <= 36

    run(test)


def test_concurrent_requests(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json", concurrent_requests=1)
        async with keyed.open(tokenizer, step_s=0.01) as s:
            running = asyncio.create_task(keyed.ask(keyed.a, {**BODY, "max_tokens": 20, "ignore_eos": True}))
            await until(lambda: bool(s.backend.started))
            refused = await keyed.ask(keyed.a)
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "concurrent_requests")
            assert (await running).status_code == 200
            assert (await keyed.ask(keyed.a)).status_code == 200

    run(test)


def test_one_tenant_never_has_all_places(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json")
        async with keyed.open(tokenizer, num_running_max=8, step_s=0.02) as s:
            body = {**BODY, "max_tokens": 20, "ignore_eos": True}
            flood = [asyncio.create_task(keyed.ask(keyed.a, body)) for _ in range(20)]
            await until(lambda: len(s.backend.started) == 7)
            assert (await keyed.ask(keyed.b)).status_code == 200
            codes = [answer.status_code for answer in await asyncio.gather(*flood)]
            assert (codes.count(200), codes.count(429)) == (7, 13)

    run(test)


@pytest.mark.parametrize("body", [{"model": "tiny"}, {"model": "nobody", "prompt": "x"}, b"{"])
def test_a_bad_request_gives_its_place_back(tokenizer: Tokenizer, tmp_path: Path, body: Any) -> None:
    async def test() -> None:
        keyed = Keyed(tmp_path / "keys.json", concurrent_requests=1)
        async with keyed.open(tokenizer):
            for _ in range(3):
                assert (await keyed.ask(keyed.a, body)).status_code in (400, 404)
            assert (await keyed.ask(keyed.a)).status_code == 200

    run(test)
