"""Life cycle on stores of ten objects: exact outcomes, conservation checked after every event."""

from __future__ import annotations

import itertools

import pytest

from mooncake.store.events import (
    Cancel,
    ClientGone,
    Commit,
    Exists,
    Fault,
    Grant,
    Lease,
    Name,
    Release,
    Remove,
    Report,
    Reserve,
    Snapshot,
    SnapshotWanted,
    Tick,
)
from mooncake.store.lifecycle import TABLE, State, Trigger, advance
from mooncake.store.types import CommitStatus, Location, PutMode, PutStatus
from tests.store.helpers import UNIT, Driver, key, keys, ten_objects

A, B = 1, 2
RESERVED, EXISTS, REFUSED, BUSY, CONFLICT = PutStatus


def put(drive: Driver, *numbers: int, client: int = A, lease: bool = False, **options: object) -> tuple[int, ...]:
    """Reserve and commit; the objects' numbers."""
    puts = drive(Reserve(client, 0, keys(*numbers), (UNIT,) * len(numbers), **options))  # type: ignore[arg-type]
    made = tuple(p.location.generation for p in puts)
    assert drive(Commit(client, 0, made, lease=lease)) == (CommitStatus.COMMITTED,) * len(made)
    return made


def statuses(drive: Driver, *numbers: int, client: int = A, **options: object) -> list[PutStatus]:
    puts = drive(Reserve(client, 0, keys(*numbers), (UNIT,) * len(numbers), **options))  # type: ignore[arg-type]
    return [p.status for p in puts]


def present(drive: Driver, *numbers: int) -> list[int]:
    return [n for n, there in zip(numbers, drive(Exists(A, 0, keys(*numbers))), strict=True) if there]


def test_table_is_closed_and_every_state_can_end() -> None:
    for state, trigger in itertools.product(State, Trigger):
        assert advance(state, trigger) == TABLE.get((state, trigger))
    reached = {State.FREE}
    for _ in State:
        reached |= {after for (before, _), after in TABLE.items() if before in reached}
    assert reached == set(State)
    assert {before for (before, _), after in TABLE.items() if after is State.FREE} == set(State) - {State.FREE}


def test_an_object_is_visible_only_after_commit() -> None:
    drive = Driver(ten_objects())
    [answer] = drive(Reserve(A, 0, keys(1), (50,)))
    assert answer.status is RESERVED and answer.location == Location(answer.location.offset, 50, 1)
    assert present(drive, 1) == [] and drive(Lease(B, 0, keys(1))) == (None,)
    assert drive(Commit(A, 0, (1,))) == (CommitStatus.COMMITTED,)
    assert present(drive, 1) == [1] and drive(Lease(B, 0, keys(1, 2))) == (answer.location, None)
    assert drive.core.metrics()["hits"] == 1 and drive.core.metrics()["misses"] == 2


def test_writer_gone_frees_its_key_at_once() -> None:
    drive = Driver(ten_objects())
    statuses(drive, *range(10))
    drive(ClientGone(A))
    assert drive.core.metrics()["used_bytes"] == 0
    assert statuses(drive, 1, client=B) == [RESERVED]


def test_claims_belong_to_their_client() -> None:
    drive = Driver(ten_objects())
    statuses(drive, 1)
    assert drive(Commit(B, 0, (1,))) == (CommitStatus.UNKNOWN,)
    assert drive(Cancel(B, 0, (1,))) == (False,)
    assert drive(Commit(A, 0, (1, 1, 99), lease=True)) == (
        CommitStatus.COMMITTED,
        CommitStatus.UNKNOWN,
        CommitStatus.UNKNOWN,
    )
    assert drive(Release(B, 0, (1,))) == (False,)
    assert drive(Release(A, 0, (1, 1))) == (True, False)
    assert drive(Cancel(A, 0, (1,))) == (False,)


