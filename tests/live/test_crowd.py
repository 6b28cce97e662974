"""500 streams at once: most read as they should, some slowly, some vanish at any stage of a request. None of the others sees an
error, and when all are gone nothing is left of them: no page, lease or booking, no descriptor, no memory that grows."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from pathlib import Path

from mooncake.engine.models import resolve_model
from mooncake.engine.simulated import draw_token
from mooncake.frontend.tokenizer import Tokenizer
from tests.live.harness import MODEL, Cluster

NUM_STREAMS = 500
RUN_S = float(os.environ.get("CROWD_S", "10"))
NUM_OUTPUT = 40
REQUEST_S = 120.0
"""Far more than any of them should take."""
GROWTH_MAX_BYTES = 64 << 20
"""Of a process between the end of the first crowd and the end of the second: allocators keep some of what they were given."""
READS = re.compile(rb'"text":"((?:[^"\\]|\\.)*)"')


class Crowd:
    """Asks until the time is over. wrong: what should not have been seen."""

    def __init__(self, port: int, seed: int, until: float) -> None:
        self.rng = random.Random(seed)
        self.num_whole = 0
        self.num_vanished = 0
        self.wrong: list[str] = []
        self._port = port
        self._until = until
        self._tokenizer = Tokenizer.load(resolve_model(MODEL).path)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for at in range(NUM_STREAMS):
                group.create_task(self._visitor(at))

    async def _visitor(self, at: int) -> None:
        await asyncio.sleep(self.rng.random())
        while time.monotonic() < self._until:
            async with asyncio.timeout(REQUEST_S):
                if at % 5 == 0:
                    await self._vanish()
                else:
                    await self._ask(slow=at % 5 == 1)

    async def _ask(self, *, slow: bool) -> None:
        seed, length = self.rng.randrange(1 << 30), self.rng.randrange(1, 400)
        reader, writer = await self._open()
        writer.write(_request(seed, length))
        data = b""
        while piece := await reader.read(200 if slow else 1 << 16):
            data += piece
            if data.endswith(b"0\r\n\r\n"):
                break
            if slow:
                await asyncio.sleep(0.05)
        writer.close()
        head, _, body = data.partition(b"\r\n\r\n")
        text = b"".join(READS.findall(body))
        if not head.startswith(b"HTTP/1.1 200") or b'"finish_reason":"length"' not in body or b"[DONE]" not in body:
            self.wrong.append(f"seed {seed}: {data[:300]!r} ... {data[-300:]!r}")
        elif json.loads(b'"%s"' % text) != self._expected(seed, length):
            self.wrong.append(f"seed {seed}: other text than it should be: {text!r}")
        self.num_whole += 1

    async def _vanish(self) -> None:
        """Before the request, in the middle of its body, before an answer, or after some of it; with a FIN or a reset."""
        stage = self.rng.randrange(4)
        reader, writer = await self._open()
        request = _request(self.rng.randrange(1 << 30), self.rng.randrange(1, 400))
        if stage:
            writer.write(request if stage > 1 else request[: self.rng.randrange(1, len(request))])
        if stage == 2:
            await asyncio.sleep(self.rng.random() * 0.5)
        for _ in range(self.rng.randrange(1, 20) if stage == 3 else 0):
            await reader.read(1 << 12)
        if self.rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        self.num_vanished += 1
        await asyncio.sleep(0.05)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    def _expected(self, seed: int, length: int) -> str:
        detokenizer = self._tokenizer.detokenizer()
        tokens = [draw_token(seed, 0, length + index) for index in range(NUM_OUTPUT)]
        return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()


def _request(seed: int, length: int) -> bytes:
    body = {"model": MODEL, "prompt": [1000 + (seed + at) % 5000 for at in range(length)], "max_tokens": NUM_OUTPUT}
    data = json.dumps(body | {"seed": seed, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(data) + data


def resources(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """By process, open descriptors and resident bytes."""
    found = {}
    for name, pid in cluster.pids().items():
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found[name] = len(list(Path(f"/proc/{pid}/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")
    return found


def test_nobody_suffers_from_the_others_and_nothing_is_left() -> None:
    def crowd(seed: int, seconds: float) -> Crowd:
        made = Crowd(cluster.config["port"], seed, time.monotonic() + seconds)
        asyncio.run(made.run())
        assert not made.wrong, "\n".join(made.wrong[:5])
        time.sleep(2)  # a second, by promise, and what the machine makes of it
        return made

    options = ("--max-batch", "512", "--store-memory", "256MiB", "--simulated-speed", "1")
    with Cluster("--engine", "simulated", *options) as cluster:
        crowd(1, RUN_S / 4)
        before = resources(cluster)
        made = crowd(2, RUN_S)
        after = resources(cluster)
        cluster.checkpoint("after the crowd")
        print(f"{made.num_whole} streams to their ends, {made.num_vanished} vanished; before {before}, after {after}")
        assert made.num_whole > NUM_STREAMS and made.num_vanished > NUM_STREAMS
        for name, (num_open, num_bytes) in after.items():
            assert num_open <= before[name][0], f"{name} has {num_open} descriptors open, and had {before[name][0]}"
            assert num_bytes <= before[name][1] + GROWTH_MAX_BYTES, f"{name} grew from {before[name][1]} to {num_bytes}"
