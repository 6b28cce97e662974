"""When the steps of an engine end, in a run of any length.

A step lasts a whole number of picoseconds and ends in the nanosecond in which it ends; what is left of that nanosecond belongs
to the next step. So a run of many steps ends exactly when as many runs of one step do. Within a run the context of each
sequence grows by a token a step, so durations are an arithmetic series.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from mooncake.core.types import CostModel
from mooncake.engine.base import StepItem
from mooncake.engine.simulated import step_ns

Times: TypeAlias = "array[int]"
"""Nanoseconds, type code q."""

NUM_STEPS_MAX = 4096
"""Of one run."""
_FEW_STEPS = 8
"""Up to so many, a loop is faster than numpy."""
_PS = 1000
_COUNT = np.arange(1, NUM_STEPS_MAX + 1, dtype=np.int64)
_GROWTH = _COUNT * (_COUNT - 1) // 2


class RunTimes:
    """ends: when each step of the run ends. The rest keeps what `StepTimes` needs when the run is over."""

    __slots__ = ("ends", "first_ps", "growth_ps")

    def __init__(self, ends: Sequence[int], first_ps: int, growth_ps: int) -> None:
        self.ends = ends
        self.first_ps = first_ps
        self.growth_ps = growth_ps


class StepTimes:
    """host_ns: what each step takes on top of the cost model."""

    def __init__(self, cost: CostModel, host_ns: int) -> None:
        self._cost = cost
        a, b, c = cost.decode  # milliseconds, and of c per million tokens
        self._host_ps = host_ns * _PS
        self._fixed_ps, self._seq_ps, self._token_ps = round(a * 1e9), round(b * 1e9), round(c * 1e3)
        self._rest_ps = 0

    def one(self, now: int, items: Iterable[StepItem], num_decode: int, num_context: int) -> RunTimes:
        """A single step, of anything."""
        duration_ps = self._decode_ps(num_decode, num_context) + step_ns(self._cost, items) * _PS
        return RunTimes([now + (self._rest_ps + duration_ps) // _PS], duration_ps, 0)

    def many(self, now: int, num_decode: int, num_context: int, num_steps: int) -> RunTimes:
        """Up to NUM_STEPS_MAX steps of the decode batch alone."""
        first_ps, growth_ps = self._decode_ps(num_decode, num_context), self._token_ps * num_decode
        total_ps = self._rest_ps
        if num_steps > _FEW_STEPS:
            passed = _COUNT[:num_steps] * first_ps
            passed += _GROWTH[:num_steps] * growth_ps
            passed += total_ps
            passed //= _PS
            passed += now
            ends = array("q")
            ends.frombytes(passed.tobytes())
            return RunTimes(ends, first_ps, growth_ps)
        few: list[int] = []
        for step in range(num_steps):
            total_ps += first_ps + growth_ps * step
            few.append(now + total_ps // _PS)
        return RunTimes(few, first_ps, growth_ps)

    def ended(self, times: RunTimes, num_steps: int) -> None:
        """So many steps of the run were done, and no more will be."""
        passed_ps = num_steps * times.first_ps + num_steps * (num_steps - 1) // 2 * times.growth_ps
        self._rest_ps = (self._rest_ps + passed_ps) % _PS

    def _decode_ps(self, num_decode: int, num_context: int) -> int:
        if not num_decode:
            return self._host_ps
        return self._host_ps + self._fixed_ps + self._seq_ps * num_decode + self._token_ps * num_context
