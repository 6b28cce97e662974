"""The decode instance, decided: fetch the KV that prefill handed over, continue the sequence, stream its tokens.

    opening --source leased--> running --stop, length, abort, deadline, frontend gone--> gone

Waiting sequences hold leases in the store but no pages (`mooncake.engine.core`); tenants take turns by their weights
(`mooncake.engine.fair_queue`). A job without a source is prefilled in place:
that is what a colocated instance does with every job, and any instance with a sequence that it preempted. A joint job ends with
the first tokens of its choices; these come back as jobs of their own and find the prompt's blocks in the pages.

While a prompt is prefilled, the blocks that are there already are loaded ahead: leased, copied into pages, and left there as
cached blocks (`mooncake.engine.ahead`). The sequence finds them when it comes, or else loads them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mooncake.core.deadlines import earliest
from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AttemptFailed,
    ChangeRole,
    Drain,
    LiveAttempts,
    LoadAhead,
    Send,
    Submit,
    TokenOutput,
)
from mooncake.core.types import NANOS_PER_S, InstanceInfo, InstanceState, Job, Role
from mooncake.engine.attempts import (
    AbortSequence,
    Attempt,
    AttemptTable,
    CloseSource,
    EngineProgress,
    ListBlocks,
    LoadBlocks,
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
from mooncake.engine.core import AheadEnded, Drawn, KvLoaded, SequenceFailed, SequenceReleased, SequenceStarted
from mooncake.engine.fair_queue import FairQueue
from mooncake.engine.reporting import InstanceReporter
from mooncake.engine.service_life import ServiceLife

STALE_NS = 3 * NANOS_PER_S
"""Attempts younger than this are not dropped for missing in `LiveAttempts`: that message may have overtaken them."""

MAX_AHEAD = 64
"""Loads ahead at once; as many prompts as a pool of prefill instances computes for one decode instance. More are dropped."""

DecodeEvent = Received | PeerOpened | PeerGone | SourceOpened | EngineProgress | Tick
DecodeCommand = Send | OpenSource | CloseSource | RunSequence | LoadBlocks | AbortSequence | ListBlocks | TakeRole


class _Decode(Attempt):
    __slots__ = ("in_engine", "leaving", "opened_tokens", "opening")

    def __init__(self, seq: int, job: Job, now: int) -> None:
        super().__init__(seq, job, now)
        self.opening = False
        self.opened_tokens = 0
        self.in_engine = False
        self.leaving = False


class DecodeCore:
    """max_queued: attempts this instance knows at once; more are refused."""

    def __init__(self, info: InstanceInfo, max_queued: int, refusal: Callable[[Job], str | None]) -> None:
        self.reporter = InstanceReporter(info)
        self.num_refused = 0
        self._name = info.name
        self._refusal = refusal
        self._table: AttemptTable[_Decode] = AttemptTable(max_queued)
        self._queue = FairQueue()
        """Of those that the engine has and that wait for their first pages there: it goes by their turns."""
        self._ahead: dict[int, LoadAhead] = {}
        self._opening_tokens = 0
        self._num_opening = 0
        self._life = ServiceLife(info)
        self._due: int | None = None
        self._out: list[DecodeCommand] = []
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            Received: self._received,
            PeerOpened: self._peer_opened,
            PeerGone: self._peer_gone,
            SourceOpened: self._source_opened,
            EngineProgress: self._engine_progress,
            Tick: lambda event, now: None,
        }
        self._messages: dict[type, Callable[[Any, int], None]] = {
            Submit: self._submit,
            Abort: self._abort,
            LoadAhead: self._load_ahead,
            LiveAttempts: self._live_attempts,
            Drain: self._drain,
            ChangeRole: self._change_role,
        }

    # ------------------------------------------------------------------ the face

    def handle(self, event: DecodeEvent, now: int) -> list[DecodeCommand]:
        self._handlers[type(event)](event, now)
        if self._due is not None and self._due <= now:
            self._pass_time(now)
        if self._life.next_role is not None and self.drained:
            self._out.append(TakeRole(self._life.leave()))
        self.reporter.count(len(self._table), now)
        self._due = earliest(self._table.next_deadline(), self.reporter.deadline())
        out, self._out = self._out, []
        return out

    def deadline(self) -> int | None:
        return self._due

    def _pass_time(self, now: int) -> None:
        for attempt in self._table.expired(now):
            self._expire(attempt)
        if self.reporter.due(now):
            self._out += self.reporter.report(self._num_opening, self._opening_tokens, len(self._table))

    @property
    def num_attempts(self) -> int:
        return len(self._table)

    @property
    def num_ahead(self) -> int:
        return len(self._ahead)

    @property
    def num_queued(self) -> int:
        """Attempts whose source is being leased."""
        return self._num_opening

    @property
    def drained(self) -> bool:
        return self._life.draining and not len(self._table) and not self._ahead

    def check_integrity(self) -> None:
        """Raises AssertionError: the counts agree with the attempts, and each attempt waits for somebody."""
        assert self._num_opening == sum(a.opening for a in self._table)
        assert all(a.opening or a.in_engine for a in self._table)

    # ------------------------------------------------------------------ messages

    def _received(self, event: Received, now: int) -> None:
        handler = self._messages.get(type(event.message))
        if handler is not None:
            handler(event.message, now)
        elif event.sender == CONDUCTOR:
            self._out.extend(self.reporter.received(event.message))

    def _peer_opened(self, event: PeerOpened, now: int) -> None:
        if event.peer == CONDUCTOR:
            self._out.extend(self.reporter.opened(self._num_opening, self._opening_tokens, len(self._table)))

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
        if job.role is Role.PREFILL:
            self._fail(job, "refused", "is a decode instance now")
        elif too_long is not None:
            self._fail(job, "too_long", too_long)
        elif self._life.draining or self._table.full:
            self.num_refused += 1
            self._fail(job, "refused", "draining" if self._life.draining else f"{len(self._table)} attempts already")
        else:
            attempt = _Decode(self._table.new_seq(), job, now)
            self._table.add(attempt)
            if job.source is None:
                self._run(attempt)
            else:
                self._set_opening(attempt, True)
                self._out.append(OpenSource(attempt.seq, job.source, job.tenant))

    def _load_ahead(self, message: LoadAhead, now: int) -> None:
        if len(self._ahead) < MAX_AHEAD and not self._life.draining:
            seq = self._table.new_seq()
            self._ahead[seq] = message
            self._out.append(OpenSource(seq, message.source, message.tenant))

    def _abort(self, message: Abort, now: int) -> None:
        for key in message.keys:
            attempt = self._table.by_key(key)
            if attempt is not None:
                self._leave(attempt)

    def _live_attempts(self, message: LiveAttempts, now: int) -> None:
        for key in message.keys:
            if key not in self._table:
                self._out.append(Send(message.frontend, AttemptFailed(self._name, key, "unknown")))
        for attempt in self._table.unwanted(message.frontend, message.keys, now - STALE_NS):
            self._leave(attempt)

    def _drain(self, message: Drain, now: int) -> None:
        self._life.drain()
        self._out.extend(self.reporter.change_state(InstanceState.DRAINING))

    def _change_role(self, message: ChangeRole, now: int) -> None:
        if self._life.change_role(message):
            self._out.extend(self.reporter.change_state(InstanceState.DRAINING))

    # ------------------------------------------------------------------ source and engine

    def _set_opening(self, attempt: _Decode, opening: bool) -> None:
        attempt.opening = opening
        self._num_opening += 1 if opening else -1
        self._opening_tokens += attempt.job.num_tokens if opening else -attempt.job.num_tokens

    def _source_opened(self, event: SourceOpened, now: int) -> None:
        ahead = self._ahead.get(event.seq)
        if ahead is not None:
            self._ahead_opened(event, ahead)
            return
        attempt = self._table.by_seq(event.seq)
        assert attempt is not None and attempt.job.source is not None
        self._set_opening(attempt, False)
        attempt.opened_tokens = event.num_tokens
        if attempt.leaving:
            self._forget(attempt)
        elif event.num_tokens < attempt.job.source.num_tokens and not attempt.job.allow_in_place:
            self._load_failed(attempt)
        else:
            self._run(attempt)

    def _ahead_opened(self, event: SourceOpened, ahead: LoadAhead) -> None:
        """All or nothing: if some of it is gone, the hand-over will hardly succeed."""
        if event.num_tokens == ahead.source.num_tokens:
            self._out.append(LoadBlocks(event.seq, ahead.source.block_keys, ahead.start))
            return
        del self._ahead[event.seq]
        if event.num_tokens:
            self._out.append(CloseSource(event.seq))

    def _run(self, attempt: _Decode) -> None:
        attempt.in_engine = True
        job = attempt.job
        self._queue.push(attempt.seq, job.tenant, job.weight, job.priority, job.num_tokens)
        _, turn = self._queue.pop()
        run = RunSequence(attempt.seq, job, attempt.opened_tokens, one_token=job.joint, turn=turn)
        self._out.append(run)

    def _engine_progress(self, event: EngineProgress, now: int) -> None:
        self._out += self.reporter.progress(event, now)
        tokens: list[TokenOutput] = []
        for output in event.outputs:
            if isinstance(output, AheadEnded):
                del self._ahead[output.seq]
                self._out.append(CloseSource(output.seq))
                continue
            attempt = self._table.by_seq(output.seq)
            if attempt is None:
                continue
            if isinstance(output, Drawn):
                if not attempt.leaving:
                    tokens.append(attempt.token_output(output, now))
            elif isinstance(output, KvLoaded):
                self._close_source(attempt)
                if not output.ok and not attempt.job.allow_in_place and not attempt.leaving:
                    self._load_failed(attempt)
            elif isinstance(output, SequenceStarted):
                attempt.started_at = now - event.step_ns  # told when its first step was done
                self._queue.served(attempt.seq)
            elif isinstance(output, SequenceFailed):
                self._fail(attempt.job, output.reason, output.detail)
                attempt.leaving = True
            elif isinstance(output, SequenceReleased):
                attempt.in_engine = False
                self._forget(attempt)
        if tokens:
            self._out += group_tokens(self._name, tokens)

    def _load_failed(self, attempt: _Decode) -> None:
        self._fail(attempt.job, "load_failed", "the KV that was handed over cannot be read")
        self._leave(attempt)

    # ------------------------------------------------------------------ leaving

    def _expire(self, attempt: _Decode) -> None:
        if not attempt.leaving:
            self._fail(attempt.job, "deadline", f"not done within {attempt.job.deadline_ns / NANOS_PER_S:g} s")
            self._leave(attempt)

    def _leave(self, attempt: _Decode) -> None:
        if attempt.leaving:
            return
        attempt.leaving = True
        if attempt.in_engine:
            self._out.append(AbortSequence(attempt.seq))
        elif not attempt.opening:
            self._forget(attempt)

    def _forget(self, attempt: _Decode) -> None:
        self._close_source(attempt)
        self._queue.served(attempt.seq)
        self._table.remove(attempt)

    def _close_source(self, attempt: _Decode) -> None:
        if attempt.opened_tokens:
            attempt.opened_tokens = 0
            self._out.append(CloseSource(attempt.seq))

    def _fail(self, job: Job, reason: str, detail: str) -> None:
        self._out.append(Send(job.key.frontend, AttemptFailed(self._name, job.key, reason, detail)))
