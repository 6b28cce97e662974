"""Two tiers of a few objects each: what is written behind, read back, waited for, and dropped. Integrity is checked after every
event."""

from __future__ import annotations

from typing import Any

import pytest

from mooncake.core.types import Tier
from mooncake.store.core import StoreCore
from mooncake.store.events import (
    Cancel,
    ClientGone,
    Commit,
    Exists,
    Fault,
    Lease,
    ReadSsd,
    Release,
    Remove,
    Report,
    Reserve,
    Snapshot,
    SnapshotWanted,
    SsdRead,
    SsdRecovered,
    SsdRests,
    SsdWritten,
    Tick,
    WriteSsd,
)
from mooncake.store.lifecycle import State, Trigger, advance
from mooncake.store.ssd import REST_NS, SsdConfig
from mooncake.store.types import CommitStatus, PutMode, PutStatus
from tests.store.helpers import UNIT, Told, key, keys
from tests.store.ssd import LOAD_WAIT, ROOM_WAIT, TABLE_PAGES, Tiered, tiered

A, B = 1, 2
RESERVED, EXISTS, REFUSED, BUSY, CONFLICT = PutStatus


def put(store: Tiered, *numbers: int, client: int = A, **options: object) -> None:
    """Each in a call of its own, so that the first is the coldest."""
    for number in numbers:
        [made] = store(Reserve(client, 5, keys(number), (UNIT,), **options)) or settle(store, 5)  # type: ignore[arg-type]
        assert made.status is RESERVED
        store.write(made.location, key(number))
        assert store(Commit(client, 0, (made.location.generation,))) == (CommitStatus.COMMITTED,)


def hits(store: Tiered, answer: tuple[object, ...] | None) -> list[bytes | None]:
    """Contents of what was leased."""
    assert answer is not None
    return [None if location is None else store.segment[location.offset] for location in answer]  # type: ignore[attr-defined]


def generations(answer: tuple[object, ...]) -> tuple[int, ...]:
    return tuple(location.generation for location in answer if location is not None)  # type: ignore[attr-defined]


def demoted(store: Tiered, *numbers: int, room: int) -> None:
    """These are only on SSD: `room` others, more than memory has beside them, push them out."""
    put(store, *numbers)
    fillers = range(900, 900 + room)
    put(store, *fillers)
    store.do_all()
    for number in fillers:
        assert store(Remove(B, 0, keys(number))) == (True,)
    assert [store.core._objects.by_key.get(key(number)) for number in numbers] == [None] * len(numbers)


def settle(store: Tiered, request_id: int) -> Any:
    """The answer that waits for the disk."""
    store.do_all()
    return store.answers.pop(request_id)


def metric(store: Tiered, name: str) -> int:
    return store.core.metrics()[name]


# ------------------------------------------------------------ written behind


def test_without_capacity_there_is_no_tier() -> None:
    core = StoreCore(10 * UNIT, epoch=1, alignment=UNIT, ssd=SsdConfig())
    assert not [name for name in core.metrics() if "ssd" in name]
    assert [type(command) for command in core.handle(SnapshotWanted(), 0)] == [Snapshot]


def test_the_coldest_are_written_before_room_is_needed() -> None:
    store = tiered(4, 8, ready=2)
    put(store, 1, 2)
    assert store.jobs == []
    put(store, 3, 4)
    assert [job.keys for job in store.jobs] == [keys(1), keys(2)]
    assert isinstance(store.jobs[0], WriteSsd) and metric(store, "ready_bytes") == 0
    store.do_all()
    assert store.ssd and metric(store, "ready_bytes") == 2 * UNIT
    assert metric(store, "objects") == 4 and metric(store, "ssd_objects") == 2
    put(store, 5, 6)
    assert metric(store, "evictions") == 2 and metric(store, "lost_evictions") == 0
    assert store(Exists(A, 0, keys(1, 2, 3, 7))) == (True, True, True, False)


