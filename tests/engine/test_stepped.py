"""The engine thread: what it tells and in which order, with copies beside it, aborts, faults and its end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from mooncake.core.errors import StoreUnavailable
from mooncake.core.types import AttemptKey, FinishReason, Job, SamplingParams, tokens_to_bytes
from mooncake.engine.attempts import EngineProgress, KvStored
from mooncake.engine.base import StepPlan, StepResult
from mooncake.engine.core import (
    AheadEnded,
    Drawn,
    EngineCore,
    KvLoaded,
    SequenceFailed,
    SequenceReleased,
    SequenceStarted,
)
from mooncake.engine.kv_mover import Interval
from mooncake.engine.stepped import SteppedEngine
from tests.engine.fakes import LIMITS, WAIT_S, FakeStepEngine, Objects, do_nothing, empty, full

LENGTH = FinishReason.LENGTH


def make_job(number: int, num_tokens: int, max_tokens: int) -> Job:
    tokens = tokens_to_bytes(range(num_tokens))
    return Job(AttemptKey("f", number), num_tokens, num_tokens, max_tokens, (), tokens, SamplingParams())


class Running:
    """An engine and what it told, gathered until a sequence is released."""

    def __init__(self, overlap: bool = True, step_engine: FakeStepEngine | None = None, record: Any = None) -> None:
        self.steps = step_engine or FakeStepEngine()
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.progress: queue.SimpleQueue[EngineProgress | KvStored] = queue.SimpleQueue()
        core = EngineCore(LIMITS, overlap_loads=overlap)
        self.engine = SteppedEngine(core, self.steps, self.progress.put, self.failures.put, record)

    def submit(
        self,
        seq: int,
        num_tokens: int,
        max_tokens: int = 1,
        *,
        reader: Objects | None = None,
        writer: Objects | None = None,
        one_token: bool = False,
    ) -> None:
        job = make_job(seq, num_tokens, max_tokens)
        self.engine.submit(seq, job, one_token=one_token, reader=reader, writer=writer)

    def until(self, *last: Any) -> list[Any]:
        """All outputs up to these, which may come in any order."""
        outputs: list[Any] = []
        while not all(output in outputs for output in last):
            progress = self.progress.get(timeout=WAIT_S)
            outputs += [progress] if isinstance(progress, KvStored) else progress.outputs
        return outputs

    def assert_let_go(self) -> None:
        """Nothing is held for any sequence, and its next progress says so too."""
        assert self.engine.core.idle and self.steps.known == {}
        assert self.engine.core.load.free_pages == LIMITS.num_pages
        self.engine.core.check_integrity()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """Makes engines, and closes them."""
    made: list[Running] = []

    def make(*arguments: Any, **more: Any) -> Running:
        made.append(Running(*arguments, **more))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()
        assert each.steps.closed
        assert each.failures.empty()


Make = Callable[..., Running]


def test_a_sequence_is_started_drawn_token_by_token_and_released(running: Make) -> None:
    run = running()
    run.submit(1, 37, 3)
    assert run.until(SequenceReleased(1)) == [
        SequenceStarted(1),
        Drawn(1, 37, (37,), None, (), 0),
        Drawn(1, 38, (38,), None),
        Drawn(1, 39, (39,), LENGTH),
        SequenceReleased(1),
    ]
    assert run.steps.steps == [[(1, 0, 32)], [(1, 32, 5)], [(1, 37, 1)], [(1, 38, 1)]]
    run.assert_let_go()


def test_every_step_is_told_with_its_time_and_the_load_after_it(running: Make) -> None:
    run = running()
    run.submit(1, 37, 2)
    told = [run.progress.get(timeout=WAIT_S) for _ in range(3)]
    assert [event.step_ns for event in told] == [7, 7, 7]
    assert [event.load.num_running for event in told] == [1, 1, 0]
    assert [event.load.free_pages for event in told] == [10, 10, 20]


def test_what_was_submitted_together_runs_together_in_order(running: Make) -> None:
    gate = threading.Event()
    run = running(step_engine=FakeStepEngine(lambda layer: gate.wait(WAIT_S) and None))
    for seq in (3, 1, 2):
        run.submit(seq, 4)
    gate.set()
    outputs = run.until(*map(SequenceReleased, (1, 2, 3)))
    assert [output.seq for output in outputs if isinstance(output, Drawn)] == [3, 1, 2]
    assert sum(map(len, run.steps.steps)) == 3 and len(run.steps.steps) <= 2


def test_what_decodes_waits_for_its_source_and_continues_on_it(running: Make) -> None:
    run = running(overlap=False)
    source = full(21)
    run.submit(1, 22, 2, reader=source)
    assert run.until(SequenceReleased(1)) == [
        SequenceStarted(1),
        KvLoaded(1, True),
        Drawn(1, 22, (22,), None, (), 21),
        Drawn(1, 23, (23,), LENGTH),
        SequenceReleased(1),
    ]
    assert run.steps.steps == [[(1, 21, 1)], [(1, 22, 1)]]
    assert all((each == 1).all() for each in source.copies)
    run.assert_let_go()


def test_a_prefill_loads_computes_and_stores_all_of_its_kv(running: Make) -> None:
    run = running()
    target = empty(21)
    run.submit(1, 21, 9, reader=full(16), writer=target, one_token=True)
    outputs = run.until(SequenceReleased(1))
    assert run.steps.steps == [[(1, 16, 5)]]
    stored = [KvStored(1, 0, 16), KvStored(1, 16, 21)]
    expected = [SequenceStarted(1), KvLoaded(1, True), Drawn(1, 21, (21,), None, (), 16), *stored]
    assert outputs[-1] == SequenceReleased(1)
    assert sorted(map(repr, outputs[:-1])) == sorted(map(repr, expected)), "each once, before the release"
    assert target.data == full(21).data and all((each == 1).all() for each in target.copies)
    run.assert_let_go()


def test_blocks_that_were_loaded_ahead_are_used_and_not_loaded_again(running: Make) -> None:
    run = running(overlap=False)
    keys = (b"k" * 16, b"l" * 16)
    ahead, source = full(16), full(21)
    run.engine.load_ahead(7, keys, 0, ahead)
    assert run.until(AheadEnded(7)) == [AheadEnded(7)]
    run.engine.submit(1, msgspec.structs.replace(make_job(1, 22, 2), block_keys=keys), one_token=False, reader=source)
    assert Drawn(1, 22, (22,), None, (), 21) in run.until(SequenceReleased(1))
    assert {index for index, *_ in source.calls} == {2}
    assert all((each == 1).all() for each in ahead.copies)
    run.assert_let_go()


def test_it_lists_the_blocks_that_are_cached(running: Make) -> None:
    run = running(overlap=False)
    keys = (b"k" * 16, b"l" * 16)
    run.engine.load_ahead(7, keys, 0, full(16))
    run.until(AheadEnded(7))
    run.engine.list_blocks()
    progress = run.progress.get(timeout=WAIT_S)
    assert isinstance(progress, EngineProgress) and progress.cached == keys
    run.assert_let_go()


def test_a_load_ahead_that_fails_leaves_everything_to_the_sequence(running: Make) -> None:
    def fail(number: int) -> None:
        if number == 3:
            raise StoreUnavailable("the node is gone")

    run = running(overlap=False)
    keys = (b"k" * 16, b"l" * 16)
    run.engine.load_ahead(7, keys, 0, full(16, before=fail))
    run.until(AheadEnded(7))
    source = full(21)
    run.engine.submit(1, msgspec.structs.replace(make_job(1, 22, 2), block_keys=keys), one_token=False, reader=source)
    assert Drawn(1, 22, (22,), None, (), 21) in run.until(SequenceReleased(1))
    assert all((each == 1).all() for each in source.copies)
    run.assert_let_go()


def test_what_is_loaded_is_stored_layer_by_layer(running: Make) -> None:
    """The store of a layer does not wait for the loads of the others."""
    stored = threading.Event()

    def hold(number: int) -> None:
        if number == 2:
            assert stored.wait(WAIT_S), "the first layer of the first block is not stored"

    run = running()
    target = empty(21, before=lambda number: stored.set())
    run.submit(1, 21, 9, reader=full(16, before=hold), writer=target, one_token=True)
    outputs = run.until(SequenceReleased(1))
    assert KvStored(1, 0, 16) in outputs and target.data == full(21).data
    run.assert_let_go()


def test_what_cannot_be_loaded_is_computed(running: Make) -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise StoreUnavailable("the node is gone")

    run = running()
    target = empty(21)
    run.submit(1, 21, 9, reader=full(16, before=fail), writer=target, one_token=True)
    outputs = run.until(SequenceReleased(1))
    assert KvLoaded(1, False) in outputs and Drawn(1, 21, (21,), None, (), 0) in outputs
    assert run.steps.steps[-1] == [(1, 0, 21)]
    assert target.data == full(21).data
    run.assert_let_go()


def test_what_cannot_be_stored_is_not_said_to_be(running: Make) -> None:
    def fail(number: int) -> None:
        raise StoreUnavailable("the node is gone")

    run = running()
    run.submit(1, 21, 9, writer=empty(21, before=fail), one_token=True)
    assert run.until(SequenceReleased(1)) == [
        SequenceStarted(1),
        Drawn(1, 21, (21,), None, (), 0),
        SequenceReleased(1),
    ]
    run.assert_let_go()


def test_a_sequence_that_cannot_be_computed_fails_and_the_others_go_on(running: Make) -> None:
    """The source lacks a token's KV."""
    run = running(overlap=False)
    source = full(21)
    source.data[1][3] ^= 1
    run.submit(1, 22, 2, reader=source)
    run.submit(2, 4)
    outputs = run.until(SequenceReleased(1), SequenceReleased(2))
    [failed] = [output for output in outputs if isinstance(output, SequenceFailed)]
    assert (failed.seq, failed.reason) == (1, "engine_error")
    assert [output.seq for output in outputs if isinstance(output, Drawn)] == [2]
    run.assert_let_go()


