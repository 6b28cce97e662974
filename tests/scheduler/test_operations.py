"""What the Conductor tells the operator, and instances that take nothing new."""

from __future__ import annotations

from typing import Any

import msgspec

from mooncake.core.messages import (
    AskExplain,
    AskHold,
    AskStatus,
    ClusterStatus,
    Hold,
    InstanceStatus,
    LoadReport,
    Members,
    NodeLoad,
    PrefillDone,
    Send,
    StateChange,
    Told,
)
from mooncake.core.types import AttemptKey, InstanceState, ReusedTokens, Role, TierLoad
from mooncake.scheduler.core import PeerGone
from tests.scheduler.cluster import COST, MS, Cluster, S, answers, info, load, messages


def pair(**config: Any) -> Cluster:
    cluster = Cluster(**config)
    cluster.prefill("p")
    cluster.decode("d")
    return cluster


def status(cluster: Cluster) -> ClusterStatus:
    ((to, found),) = messages(cluster.receive("f", AskStatus(7)), ClusterStatus)
    assert to == "f" and isinstance(found, ClusterStatus) and found.number == 7
    return found


def instance(cluster: Cluster, name: str) -> InstanceStatus:
    return next(each for each in status(cluster).instances if each.name == name)


def states(cluster: Cluster) -> dict[str, str]:
    return {each.name: each.state for each in status(cluster).instances}


def hold(cluster: Cluster, name: str, held: bool = True) -> tuple[Told, list[Send]]:
    """The answer, and what else is sent."""
    commands = cluster.receive("f", AskHold(3, name, held))
    [told] = [each.message for each in commands if isinstance(each.message, Told)]
    assert told.number == 3
    return told, [each for each in commands if each.message is not told]


# ---------------------------------------------------------------- status


def test_the_status_shows_what_is_booked_and_what_is_reported() -> None:
    cluster = pair()
    cluster.place(1, 100)
    cluster.now = 2 * S
    cluster.receive("p", LoadReport(load("p", 1, num_waiting=2, num_running=1, free_pages=900, step_ns=5 * MS)))
    found = status(cluster)
    assert (found.policy, found.num_waiting, found.num_bookings) == ("algorithm1", 0, 1)
    assert dict(found.counts) == {"placed": 1}
    prefill, decode = found.instances
    assert prefill == InstanceStatus("p", "prefill", "ready", "", 2, 1, 1, 0, 1000, 100, 8, 0.0, 5 * MS, 0)
    assert decode == InstanceStatus("d", "decode", "ready", "", 0, 0, 0, 1, 1000, 0, 8, 0.0, 0, 0)


def test_the_queue_of_a_prefill_instance_is_the_time_until_its_work_is_done() -> None:
    cluster = pair()
    cluster.place(1, 100)
    assert instance(cluster, "p").queue_ns == 11 * MS
    cluster.now = 4 * MS
    assert instance(cluster, "p").queue_ns == 7 * MS


def test_tokens_per_second_are_those_of_the_last_seconds() -> None:
    cluster = pair()
    for second in range(21):
        cluster.now = second * S
        cluster.receive("d", LoadReport(load("d", second + 1, num_computed_tokens=50 * second)))
    assert instance(cluster, "d").tokens_per_s == 50.0
    cluster.now += 6 * S
    assert instance(cluster, "d").tokens_per_s == 0.0, "nothing was computed since"


def test_reused_tokens_are_what_the_instances_say() -> None:
    cluster = pair()
    assert status(cluster).reused == ReusedTokens()
    cluster.receive("p", LoadReport(load("p", 1, reused=ReusedTokens(22, 4, 8, 4))))
    cluster.receive("d", LoadReport(load("d", 1, reused=ReusedTokens(9, 1))))
    assert status(cluster).reused == ReusedTokens(prompt=31, hbm=5, dram=8, ssd=4)
    cluster.receive("p", LoadReport(load("p", 2, reused=ReusedTokens(30, 4, 12, 4))))
    assert status(cluster).reused == ReusedTokens(prompt=39, hbm=5, dram=12, ssd=4), "counts since their start"


def test_tiers_of_a_store_node_are_shown_as_it_reported_them() -> None:
    cluster = Cluster()
    cluster.node("n", 1, 2)
    tiers = (TierLoad("dram", 1000, 400, 7), TierLoad("ssd", 5000, 10, 1))
    cluster.receive("n", NodeLoad("n", 2, ()))
    cluster.receive("n", NodeLoad("n", 1, tiers))
    cluster.receive("n", NodeLoad("n", 0, ()))
    cluster.receive("x", NodeLoad("x", 1, ()))
    [node] = status(cluster).nodes
    assert (node.name, node.connected, node.num_blocks, node.tiers) == ("n", True, 2, tiers)
    cluster.event(PeerGone("n"))
    assert not status(cluster).nodes[0].connected


def test_links_are_shown_as_long_as_they_are_booked() -> None:
    cluster = Cluster()
    cluster.node("n", 1, 2, 3, 4, 5, 6)
    cluster.node("m")
    cluster.prefill("p", node="m", cost=msgspec.structs.replace(COST, prefill=(1.0, 1e6, 0.0)))
    cluster.decode("d", node="m")
    cluster.place(1, 26, 1, 2, 3, 4, 5, 6)
    by_name = {node.name: node for node in status(cluster).nodes}
    assert by_name["n"].out_ns == by_name["m"].in_ns == 4_800, "24 tokens of 1,000 bytes at 5 GB/s"
    assert by_name["n"].in_ns == by_name["m"].out_ns == by_name["m"].ssd_ns == 0


# ---------------------------------------------------------------- explain


