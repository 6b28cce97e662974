"""What users feel, in numbers: the definitions of FACTS section 1, as pure functions. Times are nanoseconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec

from mooncake.core.types import Slo

TBT_SHARE = 0.1


def ttft(received: int, token_times: Sequence[int]) -> int | None:
    """From the request's start to its first token; None without tokens."""
    return token_times[0] - received if token_times else None


def itl(token_times: Sequence[int]) -> float | None:
    """Mean gap between successive tokens; None with less than two."""
    if len(token_times) < 2:
        return None
    return (token_times[-1] - token_times[0]) / (len(token_times) - 1)


def gaps(token_times: Sequence[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(token_times)]


def tbt(token_times: Sequence[int]) -> float | None:
    """Mean of the longest tenth of the gaps, at least one; None without gaps."""
    return tbt_of_gaps(gaps(token_times))


def tbt_of_gaps(token_gaps: Sequence[int]) -> float | None:
    """None without any."""
    longest = sorted(token_gaps, reverse=True)[: math.ceil(TBT_SHARE * len(token_gaps))]
    return sum(longest) / len(longest) if longest else None


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


class Outcome(msgspec.Struct, frozen=True):
    """What a report needs to know of one request. cached_tokens: input tokens whose KV was reused."""

    received: int
    token_times: Sequence[int]
    completed: bool
    input_tokens: int
    cached_tokens: int
    slo: Slo = Slo()

    @property
    def effective(self) -> bool:
        """Completed within its objectives. No gap means that the objective for gaps is met."""
        if not self.completed:
            return False
        first, between = ttft(self.received, self.token_times), tbt(self.token_times)
        met_ttft = self.slo.ttft_ns is None or (first is not None and first <= self.slo.ttft_ns)
        return met_ttft and (self.slo.tbt_ns is None or between is None or between <= self.slo.tbt_ns)


def effective_share(outcomes: Sequence[Outcome]) -> float | None:
    """Effective request capacity: of all requests, those rejected, failed and unfinished included."""
    return sum(o.effective for o in outcomes) / len(outcomes) if outcomes else None


def goodput(outcomes: Iterable[Outcome], duration_s: float) -> float:
    """Effective requests per second."""
    return sum(o.effective for o in outcomes) / duration_s


def hit_rate(outcomes: Iterable[Outcome]) -> float | None:
    """Token-weighted: reused over input tokens of completed requests."""
    done = [o for o in outcomes if o.completed]
    total = sum(o.input_tokens for o in done)
    return sum(o.cached_tokens for o in done) / total if total else None
