"""The prefill instance, decided: queue, room for the hand-over, source, engine, commit, hand-over.

    queued --room reserved, source opened--> running --first token, all KV committed--> held --HandoverDone--> gone
       |                                        |                                         |
       +---------------- abort, deadline, frontend gone: everything is released ----------+

Tenants take turns in the queue by their weights (`mooncake.engine.fair_queue`); inside a tenant the higher priority goes first,
then the oldest. Room in the store is reserved in that order, one request at a time and all or nothing: so requests never hold
parts of a store that is too small for them. A request whose KV nobody will fetch (`hand_over` is False)
stores its blocks for reuse if there is room, and does without if not.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.deadlines import earliest
from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AttemptFailed,
    ChangeRole,
    Drain,
    HandoverDone,
    KvPartReady,
    KvReady,
    LiveAttempts,
    Send,
    Submit,
    TokenOutput,
)
from mooncake.core.types import (
    NANOS_PER_MS,
    NANOS_PER_S,
    PART_TOKENS,
    InstanceInfo,
    InstanceState,
    Job,
    KvSource,
    Role,
)
from mooncake.engine.attempts import (
    AbortSequence,
    Attempt,
    AttemptTable,
    CloseSource,
    EngineProgress,
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
    group_tokens,
)
from mooncake.engine.core import (
    Drawn,
    KvLoaded,
    SequenceFailed,
    SequenceReleased,
    SequenceStarted,
)
from mooncake.engine.fair_queue import FairQueue
from mooncake.engine.reporting import InstanceReporter
from mooncake.engine.service_life import ServiceLife

RETRY_RESERVE_NS = 20 * NANOS_PER_MS
"""A refused reservation is tried again after this; the store has no call-back for room."""
STALE_NS = 3 * NANOS_PER_S
"""Attempts younger than this are not dropped for missing in `LiveAttempts`: that message may have overtaken them."""

LET_GO_NS = 5 * NANOS_PER_S
"""How long after it was told to change its role an instance that does nothing else goes on holding hand-overs. Who reads one
has leases of its own; who is not there yet may be waiting for this very instance to become a decode instance."""

# ---------------------------------------------------------------- events and commands of its own


class ReserveKv(msgspec.Struct, frozen=True):
    """Reserve (or lease, where they exist) the objects of all blocks and the partial last one, for that tenant. Answered by
    `KvReserved`."""

    seq: int
    target: KvSource
    tenant: str = ""


class KvReserved(msgspec.Struct, frozen=True, tag=True):
    """Not granted: there is no room now, or the node cannot be asked (not `reachable`). num_stored: leading objects that exist
    already, and are leased; the engine does not write them."""

    seq: int
    granted: bool
    reachable: bool = True
    num_stored: int = 0


class CommitKv(msgspec.Struct, frozen=True):
    """Commit the objects [first, last) of the reservation, the partial one being the last of all; keep them leased.
    Answered by `KvCommitted`."""

    seq: int
    first: int
    last: int


class KvCommitted(msgspec.Struct, frozen=True, tag=True):
    """Of the objects [first, last)."""

    seq: int
    first: int
    last: int
    ok: bool


class ReleaseKv(msgspec.Struct, frozen=True):
    """Cancel what is not committed and release the leases of the rest."""

    seq: int


PrefillEvent = (
    Received | PeerOpened | PeerGone | KvReserved | SourceOpened | KvCommitted | EngineProgress | KvStored | Tick
)
PrefillCommand = (
    Send
    | ReserveKv
    | CommitKv
    | ReleaseKv
    | OpenSource
    | CloseSource
    | RunSequence
    | AbortSequence
    | ListBlocks
    | TakeRole
)


class PrefillLimits(msgspec.Struct, frozen=True):
    max_queued: int = 1024
    """Attempts this instance knows at once; more are refused."""
    max_started: int = 8
    """Attempts that hold room in the store and are not handed over; the engine can batch no more anyway."""
    part_tokens: int = PART_TOKENS
    """While a prompt is computed, decode is told of its tokens that are there: at least so many new ones each time."""


class _State(enum.IntEnum):
    QUEUED = 0
    OPENING = 1
    RUNNING = 2
    STORING = 3
    """The first token is out; KV is still on its way to the store."""
    HELD = 4
    LEAVING = 5
    """Nobody wants it any more, but the engine still has it."""


class _Prefill(Attempt):
    __slots__ = (
        "committed",
        "granted",
        "in_engine",
        "num_committed",
        "num_leading",
        "num_objects",
        "opened_tokens",
        "pending",
        "state",
        "store_lost",
        "target",
        "told_tokens",
        "turn",
    )

    def __init__(self, seq: int, job: Job, now: int, target: KvSource) -> None:
        super().__init__(seq, job, now)
        self.turn = 0
        self.state = _State.QUEUED
        self.target = target
        self.num_objects = len(target.block_keys) + bool(target.partial_key)
        self.num_committed = 0
        """With those that existed before."""
        self.num_leading = 0
        """Of these, the objects from the first on without a gap."""
        self.committed: dict[int, int] = {}
        """Those behind a gap, from first to last."""
        self.told_tokens = 0
        self.granted = False
        self.store_lost = False
        self.opened_tokens = 0
        self.in_engine = False
        self.pending = 0
        """Answers of the store still to come before the attempt can run or leave."""


class PrefillCore:
    """partial_key names the object of a hand-over's partial block: a pure function of the attempt."""

    def __init__(
        self,
        info: InstanceInfo,
        limits: PrefillLimits,
        block_tokens: int,
        partial_key: Callable[[Job], bytes],
        refusal: Callable[[Job], str | None],
    ) -> None:
        self.reporter = InstanceReporter(info)
        self.num_refused = 0
        self._name = info.name
        self._node = info.node
        self._node_addresses = info.node_addresses
        self._limits = limits
        self._block_tokens = block_tokens
        self._partial_key = partial_key
        self._refusal = refusal
        self._table: AttemptTable[_Prefill] = AttemptTable(limits.max_queued)
        self._queue = FairQueue()
        self._queued_tokens = 0
        self._num_started = 0
        self._reserving = False
        self._retry_at: int | None = None
        self._life = ServiceLife(info)
        self._let_go_at: int | None = None
        self._lets_go = False
        self._due: int | None = None
        self._out: list[PrefillCommand] = []
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            Received: self._received,
            PeerOpened: self._peer_opened,
            PeerGone: self._peer_gone,
            KvReserved: self._reserved,
            SourceOpened: self._source_opened,
            KvCommitted: self._committed,
            EngineProgress: self._engine_progress,
            KvStored: self._stored,
            Tick: lambda event, now: None,
        }
        self._messages: dict[type, Callable[[Any, int], None]] = {
            Submit: self._submit,
            Abort: self._let_go,
            HandoverDone: self._let_go,
            LiveAttempts: self._live_attempts,
            Drain: self._drain,
            ChangeRole: self._change_role,
        }

    # ------------------------------------------------------------------ the face

    def handle(self, event: PrefillEvent, now: int) -> list[PrefillCommand]:
        self._handlers[type(event)](event, now)
        is_due = self._due is not None and self._due <= now
        if is_due:
            for attempt in self._table.expired(now):
                self._expire(attempt)
        if len(self._queue):
            self._start_next(now)
        if is_due and self.reporter.due(now):
            self._out += self.reporter.report(len(self._queue), self._queued_tokens, len(self._table))
        if self._life.next_role is not None:
            self._leave_role(now)
        self.reporter.count(len(self._table), now)
        self._due = self._find_due()
        out, self._out = self._out, []
        return out

    def deadline(self) -> int | None:
        return self._due

    def _find_due(self) -> int | None:
        due = earliest(self._table.next_deadline(), self.reporter.deadline())
        if len(self._queue) and self._retry_at is not None:  # else who was refused is gone
            due = earliest(due, self._retry_at)
        return due if self._let_go_at is None else earliest(due, self._let_go_at)

    @property
    def num_attempts(self) -> int:
        return len(self._table)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def drained(self) -> bool:
        return self._life.draining and not len(self._table)

    def check_integrity(self) -> None:
        """Raises AssertionError: the queue and the counts agree with the attempts."""
        states = [a.state for a in self._table]
        assert len(self._queue) == states.count(_State.QUEUED)
        self._queue.check_integrity()
        assert self._queued_tokens == sum(a.job.num_tokens for a in self._table if a.state is _State.QUEUED)
        assert self._num_started == sum(1 for s in states if s is not _State.QUEUED and s is not _State.HELD)

    # ------------------------------------------------------------------ messages

    def _received(self, event: Received, now: int) -> None:
        handler = self._messages.get(type(event.message))
        if handler is not None:
            handler(event.message, now)
        elif event.sender == CONDUCTOR:
            self._out.extend(self.reporter.received(event.message))

    def _peer_opened(self, event: PeerOpened, now: int) -> None:
        if event.peer == CONDUCTOR:
            self._out.extend(self.reporter.opened(len(self._queue), self._queued_tokens, len(self._table)))

    def _peer_gone(self, event: PeerGone, now: int) -> None:
        if event.peer == CONDUCTOR:
            self.reporter.closed()
        for attempt in self._table.of_frontend(event.peer):
            self._leave(attempt)

    def _submit(self, message: Submit, now: int) -> None:
        job = message.job
        if job.key in self._table:
            return
        too_long = self._refusal(job)
        if job.role is Role.DECODE:
            self._fail(job, "refused", "is a prefill instance now")
        elif too_long is not None:
            self._fail(job, "too_long", too_long)
        elif self._life.draining or self._table.full:
            self.num_refused += 1
            self._fail(job, "refused", "draining" if self._life.draining else f"{len(self._table)} attempts already")
        else:
            attempt = _Prefill(self._table.new_seq(), job, now, self._target(job))
            self._table.add(attempt)
            num_reused = job.source.num_tokens if job.source is not None else 0
            self._queue.push(attempt.seq, job.tenant, job.weight, job.priority, job.num_tokens - num_reused)
            self._queued_tokens += job.num_tokens

    def _target(self, job: Job) -> KvSource:
        """The objects that the hand-over of the whole sequence consists of, at our own node."""
        num_blocks = job.num_tokens // self._block_tokens
        partial = self._partial_key(job) if job.hand_over and job.num_tokens % self._block_tokens else b""
        keys = job.block_keys[:num_blocks]
        num_tokens = job.num_tokens if partial else num_blocks * self._block_tokens
        return KvSource(self._node, num_tokens, keys, partial, self._node_addresses)

    def _let_go(self, message: Abort | HandoverDone, now: int) -> None:
        """What is not wanted any more, or was handed over."""
        for key in message.keys:
            attempt = self._table.by_key(key)
            if attempt is not None:
                self._leave(attempt)

    def _live_attempts(self, message: LiveAttempts, now: int) -> None:
        for key in message.keys:
            attempt = self._table.by_key(key)
            if attempt is None:
                self._out.append(Send(message.frontend, AttemptFailed(self._name, key, "unknown")))
            elif attempt.state is _State.HELD:
                self._out.append(Send(message.frontend, KvReady(self._name, key, attempt.target)))
        wanted = (*message.keys, *message.held)
        for attempt in self._table.unwanted(message.frontend, wanted, now - STALE_NS):
            self._leave(attempt)

    def _drain(self, message: Drain, now: int) -> None:
        self._life.drain()
        self._let_go_at = None
        self._out.extend(self.reporter.change_state(InstanceState.DRAINING))

    def _change_role(self, message: ChangeRole, now: int) -> None:
        if self._life.change_role(message):
            self._let_go_at = now + LET_GO_NS
            self._out.extend(self.reporter.change_state(InstanceState.DRAINING))

    def _leave_role(self, now: int) -> None:
        if self._let_go_at is not None and self._let_go_at <= now:
            self._lets_go, self._let_go_at = True, None
        if self._lets_go and all(attempt.state is _State.HELD for attempt in self._table):
            for attempt in list(self._table):
                self._leave(attempt)
        if self.drained:
            self._out.append(TakeRole(self._life.leave()))
            self._let_go_at = None

    # ------------------------------------------------------------------ queue and room

    def _start_next(self, now: int) -> None:
        """Ask for room for the queued attempt whose turn it is, if none is being asked for."""
        if self._retry_at is not None and self._retry_at <= now:
            self._retry_at = None
        if (
            not len(self._queue)
            or self._reserving
            or self._retry_at is not None
            or self._num_started >= self._limits.max_started
        ):
            return
        seq, turn = self._queue.pop()
        attempt = self._table.by_seq(seq)
        assert attempt is not None
        attempt.turn = turn
        self._queued_tokens -= attempt.job.num_tokens
        attempt.state = _State.OPENING
        self._num_started += 1
        if not attempt.num_objects:
            self._run(attempt)
            self._start_next(now)
            return
        self._reserving = True
        attempt.pending = 1
        if attempt.job.source is not None and attempt.job.num_tokens > 1:
            attempt.pending = 2
            # First, so that what a node has to read from SSD for it need not be reserved and written once more.
            self._out.append(OpenSource(attempt.seq, attempt.job.source, attempt.job.tenant))
        self._out.append(ReserveKv(attempt.seq, attempt.target, attempt.job.tenant))

    def _reserved(self, event: KvReserved, now: int) -> None:
        self._reserving = False
        attempt = self._table.by_seq(event.seq)
        assert attempt is not None
        attempt.granted = event.granted
        attempt.num_leading = attempt.num_committed = event.num_stored
        attempt.store_lost = not event.reachable
        if not event.granted and event.reachable and attempt.job.hand_over:
            self._retry_at = now + RETRY_RESERVE_NS
        self._answered(attempt)

    def _source_opened(self, event: SourceOpened, now: int) -> None:
        attempt = self._table.by_seq(event.seq)
        assert attempt is not None
        attempt.opened_tokens = event.num_tokens
        self._answered(attempt)

    def _answered(self, attempt: _Prefill) -> None:
        attempt.pending -= 1
        if attempt.pending:
            return
        if attempt.state is _State.LEAVING:
            self._forget(attempt)
        elif attempt.granted or not attempt.job.hand_over:
            self._run(attempt)
        elif attempt.store_lost:
            # Room may come, a node may stay away: somebody else can hand over through another one.
            self._fail(attempt.job, "store_failed", "the store node cannot be reached")
            self._leave(attempt)
        else:
            self._close_source(attempt)
            self._num_started -= 1
            attempt.state = _State.QUEUED
            self._queue.give_back(attempt.seq)
            self._queued_tokens += attempt.job.num_tokens

    def _run(self, attempt: _Prefill) -> None:
        attempt.state = _State.RUNNING
        attempt.in_engine = True
        self._out.append(
            RunSequence(
                attempt.seq,
                attempt.job,
                attempt.opened_tokens,
                one_token=True,
                store=attempt.granted,
                turn=attempt.turn,
            )
        )
        source = attempt.job.source
        if source is not None and source.num_tokens >= self._limits.part_tokens:
            attempt.told_tokens = source.num_tokens  # by the dispatcher, with the placement
        self._maybe_tell_part(attempt)

    # ------------------------------------------------------------------ engine and commits

    def _engine_progress(self, event: EngineProgress, now: int) -> None:
        self._out += self.reporter.progress(event, now)
        tokens: list[TokenOutput] = []
        for output in event.outputs:
            attempt = self._table.by_seq(output.seq)
            if attempt is None:
                continue
            if isinstance(output, Drawn):
                self._drawn(attempt, output, tokens, now)
            elif isinstance(output, KvLoaded):
                self._close_source(attempt)
            elif isinstance(output, SequenceStarted):
                attempt.started_at = now - event.step_ns  # told when its first step was done
            elif isinstance(output, SequenceFailed):
                self._fail(attempt.job, output.reason, output.detail)
                self._leave(attempt)
            elif isinstance(output, SequenceReleased):
                self._released(attempt, now)
        if tokens:
            self._out[:0] = group_tokens(self._name, tokens)  # a first token goes before its hand-over

    def _drawn(self, attempt: _Prefill, output: Drawn, tokens: list[TokenOutput], now: int) -> None:
        if attempt.state is _State.LEAVING:
            return
        tokens.append(attempt.token_output(output, now))
        if attempt.state is _State.RUNNING:  # the first of a joint attempt's tokens, or the only one
            attempt.state = _State.STORING
            self._queue.served(attempt.seq)
            self._maybe_ready(attempt, now)

    def _stored(self, event: KvStored, now: int) -> None:
        attempt = self._table.by_seq(event.seq)
        if attempt is None or attempt.state is _State.LEAVING:
            return
        first = event.start // self._block_tokens
        last = attempt.num_objects if event.end >= attempt.target.num_tokens else event.end // self._block_tokens
        if last > first:
            attempt.pending += 1
            self._out.append(CommitKv(attempt.seq, first, last))

    def _committed(self, event: KvCommitted, now: int) -> None:
        attempt = self._table.by_seq(event.seq)
        assert attempt is not None
        attempt.pending -= 1
        attempt.num_committed += event.last - event.first
        attempt.committed[event.first] = event.last
        if attempt.state is _State.LEAVING:
            self._forget_if_idle(attempt)
        elif not event.ok and attempt.job.hand_over:
            self._fail(attempt.job, "store_failed", "the store did not commit the KV")
            self._leave(attempt)
        else:
            self._maybe_ready(attempt, now)
            self._maybe_tell_part(attempt)

    def _maybe_tell_part(self, attempt: _Prefill) -> None:
        """Decode can load what is there while the rest is computed. Of what was committed and is lost since it hears at the
        hand-over."""
        while attempt.num_leading in attempt.committed:
            attempt.num_leading = attempt.committed.pop(attempt.num_leading)
        num_blocks = attempt.num_leading
        if attempt.state is not _State.RUNNING or not attempt.job.hand_over or num_blocks >= attempt.num_objects:
            return
        num_tokens = num_blocks * self._block_tokens
        if num_tokens - attempt.told_tokens >= self._limits.part_tokens:
            target = attempt.target
            source = KvSource(target.node, num_tokens, target.block_keys[:num_blocks], b"", target.addresses)
            part = KvPartReady(self._name, attempt.key, attempt.told_tokens, source)
            self._out.append(Send(attempt.key.frontend, part))
            attempt.told_tokens = num_tokens

    def _maybe_ready(self, attempt: _Prefill, now: int) -> None:
        """First token drawn and everything committed: hand over. If nobody fetches it, it is over when the engine is done."""
        if attempt.state is not _State.STORING or not attempt.job.hand_over:
            return
        if attempt.num_committed >= attempt.num_objects:
            attempt.state = _State.HELD
            self._num_started -= 1
            self._out.append(Send(attempt.key.frontend, KvReady(self._name, attempt.key, attempt.target)))
        elif not attempt.in_engine and not attempt.pending:
            # A copy failed, so its commit will never come.
            self._fail(attempt.job, "store_failed", "not all KV reached the store")
            self._leave(attempt)

    def _released(self, attempt: _Prefill, now: int) -> None:
        attempt.in_engine = False
        if attempt.state is _State.LEAVING:
            self._forget_if_idle(attempt)
        elif attempt.job.hand_over:
            self._maybe_ready(attempt, now)
        else:
            self._leave(attempt)

    # ------------------------------------------------------------------ leaving

    def _expire(self, attempt: _Prefill) -> None:
        if attempt.state is not _State.LEAVING:
            if attempt.state is not _State.HELD:
                self._fail(attempt.job, "deadline", f"not done within {attempt.job.deadline_ns / NANOS_PER_S:g} s")
            self._leave(attempt)

    def _leave(self, attempt: _Prefill) -> None:
        """Give the attempt up; what the engine or the store still has of it is released when they are done with it."""
        if attempt.state is _State.LEAVING:
            return
        if attempt.state is _State.QUEUED:
            self._queue.remove(attempt.seq)
            self._queued_tokens -= attempt.job.num_tokens
            self._table.remove(attempt)
            return
        if attempt.state is _State.HELD:
            self._num_started += 1
        attempt.state = _State.LEAVING
        if attempt.in_engine:
            self._out.append(AbortSequence(attempt.seq))
        self._forget_if_idle(attempt)

    def _forget_if_idle(self, attempt: _Prefill) -> None:
        if not attempt.in_engine and not attempt.pending:
            self._forget(attempt)

    def _forget(self, attempt: _Prefill) -> None:
        self._close_source(attempt)
        if attempt.granted:
            self._out.append(ReleaseKv(attempt.seq))
        self._num_started -= 1
        self._queue.served(attempt.seq)
        self._table.remove(attempt)

    def _close_source(self, attempt: _Prefill) -> None:
        if attempt.opened_tokens:
            attempt.opened_tokens = 0
            self._out.append(CloseSource(attempt.seq))

    def _fail(self, job: Job, reason: str, detail: str) -> None:
        self._out.append(Send(job.key.frontend, AttemptFailed(self._name, job.key, reason, detail)))
