"""How a simulated cluster is loaded over time: every instance and every link, looked at in even steps of virtual time.

Counters of busy time are read, so that nothing between two looks is missed. What a link was given counts at once, and is dealt
out to the steps that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from mooncake.core.types import NANOS_PER_S
from mooncake.sim.cluster import SimCluster
from mooncake.sim.instance import SimInstance
from mooncake.sim.links import Link

STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
NUM_MAX = 160
"""Steps over the span of a trace, about; more than a plot can show would only make the report larger."""


def step_ns(span_ns: int) -> int:
    """Between two looks."""
    wanted = span_ns / NANOS_PER_S / NUM_MAX
    return next((step for step in STEPS_S if step >= wanted), STEPS_S[-1]) * NANOS_PER_S


class InstanceSeries(msgspec.Struct, frozen=True):
    """busy: share of the step before; running, waiting: sequences; kv: share of the pages in use."""

    name: str
    role: str
    node: str
    busy: list[float]
    running: list[int]
    waiting: list[int]
    kv: list[float]


class LinkSeries(msgspec.Struct, frozen=True):
    """use: share of the step before in which it passed bytes."""

    name: str
    bytes_per_s: float
    num_bytes: int
    use: list[float]


class _InstanceLooks:
    def __init__(self, instance: SimInstance) -> None:
        self.instance = instance
        self.busy_ns: list[int] = []
        self.running: list[int] = []
        self.waiting: list[int] = []
        self.kv: list[float] = []

    def look(self) -> None:
        engine = self.instance.engine
        load, num_pages = engine.core.load, engine.core.pool.num_pages
        self.busy_ns.append(engine.busy_so_far_ns)
        self.running.append(load.num_running)
        self.waiting.append(self.instance.num_waiting)
        self.kv.append(round(1 - load.free_pages / num_pages, 4))

    def series(self, step: int) -> InstanceSeries:
        info = self.instance.info
        busy = [round(growth / step, 4) for growth in _growth(self.busy_ns)]
        return InstanceSeries(info.name, info.role.value, info.node, busy, self.running, self.waiting, self.kv)


class Sampler:
    """on_look: told of each look, for progress."""

    def __init__(self, cluster: SimCluster, step: int, on_look: Callable[[int], None] | None = None) -> None:
        self.step = step
        self._cluster = cluster
        self._on_look = on_look
        self._instances = [_InstanceLooks(instance) for instance in cluster.instances.values()]
        self._links = list(_links(cluster))
        self._link_busy: list[list[int]] = [[] for _ in self._links]

    def start(self, at: int) -> None:
        """The first step begins at that time."""
        self._cluster.loop.at(at + self.step, self._look)

    def _look(self) -> None:
        for looks in self._instances:
            looks.look()
        for link, busy in zip(self._links, self._link_busy, strict=True):
            busy.append(link.busy_ns)
        loop = self._cluster.loop
        if self._on_look is not None:
            self._on_look(loop.now)
        loop.after(self.step, self._look)

    def instances(self) -> list[InstanceSeries]:
        return [looks.series(self.step) for looks in self._instances]

    def links(self) -> list[LinkSeries]:
        return [
            LinkSeries(link.name, link.bytes_per_s, link.num_bytes, spread_on(_growth(busy), self.step))
            for link, busy in zip(self._links, self._link_busy, strict=True)
        ]


def spread_on(amounts: list[int], step: int) -> list[float]:
    """Shares of the step; what does not fit into one is done in those after it."""
    shares = []
    rest = 0
    for amount in amounts:
        rest += amount
        done = min(rest, step)
        shares.append(round(done / step, 4))
        rest -= done
    return shares


def _growth(counter: list[int]) -> list[int]:
    return [after - before for before, after in zip([0, *counter], counter, strict=False)]


def _links(cluster: SimCluster) -> Iterable[Link]:
    for node in cluster.nodes.values():
        yield from (node.memory, node.nic_in, node.nic_out)
        if node.config.ssd_bytes:
            yield node.ssd
