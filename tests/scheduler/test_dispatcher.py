"""The life of a request as its frontend sees it, event by event."""

from typing import Any

import pytest

from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AttemptEnded,
    AttemptFailed,
    BookingSnapshot,
    HandoverDone,
    KvPartReady,
    KvReady,
    LiveAttempts,
    LoadAhead,
    Members,
    Placed,
    PlaceRequest,
    Prediction,
    PrefillDone,
    Rejected,
    Send,
    StepTokens,
    Submit,
    TokenOutput,
)
from mooncake.core.types import (
    NANOS_PER_S,
    AttemptKey,
    FinishReason,
    InstanceInfo,
    KvSource,
    Role,
    SamplingParams,
    Stage,
)
from mooncake.scheduler.dispatcher import (
    Cancel,
    Connect,
    Disconnect,
    Dispatcher,
    DispatcherLimits,
    Ended,
    Failure,
    Output,
    PeerGone,
    PeerOpened,
    Received,
    RequestSpec,
    Route,
    Start,
    Tick,
)

SOURCE = KvSource("n0", 20, (b"k" * 16, b"l" * 16), b"p" * 16)
PREDICTION = Prediction(ttft_ns=5)
INSTANCES = ("p0", "p1", "d0", "d1")


def spec(max_tokens: int = 10, **more: Any) -> RequestSpec:
    return RequestSpec(1, 20, b"", b"root", SOURCE.block_keys, SamplingParams(), max_tokens, max_tokens, **more)


def key(attempt: int = 0, choice: int = 0) -> AttemptKey:
    return AttemptKey("f0", 1, choice, attempt)


class Driver:
    def __init__(self, open_peers: tuple[str, ...] = INSTANCES, **limits: int) -> None:
        self.core = Dispatcher(
            "f0", DispatcherLimits(**limits), lambda spec, generated: (*spec.block_keys, b"more" * 4)
        )
        self.now = 0
        for peer in (CONDUCTOR, *open_peers):
            self(PeerOpened(peer))

    def __call__(self, event: Any) -> list[Any]:
        commands = self.core.handle(event, self.now)
        self.core.check_integrity()
        return commands

    def hear(self, message: Any, sender: str = CONDUCTOR) -> list[Any]:
        return self(Received(sender, message))

    def tokens(self, instance: str, position: int, *ids: int, attempt: int = 0, **more: Any) -> list[Any]:
        output = TokenOutput(key(attempt), position, ids, **more)
        return self.hear(StepTokens(instance, (output,)), instance)

    def placed(self, prefill: str = "p0", decode: str = "d0", attempt: int = 0) -> list[Any]:
        return self.hear(Placed(key(attempt), prefill, decode, None, PREDICTION))

    def choices(self, instance: str, position: int, tokens: dict[int, int], attempt: int = 0, **more: Any) -> list[Any]:
        """One token of each of these choices; with the first come the counts that come once."""
        firsts = (
            [{"cached_tokens": 8, "compute_ns": 0}] + [{}] * len(tokens) if instance == "p0" else [{}] * len(tokens)
        )
        outputs = tuple(
            TokenOutput(key(attempt, choice), position, (token,), **first, **more)
            for (choice, token), first in zip(tokens.items(), firsts, strict=False)
        )
        return self.hear(StepTokens(instance, outputs), instance)

    def three_prefilled(self) -> list[Any]:
        self(Start(spec(num_choices=3)))
        self.hear(Placed(key(), "p0", "d0", None, PREDICTION, 3))
        return self.choices("p0", 20, {0: 5, 1: 6, 2: 7})

    def three_decoding(self) -> list[Any]:
        self.three_prefilled()
        return self.hear(KvReady("p0", key(), SOURCE), "p0")

    def prefilled(self) -> list[Any]:
        self(Start(spec()))
        self.placed()
        return self.tokens("p0", 20, 5, cached_tokens=8, compute_ns=0)

    def decoding(self) -> list[Any]:
        self.prefilled()
        return self.hear(KvReady("p0", key(), SOURCE), "p0")


def sends(commands: list[Any], kind: type) -> list[tuple[str, Any]]:
    return [(c.to, c.message) for c in commands if isinstance(c, Send) and isinstance(c.message, kind)]


