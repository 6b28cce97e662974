"""What became of this frontend's last requests: times, objectives met, reuse. Sans-IO; it remembers so many, and no more."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable

import msgspec

from mooncake.core.messages import Prediction
from mooncake.core.stats import percentile
from mooncake.core.throughput import Throughput
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Slo, Stage
from mooncake.scheduler.dispatcher import Ended, Failure, Output

WINDOW_NS = 300 * NANOS_PER_S
"""What ended longer ago is no news."""
RATE_NS = 10 * NANOS_PER_S
"""Requests per second are those of so long."""
NUM_FINISHED_MAX = 2048
NUM_IDS_MAX = 8192
"""Request ids whose number is known; of more, the oldest are forgotten."""
_REFUSALS = frozenset(("overloaded", "too_long"))
"""Failures that are no fault of the cluster: nothing was begun."""


class Finished(msgspec.Struct, frozen=True):
    """A request that is over. timeline: as in `Ended`. failure: its reason, or "". tbt_ns: of the choice that has the
    longest; None without gaps."""

    number: int
    request_id: str
    slo: Slo
    timeline: tuple[int | None, ...]
    ended_at: int
    ttft_ns: int | None
    tbt_ns: int | None
    num_prompt: int
    num_cached: int
    num_output: int
    num_attempts: int
    prefill: str
    decode: str
    prediction: Prediction
    failure: str
    traceparent: str = ""
    """Of the client's trace, as it was sent."""


class Objective(msgspec.Struct, frozen=True):
    """One objective over the last requests. default_ms: of those that name none. num: requests that had one; met: the share
    of them that met it. Percentiles are of all requests."""

    default_ms: float | None
    num: int
    met: float | None
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None


class Summary(msgspec.Struct, frozen=True):
    """Of the requests that ended within the window. failures: how many, by reason. reuse: share of prompt tokens whose KV was
    reused."""

    window_s: float
    num_ended: int
    failures: dict[str, int]
    ttft: Objective
    tbt: Objective
    reuse: float | None
    requests_per_s: float
    output_tokens_per_s: float


class _Running:
    __slots__ = ("failure", "num_cached", "num_prompt", "request_id", "slo", "traceparent")

    def __init__(self, request_id: str, num_prompt: int, slo: Slo, traceparent: str) -> None:
        self.request_id = request_id
        self.num_prompt = num_prompt
        self.slo = slo
        self.traceparent = traceparent
        self.num_cached = 0
        self.failure = ""


class Outcomes:
    """default: the objectives of requests that name none. on_finished is told of each request that is over."""

    def __init__(self, default: Slo, on_finished: Callable[[Finished], None]) -> None:
        self._default = default
        self._on_finished = on_finished
        self._running: dict[int, _Running] = {}
        self._finished: deque[Finished] = deque(maxlen=NUM_FINISHED_MAX)
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._num_tokens = 0
        self._tokens = Throughput()

    @property
    def num_running(self) -> int:
        return len(self._running)

    # ------------------------------------------------------------ what happens

    def started(self, number: int, request_id: str, num_prompt: int, slo: Slo, traceparent: str = "") -> None:
        self._running[number] = _Running(request_id, num_prompt, slo, traceparent)
        self._numbers.pop(request_id, None)
        self._numbers[request_id] = number
        if len(self._numbers) > NUM_IDS_MAX:
            self._numbers.popitem(last=False)

    def output(self, output: Output, now: int) -> None:
        running = self._running.get(output.number)
        if running is None:
            return
        if output.cached_tokens is not None:
            running.num_cached = output.cached_tokens
        self._num_tokens += len(output.token_ids)
        self._tokens.note(self._num_tokens, now)

    def failed(self, failure: Failure) -> None:
        running = self._running.get(failure.number)
        if running is not None:
            running.failure = failure.reason

    def ended(self, ended: Ended, now: int) -> None:
        running = self._running.pop(ended.number, None)
        if running is None:
            return
        received, first = ended.timeline[Stage.RECEIVED], ended.timeline[Stage.FIRST_TOKEN]
        finished = Finished(
            number=ended.number,
            request_id=running.request_id,
            slo=running.slo,
            timeline=ended.timeline,
            ended_at=now,
            ttft_ns=first - received if first is not None and received is not None else None,
            tbt_ns=ended.tbt_ns,
            num_prompt=running.num_prompt,
            num_cached=running.num_cached,
            num_output=ended.num_output,
            num_attempts=ended.num_attempts,
            prefill=ended.prefill,
            decode=ended.decode,
            prediction=ended.prediction,
            failure=running.failure,
            traceparent=running.traceparent,
        )
        self._finished.append(finished)
        self._on_finished(finished)

    # ------------------------------------------------------------ what is asked

    def number_of(self, request_id: str) -> int | None:
        """Of the last request with that id."""
        return self._numbers.get(request_id)

    def finished(self, number: int) -> Finished | None:
        return next((each for each in reversed(self._finished) if each.number == number), None)

    def summary(self, now: int) -> Summary:
        recent = [each for each in self._finished if each.ended_at > now - WINDOW_NS]
        failures = Counter(each.failure for each in recent if each.failure)
        begun = [each for each in recent if each.failure not in _REFUSALS]
        num_prompt = sum(each.num_prompt for each in begun if each.ttft_ns is not None)
        return Summary(
            window_s=WINDOW_NS / NANOS_PER_S,
            num_ended=len(recent),
            failures=dict(sorted(failures.items())),
            ttft=_objective(self._default.ttft_ns, _ttft_outcomes(begun)),
            tbt=_objective(self._default.tbt_ns, ((each.slo.tbt_ns, each.tbt_ns) for each in begun)),
            reuse=sum(each.num_cached for each in begun) / num_prompt if num_prompt else None,
            requests_per_s=self._requests_per_s(now),
            output_tokens_per_s=self._tokens.per_s(now),
        )

    def _requests_per_s(self, now: int) -> float:
        """Where the window does not fit into what is remembered, it is shorter."""
        since = now - RATE_NS
        if len(self._finished) == NUM_FINISHED_MAX:
            since = max(since, self._finished[0].ended_at)
        count = sum(each.ended_at > since for each in self._finished)
        return count * NANOS_PER_S / max(1, now - since)


def _ttft_outcomes(begun: Iterable[Finished]) -> Iterable[tuple[int | None, float | None]]:
    """Who failed before the first token waited for ever; who left before it tells nothing."""
    for each in begun:
        if each.ttft_ns is None and each.failure:
            yield each.slo.ttft_ns, float("inf")
        else:
            yield each.slo.ttft_ns, each.ttft_ns


def _objective(default_ns: int | None, outcomes: Iterable[tuple[int | None, float | None]]) -> Objective:
    """outcomes: each with its objective."""
    known = [(objective, value) for objective, value in outcomes if value is not None]
    judged = [value <= objective for objective, value in known if objective is not None]
    values = sorted(value for _, value in known if value != float("inf"))
    p50, p90, p99 = (percentile(values, share) for share in (0.5, 0.9, 0.99))
    met = sum(judged) / len(judged) if judged else None
    return Objective(_ms(default_ns), len(judged), met, _ms(p50), _ms(p90), _ms(p99))


def _ms(ns: float | None) -> float | None:
    return None if ns is None else round(ns / NANOS_PER_MS, 3)
