"""What clients hold, batch by batch and one by one; what is still to be reported; allocators."""

from __future__ import annotations

import itertools
import random

import pytest

from mooncake.store.allocator import RECENT_MAX, Allocator
from mooncake.store.claims import Claims, Reservations
from mooncake.store.core import StoreCore
from mooncake.store.events import Cancel, Commit, Reserve
from mooncake.store.reports import Changes
from tests.store.helpers import UNIT, Driver, keys, ten_objects


def leased(*batches: tuple[int, ...]) -> Claims:
    """Row = number + 100."""
    claims = Claims()
    for numbers in batches:
        claims.lease(numbers, [number + 100 for number in numbers])
    return claims


def held(claims: Claims) -> list[int]:
    rows = sorted(claims.leased_rows())
    assert len(rows) == claims.num_leases + len(claims.aliases)
    return rows


@pytest.mark.parametrize("numbers", [(1, 2, 3), (4, 5), (1, 2, 3, 4, 5), (4, 5, 1, 2, 3), (1, 2, 3, 1, 2, 3)])
def test_calls_are_released_as_they_were_leased_or_one_after_the_other(numbers: tuple[int, ...]) -> None:
    claims = leased((1, 2, 3), (4, 5), (1, 2, 3), (9, 3))
    assert claims.release_whole(numbers) == [number + 100 for number in numbers]
    rest = [101, 101, 102, 102, 103, 103, 103, 104, 105, 109]
    for number in numbers:
        rest.remove(number + 100)
    assert held(claims) == rest


@pytest.mark.parametrize(
    "numbers", [(2, 3), (1, 2), (3, 2, 1), (1, 2, 3, 9), (1, 2, 3, 4, 5, 4, 5), (7,), (1, 1, 2, 3)]
)
def test_what_is_not_whole_is_released_singly(numbers: tuple[int, ...]) -> None:
    claims = leased((1, 2, 3), (4, 5), (1, 2, 3))
    before = held(claims)
    assert claims.release_whole(numbers) is None and held(claims) == before
    found = claims.release_singly(numbers)
    for at, number in enumerate(numbers):
        is_left = numbers[:at].count(number) < before.count(number + 100)
        assert found[at] == (number + 100 if is_left else None)
    for row in found:
        if row is not None:
            before.remove(row)
    assert held(claims) == before
    assert claims.leased_row(4) == (104 if 104 in before else None)


def test_a_lease_by_alias_is_released_by_it_only() -> None:
    claims = leased((1, 2))
    claims.aliases[7] = 101
    assert claims.release_whole((7,)) is None and claims.release_singly((7, 7, 1)) == [101, None, 101]
    assert held(claims) == [102]


def test_reservations_are_found_by_any_of_their_numbers_until_all_are_closed() -> None:
    claims = Claims()
    first, second = Reservations((3, 4, 5), [30, 40, 50], 9), Reservations((6, 7), [60, 70], 9)
    claims.reserve(first)
    claims.reserve(second)
    assert [claims.reserved_with(number) for number in range(2, 9)] == [None, first, first, first, second, second, None]
    assert first.live_rows((4, 5)) == [40, 50] and first.live_rows((5, 4)) is first.live_rows((5, 6)) is None
    claims.close(first, 4, 1)
    assert first.live_rows((3, 4)) is None and first.live_rows((5,)) == [50] and first.open_rows() == [30, 50]
    assert claims.take_reserved(4) is None and claims.take_reserved(5) == 50 and claims.take_reserved(3) == 30
    assert claims.reserved_with(3) is None and claims.num_reservations == 2
    second.is_late = True
    assert second.live_rows((6, 7)) is None and claims.writable_row(6) is None and claims.take_reserved(6) == 60


def test_closed_reservations_are_forgotten_behind_one_that_stays_open() -> None:
    drive = Driver(ten_objects())
    [stays] = drive(Reserve(1, 0, keys(0), (UNIT,)))
    for number in range(1, 1000):
        [put] = drive(Reserve(1, 0, keys(number), (UNIT,)))
        drive(Cancel(1, 0, (put.location.generation,)))
    assert len(drive.core._book.in_order) < 200
    assert drive(Commit(1, 0, (stays.location.generation,))) == (0,) and drive.core.deadline() is None


def test_changes_are_net() -> None:
    changes = Changes()
    a, b, c, d = keys(*range(4))
    changes.gained.append((a, b))
    changes.lost.append((c,))
    assert changes.take() == ((a, b), (c,)) and changes.seq == 1
    changes.gained += [(c, d), (d,)]
    changes.lost += [(a, d), (b,)]
    assert changes.take() == ((c, d), (a, b)) and changes.seq == 2
    changes.gained.append((a,))
    changes.lost.append((a,))
    assert changes.take() == ((), ()) and changes.seq == 2


def test_many_freed_extents_are_merged_as_they_come() -> None:
    count = 3 * RECENT_MAX
    allocator = Allocator(count * UNIT, UNIT)
    offsets = allocator.allocate(UNIT, count + 1)
    assert offsets == [at * UNIT for at in range(count)] and allocator.free_bytes == 0
    random.Random(1).shuffle(offsets)
    for at in range(0, count, 100):
        allocator.free(UNIT, offsets[at : at + 100])
    allocator.check_integrity({})
    assert len(allocator._recent[UNIT]) == RECENT_MAX
    assert allocator.allocate(count * UNIT, 1) == [0]


@pytest.mark.parametrize("seed", range(3))
def test_a_full_store_of_mixed_sizes_keeps_its_laws(seed: int) -> None:
    """Objects of one size take each other's places, those of others go through the allocator."""
    rng = random.Random(seed)
    core = StoreCore(40 * UNIT, epoch=1, alignment=UNIT)
    drive = Driver(core)
    numbers = itertools.count()
    for _ in range(300):
        count = rng.randrange(1, 8)
        sizes = (rng.choice((UNIT, 2 * UNIT)),) * count + (rng.randrange(1, 3 * UNIT),)
        puts = drive(Reserve(1, 0, keys(*[next(numbers) for _ in sizes]), sizes, all_or_nothing=rng.random() < 0.5))
        made = tuple(put.location.generation for put in puts if put.location is not None)
        if made:
            drive(Commit(1, 0, made))
    assert core.metrics()["evictions"] > 500 and core.metrics()["leases"] == 0
