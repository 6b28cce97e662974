import random

import pytest

from mooncake.core.messages import LoadReport, NodeInfo, PrefillDone, StateChange
from mooncake.core.types import AttemptKey, CostModel, InstanceState, Role, Slo
from mooncake.scheduler.config import JointConfig, Rates
from mooncake.scheduler.costs import BlockCosts, PrefillPrices, find_source
from mooncake.scheduler.lengths import Lengths
from mooncake.scheduler.links import Links
from mooncake.scheduler.placement.base import TIE_NS, find_cheapest, find_free_holder
from mooncake.scheduler.prefix_index import IN_FAST, IN_SLOW, PrefixIndex
from mooncake.scheduler.view import View
from tests.scheduler.cluster import COST, MS, Cluster, S, blocks, info, load

RATES = Rates(dram_bytes_per_s=40e6, ssd_bytes_per_s=4e6, remote_bytes_per_s=20e6, nic_bytes_per_s=20e6)
"""A block of 4 tokens, 4,000 bytes, is computed in 0.4 ms; it comes from dram in 0.1 ms, from another node in 0.2 ms, from
ssd in 1 ms."""
PREFIX = tuple(range(1, 26))
"""25 blocks, 100 tokens: computed in 10 ms beside the 1 ms that every prefill takes."""


def joint(work_weight: float = 0.0, **config: object) -> Cluster:
    settings = {"policy": "joint", "rates": RATES, "joint": JointConfig(work_weight=work_weight)}
    return Cluster(**(settings | config))


def pair(cluster: Cluster, *numbers: int) -> Cluster:
    """p0 and p1 each with a node; that of p1 has these blocks."""
    cluster.node("n0")
    cluster.node("n1", *numbers)
    cluster.prefill("p0", node="n0")
    cluster.prefill("p1", node="n1")
    cluster.decode("d")
    return cluster


def make_busy(cluster: Cluster, name: str, until_ns: int) -> None:
    instance = cluster.core.view.instances[name]
    instance.booked_until = until_ns
    instance.set_work()


def occupy(cluster: Cluster, node: str, until_ns: int) -> None:
    """Its NIC has so much to send."""
    links = cluster.core.view.links
    links.out_until[cluster.core.view.slot(node)] = until_ns
    links.busy_until = max(links.busy_until, until_ns)


# ---------------------------------------------------------------- ways


def test_what_the_own_node_has_is_loaded_behind_the_prefill() -> None:
    placed = pair(joint(), *PREFIX).place(1, 141, *PREFIX)
    assert placed.prefill == "p1" and placed.source is not None and placed.source.node == "n1"
    # 41 tokens are computed in 5.1 ms, and 25 blocks loaded in 2.5 ms meanwhile.
    assert (placed.prediction.load_ns, placed.prediction.prefill_ns) == (0, 5_100_000)


def test_a_load_costs_what_it_is_longer_than_the_prefill() -> None:
    placed = pair(joint(), *PREFIX).place(1, 105, *PREFIX)
    # 5 tokens in 1.5 ms, 25 blocks in 2.5 ms.
    assert (placed.prediction.load_ns, placed.prediction.prefill_ns) == (1_000_000, 1_500_000)
    assert placed.prediction.ttft_ns == 2_500_000


def test_pull_when_the_holder_is_busy() -> None:
    cluster = pair(joint(), *PREFIX)
    make_busy(cluster, "p1", 4 * MS)
    placed = cluster.place(1, 105, *PREFIX)
    # At p1 4 + 2.5 ms, at p0 25 blocks from n1 in 5 ms while 5 tokens are computed.
    assert placed.prefill == "p0" and placed.source is not None and placed.source.node == "n1"
    assert placed.prediction.ttft_ns == 5 * MS


def test_wait_for_the_holder_when_that_is_sooner() -> None:
    cluster = pair(joint(), *PREFIX)
    make_busy(cluster, "p1", 2 * MS)
    assert cluster.place(1, 105, *PREFIX).prefill == "p1"


