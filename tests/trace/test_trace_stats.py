"""Figures of tiny traces to the digit, and of the real ones as FACTS has them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core import stats as core_stats
from mooncake.trace.files import open_trace
from mooncake.trace.stats import DepthReuse, Lengths, TraceStats, clock_step, lengths_of, trace_stats
from mooncake.trace.types import TraceRequest
from tests.trace.helpers import real_trace, requests_of

SECOND = 1_000_000_000


def arrivals(*seconds: float) -> list[TraceRequest]:
    return [TraceRequest(round(at * SECOND), 10, 2) for at in seconds]


def stats_of(requests: list[TraceRequest], block_tokens: int | None = None) -> TraceStats:
    stats = trace_stats(iter(requests), block_tokens)
    assert stats is not None
    return stats


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_lengths_are_those_of_the_sorted_values(values: list[int]) -> None:
    found = lengths_of(Counter(values))
    assert (found.max, found.total, found.mean) == (max(values), sum(values), sum(values) / len(values))
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert value == core_stats.percentile(values, share)


def test_rates_and_peaks() -> None:
    found = stats_of(arrivals(5, 5, 5, 6.9, 10, 10)).arrivals
    assert (found.span_s, found.requests_per_s, found.input_tokens_per_s, found.output_tokens_per_s) == (
        5.0,
        1.2,
        12.0,
        2.4,
    )
    assert (found.peak_at_once, found.peak_per_s) == (3, 3)
    assert found.cv == pytest.approx(np.std([0, 0, 1.9, 3.1, 0]) / 1)
    assert found.minute_dispersion is None and found.step_s is None


def test_dispersion_is_of_whole_minutes_from_the_first_request() -> None:
    found = stats_of(arrivals(30, 31, 89, 90, 215, 10_000)).arrivals
    counts = [3, 1, 0, 1, *[0] * 162]
    assert found.minute_dispersion == pytest.approx(np.var(counts) / np.mean(counts))


def test_one_request_has_no_rates() -> None:
    found = stats_of(arrivals(3)).arrivals
    assert (found.span_s, found.requests_per_s, found.cv, found.minute_dispersion) == (0.0, None, None, None)
    assert (found.peak_per_s, found.peak_at_once) == (1, 1)


def test_no_requests() -> None:
    assert trace_stats(iter(()), 10) is None


def test_clock_steps() -> None:
    rng = np.random.default_rng(1)
    poisson = np.round(rng.exponential(250, 1000)).astype(np.int64)
    assert clock_step(poisson[poisson > 0], 250.0) is None
    seconds = np.diff(np.sort(rng.integers(0, 500, 1000))) * 1000
    assert clock_step(seconds[seconds > 0], float(seconds.mean())) == 1000
    jittered = np.diff(np.arange(200) * 3000 + rng.integers(-1, 2, 200))
    assert clock_step(jittered, 300.0) == 3000
    assert clock_step(jittered[:10], 300.0) is None


def test_reuse() -> None:
    found = stats_of(requests_of("ab", "abc", "axy", "b", "abcd"), 10).reuse
    assert found is not None
    assert (found.num_requests, found.num_references, found.num_blocks) == (5, 13, 7)
    assert found.single_use_share == 4 / 7  # axy's last two, b, and d
    assert found.most_shared == 4
    assert (found.hit_rate_by_token, found.hit_rate_by_block) == (60 / 130, 6 / 13)
    assert found.hit_rate_per_request == pytest.approx((2 / 3 + 1 / 3 + 3 / 4) / 5)
    assert found.matched_blocks == Lengths(1.2, 1, 3, 3, 3, 6)
    assert found.by_depth == (DepthReuse(1, 0.6, 1.0), DepthReuse(2, 0.4, 0.8))


def test_a_partial_block_counts_with_its_tokens() -> None:
    whole = TraceRequest(0, 15, 1, (0, 1))
    found = stats_of([whole, whole], 10).reuse
    assert found is not None and found.hit_rate_by_token == 0.5


def test_reuse_after_a_miss_counts_for_nothing() -> None:
    requests = [TraceRequest(0, 20, 1, (0, 1)), TraceRequest(0, 20, 1, (2, 1))]
    found = stats_of(requests, 10).reuse
    assert found is not None and found.hit_rate_by_block == 0


@pytest.mark.parametrize(
    ("name", "mean_p50_p99", "outputs", "at_once", "step_s", "cv"),
    [
        ("conversation_trace.jsonl", (12_035, 6_909, 85_400), (343, 350, 1_119), 28, 3.0, 3.03),
        ("synthetic_trace.jsonl", (15_326, 11_587, 66_456), (149, 69, 768), 2, None, 1.01),
        ("AzureLLMInferenceTrace_conv.csv", (1_155, 1_020, 4_142), (211, 129, 601), 1, None, 1.09),
    ],
)
def test_real_traces(
    name: str,
    mean_p50_p99: tuple[int, int, int],
    outputs: tuple[int, int, int],
    at_once: int,
    step_s: float | None,
    cv: float,
) -> None:
    reader = open_trace(real_trace(name))
    found = trace_stats(reader, reader.info.format.block_tokens)
    assert found is not None
    for lengths, facts in ((found.input_length, mean_p50_p99), (found.output_length, outputs)):
        for value, fact in zip((lengths.mean, lengths.p50, lengths.p99), facts, strict=True):
            assert abs(value - fact) <= 2
    assert (found.arrivals.peak_at_once, found.arrivals.step_s) == (at_once, step_s)
    assert found.arrivals.cv == pytest.approx(cv, abs=0.01)


def test_reuse_of_the_conversation_trace() -> None:
    found = trace_stats(open_trace(real_trace("conversation_trace.jsonl")), 512)
    assert found is not None and found.reuse is not None
    assert found.reuse.single_use_share == pytest.approx(0.76, abs=0.005)
    assert found.reuse.most_shared == found.num_requests  # one block is in every request
    assert found.reuse.hit_rate_by_token == pytest.approx(0.374, abs=0.0005)
