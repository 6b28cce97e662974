"""How far predictions were off, by instance: what they must prove before requests are refused by them."""

from __future__ import annotations

from mooncake.scheduler.config import Calibration

_WEIGHT_MIN = 1 / 32
"""Errors are a mean over the first outcomes, then a moving one over about this many."""
_ACTUAL_NS_MIN = 1_000_000
"""Relative errors of shorter times would measure noise."""


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
        score = self._scores.get((name, kind))
        if score is None:
            score = self._scores[name, kind] = _Score()
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