def only(commands: list[Any], kind: type) -> Any:
    [found] = [c for c in commands if isinstance(c, kind)]
    return found


def test_a_request_from_start_to_end() -> None:
    drive = Driver()
    [(to, ask)] = sends(drive(Start(spec())), PlaceRequest)
    assert (to, ask.key, ask.num_tokens, ask.first, ask.decode_only) == (CONDUCTOR, key(), 20, True, False)
    drive.now = 10
    [(to, submit)] = sends(drive.placed(), Submit)
    assert (to, submit.job.hand_over, submit.job.num_generated, submit.job.max_tokens) == ("p0", True, 0, 10)
    drive.now = 30
    commands = drive.tokens("p0", 20, 5, cached_tokens=8, compute_ns=15)
    assert commands == [
        Send(CONDUCTOR, PrefillDone(key(), 20)),
        Output(1, (5,), None, (), 8, route=Route("p0", "d0", 5)),
    ]
    drive.now = 40
    [(to, submit)] = sends(drive.hear(KvReady("p0", key(), SOURCE), "p0"), Submit)
    assert (to, submit.job.source, submit.job.num_tokens, submit.job.num_prompt_tokens) == ("d0", SOURCE, 21, 20)
    drive.now = 50
    commands = drive.tokens("d0", 21, 6, cached_tokens=20, compute_ns=4)
    assert commands == [Send("p0", HandoverDone((key(),))), Output(1, (6,))]
    drive.now = 60
    commands = drive.tokens("d0", 22, 7, finish=FinishReason.STOP)
    ended = only(commands, Ended)
    assert ended.timeline == (0, 10, 15, 30, 40, 46, 60) and (ended.prefill, ended.decode) == ("p0", "d0")
    assert ended.tbt_ns == 20
    assert commands[:2] == [Output(1, (7,), FinishReason.STOP), Send(CONDUCTOR, AttemptEnded(key(), 3, True, 15, 20))]
    assert drive.core.num_running == 0


def test_one_token_never_touches_decode() -> None:
    drive = Driver()
    drive(Start(spec(max_tokens=1)))
    [(_, submit)] = sends(drive.placed(), Submit)
    assert not submit.job.hand_over
    commands = drive.tokens("p0", 20, 5, finish=FinishReason.LENGTH, cached_tokens=0, compute_ns=0)
    assert only(commands, Ended).num_output == 1 and sends(commands, Submit) == []


def test_a_stop_at_the_first_token_gives_the_hand_over_back() -> None:
    drive = Driver()
    drive(Start(spec()))
    drive.placed()
    assert only(drive.tokens("p0", 20, 5, finish=FinishReason.STOP, cached_tokens=0, compute_ns=0), Ended)
    assert drive.hear(KvReady("p0", key(), SOURCE), "p0") == [Send("p0", HandoverDone((key(),)))]


def test_prefill_in_place_goes_to_decode_alone() -> None:
    drive = Driver()
    drive(Start(spec()))
    [(to, submit)] = sends(drive.placed(prefill=""), Submit)
    assert to == "d0" and submit.job.allow_in_place and submit.job.source is None
    assert sends(drive.tokens("d0", 20, 5, cached_tokens=0, compute_ns=0), PrefillDone)[0][1].key == key()


def test_repeated_positions_and_old_attempts_are_dropped() -> None:
    drive = Driver()
    drive.decoding()
    assert only(drive.tokens("d0", 20, 5, 6), Output).token_ids == (6,)
    assert drive.tokens("d0", 21, 6) == []
    assert drive.tokens("d0", 22, 9, attempt=3) == []
    assert drive.tokens("p0", 22, 9) == [], "not where the attempt runs"


def test_a_gap_is_a_failed_attempt() -> None:
    drive = Driver()
    drive.decoding()
    commands = drive.tokens("d0", 25, 9)
    assert sends(commands, Abort) == [("d0", Abort((key(),)))]
    [(_, ask)] = sends(commands, PlaceRequest)
    assert (ask.key, ask.decode_only, ask.num_tokens) == (key(1), True, 21)


