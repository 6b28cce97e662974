"""The Conductor takes its samples in time, and tells an instance to change its role."""

from typing import Any

from mooncake.core.messages import AttemptEnded, ChangeRole, Message, PrefillDone, Register, StateChange
from mooncake.core.types import AttemptKey, InstanceState, Role, Slo
from mooncake.scheduler.config import RolesConfig
from mooncake.scheduler.core import Tick
from tests.scheduler.cluster import COST, MS, Cluster, S, info, messages

CONFIG = RolesConfig(sample_ns=2 * S, num_samples=2, ttft_ns=1 * S, tbt_ns=1 * S, rest_ns=20 * S)


def cluster(num_prefill: int, num_decode: int, **config: Any) -> Cluster:
    found = Cluster(switch_roles=True, roles=CONFIG, **config)
    for at in range(num_prefill):
        found.prefill(f"p{at}")
    for at in range(num_decode):
        found.decode(f"d{at}", epoch=7, max_batch=1000, num_pages=100_000)
    return found


def calm(found: Cluster) -> Cluster:
    """Nothing is due but samples: snapshots are not asked for again, and the index is swept."""
    found.core.feeds.asked.clear()
    found.event(Tick())
    return found


def tick(cluster: Cluster) -> list[tuple[str, Message]]:
    """At the Conductor's own deadline."""
    due = cluster.core.deadline()
    assert due is not None
    cluster.now = due
    return messages(cluster.event(Tick()), ChangeRole)


def test_samples_are_taken_at_regular_intervals_from_the_first_instance_on() -> None:
    found = Cluster(switch_roles=True, roles=CONFIG)
    assert found.core.deadline() is None
    found.now = 5 * S
    found.prefill("p0")
    assert calm(found).core.deadline() == 7 * S
    assert [tick(found) for _ in range(3)] == [[], [], []]
    assert (found.now, found.core.deadline()) == (11 * S, 13 * S)


def test_off_is_off() -> None:
    found = Cluster(roles=CONFIG)
    found.prefill("p0")
    assert calm(found).core.deadline() is None


def test_the_instance_of_a_pool_that_can_spare_it_is_told() -> None:
    found = calm(cluster(1, 3))
    for request in range(30):  # 9 s of prefill, and next to nothing for the batches
        found.place(request, 2_990)
    assert tick(found) == []
    [(name, change)] = tick(found)
    assert change == ChangeRole(name, 7, Role.PREFILL) and name in ("d0", "d1", "d2")
    assert tick(found) == [], "that one is under way"
    found.receive(name, StateChange(name, 7, InstanceState.DRAINING, COST))
    assert tick(found) == []
    found.receive(name, Register(info(name, Role.PREFILL, epoch=8)))
    calm(found)
    assert sorted(found.core.view.pools[0].names) == sorted(("p0", name))
    assert tick(found) == [], "it rests"
    found.core.check_integrity()


def test_bookings_of_the_old_role_go_with_it() -> None:
    found = cluster(1, 2)
    found.place(1, 100)
    [decode] = [name for name, booked in found.booked().items() if booked == (0, 1)]
    found.receive(decode, StateChange(decode, 7, InstanceState.DRAINING, COST))
    found.receive(decode, Register(info(decode, Role.PREFILL, epoch=8)))
    assert found.booked()[decode] == (0, 0)
    found.receive("f", PrefillDone(AttemptKey("f", 1), 5))
    assert AttemptKey("f", 1) not in found.core.books.bookings


class Objectives:
    """What is attained, by samples of a view without load."""

    def __init__(self, **config: Any) -> None:
        self.cluster = calm(cluster(4, 4, **config))
        self.request = 0

    def serve(self, count: int, ttft_ns: int, itl_ns: int, slo: Slo) -> None:
        for _ in range(count):
            self.request += 1
            self.cluster.place(self.request, 10, slo=slo)
            key = AttemptKey("f", self.request)
            self.cluster.receive("f", PrefillDone(key, ttft_ns))
            self.cluster.receive("f", AttemptEnded(key, 5, True, itl_ns))

    def told(self) -> list[Role]:
        return [change.role for _ in range(2) for _, change in tick(self.cluster) if isinstance(change, ChangeRole)]


SLO = Slo(ttft_ns=500 * MS, tbt_ns=50 * MS)


def test_missed_objectives_ask_for_more_instances_of_that_pool() -> None:
    late, slow, fine = Objectives(), Objectives(), Objectives()
    late.serve(40, 501 * MS, 50 * MS, SLO)
    assert late.told() == [Role.PREFILL]
    slow.serve(40, 500 * MS, 51 * MS, SLO)
    assert slow.told() == [Role.DECODE]
    fine.serve(40, 500 * MS, 50 * MS, SLO)
    assert fine.told() == []


def test_requests_without_objectives_and_few_of_them_say_nothing() -> None:
    none, few = Objectives(), Objectives()
    none.serve(40, 10 * S, 10 * S, Slo())
    assert none.told() == []
    few.serve(9, 10 * S, 50 * MS, SLO)
    assert few.told() == []


def test_what_was_missed_long_ago_is_forgotten() -> None:
    found = Objectives()
    found.serve(12, 10 * S, 50 * MS, SLO)
    assert found.told() == [], "in the second sample, six outcomes are left of twelve"


def test_refusals_are_missed_objectives() -> None:
    found = Objectives(admission="hard")
    for request in range(40):
        answer = found.cluster.answer(request, 900, slo=Slo(ttft_ns=10 * MS))
        assert getattr(answer, "reason", "") == "overloaded_ttft"
    assert found.told() == [Role.PREFILL]


def test_a_pool_that_lost_its_last_instance_gets_another() -> None:
    found = calm(cluster(1, 2))
    assert tick(found) == []
    found.receive("p0", StateChange("p0", 1, InstanceState.GONE, COST))
    calm(found)
    assert tick(found) == []
    assert tick(found) == [("d0", ChangeRole("d0", 7, Role.PREFILL))]


def test_colocated_instances_stay_what_they_are() -> None:
    found = cluster(0, 0)
    for at in range(3):
        found.instance(f"c{at}", Role.COLOCATED)
    calm(found)
    assert [tick(found) for _ in range(5)] == [[]] * 5
