"""The Conductor's core: one event in, commands out. It owns all the state of this room and decides nothing itself; it
asks.

A PlaceRequest is answered once per copy that arrives, and always the same way; only a rejection may be followed by
another answer, if the same attempt asks again when its Retry-After has passed. On its way:

    known already? -> same answer     fits nowhere? -> too_long     nobody ready? -> wait, then no_instance
    policy chooses -> admission judges -> booked, predicted into the index, answered, recorded

Every event is safe to repeat. Attempt keys must be unique over all lives of a frontend's name (request numbers are
drawn).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.messages import (
    AnyMessage,
    AttemptEnded,
    BookingSnapshot,
    CacheDelta,
    CacheSnapshot,
    LoadReport,
    Message,
    Placed,
    PlaceRequest,
    Prediction,
    PrefillDone,
    Register,
    RegisterNode,
    Rejected,
    Send,
    StateChange,
)
from mooncake.core.types import AttemptKey, KvSource
from mooncake.scheduler.admission import RETRY_NS_MIN, Accuracy, Admission, make_admission
from mooncake.scheduler.bookings import Books
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.costs import sibling_pages
from mooncake.scheduler.feeds import CacheFeeds
from mooncake.scheduler.membership import Membership
from mooncake.scheduler.placement import Ask, Decision, make_policy
from mooncake.scheduler.prefix_index import PrefixIndex
from mooncake.scheduler.records import Record, Records
from mooncake.scheduler.view import Lengths, View

NO_INSTANCE = "no_instance"
TOO_LONG = "too_long"
_NO_PREDICTION = Prediction()


class Received(msgspec.Struct, frozen=True, tag=True):
    """A message arrived over the peer's connection."""

    sender: str
    message: AnyMessage


class PeerGone(msgspec.Struct, frozen=True, tag=True):
    """The connection of this peer ended, and there is no newer one of the same name."""

    name: str


class Tick(msgspec.Struct, frozen=True, tag=True):
    """The deadline passed."""


class _Waiting(msgspec.Struct):
    sender: str
    request: PlaceRequest
    deadline_ns: int


class _Answer(msgspec.Struct):
    message: Placed | Rejected
    until_ns: int | None
    """When a rejection no longer holds; None for a placement."""