@pytest.mark.parametrize("overlap", [False, True], ids=["decode", "prefill"])
def test_an_abort_while_a_load_is_under_way_lets_go_when_the_copy_does(running: Make, overlap: bool) -> None:
    begun, gate = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        begun.set()
        assert gate.wait(WAIT_S)

    run = running(overlap)
    source = full(21, before=hold)
    run.submit(1, 22, 2, reader=source)
    assert begun.wait(WAIT_S)
    run.engine.abort(1)
    run.engine.abort(5)
    run.submit(2, 4)
    before = run.until(SequenceReleased(2))
    assert SequenceReleased(1) not in before and 1 in run.steps.known, "its pages are still written to"
    gate.set()
    assert run.until(SequenceReleased(1)) == [KvLoaded(1, False), SequenceReleased(1)]
    assert not any(isinstance(output, Drawn) and output.seq == 1 for output in before)
    assert len(source.calls) == 3, "nobody wants the other layers"
    run.assert_let_go()


def test_a_queued_sequence_that_is_aborted_is_released_at_once(running: Make) -> None:
    gate = threading.Event()
    run = running(step_engine=FakeStepEngine(lambda layer: gate.wait(WAIT_S) and None))
    run.submit(1, 60)
    run.submit(2, 60)
    run.engine.abort(2)
    gate.set()
    outputs = run.until(SequenceReleased(1), SequenceReleased(2))
    assert SequenceStarted(2) not in outputs
    run.assert_let_go()


