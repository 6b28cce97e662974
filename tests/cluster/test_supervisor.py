"""Real processes, kept alive and ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mooncake.cluster.run_dir import ProcessId
from mooncake.cluster.supervisor import Backoff, Child, ChildSpec, Supervisor
from mooncake.core.errors import ConfigError, ProcessError
from mooncake.status import Phase, StatusLine

READY = """
import os, time, signal
def say(stage, detail=""):
    os.write(int(os.environ["MOONCAKE_STATUS_FD"]), ('{"stage":"%s","detail":"%s"}\\n' % (stage, detail)).encode())
"""
QUICK = Backoff(first_s=0.01, max_s=0.05, healthy_s=30.0)
START_S, GRACE_S = 20.0, 5.0


class Harness:
    """A supervisor of scripts, and everything it said."""

    def __init__(self, folder: Path, scripts: Mapping[str, str], ranks: Mapping[str, int] | None = None) -> None:
        env = {"PATH": os.environ.get("PATH", "")}
        specs = [
            ChildSpec(name, "test", (sys.executable, "-c", READY + script), "", env, (ranks or {}).get(name, 0))
            for name, script in scripts.items()
        ]
        self.said: list[tuple[str, Phase, str]] = []
        self.recorded: dict[str, int] = {}
        self.stop, self.hurry, self.is_ready = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.supervisor = Supervisor(specs, lambda name: folder / f"{name}.log", self._heard, self._record, QUICK)

    async def run(self, start_s: float = START_S, grace_s: float = GRACE_S) -> None:
        await self.supervisor.run(self.stop, self.hurry, self._on_ready, start_s, grace_s)

    async def until(self, name: str, stage: Phase, count: int = 1) -> None:
        async with asyncio.timeout(START_S):
            while sum(1 for who, what, _ in self.said if (who, what) == (name, stage)) < count:
                await asyncio.sleep(0.005)

    def _on_ready(self, children: Sequence[Child]) -> None:
        self.is_ready.set()

    def _heard(self, child: Child, line: StatusLine) -> None:
        self.said.append((child.spec.name, line.stage, line.detail))

    def _record(self, pids: Mapping[str, int]) -> None:
        self.recorded = dict(pids)


def alive(pids: Mapping[str, int]) -> list[str]:
    return [name for name, pid in pids.items() if ProcessId.of(pid)]


def test_starts_all_then_stops_by_rank(tmp_path: Path) -> None:
    script = """
def stop(*_):
    open("{folder}/order", "a").write("{name} ")
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
say("loading"); say("ready"); time.sleep(60)
"""

    async def scenario() -> Harness:
        names = {"store": 0, "prefill": 2, "frontend": 3, "conductor": 1}
        scripts = {name: script.format(folder=tmp_path, name=name) for name in names}
        harness = Harness(tmp_path, scripts, names)
        running = asyncio.create_task(harness.run())
        await asyncio.wait_for(harness.is_ready.wait(), START_S)
        assert sorted(alive(harness.recorded)) == sorted(names)
        harness.stop.set()
        await running
        return harness

    harness = asyncio.run(scenario())
    assert (tmp_path / "order").read_text().split() == ["frontend", "prefill", "conductor", "store"]
    assert alive(harness.recorded) == []
    assert [what for who, what, _ in harness.said if who == "store"] == [Phase.STARTING, Phase.LOADING, Phase.READY]


def test_dead_child_is_started_again(tmp_path: Path) -> None:
    async def scenario() -> Harness:
        harness = Harness(tmp_path, {"a": 'say("ready"); time.sleep(60)', "b": 'say("ready"); time.sleep(60)'})
        running = asyncio.create_task(harness.run())
        await asyncio.wait_for(harness.is_ready.wait(), START_S)
        first = harness.recorded
        os.kill(first["a"], signal.SIGKILL)
        await harness.until("a", Phase.READY, 2)
        assert harness.recorded["a"] != first["a"]
        assert harness.recorded["b"] == first["b"]
        harness.stop.set()
        await running
        return harness

    harness = asyncio.run(scenario())
    told = [detail for who, what, detail in harness.said if what is Phase.FAILED]
    assert told == [f"was killed by signal 9; starting again in 0.0 s; see {tmp_path}/a.log"]
    assert alive(harness.recorded) == []


def test_exit_2_at_first_start_fails_with_its_sentence(tmp_path: Path) -> None:
    harness_of: list[Harness] = []

    async def scenario() -> None:
        harness = Harness(
            tmp_path,
            {"good": 'say("ready"); time.sleep(60)', "bad": 'say("failed", "port = 1: taken"); raise SystemExit(2)'},
        )
        harness_of.append(harness)
        await harness.run()

    with pytest.raises(ConfigError, match=r"^port = 1: taken$"):
        asyncio.run(scenario())
    assert alive(harness_of[0].recorded) == []


def test_exit_2_later_is_started_again(tmp_path: Path) -> None:
    script = f"""