def test_a_request_is_explained_by_the_records_of_all_its_attempts() -> None:
    cluster = pair()
    cluster.place(1, 100)
    cluster.place(2, 100)
    cluster.place(1, 101, key=AttemptKey("f", 1, 0, 1))
    ((_, told),) = messages(cluster.receive("f", AskExplain(9, "f", 1)), Told)
    assert isinstance(told, Told) and not told.error and told.number == 9
    first, second = told.text.split("\n\n")
    assert first.startswith("f/1/0/0 placed by algorithm1") and second.startswith("f/1/0/1 placed by algorithm1")
    assert first == cluster.core.explain(AttemptKey("f", 1))


def test_what_was_not_placed_or_is_long_ago_cannot_be_explained() -> None:
    cluster = pair(num_records_max=2)
    for request in (1, 2, 3):
        cluster.place(request, 10)
    for frontend, request in (("f", 1), ("g", 2)):
        ((_, told),) = messages(cluster.receive("f", AskExplain(9, frontend, request)), Told)
        assert told == Told(9, f"no placement of {frontend}/{request} is known; the last 2 are kept", "unknown")


# ---------------------------------------------------------------- hold


def test_a_held_instance_takes_nothing_new_and_finishes_what_it_has() -> None:
    cluster = pair()
    cluster.decode("e")
    first = cluster.place(1, 100)
    told, others = hold(cluster, first.decode)
    assert told == Told(3, f"{first.decode} is draining")
    [(to, message)] = [(each.to, each.message) for each in others if not isinstance(each.message, Members)]
    assert (to, message) == (first.decode, Hold(first.decode, True))
    ((_, members),) = messages(others, Members)
    assert isinstance(members, Members)
    assert {each.name for each in members.instances if each.state is InstanceState.READY} == {"p", "d", "e"} - {
        first.decode
    }
    assert all(cluster.place(request, 10).decode != first.decode for request in range(2, 6))
    assert states(cluster)[first.decode] == "draining"
    cluster.end(1)
    cluster.now += S
    assert states(cluster)[first.decode] == "drained"
    told, others = hold(cluster, first.decode, held=False)
    assert told.text == f"{first.decode} is ready" and Send(first.decode, Hold(first.decode, False)) in others
    assert {cluster.place(request, 10).decode for request in range(6, 12)} == {"d", "e"}


def test_a_prefill_instance_is_drained_when_nothing_of_it_is_held_for_decode() -> None:
    cluster = pair()
    cluster.prefill("q")
    placed = cluster.place(1, 100)
    hold(cluster, placed.prefill)
    cluster.now = S
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 11 * MS))
    assert states(cluster)[placed.prefill] == "draining", "no report can show yet that its KV is held"
    cluster.now += 100 * MS
    cluster.receive(placed.prefill, LoadReport(load(placed.prefill, 1, num_attempts=1)))
    cluster.now += S
    assert states(cluster)[placed.prefill] == "draining"
    cluster.receive(placed.prefill, LoadReport(load(placed.prefill, 2)))
    assert states(cluster)[placed.prefill] == "drained"


def test_it_is_told_when_nobody_is_left() -> None:
    cluster = pair()
    cluster.now = S
    told, _ = hold(cluster, "d")
    assert told.text == "d is drained; no other decode instance is ready: new requests wait"
    assert answers(cluster.ask(1)) == [] and status(cluster).num_waiting == 1
    _, others = hold(cluster, "d", held=False)
    assert [answer.decode for answer in answers(others)] == ["d"]


def test_unknown_names_are_answered_with_those_that_there_are() -> None:
    cluster = pair()
    for held in (True, False):
        told, others = hold(cluster, "decode-9", held=held)
        assert told == Told(3, "there is no instance 'decode-9'; there are: d, p", "unknown") and others == []


def test_a_lost_instance_can_be_neither_held_nor_let_go() -> None:
    cluster = pair()
    cluster.event(PeerGone("d"))
    told, others = hold(cluster, "d")
    assert told.error == "unreachable" and told.text.startswith("d is not connected now") and others == []
    assert states(cluster)["d"] == "lost"


def test_a_held_instance_that_is_started_again_is_still_held() -> None:
    cluster = pair()
    cluster.now = S
    hold(cluster, "d")
    again = cluster.decode("d", epoch=2)
    assert messages(again, Hold) == [("d", Hold("d", True))] and states(cluster)["d"] == "drained"
    assert messages(cluster.decode("d", epoch=2, held=True), Hold) == [], "it knows"
    hold(cluster, "d", held=False)
    assert states(cluster)["d"] == "ready"


def test_a_held_instance_that_is_gone_can_be_let_go_for_when_it_comes() -> None:
    cluster = pair()
    hold(cluster, "d")
    cluster.receive("d", StateChange("d", 1, InstanceState.GONE, COST))
    told, others = hold(cluster, "d", held=False)
    assert told == Told(3, "d is not here; it will take requests when it comes") and others == []
    assert messages(cluster.decode("d", epoch=2), Hold) == [] and states(cluster)["d"] == "ready"


def test_a_conductor_that_starts_anew_learns_from_the_instance_that_it_is_held() -> None:
    cluster = pair()
    cluster.now = S
    assert messages(cluster.instance("e", Role.DECODE, held=True), Hold) == []
    assert states(cluster)["e"] == "drained"
    assert all(cluster.place(request, 10).decode == "d" for request in range(4))


def test_who_stops_or_changes_its_role_is_draining_even_if_held() -> None:
    cluster = pair()
    hold(cluster, "d")
    cluster.receive("d", StateChange("d", 1, InstanceState.DRAINING, COST))
    assert states(cluster)["d"] == "draining"
    assert info("d", Role.DECODE).held is False
