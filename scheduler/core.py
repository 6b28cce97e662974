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
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.deadlines import earliest
from mooncake.core.messages import (
    AnyMessage,
    AskExplain,
    AskHold,
    AskStatus,
    AttemptEnded,
    BookingSnapshot,
    CacheDelta,
    CacheSnapshot,
    LoadReport,
    Message,
    NodeLoad,
    Placed,
    PlaceRequest,
    PrefillDone,
    Register,
    RegisterNode,
    Rejected,
    Send,
    StateChange,
    Told,
)
from mooncake.core.types import AttemptKey
from mooncake.scheduler.admission import Accuracy, make_gate, make_starts
from mooncake.scheduler.bookings import Books
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.costs import BlockCosts
from mooncake.scheduler.feeds import CacheFeeds
from mooncake.scheduler.lengths import Lengths
from mooncake.scheduler.links import Links
from mooncake.scheduler.membership import Membership
from mooncake.scheduler.operations import Operations
from mooncake.scheduler.placer import NO_INSTANCE, Placer, choice_keys
from mooncake.scheduler.prefix_index import PrefixIndex
from mooncake.scheduler.switching import make_switching
from mooncake.scheduler.view import View


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


class ConductorCore:
    """Sans-IO: `handle(event, now) -> commands`, `deadline()`."""

    def __init__(self, config: ConductorConfig, rng: random.Random) -> None:
        self.config = config
        self.view = View(Links(config.rates), Lengths())
        starts = make_starts(config)
        self.books = Books(self.view, config.settle_ns, starts)
        self.index = PrefixIndex(config.index_blocks_max)
        self.feeds = CacheFeeds(self.index, config.snapshot_retry_ns)
        self.accuracy = Accuracy(config.calibration)
        self.costs = BlockCosts(config.block_tokens, config.kv_token_bytes, config.rates)
        self.membership = Membership(self.view, self.books, self.index, self.feeds, self.accuracy, self.costs)
        gate = make_gate(config, self.view, starts, self.accuracy)
        self.placer = Placer(config, self.view, self.books, self.index, gate, rng, self.costs)
        self.records = self.placer.records
        self.counts = self.placer.counts
        self.switching = make_switching(config, self.view)
        self.operations = Operations(self.view, self.books, self.index, self.membership, self.placer)
        self._due: int | None = None
        self._frontends: dict[str, None] = {}
        self._lost: dict[str, int] = {}
        """Peers whose connection ended, and when they count as gone; earliest first, as the grace is the same for
        all."""
        self._waiting: dict[AttemptKey, _Waiting] = {}
        """Earliest deadline first, likewise."""
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
            NodeLoad: self._on_node_load,
            AskStatus: self._on_ask_status,
            AskExplain: self._on_ask_explain,
            AskHold: self._on_ask_hold,
        }

    # ------------------------------------------------------------ events

    def handle(self, event: Received | PeerGone | Tick, now: int) -> list[Send]:
        due = self._due
        commands = self._pass_time(now) if due is not None and due <= now else []
        if isinstance(event, Received):
            handler = self._on_message.get(type(event.message))
            if handler is not None:
                commands += handler(event.sender, event.message, now)
        elif isinstance(event, PeerGone):
            self._on_peer_gone(event.name, now)
        if self.placer.copies:
            commands += self.placer.copies
            self.placer.copies = []
        self._due = self._find_due(now)
        return commands

    def deadline(self) -> int | None:
        return self._due

    @property
    def num_waiting(self) -> int:
        """Requests that wait for an instance."""
        return len(self._waiting)

    def _find_due(self, now: int) -> int | None:
        index = self.index
        if index.sweeps:
            return now
        due = index.expiries[0][0] if index.expiries else None
        if self.feeds.asked:
            due = earliest(due, self.feeds.deadline())
        if self._lost:
            due = earliest(due, next(iter(self._lost.values())))
        if self._waiting:
            due = earliest(due, next(iter(self._waiting.values())).deadline_ns)
        if self.switching.due is not None:
            due = earliest(due, self.switching.due)
        return due

    def _pass_time(self, now: int) -> list[Send]:
        self.index.sweep()
        self.index.expire(now)
        commands = self.feeds.retry(now)
        for name in [name for name, gone_at in self._lost.items() if gone_at <= now]:
            del self._lost[name]
            commands += self._give_up_peer(name, now)
        for key in [key for key, waiting in self._waiting.items() if waiting.deadline_ns <= now]:
            waiting = self._waiting.pop(key)
            detail = f"no instance became ready within {self.config.wait_ns / 1e9:.0f} s"
            commands.append(Send(waiting.sender, self.placer.reject(key, NO_INSTANCE, detail, now)))
        if self.switching.due is not None and self.switching.due <= now:
            commands += self.switching.sample(now)
        return commands

    # ------------------------------------------------------------ placing

    def _on_place_request(self, sender: str, request: PlaceRequest, now: int) -> list[Send]:
        commands = self._greet(sender)
        key = request.key
        if key in self._waiting:
            return commands
        booking = self.books.bookings.get(key)
        answer = self.placer.answers.find(key, now) if booking is None else booking.answer
        if answer is None:
            if booking is not None or request.num_choices > 1:
                for each in choice_keys(request):  # rebuilt from a snapshot, their answer is unknown: place them afresh
                    self.books.release(each, now)
            answer = self._place(sender, request, now)
        if answer is not None:
            commands.append(Send(sender, answer))
        return commands

    def _place(self, sender: str, request: PlaceRequest, now: int) -> Placed | Rejected | None:
        answer = self.placer.place(request, now)
        if isinstance(answer, Rejected):
            self.switching.note_refusal(answer)
        if answer is not None:
            return answer
        if len(self._waiting) >= self.config.num_waiting_max:
            detail = f"no instance is ready and {len(self._waiting)} requests wait already"
            return self.placer.reject(request.key, NO_INSTANCE, detail, now)
        self._waiting[request.key] = _Waiting(sender, request, now + self.config.wait_ns)
        self.counts["waited"] += 1
        return None

    def _place_waiting(self, now: int) -> list[Send]:
        commands: list[Send] = []
        for key, waiting in list(self._waiting.items()):
            answer = self.placer.place(waiting.request, now)
            if answer is not None:
                del self._waiting[key]
                commands.append(Send(waiting.sender, answer))
        return commands

    # ------------------------------------------------------------ outcomes

    def _on_prefill_done(self, sender: str, message: PrefillDone, now: int) -> list[Send]:
        booking = self.books.bookings.get(message.key)
        if booking is not None and booking.prefill is not None:
            prefill, decode = booking.prefill, booking.decode
            if message.ttft_ns is not None:
                self.switching.note_ttft(booking.slo, message.ttft_ns)
                if booking.answer is not None:
                    predicted_ns = booking.answer.prediction.ttft_ns
                    self.accuracy.observe(prefill.info.name, "ttft", predicted_ns, message.ttft_ns)
                    self.accuracy.observe_lateness(prefill.info.name, "ttft", predicted_ns, message.ttft_ns)
                if decode is not None:
                    self.placer.hand_over(prefill.info.node, decode.info.node, booking.num_tokens, now)
            self.books.release_prefill(message.key, now, done=message.ttft_ns is not None)
        return self._greet(sender)

    def _on_attempt_ended(self, sender: str, message: AttemptEnded, now: int) -> list[Send]:
        commands = self._greet(sender)
        if message.key in self._waiting:
            del self._waiting[message.key]
            detail = "the attempt ended while it waited"
            return [*commands, Send(sender, self.placer.reject(message.key, NO_INSTANCE, detail, now))]
        booking = self.books.bookings.get(message.key)
        if booking is None:
            return commands
        if message.mean_itl_ns is not None and booking.answer is not None and booking.decode is not None:
            name, predicted_ns = booking.decode.info.name, booking.answer.prediction.tbt_ns
            self.accuracy.observe(name, "tbt", predicted_ns, message.mean_itl_ns)
            if message.tbt_ns is not None and booking.judged_tbt_ns is not None:
                self.accuracy.observe_lateness(name, "tbt", booking.judged_tbt_ns, message.tbt_ns)
        if message.mean_itl_ns is not None:
            self.switching.note_tbt(booking.slo, message.mean_itl_ns)
        if message.completed:
            self.view.lengths.learn(message.num_output)
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
            if booking is None and key not in self.placer.answers:
                self._rebook(key, prefill, decode, num_tokens, now)
            elif booking is not None and not prefill and not booking.in_place and booking.booked_at <= settled_before:
                self.books.release_prefill(key, now)
        return [Send(sender, self.membership.members())]

    def _rebook(self, key: AttemptKey, prefill: str, decode: str, num_tokens: int, now: int) -> None:
        source, target = self.view.instances.get(prefill), self.view.instances.get(decode)
        if source is not None and not source.does_prefill:
            source = None
        if target is not None and target.does_prefill:
            target = None
        if source is None and target is None:
            return
        prefill_ns = source.info.cost.prefill_ns(num_tokens, 0) if source is not None else 0
        num_pages = -(-num_tokens // target.info.page_tokens) if target is not None else 0
        self.books.book(key, num_tokens, source, prefill_ns, target, num_pages, now + prefill_ns, now)

    # ------------------------------------------------------------ members

    def _on_register(self, sender: str, message: Register, now: int) -> list[Send]:
        before = self.membership.members()
        commands = self.membership.register(sender, message, now)
        if self.view.connected(sender):
            self._lost.pop(sender, None)
            self.switching.begin(now)
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
        instance = self.view.report(message.load, now)
        if instance is not None:
            self.books.see(instance, now)
        return []

    def _on_cache_delta(self, sender: str, message: CacheDelta, now: int) -> list[Send]:
        return self.feeds.on_delta(message, now)

    def _on_cache_snapshot(self, sender: str, message: CacheSnapshot, now: int) -> list[Send]:
        self.feeds.on_snapshot(message)
        return []

    def _on_node_load(self, sender: str, message: NodeLoad, now: int) -> list[Send]:
        self.view.report_node(message)
        return []

    # ------------------------------------------------------------ for the operator

    def _on_ask_status(self, sender: str, message: AskStatus, now: int) -> list[Send]:
        return [Send(sender, self.operations.status(message.number, len(self._waiting), now))]

    def _on_ask_explain(self, sender: str, message: AskExplain, now: int) -> list[Send]:
        return [Send(sender, self.operations.explain(message))]

    def _on_ask_hold(self, sender: str, message: AskHold, now: int) -> list[Send]:
        refusal = self.operations.refusal(message)
        if refusal is not None:
            return [Send(sender, refusal)]
        before = self.membership.members()
        commands = self.membership.hold(message.name, message.held)
        told = Told(message.number, self.operations.outcome(message, now))
        return [*commands, Send(sender, told), *self._after_change(before, now)]

    # ------------------------------------------------------------ who is there

    def _greet(self, frontend: str) -> list[Send]:
        """A frontend spoke: it is not lost, and if it is new it learns who is there."""
        if self._lost:
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
                self.placer.answers.forget(key)
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
        assert self.index.width == len(self.view.names) == len(self.view.links.out_until)
        assert not self._waiting.keys() & self.books.bookings.keys(), "an attempt waits and is booked"
        assert len(self._waiting) <= self.config.num_waiting_max
