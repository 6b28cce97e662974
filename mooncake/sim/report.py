"""The report of a run: plain values that print, compare and become JSON. Live runs and replays share it.

Definitions are those of `mooncake.core.stats`; `DEFINITIONS` says them in words, for whoever reads a report.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Slo
from mooncake.sim.collect import TIERS, Collector
from mooncake.sim.replay import InstanceTotals, NodeTotals, Replay
from mooncake.sim.samples import LinkSeries

VERSION = 1
SHARES = (0.5, 0.9, 0.99)
GIGA = 1e9

DEFINITIONS = {
    "TTFT": "request start to its first token at the client: computed, plus the network term, which is shown apart",
    "ITL": "(latency - TTFT) / (output tokens - 1), of each request; gaps: the pool of all single gaps",
    "TBT": "mean of the ceil(0.1 x gaps) longest token gaps of a request; the hand-over gap counts; no gap means met",
    "effective": "completed with TTFT and TBT within their objectives; rejected, failed and unfinished ones are not",
    "effective request capacity": "effective requests as a share of all",
    "goodput": "effective requests per second, from the first arrival to the last end",
    "hit rate": "reused / input tokens of requests with a first token; also by block and as mean per request; no warm-up is "
    "taken off",
    "GPU time": "of prefill, per request: time of computing the tokens that were not reused, by the time model",
    "cost": "GPU-hours of all instances from the first arrival to the last end; tokens are input and output of effective "
    "requests",
}


class Distribution(msgspec.Struct, frozen=True):
    """Milliseconds; percentiles are values that occur. None: there was nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, times_ns: np.ndarray) -> Distribution:
        """NaN: none of that request."""
        ordered = np.sort(times_ns[~np.isnan(times_ns)])
        number = len(ordered)
        if not number:
            return cls(None, None, None, None, None)
        places = [max(0, math.ceil(share * number) - 1) for share in SHARES]
        p50, p90, p99 = (_ms(float(ordered[place])) for place in places)
        return cls(_ms(math.fsum(ordered) / number), p50, p90, p99, _ms(float(ordered[-1])))


class Latencies(msgspec.Struct, frozen=True):
    """handover_ms: the gap after the first token, of requests that another instance decodes."""

    ttft_ms: Distribution
    network_ms: Distribution
    tbt_ms: Distribution
    handover_ms: Distribution
    itl_ms: Distribution
    gap_ms: Distribution
    latency_ms: Distribution


class Requests(msgspec.Struct, frozen=True):
    """total: that arrived. outcomes: by how they ended. wasted_prefills: of requests that were prefilled and not completed."""

    total: int
    completed: int
    effective: int
    rejected: int
    failed: int
    unfinished: int
    wasted_prefills: int
    outcomes: dict[str, int]
    num_retries: int


class Service(msgspec.Struct, frozen=True):
    """effective_share: the effective request capacity."""

    duration_s: float
    effective_share: float | None
    goodput_per_s: float | None
    requests_per_s: float | None
    output_tokens_per_s: float | None


class Reuse(msgspec.Struct, frozen=True):
    """Of requests with a first token. tokens: input tokens by where their KV came from. prefill_gpu_s: mean of a request."""

    hit_rate_by_token: float | None
    hit_rate_by_block: float | None
    hit_rate_per_request: float | None
    tokens: dict[str, int]
    prefill_gpu_s: float | None


class Predictions(msgspec.Struct, frozen=True):
    """TTFT as predicted at the placement over what it was from there: 1 is right."""

    ratio_p10: float | None
    ratio_p50: float | None
    ratio_p90: float | None
    mean_relative_error: float | None


class Cost(msgspec.Struct, frozen=True):
    """usd: at usd_per_gpu_hour. None: nothing was effective, or the price is not known."""

    num_gpus: int
    gpu_hours: float
    usd_per_gpu_hour: float | None
    usd: float | None
    effective_tokens: int
    usd_per_million_tokens: float | None
    usd_per_million_output_tokens: float | None


