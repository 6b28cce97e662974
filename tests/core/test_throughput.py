"""Rates of the last seconds."""

from mooncake.core.throughput import WINDOW_NS, Throughput
from mooncake.core.types import NANOS_PER_S as S


def test_a_steady_rate_is_found_and_a_new_one_follows() -> None:
    throughput = Throughput()
    assert throughput.per_s(0) == 0.0
    total = 0
    for second in range(60):
        total += 10 if second < 30 else 40
        throughput.note(total, second * S)
        if 12 <= second < 30:
            assert throughput.per_s(second * S) == 10.0
        if second >= 42:
            assert throughput.per_s(second * S) == 40.0


def test_a_pause_ends_it_and_what_comes_after_begins_anew() -> None:
    throughput = Throughput()
    for second in range(10):
        throughput.note(second * 10, second * S)
    assert throughput.per_s(9 * S + WINDOW_NS) == 0.0
    throughput.note(100, 1000 * S)
    throughput.note(120, 1001 * S)
    assert throughput.per_s(1001 * S) == 20.0, "the pause does not count"


def test_a_count_that_begins_again_is_a_new_life() -> None:
    throughput = Throughput()
    throughput.note(1000, 0)
    throughput.note(2000, S)
    throughput.note(5, 2 * S)
    assert throughput.per_s(2 * S) == 0.0
    throughput.note(15, 3 * S)
    assert throughput.per_s(3 * S) == 10.0