def test_wait_for_a_prefix_that_is_being_computed() -> None:
    for now, waits in ((0, False), (4 * MS, True)):
        cluster = pair(joint())
        first = cluster.place(1, 101, *PREFIX)
        cluster.now = now
        second = cluster.place(2, 105, *PREFIX)
        # Of 11.1 ms what is left, and 2.5 ms to load, if it is not in the pages any more; or 11.5 ms at the other one.
        assert (second.prefill == first.prefill) is waits
    assert second.prediction.queue_ns == 7_100_000
    assert second.source is not None and second.source.num_tokens == 100
    assert "waits for 25 that are computed there" in str(cluster.core.explain(AttemptKey("f", 2)))


def test_work_counts_for_those_who_come_later() -> None:
    for weight, prefill in ((0.0, "p0"), (2.0, "p1")):
        cluster = pair(joint(weight), *PREFIX)
        make_busy(cluster, "p1", 4 * MS)
        # p0: 5 ms of work, p1: 4 ms of queue and 2.5 ms of work.
        assert cluster.place(1, 105, *PREFIX).prefill == prefill


def test_recompute_what_takes_longer_to_load() -> None:
    cluster = joint()
    cluster.node("n0")
    cluster.prefill("p0", node="n0")
    cluster.decode("d")
    cluster.delta("n0", 1, "ssd", added=PREFIX)
    placed = cluster.place(1, 105, *PREFIX)
    # 25 ms from ssd, 11.5 ms to compute.
    assert (placed.source, placed.prediction.ttft_ns) == (None, 11_500_000)
    cluster.end(1)
    cluster.core.index.expire(100 * S)
    placed = cluster.place(2, 305, *PREFIX)  # reading comes first, so 21.5 ms for the rest would not hide it
    assert (placed.source, placed.prediction.ttft_ns) == (None, 31_500_000)
    cluster.end(2)
    cluster.core.index.expire(200 * S)
    cluster.delta("n0", 1, "dram", added=PREFIX)
    placed = cluster.place(3, 305, *PREFIX)
    assert placed.source is not None and placed.prediction.ttft_ns == 21_500_000


def test_a_prefill_of_many_steps_is_priced_with_all_of_them() -> None:
    cluster = joint()
    cluster.prefill("p", max_step_tokens=50)
    cluster.decode("d")
    # 10.5 ms for the tokens, and 1 ms for each of three steps.
    assert [cluster.place(1, 50).prediction.prefill_ns, cluster.place(2, 105).prediction.prefill_ns] == [
        6 * MS,
        13_500_000,
    ]


def test_loads_are_priced_by_what_the_instances_say_that_kv_takes() -> None:
    cluster = joint()
    cluster.node("n0", *PREFIX)
    cluster.prefill("p", node="n0", state=InstanceState.CALIBRATING, kv_token_bytes=1)
    assert cluster.core.costs.num_bytes == 4000, "not ready, so it says nothing for the cluster yet"
    cluster.decode("d", kv_token_bytes=10_000)
    assert (cluster.core.costs.num_bytes, cluster.core.costs.dram_ns) == (40_000, 1 * MS)
    cluster.receive("p", StateChange("p", 1, InstanceState.READY, COST))
    placed = cluster.place(1, 105, *PREFIX)  # 25 ms to load, 11.5 ms to compute
    assert (placed.source, placed.prediction.ttft_ns) == (None, 11_500_000)


def test_explanation_has_every_way_with_its_numbers() -> None:
    cluster = pair(joint(0.5), *PREFIX)
    make_busy(cluster, "p1", 4 * MS)
    cluster.place(1, 105, *PREFIX)
    assert cluster.core.explain(AttemptKey("f", 1)) == (
        "f/1/0/0 placed by joint at 0.000 s: 105 tokens\n"
        "     prefill p0: TTFT 5.00 ms = queue 0.00 + max(load 5.00, prefill 1.50) (pull: 5 new after 100 reused tokens: "
        "0 of 25 blocks in own pages, the rest from n1), cost 7.50\n"
        "       not 11.50 ms = queue 0.00 + max(load 0.00, prefill 11.50) (local: 105 new after 0 reused tokens: "
        "0 of 0 blocks in own pages)\n"
        "       not 11.50 ms = queue 0.00 + max(load 0.00, prefill 11.50) (recompute: 105 new after 0 reused tokens: "
        "0 of 0 blocks in own pages)\n"
        "  -> prefill p1: TTFT 6.50 ms = queue 4.00 + max(load 2.50, prefill 1.50) (local: 5 new after 100 reused tokens: "
        "0 of 25 blocks in own pages, the rest from n1), cost 7.75\n"
        "       not 15.50 ms = queue 4.00 + max(load 0.00, prefill 11.50) (recompute: 105 new after 0 reused tokens: "
        "0 of 0 blocks in own pages)\n"
        "  -> decode d: TBT 11.00 ms at batch 0.0 + 1, has room, hand-over 5.25 ms, cost 115.25"
    )