def test_an_engine_that_raises_is_told_once_and_runs_no_more() -> None:
    def break_it(layer: int) -> None:
        if layer == 1:
            raise ZeroDivisionError("in the second layer")

    run = Running(step_engine=FakeStepEngine(break_it))
    run.submit(1, 4, writer=empty(4))
    assert isinstance(run.failures.get(timeout=WAIT_S), ZeroDivisionError)
    run.submit(2, 4)
    run.engine.close()
    assert run.failures.empty() and run.steps.closed
    assert len(run.steps.steps) == 1 and run.progress.empty()


def test_a_result_that_does_not_fit_the_plan_breaks_the_engine() -> None:
    class Short(FakeStepEngine):
        def run(self, plan: StepPlan, *_: Any) -> StepResult:
            return StepResult(())

    run = Running(step_engine=Short())
    run.submit(1, 4)
    assert str(run.failures.get(timeout=WAIT_S)) == "the engine returned 0 results for 1 items"
    run.engine.close()


def test_a_copying_thread_that_breaks_is_told_as_the_engine_is() -> None:
    def break_it(number: int) -> None:
        raise ZeroDivisionError

    run = Running(overlap=False)
    run.submit(1, 22, reader=full(21, before=break_it))
    assert isinstance(run.failures.get(timeout=WAIT_S), ZeroDivisionError)
    run.engine.close()
    assert run.failures.empty()


