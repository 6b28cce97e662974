"""The prefill core, event by event: what it asks of store and engine, what it tells whom, and that nothing stays behind."""

from typing import Any

import pytest

from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AttemptFailed,
    CacheDelta,
    CacheSnapshot,
    ChangeRole,
    Drain,
    HandoverDone,
    KvPartReady,
    KvReady,
    LiveAttempts,
    LoadReport,
    Register,
    Send,
    SnapshotRequest,
    StateChange,
    StepTokens,
    Submit,
)
from mooncake.core.types import FinishReason, Job, KvSource, Role
from mooncake.engine.attempts import (
    AbortSequence,
    CloseSource,
    KvStored,
    ListBlocks,
    OpenSource,
    PeerGone,
    PeerOpened,
    Received,
    RunSequence,
    SourceOpened,
    TakeRole,
    Tick,
)
from mooncake.engine.core import Drawn, KvLoaded, SequenceFailed, SequenceReleased, SequenceStarted
from mooncake.engine.reporting import REPORT_NS
from mooncake.prefill.core import (
    LET_GO_NS,
    RETRY_RESERVE_NS,
    STALE_NS,
    CommitKv,
    KvCommitted,
    KvReserved,
    PrefillCore,
    PrefillLimits,
    ReleaseKv,
    ReserveKv,
)
from tests.engine.jobs import S, blocks, key, make_info, make_job, make_source, progress

PARTIAL = b"partial-" * 2


def refusal(job: Job) -> str | None:
    return "too big" if job.num_tokens > 100 else None


class Driver:
    def __init__(self, **limits: int) -> None:
        self.core = PrefillCore(make_info(Role.PREFILL), PrefillLimits(**limits), 8, lambda job: PARTIAL, refusal)
        self.now = 0

    def __call__(self, event: Any) -> list[Any]:
        commands = self.core.handle(event, self.now)
        self.core.check_integrity()
        return [c for c in commands if not (isinstance(c, Send) and isinstance(c.message, LoadReport))]

    def submit(self, number: int, num_tokens: int = 20, **more: Any) -> list[Any]:
        return self(Received("f0", Submit(make_job(number, num_tokens, **more))))

    def message(self, message: Any) -> list[Any]:
        return self(Received("f0", message))

    def first_token(self, finish: FinishReason | None = None) -> list[Any]:
        return self(progress(SequenceStarted(1), Drawn(1, 20, (5,), finish, (), 0)))

    def hand_over(self) -> list[Any]:
        """Attempt 1 from its submission to its hand-over."""
        self.submit(1)
        self(KvReserved(1, True))
        self.first_token()
        self(KvStored(1, 0, 20))
        self(progress(SequenceReleased(1)))
        return self(KvCommitted(1, 0, 3, True))


def told(*messages: Any) -> list[Send]:
    return [Send("f0", message) for message in messages]


def test_a_request_from_queue_to_hand_over() -> None:
    drive = Driver()
    target = KvSource("n0", 20, blocks(1, 2), PARTIAL, ("unix:/n0",))
    assert drive.submit(1) == [ReserveKv(1, target)]
    assert drive(KvReserved(1, True)) == [RunSequence(1, make_job(1), 0, one_token=True, store=True)]
    assert drive(KvStored(1, 0, 16)) == [CommitKv(1, 0, 2)]
    drive.now = 5
    [send] = drive.first_token()
    assert isinstance(send.message, StepTokens) and send.to == "f0"
    assert [(o.key, o.position, o.token_ids, o.cached_tokens) for o in send.message.outputs] == [(key(1), 20, (5,), 0)]
    assert drive(KvStored(1, 16, 20)) == [CommitKv(1, 2, 3)]
    assert drive(progress(SequenceReleased(1))) == []
    assert drive(KvCommitted(1, 0, 2, True)) == []
    assert drive(KvCommitted(1, 2, 3, True)) == told(KvReady("i0", key(1), target))
    assert drive.message(HandoverDone((key(1),))) == [ReleaseKv(1)]
    assert drive.core.num_attempts == 0


