"""The life of a request as its frontend sees it, event by event."""

from typing import Any

from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AttemptEnded,
    AttemptFailed,
    BookingSnapshot,
    HandoverDone,
    KvReady,
    LiveAttempts,
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
    Start,
    Tick,
)

SOURCE = KvSource("n0", 20, (b"k" * 16, b"l" * 16), b"p" * 16)
PREDICTION = Prediction(ttft_ns=5)
INSTANCES = ("p0", "p1", "d0", "d1")


def spec(max_tokens: int = 10, **more: Any) -> RequestSpec:
    return RequestSpec(1, 20, b"", b"root", SOURCE.block_keys, SamplingParams(), max_tokens, max_tokens, **more)


def key(attempt: int = 0) -> AttemptKey:
    return AttemptKey("f0", 1, 0, attempt)


class Driver:
    def __init__(self, open_peers: tuple[str, ...] = INSTANCES) -> None:
        self.core = Dispatcher("f0", DispatcherLimits(), lambda spec, generated: (*spec.block_keys, b"more" * 4))
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
    assert commands == [Send(CONDUCTOR, PrefillDone(key(), 20)), Output(1, (5,), None, (), 8)]
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
    assert commands[:2] == [Output(1, (7,), FinishReason.STOP), Send(CONDUCTOR, AttemptEnded(key(), 3, True, 15))]
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
