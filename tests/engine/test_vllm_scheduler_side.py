"""What vLLM's requests load and save, step by step: pages of 4 tokens, blocks of 8."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mooncake.core.errors import ConfigError
from mooncake.engine.vllm.layout import Geometry, geometry
from mooncake.engine.vllm.plans import LoadPlan, SavePlan, StepPlans
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


def side(num_tokens: int, **options: bool) -> SchedulerSide:
    found = SchedulerSide(SHAPE, WAIT_NS)
    found.add("r", keys(num_tokens, **options))
    return found


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
    assert side(num_tokens).match("r", num_tokens, num_local, found, 0) == expected


def test_a_load_begins_where_our_own_cache_ends_and_ends_with_whole_pages() -> None:
    found = side(20)
    assert found.match("r", 20, 4, Found(2, tail=True), 0) == 15
    found.allocated("r", [7, 3, 9, 2, 5, 6], 15)
    assert found.plan_step([], []) == StepPlans(loads=(LoadPlan("r", 4, 19, 20, (*B[:2], TAIL), (7, 3, 9, 2, 5)),))
    assert found.plan_step([], []) == StepPlans()
    found.loaded(["r"], [])
    found.allocated("r", [7, 3, 9, 2, 5], 0)  # the second call, when nothing is left to load
    assert step(found, 19, 1, [7, 3, 9, 2, 5], resumed=True) == StepPlans(), "the store has it all"
    assert not found.finished("r") and len(found) == 0


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
    assert found.match("r", 24, 16, Found(1), 0) == 0
    plans = step(found, 16, 8, [1, 2, 3, 4, 5, 6], resumed=True)
    assert plans.saves == (SavePlan("r", 8, 24, 24, B[:3], (1, 2, 3, 4, 5, 6)),)


def test_who_only_loads_saves_nothing_and_keeps_no_pages() -> None:
    found = side(20, save=False)
    assert found.match("r", 20, 0, Found(), 0) == 0
    assert step(found, 0, 20, [1, 2, 3, 4, 5], resumed=True) == StepPlans()
    assert not found.finished("r")


def test_a_failed_load_is_not_tried_again_and_what_is_missing_is_saved() -> None:
    found = side(24)
    assert found.match("r", 24, 0, Found(3), 0) == 23
    found.allocated("r", [1, 2, 3, 4, 5, 6], 23)
    found.plan_step([], [])
    found.loaded(["r"], [3, 4, 5, 6])  # the first block came
    assert found.match("r", 24, 0, Found(3), 0) == 0, "vLLM asks again if nothing came"
    found = side(24)
    found.match("r", 24, 0, Found(3), 0)
    found.allocated("r", [1, 2, 3, 4, 5, 6], 23)
    found.loaded([], [3, 4, 5, 6])  # in the first worker that is done
    found.loaded(["r"], [])
    assert step(found, 8, 16, [1, 2, 3, 4, 5, 6], resumed=True).saves == (
        SavePlan("r", 8, 24, 24, B[:3], (1, 2, 3, 4, 5, 6)),
    )
    assert found.match("r", 24, 0, Found(3), 0) == 0


def test_a_request_that_was_told_of_a_hand_over_waits_for_it_but_not_for_ever() -> None:
    found = side(20, save=False, wait=True)
    assert found.match("r", 20, 0, Found(1), 100) is None
    assert found.match("r", 20, 0, Found(2), 100 + WAIT_NS - 1) is None
    assert found.match("r", 20, 0, Found(2), 100 + WAIT_NS) == 16
    found = side(20, save=False, wait=True)
    assert found.match("r", 20, 0, Found(1), 100) is None
    assert found.match("r", 20, 0, Found(2, tail=True), 101) == 19


def test_a_preempted_request_goes_on_saving_from_its_new_pages() -> None:
    found = side(24)
    found.match("r", 24, 0, Found(), 0)
    assert step(found, 0, 8, [1, 2], resumed=True).saves == (SavePlan("r", 0, 8, 24, B[:3], (1, 2)),)
    assert found.plan_step([], ["r"]).preempted == ("r",)
    assert found.match("r", 24, 0, Found(1), 0) == 8
    found.allocated("r", [7, 8], 8)
    found.plan_step([], [])
    found.loaded(["r"], [])
    plans = step(found, 8, 16, [7, 8, 9, 10, 11, 12], resumed=True)
    assert plans.saves == (SavePlan("r", 8, 24, 24, B[:3], (7, 8, 9, 10, 11, 12)),)


def test_an_abort_in_the_middle_of_a_load_leaves_nothing() -> None:
    found = side(20)
    found.match("r", 20, 0, Found(2), 0)
    found.allocated("r", [1, 2, 3, 4, 5], 16)
    found.plan_step([], [])
    assert not found.finished("r"), "vLLM itself keeps the pages of a load"
    found.loaded(["r"], [1, 2])
    assert len(found) == 0 and found.keys("r") is None and not found.finished("r")
