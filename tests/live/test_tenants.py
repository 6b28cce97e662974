"""A cluster with a key file: who may call it, whose KV is reused, and that a flood is refused and fails nobody."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.live.harness import ROOT, Client, Cluster, clean_environment
from tests.live.test_doors import refused

PROMPT = [1000 + at % 3000 for at in range(1024)]


def keys(path: Path, *arguments: str) -> str:
    """What `mooncake keys` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "mooncake", "keys", arguments[0], "--api-keys", str(path), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Keyed:
    """A cluster whose queues are short, and its key file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts = {name: keys(path, "add", "--tenant", name) for name in ("a", "b")}
        for name in ("x", "y"):
            self.texts[name] = keys(path, "add", "--tenant", name, "--share-group", "friends")
        self.texts["admin"] = keys(path, "add", "--tenant", "ops", "--admin")
        self.cluster: Cluster


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    found = Keyed(tmp_path_factory.mktemp("keys") / "keys.json")
    options = (
        "--engine",
        "simulated",
        "--simulated-hardware",
        "h100",
        "--limits-queue",
        "20",
        "--simulated-speed",
        "4",
    )
    with Cluster(*options, "--api-keys", str(found.path)) as found.cluster:
        yield found
        time.sleep(1)
        found.cluster.checkpoint("at the end")


def cached(keyed: Keyed, name: str, prompt: list[int], **fields: str) -> int:
    async def ask() -> int:
        async with Client(keyed.cluster, key=keyed.texts[name]) as client:
            completion = await client.complete(prompt, 4, **fields)
            assert not completion.error, completion.error
            return completion.num_cached

    return asyncio.run(ask())


def test_tenants_reuse_their_own_kv_and_that_of_their_share_group(keyed: Keyed) -> None:
    assert cached(keyed, "a", PROMPT) == 0
    assert cached(keyed, "a", PROMPT) > 0
    assert cached(keyed, "b", PROMPT) == 0
    assert cached(keyed, "a", PROMPT, cache_salt="mine") == 0
    assert cached(keyed, "x", PROMPT) == 0
    assert cached(keyed, "y", PROMPT) > 0


def test_a_revoked_key_is_refused_within_a_second_and_nothing_restarts(keyed: Keyed) -> None:
    text = keys(keyed.path, "add", "--tenant", "a")
    pids = keyed.cluster.pids()
    headers = {"authorization": f"Bearer {text}"}

    def status() -> int:
        return httpx.get(f"{keyed.cluster.url}/v1/models", headers=headers, timeout=5).status_code

    until = time.monotonic() + 1.0
    while status() != 200:
        assert time.monotonic() < until, "a new key is not known"
    keys(keyed.path, "revoke", text.split("-")[1])
    until = time.monotonic() + 1.0
    while status() != 401:
        assert time.monotonic() < until, "a revoked key is not refused"
    assert keyed.cluster.pids() == pids


def test_more_than_queues_hold_is_refused_and_nothing_fails(keyed: Keyed) -> None:
    """There is no objective that could be broken: the queue is the bound."""

    async def flood() -> list[tuple[str, float]]:
        async with Client(keyed.cluster, key=keyed.texts["a"]) as client:

            async def ask(number: int) -> tuple[str, float]:
                began = time.perf_counter()
                completion = await client.complete([1000 + number] * 2000, 4)
                return completion.error[:4], time.perf_counter() - began

            return await asyncio.gather(*(ask(number) for number in range(200)))

    found = asyncio.run(flood())
    outcomes = [error for error, _ in found]
    assert set(outcomes) == {"", "429 "}
    assert 17 <= outcomes.count("") < 200, (
        "seven eighths of twenty places are for one tenant, and what was done meanwhile"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "No such file or directory"), ("{}x", "JSON is malformed: trailing characters (byte 3)")],
)
def test_a_key_file_that_cannot_be_used(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
    assert refused(tmp_path, "--api-keys", str(path)) == f"mooncake: key file {path}: {sentence}"
