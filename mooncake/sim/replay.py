"""A trace through the simulated cluster, streamed: requests are drawn as they arrive, measured as they end, and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from mooncake.core.types import NANOS_PER_S, Slo
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.collect import Collector
from mooncake.sim.frontend import SimRequest
from mooncake.sim.samples import InstanceSeries, LinkSeries, Sampler, step_ns
from mooncake.sim.workload import START_NS

_MARGIN_NS = 60 * NANOS_PER_S
"""Beyond the last request's deadline: by then every request has ended, or something is wrong."""


class Progress(NamedTuple):
    """How far a replay is, in virtual time and in requests that ended."""

    now_s: float
    num_ended: int


class InstanceTotals(msgspec.Struct, frozen=True):
    """busy_share: of the time from the first arrival to the last end. loaded_tokens: from the store."""

    name: str
    role: str
    node: str
    busy_share: float
    computed_tokens: int
    loaded_tokens: int
    num_preempted: int


class NodeTotals(msgspec.Struct, frozen=True):
    """Of a store node, counters since its start; bytes are those at the end."""

    name: str
    counters: dict[str, int]


class Replay(msgspec.Struct, frozen=True):
    """What came of it. bin_ns: step of all series; num_requests: those that arrived, ended or not."""

    collector: Collector
    duration_ns: int
    bin_ns: int
    num_requests: int
    num_events: int
    instances: list[InstanceTotals]
    nodes: list[NodeTotals]
    load: list[InstanceSeries]
    links: list[LinkSeries]


def run_replay(
    config: ClusterConfig,
    requests: Iterator[SimRequest],
    span_ns: int,
    *,
    seed: int = 0,
    slo: Slo | None = None,
    timeout_ns: int = 600 * NANOS_PER_S,
    write: Callable[[bytes], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> Replay:
    """span_ns: from the first to the last arrival, about; it sets the step of what is looked at over time. write: as in
    `Collector`. A pure function of its arguments."""
    cluster = SimCluster(config, seed)
    step = step_ns(span_ns)
    collector = Collector(slo or Slo(), config.cost, step, write)

    def looked(now: int) -> None:
        if on_progress is not None:
            on_progress(Progress((now - START_NS) / NANOS_PER_S, collector.num_ended))

    sampler = Sampler(cluster, step, looked)
    sampler.start(START_NS)
    for instance in cluster.instances.values():
        instance.on_load = collector.note_load
    cluster.feed(requests, collector.note_end)
    cluster.run(START_NS + span_ns + timeout_ns + _MARGIN_NS)
    duration = collector.last_ns - START_NS
    return Replay(
        collector=collector,
        duration_ns=duration,
        bin_ns=step,
        num_requests=cluster.num_submitted,
        num_events=cluster.loop.num_events,
        instances=[_totals(cluster, name, duration) for name in cluster.instances],
        nodes=[NodeTotals(name, node.core.metrics()) for name, node in cluster.nodes.items()],
        load=sampler.instances(),
        links=sampler.links(),
    )


def _totals(cluster: SimCluster, name: str, duration: int) -> InstanceTotals:
    instance = cluster.instances[name]
    info, engine = instance.info, instance.engine
    return InstanceTotals(
        name=name,
        role=info.role.value,
        node=info.node,
        busy_share=round(engine.busy_ns / duration, 6) if duration else 0.0,
        computed_tokens=engine.core.num_computed_tokens,
        loaded_tokens=engine.core.num_loaded_tokens,
        num_preempted=engine.core.num_preempted,
    )
