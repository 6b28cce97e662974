"""Continuous batching on tiny numbers: pages of four tokens, blocks of eight, steps of sixteen."""

import random
from collections import defaultdict
from typing import Any

import msgspec
import pytest

from mooncake.core.types import AttemptKey, FinishReason, Job, ReusedTokens, SamplingParams, TokenLogprobs
from mooncake.engine.base import EngineLimits, StepPlan, StepResult
from mooncake.engine.core import (
    AheadEnded,
    Behind,
    Drawn,
    EngineCore,
    KvLoaded,
    LoadKv,
    SequenceFailed,
    SequenceReleased,
    SequenceStarted,
    StoreKv,
)

STOP = 7


def make_job(number: int, num_tokens: int, max_tokens: int = 4, **more: Any) -> Job:
    keys = tuple(bytes([number, index]) for index in range(num_tokens // 8))
    fields = {"block_keys": keys, "token_ids": b"", "sampling": SamplingParams(stop_token_ids=(STOP,))} | more
    return Job(AttemptKey("f", number), num_tokens, num_tokens, max_tokens, **fields)


class Driver:
    """Submits, steps and answers loads and stores at once unless told to hold them."""

    def __init__(self, num_pages: int = 12, max_batch: int = 4, overlap: bool = False, max_context: int = 1000) -> None:
        limits = EngineLimits(num_pages, 4, 8, max_batch, max_step_tokens=16, max_context=max_context)
        self.core = EngineCore(limits, overlap_loads=overlap)
        self.outputs: list[Any] = []
        self.hold = False
        self.num_choices: defaultdict[int, int] = defaultdict(lambda: 1)

    def submit(self, number: int, num_tokens: int, max_tokens: int = 4, *, fields: Any = None, **more: Any) -> None:
        job = make_job(number, num_tokens, max_tokens, **(fields or {}))
        self.num_choices[number] = job.num_choices
        self.core.submit(number, job, **more)

    def shape(self) -> list[tuple[int, int, int]] | None:
        """Plan a step and give its items as (seq, start, count)."""
        self.plan = self.core.schedule()
        self._take()
        return None if self.plan is None else [(item.seq, item.start, item.count) for item in self.plan.items]

    def finish(self, token: int = 1, failed: tuple[int, ...] = ()) -> None:
        assert self.plan is not None
        tokens = tuple((token,) * self.num_choices[item.seq] if item.sample else () for item in self.plan.items)
        self.core.update(self.plan, StepResult(tokens, failed=failed))
        self._take()
        self.core.check_integrity()

    def step(self, token: int = 1) -> list[tuple[int, int, int]] | None:
        shape = self.shape()
        if shape is not None:
            self.finish(token)
        return shape

    def run(self) -> None:
        while self.step() is not None:
            pass

    def of(self, kind: type) -> list[Any]:
        return [output for output in self.outputs if isinstance(output, kind)]

    def _take(self) -> None:
        new = self.core.take_outputs()
        self.outputs += new
        for output in new:
            if self.hold:
                continue
            if isinstance(output, LoadKv):
                self.core.loaded(output.seq, True)
            elif isinstance(output, StoreKv) and output.behind is not Behind.STEP:
                self.core.stored(output.seq)
        if new:
            self._take()


def test_a_sequence_is_prefilled_in_chunks_and_decoded_to_its_limit() -> None:
    drive = Driver()
    drive.submit(1, 21, max_tokens=3)
    assert [drive.step() for _ in range(5)] == [[(1, 0, 16)], [(1, 16, 5)], [(1, 21, 1)], [(1, 22, 1)], None]
    assert drive.outputs == [
        SequenceStarted(1),
        Drawn(1, 21, (1,), None, (), 0),
        Drawn(1, 22, (1,), None),
        Drawn(1, 23, (1,), FinishReason.LENGTH),
        SequenceReleased(1),
    ]
    assert drive.core.idle and drive.core.num_computed_tokens == 23


def test_a_stop_token_ends_but_not_before_min_tokens() -> None:
    drive = Driver()
    drive.submit(1, 4, max_tokens=9)
    drive.submit(2, 4, max_tokens=9, fields={"sampling": SamplingParams(stop_token_ids=(STOP,), min_tokens=2)})
    drive.step(token=STOP)
    assert [o.finish for o in drive.of(Drawn)] == [FinishReason.STOP, None]
    drive.step(token=STOP)
    drive.step(token=STOP)
    assert [(o.seq, o.finish) for o in drive.of(Drawn)[2:]] == [(2, None), (2, FinishReason.STOP)]


def test_decode_items_come_first_and_prefill_tokens_share_a_budget() -> None:
    drive = Driver(num_pages=40)
    drive.submit(1, 3)
    drive.step()
    drive.submit(2, 10)
    drive.submit(3, 20)
    assert drive.step() == [(1, 3, 1), (2, 0, 10)], "3 tokens of the budget are left: no whole block of the next"
    assert drive.step() == [(1, 4, 1), (2, 10, 1), (3, 0, 16)]


def test_chunks_end_on_block_boundaries_except_the_last() -> None:
    drive = Driver(num_pages=40)
    drive.submit(1, 9)
    drive.submit(2, 30)
    assert drive.step() == [(1, 0, 9)]
    drive.submit(3, 2)
    shapes = [drive.step() for _ in range(2)]
    assert shapes == [[(1, 9, 1), (2, 0, 16)], [(1, 10, 1), (2, 16, 14), (3, 0, 2)]]


def test_admission_is_oldest_first_and_nobody_overtakes() -> None:
    drive = Driver(num_pages=6)
    drive.submit(1, 12)
    drive.submit(2, 20)
    drive.submit(3, 2)
    assert drive.shape() == [(1, 0, 12)], "3 would fit, but 2 is older"
    drive.finish()
    drive.run()
    assert [output.seq for output in drive.of(SequenceStarted)] == [1, 2, 3]


def test_load_tells_what_waits_for_pages() -> None:
    drive = Driver(num_pages=4)
    drive.submit(1, 12)
    drive.submit(2, 10, source_tokens=8)
    drive.shape()
    load = drive.core.load
    assert (load.num_running, load.context_tokens) == (1, 12)
    assert (load.num_waiting, load.waiting_tokens, load.waiting_context) == (1, 2 + 12, 10)
    drive.core.abort(2)
    assert drive.core.load.waiting_context == 0


def test_priority_goes_before_age() -> None:
    drive = Driver(max_batch=1)
    for number, priority in ((1, 0), (2, 5), (3, 5)):
        drive.submit(number, 4, max_tokens=1, fields={"priority": priority})
    drive.run()
    assert [output.seq for output in drive.of(SequenceStarted)] == [2, 3, 1]


def test_the_youngest_is_preempted_and_continues_with_what_it_has() -> None:
    drive = Driver(num_pages=4)
    drive.submit(1, 7, max_tokens=6)
    drive.submit(2, 7, max_tokens=6)
    assert [drive.step() for _ in range(3)] == [[(1, 0, 7), (2, 0, 7)], [(1, 7, 1), (2, 7, 1)], [(1, 8, 1)]]
    assert drive.core.num_preempted == 1
    assert [drive.step() for _ in range(3)] == [[(1, 9, 1)], [(1, 10, 1)], [(1, 11, 1)]]
    assert drive.step() == [(2, 0, 9)], "prompt and tokens so far, computed again"
    drive.run()
    assert [(o.seq, o.position) for o in drive.of(Drawn) if o.seq == 2] == [(2, 7 + n) for n in range(6)]
    assert [o.seq for o in drive.of(Drawn) if o.finish] == [1, 2]


def test_a_sequence_that_fills_all_pages_ends() -> None:
    drive = Driver(num_pages=2)
    drive.submit(1, 6, max_tokens=100)
    drive.run()
    assert drive.of(Drawn)[-1].finish is FinishReason.LENGTH and drive.core.idle


def test_a_prefix_is_reused_and_one_token_is_left_to_compute() -> None:
    drive = Driver(num_pages=40)
    keys = (b"a", b"b")
    drive.submit(1, 16, max_tokens=1, fields={"block_keys": keys})
    drive.run()
    drive.submit(2, 16, max_tokens=1, fields={"block_keys": keys})
    assert drive.step() == [(2, 8, 8)]
    assert drive.of(Drawn)[-1].cached_tokens == 8
    assert drive.core.pool.cached_keys() == keys


def test_what_is_reused_is_counted_by_where_it_was() -> None:
    drive = Driver(num_pages=40, overlap=True)
    keys = (b"a", b"b", b"c", b"d")
    drive.submit(1, 8, one_token=True, fields={"block_keys": keys[:1]})
    drive.run()
    assert drive.core.load.reused == ReusedTokens(prompt=8)
    drive.submit(2, 40, source_tokens=32, ssd_tokens=16, one_token=True, fields={"block_keys": keys})
    drive.run()
    assert drive.core.load.reused == ReusedTokens(prompt=48, hbm=8, dram=8, ssd=16)
    assert drive.of(Drawn)[-1].cached_tokens == 32
    drive.core.submit(3, msgspec.structs.replace(make_job(3, 12), num_prompt_tokens=11), source_tokens=12)
    drive.run()
    assert drive.core.load.reused.prompt == 48, "a hand-over is no reuse"
    other = EngineCore(drive.core.limits, overlap_loads=False)
    other.continue_counts(drive.core)
    assert other.load.reused == drive.core.load.reused


def test_what_could_not_be_loaded_is_not_reused() -> None:
    drive = Driver()
    drive.hold = True
    drive.submit(1, 20, source_tokens=16, ssd_tokens=16)
    drive.step()
    drive.core.loaded(1, False)
    drive.step()
    drive.step()
    assert drive.of(Drawn) and drive.core.load.reused == ReusedTokens(prompt=20)


def test_a_joint_sequence_draws_for_each_choice_from_one_row_and_ends() -> None:
    drive = Driver()
    drive.submit(1, 21, max_tokens=9, one_token=True, fields={"num_choices": 3})
    drive.step()
    assert drive.shape() == [(1, 16, 5)] and drive.plan is not None
    tops = tuple(TokenLogprobs(-float(choice)) for choice in range(3))
    drive.core.update(drive.plan, StepResult(((4, STOP, 5),), (tops,)))
    drive._take()
    assert drive.outputs == [
        SequenceStarted(1),
        Drawn(1, 21, (4,), None, tops[:1], 0, 0),
        Drawn(1, 21, (STOP,), FinishReason.STOP, tops[1:2], None, 1),
        Drawn(1, 21, (5,), None, tops[2:], None, 2),
        SequenceReleased(1),
    ]
    assert drive.core.idle and drive.core.num_computed_tokens == 21


def test_what_draws_one_token_is_never_run_for_several_steps() -> None:
    drive = Driver(num_pages=40)
    drive.submit(1, 1, max_tokens=50, one_token=True)
    drive.shape()
    assert drive.plan is not None and drive.plan.horizon == 1


def siblings(drive: Driver, count: int, num_tokens: int = 22, **more: Any) -> None:
    """Decode jobs of one prompt: 21 tokens of KV at the source, of which two blocks are whole, and a first token."""
    for choice in range(count):
        fields = {"block_keys": (b"a", b"b"), "num_prompt_tokens": 21}
        job = msgspec.structs.replace(make_job(1, num_tokens), key=AttemptKey("f", 1, choice), **fields, **more)
        drive.core.submit(choice, job, source_tokens=21)


def test_siblings_share_the_prompts_pages_and_load_only_the_partial_block_again() -> None:
    drive = Driver(num_pages=40, max_batch=8)
    drive.hold = True
    siblings(drive, 3, max_tokens=100)
    drive.submit(9, 4)
    assert drive.step() == [(9, 0, 4)], "the others wait for the blocks that the first one loads; a stranger does not"
    [load] = drive.of(LoadKv)
    assert (load.seq, load.start, load.end) == (0, 0, 21)
    drive.core.abort(9)
    drive.core.loaded(0, True)
    assert drive.step() == [(0, 21, 1)]
    assert [(load.seq, load.start, load.end) for load in drive.of(LoadKv)[1:]] == [(1, 16, 21), (2, 16, 21)]
    drive.core.loaded(1, True)
    drive.core.loaded(2, True)
    while drive.core.load.context_tokens < 3 * 50:
        drive.step()
    pages = [drive.core.pool.pages(seq) for seq in range(3)]
    prompt_pages, own_pages = 4, 9
    assert all(found[:prompt_pages] == pages[0][:prompt_pages] for found in pages)
    assert len({page for found in pages for page in found}) == prompt_pages + 3 * own_pages
    assert drive.core.num_loaded_tokens == 21 + 2 * 5


@pytest.mark.parametrize("end", ["failed", "aborted"])
def test_a_sibling_loads_for_itself_what_it_waited_for_in_vain(end: str) -> None:
    drive = Driver(num_pages=40)
    drive.hold = True
    siblings(drive, 2)
    drive.step()
    if end == "aborted":
        drive.core.abort(0)
    else:
        drive.core.loaded(0, False)
    drive.step()
    assert [(load.seq, load.start, load.end) for load in drive.of(LoadKv)] == [(0, 0, 21), (1, 0, 21)]


def test_decode_waits_for_its_load() -> None:
    drive = Driver()
    drive.hold = True
    drive.submit(1, 9, source_tokens=9)
    assert drive.step() is None
    [load] = drive.of(LoadKv)
    assert (load.start, load.end, load.pages.tolist()) == (0, 8, [0, 1, 2])
    drive.core.loaded(1, True)
    assert drive.step() == [(1, 8, 1)]
    assert drive.of(KvLoaded) == [KvLoaded(1, True)] and drive.of(Drawn)[0].cached_tokens == 8
    assert (drive.core.num_loaded_tokens, drive.core.num_computed_tokens) == (8, 1)


def test_prefill_overlaps_its_load_and_stores_what_was_loaded() -> None:
    drive = Driver(overlap=True)
    drive.hold = True
    drive.submit(1, 20, source_tokens=16, one_token=True, store=True)
    assert drive.shape() == [(1, 16, 4)] and drive.plan is not None and drive.plan.items[0].num_loading == 16
    drive.finish()
    stores = [(s.start, s.end, s.behind) for s in drive.of(StoreKv)]
    assert stores == [(0, 16, Behind.LOAD), (16, 20, Behind.STEP)]
    drive.core.loaded(1, True)
    for _ in drive.of(StoreKv):
        drive._take()
        assert SequenceReleased(1) not in drive.outputs, "its pages are still being read"
        drive.core.stored(1)
    drive._take()
    assert drive.outputs[-1] == SequenceReleased(1) and drive.of(Drawn)[0].cached_tokens == 16


@pytest.mark.parametrize(
    ("stored_tokens", "expected"),
    [(8, [(8, 16, Behind.LOAD), (16, 20, Behind.STEP)]), (16, [(16, 20, Behind.STEP)])],
)
def test_what_the_sink_has_already_is_not_stored(stored_tokens: int, expected: list[tuple[int, int, Behind]]) -> None:
    drive = Driver(overlap=True)
    drive.hold = True
    drive.submit(1, 20, source_tokens=16, one_token=True, store=True, stored_tokens=stored_tokens)
    drive.shape()
    drive.finish()
    assert [(s.start, s.end, s.behind) for s in drive.of(StoreKv)] == expected


@pytest.mark.parametrize("order", ["loaded first", "step first"])
def test_a_failed_load_is_computed_instead(order: str) -> None:
    drive = Driver(overlap=True)
    drive.hold = True
    drive.submit(1, 20, source_tokens=16, one_token=True)
    drive.shape()
    if order == "loaded first":
        drive.core.loaded(1, False)
    drive.finish(failed=(1,))
    if order == "step first":
        drive.core.loaded(1, False)
    assert drive.of(Drawn) == []
    assert [drive.step(), drive.step()] == [[(1, 0, 16)], [(1, 16, 4)]]
    assert drive.of(Drawn)[0].cached_tokens == 0 and drive.core.idle


def test_a_fault_of_one_sequence_leaves_the_others() -> None:
    drive = Driver()
    drive.submit(1, 4)
    drive.submit(2, 4)
    drive.shape()
    drive.finish(failed=(1,))
    assert drive.of(SequenceFailed)[0].seq == 1 and SequenceReleased(1) in drive.outputs
    assert drive.step() == [(2, 4, 1)]


def test_pages_belong_to_the_writer_until_the_copy_is_over() -> None:
    drive = Driver()
    drive.submit(1, 8, one_token=True, store=True)
    drive.shape()
    drive.core.abort(1)
    assert drive.core.pool.num_free == 10
    drive.finish()
    assert drive.core.pool.num_free == 10 and drive.of(Drawn) == []
    drive.core.stored(1)
    drive._take()
    assert drive.core.pool.num_free == 12 and drive.core.idle


def test_abort_of_a_waiting_and_of_an_unknown_sequence() -> None:
    drive = Driver()
    drive.submit(1, 8)
    drive.core.abort(1)
    drive.core.abort(1)
    drive.core.abort(99)
    assert drive.step() is None
    assert drive.outputs == [SequenceReleased(1)]


def test_horizon_is_bounded_by_pages_limits_and_waiting_work() -> None:
    drive = Driver(num_pages=40, max_batch=2)
    drive.submit(1, 4, max_tokens=50)
    drive.submit(2, 5, max_tokens=3)
    drive.step()
    drive.shape()
    assert drive.plan is not None and drive.plan.horizon == 2, "sequence 2 has two tokens left"
    drive.core.update(drive.plan, StepResult(((1, 2), (3, 4)), num_steps=2))
    drive._take()
    assert [o.token_ids for o in drive.of(Drawn)[2:]] == [(1, 2), (3, 4)]
    drive.submit(3, 4)
    assert drive.shape() == [(1, 6, 1), (3, 0, 4)] and drive.plan.horizon == 1, "somebody is prefilled"
    drive.finish()
    drive.submit(4, 4)
    assert drive.shape() == [(1, 7, 1), (3, 4, 1)] and drive.plan.horizon == 1, "sequence 1 needs a page next"
    drive.finish()
    drive.shape()
    assert drive.plan.horizon == 2, "sequence 3 has two tokens left; 4 can only wait"


def test_refusals_name_the_limit() -> None:
    core = Driver(num_pages=3).core
    assert core.refusal(make_job(1, 11)) is None
    assert core.refusal(make_job(1, 12)) == "12 tokens do not fit: a sequence holds at most 12 here"


@pytest.mark.parametrize("seed", range(60))
def test_random_histories_end_every_sequence_once_and_leak_nothing(seed: int) -> None:
    rng = random.Random(seed)
    drive = Driver(overlap=rng.random() < 0.5, max_context=48)
    drive.hold = True
    pending: list[Any] = []
    submitted, released, num_ahead, num_ahead_ended = 0, 0, 0, 0
    while released < 25 or not drive.core.idle:
        if submitted < 25 and rng.random() < 0.4:
            num_tokens = rng.randint(1, 30)
            num_choices = rng.choice([1, 1, 1, 3])
            more = {"one_token": num_choices > 1 or rng.random() < 0.3, "store": rng.random() < 0.4}
            keys = tuple(
                bytes([document, index]) for document in [rng.randrange(4)] for index in range(num_tokens // 8)
            )
            fields = {"num_choices": num_choices, "block_keys": keys}
            source_tokens = rng.choice([0, num_tokens])
            drive.submit(submitted, num_tokens, rng.randint(1, 12), source_tokens=source_tokens, fields=fields, **more)
            submitted += 1
        if rng.random() < 0.2:
            num_ahead += 1
            document = rng.randrange(4)
            keys = tuple(bytes([document, index]) for index in range(rng.randint(1, 3)))
            drive.core.load_ahead(1000 + num_ahead, keys, rng.choice([0, 8]))
        if submitted and rng.random() < 0.05:
            drive.core.abort(rng.randrange(submitted))
        if drive.shape() is not None:
            assert isinstance(drive.plan, StepPlan)
            loading = tuple(item.seq for item in drive.plan.items if item.num_loading and rng.random() < 0.3)
            drive.finish(token=rng.choice([1, 2, STOP]), failed=loading)
        pending += [output for output in drive.outputs if isinstance(output, LoadKv | StoreKv)]
        released += len(drive.of(SequenceReleased))
        num_ahead_ended += len(drive.of(AheadEnded))
        drive.outputs.clear()
        while pending and rng.random() < 0.6:
            copy = pending.pop(rng.randrange(len(pending)))
            if isinstance(copy, LoadKv):
                drive.core.loaded(copy.seq, rng.random() < 0.8)
            else:
                drive.core.stored(copy.seq)
            drive.core.check_integrity()
        drive._take()
    assert released == 25 and drive.core.pool.num_free == 12
    assert num_ahead_ended + len(drive.of(AheadEnded)) == num_ahead
