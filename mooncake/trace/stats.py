"""What a trace is like, in one pass over its requests.

Hit rates here are those of one cache that never evicts: what a prompt could reuse of all earlier ones, under the prefix rule
(reuse stops at the first block that is not there). Memory grows with what must be exact: distinct lengths, and distinct blocks
up to a bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile

import msgspec
import numpy as np

from mooncake.core.types import NANOS_PER_S
from mooncake.trace.types import TraceRequest

BLOCKS_MAX = 50_000_000
"""Distinct blocks counted, about 4 GB. Reuse is that of the requests up to there, and says how many they are."""
GAPS_MAX = 100_000
"""Gaps that the search for a clock's step looks at."""
GAPS_MIN = 20
"""With fewer, any trace would seem to have a step."""
STEP_SHARE_OF_GAP = 0.1
"""A clock whose step is shorter than this share of the mean gap distorts nothing."""
ON_STEP = 0.01
"""How far from a whole number of steps a gap may be, in steps."""
STEP_SHARE_OF_GAPS = 0.95
"""Of gaps that must be a whole number of steps."""
MINUTE_NS = 60 * NANOS_PER_S


class Lengths(msgspec.Struct, frozen=True):
    """Percentiles are values that occur: the smallest that at least that share does not exceed."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    total: int


class Arrivals(msgspec.Struct, frozen=True):
    """Rates are per second of the span from first to last request, None if that is zero. cv: standard deviation over mean of
    the gaps between successive requests, 1 for a Poisson process. minute_dispersion: variance over mean of requests per
    minute, also 1 for a Poisson process; it shows slow swings, which the gaps do not. step_s: of a coarse clock, None for a
    fine one."""

    span_s: float
    requests_per_s: float | None
    input_tokens_per_s: float | None
    output_tokens_per_s: float | None
    cv: float | None
    minute_dispersion: float | None
    peak_per_s: int
    peak_at_once: int
    step_s: float | None


class DepthReuse(msgspec.Struct, frozen=True):
    """share_hit: of all requests, those that reuse at least `depth` blocks. share_long: those that have that many."""

    depth: int
    share_hit: float
    share_long: float


class Reuse(msgspec.Struct, frozen=True):
    """Of the first num_requests requests; is_complete: that is all, the bound on blocks was not met. most_shared: requests with
    the most shared block. Hit rates of an infinite cache: by token (reused over input tokens), by block, and mean of each
    request's share of tokens."""

    num_requests: int
    is_complete: bool
    num_references: int
    num_blocks: int
    single_use_share: float
    most_shared: int
    hit_rate_by_token: float
    hit_rate_by_block: float
    hit_rate_per_request: float
    matched_blocks: Lengths
    by_depth: tuple[DepthReuse, ...]


class TraceStats(msgspec.Struct, frozen=True):
    """reuse: None where the format says nothing of prefixes."""

    num_requests: int
    input_length: Lengths
    output_length: Lengths
    arrivals: Arrivals
    reuse: Reuse | None


def trace_stats(requests: Iterable[TraceRequest], block_tokens: int | None) -> TraceStats | None:
    """block_tokens: of the trace's format. None without requests."""
    inputs: Counter[int] = Counter()
    outputs: Counter[int] = Counter()
    arrivals = _ArrivalCounter()
    reuse = _ReuseCounter(block_tokens) if block_tokens else None
    for request in requests:
        inputs[request.input_length] += 1
        outputs[request.output_length] += 1
        arrivals.add(request.arrival_ns)
        if reuse is not None:
            reuse.add(request)
    if not inputs:
        return None
    input_length, output_length = lengths_of(inputs), lengths_of(outputs)
    return TraceStats(
        inputs.total(),
        input_length,
        output_length,
        arrivals.result(input_length.total, output_length.total),
        reuse.result() if reuse is not None else None,
    )


def lengths_of(counts: Counter[int]) -> Lengths:
    """From how often which length occurs."""
    values = np.array(sorted(counts), dtype=np.int64)
    reached = np.cumsum([counts[int(value)] for value in values])
    number, total = int(reached[-1]), sum(value * count for value, count in counts.items())
    places = np.searchsorted(reached, [math.ceil(share * number) for share in (0.5, 0.9, 0.99)])
    p50, p90, p99 = (int(value) for value in values[places])
    return Lengths(total / number, p50, p90, p99, int(values[-1]), total)


def clock_step(gaps_ns: np.ndarray, mean_gap_ns: float) -> int | None:
    """The step of a coarse clock, in nanoseconds, from gaps that are not zero. None: the clock is fine enough.

    Either all gaps are multiples of a step that is long beside the mean gap; or nearly all lie close to multiples of the
    median, as when a timer that fires every 3 s is read to a millisecond."""
    if len(gaps_ns) < GAPS_MIN:
        return None
    step = int(np.gcd.reduce(gaps_ns))
    if step >= STEP_SHARE_OF_GAP * mean_gap_ns:
        return step
    median = float(np.median(gaps_ns))
    steps = gaps_ns / median
    is_on_step = np.abs(steps - np.round(steps)) <= ON_STEP
    return round(median) if is_on_step.mean() >= STEP_SHARE_OF_GAPS else None


