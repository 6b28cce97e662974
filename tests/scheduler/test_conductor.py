import random

import msgspec

from mooncake.core.messages import (
    AttemptEnded,
    BookingSnapshot,
    LoadReport,
    Members,
    NodeInfo,
    Placed,
    PlaceRequest,
    PrefillDone,
    Register,
    Registered,
    RegisterNode,
    Rejected,
    Send,
    SnapshotRequest,
    StateChange,
)
from mooncake.core.types import AttemptKey, CostModel, InstanceState, Role, Slo
from mooncake.scheduler.config import Calibration, ConductorConfig
from mooncake.scheduler.core import ConductorCore, PeerGone, Received, Tick
from tests.scheduler.cluster import COST, MS, Cluster, S, answers, blocks, info, load, messages


def pair(**config: object) -> Cluster:
    cluster = Cluster(**config)
    cluster.prefill("p")
    cluster.decode("d")
    return cluster


def test_a_request_is_booked_once_and_released_by_its_end() -> None:
    cluster = pair()
    placed = cluster.place(1, 100)
    assert cluster.place(1, 100) == placed
    assert cluster.booked() == {"p": (1, 0), "d": (0, 1)}
    for _ in range(2):
        cluster.receive("f", PrefillDone(AttemptKey("f", 1), 11 * MS))
        assert cluster.booked() == {"p": (0, 0), "d": (0, 1)}
    for _ in range(2):
        cluster.end(1, num_output=10, completed=True)
        assert cluster.booked() == {"p": (0, 0), "d": (0, 0)}
    assert cluster.place(1, 100) == placed and cluster.booked()["d"] == (0, 0)
    assert cluster.core.view.lengths.mean == 256 + 0.02 * (10 - 256)
    assert cluster.core.accuracy.error("p", "ttft") == 0.0


def test_members_are_told_at_first_contact_and_at_every_change() -> None:
    cluster = Cluster()
    cluster.decode("d")
    first = cluster.ask(1)
    assert first == [Send("f", Members((info("d", Role.DECODE),)))]
    both = Members((info("d", Role.DECODE), info("p", Role.PREFILL)))
    assert messages(cluster.prefill("p"), Members) == [("f", both)]
    assert messages(cluster.prefill("p"), Members) == []
    change = StateChange("p", 1, InstanceState.DRAINING, COST)
    ((_, members),) = messages(cluster.receive("p", change), Members)
    assert isinstance(members, Members) and members.instances[1].state is InstanceState.DRAINING
    assert messages(cluster.receive("p", StateChange("p", 1, InstanceState.GONE, COST)), Members) == [
        ("f", Members((info("d", Role.DECODE),)))
    ]


def test_requests_wait_for_an_instance_to_become_ready() -> None:
    cluster = Cluster(wait_ns=5 * S, num_waiting_max=2)
    cluster.decode("d")
    cluster.prefill("p", state=InstanceState.CALIBRATING)
    assert answers(cluster.ask(1)) == [] and answers(cluster.ask(1)) == []
    cluster.now = 1 * S
    assert answers(cluster.ask(2)) == []
    refused = cluster.answer(3)
    assert isinstance(refused, Rejected) and refused.reason == "no_instance" and refused.retry_after_ns > 0
    assert cluster.core.deadline() == 2 * S  # the unanswered snapshot requests come first
    cluster.now = 5 * S
    (expired,) = answers(cluster.event(Tick()))
    assert isinstance(expired, Rejected) and (expired.key.request, expired.reason) == (1, "no_instance")
    ready = cluster.receive("p", StateChange("p", 1, InstanceState.READY, COST))
    (placed,) = answers(ready)
    assert isinstance(placed, Placed) and placed.key.request == 2
    assert cluster.booked() == {"d": (0, 1), "p": (1, 0)}


def test_a_waiting_request_that_proves_too_long_is_told_so_at_once() -> None:
    cluster = Cluster()
    assert answers(cluster.ask(1, 4001)) == []
    cluster.prefill("p")
    (refused,) = answers(cluster.decode("d"))
    assert isinstance(refused, Rejected) and refused.reason == "too_long" and refused.retry_after_ns == 0
    assert refused.detail == "4001 tokens; the largest instance holds 3999"