def test_a_decode_instance_lost_before_its_first_token_is_replaced_on_the_kv_that_exists() -> None:
    drive = Driver()
    drive.decoding()
    commands = drive(PeerGone("d0"))
    assert sends(commands, Abort) == []
    assert sends(commands, AttemptEnded)[0][1].key == key()
    [(_, ask)] = sends(commands, PlaceRequest)
    assert (ask.decode_only, ask.exclude, ask.first, ask.num_generated) == (True, ("d0",), False, 1)
    [(to, submit)] = sends(drive.hear(Placed(key(1), "", "d1", None, PREDICTION)), Submit)
    assert to == "d1" and submit.job.source == SOURCE and submit.job.num_tokens == 21
    assert only(drive.tokens("d1", 21, 7, attempt=1), Output).token_ids == (7,)


def test_a_decode_instance_lost_later_is_replaced_from_prompt_and_tokens() -> None:
    drive = Driver()
    drive.decoding()
    drive.tokens("d0", 21, 6)
    [(_, ask)] = sends(drive(PeerGone("d0")), PlaceRequest)
    assert (ask.decode_only, ask.exclude, ask.num_generated) == (False, ("d0",), 2)
    [(to, submit)] = sends(drive.placed("p1", "d1", attempt=1), Submit)
    assert to == "p1" and submit.job.num_tokens == 22 and len(submit.job.block_keys) == 3
    assert submit.job.token_ids == b"\x05\0\0\0\x06\0\0\0"


def test_a_repeated_hand_over_is_not_given_back_while_the_next_attempt_needs_it() -> None:
    drive = Driver()
    drive.decoding()
    drive(PeerGone("d0"))
    assert drive.hear(KvReady("p0", key(), SOURCE), "p0") == []
    [(to, submit)] = sends(drive.hear(Placed(key(1), "", "d1", None, PREDICTION)), Submit)
    assert to == "d1" and submit.job.source == SOURCE


def test_kv_that_is_gone_is_computed_again_from_prompt_and_tokens() -> None:
    drive = Driver()
    drive.decoding()
    commands = drive.hear(AttemptFailed("d0", key(), "load_failed"), "d0")
    assert sends(commands, HandoverDone) == [("p0", HandoverDone((key(),)))]
    [(_, ask)] = sends(commands, PlaceRequest)
    assert not ask.decode_only and ask.num_tokens == 21
    [(to, submit)] = sends(drive.placed("p1", "d1", attempt=1), Submit)
    assert (to, submit.job.num_tokens, submit.job.num_prompt_tokens) == ("p1", 21, 20)
    assert only(drive.tokens("p1", 21, 6, attempt=1, cached_tokens=16, compute_ns=0), Output).cached_tokens is None


def test_a_lost_prefill_instance_matters_only_until_the_hand_over() -> None:
    drive = Driver()
    drive(Start(spec()))
    drive.placed()
    [(_, ask)] = sends(drive(PeerGone("p0")), PlaceRequest)
    assert ask.exclude == ("p0",) and ask.first
    drive = Driver()
    drive.decoding()
    assert drive(PeerGone("p0")) == []


def test_an_instance_without_a_connection_is_not_used() -> None:
    drive = Driver(open_peers=("p1", "d0"))
    drive(Start(spec()))
    [(_, ask)] = sends(drive.placed(), PlaceRequest)
    assert (ask.key, ask.exclude) == (key(1), ("p0",))


def test_rejections_reach_the_client_only_before_the_first_token() -> None:
    drive = Driver()
    drive(Start(spec()))
    commands = drive.hear(Rejected(key(), "overloaded_ttft", "why", 7, PREDICTION))
    assert only(commands, Failure) == Failure(1, "overloaded", "why", 7, PREDICTION)
    for reason, told in (("no_instance", "unavailable"), ("too_long", "too_long")):
        drive = Driver()
        drive(Start(spec()))
        assert only(drive.hear(Rejected(key(), reason, "why", 0)), Failure).reason == told
    drive = Driver()
    drive.decoding()
    drive(PeerGone("d0"))
    assert [c for c in drive.hear(Rejected(key(1), "overloaded_tbt", "why", 0)) if isinstance(c, Failure)] == []
    drive.now = NANOS_PER_S
    assert sends(drive(Tick()), PlaceRequest), "asked again after a pause"


