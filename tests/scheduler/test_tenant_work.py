"""What a tenant waits for where others have work too, and what the Conductor predicts by it."""

from __future__ import annotations

import pytest

from mooncake.core.messages import PrefillDone, Rejected
from mooncake.core.types import AttemptKey, Slo
from mooncake.scheduler.tenant_work import TenantWork
from tests.scheduler.cluster import MS, Cluster


def work(**booked: list[int]) -> TenantWork:
    found = TenantWork()
    for tenant, prefills in booked.items():
        for ns in prefills:
            found.add(tenant, 1.0, ns)
    return found


@pytest.mark.parametrize(
    ("booked", "tenant", "weight", "expected"),
    [
        ({}, "a", 1.0, 1000),
        ({"a": [500, 500]}, "a", 1.0, 1000),
        ({"a": [100] * 10}, "b", 1.0, 100),  # the one under way
        ({"a": [100] * 9, "b": [100]}, "b", 1.0, 300),  # its own, as much of a, and the one under way
        ({"a": [100] * 8, "b": [200]}, "b", 2.0, 400),  # half as much of a
        ({"a": [100] * 8, "b": [200]}, "a", 1.0, 1000),  # b has no more
        ({"a": [100] * 4, "b": [100] * 4, "c": [100] * 2}, "d", 1.0, 300),
    ],
)
def test_the_wait_of_the_next_request(booked: dict[str, list[int]], tenant: str, weight: float, expected: int) -> None:
    assert work(**booked).wait_ns(tenant, weight, 1000) == expected


def test_what_is_done_is_gone() -> None:
    found = work(a=[100, 300], b=[50])
    found.remove("a", 300)
    found.remove("b", 50)
    assert found.sum() == (1, 100)
    assert found.wait_ns("b", 1.0, 100) == 100 and found.wait_ns("a", 1.0, 100) == 100
    found.remove("a", 100)
    assert found.sum() == (0, 0)


def test_the_conductor_predicts_by_turns() -> None:
    """Ten requests of one tenant are booked, 11 ms each: another one's comes after one of them, its own after all."""
    cluster = Cluster(admission="off")
    cluster.prefill("p", num_pages=100_000)
    cluster.decode("d", num_pages=100_000)
    for request in range(10):
        cluster.place(request, 100, tenant="a")
    assert cluster.place(10, 100, tenant="a").prediction.ttft_ns == 121 * MS
    assert cluster.place(11, 100, tenant="b").prediction.ttft_ns == 22 * MS
    assert cluster.place(12, 100, tenant="b").prediction.ttft_ns == 44 * MS  # one of a's for b's own, and one under way
    for request in range(13):
        cluster.receive("f", PrefillDone(AttemptKey("f", request)))
    cluster.core.check_integrity()


def test_admission_goes_by_turns() -> None:
    cluster = Cluster(admission="hard")
    cluster.prefill("p", num_pages=100_000)
    cluster.decode("d", num_pages=100_000)
    slo = Slo(ttft_ns=60 * MS)
    answers = [cluster.answer(request, 100, tenant="a", slo=slo) for request in range(20)]
    refused = [answer for answer in answers if isinstance(answer, Rejected)]
    assert len(answers) - len(refused) == 5
    assert not isinstance(cluster.answer(20, 100, tenant="b", slo=Slo(ttft_ns=30 * MS)), Rejected)
