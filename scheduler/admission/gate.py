"""The gate: compares the times of a rule with the objectives of a request.

    prediction + margin <= objective * tolerance of its class * tolerance of its tenant

A class above 0 is tolerated to be late by so much more per step, and so is refused last; one below 0 is refused before the
objective is reached. A tenant above its fair share is refused earlier in proportion; what is refused for that alone is
*over quota*. With one tenant and one class the limit is the objective. The margin is by how much most TTFTs of that
instance, or TBTs, were longer than predicted lately.

Modes: `off` only notes a breach. `soft` refuses with 429 and Retry-After, but not by predictions of an instance before these
have proved good there: a gate with bad estimates refuses servable requests (FACTS section 5). `hard` refuses from the
first request on. Nobody is refused after its first token.
"""

from __future__ import annotations

import msgspec

from mooncake.core.messages import PlaceRequest
from mooncake.core.types import NANOS_PER_S
from mooncake.scheduler.admission.accuracy import Accuracy
from mooncake.scheduler.admission.base import Question, Rule, Verdict
from mooncake.scheduler.admission.shares import Shares
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.lengths import Lengths
from mooncake.scheduler.pools import Instance

OVERLOADED_TTFT = "overloaded_ttft"
OVERLOADED_TBT = "overloaded_tbt"
OVER_QUOTA = "over_quota"

RETRY_NS_MIN = 1 * NANOS_PER_S
RETRY_NS_MAX = 60 * NANOS_PER_S
"""Bounds of Retry-After: header seconds are whole, and no queue prediction is good beyond a minute."""
_TOLERANCE_MIN, _TOLERANCE_MAX = 0.25, 4.0
"""Classes are numbers that clients send."""
_NO_BREACH = Verdict()


class _Breach(msgspec.Struct, frozen=True):
    """What was compared."""

    kind: str
    predicted_ns: int
    margin_ns: int
    objective_ns: int
    by_class: float
    by_share: float

    def render(self, priority: int) -> str:
        detail = f"predicted {self.kind.upper()} {_ms(self.predicted_ns)}"
        if self.margin_ns:
            detail += f" + margin {_ms(self.margin_ns)}"
        detail += f" > objective {_ms(self.objective_ns)}"
        if self.by_class != 1.0:
            detail += f" x {self.by_class:.2f} for class {priority}"
        if self.by_share != 1.0:
            detail += f" x {self.by_share:.2f} for a tenant above its share"
        return detail


class Gate:
    def __init__(
        self, config: ConductorConfig, rule: Rule, accuracy: Accuracy, shares: Shares, lengths: Lengths
    ) -> None:
        self.checks_decode = rule.checks_decode and config.admission != "off"
        self._mode = config.admission
        self._fairness = config.fairness
        self._rule = rule
        self._accuracy = accuracy
        self._shares = shares
        self._lengths = lengths
        self._most = config.calibration.margin_max

    def judge(self, question: Question) -> Verdict:
        slo = question.request.slo
        if slo.ttft_ns is None and slo.tbt_ns is None:
            return _NO_BREACH
        times = self._rule.times(question)
        by_class = by_share = 1.0
        if question.request.priority or len(self._shares) > 1:
            by_class, by_share = self._tolerances(question.request, question.now)
        tolerance = by_class * by_share
        if slo.ttft_ns is not None and times.ttft_ns is not None:
            margin_ns = self._margin_ns(question.decision.prefill, "ttft", slo.ttft_ns)
            excess_ns = times.ttft_ns + margin_ns - slo.ttft_ns * tolerance
            if excess_ns > 0:
                breach = _Breach("ttft", times.ttft_ns, margin_ns, slo.ttft_ns, by_class, by_share)
                return self._refusal(question, breach, int(excess_ns))
        if slo.tbt_ns is None or times.tbt_ns is None:
            return _NO_BREACH
        margin_ns = self._margin_ns(question.decision.decode, "tbt", slo.tbt_ns)
        excess_ns = times.tbt_ns + margin_ns - slo.tbt_ns * tolerance
        if excess_ns > 0:
            breach = _Breach("tbt", times.tbt_ns, margin_ns, slo.tbt_ns, by_class, by_share)
            # The excess, for as long as a mean output lasts, or until the prefill queue is done.
            retry_ns = max(question.decision.prediction.queue_ns, int(self._lengths.mean * excess_ns))
            return self._refusal(question, breach, retry_ns)
        return Verdict(tbt_ns=times.tbt_ns)

    def _margin_ns(self, instance: Instance | None, kind: str, objective_ns: int) -> int:
        """Beyond capacity all that is admitted is predicted to be just in time, so nearly all would be late if times are just
        a little longer than predicted."""
        if instance is None or not self._rule.keeps_margin:
            return 0
        return int(min(self._accuracy.margin_ns(instance.info.name, kind), self._most * objective_ns))

    def spend(self, tenant: str, weight: float, num_tokens: int, now: int) -> None:
        """So many tokens of that tenant were placed, to be computed. Its share is measured by its weight."""
        if self._mode != "off":
            self._shares.spend(tenant, num_tokens if weight == 1.0 else num_tokens / weight, now)

    def _tolerances(self, request: PlaceRequest, now: int) -> tuple[float, float]:
        by_class = 1.0 + self._fairness.class_step * request.priority
        ratio = self._shares.ratio(request.tenant, now)
        by_share = max(self._fairness.share_floor, 1.0 / ratio) if ratio > 1.0 else 1.0
        return min(max(by_class, _TOLERANCE_MIN), _TOLERANCE_MAX), by_share

    def _refusal(self, question: Question, breach: _Breach, retry_ns: int) -> Verdict:
        reason = OVERLOADED_TTFT if breach.kind == "ttft" else OVERLOADED_TBT
        if breach.predicted_ns + breach.margin_ns <= breach.objective_ns * breach.by_class:
            reason = OVER_QUOTA
        detail = breach.render(question.request.priority)
        enforced = question.request.first and self._trusts(question, breach.kind)
        return Verdict(reason, detail, enforced, min(max(retry_ns, RETRY_NS_MIN), RETRY_NS_MAX))

    def _trusts(self, question: Question, kind: str) -> bool:
        if self._mode != "soft":
            return self._mode == "hard"
        decision = question.decision
        instance = decision.prefill if kind == "ttft" else decision.decode
        return instance is not None and self._accuracy.calibrated(instance.info.name, kind)


def _ms(time_ns: int) -> str:
    return f"{time_ns / 1e6:.2f} ms"
