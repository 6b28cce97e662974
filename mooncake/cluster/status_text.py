"""An `Overview` as text: what `mooncake status` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mooncake.core.messages import InstanceStatus, NodeStatus
from mooncake.core.types import NANOS_PER_MS
from mooncake.frontend.outcomes import Objective
from mooncake.frontend.overview import Cluster, Overview

_NO_VALUE = "-"


def status_text(status: Overview) -> str:
    return "\n".join(_lines(status))


def _lines(status: Overview) -> Iterator[str]:
    state = "ready" if status.ready else "not ready"
    yield f"mooncake {status.name}: {status.model}, {status.frontend} {state}, up {_duration(status.uptime_s)}"
    if status.detail:
        yield f"  {status.detail}"
    yield ""
    yield from _request_lines(status)
    if status.cluster is not None:
        yield from _cluster_lines(status.cluster)


def _request_lines(status: Overview) -> Iterator[str]:
    requests = status.requests
    failed = ", ".join(f"{count} {reason}" for reason, count in requests.failures.items())
    rates = f"{requests.requests_per_s:.1f}/s, {requests.output_tokens_per_s:.0f} output tokens/s"
    yield f"requests    {rates}, {status.num_running} under way"
    yield (
        f"last {_duration(requests.window_s):<6} {requests.num_ended} ended{f' ({failed})' if failed else ''}, "
        f"{_percent(requests.reuse)} of their prompt tokens reused"
    )
    yield _objective_line("TTFT", requests.ttft)
    yield _objective_line("TBT", requests.tbt)


def _objective_line(name: str, objective: Objective) -> str:
    times = ", ".join(f"{label} {_ms(ms)}" for label, ms in _percentiles(objective))
    if not objective.num:
        return f"{name:<11} no request had an objective; {times}"
    default = "" if objective.default_ms is None else f" (by default {_ms(objective.default_ms)})"
    return f"{name:<11} {_percent(objective.met)} of {objective.num} met their objective{default}; {times}"


def _percentiles(objective: Objective) -> list[tuple[str, float | None]]:
    return [("p50", objective.p50_ms), ("p90", objective.p90_ms), ("p99", objective.p99_ms)]


def _cluster_lines(cluster: Cluster) -> Iterator[str]:
    yield f"queue       {cluster.num_waiting} wait for an instance, {cluster.num_bookings} placed and not over"
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in cluster.counts.items())
    yield f"conductor   policy {cluster.policy}; since its start: {counts or 'nothing placed'}"
    reused, prompt = cluster.reused, cluster.reused.prompt
    tiers = [("hbm", reused.hbm), ("dram", reused.dram), ("ssd", reused.ssd)]
    rates = ", ".join(f"{tier} {_percent(count / prompt if prompt else None)}" for tier, count in tiers)
    yield f"hit rate    {rates} of {prompt} prompt tokens, since the instances started"
    yield ""
    yield from table(_INSTANCE_HEAD, [_instance_row(each) for each in cluster.instances])
    if cluster.nodes:
        yield ""
        yield from table(_NODE_HEAD, [_node_row(each) for each in cluster.nodes])


_INSTANCE_HEAD = ("instance", "role", "state", ">waiting", ">running", ">pages", ">tokens/s", ">step", ">prefill queue")
_NODE_HEAD = ("store node", "state", ">blocks", ">dram", ">ssd", ">NIC out", ">NIC in", ">SSD busy")


def _instance_row(each: InstanceStatus) -> tuple[str, ...]:
    return (
        each.name,
        each.role,
        each.state,
        str(each.num_waiting),
        f"{each.num_running}/{each.max_batch}",
        f"{each.used_pages}/{each.num_pages}",
        f"{each.tokens_per_s:.0f}",
        _ms(each.step_ns / NANOS_PER_MS),
        _ms(each.queue_ns / NANOS_PER_MS),
    )


def _node_row(each: NodeStatus) -> tuple[str, ...]:
    tiers = {tier.tier: f"{_mib(tier.used_bytes)}/{_mib(tier.capacity_bytes)} MiB" for tier in each.tiers}
    busy = [_ms(ns / NANOS_PER_MS) for ns in (each.out_ns, each.in_ns, each.ssd_ns)]
    state = "ready" if each.connected else "lost"
    return each.name, state, str(each.num_blocks), tiers.get("dram", _NO_VALUE), tiers.get("ssd", _NO_VALUE), *busy


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """head: names of the columns; those that begin with > are of numbers, and aligned to the right."""
    names = [name.removeprefix(">") for name in head]
    widths = [max(len(row[column]) for row in (names, *rows)) for column in range(len(head))]
    for row in (names, *rows):
        cells = [
            f"{cell:>{width}}" if name.startswith(">") else f"{cell:<{width}}"
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _ms(ms: float | None) -> str:
    if ms is None:
        return _NO_VALUE
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.1f} ms" if ms < 100 else f"{ms:.0f} ms"


def _mib(num_bytes: int) -> int:
    return num_bytes >> 20


def _percent(share: float | None) -> str:
    return _NO_VALUE if share is None else f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"
