"""The report of a replay as text for people, and its progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TextIO

from mooncake.plan.tables import count, duration, number, objective, share, size, table
from mooncake.sim.replay import Progress
from mooncake.sim.report import Distribution, Report, Setup

_TERMINAL_S = 0.1
_FILE_S = 10.0
"""How often progress is shown."""


def report_text(report: Report) -> str:
    lines = [*_title(report.setup), "", *table(_latency_rows(report))]
    lines += ["", *table(_request_rows(report)), "", *table(_reuse_rows(report)), "", *table(_instance_rows(report))]
    lines += ["", *_definitions(report)]
    return "\n".join(lines)


def _title(setup: Setup) -> Iterator[str]:
    trace, cluster = setup.trace, setup.cluster
    part = f"the first {setup.limit:,} of " if setup.limit is not None and setup.limit < trace.num_requests else ""
    yield f"{trace.path}: {part}{trace.num_requests:,} requests in {trace.span_s:,.0f} s, at {setup.speed:g} times the speed"
    yield (
        f"{pools(setup)} on {cluster.hardware}, {cluster.model}: policy {cluster.policy}, {admission(setup)}, "
        f"blocks of {cluster.block_tokens} tokens"
    )
    yield (
        f"each: KV room {cluster.kv_tokens_per_instance:,} tokens, store {size(cluster.store_bytes_per_node)} "
        f"({cluster.eviction}), "
        f"network {size(cluster.nic_bytes_per_s)}/s, host to GPU {size(cluster.host_bytes_per_s)}/s"
    )
    if cluster.ssd_bytes_per_node:
        yield f"      and an SSD tier of {size(cluster.ssd_bytes_per_node)}, {size(cluster.ssd_bytes_per_s)}/s"
    yield f"objectives: TTFT {objective(setup.ttft_slo_s)}, TBT {objective(setup.tbt_slo_s)}; seed {setup.seed}"
    yield from (f"note: {note}" for note in setup.notes)


def admission(setup: Setup) -> str:
    cluster = setup.cluster
    return (
        "admission off" if cluster.admission == "off" else f"admission {cluster.admission} by {cluster.admission_rule}"
    )


def pools(setup: Setup) -> str:
    cluster = setup.cluster
    if cluster.colocated:
        return f"{cluster.colocated} colocated"
    return f"{cluster.prefill} prefill + {cluster.decode} decode"


def _latency_rows(report: Report) -> Iterator[list[str]]:
    latency = report.latency
    yield ["", "mean", "p50", "p90", "p99", "max"]
    yield ["TTFT", *_cells(latency.ttft_ms)]
    yield ["  of it network", *_cells(latency.network_ms)]
    yield ["TBT", *_cells(latency.tbt_ms)]
    yield ["hand-over gap", *_cells(latency.handover_ms)]
    yield ["ITL of requests", *_cells(latency.itl_ms)]
    yield ["gaps, all of them", *_cells(latency.gap_ms)]
    yield ["latency", *_cells(latency.latency_ms)]


def _cells(distribution: Distribution) -> list[str]:
    values = (distribution.mean, distribution.p50, distribution.p90, distribution.p99, distribution.max)
    return [duration(value) for value in values]


def _request_rows(report: Report) -> Iterator[list[str]]:
    requests, service, cost = report.requests, report.service, report.cost
    outcomes = ", ".join(f"{outcome or 'running'} {number:,}" for outcome, number in requests.outcomes.items())
    yield ["requests", f"{count(requests.total)} ({outcomes})"]
    if requests.wasted_prefills:
        yield ["prefills for nothing", count(requests.wasted_prefills)]
    if requests.unfinished:
        yield ["unfinished", count(requests.unfinished)]
    yield ["effective request capacity", f"{share(service.effective_share)} ({count(requests.effective)})"]
    yield ["goodput", f"{number(service.goodput_per_s)} requests/s over {service.duration_s:,.0f} s"]
    yield ["output", f"{number(service.output_tokens_per_s)} tokens/s"]
    ratios = (
        ("p10", report.prediction.ratio_p10),
        ("p50", report.prediction.ratio_p50),
        ("p90", report.prediction.ratio_p90),
    )
    shown = [f"{name} {number(ratio)}" for name, ratio in ratios]
    yield ["predicted / actual TTFT", ", ".join(shown)]
    yield ["cost", f"{cost.gpu_hours:,.1f} GPU-hours of {cost.num_gpus} GPUs"]
    if cost.usd_per_gpu_hour is not None:
        prices = (cost.usd_per_million_tokens, cost.usd_per_million_output_tokens)
        tokens, outputs = ("-" if price is None else f"${price:,.3f}" for price in prices)
        yield [
            f"  at ${cost.usd_per_gpu_hour:.2f} an hour",
            f"{tokens} per million effective tokens, {outputs} per million of output",
        ]


def _reuse_rows(report: Report) -> Iterator[list[str]]:
    reuse = report.reuse
    yield ["hit rate by token", share(reuse.hit_rate_by_token)]
    yield ["by block, mean of requests", f"{share(reuse.hit_rate_by_block)}, {share(reuse.hit_rate_per_request)}"]
    total = sum(reuse.tokens.values()) or 1
    yield ["input tokens", ", ".join(f"{tier} {share(tokens / total)}" for tier, tokens in reuse.tokens.items())]
    yield ["prefill GPU time", f"{number(reuse.prefill_gpu_s)} s per request"]


def _instance_rows(report: Report) -> Iterator[list[str]]:
    yield ["pool", "busy, least", "mean", "most", "computed tokens", "loaded tokens", "preempted"]
    for role in dict.fromkeys(instance.role for instance in report.instances):
        pool = [instance for instance in report.instances if instance.role == role]
        busy = [instance.busy_share for instance in pool]
        totals = (
            sum(instance.computed_tokens for instance in pool),
            sum(instance.loaded_tokens for instance in pool),
            sum(instance.num_preempted for instance in pool),
        )
        shares = (min(busy), sum(busy) / len(busy), max(busy))
        yield [f"{len(pool)} {role}", *map(share, shares), *map(count, totals)]


def _definitions(report: Report) -> Iterator[str]:
    yield "definitions"
    for word, meaning in report.definitions.items():
        yield f"  {word}: {meaning}"


class ProgressLine:
    """One line that is written over on a terminal; elsewhere a line now and then."""

    def __init__(self, out: TextIO, total: int, span_s: float) -> None:
        self._out = out
        self._total = total
        self._span_s = span_s
        self._terminal = out.isatty()
        self._began = self._shown = time.monotonic()

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._shown < (_TERMINAL_S if self._terminal else _FILE_S):
            return
        self._shown = now
        rate = progress.num_ended / (now - self._began)
        text = (
            f"replaying: {progress.num_ended:,} of {self._total:,} requests, "
            f"{progress.now_s:,.0f} of {self._span_s:,.0f} s, {rate:,.0f} requests/s"
        )
        self._out.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        self._out.flush()

    def clear(self) -> None:
        if self._terminal:
            self._out.write("\r\x1b[K")
            self._out.flush()
