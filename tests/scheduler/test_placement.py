import pytest

from mooncake.core.messages import LoadReport, PrefillDone, Rejected
from mooncake.core.types import AttemptKey, CostModel, InstanceState, KvSource, Role
from mooncake.scheduler.core import PeerGone
from tests.scheduler.cluster import BLOCK, COST, MS, Cluster, S, blocks, load

EVEN = ["round_robin", "least_load", "local_cache_aware", "algorithm1", "joint"]


def test_prediction_is_the_formula_with_its_numbers() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cluster.decode("d")
    placed = cluster.place(1, 100)
    prediction = placed.prediction
    assert (placed.prefill, placed.decode, placed.source) == ("p", "d", None)
    assert (prediction.queue_ns, prediction.load_ns, prediction.prefill_ns) == (0, 0, 11 * MS)
    assert (prediction.ttft_ns, prediction.tbt_ns) == (11 * MS, 11 * MS)
    cluster.now = 4 * MS
    second = cluster.place(2, 100).prediction
    assert (second.queue_ns, second.ttft_ns, second.tbt_ns) == (7 * MS, 18 * MS, 12 * MS)


@pytest.mark.parametrize("policy", EVEN)
def test_load_spreads_over_both_pools(policy: str) -> None:
    cluster = Cluster(policy=policy)
    for i in range(4):
        cluster.prefill(f"p{i}")
        cluster.decode(f"d{i}")
    for request in range(12):
        cluster.place(request, 100)
    assert cluster.booked() == {f"p{i}": (3, 0) for i in range(4)} | {f"d{i}": (0, 3) for i in range(4)}


@pytest.mark.parametrize("policy", EVEN)
def test_free_instances_take_turns(policy: str) -> None:
    cluster = Cluster(policy=policy)
    for i in range(4):
        cluster.prefill(f"p{i}")
        cluster.decode(f"d{i}")
    prefills, decodes = [], []
    for request in range(8):
        placed = cluster.place(request, 10)
        prefills.append(placed.prefill)
        decodes.append(placed.decode)
        cluster.now += 100 * MS
        cluster.receive("f", PrefillDone(AttemptKey("f", request)))
        cluster.end(request)
    assert prefills == [f"p{i}" for i in range(4)] * 2
    assert decodes == [f"d{i}" for i in range(4)] * 2


def test_random_takes_anybody() -> None:
    cluster = Cluster(policy="random")
    for i in range(4):
        cluster.prefill(f"p{i}")
    cluster.decode("d", max_batch=1000)
    placed = [cluster.place(request, 10).prefill for request in range(400)]
    assert sorted(set(placed)) == ["p0", "p1", "p2", "p3"]
    assert all(70 < placed.count(name) < 130 for name in set(placed)) and placed != sorted(placed)
    assert all(cluster.place(1000 + at, 10, exclude=("p0", "p2", "p3")).prefill == "p1" for at in range(9))


def test_round_robin_goes_on_by_name() -> None:
    cluster = Cluster(policy="round_robin")
    for name in ("a", "b", "d"):
        cluster.prefill(name)
    cluster.decode("x")
    placed = [cluster.place(at, 1000 if at == 1 else 10).prefill for at in range(2)]
    cluster.prefill("c")
    placed += [cluster.place(2 + at, exclude=("d",) if at == 1 else ()).prefill for at in range(4)]
    assert placed == ["a", "b", "c", "a", "b", "c"]


def test_least_load_goes_by_the_queue_and_reuses_what_happens_to_be_there() -> None:
    cluster = Cluster(policy="least_load")
    cluster.node("n0", 1, 2, 3)
    cluster.node("n1")
    cluster.prefill("p0", node="n0")
    cluster.prefill("p1", node="n1")
    cluster.decode("d")
    cluster.place(1, 10, exclude=("p1",))
    assert cluster.place(2, 17, 1, 2, 3).prefill == "p1"
    third = cluster.place(3, 17, 1, 2, 3)
    assert third.prefill == "p0" and third.source is not None and third.source.num_tokens == 12


def test_local_cache_aware_never_fetches() -> None:
    cluster = Cluster(policy="local_cache_aware")
    cluster.node("n0")
    cluster.node("n1", 1, 2, 3, 4)
    cluster.prefill("p0", node="n0")
    cluster.prefill("p1", node="n1")
    cluster.decode("d")
    keys = (1, 2, 3, 4, *range(100, 117))
    assert cluster.place(1, 85, *keys).prefill == "p1"  # 16 of 85 tokens are there, 6.9 + 1 ms
    other = (1, 2, 3, 4, *range(200, 217))
    second = cluster.place(2, 85, *other)  # 9.5 ms at p0 are less than 7.9 + 7.9 at p1
    assert (second.prefill, second.source) == ("p0", None)
    third = cluster.place(3, 85, 1, 2, 3, 4, *range(300, 317))
    assert third.prefill == "p1" and third.source is not None and third.source.node == "n1"


