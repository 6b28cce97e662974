"""Copies between pages and objects: which bytes, in which order, and how a copy that fails ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mooncake.core.errors import StoreUnavailable
from mooncake.engine import kv_mover
from mooncake.engine.kv_mover import Interval, KvMover, LoadTask, StoreTask
from tests.engine.fakes import BLOCK, LAYOUT, WAIT_S, Objects, Pages, empty, full, kv

HERE = np.array([5, 0, 9, 2, 7, 1], dtype=np.int64)
NUM_TOKENS = 21
"""Two blocks and five tokens more."""


class Copies:
    """A mover, and what came of its tasks."""

    def __init__(self) -> None:
        self.pages = Pages()
        self.trace: list[Interval] = []
        self.failures: list[BaseException] = []
        self.mover = KvMover(self.pages, BLOCK, self._loaded, self._stored, self.failures.append, self.trace.append)
        self._ended: queue.SimpleQueue[tuple[str, int, bool]] = queue.SimpleQueue()

    def load(self, seq: int, source: Objects, start: int = 0, end: int = NUM_TOKENS) -> LoadTask:
        task = LoadTask(seq, start, end, HERE, source)
        self.mover.load(task)
        return task

    def new_store(self, seq: int, target: Objects, start: int = 0, end: int = NUM_TOKENS) -> StoreTask:
        return StoreTask(seq, start, end, HERE, target)

    def store(self, seq: int, target: Objects, start: int = 0, end: int = NUM_TOKENS) -> None:
        self.mover.store(self.new_store(seq, target, start, end))

    def compute(self) -> None:
        for layer in range(LAYOUT.num_layers):
            self.pages.put(layer, HERE, 0, kv(layer, 0, NUM_TOKENS))

    def ended(self, count: int = 1) -> list[tuple[str, int, bool]]:
        """The next ends: what, of which sequence, whether well."""
        return [self._ended.get(timeout=WAIT_S) for _ in range(count)]

    @property
    def layers(self) -> list[tuple[str, int, int]]:
        return [(interval.kind, interval.seq, interval.layer) for interval in self.trace]

    def _loaded(self, task: LoadTask) -> None:
        self._ended.put(("load", task.seq, task.ok))

    def _stored(self, task: StoreTask) -> None:
        self._ended.put(("store", task.seq, task.ok))


@pytest.fixture
def copies() -> Iterator[Copies]:
    copies = Copies()
    yield copies
    copies.mover.close()


def fails_at(number: int) -> Callable[[int], None]:
    def before(at: int) -> None:
        if at == number:
            raise StoreUnavailable("the node is gone")

    return before


def held_by(gate: threading.Event, at: int = 0) -> Callable[[int], None]:
    def before(number: int) -> None:
        if number == at:
            assert gate.wait(WAIT_S)

    return before


def test_a_sequence_is_loaded_layer_by_layer_in_pieces_that_end_with_their_objects(copies: Copies) -> None:
    source = full(NUM_TOKENS)
    copies.load(1, source, 3, 19)
    assert copies.ended() == [("load", 1, True)]
    whole, part = BLOCK * 2, 5 * 2
    assert source.calls == [
        (0, 6, 10), (1, 0, whole), (2, 0, 6),
        (0, whole + 6, 10), (1, whole, whole), (2, part, 6),
        (0, 2 * whole + 6, 10), (1, 2 * whole, whole), (2, 2 * part, 6),
    ]  # fmt: skip
    assert copies.pages.written == [(layer, *piece) for layer in range(3) for piece in ((3, 5), (8, 8), (16, 3))]
    assert copies.pages.holds(HERE, 3, 19)
    assert not copies.pages.at(0, HERE, 0, 3).any() and not copies.pages.at(0, HERE, 19, 24).any()
    assert copies.mover.bytes_loaded == 3 * 16 * 2


def test_what_is_stored_in_parts_is_each_byte_of_the_objects_once(copies: Copies) -> None:
    copies.compute()
    target = empty(NUM_TOKENS)
    for start, end in ((0, 3), (3, 16), (16, 21)):
        copies.store(1, target, start, end)
    assert copies.ended(3) == [("store", 1, True)] * 3
    assert target.data == full(NUM_TOKENS).data
    assert all((each == 1).all() for each in target.copies)
    assert copies.mover.bytes_stored == sum(map(len, target.data))


def test_tokens_beyond_what_the_target_takes_are_left_out(copies: Copies) -> None:
    """A prompt whose KV nobody fetches stores its whole blocks alone."""
    copies.compute()
    target = empty(16)
    copies.store(1, target, 8, NUM_TOKENS)
    copies.store(1, target, 16, NUM_TOKENS)
    assert copies.ended(2) == [("store", 1, True)] * 2
    assert [call[0] for call in target.calls] == [1, 1, 1]


def test_what_exists_is_not_written_again(copies: Copies) -> None:
    copies.compute()
    target = empty(NUM_TOKENS, missing=(2,))
    copies.store(1, target)
    copies.store(2, empty(NUM_TOKENS, missing=()))
    assert copies.ended(2) == [("store", 1, True), ("store", 2, True)]
    assert target.calls == [(2, 0, 10), (2, 10, 10), (2, 20, 10)]
    assert copies.layers == [("store", 1, 0), ("store", 1, 1), ("store", 1, 2)], "no interval of what was not copied"


def test_layers_of_a_step_are_stored_as_they_come_and_the_task_ends_with_the_step(copies: Copies) -> None:
    copies.compute()
    targets = {1: empty(NUM_TOKENS), 2: empty(NUM_TOKENS)}
    tasks = [copies.new_store(seq, target, 8, 16) for seq, target in targets.items()]
    for layer in range(3):
        for task in tasks:
            copies.mover.store_layer(task, layer)
    copies.mover.finish_store(tasks[0], True)
    copies.mover.finish_store(tasks[1], False)
    assert copies.ended(2) == [("store", 1, True), ("store", 2, False)], "what the step computed for 2 is void"
    assert copies.layers == [("store", seq, layer) for layer in range(3) for seq in (1, 2)]


def test_a_load_that_fails_in_a_layer_leaves_the_layers_before_it_and_does_not_go_on(copies: Copies) -> None:
    source = full(NUM_TOKENS, before=fails_at(4))
    task = copies.load(1, source)
    after = copies.load(2, full(NUM_TOKENS))
    assert copies.ended(2) == [("load", 1, False), ("load", 2, True)]
    assert len(source.calls) == 5, "the second piece of the second layer was the last that was tried"
    assert [task.wait(layer) for layer in range(3)] == [False] * 3 and after.wait(2)
    assert copies.layers == [("load", 1, 0), *(("load", 2, layer) for layer in range(3))]


def test_a_store_that_fails_in_a_layer_writes_no_more_and_ends_badly(copies: Copies) -> None:
    copies.compute()
    target = empty(NUM_TOKENS, before=fails_at(4))
    copies.store(1, target)
    copies.store(2, empty(NUM_TOKENS))
    assert copies.ended(2) == [("store", 1, False), ("store", 2, True)]
    assert len(target.calls) == 5
    assert copies.layers == [("store", 1, 0), *(("store", 2, layer) for layer in range(3))]


def test_a_step_gets_each_layer_when_it_is_there(copies: Copies) -> None:
    gate = threading.Event()
    task = copies.load(1, full(NUM_TOKENS, before=held_by(gate, at=3)))
    assert task.wait(0), "the second layer is held up"
    assert len(copies.trace) == 1
    gate.set()
    assert task.wait(2) and copies.ended() == [("load", 1, True)]


def test_a_layer_that_does_not_come_in_time_makes_the_load_fail(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_mover, "LOAD_TIMEOUT_S", 0.01)
    gate = threading.Event()
    source = full(NUM_TOKENS, before=held_by(gate, at=3))
    task = copies.load(1, source)
    assert task.wait(0) and not task.wait(1)
    gate.set()
    assert copies.ended() == [("load", 1, False)], "told when the pages are let alone, and not before"
    assert len(source.calls) == 6, "the layer that was under way is the last"


def test_a_load_that_nobody_wants_any_more_copies_nothing(copies: Copies) -> None:
    gate = threading.Event()
    copies.load(1, full(NUM_TOKENS, before=held_by(gate)))
    source = full(NUM_TOKENS)
    copies.load(2, source).fail()
    gate.set()
    assert copies.ended(2) == [("load", 1, True), ("load", 2, False)]
    assert source.calls == []


def test_loads_and_stores_do_not_wait_for_each_other(copies: Copies) -> None:
    gate = threading.Event()
    copies.store(1, empty(NUM_TOKENS, before=held_by(gate)))
    copies.load(2, full(NUM_TOKENS))
    assert copies.ended() == [("load", 2, True)]
    gate.set()
    assert copies.ended() == [("store", 1, True)]


def test_intervals_of_one_thread_follow_each_other(copies: Copies) -> None:
    for seq in (1, 2):
        copies.load(seq, full(NUM_TOKENS))
    copies.ended(2)
    assert copies.layers == [("load", seq, layer) for seq in (1, 2) for layer in range(3)]
    times = [time for interval in copies.trace for time in (interval.start_ns, interval.end_ns)]
    assert times == sorted(times)


def test_close_ends_what_is_queued_first() -> None:
    copies, gate = Copies(), threading.Event()
    copies.load(1, full(NUM_TOKENS, before=held_by(gate)))
    copies.load(2, full(NUM_TOKENS))
    copies.store(3, empty(NUM_TOKENS))
    closing = threading.Thread(target=copies.mover.close)
    closing.start()
    assert copies.ended() == [("store", 3, True)]
    assert closing.is_alive()
    gate.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert copies.ended(2) == [("load", 1, True), ("load", 2, True)]


@pytest.mark.parametrize("what", ["load", "store"])
def test_an_error_that_is_none_of_ours_is_told_to_whoever_owns_the_process(what: str) -> None:
    def break_it(number: int) -> None:
        raise ZeroDivisionError

    copies = Copies()
    objects: Any = full(NUM_TOKENS, before=break_it)
    copies.load(1, objects) if what == "load" else copies.store(1, objects)
    copies.mover.close()
    assert [type(error) for error in copies.failures] == [ZeroDivisionError]
