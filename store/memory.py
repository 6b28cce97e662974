"""A store without processes and sockets: the same core, the same client calls, a segment in this process's memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.errors import BadArgument, StoreUnavailable
from mooncake.store.core import StoreCore
from mooncake.store.events import ClientGone, Command, Event, Fault, NodeReport, Reply, Request, Tick
from mooncake.store.handles import Link
from mooncake.store.operations import StoreOperations
from mooncake.transport.memory import MemoryTransport

CAPACITY_BYTES = 64 << 20


class MemoryNode:
    """The node that the clients of one process share. `on_report` gets Reports and Snapshots."""

    def __init__(
        self,
        capacity_bytes: int = CAPACITY_BYTES,
        *,
        core: StoreCore | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        on_report: Callable[[NodeReport], None] = lambda report: None,
    ) -> None:
        self.core = core or StoreCore(capacity_bytes, epoch=1)
        self._transport = MemoryTransport()
        self._registration = self._transport.register(bytearray(capacity_bytes))
        self._clock = clock
        self._on_report = on_report
        self._clients = itertools.count(1)

    def attach(self) -> tuple[int, Link]:
        path = self._transport.open(self._registration.region)
        return next(self._clients), Link(path, charges_tenants=bool(self.core.tenants()))

    def handle(self, event: Event) -> list[Command]:
        """What came of the event, reports excepted. Deadlines that passed since the last event pass first."""
        now = self._clock()
        commands: list[Command] = []
        deadline = self.core.deadline()
        if deadline is not None and deadline <= now:
            commands += self.core.handle(Tick(), now)
        commands += self.core.handle(event, now)
        for command in commands:
            if isinstance(command, NodeReport):
                self._on_report(command)
        return [command for command in commands if not isinstance(command, NodeReport)]


class MemoryStore(StoreOperations):
    """A client of a MemoryNode, of its own if none is given."""

    def __init__(self, node: MemoryNode | None = None) -> None:
        self.node = node or MemoryNode()
        self._client, self._link = self.node.attach()

    async def close(self) -> None:
        self._link.lose("closed")
        self.node.handle(ClientGone(self._client))

    def _link_or_raise(self) -> Link:
        if self._link.lost is not None:
            raise StoreUnavailable("the client is closed")
        return self._link

    async def _call(self, request: Request, deadline_s: float) -> Any:
        self._link_or_raise()
        [answer] = self.node.handle(msgspec.structs.replace(request, client=self._client))
        if isinstance(answer, Fault):
            raise BadArgument(answer.detail)
        assert isinstance(answer, Reply)
        return answer.results