def test_a_rejected_continuation_asks_again_when_its_retry_after_has_passed() -> None:
    """The Conductor remembers a rejection for that long. A pause that it asked for does not count as waiting for it."""
    drive = Driver()
    drive.decoding()
    drive(PeerGone("d0"))
    timeout_ns, retry_ns = DispatcherLimits().place_timeout_ns, 20 * NANOS_PER_S
    for _ in range(3):
        drive.hear(Rejected(key(1), "no_instance", "why", retry_ns))
        drive.now += retry_ns - 1
        assert sends(drive(Tick()), PlaceRequest) == []
        drive.now += 1
        assert sends(drive(Tick()), PlaceRequest)[0][1].key == key(1)
    drive.now += timeout_ns - 1
    assert [c for c in drive(Tick()) if isinstance(c, Failure)] == []
    drive.now += 1
    assert only(drive(Tick()), Failure).reason == "unavailable"


def test_a_stream_that_makes_progress_survives_any_number_of_failures() -> None:
    drive = Driver(max_attempts=3)
    drive.prefilled()
    for attempt in range(1, 10):
        drive.hear(AttemptFailed("p0", key(attempt - 1), "engine_error"), "p0")
        drive.placed(attempt=attempt)
        drive.tokens("p0", 20 + attempt, 5, attempt=attempt)
    for attempt in (9, 10):
        assert [
            c for c in drive.hear(AttemptFailed("p0", key(attempt), "engine_error"), "p0") if isinstance(c, Failure)
        ] == []
        drive.now += NANOS_PER_S
        drive(Tick())
        drive.placed(attempt=attempt + 1)
    failure = only(drive.hear(AttemptFailed("p0", key(11), "engine_error"), "p0"), Failure)
    assert (failure.reason, failure.detail) == ("error", "gave up after 3 attempts without a token")


def test_cancel_frees_the_attempt_wherever_it_is() -> None:
    drive = Driver()
    drive(Start(spec()))
    assert sends(drive(Cancel(1)), AttemptEnded) == [(CONDUCTOR, AttemptEnded(key()))]
    assert drive.placed() == [Send(CONDUCTOR, AttemptEnded(key()))], "the answer came too late: its booking must go"
    drive = Driver()
    drive.decoding()
    commands = drive(Cancel(1))
    assert sends(commands, Abort) == [("d0", Abort((key(),)))] and sends(commands, HandoverDone)
    assert only(commands, Ended).num_output == 1
    assert drive(Cancel(1)) == []


def test_time_runs_out_without_a_placement_and_for_the_whole_request() -> None:
    drive = Driver()
    drive(Start(spec()))
    drive.now = DispatcherLimits().place_timeout_ns
    assert only(drive(Tick()), Failure).reason == "unavailable"
    drive = Driver()
    drive(Start(spec(timeout_ns=5)))
    drive.placed()
    drive.now = 5
    commands = drive(Tick())
    assert only(commands, Failure).reason == "deadline" and sends(commands, Abort)


def test_requests_wait_for_a_conductor_that_is_away() -> None:
    drive = Driver()
    drive(PeerGone(CONDUCTOR))
    drive(Start(spec()))
    commands = drive(PeerOpened(CONDUCTOR))
    assert [type(m) for _, m in [(c.to, c.message) for c in commands]] == [BookingSnapshot, PlaceRequest]


def test_running_streams_survive_a_conductor_that_knows_nobody() -> None:
    drive = Driver(open_peers=())
    info = InstanceInfo("d0", 1, Role.DECODE, "unix:/d0", "c", "n0", (), 10, 4, 4, 16)
    assert drive.hear(Members((info,))) == [Connect(info)]
    drive(PeerOpened("d0"))
    assert drive.hear(Members(())) == []
    assert drive.hear(Members((info,))) == []
    drive.hear(Members(()))
    assert drive(PeerGone("d0")) == [Disconnect("d0")]


def test_repair_asks_for_what_is_wanted_and_tells_what_is_booked() -> None:
    drive = Driver()
    drive.decoding()
    drive.now = DispatcherLimits().repair_ns
    commands = drive(Tick())
    [(_, bookings)] = sends(commands, BookingSnapshot)
    assert bookings.bookings == ((key(), "", "d0", 21),)
    live = {to: (m.keys, m.held) for to, m in sends(commands, LiveAttempts)}
    assert live == {"p0": ((), (key(),)), "p1": ((), ()), "d0": ((key(),), ()), "d1": ((), ())}
    commands = drive.hear(AttemptFailed("d0", key(), "unknown"), "d0")
    assert sends(commands, PlaceRequest)[0][1].exclude == ()


