"""Blocks that are loaded before their sequence comes: pages of four tokens, blocks of eight, twelve pages of which three are
kept free of such loads."""

from typing import Any

import pytest

from mooncake.engine.core import AheadEnded, KvLoaded, LoadKv, SequenceReleased
from tests.engine.test_engine_core import Driver, make_job


def keys(number: int, count: int) -> tuple[bytes, ...]:
    return make_job(number, 8 * count).block_keys


def ahead(drive: Driver, seq: int, number: int, count: int, start: int = 0) -> None:
    """The first blocks of that sequence's prompt."""
    drive.core.load_ahead(seq, keys(number, count), start)


def loads(drive: Driver) -> list[tuple[int, int, int]]:
    return [(load.seq, load.start, load.end) for load in drive.of(LoadKv)]


def held(**more: Any) -> Driver:
    """One that leaves loads under way until the test ends them."""
    drive = Driver(**more)
    drive.hold = True
    return drive


def end(drive: Driver, seq: int, ok: bool = True) -> None:
    drive.core.loaded(seq, ok)
    drive.core.check_integrity()


def test_a_sequence_finds_what_was_loaded_ahead_and_loads_the_rest() -> None:
    drive = Driver()
    ahead(drive, 100, 1, 1)
    assert drive.step() is None
    ahead(drive, 101, 1, 2, start=8)
    assert drive.step() is None
    assert drive.of(AheadEnded) == [AheadEnded(100), AheadEnded(101)]
    assert drive.core.idle and drive.core.pool.num_free == 12, "it keeps no pages"
    drive.submit(1, 21, max_tokens=2, source_tokens=20)
    assert [drive.step() for _ in range(2)] == [None, [(1, 20, 1)]]
    assert loads(drive) == [(100, 0, 8), (101, 8, 16), (1, 16, 20)]
    assert drive.core.num_loaded_tokens == 20, "each token once"


def test_a_part_waits_for_the_one_before_it_and_a_sequence_for_both() -> None:
    drive = held()
    ahead(drive, 100, 1, 1)
    ahead(drive, 101, 1, 2, start=8)
    assert drive.shape() is None
    drive.submit(1, 21, source_tokens=20)
    assert drive.shape() is None and loads(drive) == [(100, 0, 8)]
    end(drive, 100)
    assert drive.shape() is None
    assert loads(drive) == [(100, 0, 8), (1, 8, 20)], "who is ready goes first"
    end(drive, 1)
    assert drive.shape() == [(1, 20, 1)]
    assert drive.of(AheadEnded) == [AheadEnded(100), AheadEnded(101)]


def test_what_comes_twice_is_loaded_once() -> None:
    drive = held()
    ahead(drive, 100, 1, 2)
    ahead(drive, 101, 1, 2)
    drive.shape()
    end(drive, 100)
    drive.shape()
    assert loads(drive) == [(100, 0, 16)] and drive.of(AheadEnded) == [AheadEnded(100), AheadEnded(101)]
    assert drive.core.idle


def test_a_part_without_the_one_before_it_is_dropped() -> None:
    drive = Driver()
    ahead(drive, 101, 1, 3, start=16)
    assert drive.step() is None
    assert drive.outputs == [AheadEnded(101)] and drive.core.idle


def test_a_failed_load_leaves_nothing_and_the_sequence_loads_all() -> None:
    drive = held()
    ahead(drive, 100, 1, 2)
    drive.shape()
    end(drive, 100, ok=False)
    drive.submit(1, 21, source_tokens=20)
    drive.shape()
    assert loads(drive) == [(100, 0, 16), (1, 0, 20)]
    assert drive.core.num_loaded_tokens == 0


@pytest.mark.parametrize(("held_tokens", "starts"), [(12, True), (16, False)])
def test_some_pages_stay_free_of_such_loads(held_tokens: int, starts: bool) -> None:
    """A sequence of its own holds 3 or 4 of 12 pages; the load wants 6, and 3 must stay."""
    drive = held()
    drive.submit(1, held_tokens)
    drive.shape()
    drive.finish()
    ahead(drive, 100, 2, 3)
    drive.shape()
    assert loads(drive) == ([(100, 0, 24)] if starts else [])
    assert drive.of(AheadEnded) == ([] if starts else [AheadEnded(100)])


def test_nothing_is_loaded_ahead_while_a_sequence_waits_for_pages() -> None:
    drive = held()
    drive.submit(1, 16)
    drive.submit(2, 40)
    drive.step()
    ahead(drive, 100, 3, 1)
    drive.step()
    assert drive.core.load.num_waiting == 1 and drive.core.pool.num_free - 2 >= 3
    assert loads(drive) == [] and drive.of(AheadEnded) == [AheadEnded(100)]


def test_who_needs_the_pages_takes_them() -> None:
    drive = Driver()
    ahead(drive, 100, 1, 4)
    drive.step()
    drive.submit(2, 40, max_tokens=9)
    drive.run()
    assert drive.core.num_preempted == 0 and SequenceReleased(2) in drive.outputs
    drive.submit(1, 33, source_tokens=32)
    assert drive.step() is None
    drive.run()
    [load] = [load for load in drive.of(LoadKv) if load.seq == 1]
    assert load.end == 32 and load.start < 32, "what was evicted is loaded again"
    assert SequenceReleased(1) in drive.outputs


def test_a_sequence_that_finds_no_page_beside_a_load_ahead_pauses_and_is_not_preempted() -> None:
    drive = held()
    drive.submit(1, 11, max_tokens=30)
    drive.step()
    ahead(drive, 100, 2, 3)
    assert drive.step() == [(1, 11, 1)] and loads(drive) == [(100, 0, 24)]
    drive.run()
    assert drive.core.load.context_tokens == 25, "its six pages are full, and the others are being written to"
    end(drive, 100)
    assert drive.step() == [(1, 24, 1)] and drive.core.num_preempted == 0


def test_a_load_ahead_ends_beside_others_that_have_ended() -> None:
    """An abort of the sequence does not concern it."""
    drive = held()
    ahead(drive, 100, 1, 2)
    drive.shape()
    drive.submit(1, 21, source_tokens=20)
    drive.shape()
    drive.core.abort(1)
    drive.core.abort(100)
    drive.shape()
    assert SequenceReleased(1) in drive.outputs and not drive.core.idle
    end(drive, 100)
    drive.shape()
    assert drive.core.idle and drive.of(KvLoaded) == []