def test_a_call_without_room_waits_for_the_write_and_gets_that_extent() -> None:
    store = tiered(2, 8)
    put(store, 1, 2)
    assert store(Reserve(A, 9, keys(3), (UNIT,))) is None
    [job] = store.jobs
    assert job.keys == keys(1) and metric(store, "waiting") == 1
    store(Tick())
    assert store.answers == {}
    store.do()
    [made] = store.answers[9]
    assert made.status is RESERVED and made.location.offset == job.offsets[0]
    assert metric(store, "waiting") == 0 and metric(store, "lost_evictions") == 0


def test_a_slow_disk_does_not_hold_a_writer_up_for_long() -> None:
    store = tiered(2, 8)
    put(store, 1, 2)
    assert store(Reserve(A, 9, keys(3), (UNIT,))) is None
    assert store.core.deadline() == ROOM_WAIT
    store.now = ROOM_WAIT
    store(Tick())
    [made] = store.answers[9]
    assert made.status is RESERVED and metric(store, "lost_evictions") == 1
    assert store(Exists(A, 0, keys(1, 2))) == (True, False)  # what is being written stays
    store.do_all()
    assert store(Exists(A, 0, keys(1, 2))) == (True, False)


def test_refused_after_the_wait_if_all_is_leased_or_being_written() -> None:
    store = tiered(2, 8)
    put(store, 1, 2)
    assert store(Lease(B, 0, keys(2)))
    assert store(Reserve(A, 9, keys(3, 4), (UNIT, UNIT), all_or_nothing=True)) is None
    store.now = ROOM_WAIT
    store(Tick())
    assert [p.status for p in store.answers[9]] == [REFUSED, REFUSED]
    store.do_all()
    assert store(Reserve(B, 9, keys(5), (UNIT,)))[0].status is RESERVED


def test_calls_that_wait_go_on_in_order() -> None:
    store = tiered(2, 8)
    put(store, 1, 2)
    for request_id in (8, 9):
        assert store(Reserve(A, request_id, keys(request_id), (UNIT,))) is None
    assert [job.keys for job in store.jobs] == [keys(1), keys(2)]
    store.do(1)
    assert list(store.answers) == [8]
    store.do()
    assert list(store.answers) == [8, 9]


def test_what_is_ready_can_be_leased_and_is_not_written_twice() -> None:
    store = tiered(4, 8, ready=2)
    put(store, 1, 2, 3, 4)
    store.do_all()
    leased = store(Lease(B, 0, keys(1)))
    assert hits(store, leased) == [key(1)] and metric(store, "ready_bytes") == 2 * UNIT - UNIT
    [job] = store.jobs
    assert job.keys == keys(3)
    store.do_all()
    store(Release(B, 0, generations(leased)))
    put(store, 5, 6)  # 2 and 3 go; 1 was used since, so it is the last but has a copy
    store.do_all()
    assert [n for n in (1, 2, 3, 4, 5, 6) if key(n) in store.core._objects.by_key] == [1, 4, 5, 6]
    put(store, 7, 8, 9)
    store.do_all()
    assert metric(store, "ssd_writes") == len(store.ssd) == metric(store, "ssd_objects")


def test_a_lease_while_it_is_written_keeps_it_in_memory() -> None:
    store = tiered(2, 8)
    put(store, 1, 2)
    assert store(Reserve(A, 9, keys(3), (UNIT,))) is None
    leased = store(Lease(B, 0, keys(1)))
    assert hits(store, leased) == [key(1)]
    store.do()
    assert metric(store, "ssd_objects") == 1 and 9 not in store.answers
    [job] = store.jobs  # the next coldest is written instead
    assert job.keys == keys(2)
    store.do()
    assert store.answers[9][0].status is RESERVED
    assert hits(store, leased) == [key(1)]


def test_a_failed_write_is_counted_and_the_object_goes_unsaved() -> None:
    store = tiered(4, 8, ready=2)
    put(store, 1, 2, 3, 4)
    assert store.do(failed=(0,)).keys == keys(1)
    store.do_all()
    assert metric(store, "ssd_write_errors") == 1 and metric(store, "ssd_used_bytes") == UNIT
    assert store(Exists(A, 0, keys(1))) == (True,)
    put(store, 5)
    assert store(Exists(A, 0, keys(1))) == (False,) and metric(store, "lost_evictions") == 1