import pathlib
say("ready")
mark = pathlib.Path("{tmp_path}/mark")
if not mark.exists():
    mark.touch(); raise SystemExit(2)
time.sleep(60)
"""

    async def scenario() -> None:
        harness = Harness(tmp_path, {"a": script})
        running = asyncio.create_task(harness.run())
        await harness.until("a", Phase.READY, 2)
        harness.stop.set()
        await running

    asyncio.run(scenario())


def test_child_that_never_comes_up_ends_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        await Harness(tmp_path, {"a": 'print("why", flush=True); raise SystemExit(3)'}).run()

    with pytest.raises(ProcessError, match=rf"^a exited with code 3; see {tmp_path}/a.log$"):
        asyncio.run(scenario())
    assert (tmp_path / "a.log").read_text() == "why\n" * 4


def test_start_is_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        await Harness(tmp_path, {"a": 'say("ready"); time.sleep(60)', "b": "time.sleep(60)"}).run(start_s=0.5)

    with pytest.raises(ProcessError, match=r"^(a, )?b: not ready within 0 s"):
        asyncio.run(scenario())


def test_missing_interpreter_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        spec = ChildSpec("a", "test", ("/nowhere/python",), "", {})
        child = Child(spec, tmp_path / "a.log", lambda child, line: None, QUICK)
        await child.run_once()

    with pytest.raises(ConfigError, match=r"^a: cannot run /nowhere/python: No such file or directory$"):
        asyncio.run(scenario())


@pytest.mark.parametrize("hurried", [False, True])
def test_deaf_child_is_killed_in_time(tmp_path: Path, hurried: bool) -> None:
    async def scenario() -> float:
        script = 'signal.signal(signal.SIGTERM, signal.SIG_IGN); say("ready"); time.sleep(60)'
        harness = Harness(tmp_path, {"deaf": script})
        running = asyncio.create_task(harness.run(grace_s=30.0 if hurried else 0.2))
        await asyncio.wait_for(harness.is_ready.wait(), START_S)
        started = asyncio.get_running_loop().time()
        harness.stop.set()
        if hurried:
            await asyncio.sleep(0.05)
            harness.hurry.set()
        await running
        assert ("deaf", Phase.WARNING, "did not stop in time and was killed") in harness.said
        assert alive(harness.recorded) == []
        return asyncio.get_running_loop().time() - started

    assert asyncio.run(scenario()) < 5.0


def test_noise_on_the_status_pipe_is_skipped(tmp_path: Path) -> None:
    script = """
fd = int(os.environ["MOONCAKE_STATUS_FD"])
os.write(fd, b'nonsense\\n{"stage":"dancing"}\\n' + b"x" * 9000 + b"\\n" + bytes([255, 10]))
say("ready"); time.sleep(60)
"""

    async def scenario() -> Harness:
        harness = Harness(tmp_path, {"a": script})
        running = asyncio.create_task(harness.run())
        await asyncio.wait_for(harness.is_ready.wait(), START_S)
        harness.stop.set()
        await running
        return harness

    harness = asyncio.run(scenario())
    assert [what for _, what, _ in harness.said] == [Phase.STARTING, Phase.READY]


def test_grandchild_that_keeps_the_pipe_open_does_not_hold_the_restart(tmp_path: Path) -> None:
    script = """
import subprocess, sys
fd = int(os.environ["MOONCAKE_STATUS_FD"])
holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"], pass_fds=(fd,))
say("ready")
"""

    async def scenario() -> None:
        harness = Harness(tmp_path, {"a": script})
        running = asyncio.create_task(harness.run())
        await harness.until("a", Phase.STARTING, 2)
        harness.stop.set()
        await running

    asyncio.run(scenario())


def test_backoff_grows_to_its_bound() -> None:
    backoff = Backoff(first_s=0.2, max_s=10.0)
    assert [backoff.wait_s(count) for count in (0, 1, 2, 5, 6, 1000)] == [0.2, 0.4, 0.8, 6.4, 10.0, 10.0]