def test_an_overfull_frontend_refuses() -> None:
    drive = Driver()
    drive.core = Dispatcher("f0", DispatcherLimits(max_requests=0), lambda spec, generated: ())
    failure, ended = drive(Start(spec()))
    assert failure.reason == "overloaded" and failure.retry_after_ns == NANOS_PER_S
    assert ended.timeline[Stage.END] == 0


def ended_keys(commands: list[Any]) -> list[tuple[int, int]]:
    return [(m.key.choice, m.key.attempt) for _, m in sends(commands, AttemptEnded)]


def test_choices_share_placement_and_prefill_and_part_at_the_hand_over() -> None:
    drive = Driver()
    [(_, ask)] = sends(drive(Start(spec(num_choices=3))), PlaceRequest)
    assert (ask.key, ask.num_choices) == (key(), 3)
    [(to, submit)] = sends(drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, 3)), Submit)
    assert (to, submit.job.key, submit.job.num_choices) == ("p0", key(), 3)
    commands = drive.choices("p0", 20, {0: 5, 1: 6, 2: 7})
    outputs = [(c.choice, c.token_ids, c.cached_tokens) for c in commands if isinstance(c, Output)]
    assert outputs == [(0, (5,), 8), (1, (6,), None), (2, (7,), None)]
    assert sends(commands, PrefillDone) == [(CONDUCTOR, PrefillDone(key(), 0))]
    submits = sends(drive.hear(KvReady("p0", key(), SOURCE), "p0"), Submit)
    assert [(to, m.job.key, m.job.num_tokens, m.job.token_ids, m.job.num_choices) for to, m in submits] == [
        ("d0", key(0, choice), 21, bytes([5 + choice, 0, 0, 0]), 1) for choice in range(3)
    ]
    assert all(m.job.source == SOURCE for _, m in submits)
    assert drive.hear(KvReady("p0", key(), SOURCE), "p0") == [], "repeated"
    assert sends(drive.choices("d0", 21, {0: 1, 2: 3}), HandoverDone) == []
    assert drive.choices("d0", 21, {1: 2}) == [Send("p0", HandoverDone((key(),))), Output(1, (2,), choice=1)]
    drive.now = 8
    commands = drive.choices("d0", 22, {1: 4}, finish=FinishReason.STOP)
    assert commands == [
        Output(1, (4,), FinishReason.STOP, choice=1),
        Send(CONDUCTOR, AttemptEnded(key(0, 1), 3, True, 4, 8)),
    ]
    commands = drive.choices("d0", 22, {0: 4, 2: 4}, finish=FinishReason.LENGTH)
    assert ended_keys(commands) == [(0, 0), (2, 0)]
    ended = only(commands, Ended)
    assert (ended.num_output, ended.num_attempts, ended.timeline[Stage.END], ended.tbt_ns) == (9, 1, 8, 8)


def test_the_tbt_of_a_request_is_the_longest_of_its_choices_those_included_that_the_client_ended() -> None:
    drive = Driver()
    drive.three_decoding()
    drive.now = 100
    drive.choices("d0", 21, {1: 9})
    drive(Cancel(1, 1))
    drive.now = 107
    drive.choices("d0", 21, {0: 9}, finish=FinishReason.STOP)
    assert only(drive(Cancel(1)), Ended).tbt_ns == 107, "choice 2 has no gap"


def test_a_joint_attempt_that_fails_before_its_first_tokens_is_tried_jointly_again() -> None:
    drive = Driver()
    drive(Start(spec(num_choices=3)))
    drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, 3))
    commands = drive.hear(AttemptFailed("p0", key(), "engine_error"), "p0")
    assert ended_keys(commands) == [(0, 0), (1, 0), (2, 0)]
    [(_, ask)] = sends(commands, PlaceRequest)
    assert (ask.key, ask.num_choices, ask.first, ask.exclude) == (key(1), 3, True, ("p0",))