def test_removed_while_it_is_written() -> None:
    store = tiered(4, 8, ready=1)
    put(store, 1, 2, 3, 4)
    assert [job.keys for job in store.jobs] == [keys(1)]
    assert store(Remove(A, 0, keys(1))) == (True,)
    assert store(Exists(A, 0, keys(1))) == (False,)
    assert metric(store, "used_bytes") == 4 * UNIT and metric(store, "ssd_used_bytes") == UNIT  # the write has both
    assert store.do().keys == keys(1)
    assert metric(store, "used_bytes") == 3 * UNIT and metric(store, "ssd_used_bytes") == 0


def test_removed_written_and_put_again_at_once() -> None:
    store = tiered(3, 8, ready=1)
    put(store, 1, 2, 3)
    assert store(Remove(A, 0, keys(1))) == (True,)
    for _ in range(2):
        store(Reserve(A, 9, keys(1), (UNIT,)))
    store.do_all()
    [made] = store.answers[9]
    store.write(made.location, b"new")
    assert store(Commit(A, 0, (made.location.generation,))) == (CommitStatus.COMMITTED,)
    assert hits(store, store(Lease(B, 0, keys(1)))) == [b"new"]


# ------------------------------------------------------------ eviction from SSD


def test_ssd_evicts_its_own_coldest_and_never_what_is_read() -> None:
    store = tiered(4, 2)
    demoted(store, 1, 2, room=4)
    assert store(Lease(B, 9, keys(1))) is None  # the coldest there, and now being read
    put(store, 3, 4, 5)
    assert store(Reserve(A, 8, keys(6), (UNIT,))) is None
    assert [job.keys for job in store.jobs] == [keys(1), keys(3)]
    assert metric(store, "ssd_evictions") == 1
    assert store(Exists(A, 0, keys(1, 2))) == (True, False)
    store.do_all()
    assert hits(store, store.answers[9]) == [key(1)]


def test_an_ssd_that_is_being_read_or_written_takes_no_more() -> None:
    store = tiered(3, 1)
    put(store, 1, 2, 3)
    assert store(Reserve(A, 9, keys(4, 5), (UNIT, UNIT), all_or_nothing=True)) is None
    assert [job.keys for job in store.jobs] == [keys(1)] and metric(store, "ready_bytes") == UNIT  # 2 goes unsaved
    store.do()
    assert [p.status for p in store.answers[9]] == [RESERVED, RESERVED]
    assert store(Exists(A, 0, keys(1, 2, 3))) == (True, False, True) and metric(store, "lost_evictions") == 1


def test_the_least_recently_demoted_goes_first() -> None:
    store = tiered(2, 2)
    put(store, 1, 2, 3, 4)
    assert list(store.core._ssd.log.copies) == [key(1), key(2)]  # type: ignore[union-attr]
    assert store(Lease(B, 6, keys(1))) is None  # a use
    assert hits(store, settle(store, 6)) == [key(1)]
    assert sorted(store.core._ssd.log.copies) == sorted(keys(1, 3))  # type: ignore[union-attr]


# ------------------------------------------------------------ read back


def test_a_lease_waits_for_its_objects_to_be_read() -> None:
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    put(store, 3)
    assert store(Lease(B, 9, keys(3, 1, 2, 4))) is None
    [job] = store.jobs
    assert isinstance(job, ReadSsd) and job.keys == keys(1, 2)
    assert metric(store, "waiting") == 1 and metric(store, "leases") == 0
    assert not store.core.allows(B, 1, job.offsets[0], UNIT, False)
    store.do()
    assert hits(store, store.answers[9]) == [key(3), key(1), key(2), None]
    assert store.num_loaded[9] == 2
    assert metric(store, "hits") == 3 and metric(store, "misses") == 1 and metric(store, "leases") == 3
    assert all(store(Release(B, 0, generations(store.answers[9]))))
    assert hits(store, store(Lease(B, 0, keys(1, 2)))) == [key(1), key(2)]  # now in both tiers
    assert metric(store, "ssd_objects") >= 2