def test_algorithm1_prefers_the_instance_whose_node_has_the_prefix() -> None:
    cluster = Cluster()
    cluster.node("n0")
    cluster.node("n1", 1, 2, 3)
    cluster.prefill("p0", node="n0")
    cluster.prefill("p1", node="n1")
    cluster.decode("d")
    placed = cluster.place(1, 17, 1, 2, 3, 4)
    assert placed.prefill == "p1"
    assert placed.source == KvSource("n1", 3 * BLOCK, blocks(1, 2, 3), addresses=("unix:n1",))
    assert placed.prediction.load_ns == 3 * BLOCK * 1000 / 10  # 10 GB/s
    assert placed.prediction.prefill_ns == int(1.5 * MS)


def test_algorithm1_fetches_from_a_remote_node_when_the_local_queue_is_long() -> None:
    cluster = Cluster()
    cluster.node("n0")
    cluster.node("n1", 1, 2, 3)
    cluster.prefill("p0", node="n0")
    cluster.prefill("p1", node="n1")
    cluster.decode("d")
    cluster.receive("p1", LoadReport(load("p1", 1, num_waiting=1, waiting_tokens=10_000)))
    placed = cluster.place(1, 17, 1, 2, 3, 4)
    assert placed.prefill == "p0" and placed.source is not None
    assert (placed.source.node, placed.source.num_tokens) == ("n1", 12)
    assert placed.prediction.load_ns == 3 * BLOCK * 1000 / 5  # 5 GB/s


def test_threshold_keeps_small_gains_local() -> None:
    cluster = Cluster(threshold=2.0)
    cluster.node("n0", 1, 2)
    cluster.node("n1", 1, 2, 3, 4)
    cluster.prefill("p0", node="n0")
    cluster.decode("d")
    placed = cluster.place(1, 17, 1, 2, 3, 4)
    assert placed.source is not None and (placed.source.node, len(placed.source.block_keys)) == ("n0", 2)


def test_at_least_one_token_is_left_to_compute() -> None:
    cluster = Cluster()
    cluster.node("n", 1, 2)
    cluster.prefill("p", node="n")
    cluster.decode("d")
    placed = cluster.place(1, 8, 1, 2)
    assert placed.source is not None and placed.source.num_tokens == 4


def test_own_pages_need_no_source_unless_the_store_has_more() -> None:
    cluster = Cluster()
    cluster.node("n", 1, 2)
    cluster.prefill("p", node="n")
    cluster.decode("d")
    cluster.delta("p", 1, "hbm", added=(1, 2))
    placed = cluster.place(1, 17, 1, 2)
    assert placed.source is None and placed.prediction.prefill_ns == int(1.9 * MS)
    cluster.end(1)
    cluster.delta("p", 2, "hbm", removed=(2,))
    placed = cluster.place(2, 17, 1, 2)
    assert placed.source is not None and placed.source.num_tokens == 8
    assert placed.prediction.load_ns == BLOCK * 1000 / 10


def test_ssd_blocks_cost_more_than_dram() -> None:
    cluster = Cluster()
    cluster.node("n", 1)
    cluster.prefill("p", node="n")
    cluster.decode("d")
    cluster.delta("n", 1, "ssd", added=(1, 2))
    assert cluster.place(1, 17, 1, 2).prediction.load_ns == BLOCK * 1000 / 10 + BLOCK * 1000 / 2


def test_a_placed_prefix_attracts_its_followers_until_it_expires() -> None:
    cluster = Cluster()
    for i in range(4):
        cluster.node(f"n{i}")
        cluster.prefill(f"p{i}", node=f"n{i}")
    cluster.decode("d")
    keys = tuple(range(1, 26))
    first = cluster.place(1, 101, *keys)
    cluster.now = 12 * MS
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 11 * MS))
    second = cluster.place(2, 101, *keys)
    assert second.prefill == first.prefill and second.source is not None
    assert second.source.num_tokens == 100
    cluster.end(1)
    cluster.end(2)
    cluster.now = 60 * S
    assert cluster.place(3, 101, *keys).source is None


def test_lost_node_is_no_source() -> None:
    cluster = Cluster()
    cluster.node("n1", 1, 2, 3)
    cluster.prefill("p0", node="n0")
    cluster.decode("d")
    assert cluster.place(1, 17, 1, 2, 3).source is not None
    cluster.event(PeerGone("n1"))
    assert cluster.place(2, 17, 1, 2, 3).source is None
    cluster.node("n1", 1)
    placed = cluster.place(3, 17, 1, 2, 3)
    assert placed.source is not None and placed.source.num_tokens == 4


