"""The life of requests, as their frontend sees it: placement, prefill, hand-over, decode, and all that goes wrong between.

    placing --Placed--> prefilling --first token--> handing over --KvReady--> decoding --finish--> ended
       ^                    |                            |                       |
       +---- next attempt --+----------------------------+-----------------------+

A dispatcher runs inside each frontend, so streams go on while the Conductor is away. It owns the tokens of its requests: an
attempt that fails is followed by another one that continues from prompt plus tokens so far, on the KV that still exists.
Outputs of old attempts and repeated positions are dropped; a gap in positions counts as a failed attempt.

Lost messages are repaired by two periodic ones: `LiveAttempts` to the instances (which answer that they do not know an
attempt) and `BookingSnapshot` to the Conductor.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.keys import block_keys
from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AnyMessage,
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
    NANOS_PER_MS,
    NANOS_PER_S,
    AttemptKey,
    FinishReason,
    InstanceInfo,
    Job,
    KvSource,
    SamplingParams,
    Slo,
    Stage,
    TokenLogprobs,
    tokens_to_bytes,
)

# ---------------------------------------------------------------- what comes in


class RequestSpec(msgspec.Struct, frozen=True):
    """A valid request. `number` is unique at this frontend. client_max_tokens: what the client asked for, if anything;
    max_tokens: the limit that holds."""

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


class Start(msgspec.Struct, frozen=True, tag=True):
    spec: RequestSpec


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The client is gone or has enough. No output follows."""

    number: int


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


class Output(msgspec.Struct, frozen=True):
    """Tokens for the client, each position once. cached_tokens comes with the first."""

    number: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None


class Failure(msgspec.Struct, frozen=True):
    """The request ended without its tokens. reason: overloaded, too_long, unavailable, deadline, error."""

    number: int
    reason: str
    detail: str
    retry_after_ns: int = 0
    prediction: Prediction = Prediction()


class Ended(msgspec.Struct, frozen=True):
    """Last word on a request, after its last Output or Failure or its Cancel. timeline[stage]: time of each stage, or None."""

    number: int
    timeline: tuple[int | None, ...]
    prefill: str
    decode: str
    num_output: int
    num_attempts: int
    prediction: Prediction


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
    max_attempts: int = 16
    retry_ns: int = 100 * NANOS_PER_MS
    """Pause before the next attempt after a failure, times the number of attempts."""
    repair_ns: int = NANOS_PER_S
    """Period of LiveAttempts and BookingSnapshot."""
    linger_ns: int = 10 * NANOS_PER_S
    """How long these go on after a request ended or a peer was met: what they must find is not dropped before it has a
    certain age there, and they may be lost too."""


# ---------------------------------------------------------------- one request


class _State(enum.IntEnum):
    PAUSED = 0
    """Waiting for `retry_at` before it asks for a placement."""
    PLACING = 1
    PREFILLING = 2
    HANDING_OVER = 3
    DECODING = 4