def test_nothing_behind_a_miss_is_read() -> None:
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    put(store, 3)
    assert hits(store, store(Lease(B, 9, keys(7, 1, 3)))) == [None, None, key(3)]
    assert store.jobs == []
    assert store(Lease(B, 9, keys(1, 7, 2))) is None
    assert [job.keys for job in store.jobs] == [keys(1)]
    store.do()
    assert hits(store, store.answers[9]) == [key(1), None, None]


def test_a_failed_read_is_a_miss_and_drops_the_copy() -> None:
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    store(Lease(B, 9, keys(1, 2)))
    store.do(failed=(1,))
    assert hits(store, store.answers[9]) == [key(1), None] and store.num_loaded[9] == 1
    assert metric(store, "ssd_read_errors") == 1 and metric(store, "misses") == 1
    assert store(Exists(A, 0, keys(1, 2))) == (True, False)
    assert metric(store, "used_bytes") == UNIT


def test_who_asks_for_what_is_being_read_joins() -> None:
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    store(Lease(A, 8, keys(1)))
    store(Lease(B, 9, keys(1, 1, 2)))
    assert [job.keys for job in store.jobs] == [keys(1), keys(2)]
    store.do()
    assert hits(store, store.answers[8]) == [key(1)] and 9 not in store.answers
    store.do()
    assert hits(store, store.answers[9]) == [key(1), key(1), key(2)] and metric(store, "leases") == 4
    assert store(Release(B, 0, generations(store.answers[9]))) == (True, True, True)


def test_a_large_lease_is_read_in_jobs_and_what_is_late_is_missed() -> None:
    store = tiered(4, 8, job=2)
    demoted(store, 1, 2, 3, room=4)
    store(Lease(B, 9, keys(1, 2, 3)))
    assert [job.keys for job in store.jobs] == [keys(1, 2), keys(3)]
    store.do()
    assert store.core.deadline() == LOAD_WAIT
    store.now = LOAD_WAIT
    store(Tick())
    assert hits(store, store.answers[9]) == [key(1), key(2), None] and store.num_loaded[9] == 2
    store.do()  # it comes too late for that one, and is there for the next
    assert hits(store, store(Lease(A, 0, keys(3)))) == [key(3)]


def test_client_gone_while_its_objects_are_read() -> None:
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    put(store, 3)
    assert store(Lease(B, 9, keys(3, 1))) is None
    store(ClientGone(B))
    assert metric(store, "waiting") == 0
    store.do()
    assert 9 not in store.answers
    assert metric(store, "leases") == 0 and metric(store, "used_bytes") == metric(store, "evictable_bytes") == 2 * UNIT


def test_client_gone_while_it_waits_for_room() -> None:
    store = tiered(2, 8)
    put(store, 1, 2)
    store(Reserve(B, 9, keys(3), (UNIT,)))
    store(ClientGone(B))
    store.do_all()
    assert 9 not in store.answers and metric(store, "reservations") == metric(store, "waiting") == 0


def test_removed_while_it_is_read() -> None:
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    store(Lease(B, 9, keys(1, 2)))
    assert store(Remove(A, 0, keys(1))) == (True,)
    assert store(Exists(A, 0, keys(1))) == (False,)
    store.do()
    assert hits(store, store.answers[9]) == [None, key(2)]
    assert metric(store, "ssd_read_errors") == 0 and metric(store, "used_bytes") == UNIT


def test_removed_in_both_tiers() -> None:
    store = tiered(4, 8, ready=2)
    put(store, 1, 2, 3, 4)
    store.do_all()
    assert store(Remove(A, 0, keys(1))) == (True,)
    assert store(Exists(A, 0, keys(1))) == (False,) and metric(store, "ssd_objects") == 1


def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooncake.store.waiting.WAITING_MAX", 1)
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    put(store, 3, 4, 5)
    assert store(Reserve(A, 8, keys(6), (UNIT,))) is None
    assert hits(store, store(Lease(B, 9, keys(1, 3)))) == [None, key(3)]
    assert store(Reserve(A, 9, keys(7), (UNIT,)))[0].status is RESERVED and metric(store, "lost_evictions") == 1


# ------------------------------------------------------------ writers of what is on SSD