# ---------------------------------------------------------------- links


def test_a_busy_link_is_paid_for() -> None:
    cluster = pair(joint(), *PREFIX)
    make_busy(cluster, "p1", 4 * MS)
    occupy(cluster, "n1", 3 * MS)
    placed = cluster.place(1, 105, *PREFIX)
    # The pull would take 3 + 5 ms, so waiting is better.
    assert (placed.prefill, placed.prediction.ttft_ns) == ("p1", 6_500_000)


def test_pulls_share_the_nic_of_their_source() -> None:
    others = tuple(range(101, 126))
    cluster = pair(joint(), *PREFIX, *others)
    cluster.node("n2")
    cluster.prefill("p2", node="n2")
    make_busy(cluster, "p1", 100 * MS)
    first, second = cluster.place(1, 105, *PREFIX), cluster.place(2, 105, *others)
    assert {first.prefill, second.prefill} == {"p0", "p2"}
    assert (first.prediction.ttft_ns, second.prediction.ttft_ns) == (5 * MS, 10 * MS)
    cluster.now = 50 * MS
    for request in (1, 2):
        cluster.end(request)
    cluster.core.index.expire(100 * S)
    assert cluster.place(3, 105, *PREFIX).prediction.ttft_ns == 5 * MS, "what has passed does not count"


def test_of_several_holders_the_least_busy_is_the_source() -> None:
    cluster = pair(joint(), *PREFIX)
    cluster.node("n2", *PREFIX)
    make_busy(cluster, "p1", 100 * MS)
    occupy(cluster, "n2", 1 * MS)
    placed = cluster.place(1, 105, *PREFIX)
    assert placed.source is not None and placed.source.node == "n1"
    cluster.end(1)
    cluster.core.index.expire(100 * S)
    occupy(cluster, "n1", 20 * MS)
    placed = cluster.place(2, 105, *PREFIX)
    assert placed.source is not None and placed.source.node == "n2"


def test_a_shorter_run_of_a_free_node_beats_the_longest_of_a_busy_one() -> None:
    cluster = pair(joint(), *PREFIX)
    cluster.node("n2", *PREFIX[:24])
    make_busy(cluster, "p1", 100 * MS)
    occupy(cluster, "n1", 20 * MS)
    placed = cluster.place(1, 105, *PREFIX)
    assert placed.source is not None and (placed.source.node, placed.source.num_tokens) == ("n2", 96)


def test_the_hand_over_goes_where_the_way_is_short() -> None:
    cluster = joint()
    cluster.node("n0")
    cluster.node("n1")
    cluster.prefill("p", node="n0")
    cluster.decode("far", node="n1")
    cluster.decode("near", node="n0")
    assert [cluster.place(request, 100).decode for request in (1, 2)] == ["near", "far"], "a longer step costs more"


def test_hand_overs_occupy_the_links() -> None:
    cluster = joint()
    for at in range(3):
        cluster.node(f"n{at}")
    cluster.prefill("p", node="n0")
    cluster.decode("d1", node="n1")
    cluster.decode("d2", node="n2")
    decode = cluster.place(1, 100).decode
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 11 * MS))
    links, slot = cluster.core.view.links, cluster.core.view.slot
    assert links.out_until[slot("n0")] == links.in_until[slot("n" + decode[1])] == 5 * MS  # 100,000 bytes at 20 MB/s
    assert links.in_until[slot("n2" if decode == "d1" else "n1")] == 0


# ---------------------------------------------------------------- objectives