def test_the_store_hears_whose_the_kv_is() -> None:
    drive, source = Driver(), make_source(9, 16)
    assert drive.submit(1, source=source, tenant="acme") == [
        OpenSource(1, source, "acme"),
        ReserveKv(1, KvSource("n0", 20, blocks(1, 2), PARTIAL, ("unix:/n0",)), "acme"),
    ]


def test_a_joint_attempt_gives_a_first_token_for_each_choice_and_one_hand_over() -> None:
    drive = Driver()
    drive.submit(1, num_choices=3)
    drive(KvReserved(1, True))
    drawn = [Drawn(1, 20, (5 + choice,), None, (), None if choice else 8, choice) for choice in range(3)]
    [send] = drive(progress(SequenceStarted(1), *drawn))
    outputs = [(o.key.choice, o.position, o.token_ids, o.cached_tokens, o.compute_ns) for o in send.message.outputs]
    assert outputs == [(0, 20, (5,), 8, 1), (1, 20, (6,), None, None), (2, 20, (7,), None, None)]
    drive(KvStored(1, 0, 20))
    drive(progress(SequenceReleased(1)))
    [ready] = drive(KvCommitted(1, 0, 3, True))
    assert isinstance(ready.message, KvReady) and ready.message.key == key(1)


def test_the_first_token_goes_before_the_hand_over() -> None:
    drive = Driver()
    drive.submit(1)
    drive(KvReserved(1, True))
    drive(KvStored(1, 0, 20))
    drive(KvCommitted(1, 0, 3, True))
    kinds = [type(command.message) for command in drive.first_token()]
    assert kinds == [StepTokens, KvReady]