def test_a_writer_waits_for_what_is_being_read_and_leases_it() -> None:
    store = tiered(4, 8)
    demoted(store, 1, room=4)
    store(Lease(B, 8, keys(1)))
    assert store(Reserve(A, 9, keys(1, 2), (UNIT, UNIT), lease_existing=True, all_or_nothing=True)) is None
    store.do()
    first, second = store.answers[9]
    assert (first.status, second.status) == (EXISTS, RESERVED)
    assert first.location == store.answers[8][0]


def test_a_writer_of_what_is_only_on_ssd_does_not_wait() -> None:
    store = tiered(4, 8)
    demoted(store, 1, room=4)
    put(store, 1)
    assert store.jobs == [] and hits(store, store(Lease(B, 0, keys(1)))) == [key(1)]


def test_the_first_of_a_writer_and_a_load_wins() -> None:
    store = tiered(4, 8)
    demoted(store, 1, room=4)
    [made] = store(Reserve(A, 0, keys(1), (UNIT,)))
    store.write(made.location, b"written")
    assert store(Lease(B, 9, keys(1))) is None
    store(Commit(A, 0, (made.location.generation,)))
    store.do()
    assert store.answers[9] == (made.location,) and store.num_loaded[9] == 0
    assert metric(store, "used_bytes") == UNIT
    assert store(Release(B, 0, (made.location.generation,))) == (True,)


def test_a_strict_writer_is_compared_with_ssd() -> None:
    store = tiered(2, 8)
    put(store, 1, mode=PutMode.STRICT, checksums=(11,))
    put(store, 2)
    store(Reserve(A, 8, keys(3, 4), (UNIT, UNIT)))
    store.do_all()
    assert all(store(Cancel(A, 0, tuple(p.location.generation for p in store.answers[8]))))
    strict = {"mode": PutMode.STRICT, "checksums": (11,)}
    assert store(Reserve(A, 0, keys(2), (UNIT,), **strict))[0].status is CONFLICT
    assert store(Reserve(A, 0, keys(1), (UNIT,), **(strict | {"checksums": (12,)})))[0].status is CONFLICT
    store(Lease(B, 9, keys(1)))
    [job] = store.jobs
    assert job.checksums == (11,)
    store.do()
    assert store(Reserve(A, 0, keys(1), (UNIT,), **strict))[0].status is EXISTS


# ------------------------------------------------------------ reports, and what is illegal


def test_each_tier_reports_by_itself() -> None:
    store = tiered(2, 2)
    put(store, 1, 2)
    store(Reserve(A, 9, keys(3), (UNIT,)))
    store.reports.clear()
    store.do()
    gone, written = store.reports
    assert gone == Report(7, 3, (), keys(1)) and gone.tier is Tier.DRAM
    assert written == Report(7, 1, keys(1), (), Tier.SSD)
    store.reports.clear()
    store(SnapshotWanted())
    assert store.reports == [Snapshot(7, 3, keys(2)), Snapshot(7, 1, keys(1), Tier.SSD)]
    store.reports.clear()
    store(Lease(B, 8, keys(1)))
    store.do_all()
    assert hits(store, store.answers[8]) == [key(1)]
    assert store.reports == [
        Report(7, 4, (), keys(2)),
        Report(7, 2, keys(2), (), Tier.SSD),
        Report(7, 5, keys(1), ()),
    ]


def test_answers_to_jobs_that_are_not_there_change_nothing() -> None:
    store = tiered(2, 4)
    put(store, 1, 2)
    before = store.core.metrics()
    store(SsdWritten(1))
    store(SsdRead(77, (0,)))
    assert store.core.metrics() == before and store.jobs == []


def test_bad_arguments_are_faults_and_do_not_wait() -> None:
    store = tiered(2, 4)
    put(store, 1, 2)
    assert isinstance(store(Reserve(A, 0, keys(3), (UNIT, UNIT))), Fault)
    assert isinstance(store(Lease(A, 0, (b"short",))), Fault)
    assert metric(store, "waiting") == 0


def test_a_load_begins_with_reserved_space_only() -> None:
    assert [state for state in State if advance(state, Trigger.LOAD)] == [State.RESERVED]
    assert advance(State.LOADING, Trigger.COMMIT) is None and advance(State.LOADING, Trigger.EVICT) is None


# ------------------------------------------------------------ the log


