"""The life of requests, as their frontend sees it: placement, prefill, hand-over, decode, and all that goes wrong between.

    placing --Placed--> prefilling --first token--> handing over --KvReady--> decoding --finish--> ended
       ^                    |                            |                       |
       +---- next attempt --+----------------------------+-----------------------+

A dispatcher runs inside each frontend, so streams go on while the Conductor is away. It owns the tokens of its requests: an
attempt that fails is followed by another one that continues from prompt plus tokens so far, on the KV that still exists.
Outputs of old attempts and repeated positions are dropped; a gap in positions counts as a failed attempt.

The choices of a request share one *joint* attempt until they have their first tokens: it is placed once and prefilled once,
under the key of choice 0. At the hand-over they part: from there each runs under its own key at the decode instance that was
placed, all from the same KV, and what fails is tried again for that choice alone. Each is booked by itself from the start.

Where decode is judged only after the prefill (`Placed.check_decode`), the first token is kept from the client until then, so
that a refusal still comes before it: the KV is handed over as if the token had been lost, and decode draws it again.

Lost messages are repaired by two periodic ones: `LiveAttempts` to the instances (which answer that they do not know an
attempt) and `BookingSnapshot` to the Conductor.
"""

from __future__ import annotations

import enum
import heapq
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.deadlines import earliest
from mooncake.core.keys import block_keys
from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AnyMessage,
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
from mooncake.core.stats import tbt_of_gaps
from mooncake.core.types import (
    NANOS_PER_MS,
    NANOS_PER_S,
    PART_TOKENS,
    AttemptKey,
    FinishReason,
    InstanceInfo,
    Job,
    KvSource,
    Role,
    SamplingParams,
    Slo,
    Stage,
    TokenLogprobs,
    tokens_to_bytes,
)

# ---------------------------------------------------------------- what comes in


class RequestSpec(msgspec.Struct, frozen=True):
    """A valid request. `number` is unique at this frontend. client_max_tokens: what the client asked for, if anything;
    max_tokens: the limit that holds, for each of num_choices outputs."""

    number: int
    num_tokens: int
    token_ids: bytes
    root_key: bytes
    block_keys: tuple[bytes, ...]
    sampling: SamplingParams
    max_tokens: int
    client_max_tokens: int | None = None
    tenant: str = ""
    priority: int = 0
    slo: Slo = Slo()
    timeout_ns: int = 600 * NANOS_PER_S
    num_choices: int = 1
    weight: float = 1.0
    """The tenant's share, beside those of the others."""


class Start(msgspec.Struct, frozen=True, tag=True):
    spec: RequestSpec


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The client is gone or has enough, of one choice that has tokens or (None) of all. No output follows."""

    number: int
    choice: int | None = None


class Received(msgspec.Struct, frozen=True, tag=True):
    sender: str
    message: AnyMessage


class PeerOpened(msgspec.Struct, frozen=True, tag=True):
    peer: str


class PeerGone(msgspec.Struct, frozen=True, tag=True):
    peer: str


class Tick(msgspec.Struct, frozen=True, tag=True):
    """The time of `deadline()` has come."""


# ---------------------------------------------------------------- what goes out


class Route(msgspec.Struct, frozen=True):
    """Where a request was placed first, and what was predicted."""

    prefill: str
    decode: str
    predicted_ttft_ns: int


class Output(msgspec.Struct, frozen=True):
    """Tokens of one choice for the client, each position once. cached_tokens and route come with the first of a request."""

    number: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None
    choice: int = 0
    route: Route | None = None


class Failure(msgspec.Struct, frozen=True):
    """The request ended without its tokens. reason: overloaded, too_long, grammar, unavailable, deadline, error."""

    number: int
    reason: str
    detail: str
    retry_after_ns: int = 0
    prediction: Prediction = Prediction()


class Ended(msgspec.Struct, frozen=True):
    """Last word on a request, after its last Output or Failure or its Cancel. timeline[stage]: time of each stage, or None;
    of several choices it is that of the first one to come there, and END that of the last. tbt_ns: the longest of any choice;
    None without gaps."""

    number: int
    timeline: tuple[int | None, ...]
    prefill: str
    decode: str
    num_output: int
    num_attempts: int
    prediction: Prediction
    tbt_ns: int | None = None


class Connect(msgspec.Struct, frozen=True):
    """Keep a connection to this instance; answered by PeerOpened and PeerGone."""

    instance: InstanceInfo


class Disconnect(msgspec.Struct, frozen=True):
    peer: str


DispatcherEvent = Start | Cancel | Received | PeerOpened | PeerGone | Tick
DispatcherCommand = Send | Output | Failure | Ended | Connect | Disconnect


class DispatcherLimits(msgspec.Struct, frozen=True):
    max_requests: int = 4096
    """Requests in flight at this frontend; more are refused as overloaded."""
    place_timeout_ns: int = 30 * NANOS_PER_S
    """How long a request waits for a placement, be it that the Conductor is away or that no instance is ready."""
    part_tokens: int = PART_TOKENS
    """Decode is told at once of a reused prefix of so many tokens."""
    max_attempts: int = 16
    """In a row, without a token."""
    retry_ns: int = 100 * NANOS_PER_MS
    """Pause before the next attempt after the second failure and each later one, times the failures since the last token."""
    repair_ns: int = 4 * NANOS_PER_S
    """Period of LiveAttempts and BookingSnapshot."""
    arrive_ns: int = NANOS_PER_S
    """What was sent longer ago has arrived, or was lost. Instances drop what a frontend does not name, but nothing younger than
    a multiple of this."""
    linger_ns: int = 12 * NANOS_PER_S
    """How long these go on after a request ended or a peer was met: what they must find is not dropped before it has a
    certain age there, and they may be lost too."""


class DispatcherSettings(msgspec.Struct, frozen=True):
    """What a frontend's `Dispatcher` is built from, as its event log keeps it."""

    name: str
    limits: DispatcherLimits
    block_tokens: int