def test_eviction_takes_the_oldest_chain_suffix_first() -> None:
    drive = Driver(ten_objects())
    put(drive, 1, 2, 3, 4, 5)
    put(drive, 11, 12, 13, 14, 15)
    put(drive, 21, 22)
    assert present(drive, 1, 2, 3, 4, 5, 11, 15, 21) == [1, 2, 3, 11, 15, 21]
    locations = drive(Lease(B, 0, keys(1, 2, 3)))
    drive(Release(B, 0, tuple(location.generation for location in locations)))
    put(drive, 31, 32)
    assert present(drive, 1, 2, 3, 11, 12, 13, 14, 15) == [1, 2, 3, 11, 12, 13]


def test_leased_and_reserved_space_is_never_evicted() -> None:
    drive = Driver(ten_objects())
    numbers = put(drive, 1, 2, 3, 4, lease=True)
    statuses(drive, 5, 6, 7, 8, 9, 10)
    assert statuses(drive, 11) == [REFUSED]
    drive(Release(A, 0, numbers[:1]))
    assert statuses(drive, 11) == [RESERVED] and present(drive, 1, 2, 3, 4) == [2, 3, 4]


def test_leases_are_counted_by_client_and_end_with_it() -> None:
    drive = Driver(ten_objects())
    (number,) = put(drive, 1)
    for client in (A, A, B):
        drive(Lease(client, 0, keys(1)))
    drive(Remove(A, 0, keys(1)))
    drive(ClientGone(A))
    assert drive.core.metrics()["used_bytes"] == UNIT
    drive(Release(B, 0, (number,)))
    assert drive.core.metrics()["used_bytes"] == 0


def test_remove_hides_at_once_and_frees_with_the_last_lease() -> None:
    drive = Driver(ten_objects())
    (number,) = put(drive, 1, lease=True)
    assert drive(Remove(B, 0, keys(1, 2))) == (True, False)
    assert present(drive, 1) == [] and drive.core.allows(A, number, 0, 0, False)
    assert statuses(drive, 1, client=B) == [RESERVED]
    drive(Release(A, 0, (number,)))
    assert not drive.core.allows(A, number, 0, 0, False)
    assert drive(Remove(B, 0, keys(1))) == (False,)


def test_all_or_nothing_reserves_all_or_leaves_all_as_it_was() -> None:
    drive = Driver(ten_objects())
    put(drive, 1, 2)
    statuses(drive, 3, client=B)
    # 7 free and one that can be evicted, which the batch itself does not use
    batch = (1, 3, *range(11, 19))
    assert statuses(drive, *batch, lease_existing=True, all_or_nothing=True) == [REFUSED] * 10
    assert drive.core.metrics()["leases"] == 0 and drive.core.metrics()["reservations"] == 1
    assert statuses(drive, *batch, lease_existing=True) == [EXISTS] + [RESERVED] * 8 + [REFUSED]
    drive(ClientGone(A))
    assert statuses(drive, *batch[:9], lease_existing=True, all_or_nothing=True) == [EXISTS] + [RESERVED] * 8


def test_a_batch_does_not_evict_what_it_found() -> None:
    drive = Driver(ten_objects())
    put(drive, *range(10))
    assert statuses(drive, 0, *range(20, 30)) == [EXISTS] + [RESERVED] * 9 + [REFUSED]
    assert present(drive, *range(10)) == [0]


def test_ephemeral_objects_go_with_their_last_lease_and_are_not_reported() -> None:
    drive = Driver(ten_objects())
    (number,) = put(drive, 1, lease=True, ephemeral=True)
    drive(Lease(B, 0, keys(1)))
    drive(Release(A, 0, (number,)))
    assert present(drive, 1) == [1]
    drive(SnapshotWanted())
    drive(ClientGone(B))
    assert present(drive, 1) == [] and drive.core.metrics()["used_bytes"] == 0
    assert drive.reports == [Snapshot(7, 0, ())]