def test_decode_goes_where_pages_and_batch_have_room() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cluster.decode("d0")
    cluster.decode("d1")
    cluster.receive("d0", LoadReport(load("d0", 1, free_pages=2)))
    cluster.receive("d1", LoadReport(load("d1", 1, num_running=7, context_tokens=700)))
    assert cluster.place(1).decode == "d1"
    assert cluster.place(2).decode == "d0"  # both full now: the shorter line


def test_what_waits_for_pages_counts_as_load_and_as_pages() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cost = CostModel(COST.prefill, (10.0, 1.0, 1000.0))
    cluster.decode("d0", cost=cost)
    cluster.decode("d1", cost=cost)
    cluster.receive("d0", LoadReport(load("d0", 1, num_waiting=1, waiting_context=2000)))
    cluster.receive("d1", LoadReport(load("d1", 1, num_running=1, context_tokens=1000)))
    assert cluster.place(1).decode == "d1", "2 ms for what runs there, 3 ms for what will"
    instances = cluster.core.view.instances
    assert (instances["d0"].used_pages, instances["d1"].used_pages) == (500, 0)


def test_pending_decodes_count_until_a_report_shows_them() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cluster.decode("d")
    cluster.place(1, 10)
    assert cluster.pending("d") == (1, 10, 5)
    cluster.now = 100 * MS
    cluster.receive("d", LoadReport(load("d", 1)))
    assert cluster.pending("d") == (1, 10, 5)
    cluster.receive("f", PrefillDone(AttemptKey("f", 1)))
    cluster.now += 10 * MS
    cluster.receive("d", LoadReport(load("d", 2)))
    assert cluster.pending("d") == (1, 10, 5)
    cluster.now += 100 * MS
    cluster.receive("d", LoadReport(load("d", 3, num_running=1)))
    assert cluster.pending("d") == (0, 0, 0) and cluster.booked()["d"] == (0, 1)


def test_decode_only_takes_no_prefill() -> None:
    cluster = Cluster()
    cluster.decode("d0")
    cluster.decode("d1")
    placed = cluster.place(1, decode_only=True, exclude=("d0",), first=False)
    assert (placed.prefill, placed.decode, placed.source) == ("", "d1", None)
    assert cluster.booked() == {"d0": (0, 0), "d1": (0, 1)}


def test_excluded_instances_are_used_only_if_there_is_no_other() -> None:
    cluster = Cluster()
    cluster.prefill("p0")
    cluster.decode("d0")
    placed = cluster.place(1, exclude=("p0", "d0", "unknown"))
    assert (placed.prefill, placed.decode) == ("p0", "d0")
    cluster.prefill("p1")
    cluster.decode("d1")
    for request in range(2, 10):
        placed = cluster.place(request, exclude=("p0", "d0"))
        assert (placed.prefill, placed.decode) == ("p1", "d1")


def test_colocated_instances_prefill_in_place_without_a_prefill_pool() -> None:
    cluster = Cluster()
    cluster.instance("c0", Role.COLOCATED)
    cluster.instance("c1", Role.COLOCATED)
    first, second = cluster.place(1, 100), cluster.place(2, 100)
    assert first.prefill == second.prefill == "" and {first.decode, second.decode} == {"c0", "c1"}
    assert cluster.booked() == {"c0": (1, 1), "c1": (1, 1)}
    assert first.prediction.prefill_ns == 11 * MS
    cluster.prefill("p")
    assert cluster.place(3, 100).prefill == "p"
    for request in (1, 2, 3):
        cluster.end(request)
    assert set(cluster.booked().values()) == {(0, 0)}


def test_too_long_for_every_instance_known() -> None:
    cluster = Cluster()
    cluster.prefill("p", num_pages=10)
    cluster.decode("d", num_pages=8)
    cluster.place(1, 31)
    answer = cluster.answer(2, 32)
    assert isinstance(answer, Rejected) and answer.reason == "too_long" and answer.retry_after_ns == 0
    assert answer.detail == "32 tokens; the largest instance holds 31"
    cluster.decode("big", num_pages=100, state=InstanceState.STARTING)
    assert cluster.ask(3, 40) == []  # waits for it


def test_zero_cost_instances_still_share_the_work() -> None:
    cluster = Cluster()
    for i in range(2):
        cluster.prefill(f"p{i}", cost=CostModel())
        cluster.decode(f"d{i}", cost=CostModel())
    for request in range(8):
        cluster.place(request)
    assert set(cluster.booked().values()) == {(4, 0), (0, 4)}
