"""Virtual time: a heap of (time, sequence, call). Nothing happens between events, so a run of hours takes what its events take.

Calls at the same time run in the order in which they were asked for; so a run is a pure function of its configuration and seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Protocol

Call = Callable[..., None]


class Loop:
    def __init__(self) -> None:
        self.now = 0
        self.num_events = 0
        self._heap: list[tuple[int, int, Call, tuple[Any, ...]]] = []
        self._sequence = 0
        self._stopped = False

    def at(self, time: int, call: Call, *arguments: Any) -> None:
        """A time that has passed means now."""
        self._sequence += 1
        heappush(self._heap, (max(time, self.now), self._sequence, call, arguments))

    def after(self, delay: int, call: Call, *arguments: Any) -> None:
        self._sequence += 1
        heappush(self._heap, (self.now + delay, self._sequence, call, arguments))

    def stop(self) -> None:
        """`run` returns after the present event."""
        self._stopped = True

    def run(self, until: int) -> None:
        """All events up to and at `until`, or until one calls `stop`. Time then stands at the last event, or at `until` if
        there are no more before it."""
        heap = self._heap
        self._stopped = False
        while heap and heap[0][0] <= until:
            self.now, _, call, arguments = heappop(heap)
            self.num_events += 1
            call(*arguments)
            if self._stopped:
                return
        self.now = max(self.now, until)


class Core(Protocol):
    def handle(self, event: Any, now: int) -> list[Any]: ...

    def deadline(self) -> int | None: ...


Observer = Callable[[str, Any, Any, list[Any]], None]
"""(name, core, event, commands), after every event."""


class CoreRunner:
    """What `mooncake.rpc.driver.CoreDriver` is to live cores. actions: by type of command; they may call `handle` again, which
    waits its turn.

    Wake-ups are lazy: the heap has one at or before the core's deadline, and an early one only looks again. A new one is made
    only if it is to come before all others."""

    def __init__(
        self,
        loop: Loop,
        name: str,
        core: Core,
        actions: dict[type, Callable[[Any], None]],
        tick: Any,
        observe: Observer | None,
    ) -> None:
        self.core = core
        self.alive = True
        self._loop = loop
        self._name = name
        self._actions = actions
        self._tick = tick
        self._observe = observe
        self._events: deque[Any] = deque()
        self._handling = False
        self._wakes: list[int] = []
        """When those in the heap come, the next one last."""

    def handle(self, event: Any) -> None:
        if self._handling:
            self._events.append(event)
            return
        if not self.alive:
            return
        self._handling = True
        core, actions, events = self.core, self._actions, self._events
        while True:
            commands = core.handle(event, self._loop.now)
            if self._observe is not None:
                self._observe(self._name, core, event, commands)
            for command in commands:
                actions[type(command)](command)
            if not events:
                break
            event = events.popleft()
        self._handling = False
        deadline, wakes = core.deadline(), self._wakes
        if deadline is not None and (not wakes or deadline < wakes[-1]):
            self._arm(deadline)

    def stop(self) -> None:
        """The process died: nothing is handled any more."""
        self.alive = False
        self._events.clear()

    def _arm(self, deadline: int) -> None:
        self._wakes.append(deadline)
        self._loop.at(deadline, self._wake)

    def _wake(self) -> None:
        wakes = self._wakes
        wakes.pop()
        deadline = self.core.deadline()
        if not self.alive or deadline is None:
            return
        if deadline <= self._loop.now:
            self.handle(self._tick)
        elif not wakes or deadline < wakes[-1]:
            self._arm(deadline)
