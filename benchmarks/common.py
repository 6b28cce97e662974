"""What the benchmarks share: a cluster of real processes, its CPU time and memory, a streaming client, and the output format.

Every benchmark prints JSON lines and ends with {"benchmark": NAME, "figures": {...}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
READY_S = 120.0
ENGINE_THREADS = ("engine", "kv-load", "kv-store")
"""Names of the threads that compute and copy KV (`mooncake.engine.threads`); all others are ours to keep cheap."""


def emit(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def finish(benchmark: str, figures: dict[str, float]) -> None:
    emit(benchmark=benchmark, figures={name: round(value, 4) for name, value in figures.items()})


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "p50": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "count": len(values),
    }


class Cpu(NamedTuple):
    """Seconds of processor time."""

    engine: float
    rest: float


class Cluster:
    """`mooncake serve` with these options, ready when made; a context manager."""

    def __init__(self, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mooncake-bench-"))
        self.events = self.folder / "events"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        fixed = ("--port", str(self.port), "--run-dir", str(self.folder / "run"), "--cluster", f"bench-{os.getpid()}")
        began = time.monotonic()
        with (self.folder / "screen").open("wb") as screen:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mooncake",
                    "serve",
                    *fixed,
                    *(option.format(events=self.events) for option in options),
                ],
                stdout=screen,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        self.ready_s = time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pids = [*self.processes().values()] if self.process.poll() is None else []
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for pid in (self.process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the cluster did not become ready:\n{(self.folder / 'screen').read_text()}")
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.02)

    def processes(self) -> dict[str, int]:
        """Pids by name, the supervisor's included."""
        found = {"supervisor": self.process.pid}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in map(int, children):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            name = words[words.index("--name") + 1] if "--name" in words else words[-2]
            found[name if name not in found else f"{name} {pid}"] = pid
        return found

    def cpu(self) -> dict[str, Cpu]:
        return {name: _cpu(pid) for name, pid in self.processes().items()}

    def memory_mb(self) -> float:
        """Proportional set size of all processes: what they share counts once."""
        total = 0
        for pid in self.processes().values():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024


def _cpu(pid: int) -> Cpu:
    engine = rest = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            used = int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue
        if name.startswith(ENGINE_THREADS):
            engine += used
        else:
            rest += used
    return Cpu(engine / 1e9, rest / 1e9)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Answer(NamedTuple):
    """ttft_s: from the first byte sent to the first event received."""

    ttft_s: float
    num_output: int
    num_cached: int


class Connection:
    """One kept-alive HTTP connection, as plain as can be: its own cost is not to be measured."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def complete(self, prompt: list[int], max_tokens: int, **more: Any) -> Answer:
        """more: of the body."""
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **more,
        }
        data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        )
        began = time.perf_counter()
        self._writer.write(head.encode() + b"\r\n\r\n" + data)
        status = await self._reader.readuntil(b"\r\n\r\n")
        if not status.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{status.decode()}{(await self._reader.read(4096)).decode()}")
        ttft_s = 0.0
        usage: dict[str, Any] = {}
        while (size := int(await self._reader.readline(), 16)) > 0:
            chunk = await self._reader.readexactly(size + 2)
            ttft_s = ttft_s or time.perf_counter() - began
            if b'"usage":{' in chunk:
                event = next(line for line in chunk.split(b"\n") if b'"usage":{' in line)
                usage = json.loads(event.removeprefix(b"data: "))["usage"]
        await self._reader.readline()
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Answer(ttft_s, usage["completion_tokens"], cached)


async def complete_all(port: int, prompts: Sequence[list[int]], max_tokens: int, streams: int) -> list[Answer]:
    """All prompts, `streams` at a time."""
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def client() -> None:
        async with Connection(port) as connection:
            for prompt in waiting:
                answers.append(await connection.complete(prompt, max_tokens))  # noqa: PERF401

    await asyncio.gather(*(client() for _ in range(streams)))
    return answers


def event_log_entries(folder: Path, name: str) -> Iterator[tuple[int, Any]]:
    """(monotonic ns, event as plain values) of a process's log."""
    import msgspec

    from mooncake.core.event_log import read_log

    for path in sorted(folder.glob(f"{name}-*.log")):
        with path.open("rb") as file:
            _, entries = read_log(file)
            for entry in entries:
                yield entry.now, msgspec.msgpack.decode(entry.event)
