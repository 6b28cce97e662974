"""Virtual time: a heap of (time, sequence, call). Nothing happens between events, so a run of hours takes what its events take.

Calls at the same time run in the order in which they were asked for; so a run is a pure function of its configuration and seed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

Call = Callable[[], None]


class Loop:
    def __init__(self) -> None:
        self.now = 0
        self.num_events = 0
        self._heap: list[tuple[int, int, Call]] = []
        self._sequence = 0

    def at(self, time: int, call: Call) -> None:
        """A time that has passed means now."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(time, self.now), self._sequence, call))

    def after(self, delay: int, call: Call) -> None:
        self.at(self.now + delay, call)

    def run(self, until: int, stop: Callable[[], bool] = lambda: False) -> None:
        """All events up to and at `until`, or until `stop()` holds after one of them. Time then stands at the last event, or at
        `until` if there are no more before it."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, call = heapq.heappop(heap)
            self.num_events += 1
            call()
            if stop():
                return
        self.now = max(self.now, until)


class Core(Protocol):
    def handle(self, event: Any, now: int) -> list[Any]: ...

    def deadline(self) -> int | None: ...


Observer = Callable[[str, Any, Any, list[Any]], None]
"""(name, core, event, commands), after every event."""


class CoreRunner:
    """What `mooncake.rpc.driver.CoreDriver` is to live cores. perform(command) may call `handle` again, which waits its turn.

    Wake-ups are lazy: the heap has one at or before the core's deadline, and an early one only looks again."""

    def __init__(
        self, loop: Loop, name: str, core: Core, perform: Callable[[Any], None], tick: Any, observe: Observer
    ) -> None:
        self.core = core
        self.alive = True
        self._loop = loop
        self._name = name
        self._perform = perform
        self._tick = tick
        self._observe = observe
        self._events: deque[Any] = deque()
        self._handling = False
        self._wake_at: int | None = None

    def handle(self, event: Any) -> None:
        if not self.alive:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        while self._events:
            self._handle_one(self._events.popleft())
        self._handling = False
        self._arm()

    def stop(self) -> None:
        """The process died: nothing is handled any more."""
        self.alive = False
        self._events.clear()

    def _handle_one(self, event: Any) -> None:
        commands = self.core.handle(event, self._loop.now)
        self._observe(self._name, self.core, event, commands)
        for command in commands:
            self._perform(command)

    def _arm(self) -> None:
        deadline = self.core.deadline()
        if deadline is None or (self._wake_at is not None and self._wake_at <= deadline):
            return
        self._wake_at = deadline
        self._loop.at(deadline, lambda: self._wake(deadline))

    def _wake(self, time: int) -> None:
        if not self.alive or self._wake_at != time:
            return
        self._wake_at = None
        deadline = self.core.deadline()
        if deadline is not None and deadline <= self._loop.now:
            self.handle(self._tick)
        else:
            self._arm()