def test_ending_a_waiting_attempt_answers_it() -> None:
    cluster = Cluster()
    cluster.ask(1)
    (answer,) = answers(cluster.end(1))
    assert isinstance(answer, Rejected) and answer.reason == "no_instance"
    assert cluster.answer(1) == answer
    cluster.prefill("p")
    assert answers(cluster.decode("d")) == []


def test_lost_instance_is_not_placed_on_and_gone_after_the_grace() -> None:
    cluster = pair(peer_grace_ns=5 * S)
    cluster.prefill("q")
    cluster.place(1, 100, exclude=("q",))
    assert cluster.event(PeerGone("p")) == []
    assert cluster.place(2, exclude=("q",)).prefill == "q"
    assert cluster.booked()["p"] == (1, 0)
    cluster.now = 5 * S
    ((to, members),) = messages(cluster.event(Tick()), Members)
    assert to == "f" and isinstance(members, Members)
    assert [instance.name for instance in members.instances] == ["d", "q"]
    assert cluster.booked() == {"d": (0, 2), "q": (1, 0)}
    cluster.end(1)
    cluster.end(2)
    assert cluster.booked() == {"d": (0, 0), "q": (0, 0)}


def test_reconnecting_within_the_grace_keeps_bookings_and_asks_for_a_snapshot() -> None:
    cluster = pair(peer_grace_ns=5 * S)
    cluster.place(1)
    cluster.event(PeerGone("p"))
    cluster.now = 4 * S
    commands = cluster.prefill("p")
    assert commands[-2:] == [Send("p", Registered(True)), Send("p", SnapshotRequest("p", "hbm"))]
    cluster.now = 6 * S
    cluster.event(Tick())
    assert cluster.booked()["p"] == (1, 0) and cluster.place(2).prefill == "p"


def test_newer_epoch_replaces_the_older_life_and_older_ones_are_refused() -> None:
    cluster = pair()
    cluster.place(1)
    cluster.delta("p", 1, "hbm", added=(1,))
    assert Send("p", Registered(True)) in cluster.prefill("p", epoch=2)
    assert cluster.booked() == {"d": (0, 1), "p": (0, 0)}
    cluster.delta("p", 2, "hbm", added=(2,))
    assert (
        not cluster.core.index.match(blocks(1)).lengths.any() and not cluster.core.index.match(blocks(2)).lengths.any()
    )
    ((_, refused),) = messages(cluster.prefill("p", epoch=1), Registered)
    assert refused == Registered(False, "epoch 1 of 'p' is older than the registered 2")
    assert cluster.receive("p", StateChange("p", 1, InstanceState.GONE, COST)) == []
    assert cluster.core.view.instances["p"].info.epoch == 2


def test_names_are_taken_once() -> None:
    cluster = pair()
    assert messages(cluster.prefill("p", address="elsewhere:1"), Registered) == [
        ("p", Registered(False, "the name 'p' is taken by p:1, which is not elsewhere:1"))
    ]
    node = RegisterNode(NodeInfo("p", 1, (), 1))
    assert messages(cluster.receive("p", node), Registered) == [
        ("p", Registered(False, "the name 'p' is taken by an instance"))
    ]
    assert messages(cluster.receive("x", Register(info("y", Role.DECODE))), Registered) == [
        ("x", Registered(False, "'x' cannot register the name 'y'"))
    ]


def test_the_first_ready_instance_fixes_the_compatibility() -> None:
    cluster = Cluster()
    cluster.prefill("early", compat="other", state=InstanceState.STARTING)
    commands = cluster.prefill("p", compat="mine")
    detail = "compatibility 'other' differs from the cluster's 'mine'"
    assert ("early", Registered(False, detail)) in messages(commands, Registered)
    assert messages(cluster.decode("d", compat="other"), Registered) == [("d", Registered(False, detail))]
    assert list(cluster.core.view.instances) == ["p"]
    cluster.receive("p", StateChange("p", 1, InstanceState.GONE, COST))
    assert messages(cluster.decode("d", compat="other"), Registered) == [("d", Registered(True))]