def test_an_expired_reservation_frees_its_key_but_not_its_bytes() -> None:
    drive = Driver(ten_objects(reservation_ns=100))
    statuses(drive, 1, 2)
    assert drive.core.deadline() == 100
    drive.now = 99
    drive(Tick())
    assert statuses(drive, 1, client=B, mode=PutMode.STRICT, checksums=(5,)) == [BUSY]
    drive.now = 100
    drive(Tick())
    assert not drive.core.allows(A, 1, 0, 1, True)
    assert statuses(drive, 1, client=B, mode=PutMode.STRICT, checksums=(5,)) == [RESERVED]
    assert drive.core.metrics()["used_bytes"] == 3 * UNIT
    assert drive(Commit(A, 0, (1,))) == (CommitStatus.EXPIRED,) and drive(Cancel(A, 0, (2,))) == (True,)
    assert present(drive, 1) == [] and drive.core.metrics()["used_bytes"] == UNIT
    assert drive.core.deadline() == 200


def test_strict_puts_compare_checksums() -> None:
    drive = Driver(ten_objects())
    put(drive, 1, mode=PutMode.STRICT, checksums=(111,))
    put(drive, 2)
    strict = {"mode": PutMode.STRICT, "client": B}
    assert statuses(drive, 1, checksums=(111,), **strict) == [EXISTS]
    assert statuses(drive, 1, 2, checksums=(112, 5), **strict) == [CONFLICT, CONFLICT]
    assert statuses(drive, 1, client=B) == [EXISTS]
    assert drive.core.metrics()["conflicts"] == 2 and drive.core.metrics()["leases"] == 0


def test_reports_are_net_numbered_and_gathered() -> None:
    drive = Driver(ten_objects(report_ns=10))
    put(drive, 1, 2)
    drive(Remove(A, 0, keys(2)))
    assert drive.reports == [] and drive.core.deadline() == 10
    drive.now = 10
    drive(Tick())
    assert drive.reports == [Report(7, 1, keys(1), ())]
    drive(Remove(A, 0, keys(1)))
    put(drive, 3)
    drive(SnapshotWanted())
    assert drive.reports[1:] == [Report(7, 2, keys(3), keys(1)), Snapshot(7, 2, keys(3))]


def test_eviction_is_reported() -> None:
    drive = Driver(ten_objects())
    put(drive, *range(10))
    statuses(drive, 10, 11)
    assert drive.reports == [Report(7, 1, keys(*range(10)), ()), Report(7, 2, (), keys(9, 8))]


@pytest.mark.parametrize(
    ("event", "argument"),
    [
        (Lease(A, 5, ()), "keys"),
        (Exists(A, 5, (b"short",)), "keys[0]"),
        (Reserve(A, 5, keys(1), ()), "sizes"),
        (Reserve(A, 5, keys(1), (0,)), "sizes[0]"),
        (Reserve(A, 5, keys(1, 2), (1, 10 * UNIT + 1)), "sizes[1]"),
        (Reserve(A, 5, keys(1, 1), (1, 1)), "keys"),
        (Reserve(A, 5, keys(1), (1,), mode=PutMode.STRICT), "checksums"),
        (Reserve(A, 5, keys(1), (1,), checksums=(-1,)), "checksums"),
        (Commit(A, 5, (1,), checksums=(1, 2)), "checksums"),
        (Release(A, 5, ()), "numbers"),
    ],
)
def test_an_invalid_request_does_nothing_and_names_its_argument(event: object, argument: str) -> None:
    drive = Driver(ten_objects())
    fault = drive(event)  # type: ignore[arg-type]
    assert isinstance(fault, Fault) and fault.request_id == 5 and fault.detail.startswith(f"{argument}:")
    assert drive.core.metrics()["used_bytes"] == 0


def test_a_range_is_allowed_only_inside_a_live_claim() -> None:
    drive = Driver(ten_objects())
    puts = drive(Reserve(A, 0, keys(1, 2), (UNIT, UNIT)))
    at, number = puts[1].location.offset, puts[1].location.generation
    allows = drive.core.allows
    assert allows(A, number, at, UNIT, True) and allows(A, number, at + 1, UNIT - 1, True)
    assert not allows(A, number, at, UNIT + 1, True) and not allows(A, number, at - 1, 2, True)
    assert not allows(B, number, at, 1, True) and not allows(A, number, at, 1, False)
    drive(Commit(A, 0, (number,), lease=True))
    assert (
        allows(A, number, at, UNIT, False)
        and not allows(A, number, at, 1, True)
        and not allows(B, number, at, 1, False)
    )
    assert key(1) != key(2)


