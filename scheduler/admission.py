"""Whether a request whose placement is predicted to break its objectives is turned away, before anything was spent on
it.

`off` only notes it. `soft` refuses with 429 and Retry-After, but not by predictions of an instance before these have proved
good there: a gate with bad estimates refuses servable requests (FACTS section 5). `hard` refuses from the first request on.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from mooncake.core.messages import Prediction
from mooncake.core.types import NANOS_PER_S, Slo
from mooncake.scheduler.config import AdmissionMode, Calibration

OVERLOADED_TTFT = "overloaded_ttft"
OVERLOADED_TBT = "overloaded_tbt"

RETRY_NS_MIN = 1 * NANOS_PER_S
RETRY_NS_MAX = 60 * NANOS_PER_S
"""Bounds of Retry-After: header seconds are whole, and no queue prediction is good beyond a minute."""
_WEIGHT_MIN = 1 / 32
"""Errors are a mean over the first outcomes, then a moving one over about this many."""
_ACTUAL_NS_MIN = 1_000_000
"""Relative errors of shorter times would measure noise."""


class Verdict(msgspec.Struct, frozen=True):
    """reason is "" if both objectives are predicted to be met; `enforced` says whether the request is refused for
    it."""

    reason: str = ""
    detail: str = ""
    enforced: bool = False
    retry_after_ns: int = 0


class _Score:
    __slots__ = ("error", "num_outcomes")

    def __init__(self) -> None:
        self.num_outcomes = 0
        self.error = 0.0


class Accuracy:
    """Mean relative error of predictions against outcomes, by instance and kind ("ttft" or "tbt")."""

    def __init__(self, bounds: Calibration) -> None:
        self._bounds = bounds
        self._scores: dict[tuple[str, str], _Score] = {}

    def observe(self, name: str, kind: str, predicted_ns: int, actual_ns: int) -> None:
        score = self._scores.setdefault((name, kind), _Score())
        score.num_outcomes += 1
        error = abs(predicted_ns - actual_ns) / max(actual_ns, _ACTUAL_NS_MIN)
        score.error += (error - score.error) * max(1 / score.num_outcomes, _WEIGHT_MIN)

    def error(self, name: str, kind: str) -> float | None:
        """None before the first outcome."""
        score = self._scores.get((name, kind))
        return score.error if score is not None else None

    def calibrated(self, name: str, kind: str) -> bool:
        score = self._scores.get((name, kind))
        return (
            score is not None
            and score.num_outcomes >= self._bounds.num_outcomes_min
            and score.error <= self._bounds.relative_error_max
        )

    def forget(self, name: str) -> None:
        for kind in ("ttft", "tbt"):
            self._scores.pop((name, kind), None)


class Admission(Protocol):
    def judge(self, slo: Slo, prediction: Prediction, prefill: str, decode: str) -> Verdict: ...


class NoAdmission:
    """Notes what would be refused."""

    def judge(self, slo: Slo, prediction: Prediction, prefill: str, decode: str) -> Verdict:
        return find_breach(slo, prediction)


class HardAdmission:
    def judge(self, slo: Slo, prediction: Prediction, prefill: str, decode: str) -> Verdict:
        verdict = find_breach(slo, prediction)
        return msgspec.structs.replace(verdict, enforced=bool(verdict.reason))


class SoftAdmission:
    """Hard where predictions are calibrated, off elsewhere."""

    def __init__(self, accuracy: Accuracy) -> None:
        self._accuracy = accuracy

    def judge(self, slo: Slo, prediction: Prediction, prefill: str, decode: str) -> Verdict:
        verdict = find_breach(slo, prediction)
        if not verdict.reason:
            return verdict
        trusted = (
            self._accuracy.calibrated(prefill, "ttft")
            if verdict.reason == OVERLOADED_TTFT
            else self._accuracy.calibrated(decode, "tbt")
        )
        return msgspec.structs.replace(verdict, enforced=trusted)


def make_admission(mode: AdmissionMode, accuracy: Accuracy) -> Admission:
    match mode:
        case "off":
            return NoAdmission()
        case "soft":
            return SoftAdmission(accuracy)
        case "hard":
            return HardAdmission()


def find_breach(slo: Slo, prediction: Prediction) -> Verdict:
    if slo.ttft_ns is not None and prediction.ttft_ns > slo.ttft_ns:
        detail = f"predicted TTFT {prediction.ttft_ns / 1e6:.1f} ms > objective {slo.ttft_ns / 1e6:.1f} ms"
        return Verdict(OVERLOADED_TTFT, detail, retry_after_ns=retry_after_ns(prediction.ttft_ns - slo.ttft_ns))
    if slo.tbt_ns is not None and prediction.tbt_ns > slo.tbt_ns:
        detail = f"predicted TBT {prediction.tbt_ns / 1e6:.2f} ms > objective {slo.tbt_ns / 1e6:.2f} ms"
        return Verdict(OVERLOADED_TBT, detail, retry_after_ns=retry_after_ns(prediction.queue_ns))
    return Verdict()


def retry_after_ns(predicted_ns: int) -> int:
    """When the predicted excess will have drained, within bounds."""
    return min(max(predicted_ns, RETRY_NS_MIN), RETRY_NS_MAX)