class LinkUse(msgspec.Struct, frozen=True):
    """mean_use, peak_use: share of a step of time in which it passed bytes."""

    name: str
    gigabytes: float
    gigabytes_per_s: float
    mean_use: float
    peak_use: float


class TraceSection(msgspec.Struct, frozen=True):
    """Of the file; span_s and tokens are those of the whole of it."""

    path: str
    format: str
    synthetic: bool
    block_tokens: int | None
    num_requests: int
    num_skipped: int
    span_s: float
    input_tokens: int
    output_tokens: int
    clock_step_s: float | None


class ClusterSection(msgspec.Struct, frozen=True):
    prefill: int
    decode: int
    colocated: int
    nodes: int
    hardware: str
    model: str
    block_tokens: int
    kv_tokens_per_instance: int
    store_bytes_per_node: int
    eviction: str
    ssd_bytes_per_node: int
    ssd_bytes_per_s: float
    nic_bytes_per_s: float
    host_bytes_per_s: float
    max_batch: int
    max_step_tokens: int
    policy: str
    admission: str
    admission_rule: str


class Setup(msgspec.Struct, frozen=True):
    """What was run, and what was assumed."""

    trace: TraceSection
    cluster: ClusterSection
    speed: float
    jitter_s: float
    limit: int | None
    seed: int
    ttft_slo_s: float | None
    tbt_slo_s: float | None
    reuse: bool
    num_gpus: int
    usd_per_gpu_hour: float | None
    notes: list[str]


class Report(msgspec.Struct, frozen=True):
    version: int
    setup: Setup
    requests: Requests
    service: Service
    latency: Latencies
    reuse: Reuse
    prediction: Predictions
    cost: Cost
    instances: list[InstanceTotals]
    nodes: list[NodeTotals]
    links: list[LinkUse]
    definitions: dict[str, str]


def make_report(replay: Replay, setup: Setup) -> Report:
    collector = replay.collector
    return Report(
        version=VERSION,
        setup=setup,
        requests=_requests(replay),
        service=_service(replay),
        latency=_latencies(collector),
        reuse=_reuse(collector, setup.cluster.block_tokens),
        prediction=_predictions(collector),
        cost=_cost(replay, setup),
        instances=replay.instances,
        nodes=replay.nodes,
        links=[_link_use(link) for link in replay.links if link.num_bytes],
        definitions=DEFINITIONS,
    )


def effective_share(replay: Replay, slo: Slo, *, handover: bool = True) -> float | None:
    """The effective request capacity under other objectives than those it ran with: only if nothing was refused for these.
    handover: whether the gap there counts, as it should; without it one sees what it costs."""
    collector = replay.collector
    tbt = (collector.tbt if handover else collector.later_tbt).values()
    met = collector.completed.values() > 0
    if slo.ttft_ns is not None:
        met = met & (collector.ttft.values() <= slo.ttft_ns)
    if slo.tbt_ns is not None:
        met = met & ~(tbt > slo.tbt_ns)  # no gap: met
    return _share(int(met.sum()), replay.num_requests)


# ------------------------------------------------------------ parts


def _requests(replay: Replay) -> Requests:
    collector = replay.collector
    completed, ended = int(collector.completed.values().sum()), collector.num_ended
    rejected = collector.outcomes["overloaded"]
    return Requests(
        total=replay.num_requests,
        completed=completed,
        effective=int(collector.effective.values().sum()),
        rejected=rejected,
        failed=ended - completed - rejected,
        unfinished=replay.num_requests - ended,
        wasted_prefills=collector.num_wasted,
        outcomes=dict(sorted(collector.outcomes.items())),
        num_retries=collector.num_retries,
    )


def _service(replay: Replay) -> Service:
    collector, seconds = replay.collector, replay.duration_ns / NANOS_PER_S
    effective = int(collector.effective.values().sum())
    return Service(
        duration_s=round(seconds, 6),
        effective_share=_share(effective, replay.num_requests),
        goodput_per_s=_share(effective, seconds),
        requests_per_s=_share(collector.num_ended, seconds),
        output_tokens_per_s=_share(int(collector.output_tokens.values().sum()), seconds),
    )