# ---------------------------------------------------------------- one request


class _State(enum.IntEnum):
    PAUSED = 0
    """Waiting for `retry_at` before it asks for a placement."""
    PLACING = 1
    PREFILLING = 2
    HANDING_OVER = 3
    DECODING = 4


class _Request:
    """num_output: tokens of all choices. tbt_ns: the longest of those that ended."""

    __slots__ = (
        "cached_tokens", "cached_told", "choices", "deadline", "decode", "num_attempts", "num_output", "prediction",
        "prefill", "spec", "tbt_ns", "timeline",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec, now: int) -> None:
        self.spec = spec
        self.choices: tuple[_Choice, ...] = tuple(_Choice(self, index) for index in range(spec.num_choices))
        self.num_output = 0
        self.num_attempts = 1
        self.tbt_ns: int | None = None
        self.prefill = self.decode = ""
        """The last placement of any attempt."""
        self.prediction = Prediction()
        self.cached_tokens: int | None = None
        """What the prefill reused, if its first token was not passed on."""
        self.cached_told = False
        self.deadline = now + spec.timeout_ns
        self.timeline: list[int | None] = [None] * len(Stage)
        self.timeline[Stage.RECEIVED] = now

    @property
    def attempts(self) -> list[_Attempt]:
        """Those under way, each once."""
        return list(dict.fromkeys(choice.attempt for choice in self.choices if not choice.ended))

    def pass_stage(self, stage: Stage, time: int) -> None:
        if self.timeline[stage] is None:
            self.timeline[stage] = time