def test_extents_are_evicted_whole_and_the_oldest_first() -> None:
    store = tiered(4, 6, extent=2, ready=4)
    put(store, 1, 2, 3, 4, 5, 6)
    store.do_all()
    assert list(store.core._ssd.log.copies) == list(keys(1, 2, 3, 4, 5, 6))  # type: ignore[union-attr]
    put(store, 7)
    store.do_all()
    assert list(store.core._ssd.log.copies) == list(keys(3, 4, 5, 6, 7))  # type: ignore[union-attr]
    assert metric(store, "ssd_evictions") == 2 and metric(store, "lost_evictions") == 0


def test_a_job_crosses_into_the_next_extent() -> None:
    store = tiered(8, 9, extent=3, ready=5)
    put(store, 1, 2, 3, 4, 5, 6, 7, 8)
    jobs = [store.do() for _ in range(len(store.jobs))]
    runs = [[(run.extent, run.count, run.opens) for run in job.runs] for job in jobs if isinstance(job, WriteSsd)]
    assert runs == [[(0, 2, True)], [(0, 1, False), (1, 1, True)]]


def test_what_is_used_is_written_again_before_its_extent_goes() -> None:
    """A copy that is in the older half of the log when its object leaves memory again."""
    store = tiered(4, 4, ready=1)
    put(store, 1, 2, 3, 4)
    store.do_all()
    assert list(store.core._ssd.log.copies) == [key(1)]  # type: ignore[union-attr]
    assert store(Release(B, 0, generations(store(Lease(B, 0, keys(1))))))
    for number in range(5, 10):
        put(store, number)
        store.do_all()
    assert key(1) not in store.core._objects.by_key
    assert list(store.core._ssd.log.copies) == list(keys(4, 1, 5, 6))  # type: ignore[union-attr]
    assert metric(store, "ssd_evictions") == 3 and metric(store, "lost_evictions") == 0


def test_an_object_larger_than_an_extent_is_not_written() -> None:
    store = tiered(4, 8, ready=4)
    [made] = store(Reserve(A, 0, keys(1), (2 * UNIT,)))
    store(Commit(A, 0, (made.location.generation,)))
    put(store, 2)
    store.do_all()
    assert metric(store, "ssd_objects") == 1 and metric(store, "ssd_write_errors") == 0
    assert metric(store, "ssd_refused") == 1
    put(store, 3, 4, 5)
    assert store(Exists(A, 0, keys(1))) == (False,) and metric(store, "lost_evictions") == 1


# ------------------------------------------------------------ corrupt, broken, and back again


def test_an_object_that_is_corrupt_in_memory_is_gone_and_counted() -> None:
    store = tiered(4, 8, ready=2)
    put(store, 1, 2, 3, 4)
    leased = store(Lease(B, 0, keys(1)))
    [first, _] = store.jobs
    store.jobs.clear()
    store(SsdWritten(first.job, corrupt=(0,)))
    assert store(Exists(A, 0, keys(1))) == (False,)
    assert metric(store, "ssd_corrupt") == 1 and metric(store, "ssd_write_errors") == 0
    assert store(Release(B, 0, generations(leased))) == (True,)
    assert metric(store, "objects") == 3 and metric(store, "ssd_objects") == 0


def test_a_corrupt_copy_is_a_miss_dropped_and_counted() -> None:
    store = tiered(3, 8)
    demoted(store, 1, 2, room=3)
    store(Lease(B, 9, keys(1, 2)))
    [job] = store.jobs
    store.jobs.clear()
    store(SsdRead(job.job, corrupt=(0,)))
    assert [found is None for found in store.answers[9]] == [True, False]
    assert metric(store, "ssd_corrupt") == 1 and metric(store, "ssd_read_errors") == 0
    assert store(Exists(A, 0, keys(1, 2))) == (False, True)


def test_checksums_that_the_shell_took_stay_with_the_copy() -> None:
    store = tiered(4, 8, ready=1)
    put(store, 1, 2, 3, 4)
    [job] = store.jobs
    assert job.checksums == (None,)
    store.jobs.clear()
    store(SsdWritten(job.job, checksums=(77,)))
    store.ssd[job.ssd_offsets[0]] = key(1)
    put(store, 5, 6, 7)
    store.do_all()
    store(Lease(B, 9, keys(1)))
    [read] = [job for job in store.jobs if isinstance(job, ReadSsd)]
    assert read.checksums == (77,)