def part(number: int, start: int, num_tokens: int) -> Send:
    source = KvSource("n0", num_tokens, blocks(number, num_tokens // 8), b"", ("unix:/n0",))
    return Send("f0", KvPartReady("i0", key(number), start, source))


def test_what_is_committed_is_told_of_while_the_rest_is_computed() -> None:
    drive = Driver(part_tokens=16)
    drive.submit(1, 60)
    drive(KvReserved(1, True))
    drive(KvStored(1, 0, 8))
    assert drive(KvCommitted(1, 0, 1, True)) == [], "too little"
    assert drive(KvCommitted(1, 2, 4, True)) == [], "the second block is missing"
    assert drive(KvCommitted(1, 1, 2, True)) == [part(1, 0, 32)]
    assert drive(KvCommitted(1, 4, 5, True)) == []
    assert drive(KvCommitted(1, 5, 6, True)) == [part(1, 32, 48)]
    drive(progress(SequenceStarted(1), Drawn(1, 60, (5,), None, (), 0)))
    [ready] = drive(KvCommitted(1, 6, 8, True))
    assert isinstance(ready.message, KvReady), "what is there when the first token is out goes with the hand-over"


def test_the_last_part_is_told_by_the_hand_over() -> None:
    drive = Driver(part_tokens=8)
    drive.submit(1, 32)
    drive(KvReserved(1, True))
    assert drive(KvCommitted(1, 0, 4, True)) == []
    kinds = [type(c.message) for c in drive(progress(SequenceStarted(1), Drawn(1, 32, (5,), None, (), 0)))]
    assert kinds == [StepTokens, KvReady]


def test_what_the_store_has_already_is_told_of_at_once_and_not_committed_again() -> None:
    drive = Driver(part_tokens=16)
    drive.submit(1, 60)
    run, told_part = drive(KvReserved(1, True, num_stored=4))
    assert isinstance(run, RunSequence) and told_part == part(1, 0, 32)
    assert drive(KvStored(1, 32, 48)) == [CommitKv(1, 4, 6)]
    assert drive(KvCommitted(1, 4, 6, True)) == [part(1, 32, 48)]
    drive(progress(SequenceStarted(1), Drawn(1, 60, (5,), None, (), 0)))
    assert drive(KvStored(1, 48, 60)) == [CommitKv(1, 6, 8)]
    [ready] = drive(KvCommitted(1, 6, 8, True))
    assert isinstance(ready.message, KvReady)


def test_what_decode_heard_of_with_the_placement_is_not_told_again() -> None:
    drive = Driver(part_tokens=16)
    drive.submit(1, 60, source=make_source(1, 32))
    drive(SourceOpened(1, 32))
    assert [type(command) for command in drive(KvReserved(1, True, num_stored=4))] == [RunSequence]
    assert drive(KvCommitted(1, 4, 6, True)) == [part(1, 32, 48)]


@pytest.mark.parametrize("why", ["no hand-over", "aborted", "not committed"])
def test_of_what_nobody_will_fetch_nothing_is_told(why: str) -> None:
    drive = Driver(part_tokens=8)
    drive.submit(1, 60, hand_over=why != "no hand-over")
    drive(KvReserved(1, True))
    drive(KvStored(1, 0, 16))
    if why == "aborted":
        drive.message(Abort((key(1),)))
    sends = [c for c in drive(KvCommitted(1, 0, 2, why != "not committed")) if isinstance(c, Send)]
    assert not any(isinstance(send.message, KvPartReady) for send in sends)


def test_the_source_is_opened_beside_the_reservation_and_closed_when_loaded() -> None:
    drive = Driver()
    source = make_source(1, 16)
    assert [type(c) for c in drive.submit(1, source=source)] == [OpenSource, ReserveKv]
    assert drive(KvReserved(1, True)) == []
    [run] = drive(SourceOpened(1, 8))
    assert run.source_tokens == 8
    assert drive(progress(KvLoaded(1, True))) == [CloseSource(1)]


def test_room_is_asked_for_in_order_one_at_a_time_and_again_after_a_refusal() -> None:
    drive = Driver()
    assert [type(c) for c in drive.submit(1)] == [ReserveKv]
    assert drive.submit(2) == []
    assert drive(KvReserved(1, False)) == []
    assert drive.submit(3) == [] and drive.core.deadline() == RETRY_RESERVE_NS
    drive.now = RETRY_RESERVE_NS
    [again] = drive(Tick())
    assert again.seq == 1, "the oldest goes first"
    assert [type(c) for c in drive(KvReserved(1, True))] == [RunSequence, ReserveKv]


def test_a_refused_request_does_not_keep_its_source_open() -> None:
    drive = Driver()
    drive.submit(1, source=make_source(1, 16))
    drive(SourceOpened(1, 16))
    assert drive(KvReserved(1, False)) == [CloseSource(1)]


def test_an_unreachable_node_fails_the_attempt() -> None:
    drive = Driver()
    drive.submit(1)
    [send] = drive(KvReserved(1, False, reachable=False))
    assert (send.message.reason, drive.core.num_attempts) == ("store_failed", 0)


def test_no_more_are_started_than_the_engine_batches() -> None:
    drive = Driver(max_started=1)
    drive.submit(1)
    drive.submit(2)
    assert [type(c) for c in drive(KvReserved(1, True))] == [RunSequence]
    drive.first_token()
    drive(KvStored(1, 0, 20))
    drive(progress(SequenceReleased(1)))
    assert [type(c) for c in drive(KvCommitted(1, 0, 3, True))] == [Send, ReserveKv], "handed over: the next may start"


def test_a_request_without_hand_over_does_without_room() -> None:
    drive = Driver()
    [reserve] = drive.submit(1, hand_over=False)
    assert reserve.target.partial_key == b"" and reserve.target.num_tokens == 16
    [run] = drive(KvReserved(1, False))
    assert (run.store, run.one_token) == (False, True)
    drive.first_token(FinishReason.LENGTH)
    assert drive(progress(SequenceReleased(1))) == [] and drive.core.num_attempts == 0


def test_a_failed_copy_or_commit_is_told_after_the_first_token() -> None:
    drive = Driver()
    drive.submit(1)
    drive(KvReserved(1, True))
    drive.first_token()
    failed, release = drive(progress(SequenceReleased(1)))
    assert failed.message.reason == "store_failed" and release == ReleaseKv(1)
    drive.submit(2)
    drive(KvReserved(2, True))
    drive(KvStored(2, 0, 16))
    failed, abort = drive(KvCommitted(2, 0, 2, False))
    assert failed.message.reason == "store_failed" and abort == AbortSequence(2)
    assert drive(progress(SequenceReleased(2))) == [ReleaseKv(2)]


def test_an_engine_fault_is_told() -> None:
    drive = Driver()
    drive.submit(1)
    drive(KvReserved(1, True))
    sends = drive(progress(SequenceFailed(1, "engine_error", "bad"), SequenceReleased(1)))
    assert [type(c) for c in sends] == [Send, AbortSequence, ReleaseKv]
    assert sends[0].message == AttemptFailed("i0", key(1), "engine_error", "bad")


@pytest.mark.parametrize("how", ["abort", "frontend gone", "deadline"])
def test_leaving_frees_everything_in_every_state(how: str) -> None:
    def leave(drive: Driver) -> list[Any]:
        if how == "abort":
            return drive.message(Abort((key(1),)))
        if how == "frontend gone":
            return drive(PeerGone("f0"))
        drive.now = 100 * S
        commands = drive(Tick())
        assert drive.core.num_attempts == 0 or not any(isinstance(c, ReserveKv) for c in commands)
        return [c for c in commands if not isinstance(c, Send)]

    queued = Driver(max_started=0)
    queued.submit(1)
    assert leave(queued) == [] and queued.core.num_attempts == 0

    opening = Driver()
    opening.submit(1, source=make_source(1, 16))
    assert leave(opening) == []
    assert opening(SourceOpened(1, 16)) == []
    assert opening(KvReserved(1, True)) == [CloseSource(1), ReleaseKv(1)]

    running = Driver()
    running.submit(1)
    running(KvReserved(1, True))
    assert leave(running) == [AbortSequence(1)]
    assert running(progress(Drawn(1, 20, (5,), None, (), 0))) == []
    assert running(KvStored(1, 0, 16)) == []
    assert running(progress(SequenceReleased(1))) == [ReleaseKv(1)]

    committing = Driver()
    committing.submit(1)
    committing(KvReserved(1, True))
    committing(KvStored(1, 0, 20))
    assert leave(committing) == [AbortSequence(1)]
    assert committing(progress(SequenceReleased(1))) == []
    assert committing(KvCommitted(1, 0, 3, True)) == [ReleaseKv(1)]

    held = Driver()
    held.hand_over()
    assert leave(held) == [ReleaseKv(1)]
    for drive in (opening, running, committing, held):
        assert drive.core.num_attempts == 0


def test_a_deadline_is_told_unless_the_hand_over_only_waits() -> None:
    drive = Driver()
    drive.submit(1)
    drive.now = 100 * S
    [send] = drive(Tick())
    assert send.message == AttemptFailed("i0", key(1), "deadline", "not done within 100 s")
    drive = Driver()
    drive.hand_over()
    drive.now = 100 * S
    assert drive(Tick()) == [ReleaseKv(1)]


def test_what_cannot_run_is_refused() -> None:
    drive = Driver(max_queued=1)
    assert drive.submit(9, 101) == told(AttemptFailed("i0", key(9), "too_long", "too big"))
    drive.submit(1)
    assert drive.submit(1) == [], "a repeated message"
    assert drive.submit(2) == told(AttemptFailed("i0", key(2), "refused", "1 attempts already"))


def test_draining_refuses_and_ends() -> None:
    drive = Driver()
    drive.hand_over()
    assert drive(Received(CONDUCTOR, Drain("i0"))) == [] and not drive.core.drained
    assert drive.submit(2) == told(AttemptFailed("i0", key(2), "refused", "draining"))
    drive.message(HandoverDone((key(1),)))
    assert drive.core.drained


def test_nothing_is_due_for_room_that_nobody_wants_any_more() -> None:
    drive = Driver()
    drive.submit(1)
    drive(KvReserved(1, granted=False))
    assert drive.core.deadline() == RETRY_RESERVE_NS
    drive.message(Abort((key(1),)))
    assert drive.core.deadline() is None
    drive.now = 2 * RETRY_RESERVE_NS
    assert isinstance(drive.submit(2)[0], ReserveKv)


def test_it_takes_another_role_when_its_hand_overs_are_read() -> None:
    drive = Driver()
    drive.hand_over()
    assert drive(Received(CONDUCTOR, ChangeRole("i0", 1, Role.DECODE))) == []
    assert drive.submit(2) == told(AttemptFailed("i0", key(2), "refused", "draining"))
    assert drive.message(HandoverDone((key(1),))) == [ReleaseKv(1), TakeRole(Role.DECODE)]
    assert drive(Tick()) == []


def test_hand_overs_that_nobody_reads_do_not_keep_it_in_its_role() -> None:
    drive = Driver()
    drive.hand_over()
    drive.submit(2)
    drive(Received(CONDUCTOR, ChangeRole("i0", 1, Role.DECODE)))
    assert drive.core.deadline() == LET_GO_NS
    drive.now = LET_GO_NS
    assert drive(Tick()) == [], "the other one is still to be computed"
    assert drive.core.deadline() != LET_GO_NS
    drive(KvReserved(2, granted=True))
    drive.now += 1
    assert drive.message(Abort((key(2),)))[-1] == AbortSequence(2)
    assert drive(progress(SequenceReleased(2))) == [ReleaseKv(2), ReleaseKv(1), TakeRole(Role.DECODE)]


def test_who_is_to_stop_takes_no_other_role() -> None:
    drive = Driver()
    drive.hand_over()
    drive(Received(CONDUCTOR, ChangeRole("i0", 1, Role.DECODE)))
    drive(Received(CONDUCTOR, Drain("i0")))
    assert drive.message(HandoverDone((key(1),))) == [ReleaseKv(1)] and drive.core.drained


@pytest.mark.parametrize(("epoch", "role"), [(2, Role.DECODE), (1, Role.PREFILL)])
def test_a_change_of_another_life_or_to_its_own_role_is_none(epoch: int, role: Role) -> None:
    drive = Driver()
    assert drive(Received(CONDUCTOR, ChangeRole("i0", epoch, role))) == [] and not drive.core.drained


def test_a_job_that_was_placed_on_a_decode_instance_is_refused() -> None:
    drive = Driver()
    refused = AttemptFailed("i0", key(1), "refused", "is a prefill instance now")
    assert drive.submit(1, role=Role.DECODE) == told(refused)
    assert drive.submit(2, role=Role.PREFILL) != []


def test_live_attempts_repair_what_was_lost() -> None:
    drive = Driver()
    [ready] = drive.hand_over()
    assert drive.message(LiveAttempts("f0", (key(1), key(7)))) == told(
        ready.message, AttemptFailed("i0", key(7), "unknown")
    )
    drive.now = STALE_NS
    assert drive.message(LiveAttempts("f0", (), (key(1),))) == [], "held, and still wanted"
    assert drive.message(LiveAttempts("f0", ())) == [], "not older than the message may be"
    drive.now = STALE_NS + 1
    assert drive.message(LiveAttempts("f1", ())) == [], "somebody else's"
    assert drive.message(LiveAttempts("f0", ())) == [ReleaseKv(1)]


def test_the_conductor_hears_of_life_load_and_cache() -> None:
    drive = Driver()
    drive(progress(added=(b"a", b"b")))
    commands = drive.core.handle(PeerOpened(CONDUCTOR), 0)
    assert [type(c.message) for c in commands if isinstance(c, Send)] == [Register, LoadReport]
    assert drive(Received(CONDUCTOR, SnapshotRequest("i0", "hbm"))) == [ListBlocks()]
    [snapshot] = drive(progress(cached=(b"a", b"b")))
    assert snapshot == Send(CONDUCTOR, CacheSnapshot("i0", 1, 0, "hbm", (b"a", b"b")))
    assert drive(progress(added=(b"c",), removed=(b"a",))) == []
    delta, load = drive.core.handle(Tick(), REPORT_NS)
    assert delta == Send(CONDUCTOR, CacheDelta("i0", 1, 1, "hbm", (b"c",), (b"a",)))
    assert isinstance(load, Send) and isinstance(load.message, LoadReport)
    assert drive(Received(CONDUCTOR, SnapshotRequest("i0", "hbm"))) == [ListBlocks()]
    [snapshot] = drive(progress(added=(b"d",), cached=(b"b", b"c", b"d")))
    assert (snapshot.message.seq, snapshot.message.keys) == (1, (b"b", b"c", b"d"))
    [change] = drive(Received(CONDUCTOR, Drain("i0")))
    assert isinstance(change.message, StateChange) and change.message.state == "draining"
    drive(PeerGone(CONDUCTOR))
    assert drive(progress(added=(b"d",))) == [], "nobody listens; the next connection gets a snapshot"
