"""Several writers of one key: the first commit wins, the others get its lease under their own numbers."""

from __future__ import annotations

import pytest

from mooncake.core.types import NANOS_PER_S
from mooncake.store.events import Cancel, ClientGone, Commit, Exists, Lease, Release, Remove, Report, Reserve, Tick
from mooncake.store.reservations import RESERVATION_NS
from mooncake.store.types import CommitStatus, PutMode, PutStatus
from tests.store.helpers import UNIT, Driver, Put, key, keys, ten_objects

A, B, C = 1, 2, 3
COMMITTED, EXPIRED, UNKNOWN, EXISTS = CommitStatus


def reserve(drive: Driver, client: int, number: int = 1, **options: object) -> Put:
    [put] = drive(Reserve(client, 0, keys(number), (UNIT,), **options))  # type: ignore[arg-type]
    return put  # type: ignore[no-any-return]


def two_writers(**options: object) -> tuple[Driver, int, int]:
    """A core in which A and B write key 1, and the numbers of their reservations."""
    drive = Driver(ten_objects(**options))
    puts = [reserve(drive, client) for client in (A, B)]
    assert [put.status for put in puts] == [PutStatus.RESERVED] * 2
    first, second = (put.location.generation for put in puts if put.location is not None)
    return drive, first, second


def measured(drive: Driver) -> tuple[int, int, int, int]:
    """Units used, objects, reservations, leases."""
    metrics = drive.core.metrics()
    return metrics["used_bytes"] // UNIT, metrics["objects"], metrics["reservations"], metrics["leases"]


def winner_of(drive: Driver) -> int:
    """The number of key 1's object, as a third client finds it."""
    [location] = drive(Lease(C, 0, keys(1)))
    drive(Release(C, 0, (location.generation,)))
    return int(location.generation)


@pytest.mark.parametrize("order", [(A, B), (B, A)], ids=["first-first", "second-first"])
@pytest.mark.parametrize("lease", [True, False])
def test_whoever_commits_first_wins(order: tuple[int, int], lease: bool) -> None:
    drive, *numbers = two_writers()
    assert measured(drive) == (2, 0, 2, 0)
    winner, loser = order
    assert drive(Commit(winner, 0, (numbers[winner - A],), checksums=(11,))) == (COMMITTED,)
    assert measured(drive) == (2, 1, 1, 0)
    assert drive(Commit(loser, 0, (numbers[loser - A],), lease, checksums=(22,))) == (EXISTS,)
    assert measured(drive) == (1, 1, 0, int(lease))
    assert winner_of(drive) == numbers[winner - A]
    assert drive.reports == [Report(7, 1, keys(1), ())] and drive.core.metrics()["commits"] == 1
    # the loser's checksum is not the object's
    assert reserve(drive, C, mode=PutMode.STRICT, checksums=(11,)).status is PutStatus.EXISTS
    assert reserve(drive, C, mode=PutMode.STRICT, checksums=(22,)).status is PutStatus.CONFLICT


def test_a_loser_can_neither_write_its_old_space_nor_read_under_either_number() -> None:
    drive, first, second = two_writers()
    offset = UNIT  # of the second
    assert drive.core.allows(B, second, offset, UNIT, True)
    drive(Commit(A, 0, (first,)))
    assert drive.core.allows(B, second, offset, UNIT, True)  # still its own until it is told
    drive(Commit(B, 0, (second,), lease=True))
    for number, at in ((first, 0), (second, offset)):
        assert not drive.core.allows(B, number, at, 1, True) and not drive.core.allows(B, number, at, 1, False)
    drive(Lease(B, 0, keys(1)))
    assert drive.core.allows(B, first, 0, UNIT, False)


def test_a_losers_lease_keeps_the_winner_from_eviction() -> None:
    drive, first, second = two_writers()
    drive(Commit(A, 0, (first,)))
    drive(Commit(B, 0, (second,), lease=True))
    puts = drive(Reserve(C, 0, keys(*range(10, 20)), (UNIT,) * 10))
    assert [put.status for put in puts] == [PutStatus.RESERVED] * 9 + [PutStatus.REFUSED]
    assert drive(Exists(C, 0, keys(1))) == (True,)
    assert drive(Release(B, 0, (second,))) == (True,)
    assert reserve(drive, C, 19).status is PutStatus.RESERVED
    assert drive(Exists(C, 0, keys(1))) == (False,)


