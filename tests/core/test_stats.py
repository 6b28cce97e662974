"""The definitions of FACTS section 1, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from mooncake.core import stats
from mooncake.core.types import Slo

TIMES = [100, 110, 130, 160, 200]
"""Gaps 10, 20, 30, 40."""


def test_ttft_is_from_the_request_to_its_first_token() -> None:
    assert stats.ttft(40, TIMES) == 60
    assert stats.ttft(40, []) is None


def test_itl_is_the_mean_gap() -> None:
    assert stats.itl(TIMES) == 25
    assert stats.itl([5]) is None


@pytest.mark.parametrize(
    ("num_gaps", "num_longest"), [(1, 1), (4, 1), (10, 1), (11, 2), (20, 2), (21, 3), (30, 3), (31, 4)]
)
def test_tbt_is_the_mean_of_the_longest_tenth_rounded_up(num_gaps: int, num_longest: int) -> None:
    times = [0]
    for gap in range(1, num_gaps + 1):
        times.append(times[-1] + gap)
    longest = range(num_gaps - num_longest + 1, num_gaps + 1)
    assert stats.tbt(times) == sum(longest) / num_longest


def test_tbt_of_one_token_is_nothing() -> None:
    assert stats.tbt([7]) is None
    assert stats.tbt([]) is None


def test_percentile_is_a_value_that_occurred() -> None:
    values = [5, 1, 4, 2, 3]
    assert [stats.percentile(values, share) for share in (0, 0.2, 0.21, 0.5, 0.99, 1)] == [1, 1, 2, 3, 5, 5]
    assert stats.percentile([], 0.5) is None


def outcome(**change: object) -> stats.Outcome:
    whole = {"received": 0, "token_times": TIMES, "completed": True, "input_tokens": 100, "cached_tokens": 25}
    return stats.Outcome(**{**whole, **change})  # type: ignore[arg-type]


def test_effective_means_completed_within_both_objectives() -> None:
    assert outcome().effective
    assert outcome(slo=Slo(ttft_ns=100, tbt_ns=40)).effective
    assert not outcome(slo=Slo(ttft_ns=99)).effective
    assert not outcome(slo=Slo(tbt_ns=39)).effective
    assert not outcome(completed=False).effective
    assert outcome(token_times=[100], slo=Slo(ttft_ns=100, tbt_ns=1)).effective


def test_shares_and_rates() -> None:
    two = [outcome(), outcome(completed=False, cached_tokens=100)]
    assert stats.effective_share(two) == 0.5
    assert stats.goodput(two, 4.0) == 0.25
    assert stats.hit_rate(two) == 0.25
    assert stats.hit_rate([]) is None
    assert stats.effective_share([]) is None