def _latencies(collector: Collector) -> Latencies:
    gaps = collector.gaps
    p50, p90, p99, most = (None if value is None else _ms(value) for value in gaps.quantiles([*SHARES, 1.0]))
    mean = _ms(gaps.total_ns / gaps.number) if gaps.number else None
    columns = (collector.ttft, collector.network, collector.tbt, collector.handover, collector.itl)
    ttft, network, tbt, handover, itl = (Distribution.of(column.values()) for column in columns)
    latency = Distribution.of(collector.latency.values())
    return Latencies(ttft, network, tbt, handover, itl, Distribution(mean, p50, p90, p99, most), latency)


def _reuse(collector: Collector, block_tokens: int) -> Reuse:
    begun = ~np.isnan(collector.ttft.values())
    inputs, cached = collector.input_tokens.values()[begun], collector.cached_tokens.values()[begun]
    blocks, hits = inputs // block_tokens, cached // block_tokens
    total, reused = int(inputs.sum()), int(cached.sum())
    prefill = collector.prefill.values()[begun]
    tokens = {tier: collector.total(tier) for tier in TIERS}
    return Reuse(
        hit_rate_by_token=_share(reused, total),
        hit_rate_by_block=_share(int(hits.sum()), int(blocks.sum())),
        hit_rate_per_request=_share(math.fsum(cached / inputs), len(inputs)),
        tokens=tokens | {"computed": total - sum(tokens.values())},
        prefill_gpu_s=_share(math.fsum(prefill) / NANOS_PER_S, len(prefill)),
    )


def _predictions(collector: Collector) -> Predictions:
    predicted, actual = collector.predicted.values(), collector.placed.values()
    known = ~np.isnan(predicted) & (actual > 0)
    ratios = np.sort(predicted[known] / actual[known])
    if not len(ratios):
        return Predictions(None, None, None, None)
    low, middle, high = (float(ratios[max(0, math.ceil(share * len(ratios)) - 1)]) for share in (0.1, 0.5, 0.9))
    error = math.fsum(np.abs(ratios - 1)) / len(ratios)
    return Predictions(round(low, 4), round(middle, 4), round(high, 4), round(error, 4))


def _cost(replay: Replay, setup: Setup) -> Cost:
    collector = replay.collector
    met = collector.effective.values() > 0
    outputs = int(collector.output_tokens.values()[met].sum())
    tokens = outputs + int(collector.input_tokens.values()[met].sum())
    num_gpus = setup.num_gpus * len(replay.instances)
    hours = num_gpus * replay.duration_ns / NANOS_PER_S / 3600
    usd = None if setup.usd_per_gpu_hour is None else hours * setup.usd_per_gpu_hour
    return Cost(
        num_gpus=num_gpus,
        gpu_hours=round(hours, 4),
        usd_per_gpu_hour=setup.usd_per_gpu_hour,
        usd=None if usd is None else round(usd, 4),
        effective_tokens=tokens,
        usd_per_million_tokens=None if usd is None else _share(usd * 1e6, tokens),
        usd_per_million_output_tokens=None if usd is None else _share(usd * 1e6, outputs),
    )


def _link_use(link: LinkSeries) -> LinkUse:
    use = link.use or [0.0]
    mean = round(math.fsum(use) / len(use), 4)
    return LinkUse(link.name, round(link.num_bytes / GIGA, 3), link.bytes_per_s / GIGA, mean, max(use))


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def _ms(time_ns: float) -> float:
    """To the microsecond."""
    return round(time_ns / NANOS_PER_MS, 3)


def clock_note(step_s: float | None, jitter_s: float) -> str:
    """How timestamps were treated."""
    if jitter_s:
        return (
            f"timestamps: each request moved to a random time within {jitter_s:g} s after its own, order kept, seeded"
        )
    if step_s is not None:
        return (
            f"timestamps: as in the file, on a clock of {step_s:g} s, so that many requests come at once; "
            f"--jitter {step_s:g} spreads them"
        )
    return "timestamps: as in the file"
