"""The decode core, event by event."""

from typing import Any

import pytest

from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AttemptFailed,
    ChangeRole,
    Drain,
    LiveAttempts,
    LoadAhead,
    LoadReport,
    Send,
    StateChange,
    StepTokens,
    Submit,
)
from mooncake.core.types import FinishReason, Job, Role
from mooncake.decode.core import MAX_AHEAD, STALE_NS, DecodeCore
from mooncake.engine.attempts import (
    AbortSequence,
    CloseSource,
    LoadBlocks,
    OpenSource,
    PeerGone,
    PeerOpened,
    Received,
    RunSequence,
    SourceOpened,
    TakeRole,
    Tick,
)
from mooncake.engine.core import AheadEnded, Drawn, KvLoaded, SequenceFailed, SequenceReleased
from tests.engine.jobs import S, key, make_info, make_job, make_source, progress


def refusal(job: Job) -> str | None:
    return "too big" if job.num_tokens > 100 else None


class Driver:
    def __init__(self, max_queued: int = 10) -> None:
        self.core = DecodeCore(make_info(Role.DECODE), max_queued, refusal)
        self.now = 0

    def __call__(self, event: Any) -> list[Any]:
        commands = self.core.handle(event, self.now)
        self.core.check_integrity()
        return [c for c in commands if not (isinstance(c, Send) and isinstance(c.message, LoadReport))]

    def message(self, message: Any) -> list[Any]:
        return self(Received("f0", message))

    def submit(self, number: int, num_tokens: int = 21, **more: Any) -> list[Any]:
        more = {"source": make_source(number, 20)} | more
        return self.message(Submit(make_job(number, num_tokens, **more)))


def told(reason: str, number: int = 1, detail: str = "") -> Send:
    return Send("f0", AttemptFailed("i0", key(number), reason, detail))


UNREADABLE = "the KV that was handed over cannot be read"


def test_a_sequence_from_hand_over_to_its_end() -> None:
    drive = Driver()
    assert drive.submit(1, tenant="acme") == [OpenSource(1, make_source(1, 20), "acme")]
    job = make_job(1, 21, source=make_source(1, 20), tenant="acme")
    assert drive(SourceOpened(1, 20)) == [RunSequence(1, job, 20)]
    assert drive(progress(KvLoaded(1, True))) == [CloseSource(1)]
    [send] = drive(progress(Drawn(1, 21, (5,), None, (), 20)))
    assert isinstance(send.message, StepTokens) and send.message.outputs[0].cached_tokens == 20
    [send] = drive(progress(Drawn(1, 22, (6,), FinishReason.STOP), SequenceReleased(1)))
    assert send.message.outputs[0].finish is FinishReason.STOP
    assert drive.core.num_attempts == 0


def test_tokens_of_one_step_go_in_one_message_per_frontend() -> None:
    drive = Driver()
    for number in (1, 2, 3):
        frontend = "f1" if number == 2 else "f0"
        drive(Received(frontend, Submit(make_job(number, 21, key=key(number, frontend=frontend)))))
    sends = drive(progress(*(Drawn(seq, 21, (seq,), None, (), 0) for seq in (1, 2, 3))))
    assert [(s.to, [o.token_ids for o in s.message.outputs]) for s in sends] == [("f0", [(1,), (3,)]), ("f1", [(2,)])]


def test_without_a_source_the_sequence_is_prefilled_in_place() -> None:
    drive = Driver()
    [run] = drive.submit(1, source=None)
    assert run == RunSequence(1, make_job(1, 21), 0)


@pytest.mark.parametrize("in_place", [False, True])
def test_kv_that_is_gone_fails_the_attempt_or_is_computed(in_place: bool) -> None:
    drive = Driver()
    drive.submit(1, allow_in_place=in_place)
    commands = drive(SourceOpened(1, 8))
    if in_place:
        assert [type(c) for c in commands] == [RunSequence] and commands[0].source_tokens == 8
    else:
        assert commands == [told("load_failed", detail=UNREADABLE), CloseSource(1)] and drive.core.num_attempts == 0


