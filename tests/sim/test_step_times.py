"""Runs of steps take exactly as long as their steps."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mooncake.core.types import CostModel
from mooncake.engine.base import StepItem
from mooncake.sim.step_times import StepTimes

COST = CostModel((3.0, 40.0, 0.5), (17.75, 0.0583, 26.1))
SEQS, CONTEXT = 7, 1003


def test_the_first_step_lasts_as_the_cost_model_says() -> None:
    times = StepTimes(COST, 0)
    assert times.one(100, (), SEQS, CONTEXT).ends == [100 + COST.decode_ns(SEQS, CONTEXT)]
    item = StepItem(1, 64, 100, np.empty(0, dtype=np.int64), sample=True)
    assert times.one(100, (item,), 0, 0).ends == [100 + COST.prefill_ns(100, 64)]
    both = times.one(100, (item,), SEQS, CONTEXT).ends[0]
    assert both - 100 in range(COST.prefill_ns(100, 64) + COST.decode_ns(SEQS, CONTEXT), both - 99)


def test_what_the_host_takes_comes_on_top_of_every_step() -> None:
    without, with_host = StepTimes(COST, 0), StepTimes(COST, 250)
    slower = with_host.many(0, SEQS, CONTEXT, 40).ends
    for step, end in enumerate(without.many(0, SEQS, CONTEXT, 40).ends, start=1):
        assert slower[step - 1] - end == 250 * step


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_of_a_run_gives_every_step_the_same_end(seed: int) -> None:
    rng = random.Random(seed)
    num_steps = 300
    one_by_one, in_runs = StepTimes(COST, 11), StepTimes(COST, 11)
    now, expected = 5, []
    for step in range(num_steps):
        times = one_by_one.one(now, (), SEQS, CONTEXT + SEQS * step)
        one_by_one.ended(times, 1)
        now = times.ends[0]
        expected.append(now)
    now, found = 5, []
    while len(found) < num_steps:
        planned = rng.randint(1, min(60, num_steps - len(found)))
        done = rng.randint(1, planned)
        times = in_runs.many(now, SEQS, CONTEXT + SEQS * len(found), planned)
        in_runs.ended(times, done)
        found += times.ends[:done]
        now = found[-1]
    assert found == expected