def test_hard_admission_refuses_first_attempts_only_and_only_when_calibrated() -> None:
    cluster = pair(admission="soft", calibration=Calibration(num_outcomes_min=2))
    slo = Slo(ttft_ns=5 * MS)
    for request in (1, 2):
        cluster.place(request, 100, slo=slo)
        cluster.receive("f", PrefillDone(AttemptKey("f", request), 11 * MS))
        cluster.end(request)
    assert cluster.core.counts["soft_overloaded_ttft"] == 2
    refused = cluster.answer(3, 100, slo=slo)
    assert isinstance(refused, Rejected) and refused.reason == "overloaded_ttft"
    assert refused.prediction.ttft_ns == 11 * MS and refused.retry_after_ns == 1 * S
    assert cluster.answer(3, 100, slo=slo) == refused
    assert cluster.booked() == {"p": (0, 0), "d": (0, 0)}
    cluster.place(4, 100, slo=slo, first=False)


def test_a_rejection_holds_until_its_retry_after() -> None:
    cluster = Cluster(wait_ns=5 * S)
    cluster.ask(1)
    cluster.now = 5 * S
    (expired,) = answers(cluster.event(Tick()))
    cluster.prefill("p")
    cluster.decode("d")
    assert cluster.answer(1) == expired
    cluster.now = 6 * S
    assert isinstance(cluster.answer(1), Placed)


def test_booking_snapshot_releases_what_ended_unheard() -> None:
    cluster = pair(booking_grace_ns=1 * S)
    cluster.place(1)
    cluster.place(2)
    cluster.now = 1 * S
    cluster.place(3)
    cluster.receive("f", BookingSnapshot("f", ((AttemptKey("f", 1), "", "d", 10),)))
    assert cluster.booked() == {"p": (1, 0), "d": (0, 2)}  # 2 released, 1 without its prefill, 3 too young
    cluster.receive("g", BookingSnapshot("g", ()))
    assert cluster.booked() == {"p": (1, 0), "d": (0, 2)}


def test_restarted_conductor_learns_bookings_from_snapshots() -> None:
    cluster = pair()
    rows = (
        (AttemptKey("f", 1), "p", "d", 100),
        (AttemptKey("f", 2), "", "d", 50),
        (AttemptKey("f", 3), "", "nobody", 9),
    )
    for _ in range(2):
        assert messages(cluster.receive("f", BookingSnapshot("f", rows)), Members) != []
        assert cluster.booked() == {"p": (1, 0), "d": (0, 2)}
    assert cluster.place(4, 100).prediction.queue_ns == 11 * MS
    cluster.place(1, 100)  # asked again, as its answer was lost with the old Conductor
    assert cluster.booked() == {"p": (2, 0), "d": (0, 3)}
    for request in (1, 2, 4):
        cluster.end(request)
    assert cluster.booked() == {"p": (0, 0), "d": (0, 0)}


def test_snapshot_does_not_revive_an_ended_attempt() -> None:
    cluster = pair()
    cluster.place(1)
    cluster.end(1)
    cluster.receive("f", BookingSnapshot("f", ((AttemptKey("f", 1), "p", "d", 10),)))
    assert cluster.booked() == {"p": (0, 0), "d": (0, 0)}


def test_lost_frontend_is_released_after_the_grace_and_rebooked_on_return() -> None:
    cluster = pair(peer_grace_ns=5 * S)
    cluster.place(1)
    cluster.event(PeerGone("f"))
    cluster.now = 4 * S
    cluster.end(99)  # it is back
    cluster.now = 10 * S
    cluster.event(Tick())
    assert cluster.booked()["d"] == (0, 1)
    cluster.event(PeerGone("f"))
    cluster.now = 15 * S
    cluster.event(Tick())
    assert cluster.booked() == {"p": (0, 0), "d": (0, 0)}
    cluster.receive("f", BookingSnapshot("f", ((AttemptKey("f", 1), "", "d", 10),)))
    assert cluster.booked() == {"p": (0, 0), "d": (0, 1)}


def test_explanation_prints_the_formula_with_its_numbers() -> None:
    cluster = Cluster()
    cluster.node("n", 1, 2)
    cluster.prefill("p", node="n")
    cluster.decode("d")
    cluster.place(1, 17, 1, 2)
    assert cluster.core.explain(AttemptKey("f", 1)) == (
        "f/1/0/0 placed by algorithm1 at 0.000 s: 17 tokens\n"
        "  -> prefill p: TTFT 1.90 ms = queue 0.00 + load 0.00 + prefill 1.90 "
        "(local: 9 new after 8 reused tokens: 0 of 2 blocks in own pages, the rest from n)\n"
        "  -> decode d: TBT 11.00 ms at batch 0.0 + 1, has room"
    )
    assert cluster.core.explain(AttemptKey("f", 2)) is None