def test_a_losers_lease_keeps_a_removed_winners_bytes() -> None:
    drive, first, second = two_writers()
    drive(Commit(A, 0, (first,)))
    drive(Commit(B, 0, (second,), lease=True))
    assert drive(Remove(C, 0, keys(1))) == (True,) and measured(drive) == (1, 0, 0, 1)
    assert drive(Release(B, 0, (second, second))) == (True, False) and measured(drive) == (0, 0, 0, 0)


def test_release_by_alias_and_by_number_are_two_leases() -> None:
    drive, first, second = two_writers()
    drive(Commit(A, 0, (first,)))
    drive(Commit(B, 0, (second,), lease=True))
    assert drive(Release(B, 0, (first,))) == (False,)  # the alias is not given back by the winner's number
    drive(Lease(B, 0, keys(1)))
    assert measured(drive) == (1, 1, 0, 2)
    assert drive(Release(A, 0, (second,))) == (False,)  # nor by another client
    assert drive(Release(B, 0, (second, second, first, first))) == (True, False, True, False)
    assert measured(drive) == (1, 1, 0, 0)


def test_a_client_that_is_gone_takes_its_aliases_leases_and_reservations_with_it() -> None:
    drive, first, second = two_writers()
    reserve(drive, B, 2)
    drive(Commit(A, 0, (first,), lease=True))
    drive(Commit(B, 0, (second,), lease=True))
    drive(Lease(B, 0, keys(1)))
    assert measured(drive) == (2, 1, 1, 3)
    drive(ClientGone(B))
    assert measured(drive) == (1, 1, 0, 1)
    assert drive(Release(B, 0, (second,))) == (False,)
    drive(ClientGone(A))
    assert measured(drive) == (1, 1, 0, 0)


def test_the_winner_may_go_while_the_loser_holds_its_object() -> None:
    drive, first, second = two_writers()
    drive(Commit(A, 0, (first,), lease=True))
    drive(Commit(B, 0, (second,), lease=True))
    drive(ClientGone(A))
    drive(Remove(C, 0, keys(1)))
    assert measured(drive) == (1, 0, 0, 1)
    drive(ClientGone(B))
    assert measured(drive) == (0, 0, 0, 0)


@pytest.mark.parametrize("end", [Cancel(A, 0, (1,)), ClientGone(A)], ids=["cancelled", "gone"])
@pytest.mark.parametrize("is_committed", [False, True])
def test_one_writer_ending_does_not_touch_the_other(end: Cancel | ClientGone, is_committed: bool) -> None:
    drive, _, second = two_writers()
    if is_committed:
        assert drive(Commit(B, 0, (second,), lease=True)) == (COMMITTED,)
    drive(end)
    assert measured(drive) == (1, int(is_committed), int(not is_committed), int(is_committed))
    if not is_committed:
        assert drive(Commit(B, 0, (second,), lease=True)) == (COMMITTED,)
    assert winner_of(drive) == second


def test_strict_writers_wait_for_every_live_writer() -> None:
    drive, first, second = two_writers()
    strict = {"mode": PutMode.STRICT, "checksums": (5,)}
    assert reserve(drive, C, **strict).status is PutStatus.BUSY
    drive(Cancel(A, 0, (first,)))
    assert reserve(drive, C, **strict).status is PutStatus.BUSY
    drive(Cancel(B, 0, (second,)))
    assert reserve(drive, C, **strict).status is PutStatus.RESERVED


def test_a_removed_winner_leaves_the_key_to_the_writer_that_is_left() -> None:
    drive, first, second = two_writers()
    drive(Commit(A, 0, (first,), lease=True))
    drive(Remove(C, 0, keys(1)))
    assert reserve(drive, C, mode=PutMode.STRICT, checksums=(5,)).status is PutStatus.BUSY
    assert drive(Commit(B, 0, (second,))) == (COMMITTED,)
    assert measured(drive) == (2, 1, 0, 1) and winner_of(drive) == second
    drive(Release(A, 0, (first,)))
    assert measured(drive) == (1, 1, 0, 0) and winner_of(drive) == second