class _Request:
    __slots__ = (
        "attempt", "cached_told", "deadline", "decode", "exclude", "first_attempt", "held", "keys", "num_generated",
        "placing_since", "prediction", "prefill", "retry_at", "sent_at", "source", "spec", "state", "timeline",
        "token_ids",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec, now: int) -> None:
        self.spec = spec
        self.state = _State.PLACING
        self.attempt = 0
        self.first_attempt = True
        self.token_ids: list[int] = []
        self.num_generated = 0
        self.keys = spec.block_keys
        self.prefill = self.decode = ""
        self.source: KvSource | None = None
        self.held: tuple[str, AttemptKey] | None = None
        """The prefill instance that still holds the hand-over's leases, and under which key."""
        self.exclude: tuple[str, ...] = ()
        self.prediction = Prediction()
        self.cached_told = False
        self.deadline = now + spec.timeout_ns
        self.placing_since = now
        self.retry_at = 0
        self.sent_at = now
        self.timeline: list[int | None] = [None] * len(Stage)
        self.timeline[Stage.RECEIVED] = now

    @property
    def num_tokens(self) -> int:
        return self.spec.num_tokens + self.num_generated

    @property
    def instance(self) -> str:
        """Where the attempt runs now, or ""."""
        if self.state in (_State.PREFILLING, _State.HANDING_OVER):
            return self.prefill
        return self.decode if self.state is _State.DECODING else ""

    def pass_stage(self, stage: Stage, time: int) -> None:
        if self.timeline[stage] is None:
            self.timeline[stage] = time


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
        return min((t for t in (first, self._repair_at) if t is not None), default=None)

    @property
    def num_running(self) -> int:
        return len(self._requests)

    @property
    def members(self) -> tuple[InstanceInfo, ...]:
        return tuple(self._members.values())

    def check_integrity(self) -> None:
        """Raises AssertionError: every request waits for something that has a deadline."""
        timed = {number for _, number in self._timers}
        assert all(number in timed for number in self._requests), "a request without a timer"

    # ------------------------------------------------------------------ requests come and go

    def _start(self, event: Start, now: int) -> None:
        spec = event.spec
        if len(self._requests) >= self._limits.max_requests:
            detail = f"{len(self._requests)} requests are in flight at this frontend"
            self._out.append(Failure(spec.number, "overloaded", detail, NANOS_PER_S))
            self._out.append(Ended(spec.number, (now,) + (None,) * 5 + (now,), "", "", 0, 0, Prediction()))
            return
        request = self._requests[spec.number] = _Request(spec, now)
        self._set_timer(request, request.deadline)
        self._set_timer(request, now + self._limits.place_timeout_ns)
        self._linger(now)
        self._ask_placement(request)

    def _cancel(self, event: Cancel, now: int) -> None:
        request = self._requests.get(event.number)
        if request is not None:
            self._abort_attempt(request)
            self._end(request, now, completed=False)

    def _fail(self, request: _Request, reason: str, detail: str, now: int, **more: Any) -> None:
        self._abort_attempt(request)
        self._out.append(Failure(request.spec.number, reason, detail, **more))
        self._end(request, now, completed=False)

    def _end(self, request: _Request, now: int, *, completed: bool) -> None:
        """The one place where a request leaves; its booking and its hand-over go with it."""
        del self._requests[request.spec.number]
        self._linger(now)
        request.pass_stage(Stage.END, now)
        self._release_handover(request)
        self._end_booking(request, completed)
        self._out.append(
            Ended(
                request.spec.number,
                tuple(request.timeline),
                request.prefill,
                request.decode,
                request.num_generated,
                request.attempt + 1,
                request.prediction,
            )
        )

    def _end_booking(self, request: _Request, completed: bool) -> None:
        first = request.timeline[Stage.FIRST_TOKEN]
        end = request.timeline[Stage.END]
        itl = None
        if completed and first is not None and end is not None and request.num_generated > 1:
            itl = (end - first) // (request.num_generated - 1)
        ended = AttemptEnded(self._key(request), request.num_generated, completed, itl)
        self._out.append(Send(CONDUCTOR, ended))

    # ------------------------------------------------------------------ placement

    def _key(self, request: _Request) -> AttemptKey:
        return AttemptKey(self.name, request.spec.number, 0, request.attempt)

    def _ask_placement(self, request: _Request) -> None:
        request.state = _State.PLACING
        spec = request.spec
        self._out.append(
            Send(
                CONDUCTOR,
                PlaceRequest(
                    key=self._key(request),
                    num_tokens=request.num_tokens,
                    block_keys=request.keys,
                    max_tokens=spec.client_max_tokens,
                    num_generated=request.num_generated,
                    tenant=spec.tenant,
                    priority=spec.priority,
                    slo=spec.slo,
                    exclude=request.exclude,
                    decode_only=request.source is not None,
                    first=request.num_generated == 0,
                ),
            )
        )

    def _current(self, key: AttemptKey) -> _Request | None:
        """The request of this key, if the key is that of its present attempt."""
        request = self._requests.get(key.request)
        return request if request is not None and request.attempt == key.attempt else None

    def _placed(self, message: Placed, now: int) -> None:
        request = self._current(message.key)
        if request is None:
            # Cancelled, failed or overtaken while the answer was under way: the booking must not stay.
            self._out.append(Send(CONDUCTOR, AttemptEnded(message.key)))
            return
        if request.state is not _State.PLACING:
            return
        request.pass_stage(Stage.PLACED, now)
        if request.first_attempt:
            request.prediction = message.prediction
        request.first_attempt = False
        request.prefill, request.decode = message.prefill, message.decode
        request.sent_at = now
        if request.source is not None:
            self._submit_decode(request, now)
        elif message.prefill:
            request.state = _State.PREFILLING
            hand_over = request.spec.max_tokens - request.num_generated > 1
            self._submit(request, message.prefill, self._job(request, message.source, now, hand_over), now)
        else:
            request.state = _State.DECODING
            job = msgspec.structs.replace(self._job(request, message.source, now, False), allow_in_place=True)
            self._submit(request, message.decode, job, now)

    def _rejected(self, message: Rejected, now: int) -> None:
        request = self._current(message.key)
        if request is None or request.state is not _State.PLACING:
            return
        if message.reason == "too_long":
            self._fail(request, "too_long", message.detail, now)
        elif request.num_generated:
            self._pause(request, now)
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

    def _job(self, request: _Request, source: KvSource | None, now: int, hand_over: bool) -> Job:
        spec = request.spec
        return Job(
            key=self._key(request),
            num_tokens=request.num_tokens,
            num_prompt_tokens=spec.num_tokens,
            max_tokens=spec.max_tokens,
            block_keys=request.keys,
            token_ids=spec.token_ids + tokens_to_bytes(request.token_ids) if request.token_ids else spec.token_ids,
            sampling=spec.sampling,
            source=source,
            hand_over=hand_over,
            priority=spec.priority,
            deadline_ns=max(1, request.deadline - now),
        )

    def _submit(self, request: _Request, instance: str, job: Job, now: int) -> None:
        if instance in self._open:
            self._out.append(Send(instance, Submit(job)))
        else:
            self._next_attempt(request, now, failed=instance)

    def _submit_decode(self, request: _Request, now: int) -> None:
        request.state = _State.DECODING
        request.sent_at = now
        self._submit(request, request.decode, self._job(request, request.source, now, False), now)

    # ------------------------------------------------------------------ progress

    def _step_tokens(self, message: StepTokens, now: int) -> None:
        for output in message.outputs:
            request = self._current(output.key)
            if request is not None and request.instance == message.instance:
                self._tokens(request, output, now)

    def _tokens(self, request: _Request, output: TokenOutput, now: int) -> None:
        skip = request.num_tokens - output.position
        if skip < 0:
            self._next_attempt(request, now)
            return
        tokens = output.token_ids[skip:]
        if not tokens:
            return
        request.pass_stage(Stage.FIRST_TOKEN, now)
        if request.state is not _State.DECODING or not request.prefill:
            self._first_of_attempt(request, output, now)
        if request.state is _State.DECODING:
            if output.compute_ns is not None:
                request.pass_stage(Stage.DECODE_START, now - output.compute_ns)
            # The partial block goes with the leases, so the hand-over as a whole cannot be read a second time.
            self._drop_source(request)
        request.num_generated += len(tokens)
        request.token_ids.extend(tokens)
        cached = None if request.cached_told else output.cached_tokens
        request.cached_told = True
        self._out.append(Output(request.spec.number, tokens, output.finish, output.logprobs[skip:], cached))
        if output.finish is not None:
            self._end(request, now, completed=True)

    def _first_of_attempt(self, request: _Request, output: TokenOutput, now: int) -> None:
        """Bookkeeping of the first token that a prefill gave."""
        if output.compute_ns is not None:
            request.pass_stage(Stage.PREFILL_START, now - output.compute_ns)
            placed = request.timeline[Stage.PLACED]
            ttft = now - placed if placed is not None and not request.num_generated else None
            self._out.append(Send(CONDUCTOR, PrefillDone(self._key(request), ttft)))
        if request.state is _State.PREFILLING:
            request.state = _State.HANDING_OVER

    def _kv_ready(self, message: KvReady, now: int) -> None:
        request = self._current(message.key)
        waiting = request is not None and request.state in (_State.PREFILLING, _State.HANDING_OVER)
        if request is None or not waiting or request.prefill != message.instance:
            if request is None:
                self._out.append(Send(message.instance, HandoverDone((message.key,))))
            return
        if request.state is _State.PREFILLING:
            # The first token was lost on its way; decode draws it again.
            self._out.append(Send(CONDUCTOR, PrefillDone(message.key)))
        request.pass_stage(Stage.KV_READY, now)
        request.source = message.source
        request.held = (message.instance, message.key)
        self._submit_decode(request, now)

    # ------------------------------------------------------------------ failures

    def _attempt_failed(self, message: AttemptFailed, now: int) -> None:
        request = self._current(message.key)
        if request is None or request.instance != message.instance:
            return
        if message.reason == "too_long":
            self._fail(request, "too_long", message.detail, now)
            return
        if message.reason in ("load_failed", "unknown"):
            self._drop_source(request)
        # An instance that never got the attempt is as good as any other for the next one.
        failed = "" if message.reason == "unknown" else message.instance
        self._next_attempt(request, now, failed=failed)

    def _next_attempt(self, request: _Request, now: int, *, failed: str = "") -> None:
        """Give the present attempt up and continue from the tokens so far, elsewhere than at `failed` if possible."""
        self.num_retries += 1
        self._abort_attempt(request)
        if request.attempt + 1 >= self._limits.max_attempts:
            self._fail(request, "error", f"gave up after {request.attempt + 1} attempts", now)
            return
        self._end_booking(request, completed=False)
        request.attempt += 1
        request.exclude = (failed,) if failed else ()
        request.placing_since = now
        if request.num_generated:
            request.keys = self._extend_keys(request.spec, request.token_ids)
        self._set_timer(request, now + self._limits.place_timeout_ns)
        if request.attempt == 1:
            self._ask_placement(request)
        else:
            self._pause(request, now)

    def _pause(self, request: _Request, now: int) -> None:
        request.state = _State.PAUSED
        request.retry_at = now + self._limits.retry_ns * request.attempt
        self._set_timer(request, request.retry_at)

    def _abort_attempt(self, request: _Request) -> None:
        instance = request.instance
        if instance and instance in self._open:
            self._out.append(Send(instance, Abort((self._key(request),))))

    def _drop_source(self, request: _Request) -> None:
        request.source = None
        self._release_handover(request)

    def _release_handover(self, request: _Request) -> None:
        if request.held is not None:
            instance, key = request.held
            request.held = None
            self._out.append(Send(instance, HandoverDone((key,))))

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
                if request.state is _State.PLACING:
                    self._ask_placement(request)

    def _peer_gone(self, event: PeerGone, now: int) -> None:
        if event.peer not in self._open:
            return
        del self._open[event.peer]
        self._drop_if_unknown(event.peer)
        for request in list(self._requests.values()):
            if request.instance == event.peer:
                self._next_attempt(request, now, failed=event.peer)

    # ------------------------------------------------------------------ time

    def _set_timer(self, request: _Request, time: int) -> None:
        heapq.heappush(self._timers, (time, request.spec.number))

    def _run_timers(self, now: int) -> None:
        while self._timers and self._timers[0][0] <= now:
            request = self._requests.get(heapq.heappop(self._timers)[1])
            if request is None:
                continue
            waiting = request.state in (_State.PLACING, _State.PAUSED)
            if now >= request.deadline:
                self._fail(request, "deadline", f"not done within {request.spec.timeout_ns / NANOS_PER_S:g} s", now)
            elif waiting and now >= request.placing_since + self._limits.place_timeout_ns:
                self._fail(request, "unavailable", "no placement in time", now, retry_after_ns=NANOS_PER_S)
            elif request.state is _State.PAUSED and now >= request.retry_at:
                self._ask_placement(request)
        if self._repair_at is not None and self._repair_at <= now:
            self._repair(now)

    def _linger(self, now: int) -> None:
        self._linger_until = now + self._limits.linger_ns
        if self._repair_at is None:
            self._repair_at = now + self._limits.repair_ns

    def _repair(self, now: int) -> None:
        self._repair_at = now + self._limits.repair_ns if self._requests or now < self._linger_until else None
        self._send_bookings()
        keys: dict[str, list[AttemptKey]] = {name: [] for name in self._open if name != CONDUCTOR}
        held: dict[str, list[AttemptKey]] = {}
        for request in self._requests.values():
            if request.held is not None:
                held.setdefault(request.held[0], []).append(request.held[1])
            # What was sent a moment ago may not have arrived yet, so it is not asked for.
            if request.instance in keys and request.sent_at <= now - self._limits.repair_ns:
                keys[request.instance].append(self._key(request))
        for instance, wanted in keys.items():
            message = LiveAttempts(self.name, tuple(wanted), tuple(held.get(instance, ())))
            self._out.append(Send(instance, message))
        # A lost question or answer about a placement is asked again; the Conductor answers a known key as before.
        for request in self._requests.values():
            if request.state is _State.PLACING and request.placing_since <= now - self._limits.repair_ns:
                self._ask_placement(request)

    def _send_bookings(self) -> None:
        bookings = tuple(
            (
                self._key(r),
                r.prefill if r.state is _State.PREFILLING else "",
                r.decode,
                r.num_tokens,
            )
            for r in self._requests.values()
            if r.instance
        )
        self._out.append(Send(CONDUCTOR, BookingSnapshot(self.name, bookings)))
