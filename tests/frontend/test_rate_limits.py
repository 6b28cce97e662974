"""Buckets to the nanosecond."""

from __future__ import annotations

import random

from mooncake.frontend.rate_limits import MINUTE_NS, Limits, Meter, Meters, Refusal, Window

S = 10**9


def meter(now: int = 0, **limits: int) -> Meter:
    found = Meter()
    found.set_limits(Limits(**limits), now)
    return found


def enter(found: Meter, now: int) -> Refusal | None:
    return found.enter(None, now)


def test_requests_come_back_evenly() -> None:
    found = meter(requests_per_minute=6)
    assert [enter(found, 0) for _ in range(6)] == [None] * 6
    assert enter(found, 0) == Refusal("requests", "the limit is 6 requests per minute", 10 * S)
    assert enter(found, 10 * S - 1) == Refusal("requests", "the limit is 6 requests per minute", 1)
    assert enter(found, 10 * S) is None
    assert found.windows(10 * S) == {"requests": Window(6, 0, 60 * S)}
    assert found.windows(25 * S) == {"requests": Window(6, 1, 45 * S)}
    assert found.windows(500 * S) == {"requests": Window(6, 6, 0)}


def test_a_limit_that_does_not_divide_the_minute_loses_nothing() -> None:
    found = meter(requests_per_minute=7)
    for _ in range(7):
        assert enter(found, 0) is None
    now = 0
    for _ in range(7 * 60):
        refusal = enter(found, now)
        assert refusal is not None
        now += refusal.wait_ns
        assert enter(found, now) is None
    assert 60 * MINUTE_NS <= now <= 60 * MINUTE_NS + 7


def test_tokens_are_taken_at_admission_and_corrected_at_the_end() -> None:
    found = meter(tokens_per_minute=600)
    assert enter(found, 0) is None
    assert found.take_tokens(500, 0) is None  # 100 of prompt and 400 announced
    assert found.windows(0)["tokens"] == Window(600, 100, 50 * S)
    refusal = found.take_tokens(150, 0)
    assert refusal == Refusal("tokens", "the limit is 600 tokens per minute, and this request has 150", 5 * S)
    found.leave(-350, 0)  # 50 came
    assert found.windows(0)["tokens"] == Window(600, 450, 15 * S)


def test_output_that_was_not_announced_is_a_debt() -> None:
    found = meter(tokens_per_minute=60)
    assert enter(found, 0) is None and found.take_tokens(10, 0) is None
    found.leave(110, 0)
    assert found.windows(0)["tokens"] == Window(60, 0, 120 * S)
    assert found.take_tokens(1, 0) == Refusal(
        "tokens", "the limit is 60 tokens per minute, and this request has 1", 61 * S
    )
    assert found.take_tokens(1, 61 * S) is None


def test_a_request_larger_than_the_bucket_waits_for_a_full_one() -> None:
    found = meter(tokens_per_minute=60)
    assert found.take_tokens(6000, 0) is None
    refusal = found.take_tokens(6000, 0)
    assert refusal is not None and refusal.wait_ns == 100 * MINUTE_NS
    assert found.take_tokens(6000, 100 * MINUTE_NS) is None


def test_a_refused_request_costs_nothing_and_runs_nothing() -> None:
    found = meter(requests_per_minute=1)
    assert enter(found, 0) is None
    for _ in range(10):
        assert enter(found, 0) is not None
    assert found.num_running == 1 and enter(found, MINUTE_NS) is None


def test_requests_at_once() -> None:
    found = meter(concurrent_requests=2)
    assert [found.enter(2, 0) for _ in range(2)] == [None, None]
    refusal = found.enter(2, 0)
    assert refusal is not None and (refusal.limit, refusal.wait_ns) == ("concurrent_requests", S)
    found.leave(0, 0)
    assert found.enter(2, 0) is None


def test_changed_limits_hold_at_once() -> None:
    found = meter(requests_per_minute=100)
    found.set_limits(Limits(requests_per_minute=2), 0)
    assert [enter(found, 0) for _ in range(2)] == [None, None] and enter(found, 0) is not None
    found.set_limits(Limits(), 0)
    assert enter(found, 0) is None and found.windows(0) == {}


def test_the_rate_is_never_exceeded_in_the_long_run() -> None:
    """Whatever comes, what was admitted in any time is at most a bucket and what it fills by."""
    for seed in range(20):
        rng = random.Random(seed)
        limit = rng.randrange(1, 1000)
        found = meter(tokens_per_minute=limit)
        now = admitted = 0
        for _ in range(300):
            now += rng.randrange(5 * S)
            count = rng.randrange(1, limit + 1)
            if found.take_tokens(count, now) is None:
                admitted += count
            assert admitted * MINUTE_NS <= limit * (MINUTE_NS + now), seed


def test_memory_is_bounded() -> None:
    meters = Meters(num_max=4)
    for at in range(100):
        meters.of(f"t{at}", Limits(requests_per_minute=5), 0)
        assert len(meters) <= 4
    busy = []
    for at in range(6):
        busy.append(meters.of(f"busy{at}", Limits(requests_per_minute=5), 0))
        busy[-1].enter(None, 0)
    meters.of("one more", Limits(), 0)
    assert all(meters.of(f"busy{at}", Limits(requests_per_minute=5), 0) is each for at, each in enumerate(busy))