def test_after_three_failed_writes_the_disk_rests_and_is_tried_again() -> None:
    store = tiered(4, 8, ready=2)
    put(store, 1, 2, 3, 4)
    while store.jobs:
        store.do(failed=(0,))
        put(store, 10 + metric(store, "ssd_write_errors"))
    assert metric(store, "ssd_write_errors") == 3 and metric(store, "ssd_rests") == 1
    assert [command for command in store.reports if isinstance(command, SsdRests)] == [SsdRests(3, REST_NS)]
    assert store(Reserve(A, 9, keys(20), (UNIT,)))[0].status is RESERVED  # nobody waits for a disk that rests
    store.now = REST_NS - 1
    store(Tick())
    assert store.jobs == []
    store.now = REST_NS
    store(Tick())
    [job] = store.jobs  # one, to try
    store.do(failed=tuple(range(len(job.keys))))
    assert store.jobs == [] and metric(store, "ssd_rests") == 2
    store.now = 2 * REST_NS
    put(store, 21)
    assert len(store.jobs) == 1
    store.do()
    assert metric(store, "ssd_writes") > 0 and metric(store, "ssd_rests") == 2


def test_what_an_earlier_life_left_is_there_and_reported() -> None:
    store = tiered(4, 8, extent=2)
    extent, table = (TABLE_PAGES + 2) * UNIT, TABLE_PAGES * UNIT
    offsets = (table, extent + table, extent + table + UNIT)
    store(SsdRecovered(keys(1, 2, 3), (UNIT,) * 3, offsets, (11, 12, 13), (5, 6, 0, 0)))
    assert store.reports == [Report(7, 1, keys(1, 2, 3), (), Tier.SSD)] and metric(store, "ssd_recovered") == 3
    store.ssd |= dict(zip(offsets, keys(1, 2, 3), strict=True))
    assert store(Lease(B, 9, keys(2, 1, 4))) is None
    [job] = store.jobs
    assert isinstance(job, ReadSsd) and (job.ssd_offsets, job.checksums) == ((offsets[1], offsets[0]), (12, 11))
    store.do()
    assert hits(store, store.answers[9]) == [key(2), key(1), None]


def test_a_removal_is_noted_on_ssd() -> None:
    store = tiered(4, 8, extent=2, ready=2)
    put(store, 1, 2, 3, 4)
    store.do_all()
    assert store(Remove(A, 0, keys(1, 4))) == (True, True)
    [job] = store.jobs
    assert isinstance(job, WriteSsd) and (job.keys, job.sizes, job.offsets) == (keys(1), (0,), (0,))
    assert [(run.count, run.opens) for run in job.runs] == [(1, False)]
    store.do(failed=(0,))
    assert metric(store, "ssd_write_errors") == 0
    assert [job.keys for job in store.jobs] == [keys(1)]
    store.do()
    assert store.jobs == [] and metric(store, "ssd_used_bytes") == UNIT


def test_a_newer_copy_needs_no_note_of_the_removal_before() -> None:
    store = tiered(3, 8, ready=2)
    put(store, 1, 2, 3)
    assert [job.keys for job in store.jobs] == [keys(1), keys(2)]
    assert store(Remove(A, 0, keys(1))) == (True,)  # both writes are under way: it is to be noted later
    put(store, 1)
    store.do_all()
    assert store(Exists(A, 0, keys(1))) == (True,) and not store.core._ssd._removed  # type: ignore[union-attr]


def test_what_is_read_back_knows_its_place_in_the_chain() -> None:
    policy = Told()
    store = tiered(4, 8, policy=policy)
    demoted(store, 1, 2, 3, room=4)
    assert set(policy.parents.values()) == {None}  # each was stored in a call of its own
    assert store(Lease(A, 9, keys(1, 2, 3))) is None
    settle(store, 9)
    assert [policy.parents[key(number)] for number in (1, 2, 3)] == [None, key(1), key(2)]