def test_the_first_token_in_time_counts_more_than_the_sum() -> None:
    cluster = pair(joint(2.0), *PREFIX)
    make_busy(cluster, "p1", 4 * MS)
    assert cluster.place(1, 105, *PREFIX, slo=Slo(ttft_ns=6 * MS)).prefill == "p0"
    cluster = pair(joint(2.0), *PREFIX)
    make_busy(cluster, "p1", 4 * MS)
    assert cluster.place(1, 105, *PREFIX, slo=Slo(ttft_ns=3 * MS)).prefill == "p1", "nobody is in time: the least sum"


def test_the_shorter_step_counts_more_than_the_hand_over() -> None:
    cluster = joint()
    cluster.node("n0")
    cluster.node("n1")
    cluster.prefill("p", node="n0")
    cluster.decode("near", node="n0")
    cluster.decode("far", node="n1")
    cluster.receive("near", LoadReport(load("near", 1, num_running=1)))
    long = {"max_tokens": 2}  # near: 2 * 12 + 10 ms, far: 2 * 11 + 20 ms of hand-over
    assert cluster.place(1, 400, **long).decode == "near"
    cluster.end(1)
    assert cluster.place(2, 400, slo=Slo(tbt_ns=11_500_000), **long).decode == "far"
    cluster.end(2)
    assert cluster.place(3, 400, slo=Slo(tbt_ns=10_500_000), **long).decode == "near", "no step is short enough"


# ---------------------------------------------------------------- decode, at the time when the prefill ends


def test_who_will_have_joined_counts_and_who_will_not_does_not() -> None:
    cluster = joint()
    cluster.core.view.lengths.mean_square = 1e30  # nobody who runs is about to end
    cluster.prefill("p")
    cluster.decode("d")
    cluster.receive("d", LoadReport(load("d", 1, num_running=2)))
    assert cluster.place(1, 1_000).prediction.tbt_ns == 13 * MS
    late = cluster.place(2, 10)
    assert (late.prediction.queue_ns, late.prediction.tbt_ns) == (101 * MS, 14 * MS)
    cluster.prefill("q")
    early = cluster.place(3, 10)
    assert (early.prefill, early.prediction.tbt_ns) == ("q", 13 * MS), "the others still prefill then"


def test_who_decodes_for_long_has_probably_left() -> None:
    cluster = joint()
    cluster.core.view.lengths = Lengths(mean=10.0, mean_square=200.0)  # 10 tokens left on average
    cluster.prefill("p")
    cluster.decode("d")
    cluster.receive("d", LoadReport(load("d", 1, num_running=5)))
    # In 150 ms, ten steps of 15 ms, e times fewer are there: 10 + 5 / e + 1.
    assert cluster.place(1, 1_490).prediction.tbt_ns == int(11 * MS + 5 * MS / 2.718281828459045)


# ---------------------------------------------------------------- in place


def test_a_short_rest_is_prefilled_where_the_prefix_is() -> None:
    cluster = joint()
    cluster.node("n0")
    cluster.prefill("p", node="n0")
    cluster.decode("d0", node="n0")
    cluster.decode("d1", node="n0")
    cluster.delta("d1", 1, "hbm", added=PREFIX)
    placed = cluster.place(1, 105, *PREFIX)
    # A step of 11 ms and 1.5 ms for 5 tokens, against 11.5 ms and 2.6 ms of hand-over.
    assert (placed.prefill, placed.decode, placed.source) == ("", "d1", None)
    assert (placed.prediction.queue_ns, placed.prediction.prefill_ns) == (11 * MS, 1_500_000)
    assert cluster.booked() == {"p": (0, 0), "d0": (0, 0), "d1": (1, 1)}
    assert "prefill in place at d1: TTFT 12.50 ms" in str(cluster.core.explain(AttemptKey("f", 1)))
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 13 * MS))
    cluster.end(1)
    assert cluster.booked() == {"p": (0, 0), "d0": (0, 0), "d1": (0, 0)}