def test_only_the_last_key_of_a_batch_may_be_ephemeral() -> None:
    drive = Driver(ten_objects())
    puts = drive(Reserve(A, 0, keys(1, 2), (50, 50), ephemeral_last=True))
    numbers = tuple(put.location.generation for put in puts)
    drive(Commit(A, 0, numbers, lease=True))
    drive(Release(A, 0, numbers))
    assert present(drive, 1, 2) == [1]


def test_granted_space_is_named_when_it_is_written() -> None:
    drive = Driver(ten_objects())
    first, second, third = (place.generation for place in drive(Grant(A, 0, (64, 64, 50))))
    assert present(drive, 1) == [] and drive.core.metrics()["granted"] == 3
    assert drive.core.metrics()["reservations"] == 0 and drive.core.metrics()["used_bytes"] == 3 * UNIT
    assert statuses(drive, 2, client=B) == [RESERVED]
    [location] = drive(Lease(B, 0, keys(2)))
    assert location is None
    assert drive(Name(A, 0, keys(1, 2), (first, second), (60, 64), (7, None))) == (CommitStatus.COMMITTED,) * 2
    assert present(drive, 1, 2) == [1, 2] and [place.size for place in drive(Lease(B, 0, keys(1, 2)))] == [60, 64]
    again = drive(Name(A, 0, keys(1, 5, 6), (third, 999, first), (50, 64, 64)))
    assert again == (CommitStatus.EXISTS, CommitStatus.UNKNOWN, CommitStatus.UNKNOWN)
    assert drive.core.metrics()["granted"] == 0
    [blank] = drive(Grant(A, 0, (64,)))
    assert "has no key" in drive(Commit(A, 0, (blank.generation,))).detail
    assert drive(Cancel(A, 0, (blank.generation,))) == (True,)
    wrong = drive(Name(A, 0, keys(7, 7), (4, 5), (64, 64)))
    assert "twice" in wrong.detail
    drive(ClientGone(A))
    drive(ClientGone(B))
    assert drive.core.metrics()["granted"] == 0 and drive.core.metrics()["used_bytes"] == 2 * UNIT


def test_a_grant_that_ran_out_is_no_object_any_more() -> None:
    drive = Driver(ten_objects(reservation_ns=10))
    [place] = drive(Grant(A, 0, (64,)))
    drive.now = 10
    drive(Tick())
    assert drive(Name(A, 0, keys(1), (place.generation,), (64,))) == (CommitStatus.EXPIRED,)
    assert present(drive, 1) == [] and drive.core.metrics()["used_bytes"] == 0


def test_what_finds_no_room_is_not_granted_and_a_name_must_fit() -> None:
    drive = Driver(ten_objects())
    granted = drive(Grant(A, 0, (64,) * 11))
    assert [place is None for place in granted] == [False] * 10 + [True]
    number = granted[0].generation
    reserved = ten_objects()
    assert drive(Name(A, 0, keys(1), (number,), (65,))) == (CommitStatus.UNKNOWN,)
    assert drive(Name(B, 0, keys(1), (number,), (64,))) == (CommitStatus.UNKNOWN,), "it is another's"
    assert present(drive, 1) == [] and drive.core.metrics()["granted"] == 10
    drive = Driver(reserved)
    [put] = drive(Reserve(A, 0, keys(2), (64,)))
    assert drive(Name(A, 0, keys(3), (put.location.generation,), (64,))) == (CommitStatus.UNKNOWN,)
    assert drive(Commit(A, 0, (put.location.generation,))) == (CommitStatus.COMMITTED,) and present(drive, 2, 3) == [2]