class ConductorCore:
    """Sans-IO: `handle(event, now) -> commands`, `deadline()`."""

    def __init__(self, config: ConductorConfig, rng: random.Random) -> None:
        self.config = config
        self.view = View()
        self.books = Books(self.view, config.settle_ns)
        self.index = PrefixIndex(config.index_blocks_max)
        self.feeds = CacheFeeds(self.index, config.snapshot_retry_ns)
        self.accuracy = Accuracy(config.calibration)
        self.membership = Membership(self.view, self.books, self.index, self.feeds, self.accuracy)
        self.records = Records(config.num_records_max)
        self.lengths = Lengths()
        self.counts: Counter[str] = Counter()
        """placed, waited, soft_REASON, rejected_REASON: for metrics."""
        self._rng = rng
        self._now = 0
        self._policy = make_policy(config, self.view)
        self._admission: Admission = make_admission(config.admission, self.accuracy)
        self._frontends: dict[str, None] = {}
        self._lost: dict[str, int] = {}
        """Peers whose connection ended, and when they count as gone; earliest first, as the grace is the same for
        all."""
        self._waiting: dict[AttemptKey, _Waiting] = {}
        """Earliest deadline first, likewise."""
        self._answers: dict[AttemptKey, _Answer] = {}
        self._on_message: dict[type, Callable[[str, Any, int], list[Send]]] = {
            PlaceRequest: self._on_place_request,
            PrefillDone: self._on_prefill_done,
            AttemptEnded: self._on_attempt_ended,
            BookingSnapshot: self._on_booking_snapshot,
            LoadReport: self._on_load_report,
            CacheDelta: self._on_cache_delta,
            CacheSnapshot: self._on_cache_snapshot,
            StateChange: self._on_state_change,
            Register: self._on_register,
            RegisterNode: self._on_register_node,
        }

    # ------------------------------------------------------------ events

    def handle(self, event: Received | PeerGone | Tick, now: int) -> list[Send]:
        self._now = now
        commands = self._pass_time(now)
        if isinstance(event, Received):
            handler = self._on_message.get(type(event.message))
            if handler is not None:
                commands += handler(event.sender, event.message, now)
        elif isinstance(event, PeerGone):
            self._on_peer_gone(event.name, now)
        return commands

    def deadline(self) -> int | None:
        if self.index.sweeping:
            return self._now
        first = [self.index.deadline(), self.feeds.deadline()]
        if self._lost:
            first.append(next(iter(self._lost.values())))
        if self._waiting:
            first.append(next(iter(self._waiting.values())).deadline_ns)
        return min((at for at in first if at is not None), default=None)

    def _pass_time(self, now: int) -> list[Send]:
        due = self.deadline()
        if due is None or due > now:
            return []
        self.index.sweep()
        self.index.expire(now)
        commands = self.feeds.retry(now)
        for name in [name for name, gone_at in self._lost.items() if gone_at <= now]:
            del self._lost[name]
            commands += self._give_up_peer(name, now)
        for key in [key for key, waiting in self._waiting.items() if waiting.deadline_ns <= now]:
            waiting = self._waiting.pop(key)
            detail = f"no instance became ready within {self.config.wait_ns / 1e9:.0f} s"
            commands.append(self._reject(waiting.sender, key, NO_INSTANCE, detail))
        return commands

    # ------------------------------------------------------------ placing

    def _on_place_request(self, sender: str, request: PlaceRequest, now: int) -> list[Send]:
        commands = self._greet(sender)
        if request.key in self._waiting:
            return commands
        booking = self.books.bookings.get(request.key)
        answer = booking.answer if booking is not None else self._past_answer(request.key, now)
        if answer is not None:
            return [*commands, Send(sender, answer)]
        for key in _keys(request):  # rebuilt from a snapshot, their answer is unknown: place them afresh
            self.books.release(key, now)
        return commands + self._place(sender, request, now)

    def _place(self, sender: str, request: PlaceRequest, now: int) -> list[Send]:
        answer = self._try_place(sender, request, now)
        if answer is not None:
            return [answer]
        if len(self._waiting) >= self.config.num_waiting_max:
            detail = f"no instance is ready and {len(self._waiting)} requests wait already"
            return [self._reject(sender, request.key, NO_INSTANCE, detail)]
        self._waiting[request.key] = _Waiting(sender, request, now + self.config.wait_ns)
        self.counts["waited"] += 1
        return []

    def _try_place(self, sender: str, request: PlaceRequest, now: int) -> Send | None:
        """The answer, or None if it must wait: no ready instances can take it, but others may."""
        num_output = self.lengths.expect(request.max_tokens, request.num_generated)
        # At least one token is left to compute: the next one is drawn from its logits.
        keys = () if request.decode_only else request.block_keys[: (request.num_tokens - 1) // self.config.block_tokens]
        ask = Ask(
            request.num_tokens,
            num_output,
            self.index.match(keys),
            request.exclude,
            request.decode_only,
            request.num_choices,
        )
        decision = self._policy.choose(ask, now, self._rng)
        if decision is None:
            return self._reject_too_long(sender, request)
        names = self.view.names
        prefill = names[decision.prefill] if decision.prefill is not None else ""
        verdict = self._admission.judge(request.slo, decision.prediction, prefill, names[decision.decode])
        if verdict.enforced and not request.first:
            verdict = msgspec.structs.replace(verdict, enforced=False)
        policy, num_tokens, block_tokens = self._policy.name, request.num_tokens, self.config.block_tokens
        self.records.add(
            Record(request.key, now, policy, num_tokens, request.num_choices, block_tokens, names, decision, verdict)
        )
        if verdict.enforced:
            retry_ns, prediction = verdict.retry_after_ns, decision.prediction
            return self._reject(sender, request.key, verdict.reason, verdict.detail, retry_ns, prediction)
        if verdict.reason:
            self.counts[f"soft_{verdict.reason}"] += 1
        return Send(sender, self._book(request, num_output, decision, now))

    def _book(self, request: PlaceRequest, num_output: int, decision: Decision, now: int) -> Placed:
        prefill, decode, prediction = decision.prefill, decision.decode, decision.prediction
        if prefill is not None and self.view.columns.node[prefill]:
            expires_ns = now + prediction.ttft_ns + self.config.prediction_grace_ns
            self.index.predict(prefill, request.block_keys, expires_ns)
        names = self.view.names
        apart = prefill is not None and prefill != decode
        answer = Placed(
            key=request.key,
            prefill=names[prefill] if prefill is not None and apart else "",
            decode=names[decode],
            source=self._source(request, decision),
            prediction=prediction,
            num_choices=request.num_choices,
        )
        page_tokens = int(self.view.columns.page_tokens[decode])
        num_pages = -(-(request.num_tokens + num_output) // page_tokens)
        busy_ns = prediction.load_ns + prediction.prefill_ns
        key, *other_keys = _keys(request)
        booking = self.books.book(key, request.num_tokens, prefill, busy_ns, decode, num_pages, now)
        siblings = [
            self.books.book_sibling(booking, other, sibling_pages(num_output, page_tokens)) for other in other_keys
        ]
        for each in (booking, *siblings):
            each.answer = answer
            self._remember(each.key, answer)
        self.counts["placed"] += 1
        return answer

    def _source(self, request: PlaceRequest, decision: Decision) -> KvSource | None:
        if not decision.source:
            return None
        node = self.view.nodes[self.view.names[decision.source]].info
        num_blocks = decision.num_source_blocks
        return KvSource(
            node=node.name,
            num_tokens=num_blocks * self.config.block_tokens,
            block_keys=request.block_keys[:num_blocks],
            addresses=node.addresses,
        )

    def _reject_too_long(self, sender: str, request: PlaceRequest) -> Send | None:
        """None if some instance, ready or not, could take it."""
        num_tokens_max = self._num_tokens_max(request)
        if num_tokens_max is None or request.num_tokens <= num_tokens_max:
            return None
        detail = f"{request.num_tokens} tokens; the largest instance holds {num_tokens_max}"
        return self._reject(sender, request.key, TOO_LONG, detail)

    def _num_tokens_max(self, request: PlaceRequest) -> int | None:
        """The longest sequence that the instances known now could take, ready or not; None if a pool is empty."""
        columns = self.view.columns
        capacity = columns.capacity_tokens
        decode = max(capacity[columns.is_decode].tolist(), default=None)
        if decode is None or request.decode_only:
            return None if decode is None else decode - 1
        prefill = max(capacity[columns.is_prefill].tolist(), default=None)
        in_place = max(capacity[columns.is_colocated].tolist(), default=None)
        ways = [] if prefill is None else [min(prefill, decode - 1)]
        ways += [] if in_place is None else [in_place - 1]
        return max(ways, default=None)

    def _reject(
        self,
        sender: str,
        key: AttemptKey,
        reason: str,
        detail: str,
        retry_ns: int = RETRY_NS_MIN,
        prediction: Prediction = _NO_PREDICTION,
    ) -> Send:
        answer = Rejected(key, reason, detail, 0 if reason == TOO_LONG else retry_ns, prediction)
        self._remember(key, answer)
        self.counts[f"rejected_{reason}"] += 1
        return Send(sender, answer)

    def _past_answer(self, key: AttemptKey, now: int) -> Placed | Rejected | None:
        past = self._answers.get(key)
        return past.message if past is not None and (past.until_ns is None or now < past.until_ns) else None

    def _remember(self, key: AttemptKey, answer: Placed | Rejected) -> None:
        until_ns = self._now + answer.retry_after_ns if isinstance(answer, Rejected) else None
        self._answers.pop(key, None)
        self._answers[key] = _Answer(answer, until_ns)
        if len(self._answers) > self.config.num_answers_max:
            del self._answers[next(iter(self._answers))]

    def _place_waiting(self, now: int) -> list[Send]:
        commands: list[Send] = []
        for key, waiting in list(self._waiting.items()):
            answer = self._try_place(waiting.sender, waiting.request, now)
            if answer is not None:
                del self._waiting[key]
                commands.append(answer)
        return commands

    # ------------------------------------------------------------ outcomes

    def _on_prefill_done(self, sender: str, message: PrefillDone, now: int) -> list[Send]:
        booking = self.books.bookings.get(message.key)
        if booking is not None and booking.prefill is not None:
            if message.ttft_ns is not None and booking.prediction is not None:
                name = self.view.names[booking.prefill]
                self.accuracy.observe(name, "ttft", booking.prediction.ttft_ns, message.ttft_ns)
            self.books.release_prefill(message.key, now)
        return self._greet(sender)

    def _on_attempt_ended(self, sender: str, message: AttemptEnded, now: int) -> list[Send]:
        commands = self._greet(sender)
        if message.key in self._waiting:
            del self._waiting[message.key]
            return [*commands, self._reject(sender, message.key, NO_INSTANCE, "the attempt ended while it waited")]
        booking = self.books.bookings.get(message.key)
        if booking is None:
            return commands
        if message.mean_itl_ns is not None and booking.prediction is not None and booking.decode is not None:
            name = self.view.names[booking.decode]
            self.accuracy.observe(name, "tbt", booking.prediction.tbt_ns, message.mean_itl_ns)
        if message.completed:
            self.lengths.learn(message.num_output)
        self.books.release(message.key, now)
        return commands

    def _on_booking_snapshot(self, sender: str, message: BookingSnapshot, now: int) -> list[Send]:
        """Repair both ways: what the frontend no longer has goes, what this Conductor never saw (it restarted)
        comes."""
        self._greet(sender)
        keys = {key for key, _prefill, _decode, _tokens in message.bookings}
        settled_before = now - self.config.booking_grace_ns
        self.books.release_others(message.frontend, keys, settled_before, now)
        for key, prefill, decode, num_tokens in message.bookings:
            booking = self.books.bookings.get(key)
            if booking is None and key not in self._answers:
                self._rebook(key, prefill, decode, num_tokens, now)
            elif booking is not None and not prefill and not booking.in_place and booking.booked_at <= settled_before:
                self.books.release_prefill(key, now)
        return [Send(sender, self.membership.members())]

    def _rebook(self, key: AttemptKey, prefill: str, decode: str, num_tokens: int, now: int) -> None:
        source, target = self.view.instances.get(prefill), self.view.instances.get(decode)
        columns = self.view.columns
        prefill_slot = source.slot if source is not None and columns.is_prefill[source.slot] else None
        decode_slot = target.slot if target is not None and columns.is_decode[target.slot] else None
        if prefill_slot is None and decode_slot is None:
            return
        prefill_ns = source.info.cost.prefill_ns(num_tokens, 0) if source is not None else 0
        num_pages = -(-num_tokens // target.info.page_tokens) if target is not None else 0
        self.books.book(key, num_tokens, prefill_slot, prefill_ns, decode_slot, num_pages, now)

    # ------------------------------------------------------------ members

    def _on_register(self, sender: str, message: Register, now: int) -> list[Send]:
        before = self.membership.members()
        commands = self.membership.register(sender, message, now)
        if self.view.connected(sender):
            self._lost.pop(sender, None)
        return commands + self._after_change(before, now)

    def _on_state_change(self, sender: str, message: StateChange, now: int) -> list[Send]:
        before = self.membership.members()
        commands = self.membership.change_state(message, now)
        if commands is None:
            self.counts["stale"] += 1
            return []
        return commands + self._after_change(before, now)

    def _on_register_node(self, sender: str, message: RegisterNode, now: int) -> list[Send]:
        commands = self.membership.register_node(sender, message, now)
        if self.view.connected(sender):
            self._lost.pop(sender, None)
        return commands

    def _after_change(self, before: Message, now: int) -> list[Send]:
        """Members to all frontends if they differ, and another try for those who wait."""
        members = self.membership.members()
        tell = [Send(frontend, members) for frontend in self._frontends] if members != before else []
        return tell + self._place_waiting(now)

    def _on_load_report(self, sender: str, message: LoadReport, now: int) -> list[Send]:
        slot = self.view.report(message.load, now)
        if slot is not None:
            self.books.see(slot, now)
        return []

    def _on_cache_delta(self, sender: str, message: CacheDelta, now: int) -> list[Send]:
        return self.feeds.on_delta(message, now)

    def _on_cache_snapshot(self, sender: str, message: CacheSnapshot, now: int) -> list[Send]:
        self.feeds.on_snapshot(message)
        return []

    def _greet(self, frontend: str) -> list[Send]:
        """A frontend spoke: it is not lost, and if it is new it learns who is there."""
        self._lost.pop(frontend, None)
        if frontend in self._frontends:
            return []
        self._frontends[frontend] = None
        return [Send(frontend, self.membership.members())]

    def _on_peer_gone(self, name: str, now: int) -> None:
        if self.view.knows(name):
            self.membership.disconnect(name)
        elif name not in self._frontends:
            return
        self._lost.pop(name, None)
        self._lost[name] = now + self.config.peer_grace_ns

    def _give_up_peer(self, name: str, now: int) -> list[Send]:
        if name in self._frontends:
            del self._frontends[name]
            for key in self.books.release_frontend(name, now):
                self._answers.pop(key, None)
            for key in [key for key in self._waiting if key.frontend == name]:
                del self._waiting[key]
            return []
        if not self.view.knows(name):
            return []
        before = self.membership.members()
        self.membership.forget(name, now)
        return self._after_change(before, now)

    # ------------------------------------------------------------ for people and tests

    def explain(self, key: AttemptKey) -> str | None:
        record = self.records.get(key)
        return record.render() if record is not None else None

    def check_integrity(self) -> None:
        self.view.check_integrity()
        self.books.check_integrity()
        self.index.check_integrity()
        assert self.index.width == len(self.view.columns.placeable) == len(self.view.names)
        assert not self._waiting.keys() & self.books.bookings.keys(), "an attempt waits and is booked"
        assert len(self._waiting) <= self.config.num_waiting_max


def _keys(request: PlaceRequest) -> list[AttemptKey]:
    """Of each choice that is placed by this request, first its own."""
    key = request.key
    return [key.of_choice(key.choice + index) for index in range(request.num_choices)]
