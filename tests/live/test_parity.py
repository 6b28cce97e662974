"""Parity: every core of a live cluster, told again what its event log says, answers byte for byte as it did live."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mooncake.core.errors import ReplayMismatch
from mooncake.core.event_log import LogEntry, read_log
from mooncake.sim.replay_log import replay_log
from tests.live.harness import Client, Cluster, Completion

NUM_REQUESTS = 2000
STREAMS = 48
EVENTS_MIN = {"conductor": 2 * NUM_REQUESTS, "frontend": 5 * NUM_REQUESTS, "node": 2 * NUM_REQUESTS}
PROCESSES = {"conductor", "frontend-0", "node-0", "prefill-0", "prefill-1", "decode-0", "decode-1"}


@pytest.fixture(scope="module")
def logs() -> Iterator[list[Path]]:
    """Of a cluster that lost a decode instance under load, and was stopped."""
    with Cluster("--engine", "simulated", "--prefill", "2", "--decode", "2", "--simulated-speed", "20") as cluster:
        completions = asyncio.run(_load(cluster))
        assert [found.error for found in completions if found.error] == []
        assert sum(found.num_cached > 0 for found in completions) > NUM_REQUESTS // 4
        cluster.stop()
        yield sorted(cluster.event_logs.iterdir())


async def _load(cluster: Cluster) -> list[Completion]:
    rng = random.Random(3)
    documents = [[rng.randrange(1000, 5000) for _ in range(512)] for _ in range(8)]
    prompts = [
        rng.choice(documents)[: 128 * rng.randrange(5)]
        + [rng.randrange(1000, 5000) for _ in range(rng.randrange(5, 200))]
        for _ in range(NUM_REQUESTS)
    ]
    waiting = iter(prompts)
    found: list[Completion] = []

    async def stream() -> None:
        async with Client(cluster) as client:
            for prompt in waiting:
                found.append(await client.complete(prompt, rng.randrange(1, 12)))
                if len(found) == NUM_REQUESTS // 2:
                    cluster.kill("decode-1")

    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return found


def test_all_lives_of_all_cores_say_the_same_again(logs: list[Path]) -> None:
    num_events: dict[str, int] = {}
    names = [path.stem.rpartition("-")[0] for path in logs]
    assert set(names) == PROCESSES and names.count("decode-1") == 2
    for path, name in zip(logs, names, strict=True):
        replayed = replay_log(path)
        assert replayed.num_events
        kind = name.partition("-")[0]
        num_events[kind] = num_events.get(kind, 0) + replayed.num_events
    print(num_events)
    assert all(num_events[kind] >= least for kind, least in EVENTS_MIN.items())


def test_a_log_that_was_tampered_with_is_found_out(logs: list[Path], tmp_path: Path) -> None:
    """The other answer to one event, with all others as they were."""
    [path] = [path for path in logs if path.stem.startswith("conductor")]
    data = path.read_bytes()
    with path.open("rb") as file:
        _, entries = read_log(file)
        entry = next(entry for entry in entries if b"Placed" in entry.commands)
    changed = msgspec.msgpack.encode(LogEntry(entry.now, entry.event, entry.commands.replace(b"decode-0", b"decode-9")))
    if b"decode-0" not in entry.commands:
        changed = msgspec.msgpack.encode(
            LogEntry(entry.now, entry.event, entry.commands.replace(b"decode-1", b"decode-9"))
        )
    original = msgspec.msgpack.encode(entry)
    assert data.count(original) == 1 and len(changed) == len(original) and changed != original
    tampered = tmp_path / path.name
    tampered.write_bytes(data.replace(original, changed))
    with pytest.raises(ReplayMismatch, match=r"conductor-\d+\.log: event \d+, .*\.decode: 'decode-9' in the log"):
        replay_log(tampered)