@pytest.mark.parametrize("lease", [True, False])
def test_one_client_may_write_a_key_twice_and_commit_both_at_once(lease: bool) -> None:
    drive = Driver(ten_objects())
    numbers = tuple(reserve(drive, A).location.generation for _ in range(2))  # type: ignore[union-attr]
    assert drive(Commit(A, 0, numbers, lease)) == (COMMITTED, EXISTS)
    assert measured(drive) == (1, 1, 0, 2 * lease)
    assert drive(Release(A, 0, numbers)) == (lease, lease)
    assert measured(drive) == (1, 1, 0, 0)
    assert drive(Commit(A, 0, numbers)) == (UNKNOWN, UNKNOWN)


def test_an_ephemeral_winner_lives_as_long_as_a_losers_lease() -> None:
    drive = Driver(ten_objects())
    first, second = (reserve(drive, client, ephemeral=True).location.generation for client in (A, B))  # type: ignore[union-attr]
    drive(Commit(A, 0, (first,), lease=True))
    drive(Commit(B, 0, (second,), lease=True))
    drive(Release(A, 0, (first,)))
    assert measured(drive) == (1, 1, 0, 1)
    drive(Release(B, 0, (second,)))
    assert measured(drive) == (0, 0, 0, 0) and drive.reports == []


def expire(drive: Driver, at: int) -> None:
    drive.now = at
    drive(Tick())


def test_each_of_two_writers_expires_at_its_own_time() -> None:
    drive = Driver(ten_objects(reservation_ns=100))
    first = reserve(drive, A)
    drive.now = 50
    second = reserve(drive, B)
    assert first.location is not None and second.location is not None
    expire(drive, 100)
    assert drive.core.metrics()["expired"] == 1 and drive.core.deadline() == 150
    assert not drive.core.allows(A, 1, first.location.offset, 1, True)
    assert drive.core.allows(B, 2, second.location.offset, 1, True)
    assert reserve(drive, C, mode=PutMode.STRICT, checksums=(5,)).status is PutStatus.BUSY
    assert drive(Commit(B, 0, (2,), lease=True)) == (COMMITTED,)
    assert measured(drive) == (2, 1, 1, 1)  # the late writer's bytes are its own until it says something
    assert drive(Commit(A, 0, (1,), lease=True)) == (EXPIRED,)
    assert measured(drive) == (1, 1, 0, 1) and drive.core.deadline() is None


def test_two_expired_writers_leave_the_key_free() -> None:
    drive, first, second = two_writers(reservation_ns=100)
    expire(drive, 100)
    assert drive.core.metrics()["expired"] == 2 and measured(drive) == (2, 0, 2, 0)
    assert reserve(drive, C, mode=PutMode.STRICT, checksums=(5,)).status is PutStatus.RESERVED
    assert drive(Commit(A, 0, (first,))) == drive(Commit(B, 0, (second,))) == (EXPIRED,)
    assert drive(Lease(A, 0, (key(1),))) == (None,) and measured(drive) == (1, 0, 1, 0)


def test_the_winner_outlives_the_expiry_of_the_loser() -> None:
    drive, first, second = two_writers(reservation_ns=100)
    drive(Commit(A, 0, (first,)))
    expire(drive, 100)
    assert drive.core.metrics()["expired"] == 1 and drive(Exists(C, 0, keys(1))) == (True,)
    assert drive(Commit(B, 0, (second,), lease=True)) == (EXPIRED,) and drive(Release(B, 0, (second,))) == (False,)
    assert measured(drive) == (1, 1, 0, 0)


def test_a_reservation_lives_ten_minutes() -> None:
    drive = Driver(ten_objects())
    reserve(drive, A)
    assert drive.core.deadline() == RESERVATION_NS == 600 * NANOS_PER_S