def test_close_drops_what_runs_and_what_waits() -> None:
    begun, gate = threading.Event(), threading.Event()

    def hold(layer: int) -> None:
        begun.set()
        assert gate.wait(WAIT_S)

    run = Running(step_engine=FakeStepEngine(hold))
    run.submit(1, 40, 50)
    assert begun.wait(WAIT_S)
    run.submit(2, 40, 50)
    closing = threading.Thread(target=run.engine.close)
    closing.start()
    assert not run.steps.closed, "not under a step"
    gate.set()
    closing.join(WAIT_S)
    assert not closing.is_alive() and run.steps.closed and run.failures.empty()
    assert run.steps.steps == [[(1, 0, 32)]], "the step that was under way is the last"
    run.submit(3, 4)
    run.engine.abort(1)


def test_computing_is_recorded_layer_by_layer_without_the_waits_for_loads(running: Make) -> None:
    """The second layer's load goes on once the step has got to where it must wait."""
    trace: list[Interval] = []
    gate = threading.Event()

    def hold(number: int) -> None:
        if number == 2:
            assert gate.wait(WAIT_S)

    def record(interval: Interval) -> None:
        trace.append(interval)
        if (interval.kind, interval.layer) == ("compute", 1):
            gate.set()

    run = running(record=record)
    run.submit(1, 21, reader=full(16, before=hold))
    run.until(SequenceReleased(1))
    loads = [interval for interval in trace if interval.kind == "load"]
    computes = [interval for interval in trace if interval.kind == "compute"]
    assert [(load.seq, load.layer) for load in loads] == [(1, 0), (1, 1), (1, 2)]
    assert [(compute.seq, compute.layer) for compute in computes] == [(-1, layer) for layer in (0, 0, 1, 1, 2, 2)]
    times = [time for compute in computes for time in (compute.start_ns, compute.end_ns)]
    assert times == sorted(times)
    assert computes[2].end_ns <= loads[1].end_ns <= computes[3].start_ns


def test_without_a_record_and_without_stores_the_engine_gets_no_hook(running: Make) -> None:
    """It may then attend to several sequences in one call."""
    hooks: list[Any] = []

    class Watched(FakeStepEngine):
        def run(self, plan: StepPlan, after_layer: Any, loads: Any) -> StepResult:
            hooks.append(after_layer)
            return super().run(plan, after_layer, loads)

    run = running(step_engine=Watched(do_nothing))
    run.submit(1, 4)
    run.until(SequenceReleased(1))
    run.submit(2, 4, writer=empty(4))
    run.until(SequenceReleased(2))
    assert [hook is None for hook in hooks] == [True, False]