def test_a_load_that_breaks_off_fails_the_attempt() -> None:
    drive = Driver()
    drive.submit(1)
    drive(SourceOpened(1, 20))
    commands = drive(progress(KvLoaded(1, False)))
    assert commands == [CloseSource(1), told("load_failed", detail=UNREADABLE), AbortSequence(1)]
    assert drive(progress(Drawn(1, 21, (5,), None, (), 0), SequenceReleased(1))) == [], "void"
    assert drive.core.num_attempts == 0


@pytest.mark.parametrize("how", ["abort", "frontend gone", "deadline"])
def test_leaving_frees_everything_in_every_state(how: str) -> None:
    def leave(drive: Driver) -> list[Any]:
        if how == "abort":
            return drive.message(Abort((key(1),)))
        if how == "frontend gone":
            return drive(PeerGone("f0"))
        drive.now = 100 * S
        failed, *rest = drive(Tick())
        assert failed == told("deadline", detail="not done within 100 s")
        return rest

    opening = Driver()
    opening.submit(1)
    assert leave(opening) == []
    assert opening(SourceOpened(1, 20)) == [CloseSource(1)]
    running = Driver()
    running.submit(1)
    running(SourceOpened(1, 20))
    assert leave(running) == [AbortSequence(1)]
    assert running(progress(KvLoaded(1, False), SequenceReleased(1))) == [CloseSource(1)]
    assert opening.core.num_attempts == running.core.num_attempts == 0


def test_what_cannot_run_is_refused() -> None:
    drive = Driver(max_queued=1)
    assert drive.submit(9, 101) == [told("too_long", 9, "too big")]
    drive.submit(1)
    assert drive.submit(1) == [], "a repeated message"
    assert drive.submit(2) == [told("refused", 2, "1 attempts already")]
    drive(Received(CONDUCTOR, Drain("i0")))
    assert drive.submit(3) == [told("refused", 3, "draining")]


def test_it_takes_another_role_when_nothing_runs_any_more() -> None:
    drive = Driver()
    drive(PeerOpened(CONDUCTOR))
    drive.submit(1)
    change = ChangeRole("i0", 1, Role.PREFILL)
    [told_state] = drive(Received(CONDUCTOR, change))
    assert isinstance(told_state.message, StateChange) and told_state.message.state == "draining"
    assert drive(Received(CONDUCTOR, change)) == [], "a repeated message"
    assert drive.submit(2) == [told("refused", 2, "draining")]
    assert drive(SourceOpened(1, 20)) != []
    assert drive(progress(SequenceReleased(1))) == [CloseSource(1), TakeRole(Role.PREFILL)]
    assert drive(Tick()) == [] and drive.submit(3) == [told("refused", 3, "draining")]


def test_an_idle_instance_takes_another_role_at_once() -> None:
    assert Driver()(Received(CONDUCTOR, ChangeRole("i0", 1, Role.PREFILL))) == [TakeRole(Role.PREFILL)]


@pytest.mark.parametrize(("epoch", "role"), [(0, Role.PREFILL), (2, Role.PREFILL), (1, Role.DECODE)])
def test_a_change_of_another_life_or_to_its_own_role_is_none(epoch: int, role: Role) -> None:
    drive = Driver()
    assert drive(Received(CONDUCTOR, ChangeRole("i0", epoch, role))) == []
    assert drive.submit(1) != [] and not drive.core.drained


def test_who_is_to_stop_takes_no_other_role() -> None:
    drive = Driver()
    drive.submit(1)
    drive(SourceOpened(1, 20))
    drive(Received(CONDUCTOR, ChangeRole("i0", 1, Role.PREFILL)))
    drive(Received(CONDUCTOR, Drain("i0")))
    assert drive(progress(SequenceReleased(1))) == [CloseSource(1)] and drive.core.drained
    assert drive(Received(CONDUCTOR, ChangeRole("i0", 1, Role.PREFILL))) == []


