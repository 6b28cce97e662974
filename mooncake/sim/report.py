"""What came of a run: a plain value that prints and compares. Definitions are those of `mooncake.core.stats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from mooncake.core import stats
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.sim.frontend import RequestRecord


class Distribution(msgspec.Struct, frozen=True):
    """Milliseconds. None: there was nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, times_ns: Iterable[float | None]) -> Distribution:
        values = [time / NANOS_PER_MS for time in times_ns if time is not None]
        return cls(stats.mean(values), *(stats.percentile(values, share) for share in (0.5, 0.9, 0.99)))


class Report(msgspec.Struct, frozen=True):
    """outcomes: requests by how they ended. tbt_ms, itl_ms: of each choice. gap_ms: the pool of single gaps of all choices.
    hit_rate: token-weighted, of completed requests, without warm-up taken off."""

    outcomes: dict[str, int]
    ttft_ms: Distribution
    tbt_ms: Distribution
    itl_ms: Distribution
    gap_ms: Distribution
    output_tokens: int
    num_retries: int
    hit_rate: float | None
    effective_share: float | None
    goodput_per_s: float | None


def outcome_of(record: RequestRecord) -> stats.Outcome:
    request = record.request
    return stats.Outcome(
        request.arrival_ns, record.times, record.completed, request.num_tokens, record.cached_tokens, request.slo
    )


def make_report(records: Sequence[RequestRecord], duration_ns: int) -> Report:
    outcomes = [outcome_of(record) for record in records]
    times = [choice.times for record in records for choice in record.choices]
    return Report(
        outcomes=dict(sorted(Counter(record.outcome for record in records).items())),
        ttft_ms=Distribution.of(stats.ttft(o.received, o.token_times) for o in outcomes),
        tbt_ms=Distribution.of(map(stats.tbt, times)),
        itl_ms=Distribution.of(map(stats.itl, times)),
        gap_ms=Distribution.of(gap for each in times for gap in stats.gaps(each)),
        output_tokens=sum(map(len, times)),
        num_retries=sum(max(0, record.num_attempts - 1) for record in records),
        hit_rate=stats.hit_rate(outcomes),
        effective_share=stats.effective_share(outcomes),
        goodput_per_s=stats.goodput(outcomes, duration_ns / NANOS_PER_S) if duration_ns else None,
    )