class _Choice:
    """One output of a request. attempt: the present one, or the last."""

    __slots__ = ("attempt", "ended", "gaps", "index", "keys", "last_at", "request", "token_ids")

    attempt: _Attempt

    def __init__(self, request: _Request, index: int) -> None:
        self.request = request
        self.index = index
        self.token_ids: list[int] = []
        self.keys = request.spec.block_keys
        self.ended = False
        self.gaps = array("q")
        self.last_at: int | None = None

    def add_tokens(self, tokens: tuple[int, ...], now: int) -> None:
        if self.last_at is not None:
            self.gaps.extend([(now - self.last_at) // len(tokens)] * len(tokens))
        self.last_at = now
        self.token_ids.extend(tokens)

    @property
    def num_tokens(self) -> int:
        return self.request.spec.num_tokens + len(self.token_ids)


class _Handover:
    """KV whose leases a prefill instance holds under that key, for the attempts that have not read it yet."""

    __slots__ = ("instance", "key", "num_users", "source")

    def __init__(self, ready: KvReady, num_users: int) -> None:
        self.instance = ready.instance
        self.key = ready.key
        self.source = ready.source
        self.num_users = num_users


class _Attempt:
    """choices: whom it runs for; those that ended or went on without it are not among them. key: of the first of them when
    it began. num_failures: of attempts before it, since the last token."""

    __slots__ = (
        "check_decode", "choices", "decode", "exclude", "handover", "key", "num_choices", "num_failures", "placing_since",
        "prefill", "request", "retry_at", "sent_at", "state",
    )  # fmt: skip

    def __init__(self, key: AttemptKey, choices: list[_Choice], now: int) -> None:
        self.key = key
        self.choices = choices
        self.num_choices = len(choices)
        self.check_decode = False
        self.request = choices[0].request
        self.state = _State.PLACING
        self.prefill = self.decode = ""
        self.handover: _Handover | None = None
        self.exclude: tuple[str, ...] = ()
        self.num_failures = 0
        self.placing_since = now
        self.retry_at = 0
        self.sent_at = now
        for choice in choices:
            choice.attempt = self

    @property
    def joint(self) -> bool:
        return self.num_choices > 1

    @property
    def instance(self) -> str:
        """Where it runs now, or ""."""
        if self.state in (_State.PREFILLING, _State.HANDING_OVER):
            return self.prefill
        return self.decode if self.state is _State.DECODING else ""


ExtendKeys = Callable[[RequestSpec, list[int]], tuple[bytes, ...]]
"""Block keys of the prompt continued by generated tokens."""


def hashed_keys(block_tokens: int) -> ExtendKeys:
    """The real thing; the simulator, which has no token ids, brings another."""

    def extend(spec: RequestSpec, generated: list[int]) -> tuple[bytes, ...]:
        return block_keys(spec.root_key, spec.token_ids + tokens_to_bytes(generated), block_tokens)

    return extend


class Dispatcher:
    """Sans-IO. `name` is the frontend's name in the cluster."""

    def __init__(self, name: str, limits: DispatcherLimits, extend_keys: ExtendKeys) -> None:
        self.name = name
        self.num_retries = 0
        self._limits = limits
        self._extend_keys = extend_keys
        self._requests: dict[int, _Request] = {}
        self._members: dict[str, InstanceInfo] = {}
        self._dialled: dict[str, str] = {}
        self._open: dict[str, None] = {}
        self._timers: list[tuple[int, int]] = []
        self._repair_at: int | None = None
        self._linger_until = 0
        self._out: list[DispatcherCommand] = []
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            Start: self._start,
            Cancel: self._cancel,
            Received: lambda event, now: self._messages[type(event.message)](event.message, now),
            PeerOpened: self._peer_opened,
            PeerGone: self._peer_gone,
            Tick: lambda event, now: None,
        }
        self._messages: dict[type, Callable[[Any, int], None]] = {
            Placed: self._placed,
            Rejected: self._rejected,
            Members: self._members_changed,
            StepTokens: self._step_tokens,
            KvPartReady: self._kv_part_ready,
            KvReady: self._kv_ready,
            AttemptFailed: self._attempt_failed,
        }

    # ------------------------------------------------------------------ the face

    def handle(self, event: DispatcherEvent, now: int) -> list[DispatcherCommand]:
        self._handlers[type(event)](event, now)
        self._run_timers(now)
        out, self._out = self._out, []
        return out

    def deadline(self) -> int | None:
        first = self._timers[0][0] if self._timers else None
        return earliest(first, self._repair_at)

    @property
    def num_running(self) -> int:
        return len(self._requests)

    @property
    def members(self) -> tuple[InstanceInfo, ...]:
        return tuple(self._members.values())

    def check_integrity(self) -> None:
        """Raises AssertionError: every request waits for something that has a deadline; every choice that has not ended runs
        in exactly one attempt; hand-overs are held for exactly those that need them."""
        timed = {number for _, number in self._timers}
        assert all(number in timed for number in self._requests), "a request without a timer"
        for request in self._requests.values():
            running = [choice for choice in request.choices if not choice.ended]
            attempts = request.attempts
            assert sorted(c.index for a in attempts for c in a.choices) == [choice.index for choice in running]
            assert all(choice in choice.attempt.choices for choice in running)
            users = Counter(id(attempt.handover) for attempt in attempts)
            assert all(a.handover is None or a.handover.num_users == users[id(a.handover)] for a in attempts)

    # ------------------------------------------------------------------ requests come and go

    def _start(self, event: Start, now: int) -> None:
        spec = event.spec
        if len(self._requests) >= self._limits.max_requests:
            detail = f"{len(self._requests)} requests are in flight at this frontend"
            self._out.append(Failure(spec.number, "overloaded", detail, NANOS_PER_S))
            self._out.append(Ended(spec.number, (now,) + (None,) * 5 + (now,), "", "", 0, 0, Prediction()))
            return
        request = self._requests[spec.number] = _Request(spec, now)
        attempt = _Attempt(AttemptKey(self.name, spec.number), list(request.choices), now)
        self._set_timer(request, request.deadline)
        self._set_timer(request, now + self._limits.place_timeout_ns)
        self._linger(now)
        self._ask_placement(attempt)

    def _cancel(self, event: Cancel, now: int) -> None:
        request = self._requests.get(event.number)
        if request is None:
            return
        for choice in request.choices:
            if not choice.ended and event.choice in (None, choice.index):
                if choice.attempt.choices == [choice]:
                    self._abort_attempt(choice.attempt)
                self._end_choice(choice, now, completed=False)

    def _fail(self, request: _Request, reason: str, detail: str, now: int, **more: Any) -> None:
        for attempt in request.attempts:
            self._abort_attempt(attempt)
        self._out.append(Failure(request.spec.number, reason, detail, **more))
        for choice in request.choices:
            if not choice.ended:
                self._end_choice(choice, now, completed=False)

    def _end_choice(self, choice: _Choice, now: int, *, completed: bool) -> None:
        """The one place where a choice leaves; its booking goes with it, and what nobody else needs of its attempt."""
        attempt, request = choice.attempt, choice.request
        choice.ended = True
        attempt.choices.remove(choice)
        if not attempt.choices:
            self._drop_handover(attempt)
        tbt = tbt_of_gaps(choice.gaps)
        if tbt is not None:
            request.tbt_ns = max(request.tbt_ns or 0, int(tbt))
        self._end_booking(attempt, choice, now, completed=completed, tbt=tbt)
        if all(other.ended for other in request.choices):
            self._end(request, now)

    def _end(self, request: _Request, now: int) -> None:
        del self._requests[request.spec.number]
        request.choices = ()  # they know their request: no cycle is left behind
        self._linger(now)
        request.pass_stage(Stage.END, now)
        self._out.append(
            Ended(
                request.spec.number,
                tuple(request.timeline),
                request.prefill,
                request.decode,
                request.num_output,
                request.num_attempts,
                request.prediction,
                request.tbt_ns,
            )
        )

    def _end_booking(
        self, attempt: _Attempt, choice: _Choice, now: int, *, completed: bool, tbt: float | None = None
    ) -> None:
        num_output = len(choice.token_ids)
        first = choice.request.timeline[Stage.FIRST_TOKEN]
        itl = None
        if completed and first is not None and num_output > 1:
            itl = (now - first) // (num_output - 1)
        key, tbt_ns = attempt.key.of_choice(choice.index), int(tbt) if completed and tbt is not None else None
        ended = AttemptEnded(key, num_output, completed, itl, tbt_ns)
        self._out.append(Send(CONDUCTOR, ended))

    # ------------------------------------------------------------------ placement

    def _ask_placement(self, attempt: _Attempt) -> None:
        attempt.state = _State.PLACING
        spec, choice = attempt.request.spec, attempt.choices[0]
        self._out.append(
            Send(
                CONDUCTOR,
                PlaceRequest(
                    key=attempt.key,
                    num_tokens=choice.num_tokens,
                    block_keys=choice.keys,
                    max_tokens=spec.client_max_tokens,
                    num_generated=len(choice.token_ids),
                    tenant=spec.tenant,
                    priority=spec.priority,
                    slo=spec.slo,
                    exclude=attempt.exclude,
                    decode_only=attempt.handover is not None,
                    first=not attempt.request.num_output,
                    num_choices=attempt.num_choices,
                    weight=spec.weight,
                ),
            )
        )

    def _choice(self, key: AttemptKey) -> _Choice | None:
        """The choice of this key, if the key is that of its present attempt."""
        request = self._requests.get(key.request)
        if request is None or not 0 <= key.choice < len(request.choices):
            return None
        choice = request.choices[key.choice]
        return choice if not choice.ended and choice.attempt.key.attempt == key.attempt else None

    def _attempt(self, key: AttemptKey) -> _Attempt | None:
        """The attempt of this key, if it still runs for any choice."""
        request = self._requests.get(key.request)
        if request is None or not 0 <= key.choice < len(request.choices):
            return None
        attempt = request.choices[key.choice].attempt
        return attempt if attempt.key == key and attempt.choices else None

    def _placed(self, message: Placed, now: int) -> None:
        attempt = self._attempt(message.key)
        if attempt is None:
            # Cancelled, failed or overtaken while the answer was under way: the bookings must not stay.
            for index in range(message.key.choice, message.key.choice + message.num_choices):
                key = message.key.of_choice(index)
                if self._choice(key) is None:
                    self._out.append(Send(CONDUCTOR, AttemptEnded(key)))
            return
        if attempt.state is not _State.PLACING:
            return
        request = attempt.request
        if request.timeline[Stage.PLACED] is None:
            request.prediction = message.prediction
            request.pass_stage(Stage.PLACED, now)
        attempt.prefill, attempt.decode = message.prefill, message.decode
        request.prefill, request.decode = message.prefill or request.prefill, message.decode
        attempt.check_decode = message.check_decode and not attempt.joint and not request.num_output
        attempt.sent_at = now
        if attempt.handover is not None:
            self._submit_decode(attempt, attempt.handover.source, now)
        elif message.prefill:
            attempt.state = _State.PREFILLING
            hand_over = request.spec.max_tokens - len(attempt.choices[0].token_ids) > 1
            job = self._job(attempt, message.source, now, Role.PREFILL, hand_over=hand_over)
            self._submit(attempt, message.prefill, job, now)
            if hand_over and message.source is not None and message.source.num_tokens >= self._limits.part_tokens:
                self._load_ahead(attempt, message.source, 0)
        else:
            self._submit_in_place(attempt, message.source, now)

    def _rejected(self, message: Rejected, now: int) -> None:
        attempt = self._attempt(message.key)
        if attempt is None or attempt.state is not _State.PLACING:
            return
        request = attempt.request
        if message.reason == "too_long":
            self._fail(request, "too_long", message.detail, now)
        elif request.num_output:
            # The Conductor gives the same answer until then; the time that it asked for is not time waited for it.
            duration = max(message.retry_after_ns, self._limits.retry_ns)
            attempt.placing_since += duration
            self._pause(attempt, now, duration)
        else:
            reason = "unavailable" if message.reason == "no_instance" else "overloaded"
            self._fail(
                request,
                reason,
                message.detail,
                now,
                retry_after_ns=message.retry_after_ns,
                prediction=message.prediction,
            )

    def _job(
        self,
        attempt: _Attempt,
        source: KvSource | None,
        now: int,
        role: Role,
        *,
        hand_over: bool = False,
        allow_in_place: bool = False,
    ) -> Job:
        spec, choice = attempt.request.spec, attempt.choices[0]
        return Job(
            key=attempt.key,
            num_tokens=choice.num_tokens,
            num_prompt_tokens=spec.num_tokens,
            max_tokens=spec.max_tokens,
            block_keys=choice.keys,
            token_ids=spec.token_ids + tokens_to_bytes(choice.token_ids) if choice.token_ids else spec.token_ids,
            sampling=spec.sampling,
            source=source,
            hand_over=hand_over,
            priority=spec.priority,
            deadline_ns=max(1, attempt.request.deadline - now),
            allow_in_place=allow_in_place,
            num_choices=attempt.num_choices,
            role=role,
            tenant=spec.tenant,
            weight=spec.weight,
        )

    def _submit(self, attempt: _Attempt, instance: str, job: Job, now: int) -> None:
        if instance in self._open:
            self._out.append(Send(instance, Submit(job)))
        else:
            self._next_attempt(attempt, now, failed=instance)

    def _submit_decode(self, attempt: _Attempt, source: KvSource, now: int) -> None:
        attempt.state = _State.DECODING
        attempt.sent_at = now
        self._submit(attempt, attempt.decode, self._job(attempt, source, now, Role.DECODE), now)

    def _submit_in_place(self, attempt: _Attempt, source: KvSource | None, now: int) -> None:
        attempt.state = _State.DECODING
        job = self._job(attempt, source, now, Role.DECODE, allow_in_place=True)
        self._submit(attempt, attempt.decode, job, now)

    def _part(self, attempt: _Attempt, choice: _Choice, now: int) -> _Attempt:
        """The choice goes on from its first token under its own key, where the joint attempt was placed."""
        attempt.choices.remove(choice)
        own = _Attempt(attempt.key.of_choice(choice.index), [choice], now)
        own.prefill, own.decode = attempt.prefill, attempt.decode
        own.num_failures = attempt.num_failures
        return own

    # ------------------------------------------------------------------ progress

    def _step_tokens(self, message: StepTokens, now: int) -> None:
        for output in message.outputs:
            choice = self._choice(output.key)
            if choice is not None and choice.attempt.instance == message.instance:
                self._tokens(choice, output, now)

    def _tokens(self, choice: _Choice, output: TokenOutput, now: int) -> None:
        attempt, request = choice.attempt, choice.request
        skip = choice.num_tokens - output.position
        if skip < 0:
            self._next_attempt(attempt, now)
            return
        tokens = output.token_ids[skip:]
        if not tokens:
            return
        if attempt.check_decode and attempt.state is not _State.DECODING and output.finish is None:
            self._first_of_attempt(attempt, output, now)
            request.cached_tokens = output.cached_tokens
            return
        if not request.num_output:
            request.pass_stage(Stage.FIRST_TOKEN, now)
        if attempt.state is not _State.DECODING or not attempt.prefill:
            self._first_of_attempt(attempt, output, now)
        if attempt.state is _State.DECODING:
            if output.compute_ns is not None:
                request.pass_stage(Stage.DECODE_START, now - output.compute_ns)
            # The partial block goes with the leases, so the hand-over as a whole cannot be read a second time.
            self._drop_handover(attempt)
        attempt.num_failures = 0
        request.num_output += len(tokens)
        choice.add_tokens(tokens, now)
        cached = output.cached_tokens if request.cached_tokens is None else request.cached_tokens
        route = None
        if request.cached_told:
            cached = None
        else:
            route = Route(request.prefill, request.decode, request.prediction.ttft_ns)
        request.cached_told = True
        logprobs = output.logprobs[skip:]
        self._out.append(Output(request.spec.number, tokens, output.finish, logprobs, cached, choice.index, route))
        if output.finish is not None:
            self._end_choice(choice, now, completed=True)
        elif attempt.joint and attempt.state is _State.DECODING:
            # Prefilled in place: there is no hand-over to wait for.
            self._submit_in_place(self._part(attempt, choice, now), None, now)

    def _first_of_attempt(self, attempt: _Attempt, output: TokenOutput, now: int) -> None:
        """Bookkeeping of the first token that a prefill gave."""
        request = attempt.request
        if output.compute_ns is not None:
            request.pass_stage(Stage.PREFILL_START, now - output.compute_ns)
            placed = request.timeline[Stage.PLACED]
            ttft = now - placed if placed is not None and not request.num_output else None
            self._out.append(Send(CONDUCTOR, PrefillDone(attempt.key, ttft)))
        if attempt.state is _State.PREFILLING:
            attempt.state = _State.HANDING_OVER

    def _kv_part_ready(self, message: KvPartReady, now: int) -> None:
        attempt = self._attempt(message.key)
        if attempt is not None and attempt.prefill == message.instance:
            self._load_ahead(attempt, message.source, message.start)

    def _load_ahead(self, attempt: _Attempt, source: KvSource, start: int) -> None:
        """Decode can load what is there already, be it reused or just computed. Where it is not sure whether it will decode at
        all, nothing is sent."""
        prefilling = attempt.state is _State.PREFILLING and bool(attempt.choices)
        if prefilling and not attempt.check_decode and attempt.decode in self._open:
            self._out.append(Send(attempt.decode, LoadAhead(start, source, attempt.request.spec.tenant)))

    def _kv_ready(self, message: KvReady, now: int) -> None:
        attempt = self._attempt(message.key)
        waiting = attempt is not None and attempt.state in (_State.PREFILLING, _State.HANDING_OVER)
        if attempt is None or not waiting or attempt.prefill != message.instance:
            if attempt is None and not self._needs(message.key):
                self._out.append(Send(message.instance, HandoverDone((message.key,))))
            return
        if attempt.state is _State.PREFILLING:
            # The first tokens were lost on their way; decode draws them again.
            self._out.append(Send(CONDUCTOR, PrefillDone(message.key)))
        attempt.request.pass_stage(Stage.KV_READY, now)
        handover = _Handover(message, len(attempt.choices))
        if attempt.check_decode:
            self._ask_for_decode(attempt, handover, now)
            return
        parts = [self._part(attempt, choice, now) for choice in list(attempt.choices)] if attempt.joint else [attempt]
        for part in parts:
            part.handover = handover
        for part in parts:
            if part.choices:  # else one before it failed for the last time, and the request with it
                self._submit_decode(part, message.source, now)

    def _ask_for_decode(self, attempt: _Attempt, handover: _Handover, now: int) -> None:
        """Under a new key, as the Conductor answers a known one as before."""
        [choice] = attempt.choices
        attempt.choices = []
        self._end_booking(attempt, choice, now, completed=False)
        key = msgspec.structs.replace(attempt.key, attempt=attempt.key.attempt + 1)
        following = _Attempt(key, [choice], now)
        following.handover = handover
        following.num_failures = attempt.num_failures
        self._set_timer(attempt.request, now + self._limits.place_timeout_ns)
        self._ask_placement(following)

    def _needs(self, key: AttemptKey) -> bool:
        """Whether a choice still needs the hand-over of that key."""
        request = self._requests.get(key.request)
        attempts = request.attempts if request is not None else ()
        return any(attempt.handover is not None and attempt.handover.key == key for attempt in attempts)

    # ------------------------------------------------------------------ failures

    def _attempt_failed(self, message: AttemptFailed, now: int) -> None:
        attempt = self._attempt(message.key)
        if attempt is None or attempt.instance != message.instance:
            return
        if message.reason in ("too_long", "grammar"):
            self._fail(attempt.request, message.reason, message.detail, now)
            return
        if message.reason in ("load_failed", "unknown"):
            self._drop_handover(attempt)
        # An instance that never got the attempt is as good as any other for the next one.
        failed = "" if message.reason == "unknown" else message.instance
        self._next_attempt(attempt, now, failed=failed)

    def _next_attempt(self, attempt: _Attempt, now: int, *, failed: str = "") -> None:
        """Give the attempt up and continue from the tokens so far, elsewhere than at `failed` if possible: jointly again as
        long as there are none."""
        self.num_retries += 1
        num_failures = attempt.num_failures + 1
        if num_failures >= self._limits.max_attempts:
            detail = f"gave up after {num_failures} attempts without a token"
            self._fail(attempt.request, "error", detail, now)
            return
        self._abort_attempt(attempt)
        choices, attempt.choices = attempt.choices, []
        for choice in choices:
            self._end_booking(attempt, choice, now, completed=False)
        joint = not any(choice.token_ids for choice in choices)
        for group in [choices] if joint else [[choice] for choice in choices]:
            first = group[0]
            key = AttemptKey(self.name, attempt.key.request, first.index, attempt.key.attempt + 1)
            following = _Attempt(key, group, now)
            following.handover = attempt.handover
            following.exclude = (failed,) if failed else ()
            following.num_failures = num_failures
            if first.token_ids:
                first.keys = self._extend_keys(first.request.spec, first.token_ids)
            first.request.num_attempts += 1
            self._begin(following, now)

    def _begin(self, attempt: _Attempt, now: int) -> None:
        """A first failure is most often that of an instance; when there are more, time may help."""
        if attempt.num_failures == 1:
            self._set_timer(attempt.request, now + self._limits.place_timeout_ns)
            self._ask_placement(attempt)
        else:
            self._pause(attempt, now, self._limits.retry_ns * attempt.num_failures)

    def _pause(self, attempt: _Attempt, now: int, duration: int) -> None:
        attempt.state = _State.PAUSED
        attempt.retry_at = now + duration
        self._set_timer(attempt.request, attempt.retry_at)
        self._set_timer(attempt.request, attempt.placing_since + self._limits.place_timeout_ns)

    def _abort_attempt(self, attempt: _Attempt) -> None:
        instance = attempt.instance
        if instance and instance in self._open:
            self._out.append(Send(instance, Abort((attempt.key,))))

    def _drop_handover(self, attempt: _Attempt) -> None:
        """The prefill instance hears of it when nobody needs the KV any more."""
        handover = attempt.handover
        if handover is not None:
            attempt.handover = None
            handover.num_users -= 1
            if not handover.num_users:
                self._out.append(Send(handover.instance, HandoverDone((handover.key,))))

    # ------------------------------------------------------------------ peers

    def _members_changed(self, message: Members, now: int) -> None:
        """An instance that the Conductor does not know is given up only when its connection is gone too: a Conductor that
        was just restarted knows nobody, and running streams must not suffer for it."""
        self._members = {info.name: info for info in message.instances}
        for name, info in self._members.items():
            if self._dialled.get(name) != info.address:
                self._dialled[name] = info.address
                self._out.append(Connect(info))
        for name in list(self._dialled):
            self._drop_if_unknown(name)

    def _drop_if_unknown(self, name: str) -> None:
        if name in self._dialled and name not in self._members and name not in self._open:
            del self._dialled[name]
            self._out.append(Disconnect(name))

    def _peer_opened(self, event: PeerOpened, now: int) -> None:
        self._open[event.peer] = None
        self._linger(now)
        if event.peer == CONDUCTOR:
            self._send_bookings()
            for request in self._requests.values():
                for attempt in request.attempts:
                    if attempt.state is _State.PLACING:
                        self._ask_placement(attempt)

    def _peer_gone(self, event: PeerGone, now: int) -> None:
        if event.peer not in self._open:
            return
        del self._open[event.peer]
        self._drop_if_unknown(event.peer)
        for request in list(self._requests.values()):
            for attempt in request.attempts:
                # Giving one attempt up may have ended the request.
                if attempt.choices and attempt.instance == event.peer:
                    self._next_attempt(attempt, now, failed=event.peer)

    # ------------------------------------------------------------------ time

    def _set_timer(self, request: _Request, time: int) -> None:
        heapq.heappush(self._timers, (time, request.spec.number))

    def _run_timers(self, now: int) -> None:
        while self._timers and self._timers[0][0] <= now:
            request = self._requests.get(heapq.heappop(self._timers)[1])
            if request is not None:
                self._time_passed(request, now)
        if self._repair_at is not None and self._repair_at <= now:
            self._repair(now)

    def _time_passed(self, request: _Request, now: int) -> None:
        if now >= request.deadline:
            self._fail(request, "deadline", f"not done within {request.spec.timeout_ns / NANOS_PER_S:g} s", now)
            return
        for attempt in request.attempts:
            waiting = attempt.state in (_State.PLACING, _State.PAUSED)
            if waiting and now >= attempt.placing_since + self._limits.place_timeout_ns:
                self._fail(request, "unavailable", "no placement in time", now, retry_after_ns=NANOS_PER_S)
                return
            if attempt.state is _State.PAUSED and now >= attempt.retry_at:
                self._ask_placement(attempt)

    def _linger(self, now: int) -> None:
        self._linger_until = now + self._limits.linger_ns
        if self._repair_at is None:
            self._repair_at = now + self._limits.repair_ns

    def _repair(self, now: int) -> None:
        self._repair_at = now + self._limits.repair_ns if self._requests or now < self._linger_until else None
        self._send_bookings()
        keys: dict[str, list[AttemptKey]] = {name: [] for name in self._open if name != CONDUCTOR}
        held: dict[str, dict[AttemptKey, None]] = {}
        attempts = [attempt for request in self._requests.values() for attempt in request.attempts]
        for attempt in attempts:
            if attempt.handover is not None:
                held.setdefault(attempt.handover.instance, {})[attempt.handover.key] = None
            # What was sent a moment ago may not have arrived yet, so it is not asked for.
            if attempt.instance in keys and attempt.sent_at <= now - self._limits.arrive_ns:
                keys[attempt.instance].append(attempt.key)
        for instance, wanted in keys.items():
            message = LiveAttempts(self.name, tuple(wanted), tuple(held.get(instance, ())))
            self._out.append(Send(instance, message))
        # A lost question or answer about a placement is asked again; the Conductor answers a known key as before.
        for attempt in attempts:
            if attempt.state is _State.PLACING and attempt.placing_since <= now - self._limits.arrive_ns:
                self._ask_placement(attempt)

    def _send_bookings(self) -> None:
        bookings = tuple(
            (
                attempt.key.of_choice(choice.index),
                attempt.prefill if attempt.state is _State.PREFILLING and choice is attempt.choices[0] else "",
                attempt.decode,
                choice.num_tokens,
            )
            for request in self._requests.values()
            for attempt in request.attempts
            if attempt.instance
            for choice in attempt.choices
        )
        self._out.append(Send(CONDUCTOR, BookingSnapshot(self.name, bookings)))