@pytest.mark.parametrize(
    ("limit", "slo", "num_running", "max_batch", "exclude"),
    [
        (4, Slo(), 0, 8, ()),  # five are new
        (512, Slo(tbt_ns=12 * MS), 0, 8, ()),  # the gap would be 12.5 ms
        (512, Slo(), 2, 8, ()),  # each of two waits for 1.5 ms
        (512, Slo(), 1, 1, ()),  # no room
        (512, Slo(), 0, 8, ("d1",)),
    ],
)
def test_in_place_only_where_it_costs_less_and_hurts_nobody(
    limit: int, slo: Slo, num_running: int, max_batch: int, exclude: tuple[str, ...]
) -> None:
    cluster = joint(joint=JointConfig(in_place_tokens_max=limit))
    cluster.node("n0")
    cluster.prefill("p", node="n0")
    cluster.decode("d0", node="n0")
    cluster.decode("d1", node="n0", max_batch=max_batch)
    cluster.delta("d1", 1, "hbm", added=PREFIX)
    cluster.receive("d1", LoadReport(load("d1", 1, num_running=num_running)))
    assert cluster.place(1, 105, *PREFIX, slo=slo, exclude=exclude).prefill == "p"


def test_not_in_place_behind_those_who_wait_for_pages() -> None:
    cluster = joint()
    cluster.node("n0")
    cluster.prefill("p", node="n0")
    cluster.decode("d", node="n0")
    cluster.delta("d", 1, "hbm", added=PREFIX)
    assert cluster.place(1, 105, *PREFIX).prefill == ""
    cluster.end(1)
    cluster.receive("d", LoadReport(load("d", 1, num_waiting=1, waiting_context=10)))
    assert cluster.place(2, 105, *PREFIX).prefill == "p"


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("seed", range(40))
def test_the_search_finds_what_pricing_everybody_finds(seed: int) -> None:
    """Random pools, matches, queues and links: nobody who was not priced costs less than the chosen, ties aside, nor less
    than it says."""
    rng = random.Random(seed)
    index = PrefixIndex(10_000)
    links = Links(RATES)
    view = View(links, Lengths())
    width = rng.choice([1, 3, 20, 60])
    models = [COST, CostModel((0.0, 50.0, 2.0), COST.decode)][: rng.choice([1, 2])]
    for at in range(width):
        slot = index.add_holder()
        view.add_node(NodeInfo(f"n{at}", 1, (), 1), slot, index.width)
        node = f"n{rng.randrange(at + 1)}"
        slot = index.add_holder()
        view.add_instance(info(f"p{at}", Role.PREFILL, node=node, cost=rng.choice(models)), slot, index.width)
    keys = blocks(*range(30))
    for slot in range(1, index.width):
        if rng.random() < 0.6:
            index.add(slot, rng.choice([IN_FAST, IN_FAST, IN_SLOW]), keys[: rng.randrange(31)])
        if rng.random() < 0.2:
            index.predict(slot, keys[: rng.randrange(31)], 10)
        if rng.random() < 0.5:
            links.book_transfer(slot, rng.randrange(1, index.width), rng.randrange(100_000), 0)
    for member in view.instances.values():
        member.num_prefills = rng.randrange(2)
        member.booked_until = rng.choice([0, rng.randrange(20 * MS)])
        member.set_work()
    pool, now = view.pools[0], rng.choice([0, 5 * MS])
    costs = BlockCosts(4, 1000, RATES)
    for _ in range(20):
        match = index.match(keys[: rng.randrange(31)])
        longest = rng.random() < 0.5
        source = find_source(match, view.node_bits, pool, links, costs, now, longest=longest)
        prices = PrefillPrices(pool, match, rng.randrange(121, 300), source, links, costs, now)
        prices.hidden, prices.work_weight = rng.random() < 0.7, rng.choice([0.0, 0.5])
        prices.threshold = 2.0 if not prices.hidden and rng.random() < 0.5 else None
        mask = pool.everyone if rng.random() < 0.7 else pool.everyone & (rng.random() < 0.5)
        if not mask.any():
            mask = pool.everyone.copy()
            mask[rng.randrange(width)] = True
        offers = find_cheapest(prices, match, mask)
        everyone = {row: prices.offer(row).cost_ns for row in range(width) if mask[row]}
        assert mask[offers.chosen.row] and offers.chosen.cost_ns <= min(everyone.values()) + TIE_NS
        free = find_free_holder(prices, match, mask) if prices.hidden else None
        assert free is None or free.chosen.cost_ns <= min(everyone.values()) + TIE_NS
        for offer in offers.priced:
            del everyone[offer.row]
        assert offers.at_least_ns is not None
        if everyone:
            assert min(everyone.values()) >= min(offers.at_least_ns, offers.chosen.cost_ns - TIE_NS) - 1.0