class _Bins:
    """How many requests fall into each stretch of time; only the current one is open."""

    def __init__(self, width_ns: int) -> None:
        self._width_ns = width_ns
        self._current = 0
        self._count = 0
        self._peak = 0
        self._total = 0
        self._sum_squares = 0

    def add(self, at_ns: int) -> None:
        current = at_ns // self._width_ns
        if current != self._current:
            self._peak = max(self._peak, self._count)
            self._total += self._count
            self._sum_squares += self._count * self._count
            self._current, self._count = current, 0
        self._count += 1

    def peak(self) -> int:
        return max(self._peak, self._count)

    def dispersion(self) -> float | None:
        """Variance over mean of the counts of all whole stretches; the last is not whole and counts for nothing."""
        if not self._total:
            return None
        mean = self._total / self._current
        return (self._sum_squares / self._current - mean * mean) / mean


class _ArrivalCounter:
    def __init__(self) -> None:
        self._number = 0
        self._first = 0
        self._latest = 0
        self._sum_squares = 0
        self._at_once = 0
        self._peak_at_once = 0
        self._gaps: list[int] = []
        self._seconds = _Bins(NANOS_PER_S)
        self._minutes = _Bins(MINUTE_NS)

    def add(self, at_ns: int) -> None:
        if not self._number:
            self._first = self._latest = at_ns
        gap = at_ns - self._latest
        self._number += 1
        self._latest = at_ns
        self._sum_squares += gap * gap
        self._at_once = 1 if gap else self._at_once + 1
        self._peak_at_once = max(self._peak_at_once, self._at_once)
        if gap and len(self._gaps) < GAPS_MAX:
            self._gaps.append(gap)
        self._seconds.add(at_ns - self._first)
        self._minutes.add(at_ns - self._first)

    def result(self, input_tokens: int, output_tokens: int) -> Arrivals:
        span_ns = self._latest - self._first
        span_s = span_ns / NANOS_PER_S
        mean_gap = span_ns / (self._number - 1) if self._number > 1 else 0.0
        step = clock_step(np.array(self._gaps, dtype=np.int64), mean_gap)
        variance = self._sum_squares / (self._number - 1) - mean_gap * mean_gap if mean_gap else 0.0
        return Arrivals(
            span_s=span_s,
            requests_per_s=self._number / span_s if span_ns else None,
            input_tokens_per_s=input_tokens / span_s if span_ns else None,
            output_tokens_per_s=output_tokens / span_s if span_ns else None,
            cv=math.sqrt(max(0.0, variance)) / mean_gap if mean_gap else None,
            minute_dispersion=self._minutes.dispersion(),
            peak_per_s=self._seconds.peak(),
            peak_at_once=self._peak_at_once,
            step_s=step / NANOS_PER_S if step is not None else None,
        )


class _ReuseCounter:
    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._uses: Counter[int] = Counter()
        self._matched: Counter[int] = Counter()
        self._lengths: Counter[int] = Counter()
        self._input_tokens = 0
        self._hit_tokens = 0
        self._sum_of_shares = 0.0

    def add(self, request: TraceRequest) -> None:
        if request.hash_ids is None or len(self._uses) >= BLOCKS_MAX:
            return
        matched = sum(1 for _ in takewhile(self._uses.__contains__, request.hash_ids))
        hit_tokens = min(matched * self._block_tokens, request.input_length)
        self._uses.update(request.hash_ids)
        self._matched[matched] += 1
        self._lengths[len(request.hash_ids)] += 1
        self._input_tokens += request.input_length
        self._hit_tokens += hit_tokens
        self._sum_of_shares += hit_tokens / request.input_length

    def result(self) -> Reuse | None:
        number = self._matched.total()
        if not number:
            return None
        matched = lengths_of(self._matched)
        references = self._uses.total()
        return Reuse(
            num_requests=number,
            is_complete=len(self._uses) < BLOCKS_MAX,
            num_references=references,
            num_blocks=len(self._uses),
            single_use_share=sum(1 for count in self._uses.values() if count == 1) / len(self._uses),
            most_shared=max(self._uses.values()),
            hit_rate_by_token=self._hit_tokens / self._input_tokens,
            hit_rate_by_block=matched.total / references,
            hit_rate_per_request=self._sum_of_shares / number,
            matched_blocks=matched,
            by_depth=self._by_depth(number),
        )

    def _by_depth(self, number: int) -> tuple[DepthReuse, ...]:
        """At depths 1, 2, 4 and so on, up to the deepest reuse."""
        depths = [1 << power for power in range(max(self._matched).bit_length())]

        def share(counts: Counter[int], depth: int) -> float:
            return sum(count for blocks, count in counts.items() if blocks >= depth) / number

        return tuple(DepthReuse(depth, share(self._matched, depth), share(self._lengths, depth)) for depth in depths)
