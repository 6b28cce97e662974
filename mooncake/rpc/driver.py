"""Drives a sans-IO core on an event loop: events in, commands out, its deadline as a timer, all of it logged on demand."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mooncake.config import Config, RoleConfig
from mooncake.core.clock import Clock, monotonic
from mooncake.core.event_log import EventLogWriter


class Core(Protocol):
    def handle(self, event: Any, now: int) -> Any: ...

    def deadline(self) -> int | None: ...


class CoreDriver:
    """perform(command) does what the core says; it may call `handle` again, which then waits its turn.

    tick: the event that tells the core that its deadline passed."""

    def __init__(
        self,
        core: Core,
        perform: Callable[[Any], None],
        tick: Any,
        *,
        clock: Clock = monotonic,
        log: EventLogWriter | None = None,
    ) -> None:
        self.core = core
        self._perform = perform
        self._tick = tick
        self._clock = clock
        self._log = log
        self._events: deque[Any] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for: int | None = None
        self._loop = asyncio.get_running_loop()

    def handle(self, event: Any) -> None:
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._handle_one(self._events.popleft())
        finally:
            self._handling = False
        self._arm()

    def handle_soon(self, event: Any) -> None:
        """From another thread. After the loop has closed there is nobody to tell."""
        try:
            self._loop.call_soon_threadsafe(self.handle, event)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._log is not None:
            self._log.close()

    def _handle_one(self, event: Any) -> None:
        now = self._clock()
        commands = self.core.handle(event, now)
        if self._log is not None:
            self._log.append(now, event, commands)
        for command in commands:
            self._perform(command)

    def _arm(self) -> None:
        deadline = self.core.deadline()
        if deadline == self._armed_for:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed_for = deadline
        if deadline is not None:
            delay = max(0, deadline - self._clock()) / 1e9
            self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._armed_for = None
        self.handle(self._tick)


def open_event_log(config: Config, role: RoleConfig, settings: Any) -> EventLogWriter | None:
    """The file of this process's core in the configured folder; one per start."""
    if config.event_log is None:
        return None
    folder = Path(config.event_log)
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{role.name}-{time.time_ns()}.log").open("wb", buffering=0)
    return EventLogWriter(file, role.role, config.seed, settings)