def test_first_tokens_that_were_lost_are_drawn_again_by_each_choice() -> None:
    drive = Driver()
    drive(Start(spec(num_choices=2)))
    drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, 2))
    commands = drive.hear(KvReady("p0", key(), SOURCE), "p0")
    assert [(m.job.key, m.job.num_tokens) for _, m in sends(commands, Submit)] == [(key(), 20), (key(0, 1), 20)]
    assert len(sends(commands, PrefillDone)) == 1
    assert len([c for c in drive.choices("d0", 20, {0: 5, 1: 6}) if isinstance(c, Output)]) == 2


def test_a_choice_that_fails_goes_on_by_itself_on_the_kv_that_is_still_held() -> None:
    drive = Driver()
    drive.three_decoding()
    drive.choices("d0", 21, {0: 1})
    commands = drive.hear(AttemptFailed("d0", key(0, 1), "engine_error"), "d0")
    assert ended_keys(commands) == [(1, 0)] and sends(commands, HandoverDone) == []
    [(_, ask)] = sends(commands, PlaceRequest)
    assert (ask.key, ask.num_choices, ask.decode_only, ask.first, ask.exclude) == (key(1, 1), 1, True, False, ("d0",))
    [(to, submit)] = sends(drive.hear(Placed(key(1, 1), "", "d1", None, PREDICTION)), Submit)
    assert (to, submit.job.key, submit.job.source, submit.job.num_tokens) == ("d1", key(1, 1), SOURCE, 21)
    drive.choices("d0", 21, {2: 3})
    assert sends(drive.choices("d1", 21, {1: 2}, attempt=1), HandoverDone) == [("p0", HandoverDone((key(),)))]
    [(_, ask)] = sends(drive.hear(AttemptFailed("d0", key(0, 2), "engine_error"), "d0"), PlaceRequest)
    assert (ask.key, ask.decode_only, ask.num_tokens) == (key(1, 2), False, 22)


def test_a_prefill_lost_between_first_tokens_and_hand_over_sends_each_choice_its_own_way() -> None:
    drive = Driver()
    drive.three_prefilled()
    asks = [m for _, m in sends(drive(PeerGone("p0")), PlaceRequest)]
    assert [(m.key, m.num_choices, m.num_tokens, m.first) for m in asks] == [
        (key(1, choice), 1, 21, False) for choice in range(3)
    ]
    assert drive.hear(KvReady("p0", key(), SOURCE), "p0") == [Send("p0", HandoverDone((key(),)))]


def test_a_choice_that_ends_with_its_first_token_does_not_touch_decode() -> None:
    drive = Driver()
    drive(Start(spec(num_choices=2)))
    drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, 2))
    drive.choices("p0", 20, {0: 5}, finish=FinishReason.STOP)
    drive.choices("p0", 20, {1: 5})
    assert [m.job.key for _, m in sends(drive.hear(KvReady("p0", key(), SOURCE), "p0"), Submit)] == [key(0, 1)]
    assert drive.hear(KvReady("p0", key(), SOURCE), "p0") == [], "choice 1 still needs it"
    assert drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, 2)) == [Send(CONDUCTOR, AttemptEnded(key()))], (
        "repeated: the booking of choice 1 stays"
    )
    commands = drive.choices("d0", 21, {1: 6}, finish=FinishReason.STOP)
    assert sends(commands, HandoverDone) and only(commands, Ended).num_output == 3


def test_prefill_in_place_draws_jointly_and_then_runs_each_choice() -> None:
    drive = Driver()
    drive(Start(spec(num_choices=2)))
    [(to, submit)] = sends(drive.hear(Placed(key(), "", "d0", None, PREDICTION, 2)), Submit)
    assert (to, submit.job.num_choices, submit.job.allow_in_place) == ("d0", 2, True)
    submits = sends(drive.choices("d0", 20, {0: 5, 1: 6}), Submit)
    assert [(to, m.job.key, m.job.num_tokens, m.job.allow_in_place, m.job.num_choices) for to, m in submits] == [
        ("d0", key(0, choice), 21, True, 1) for choice in range(2)
    ]


