"""What became of a frontend's last requests."""

from __future__ import annotations

from mooncake.core.messages import Prediction
from mooncake.core.stats import tbt
from mooncake.core.types import NANOS_PER_S, Slo
from mooncake.frontend.outcomes import NUM_FINISHED_MAX, NUM_IDS_MAX, RATE_NS, WINDOW_NS, Finished, Outcomes
from mooncake.scheduler.dispatcher import Ended, Failure, Output

MS = 1_000_000
SLO = Slo(ttft_ns=100 * MS, tbt_ns=20 * MS)


class Frontend:
    def __init__(self) -> None:
        self.finished: list[Finished] = []
        self.outcomes = Outcomes(SLO, self.finished.append)

    def run(self, number: int, *token_times: int, slo: Slo = SLO, cached: int = 0, failure: str = "") -> None:
        """A request received at 0 whose tokens come at these times; it ends with the last, or at 1 ms."""
        outcomes = self.outcomes
        outcomes.started(number, f"id-{number}", 100, slo)
        for index, at in enumerate(token_times):
            outcomes.output(Output(number, (7,), cached_tokens=None if index else cached), at)
        if failure:
            outcomes.failed(Failure(number, failure, "because"))
        end = max(token_times, default=MS)
        first = token_times[0] if token_times else None
        timeline = (0, 0, 0, first, None, None, end)
        longest = tbt(token_times)
        tbt_ns = int(longest) if longest is not None else None
        outcomes.ended(Ended(number, timeline, "p", "d", len(token_times), 1, Prediction(ttft_ns=5), tbt_ns), end)


def test_a_request_that_is_over_is_told_with_its_times() -> None:
    frontend = Frontend()
    times = [50 * MS + gap for gap in (0, 10 * MS, 20 * MS, 60 * MS)]
    frontend.run(3, *times, cached=64)
    [finished] = frontend.finished
    assert finished.ttft_ns == 50 * MS and finished.tbt_ns == 40 * MS
    assert (finished.request_id, finished.num_prompt, finished.num_cached, finished.num_output) == ("id-3", 100, 64, 4)
    assert frontend.outcomes.finished(3) is finished and frontend.outcomes.finished(4) is None
    assert frontend.outcomes.num_running == 0


def test_objectives_are_judged_for_those_that_have_one() -> None:
    frontend = Frontend()
    frontend.run(1, 50 * MS, 60 * MS)
    frontend.run(2, 150 * MS, 160 * MS)
    frontend.run(3, 50 * MS, 90 * MS)
    frontend.run(4, 950 * MS, 960 * MS, slo=Slo())
    summary = frontend.outcomes.summary(NANOS_PER_S)
    assert (summary.ttft.num, summary.ttft.met) == (3, 2 / 3)
    assert (summary.tbt.num, summary.tbt.met) == (3, 2 / 3)
    assert (summary.ttft.default_ms, summary.tbt.default_ms) == (100.0, 20.0)
    assert (summary.ttft.p50_ms, summary.ttft.p90_ms) == (50.0, 950.0), "percentiles are of all"


def test_who_failed_before_a_token_missed_its_objective_and_who_was_refused_or_left_did_not() -> None:
    frontend = Frontend()
    frontend.run(1, 50 * MS)
    frontend.run(2, failure="unavailable")
    frontend.run(3, failure="overloaded")
    frontend.run(4, failure="too_long")
    frontend.run(5)
    summary = frontend.outcomes.summary(NANOS_PER_S)
    assert (summary.ttft.num, summary.ttft.met, summary.ttft.p99_ms) == (2, 0.5, 50.0)
    assert summary.tbt.num == 0 and summary.tbt.met is None, "nobody had a gap"
    assert summary.failures == {"overloaded": 1, "too_long": 1, "unavailable": 1} and summary.num_ended == 5


def test_reuse_is_by_tokens_of_the_prompts() -> None:
    frontend = Frontend()
    frontend.run(1, 5 * MS, cached=90)
    frontend.run(2, 5 * MS)
    frontend.run(3, failure="unavailable")
    assert frontend.outcomes.summary(NANOS_PER_S).reuse == 0.45


def test_what_ended_long_ago_is_not_in_the_summary() -> None:
    frontend = Frontend()
    assert frontend.outcomes.summary(0).reuse is None
    frontend.run(1, MS)
    assert frontend.outcomes.summary(WINDOW_NS).num_ended == 1
    summary = frontend.outcomes.summary(WINDOW_NS + MS)
    assert (summary.num_ended, summary.ttft.num, summary.ttft.met, summary.ttft.p50_ms) == (0, 0, None, None)


def test_rates_are_of_the_last_seconds() -> None:
    frontend = Frontend()
    outcomes = frontend.outcomes
    for number in range(20):
        outcomes.started(number, "a", 10, SLO)
        outcomes.output(Output(number, (7,) * 30), number * NANOS_PER_S)
        outcomes.ended(Ended(number, (0,) * 7, "", "", 30, 1, Prediction()), number * NANOS_PER_S)
    summary = outcomes.summary(19 * NANOS_PER_S)
    assert summary.requests_per_s == 1.0 and summary.output_tokens_per_s == 30.0
    assert outcomes.summary(19 * NANOS_PER_S + RATE_NS).requests_per_s == 0.0


def test_more_requests_per_second_than_are_remembered_are_told_from_those_that_are() -> None:
    frontend = Frontend()
    step = NANOS_PER_S // 1000
    for number in range(2 * NUM_FINISHED_MAX):
        frontend.outcomes.started(number, "a", 10, SLO)
        frontend.outcomes.ended(Ended(number, (0,) * 7, "", "", 0, 1, Prediction()), number * step)
    rate = frontend.outcomes.summary((2 * NUM_FINISHED_MAX - 1) * step).requests_per_s
    assert abs(rate - 1000) < 1


def test_ids_lead_to_numbers_as_long_as_they_are_remembered() -> None:
    outcomes = Frontend().outcomes
    for number in range(NUM_IDS_MAX + 1):
        outcomes.started(number, f"id-{number}", 1, SLO)
    assert outcomes.number_of("id-0") is None and outcomes.number_of("id-1") == 1
    outcomes.started(90_000, "id-5", 1, SLO)
    assert outcomes.number_of("id-5") == 90_000, "the last one of that id"