def test_records_are_bounded() -> None:
    cluster = pair(num_records_max=3)
    for request in range(10):
        cluster.place(request)
    assert len(cluster.core.records) == 3 and cluster.core.explain(AttemptKey("f", 9)) is not None


def test_replaying_the_event_log_gives_the_same_commands() -> None:
    def run() -> list[bytes]:
        core = ConductorCore(ConductorConfig(), random.Random(3))
        log: list[bytes] = []
        for i in range(4):
            log += encode(core.handle(Received(f"p{i}", Register(info(f"p{i}", Role.PREFILL))), i))
            log += encode(core.handle(Received(f"d{i}", Register(info(f"d{i}", Role.DECODE))), i))
        for i in range(50):
            request = PlaceRequest(AttemptKey("f", i), 10, (), None)
            log += encode(core.handle(Received("f", request), i * MS))
        return log

    def encode(commands: list[Send]) -> list[bytes]:
        return [msgspec.msgpack.encode((command.to, command.message)) for command in commands]

    assert run() == run()


def test_each_choice_is_booked_and_ends_by_itself() -> None:
    cluster = pair()
    placed = cluster.place(1, 100, num_choices=3)
    assert (placed.key, placed.num_choices) == (AttemptKey("f", 1), 3)
    assert cluster.booked() == {"p": (1, 0), "d": (0, 3)}
    # Pages of four tokens: 100 + 10 tokens need 28, two more outputs of 10 need 3 each and a partial page of the prompt.
    assert cluster.pending("d") == (3, 300, 28 + 2 * 4)
    assert cluster.answer(1, 100, num_choices=3) == placed and cluster.booked()["d"] == (0, 3)
    cluster.now = 1 * S
    cluster.receive("d", LoadReport(load("d", 1)))
    assert cluster.pending("d")[0] == 3, "not seen before the prefill is done"
    cluster.receive("f", PrefillDone(AttemptKey("f", 1)))
    cluster.now = 2 * S
    cluster.receive("d", LoadReport(load("d", 2, num_running=3)))
    assert cluster.pending("d")[0] == 0 and cluster.booked() == {"p": (0, 0), "d": (0, 3)}
    for left, choice in ((2, 1), (1, 0), (0, 2)):
        cluster.receive("f", AttemptEnded(AttemptKey("f", 1, choice)))
        assert cluster.booked()["d"] == (0, left)
    rows = tuple((AttemptKey("f", 1, choice), "", "d", 100) for choice in range(3))
    cluster.receive("f", BookingSnapshot("f", rows))
    assert cluster.booked()["d"] == (0, 0), "a late snapshot revives none of them"


def test_choices_are_placed_where_there_is_room_for_all() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cluster.decode("a", max_batch=2)
    cluster.decode("b", max_batch=3, cost=CostModel(prefill=COST.prefill, decode=(20.0, 2.0, 0.0)))
    assert cluster.place(1, num_choices=2).decode == "a"
    cluster.receive("f", AttemptEnded(AttemptKey("f", 1)))
    cluster.receive("f", AttemptEnded(AttemptKey("f", 1, 1)))
    placed = cluster.place(2, num_choices=3)
    assert placed.decode == "b" and placed.prediction.tbt_ns == 26 * MS
    assert "TBT 26.00 ms at batch 0.0 + 3, has room" in str(cluster.core.explain(AttemptKey("f", 2)))


def test_choices_that_a_snapshot_rebuilt_are_placed_afresh() -> None:
    cluster = pair()
    rows = tuple((AttemptKey("f", 1, choice), "p" if choice == 0 else "", "d", 100) for choice in range(3))
    cluster.receive("f", BookingSnapshot("f", rows))
    assert cluster.booked() == {"p": (1, 0), "d": (0, 3)}
    cluster.place(1, 100, num_choices=3)
    assert cluster.booked() == {"p": (1, 0), "d": (0, 3)}