def test_one_choice_can_be_cancelled_alone() -> None:
    drive = Driver()
    drive.three_decoding()
    commands = drive(Cancel(1, 1))
    assert commands == [Send("d0", Abort((key(0, 1),))), Send(CONDUCTOR, AttemptEnded(key(0, 1), 1))]
    assert drive(Cancel(1, 1)) == [] and drive.choices("d0", 21, {1: 9}) == []
    commands = drive(Cancel(1))
    assert sends(commands, Abort) == [("d0", Abort((key(),))), ("d0", Abort((key(0, 2),)))]
    assert sends(commands, HandoverDone) and only(commands, Ended).num_output == 3
    drive = Driver()
    drive.three_prefilled()
    assert sends(drive(Cancel(1)), Abort) == [("p0", Abort((key(),)))], "the joint attempt is aborted once"


@pytest.mark.parametrize("reason", ["too_long", "grammar"])
def test_a_request_of_several_choices_fails_as_a_whole(reason: str) -> None:
    """Without another attempt: it would fail everywhere."""
    drive = Driver()
    drive.three_decoding()
    commands = drive.hear(AttemptFailed("d0", key(0, 1), reason, "why"), "d0")
    assert only(commands, Failure) == Failure(1, reason, "why") and only(commands, Ended)
    assert [m.keys for _, m in sends(commands, Abort)] == [(key(0, choice),) for choice in range(3)]
    assert ended_keys(commands) == [(0, 0), (1, 0), (2, 0)] and drive.core.num_running == 0


def test_the_last_failure_of_one_choice_does_not_start_the_others() -> None:
    """The decode instance is lost between the placement and the hand-over."""
    drive = Driver(max_attempts=1)
    drive.three_prefilled()
    drive(PeerGone("d0"))
    commands = drive.hear(KvReady("p0", key(), SOURCE), "p0")
    assert only(commands, Failure).reason == "error" and sends(commands, Submit) == []


def test_repair_names_each_choice_once() -> None:
    drive = Driver()
    drive.three_prefilled()
    drive.now = DispatcherLimits().repair_ns
    commands = drive(Tick())
    rows = [
        (k.choice, prefill, decode, tokens)
        for k, prefill, decode, tokens in sends(commands, BookingSnapshot)[0][1].bookings
    ]
    assert rows == [(choice, "", "d0", 21) for choice in range(3)]
    assert dict(sends(commands, LiveAttempts))["p0"].keys == (key(),)
    drive.hear(KvReady("p0", key(), SOURCE), "p0")
    drive.now *= 3
    live = dict(sends(drive(Tick()), LiveAttempts))
    assert live["p0"].held == (key(),) and live["d0"].keys == tuple(key(0, choice) for choice in range(3))


def test_a_placement_that_comes_too_late_is_released_for_all_choices() -> None:
    drive = Driver()
    drive(Start(spec(num_choices=2)))
    drive(Cancel(1))
    assert ended_keys(drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, 2))) == [(0, 0), (1, 0)]


def checked() -> tuple[Driver, list[Any]]:
    """Prefilled and handed over, where decode is judged only then."""
    drive = Driver()
    drive(Start(spec()))
    drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, check_decode=True))
    first = drive.tokens("p0", 20, 5, cached_tokens=8, compute_ns=3)
    assert sends(first, PrefillDone) == [(CONDUCTOR, PrefillDone(key(), 0))]
    assert not [command for command in first if isinstance(command, Output)], "the client must not know yet"
    return drive, drive.hear(KvReady("p0", key(), SOURCE), "p0")


def test_decode_is_asked_for_when_the_prefill_is_done_and_draws_the_first_token_again() -> None:
    drive, asked = checked()
    assert sends(asked, AttemptEnded) == [(CONDUCTOR, AttemptEnded(key()))] and not sends(asked, Submit)
    [(_, request)] = sends(asked, PlaceRequest)
    assert (request.key, request.decode_only, request.first) == (key(1), True, True)
    [(instance, submitted)] = sends(drive.placed("", "d1", attempt=1), Submit)
    assert (instance, submitted.job.num_tokens, submitted.job.source) == ("d1", 20, SOURCE)
    commands = drive.tokens("d1", 20, 5, attempt=1, cached_tokens=20, compute_ns=1)
    assert [c for c in commands if isinstance(c, Output)] == [Output(1, (5,), None, (), 8, route=Route("p0", "d1", 5))]
    assert sends(commands, HandoverDone) == [("p0", HandoverDone((key(),)))]
    [ended] = [c for c in drive.tokens("d1", 21, 6, attempt=1, finish=FinishReason.STOP) if isinstance(c, Ended)]
    assert (ended.prefill, ended.decode, ended.num_attempts) == ("p0", "d1", 1)


