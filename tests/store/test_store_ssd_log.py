"""Which extent is written to, and which is used again."""

from __future__ import annotations

import pytest

from mooncake.store.events import SsdRecovered, SsdRun
from mooncake.store.ssd_layout import PAGE_ENTRIES, Geometry
from mooncake.store.ssd_log import Copy, SsdLog
from tests.store.helpers import UNIT, key, keys

TABLE = 4
EXTENT = TABLE + 3


def small_log(num_extents: int = 3, data: int = 3, table: int = TABLE) -> SsdLog:
    """Room for so many objects of one unit in each extent."""
    return SsdLog(Geometry(num_extents, (table + data) * UNIT, table * UNIT, UNIT))


def write(log: SsdLog, *numbers: int, units: int = 1) -> list[SsdRun]:
    """Placed, written and let go."""
    copies, runs = log.place([units * UNIT] * len(numbers), 0)
    assert len(copies) == len(numbers)
    for number, copy in zip(numbers, copies, strict=True):
        log.commit(key(number), copy)
    log.release(copies)
    log.check_integrity([], [])
    return runs


def known(log: SsdLog) -> list[int]:
    return sorted(int.from_bytes(each, "big") for each in log.copies)


def places(log: SsdLog) -> dict[int, int]:
    """Extents by key."""
    return {number: log.copies[key(number)].extent for number in known(log)}


def test_runs_follow_each_other_in_extent_and_table() -> None:
    log = small_log()
    assert write(log, 1) == [SsdRun(1, 0, 1, UNIT, opens=True)]
    assert write(log, 2, 3, 4) == [SsdRun(2, 0, 1, 2 * UNIT, False), SsdRun(1, 1, 2, (EXTENT + 1) * UNIT, True)]
    offsets = [log.copies[key(number)].offset // UNIT for number in (1, 2, 3, 4)]
    assert offsets == [TABLE, TABLE + 1, TABLE + 2, EXTENT + TABLE]


def test_the_oldest_extent_is_used_again_and_all_in_it_is_lost() -> None:
    log = small_log()
    write(log, *range(9))
    log.changes.take()
    assert write(log, 10) == [SsdRun(1, 0, 4, UNIT, True)]
    assert known(log) == [3, 4, 5, 6, 7, 8, 10] and log.num_evictions == 3 and log.evicted_bytes == 3 * UNIT
    assert log.changes.take() == (keys(10), keys(0, 1, 2))
    write(log, 11, 12, 13)
    assert known(log) == [6, 7, 8, 10, 11, 12, 13] and places(log)[13] == 1


def test_what_is_read_or_written_is_not_used_again() -> None:
    log = small_log()
    write(log, *range(9))
    read = [log.copies[key(0)]]
    log.hold(read)
    written, _ = log.place([UNIT], 0)
    assert written[0].extent == 1 and known(log) == [0, 1, 2, 6, 7, 8]
    log.check_integrity([*read, *written], written)
    more, _ = log.place([UNIT] * 6, 0)
    assert [copy.extent for copy in more] == [1, 1, 2, 2, 2] and known(log) == [0, 1, 2]  # no extent for the sixth
    log.release(read)
    last, _ = log.place([UNIT], 0)
    assert last[0].extent == 0 and known(log) == []


def test_what_is_wanted_is_spared_for_a_while() -> None:
    log = small_log()
    write(log, *range(9))
    log.spare(keys(1), until=50)
    first, _ = log.place([UNIT] * 3, 49)
    assert {copy.extent for copy in first} == {1}
    second, _ = log.place([UNIT], 50)
    assert second[0].extent == 0


def test_a_new_copy_takes_the_place_of_the_old() -> None:
    log = small_log()
    write(log, *range(9))
    log.changes.take()
    write(log, 5)
    assert log.used_bytes == 6 * UNIT and places(log)[5] == 0
    assert log.changes.take() == ((), keys(0, 1, 2))
    write(log, 20, 21, 22)
    assert places(log) == {5: 0, 6: 2, 7: 2, 8: 2, 20: 0, 21: 0, 22: 1}
    assert log.num_evictions == 5  # of extent 1 two: the copy of 5 that was there was none any more


def test_removed_and_failed_places_are_free_with_their_extent() -> None:
    log = small_log()
    write(log, 1)
    assert log.remove(key(1)) and not log.remove(key(1))
    [copy], _ = log.place([UNIT], 0)
    assert copy.offset == (TABLE + 1) * UNIT and log.used_bytes == UNIT and log.idle_bytes == 0
    log.discard(copy)
    log.release([copy])
    assert log.used_bytes == 0
    log.check_integrity([], [])


def test_copies_are_old_in_the_second_half_of_their_time() -> None:
    log = small_log(num_extents=4)
    write(log, *range(6))
    assert not log.is_old(key(0))
    write(log, 6)
    assert log.is_old(key(0)) and not log.is_old(key(3))


def test_an_object_that_no_extent_has_room_for_does_not_fit() -> None:
    log = small_log()
    assert log.fits(3 * UNIT) and not log.fits(3 * UNIT + 1)


def test_room_that_is_too_short_is_left() -> None:
    log = small_log()
    write(log, 1, 2)
    assert write(log, 3, units=2) == [SsdRun(1, 1, 2, (EXTENT + 1) * UNIT, True)]


def test_a_full_table_ends_an_extent_too() -> None:
    log = small_log(data=9)
    for number in range(TABLE - 1):
        write(log, number)
    assert [run.extent for run in write(log, 9)] == [1]
    log = small_log(data=3 * PAGE_ENTRIES + 1, table=3)
    assert [run.count for run in write(log, *range(2 * PAGE_ENTRIES + 1))] == [2 * PAGE_ENTRIES, 1]


def test_a_log_that_comes_back_writes_to_extents_it_opens() -> None:
    log = small_log()
    copy = Copy(1, (EXTENT + TABLE + 2) * UNIT, UNIT, 77)
    log.restore(SsdRecovered(keys(5), (copy.size,), (copy.offset,), (77,), (0, 8, 9)))
    log.check_integrity([], [])
    assert log.changes.take() == (keys(5), ()) and log.used_bytes == UNIT
    assert (log.copies[key(5)].extent, log.copies[key(5)].checksum) == (1, 77)
    assert [(run.extent, run.sequence, run.opens) for run in write(log, 1, 2, 3, 4)] == [(0, 10, True), (1, 11, True)]
    assert known(log) == [1, 2, 3, 4]


def test_integrity_sees_what_is_lost() -> None:
    log = small_log()
    write(log, 1)
    with pytest.raises(AssertionError, match="holds do not add up"):
        log.check_integrity([log.copies[key(1)]], [])
    log.copies[key(2)] = log.copies[key(1)]
    with pytest.raises(AssertionError, match="two copies are at one place"):
        log.check_integrity([], [])
