"""What vLLM's requests load and save, step by step: pages of 4 tokens, blocks of 8."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mooncake.core.errors import ConfigError
from mooncake.engine.vllm.layout import Geometry, geometry
from mooncake.engine.vllm.plans import FetchPlan, LoadPlan, SavePlan, StepPlans
from mooncake.engine.vllm.requests import RequestKeys
from mooncake.engine.vllm.scheduler_side import Found, Scheduled, SchedulerSide

SHAPE = Geometry(page_tokens=4, block_tokens=8)
WAIT_NS = 1000
B = tuple(bytes([at]) * 16 for at in range(8))
TAIL = b"t" * 16


def keys(
    num_tokens: int, *, load: bool = True, save: bool = True, save_tail: bool = True, wait: bool = False
) -> RequestKeys:
    tail = TAIL if num_tokens % 8 else b""
    return RequestKeys(num_tokens, B[: num_tokens // 8], tail, load, save, save and save_tail, wait)


def side(
    num_tokens: int, num_workers: int = 1, overlap_max: int = 1000, fetched_max: int = 1000, **options: bool
) -> SchedulerSide:
    found = SchedulerSide(SHAPE, WAIT_NS, num_workers, overlap_max, fetched_max)
    found.add("r", keys(num_tokens, **options))
    return found


def fetch(found: SchedulerSide, num_tokens: int, num_local: int, has: Found, came: int | None = None) -> int | None:
    """From being asked to being asked again, when the fetch has brought `came`: all by default."""
    at_once = found.match("r", num_tokens, num_local, has, 0)
    if at_once is not None:
        return at_once
    [plan] = found.plan_step([], []).fetches
    found.fetched([(plan.number, plan.end if came is None else came)])
    return found.match("r", num_tokens, num_local, Found(), 0)


def step(
    found: SchedulerSide, num_computed: int, num_scheduled: int, pages: Sequence[int] = (), resumed: bool = False
) -> StepPlans:
    return found.plan_step([Scheduled("r", num_computed, num_scheduled, pages, resumed)], [])


def test_a_block_is_a_whole_number_of_pages_or_refused_by_name() -> None:
    assert geometry(16, 128) == Geometry(16, 128)
    with pytest.raises(ConfigError, match="block_tokens = 128: must be a multiple of vLLM's block_size, which is 48"):
        geometry(48, 128)


@pytest.mark.parametrize(
    ("num_tokens", "found", "num_local", "expected"),
    [
        (20, Found(), 0, 0),
        (20, Found(1), 0, 8),
        (20, Found(2, tail=True), 0, 19),  # the last token is computed
        (20, Found(1, tail=True), 0, 8),  # a tail without what comes before it is of no use
        (16, Found(2), 0, 15),
        (20, Found(2, tail=True), 8, 11),
        (20, Found(1), 16, 0),
        (7, Found(0, tail=True), 0, 6),
        (1, Found(0, tail=True), 0, 0),
    ],
)
def test_all_is_loaded_that_the_store_has_beyond_our_own(
    num_tokens: int, found: Found, num_local: int, expected: int
) -> None:
    assert fetch(side(num_tokens), num_tokens, num_local, found) == expected


def test_nothing_is_promised_before_it_is_at_hand() -> None:
    found = side(20)
    assert found.wants_to_know("r", 4) and found.match("r", 20, 4, Found(2, tail=True), 0) is None
    assert found.plan_step([], []) == StepPlans(fetches=(FetchPlan(1, 4, 20, 20, (*B[:2], TAIL)),))
    assert not found.wants_to_know("r", 4) and found.match("r", 20, 4, Found(), 0) is None
    found.fetched([(1, 20)])
    assert found.match("r", 20, 4, Found(), 0) == 15
    assert found.match("r", 20, 8, Found(), 0) == 11, "vLLM had no pages then, and has more of its own now"
    found.allocated("r", [7, 3, 9, 2, 5, 6], 11)
    assert found.plan_step([], []) == StepPlans(loads=(LoadPlan("r", 1, 8, 19, (7, 3, 9, 2, 5), ahead=False),))
    assert step(found, 19, 1, [7, 3, 9, 2, 5], resumed=True) == StepPlans(), "the store has it all"
    assert not found.finished("r") and len(found) == 0


def test_a_fetch_is_there_when_all_workers_have_it_as_far_as_all_have_it() -> None:
    found = side(20, num_workers=3)
    found.match("r", 20, 0, Found(2), 0)
    found.fetched([(1, 16), (1, 8)])
    assert found.match("r", 20, 0, Found(), 0) is None
    found.fetched([(1, 16), (9, 16)])
    assert found.match("r", 20, 0, Found(), 0) == 8


def test_a_load_that_would_stall_the_step_comes_before_it() -> None:
    found = side(24, overlap_max=15)
    assert fetch(found, 24, 0, Found(2)) == 16 and found.is_ahead(16) and not found.is_ahead(15)
    found.allocated("r", [7, 3, 9, 2], 16)
    assert found.plan_step([], []).loads == (LoadPlan("r", 1, 0, 16, (7, 3, 9, 2), ahead=True),)
    found.allocated("r", [7, 3, 9, 2, 5, 6], 0)  # when it is loaded
    assert step(found, 16, 8, [7, 3, 9, 2, 5, 6], resumed=True).saves == (
        SavePlan("r", 16, 24, 24, B[:3], (7, 3, 9, 2, 5, 6)),
    )


def test_what_is_not_needed_any_more_is_dropped() -> None:
    found = side(20)
    assert fetch(found, 20, 0, Found(2)) == 16
    assert found.match("r", 20, 16, Found(), 0) == 0
    found.allocated("r", [1, 2, 3, 4, 5], 0)
    assert found.plan_step([], []) == StepPlans(dropped=(1,))


def test_it_is_fetched_anew_if_what_came_before_it_was_evicted() -> None:
    found = side(20)
    assert fetch(found, 20, 8, Found(2)) == 8
    assert found.wants_to_know("r", 4)
    assert fetch(found, 20, 4, Found(2)) == 12
    assert found.plan_step([], []) == StepPlans(), "told with the second fetch"


def test_what_is_fetched_ahead_is_bounded() -> None:
    found = side(24, fetched_max=10)
    found.add("s", keys(24))
    found.add("t", keys(24))
    assert found.match("r", 24, 0, Found(1), 0) is None and found.match("s", 24, 0, Found(1), 0) is None
    assert not found.wants_to_know("t", 0) and found.match("t", 24, 0, Found(), 0) is None
    assert [plan.number for plan in found.plan_step([], []).fetches] == [1, 2]
    found.finished("r")
    assert found.wants_to_know("t", 0) and found.match("t", 24, 0, Found(1), 0) is None
    plans = found.plan_step([], [])
    assert [plan.number for plan in plans.fetches] == [3] and plans.dropped == (1,)


def test_blocks_are_saved_when_a_step_completes_them_and_the_tail_at_the_end() -> None:
    found = side(20)
    assert found.match("r", 20, 0, Found(), 0) == 0
    objects = (*B[:2], TAIL)
    assert step(found, 0, 7, [1, 2], resumed=True).saves == ()
    assert step(found, 7, 7, [3, 4]).saves == (SavePlan("r", 0, 8, 20, objects, (1, 2)),)
    assert step(found, 14, 4, [5]).saves == (SavePlan("r", 8, 16, 20, objects, (1, 2, 3, 4)),)
    assert step(found, 18, 2).saves == (SavePlan("r", 16, 20, 20, objects, (1, 2, 3, 4, 5)),)
    assert step(found, 20, 1, [6]).saves == (), "what is generated is not saved"
    assert found.finished("r"), "its pages are kept until the copies are done"


def test_without_a_hand_over_the_tail_is_not_saved() -> None:
    found = side(20, save_tail=False)
    found.match("r", 20, 0, Found(), 0)
    assert step(found, 0, 20, [1, 2, 3, 4, 5], resumed=True).saves == (SavePlan("r", 0, 16, 16, B[:2], (1, 2, 3, 4)),)


def test_what_only_our_own_cache_has_is_saved_too() -> None:
    found = side(24)
    assert found.wants_to_know("r", 16) and found.match("r", 24, 16, Found(1), 0) == 0
    plans = step(found, 16, 8, [1, 2, 3, 4, 5, 6], resumed=True)
    assert plans.saves == (SavePlan("r", 8, 24, 24, B[:3], (1, 2, 3, 4, 5, 6)),)


def test_who_only_loads_saves_nothing_and_keeps_no_pages() -> None:
    found = side(20, save=False)
    assert found.match("r", 20, 0, Found(), 0) == 0
    assert step(found, 0, 20, [1, 2, 3, 4, 5], resumed=True) == StepPlans()
    assert not found.finished("r")


def test_a_fetch_that_came_short_is_not_tried_again_and_what_is_missing_is_saved() -> None:
    found = side(24)
    assert fetch(found, 24, 0, Found(3), came=8) == 8
    found.allocated("r", [1, 2], 8)
    plans = step(found, 8, 16, [1, 2, 3, 4, 5, 6], resumed=True)
    assert plans.loads == (LoadPlan("r", 1, 0, 8, (1, 2), ahead=False),)
    assert plans.saves == (SavePlan("r", 8, 24, 24, B[:3], (1, 2, 3, 4, 5, 6)),)
    assert found.match("r", 24, 0, Found(3), 0) == 0, "preempted"


def test_if_nothing_came_all_is_computed_and_saved() -> None:
    found = side(24)
    assert fetch(found, 24, 0, Found(3), came=0) == 0
    found.allocated("r", [1, 2, 3, 4, 5, 6], 0)
    plans = step(found, 0, 24, [1, 2, 3, 4, 5, 6], resumed=True)
    assert plans == StepPlans(dropped=(1,), saves=(SavePlan("r", 0, 24, 24, B[:3], (1, 2, 3, 4, 5, 6)),))


def test_a_request_that_was_told_of_a_hand_over_waits_for_it_but_not_for_ever() -> None:
    found = side(20, save=False, wait=True)
    assert found.match("r", 20, 0, Found(1), 100) is None
    assert found.match("r", 20, 0, Found(2), 100 + WAIT_NS - 1) is None
    assert found.plan_step([], []) == StepPlans()
    assert found.match("r", 20, 0, Found(2), 100 + WAIT_NS) is None
    assert found.plan_step([], []).fetches == (FetchPlan(1, 0, 16, 20, (*B[:2], TAIL)),)
    found = side(20, save=False, wait=True)
    assert found.match("r", 20, 0, Found(1), 100) is None
    assert fetch(found, 20, 0, Found(2, tail=True)) == 19


def test_a_preempted_request_goes_on_saving_from_its_new_pages() -> None:
    found = side(24)
    found.match("r", 24, 0, Found(), 0)
    assert step(found, 0, 8, [1, 2], resumed=True).saves == (SavePlan("r", 0, 8, 24, B[:3], (1, 2)),)
    assert found.plan_step([], ["r"]).preempted == ("r",)
    assert fetch(found, 24, 0, Found(1)) == 8
    found.allocated("r", [7, 8], 8)
    plans = step(found, 8, 16, [7, 8, 9, 10, 11, 12], resumed=True)
    assert plans.saves == (SavePlan("r", 8, 24, 24, B[:3], (7, 8, 9, 10, 11, 12)),)


def test_an_abort_leaves_nothing() -> None:
    found = side(20)
    found.match("r", 20, 0, Found(2), 0)
    assert not found.finished("r")
    plans = found.plan_step([], [])
    assert [plan.number for plan in plans.fetches] == [1] and plans.dropped == (1,)
    found.fetched([(1, 16)])
    assert len(found) == 0 and found.keys("r") is None and not found.finished("r")