def test_what_decode_refuses_was_prefilled_for_nothing_and_is_let_go() -> None:
    drive, _ = checked()
    commands = drive.hear(Rejected(key(1), "overloaded_tbt", "full", 7))
    [failure] = [c for c in commands if isinstance(c, Failure)]
    assert (failure.reason, failure.retry_after_ns) == ("overloaded", 7)
    assert sends(commands, HandoverDone) == [("p0", HandoverDone((key(),)))]
    assert drive.core.num_running == 0


# ---------------------------------------------------------------- loads ahead

REUSED = KvSource("n1", 16, SOURCE.block_keys)
PART = KvPartReady("p0", key(), 8, KvSource("n0", 16, SOURCE.block_keys))


def test_decode_loads_a_reused_prefix_as_soon_as_it_is_placed() -> None:
    drive = Driver(part_tokens=16)
    drive(Start(spec(tenant="acme")))
    commands = drive.hear(Placed(key(), "p0", "d0", REUSED, PREDICTION))
    assert [(to, type(message)) for to, message in sends(commands, object)] == [("p0", Submit), ("d0", LoadAhead)]
    assert sends(commands, LoadAhead) == [("d0", LoadAhead(0, REUSED, "acme"))]


def test_a_short_prefix_and_one_that_is_not_handed_over_are_not_loaded_ahead() -> None:
    for max_tokens, part_tokens in ((10, 17), (1, 16)):
        drive = Driver(part_tokens=part_tokens)
        drive(Start(spec(max_tokens)))
        assert sends(drive.hear(Placed(key(), "p0", "d0", REUSED, PREDICTION)), LoadAhead) == []


def test_nothing_is_loaded_ahead_for_a_prefill_instance_that_is_gone() -> None:
    drive = Driver(open_peers=("p1", "d0"), part_tokens=16)
    drive(Start(spec()))
    commands = drive.hear(Placed(key(), "p0", "d0", REUSED, PREDICTION))
    assert sends(commands, PlaceRequest) and sends(commands, LoadAhead) == []


def test_decode_is_told_of_what_is_computed_while_the_rest_is() -> None:
    drive = Driver()
    drive(Start(spec()))
    drive.placed()
    assert drive.hear(PART, "p0") == [Send("d0", LoadAhead(8, PART.source))]
    assert drive.tokens("p0", 20, 5, cached_tokens=8, compute_ns=0)
    assert drive.hear(PART, "p0") == [], "overtaken by the first token: the hand-over comes at once"
    [(to, message)] = sends(drive.hear(KvReady("p0", key(), SOURCE), "p0"), Submit)
    assert (to, message.job.source) == ("d0", SOURCE)
    assert drive.hear(PART, "p0") == []


def test_parts_of_other_attempts_and_for_lost_instances_are_dropped() -> None:
    drive = Driver()
    drive(Start(spec()))
    drive.placed()
    other = KvPartReady("p1", key(), 8, PART.source)
    assert drive.hear(other, "p1") == []
    assert drive.hear(KvPartReady("p0", key(1), 8, PART.source), "p0") == []
    drive(PeerGone("d0"))
    assert drive.hear(PART, "p0") == []
    drive(Cancel(1))
    assert drive.hear(PART, "p0") == []


def test_where_decode_is_judged_after_the_prefill_nothing_is_loaded_ahead() -> None:
    drive = Driver(part_tokens=16)
    drive(Start(spec()))
    commands = drive.hear(Placed(key(), "p0", "d0", REUSED, PREDICTION, check_decode=True))
    assert sends(commands, LoadAhead) == []
    assert drive.hear(PART, "p0") == []


def test_several_choices_share_what_was_loaded_ahead() -> None:
    drive = Driver()
    drive(Start(spec(num_choices=3)))
    drive.hear(Placed(key(), "p0", "d0", None, PREDICTION, 3))
    assert drive.hear(PART, "p0") == [Send("d0", LoadAhead(8, PART.source))]