def test_a_job_that_was_placed_on_a_prefill_instance_is_refused() -> None:
    drive = Driver()
    assert drive.submit(1, role=Role.PREFILL) == [told("refused", 1, "is a decode instance now")]
    assert drive.submit(2, role=Role.DECODE) == [OpenSource(1, make_source(2, 20))]


def test_an_engine_fault_is_told_once() -> None:
    drive = Driver()
    drive.submit(1, source=None)
    assert drive(progress(SequenceFailed(1, "engine_error", "bad"), SequenceReleased(1))) == [
        told("engine_error", detail="bad")
    ]


def test_live_attempts_name_the_unknown_and_drop_the_unwanted() -> None:
    drive = Driver()
    drive.submit(1)
    drive(SourceOpened(1, 20))
    assert drive.message(LiveAttempts("f0", (key(1), key(7)))) == [told("unknown", 7)]
    drive.now = STALE_NS + 1
    assert drive.message(LiveAttempts("f0", ())) == [AbortSequence(1)]


# ---------------------------------------------------------------- loads ahead

AHEAD = LoadAhead(8, make_source(1, 16), "acme")


def test_what_exists_of_a_prompt_is_leased_loaded_and_let_go() -> None:
    drive = Driver()
    assert drive.message(AHEAD) == [OpenSource(1, AHEAD.source, "acme")]
    assert drive(SourceOpened(1, 16)) == [LoadBlocks(1, AHEAD.source.block_keys, 8)]
    assert drive.core.num_attempts == 0, "nobody waits for it"
    assert drive(PeerGone("f0")) == [], "it ends by itself"
    assert drive(progress(AheadEnded(1))) == [CloseSource(1)]
    assert drive.core.num_ahead == 0


@pytest.mark.parametrize(("num_tokens", "commands"), [(0, []), (8, [CloseSource(1)])])
def test_what_is_gone_already_is_not_loaded_ahead(num_tokens: int, commands: list[Any]) -> None:
    drive = Driver()
    drive.message(AHEAD)
    assert drive(SourceOpened(1, num_tokens)) == commands
    assert drive.core.num_ahead == 0


def test_loads_ahead_are_bounded_and_not_begun_while_draining() -> None:
    drive = Driver()
    for _ in range(MAX_AHEAD):
        assert len(drive.message(AHEAD)) == 1
    assert drive.message(AHEAD) == []
    drive(SourceOpened(1, 0))
    assert len(drive.message(AHEAD)) == 1
    drive(SourceOpened(2, 0))
    drive(Received(CONDUCTOR, Drain("i0")))
    assert drive.message(AHEAD) == []


def test_a_load_ahead_and_its_sequence_have_numbers_of_their_own() -> None:
    drive = Driver()
    drive.message(AHEAD)
    assert drive.submit(1) == [OpenSource(2, make_source(1, 20))]
    assert [type(c) for c in drive(SourceOpened(2, 20))] == [RunSequence]
    assert [type(c) for c in drive(SourceOpened(1, 16))] == [LoadBlocks]
    assert drive(progress(AheadEnded(1), KvLoaded(2, True))) == [CloseSource(1), CloseSource(2)]


def test_a_joint_job_in_place_ends_with_the_first_tokens() -> None:
    drive = Driver()
    [run] = drive.submit(1, 20, source=None, allow_in_place=True, num_choices=2)
    assert isinstance(run, RunSequence) and run.one_token
    [send] = drive(
        progress(Drawn(1, 20, (5,), None, (), 0, 0), Drawn(1, 20, (6,), None, (), None, 1), SequenceReleased(1))
    )
    assert [(o.key.choice, o.token_ids) for o in send.message.outputs] == [(0, (5,)), (1, (6,))]
    assert drive.core.num_attempts == 0
    [run] = drive.submit(1, 21, source=None, allow_in_place=True)
    assert isinstance(run, RunSequence) and not run.one_token
