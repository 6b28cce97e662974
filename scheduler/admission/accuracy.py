"""How far predictions were off, by instance: what they must prove before requests are refused by them."""

from __future__ import annotations

from mooncake.scheduler.config import Calibration

_WEIGHT_MIN = 1 / 32
"""Errors are a mean over the first outcomes, then a moving one over about this many."""
_LATE_SHARE = 0.01
"""Of the outcomes, those that may be later than was predicted by more than the margin."""
_LATE_STEP = 0.02
"""Of the actual time: how far the margin moves for an outcome."""
_ACTUAL_NS_MIN = 1_000_000
"""Relative errors of shorter times would measure noise."""


class _Score:
    __slots__ = ("error", "late_ns", "num_outcomes")

    def __init__(self) -> None:
        self.num_outcomes = 0
        self.error = 0.0
        self.late_ns = 0.0


class Accuracy:
    """Mean relative error of predictions against outcomes, by instance and kind ("ttft" or "tbt")."""

    def __init__(self, bounds: Calibration) -> None:
        self._bounds = bounds
        self._scores: dict[tuple[str, str], _Score] = {}

    def observe(self, name: str, kind: str, predicted_ns: int, actual_ns: int) -> None:
        score = self._score(name, kind)
        score.num_outcomes += 1
        error = abs(predicted_ns - actual_ns) / max(actual_ns, _ACTUAL_NS_MIN)
        score.error += (error - score.error) * max(1 / score.num_outcomes, _WEIGHT_MIN)

    def error(self, name: str, kind: str) -> float | None:
        """None before the first outcome."""
        score = self._scores.get((name, kind))
        return score.error if score is not None else None

    def observe_lateness(self, name: str, kind: str, judged_ns: int, actual_ns: int) -> None:
        """judged_ns: what was compared with the objective."""
        score = self._score(name, kind)
        step_ns = _LATE_STEP * max(actual_ns, _ACTUAL_NS_MIN)
        if actual_ns - judged_ns > score.late_ns:
            score.late_ns += step_ns * (1.0 - _LATE_SHARE)
        else:
            score.late_ns = max(0.0, score.late_ns - step_ns * _LATE_SHARE)

    def _score(self, name: str, kind: str) -> _Score:
        score = self._scores.get((name, kind))
        if score is None:
            score = self._scores[name, kind] = _Score()
        return score

    def margin_ns(self, name: str, kind: str) -> float:
        """By how much most outcomes are later than predicted at most: steps up and down find that share of them."""
        score = self._scores.get((name, kind))
        return score.late_ns if score is not None else 0.0

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
