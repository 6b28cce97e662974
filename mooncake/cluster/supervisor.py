"""Keeps a set of processes alive, and ends all of them.

    spawn -> (status lines) -> exit -- stopping ----------------------------------> gone
      ^                          |---- exit code 2 before it was ever ready ------> the whole start fails with its sentence
      |                          |---- FIRST_STARTS_MAX exits before first ready -> the whole start fails
      +---- backoff -------------+

Children get no terminal signals of their own (each has its own process group), so Ctrl-C reaches the supervisor alone and the
order of stopping is ours: highest rank first, one rank after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from mooncake.config import STATUS_FD, SUPERVISOR_PID
from mooncake.core.errors import ConfigError, ProcessError
from mooncake.status import LINE_BYTES_MAX, Phase, StatusLine

EXIT_BAD_CONFIG = 2
FIRST_STARTS_MAX = 4
LAST_WORDS_S = 0.5
"""How long to read on after a process ended: a grandchild may hold the pipe open for ever."""


class Backoff(msgspec.Struct, frozen=True):
    """Wait before a restart: first_s, doubled by each failure in a row up to max_s; healthy_s of life end the row."""

    first_s: float = 0.2
    max_s: float = 10.0
    healthy_s: float = 30.0

    def wait_s(self, num_failures: int) -> float:
        return min(self.max_s, self.first_s * 2.0 ** min(num_failures, 30))


class ChildSpec(msgspec.Struct, frozen=True):
    """rank: stopped in descending order. address: for the screen."""

    name: str
    role: str
    argv: tuple[str, ...]
    address: str
    env: Mapping[str, str]
    rank: int = 0


Listener = Callable[["Child", StatusLine], None]


class Child:
    """One process of the set, through its restarts. `listen` is told every status line and every death."""

    def __init__(self, spec: ChildSpec, log: Path, listen: Listener, backoff: Backoff) -> None:
        self.spec = spec
        self.log = log
        self.num_restarts = 0
        self.ready = asyncio.Event()
        self._listen = listen
        self._backoff = backoff
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = False
        self._last_words = ""
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def keep(self) -> None:
        """Run until `stop`. Raises ConfigError or ProcessError if the process never comes up."""
        clock = asyncio.get_running_loop().time
        num_failures = 0
        while not self._stopping.is_set():
            started = clock()
            code = await self.run_once()
            if self._stopping.is_set():
                return
            num_failures = 0 if clock() - started > self._backoff.healthy_s else num_failures + 1
            self._check_first_start(code, num_failures)
            wait_s = self._backoff.wait_s(num_failures - 1)
            self._listen(
                self, StatusLine(Phase.FAILED, f"{_how(code)}; starting again in {wait_s:.1f} s; see {self.log}")
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            self.num_restarts += 1

    async def run_once(self) -> int:
        """One life: spawn, follow, reap. Gives the exit code, negative for a signal."""
        self._last_words = ""
        read_fd, write_fd = os.pipe()
        env = {**self.spec.env, STATUS_FD: str(write_fd), SUPERVISOR_PID: str(os.getpid())}
        try:
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self.spec.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                    pass_fds=(write_fd,),
                    process_group=0,
                )
        except OSError as error:
            os.close(read_fd)
            raise ConfigError(f"{self.spec.name}: cannot run {self.spec.argv[0]}: {error.strerror}") from None
        finally:
            os.close(write_fd)
        if self._stopping.is_set():
            self._signal("terminate")
        self._listen(self, StatusLine(Phase.STARTING))
        follower = asyncio.create_task(self._follow(read_fd))
        try:
            code = await self._process.wait()
            await asyncio.wait({follower}, timeout=LAST_WORDS_S)
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
        self.ready.clear()
        return code

    def sentence(self, code: int) -> str:
        """Why the process ended, in its own last words if it had any."""
        return self._last_words or f"{self.spec.name} {_how(code)}; see {self.log}"

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Terminate, wait, kill. `hurry` cuts the wait short."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._signal("terminate")
        exited, hurried = asyncio.create_task(process.wait()), asyncio.create_task(hurry.wait())
        await asyncio.wait({exited, hurried}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not exited.done():
            self._listen(self, StatusLine(Phase.WARNING, "did not stop in time and was killed"))
            self._signal("kill")
        await exited

    def _signal(self, verb: str) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            getattr(self._process, verb)()

    def _check_first_start(self, code: int, num_failures: int) -> None:
        if self._was_ready:
            return
        if code == EXIT_BAD_CONFIG:
            raise ConfigError(self.sentence(code))
        if num_failures >= FIRST_STARTS_MAX:
            raise ProcessError(self.sentence(code))

    async def _follow(self, read_fd: int) -> None:
        """Read status lines until the process closes its end. What is no status line is not ours and skipped."""
        reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", buffering=0)
        )
        try:
            while True:
                try:
                    data = await reader.readline()
                    if not data:
                        return
                    self._hear(StatusLine.unpack(data))
                except (ValueError, msgspec.DecodeError):
                    continue
        finally:
            pipe.close()

    def _hear(self, line: StatusLine) -> None:
        if line.stage is Phase.READY:
            self._was_ready = True
            self.ready.set()
        elif line.stage is Phase.FAILED:
            self._last_words = line.detail
        self._listen(self, line)


class Supervisor:
    """Runs all children at once. `record` is told the pids after every spawn."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        log: Callable[[str], Path],
        listen: Listener,
        record: Callable[[Mapping[str, int]], None],
        backoff: Backoff,
    ) -> None:
        self._listen = listen
        self._record = record
        self.children = [Child(spec, log(spec.name), self._heard, backoff) for spec in specs]

    async def run(
        self,
        stop: asyncio.Event,
        hurry: asyncio.Event,
        on_ready: Callable[[Sequence[Child]], None],
        start_s: float,
        grace_s: float,
    ) -> None:
        """Until `stop`, or until a process proves unable to start: then its ConfigError or ProcessError is raised. Whatever
        happens, no child is left behind."""
        keepers = [asyncio.create_task(child.keep()) for child in self.children]
        stopped = asyncio.create_task(stop.wait())
        all_ready = asyncio.create_task(self._all_ready())
        try:
            await asyncio.wait({stopped, all_ready, *keepers}, timeout=start_s, return_when=asyncio.FIRST_COMPLETED)
            if all_ready.done():
                on_ready(self.children)
                await asyncio.wait({stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED)
            elif not stopped.done() and not any(keeper.done() for keeper in keepers):
                late = ", ".join(child.spec.name for child in self.children if not child.ready.is_set())
                raise ProcessError(f"{late}: not ready within {start_s:.0f} s; see {self.children[0].log.parent}")
        finally:
            stopped.cancel()
            all_ready.cancel()
            await self._stop_all(grace_s, hurry)
            endings = await asyncio.gather(*keepers, return_exceptions=True)
        for ending in endings:
            if isinstance(ending, BaseException):
                raise ending

    async def _all_ready(self) -> None:
        for child in self.children:
            await child.ready.wait()

    async def _stop_all(self, grace_s: float, hurry: asyncio.Event) -> None:
        for rank in sorted({child.spec.rank for child in self.children}, reverse=True):
            await asyncio.gather(*(child.stop(grace_s, hurry) for child in self.children if child.spec.rank == rank))

    def _heard(self, child: Child, line: StatusLine) -> None:
        if line.stage is Phase.STARTING:
            self._record({each.spec.name: each.pid for each in self.children if each.pid is not None})
        self._listen(child, line)


def _how(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
