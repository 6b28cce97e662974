"""A live cluster for tests: real processes on loopback, in a folder and under a name of its own, stopped with nothing left."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from mooncake.cluster.run_dir import ProcessId
from mooncake.sim.replay_log import Replayed, replay_log

ROOT = Path(__file__).parent.parent.parent
READY_S = 90.0
MODEL = "smollm2-135m-instruct"
_numbers = itertools.count()


class Cluster:
    """`mooncake serve` with these options, ready when made. As a context manager it is stopped, checked and removed at the
    end. folder, name: those of a predecessor that was killed."""

    def __init__(self, *options: str, folder: Path | None = None, name: str = "", ready_s: float = READY_S) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mooncake-live-"))
        self.name = name or f"live-{os.getpid()}-{next(_numbers)}"
        self.run_dir = self.folder / "run"
        self.event_logs = self.folder / "events"
        self._screen = self.folder / "screen"
        self._ready_s = ready_s
        self._seen: dict[str, ProcessId] = {}
        self._checkpoints: list[tuple[str, int]] = []
        fixed = ("--port", "0", "--run-dir", str(self.run_dir), "--cluster", self.name, "--timeouts-drain-s", "1")
        with self._screen.open("wb") as screen:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mooncake", "serve", *fixed, "--event-log", str(self.event_logs), *options],
                stdout=screen,
                stderr=subprocess.STDOUT,
                env=clean_environment(),
                cwd=ROOT,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.process.poll() is None:
                self.stop()
        finally:
            self.abandon()

    # ------------------------------------------------------------ what is there

    @property
    def screen(self) -> str:
        return self._screen.read_text()

    def pids(self) -> dict[str, int]:
        found = msgspec.json.decode((self.run_dir / "processes.json").read_bytes(), type=dict[str, ProcessId])
        self._seen |= {f"{name} {process.pid}": process for name, process in found.items()}
        return {name: process.pid for name, process in found.items()}

    def cpu_s(self, name: str) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.pids()[name]}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # ------------------------------------------------------------ killing

    def kill(self, name: str) -> int:
        """kill -9; gives the pid that was."""
        pid = self.pids()[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def until_back(self, name: str, old_pid: int) -> None:
        """Until the supervisor has started it again and requests can be served everywhere."""
        self._until(lambda: self.pids().get(name, old_pid) != old_pid, f"{name} to be started again")
        self.until_serving()

    def until_serving(self) -> None:
        self._until(self._serving, "all instances to be ready")

    def _serving(self) -> bool:
        try:
            answer = httpx.get(f"{self.url}/ready", timeout=2)
        except httpx.TransportError:
            return False
        counts = answer.json()["instances"]
        wanted = {role: self.config[role] for role in ("prefill", "decode")}
        return answer.status_code == 200 and all(counts.get(role) == count for role, count in wanted.items())

    # ------------------------------------------------------------ the end

    def checkpoint(self, label: str) -> None:
        """Nothing runs now: whatever a core still holds at this moment is a leak, reported by `stop`."""
        self._checkpoints.append((label, time.monotonic_ns()))

    def stop(self) -> None:
        """Ctrl-C, and nothing may be left: no process, no shared memory, no socket, nothing held at a checkpoint."""
        self.pids()
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(20)
        assert code == 0, self.screen
        assert "killed" not in self.screen.rpartition("stopping")[2], self.screen
        self.assert_gone()
        assert sorted(path.name for path in self.run_dir.iterdir()) == ["lock", "logs"]
        for label, at in self._checkpoints:
            left = {name: found.leftovers() for name, found in self.replay_all(at).items()}
            assert not any(left.values()), f"{label}: {left}"

    def assert_gone(self) -> None:
        alive = [name for name, process in self._seen.items() if process.alive]
        assert not alive
        assert not list(Path("/dev/shm").glob(f"*{self.name}-*"))
        assert not list(_processes_of(str(self.run_dir)))

    def abandon(self) -> None:
        """End what a failed test leaves running, by pid."""
        for pid in (self.process.pid, *_processes_of(str(self.run_dir))):
            if pid != self.process.pid or self.process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for path in Path("/dev/shm").glob(f"*{self.name}-*"):
            path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------ inside

    def replay_all(self, until_ns: int | None = None) -> dict[str, Replayed]:
        """By name, the process that lives at that time, or lived last; to be asked after `stop`, when the logs are whole."""
        found: dict[str, Replayed] = {}
        for path in sorted(self.event_logs.iterdir()):
            replayed = replay_log(path, until_ns)
            if replayed.num_events:
                found[path.stem.rpartition("-")[0]] = replayed
        return found

    def _wait_ready(self) -> None:
        self._until(lambda: "curl" in self.screen, "the screen")
        self.config = json.loads((self.run_dir / "config.json").read_bytes())
        self.url = f"http://127.0.0.1:{self.config['port']}"
        self.pids()
        self.until_serving()

    def _until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + self._ready_s
        while not condition():
            assert self.process.poll() is None, self.screen
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.screen}"
            time.sleep(0.02)


def _processes_of(run_dir: str) -> Iterable[int]:
    """Processes that were started for this run folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{run_dir}/" in command and ProcessId.of(int(entry.name)) is not None:
                yield int(entry.name)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MOONCAKE_")}


# ---------------------------------------------------------------- requests


class Completion(msgspec.Struct):
    """What a client got. texts: of each choice. ttft_s: from the request to the first piece of text. decode: the instance that
    the request was first placed at."""

    texts: dict[int, str] = {}
    finish: str | None = None
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0
    ttft_s: float = 0.0
    decode: str = ""
    error: str = ""

    @property
    def text(self) -> str:
        return self.texts.get(0, "")


class Client:
    """Requests to one cluster, from one event loop, with that API key if any."""

    def __init__(self, cluster: Cluster, timeout_s: float = 60.0, *, key: str = "") -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=cluster.url, timeout=timeout_s, limits=limits, headers=headers)
        self.model = cluster.config["model_name"]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> Completion:
        """A stream to its end. A broken connection or an error is in `error`, with the text so far."""
        found = Completion()
        async for _ in self.stream(prompt, max_tokens, found, **options):
            pass
        return found

    async def stream(self, prompt: list[int], max_tokens: int, found: Completion, **options: Any) -> AsyncIterator[str]:
        """Pieces of text as they come, gathered in `found`."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}} | options
        began = time.perf_counter()
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    found.error = f"{answer.status_code} {(await answer.aread()).decode()}"
                    return
                found.decode = answer.headers.get("x-mooncake-decode", "")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    if not found.ttft_s:
                        found.ttft_s = time.perf_counter() - began
                    piece = _take(found, json.loads(line.removeprefix("data: ")))
                    if piece:
                        yield piece
        except httpx.TransportError as error:
            found.error = f"{type(error).__name__}: {error}"

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self._http.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode())


def _take(found: Completion, event: dict[str, Any]) -> str:
    if "error" in event:
        found.error = json.dumps(event["error"])
        return ""
    usage = event.get("usage")
    if usage:
        found.num_prompt, found.num_output = usage["prompt_tokens"], usage["completion_tokens"]
        found.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    pieces = event["choices"]
    if not pieces:
        return ""
    [piece] = pieces
    found.finish = piece.get("finish_reason") or found.finish
    found.texts[piece["index"]] = found.texts.get(piece["index"], "") + piece["text"]
    return str(piece["text"])
