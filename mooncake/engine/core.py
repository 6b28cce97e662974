"""Continuous batching, decided apart from computing: which tokens of which sequences run in the next step.

    submit --> waiting --admit (pages all or nothing)--> loading --> running --> ended
                  ^                                        |            |
                  +------------ preempted <----------------+------------+

Rules:
* Every running sequence whose known tokens are all computed but the last is a *decode* item of one token in each step.
* Up to max_step_tokens prefill tokens come on top, oldest sequence first, in chunks that end on block boundaries, except the
  last of a sequence.
* The *oldest* is the first by turn, priority and submission (`mooncake.engine.sequence.Order`).
* Waiting sequences hold no pages and are admitted oldest first. The only one that may be overtaken is one whose next block an
  active sequence is loading just now: it waits for that load, and shares the block's pages.
* When a decode item finds no page, the youngest sequence loses its pages and waits again with the tokens it has; so the oldest
  always finishes.
* Loads ahead of their sequence (`mooncake.engine.ahead`) get pages only where no sequence waits for any, and keep none.
* A joint sequence draws the first tokens of several choices from its last logits and ends.
* Pages belong to whoever still reads or writes them (a step, a load, a store); an aborted sequence frees them after that.

`schedule` makes a plan and `update` applies its outcome; between them sequences may come and go. No clock is read: times are
the caller's business, and the same object runs under the live engine thread and in virtual time.
"""

from __future__ import annotations

import enum
from bisect import insort

import msgspec
import numpy as np

from mooncake.core.types import FinishReason, Job, ReusedTokens, TokenLogprobs
from mooncake.engine.ahead import AheadLoad, AheadLoads
from mooncake.engine.base import EngineLimits, StepItem, StepPlan, StepResult
from mooncake.engine.page_pool import PagePool
from mooncake.engine.sequence import DecodeBatch, Order, Sequence, State


class Drawn(msgspec.Struct, frozen=True, tag=True):
    """Tokens drawn for a choice of a sequence, the first at absolute `position`. cached_tokens comes with a sequence's first
    output."""

    seq: int
    position: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None
    choice: int = 0


class LoadKv(msgspec.Struct, frozen=True):
    """Copy tokens [start, end) of the source of a sequence, or of a load ahead, into these pages; answer with `loaded`."""

    seq: int
    start: int
    end: int
    pages: np.ndarray


class Behind(enum.IntEnum):
    """What a store follows layer by layer; if that fails, it is void."""

    NOTHING = 0
    STEP = 1
    """The one that comes next, which computes the tokens."""
    LOAD = 2
    """The sequence's load that comes next, which brings them."""


class StoreKv(msgspec.Struct, frozen=True):
    """Copy tokens [start, end) from the pages to the sequence's sink; if it went well tell `KvStored`, and then answer with
    `stored`."""

    seq: int
    start: int
    end: int
    pages: np.ndarray
    behind: Behind


class KvLoaded(msgspec.Struct, frozen=True, tag=True):
    """The sequence's source is not needed any more; not ok: it will compute its tokens itself, unless aborted."""

    seq: int
    ok: bool


class SequenceStarted(msgspec.Struct, frozen=True, tag=True):
    """The sequence got its pages for the first time: waiting is over."""

    seq: int


class SequenceFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not compute the sequence; it is gone. reason as in `AttemptFailed`."""

    seq: int
    reason: str
    detail: str


class SequenceReleased(msgspec.Struct, frozen=True, tag=True):
    """Nobody touches the sequence's pages, source or sink any more. Comes once for every submitted sequence, last."""

    seq: int


class AheadEnded(msgspec.Struct, frozen=True, tag=True):
    """Nobody touches the pages and the source of this load ahead any more. Comes once for each, whatever became of it."""

    seq: int


class LeftBatch(msgspec.Struct, frozen=True):
    """The sequence decodes no more for now, for want of pages; it has num_tokens tokens. An engine that keeps tokens back tells
    them before it goes on."""

    seq: int
    num_tokens: int


ServiceOutput = Drawn | KvLoaded | SequenceStarted | SequenceFailed | SequenceReleased | AheadEnded
EngineOutput = LoadKv | StoreKv | LeftBatch | ServiceOutput
"""Copies and tokens kept back are the engine shell's business; the rest goes on to the service."""


_Fault = tuple[str, str]
"""Reason and detail, see `StepResult.faults`."""
_NOWHERE = np.empty(0, dtype=np.int64)


class EngineLoad(msgspec.Struct, frozen=True):
    """What there is now; the counters of preemptions, of computed, loaded and reused tokens count since the start.
    waiting_context: tokens of the waiting sequences, to be computed or loaded."""

    num_waiting: int
    waiting_tokens: int
    num_running: int
    context_tokens: int
    free_pages: int
    num_preempted: int = 0
    num_computed_tokens: int = 0
    num_loaded_tokens: int = 0
    waiting_context: int = 0
    reused: ReusedTokens = ReusedTokens()


class EngineCore:
    """overlap_loads: whether a step may run while the load it depends on is under way (layer by layer); true for prefill.
    has_memory: whether pages are real. Then plans list the decode batch item by item, and say where the pages are; simulated
    memory needs neither."""

    def __init__(
        self, limits: EngineLimits, *, overlap_loads: bool, row_pages: int | None = 1, has_memory: bool = True
    ) -> None:
        if limits.max_step_tokens < limits.block_tokens:
            raise ValueError(f"max_step_tokens {limits.max_step_tokens} is below block_tokens {limits.block_tokens}")
        self.limits = limits
        self.pool = PagePool(limits.num_pages, limits.page_tokens, limits.block_tokens, row_pages)
        self.num_preempted = 0
        self.num_computed_tokens = 0
        self.num_loaded_tokens = 0
        self.reused = ReusedTokens()
        self._longest = min(limits.max_context, limits.num_pages * limits.page_tokens)
        """Tokens of a sequence: one that outgrew all pages would wait for ever, and all others behind it."""
        self._overlap = overlap_loads
        self._has_memory = has_memory
        self._seqs: dict[int, Sequence] = {}
        self._waiting: list[tuple[Order, int]] = []
        self._waiting_tokens = 0
        self._waiting_context = 0
        self._batch = DecodeBatch()
        self._others: dict[int, Sequence] = {}
        """Sequences with pages that are not in the decode batch: loading, or with tokens to prefill."""
        self._loading_blocks: dict[bytes, None] = {}
        """Keys of the full blocks that sequences in state LOADING, and loads ahead, wait for."""
        self._ahead = AheadLoads(self.pool, self._loading_blocks)
        self._stepping = False
        self._departed: list[Sequence] = []
        """Members of the decode batch that ended during the step."""
        self._num_submitted = 0
        self._outputs: list[EngineOutput] = []

    # ------------------------------------------------------------------ coming and going

    def refusal(self, job: Job) -> str | None:
        """Why this engine could never run the job, or None."""
        if job.num_tokens >= self._longest:
            return f"{job.num_tokens} tokens do not fit: a sequence holds at most {self._longest} here"
        return None

    def submit(
        self,
        seq: int,
        job: Job,
        *,
        source_tokens: int = 0,
        ssd_tokens: int = 0,
        one_token: bool = False,
        store: bool = False,
        stored_tokens: int = 0,
        turn: int = 0,
    ) -> None:
        """Queue a sequence under a number of the caller's choice. source_tokens: how many leading tokens can be loaded;
        ssd_tokens: of these, those that came from SSD for it.
        one_token: draw one token, or one for each choice of a joint job, and end (prefill role). store: pass all KV of the
        known tokens to the sink, but for the leading stored_tokens, which it has. turn: as in `Order`."""
        order = (turn, -job.priority, self._num_submitted)
        self._num_submitted += 1
        source_tokens = min(source_tokens, job.num_tokens - 1)
        state = Sequence(seq, job, order, source_tokens, ssd_tokens, one_token, store, stored_tokens)
        self._seqs[seq] = state
        self._enqueue(state)

    def load_ahead(self, seq: int, block_keys: tuple[bytes, ...], start: int) -> None:
        """Load these leading blocks of a sequence that will come, if there is room and those up to token `start`, which were to
        be loaded before, are still here. Answered by `AheadEnded`."""
        self._ahead.waiting.append(AheadLoad(seq, block_keys, start // self.limits.block_tokens))

    def abort(self, seq: int) -> None:
        """End a sequence without further tokens. Unknown and ended ones are ignored."""
        state = self._seqs.get(seq)
        if state is not None and state.state is not State.ENDED:
            self._end(state)

    def loaded(self, seq: int, ok: bool) -> None:
        """The load of `LoadKv` ended. A failed one makes the sequence compute its tokens itself."""
        if seq in self._ahead.loading:
            self.num_loaded_tokens += self._ahead.end(seq, ok) * self.limits.block_tokens
            self._outputs.append(AheadEnded(seq))
            return
        state = self._seqs[seq]
        state.loading = False
        self._outputs.append(KvLoaded(seq, ok))
        if state.state is State.ENDED:
            self._release_if_idle(state)
        elif not ok:
            if state.state is State.LOADING:
                self._forget_load(state)
        else:
            self._take_load(state)
            if state.state is State.LOADING:
                self._run(state)
                state.computed = state.source_tokens
            self._publish(state)

    def stored(self, seq: int) -> None:
        """One copy of `StoreKv` ended, well or not. The engine's shell tells the service itself, at once: a hand-over must not
        wait for the step that runs meanwhile."""
        state = self._seqs[seq]
        state.storing -= 1
        self._release_if_idle(state)

    # ------------------------------------------------------------------ steps

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now. Not called again before `update`."""
        self._let_in()
        batch = self._batch
        joined = self._join() if self._others else []
        self._look_at_due()
        items = self._decode_items() if self._has_memory else []
        num_listed = len(items)
        if self._others:
            self._add_prefill_items(items)
        if not items and not batch.members:
            return None
        for item in items[num_listed:]:
            state = self._seqs[item.seq]
            state.in_step = True
            self._store(state, item.start, min(item.start + item.count, state.job.num_tokens), Behind.STEP)
        self._stepping = True
        horizon = batch.horizon if len(items) == num_listed else 1
        return StepPlan(
            tuple(items),
            horizon,
            len(batch.members),
            batch.context_tokens,
            tuple([seq for seq in joined if seq in batch.members]),
        )

    def holds(self, plan: StepPlan) -> bool:
        """Between two steps of a run of the decode batch: let in who can come, and tell whether the plan stays as it is: nobody
        has left the batch, and nobody else can compute."""
        self._let_in()
        return len(self._batch.members) == plan.num_decode and not any(map(self._can_compute, self._others.values()))

    def pass_steps(self, num_steps: int) -> None:
        """So many steps of the decode batch are done, in which nobody ended or failed. `update` has those that follow."""
        self._batch.clock += num_steps
        self.num_computed_tokens += num_steps * len(self._batch.members)

    def update(self, plan: StepPlan, result: StepResult) -> None:
        """Apply the outcome of a step or run: tokens drawn, ends reached, blocks computed."""
        self._stepping = False
        self.pass_steps(result.num_steps)
        for state in self._departed:
            state.in_step = False
            self._release_if_idle(state)
        self._departed.clear()
        num_listed = plan.num_decode if self._has_memory else 0
        faults = result.faults()
        for index, item in enumerate(plan.items):
            logprobs = result.logprobs[index] if result.logprobs else ()
            if index < num_listed:
                self._update_member(item.seq, result.tokens[index], logprobs, faults.get(item.seq))
            else:
                self._update_other(item, result.tokens[index], logprobs, faults.get(item.seq))
        for seq, tokens in result.told:
            self._update_member(seq, tokens, (), faults.get(seq))

    def _update_member(
        self, seq: int, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...], fault: _Fault | None
    ) -> None:
        state = self._batch.members.get(seq)
        if state is None:  # ended during the step
            return
        if fault is not None:
            self._fault(state, fault)
            return
        state.num_tokens = self._batch.num_tokens(state)
        self._draw(state, tokens, logprobs)

    def _update_other(
        self, item: StepItem, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...], fault: _Fault | None
    ) -> None:
        state = self._seqs[item.seq]
        state.in_step = False
        if state.state is State.ENDED:
            self._release_if_idle(state)
        elif item.num_loading and (fault is not None or not state.source_tokens):
            self._forget_load(state)
        elif fault is not None:
            self._fault(state, fault)
        else:
            if item.num_loading:
                self._take_load(state)
            self._run(state)
            state.computed = item.start + item.count
            self.num_computed_tokens += item.count
            self._publish(state)
            if tokens:
                state.num_tokens += 1
                if state.job.joint:
                    self._draw_joint(state, tokens, logprobs)
                else:
                    self._draw(state, tokens, logprobs)

    def tell(self, seq: int, tokens: tuple[int, ...]) -> None:
        """Pass on tokens that were kept back; none of them ends the sequence. They may be of steps that `update` still has to
        learn of."""
        state = self._seqs[seq]
        position = state.told
        state.told += len(tokens)
        cached = self._tell_cached(state)
        self._outputs.append(Drawn(seq, position, tokens, None, (), cached, state.job.key.choice))

    def take_outputs(self) -> list[EngineOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def num_tokens(self, seq: int) -> int:
        """Known tokens of a member of the decode batch."""
        return self._batch.num_tokens(self._batch.members[seq])

    def steps_left(self, seq: int) -> int:
        """Until this member of the decode batch reaches its limit of tokens."""
        state = self._batch.members[seq]
        return self._end_tokens(state) - self._batch.num_tokens(state)

    @property
    def load(self) -> EngineLoad:
        to_compute, context = self._waiting_tokens, self._batch.context_tokens
        for state in self._others.values():
            context += state.num_tokens
            if state.remaining > 1:
                to_compute += state.remaining
        return EngineLoad(
            len(self._waiting),
            to_compute,
            len(self._batch.members) + len(self._others),
            context,
            self.pool.num_free,
            self.num_preempted,
            self.num_computed_tokens,
            self.num_loaded_tokens,
            self._waiting_context,
            self.reused,
        )

    def continue_counts(self, other: EngineCore) -> None:
        """Count on from what the same engine did with another core."""
        self.num_preempted = other.num_preempted
        self.num_computed_tokens = other.num_computed_tokens
        self.num_loaded_tokens = other.num_loaded_tokens
        self.reused = other.reused

    @property
    def idle(self) -> bool:
        return not self._seqs and not len(self._ahead)

    def check_integrity(self) -> None:
        """Raises AssertionError: pages are held by exactly the active sequences and those still read or written."""
        self.pool.check_integrity()
        self._batch.check_integrity()
        members, others = self._batch.members, self._others
        expected = {s.seq for s in self._seqs.values() if s.seq in members or s.seq in others or s.busy}
        expected |= self._ahead.loading.keys()
        assert self.pool.holders() == expected, f"pages held by {self.pool.holders()}, expected {expected}"
        waiting = [self._seqs[seq] for _, seq in self._waiting]
        assert all(state.state is State.WAITING for state in waiting)
        assert self._waiting_tokens == sum(s.num_tokens - s.source_tokens for s in waiting)
        assert self._waiting_context == sum(s.num_tokens for s in waiting)
        assert all(state.state is State.DECODING for state in members.values())
        assert all(state.state in (State.LOADING, State.RUNNING) for state in others.values())
        loading = [key for s in others.values() if s.state is State.LOADING for key in s.loading_keys]
        loading += self._ahead.loading_keys()
        assert sorted(self._loading_blocks) == sorted(loading), "blocks are loaded twice, or waited for in vain"

    # ------------------------------------------------------------------ inside: admission

    def _enqueue(self, state: Sequence) -> None:
        state.state = State.WAITING
        self._waiting_tokens += state.num_tokens - state.source_tokens
        self._waiting_context += state.num_tokens
        insort(self._waiting, (state.order, state.seq))

    def _dequeue(self, at: int) -> Sequence:
        state = self._seqs[self._waiting.pop(at)[1]]
        self._waiting_tokens -= state.num_tokens - state.source_tokens
        self._waiting_context -= state.num_tokens
        return state

    def _let_in(self) -> None:
        room = self._admit() if self._waiting else True
        if self._ahead.waiting:
            self._start_ahead(room)

    def _admit(self) -> bool:
        """False: somebody goes on waiting, for want of pages or of a place in the batch."""
        at = 0
        block_tokens, pool = self.limits.block_tokens, self.pool
        while at < len(self._waiting) and len(self._others) + len(self._batch.members) < self.limits.max_batch:
            state = self._seqs[self._waiting[at][1]]
            # At least one token is left to compute: its logits give the next token.
            keys = state.keys[: (state.num_tokens - 1) // block_tokens]
            matched = pool.match(keys)
            if matched < len(keys) and keys[matched] in self._loading_blocks:
                at += 1
                continue
            if not pool.allocate(state.seq, keys[:matched], state.num_tokens):
                return False
            self._start(self._dequeue(at), matched)
        return at == len(self._waiting)

    def _start_ahead(self, room: bool) -> None:
        started, dropped = self._ahead.start(room)
        for load in started:
            pages = np.array(self.pool.pages(load.seq), dtype=np.int64) if self._has_memory else _NOWHERE
            start, end = (blocks * self.limits.block_tokens for blocks in (load.first, len(load.keys)))
            self._outputs.append(LoadKv(load.seq, start, end, pages))
        self._outputs += [AheadEnded(seq) for seq in dropped]

    def _start(self, state: Sequence, num_matched: int) -> None:
        self._others[state.seq] = state
        if not state.started:
            state.started = True
            self._outputs.append(SequenceStarted(state.seq))
        state.page_array = None
        state.num_published = num_matched
        state.computed = state.cached_tokens = state.own_tokens = num_matched * self.limits.block_tokens
        state.state = State.RUNNING
        self._store(state, 0, state.computed, Behind.NOTHING)
        if state.source_tokens > state.computed:
            state.state = State.LOADING
            state.loading = True
            state.loading_keys = state.keys[num_matched : state.source_tokens // self.limits.block_tokens]
            self._loading_blocks.update(dict.fromkeys(state.loading_keys))
            self._store(state, state.computed, state.source_tokens, Behind.LOAD)
            self._outputs.append(LoadKv(state.seq, state.computed, state.source_tokens, self._pages(state)))
        elif state.source_tokens:
            state.source_tokens = 0
            self._outputs.append(KvLoaded(state.seq, True))

    def _run(self, state: Sequence) -> None:
        """To state RUNNING from wherever it is."""
        self._leave_loading(state)
        state.state = State.RUNNING

    def _leave_loading(self, state: Sequence) -> None:
        """Whoever waits for its blocks finds them published next time, or else loads them itself."""
        if state.state is State.LOADING:
            for key in state.loading_keys:
                del self._loading_blocks[key]

    def _take_load(self, state: Sequence) -> None:
        """The source's tokens are in the pages. A step that waited for them may learn so, and even end the sequence, before
        `loaded` tells."""
        start, end = state.cached_tokens, state.source_tokens
        if start < end:
            self.num_loaded_tokens += end - start
            state.cached_tokens = end

    def _forget_load(self, state: Sequence) -> None:
        """What cannot be loaded is computed."""
        self._run(state)
        state.source_tokens = 0
        state.computed = state.cached_tokens

    # ------------------------------------------------------------------ inside: the decode batch

    def _join(self) -> list[int]:
        """Whose known tokens are all computed but the last joins the batch, unless it is to draw no more than one token."""
        found = [
            state
            for state in self._others.values()
            if state.state is State.RUNNING and state.num_tokens - state.computed == 1 and not state.one_token
        ]
        for state in found:
            del self._others[state.seq]
            state.state = State.DECODING
            self._batch.join(state)
            self._batch.set_due(state, self._batch.clock)
        return [state.seq for state in found]

    def _look_at_due(self) -> None:
        """Oldest first: whoever is preempted on the way comes later and is waiting by then."""
        batch = self._batch
        for state in batch.take_due():
            if state.state is State.DECODING:
                if state.num_published < len(state.keys):
                    state.computed = batch.num_tokens(state) - 1
                    self._publish(state)
                if self._make_room(state):
                    batch.set_due(state, self._next_due(state))

    def _next_due(self, state: Sequence) -> int:
        """The clock at which it reaches its limit or the end of its pages, or has computed the last block that has a key."""
        room = len(self.pool.pages(state.seq)) * self.limits.page_tokens + 1
        due = min(room, self._end_tokens(state)) - state.offset
        return self._batch.clock + 1 if state.num_published < len(state.keys) else due

    def _end_tokens(self, state: Sequence) -> int:
        """How long it can become."""
        return min(state.job.num_prompt_tokens + state.job.max_tokens, self._longest)

    def _make_room(self, state: Sequence) -> bool:
        """Pages for all known tokens of a member. The youngest gives way; False if that is `state` itself, or a sequence whose
        pages are being read or written right now, or a load ahead (then this step goes on without `state`)."""
        batch = self._batch
        while not self.pool.extend(state.seq, batch.num_tokens(state)):
            youngest = max((*batch.members.values(), *self._others.values()), key=_by_order)
            if youngest.busy or self._ahead.loading:
                self._leave_batch(state)
                state.state = State.RUNNING
                self._others[state.seq] = state
                return False
            self._preempt(youngest)
            if youngest is state:
                return False
        return True

    def _preempt(self, state: Sequence) -> None:
        self.num_preempted += 1
        if state.state is State.DECODING:
            self._leave_batch(state)
        else:
            del self._others[state.seq]
        self.pool.free(state.seq)
        state.source_tokens = 0
        self._enqueue(state)

    def _leave_batch(self, state: Sequence) -> None:
        self._batch.leave(state)
        self._outputs.append(LeftBatch(state.seq, state.num_tokens))

    # ------------------------------------------------------------------ inside: planning

    def _decode_items(self) -> list[StepItem]:
        return [
            StepItem(state.seq, self._batch.num_tokens(state) - 1, 1, self._pages(state), sample=True)
            for state in sorted(self._batch.members.values(), key=_by_order)
        ]

    def _add_prefill_items(self, items: list[StepItem]) -> None:
        budget = self.limits.max_step_tokens
        for state in sorted(self._others.values(), key=_by_order):
            loading = state.state is State.LOADING
            if loading and not self._overlap:
                continue
            if state.remaining == 1 and not (state.one_token or loading):
                continue  # there was no page for it
            start = state.source_tokens if loading else state.computed
            count = self._chunk(start, state.num_tokens, budget)
            if count <= 0:
                return
            budget -= count
            sample = start + count == state.num_tokens
            items.append(StepItem(state.seq, start, count, self._pages(state), sample, start if loading else 0))

    def _can_compute(self, state: Sequence) -> bool:
        """Of those with pages that are not in the decode batch."""
        return state.state is State.RUNNING or self._overlap

    def _chunk(self, start: int, end: int, budget: int) -> int:
        """How many tokens from `start` fit into the budget, so that all chunks but the last end on block boundaries."""
        if end - start <= budget:
            return end - start
        boundary = (start + budget) // self.limits.block_tokens * self.limits.block_tokens
        return max(0, boundary - start)

    # ------------------------------------------------------------------ inside: effects on one sequence

    def _pages(self, state: Sequence) -> np.ndarray:
        if not self._has_memory:
            return _NOWHERE
        pages = self.pool.pages(state.seq)
        if state.page_array is None or len(state.page_array) != len(pages):
            state.page_array = np.array(pages, dtype=np.int64)
        return state.page_array

    def _store(self, state: Sequence, start: int, end: int, behind: Behind) -> None:
        start = max(start, state.stored_tokens)
        if state.wants_store and end > start:
            state.storing += 1
            self._outputs.append(StoreKv(state.seq, start, end, self._pages(state), behind))

    def _publish(self, state: Sequence) -> None:
        first = state.num_published
        last = min(state.computed // self.limits.block_tokens, len(state.keys))
        if last > first:
            self.pool.publish(state.seq, first, state.keys[first:last])
            state.num_published = last

    def _draw(self, state: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        """All tokens from the first untold one to the last known one."""
        position, state.told = state.told, state.num_tokens
        assert len(tokens) == state.told - position, "the engine kept tokens back, or told some twice"
        finish = self._finish(state, tokens[-1])
        self._outputs.append(
            Drawn(state.seq, position, tokens, finish, logprobs, self._tell_cached(state), state.job.key.choice)
        )
        if finish is not None or state.one_token:
            self._end(state)

    def _draw_joint(self, state: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Tokens at one position, one for each choice."""
        position = state.told
        for index, token in enumerate(tokens):
            finish, cached = self._finish(state, token), self._tell_cached(state)
            choice = state.job.key.choice + index
            self._outputs.append(
                Drawn(state.seq, position, (token,), finish, logprobs[index : index + 1], cached, choice)
            )
        self._end(state)

    def _finish(self, state: Sequence, token: int) -> FinishReason | None:
        """Whether the last of its known tokens ends the sequence."""
        job, num_tokens = state.job, state.num_tokens
        if token in job.sampling.stop_token_ids and num_tokens - job.num_prompt_tokens > job.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self._end_tokens(state) else None

    def _tell_cached(self, state: Sequence) -> int | None:
        """Once for each sequence."""
        if state.told_cached:
            return None
        state.told_cached = True
        job = state.job
        cached = min(state.cached_tokens, job.num_prompt_tokens)
        if job.num_tokens == job.num_prompt_tokens:  # else it is handed over, or computed again
            own = min(state.own_tokens, cached)
            ssd = min(state.ssd_tokens, cached - own)
            self.reused += ReusedTokens(job.num_prompt_tokens, own, cached - own - ssd, ssd)
        return cached

    def _fault(self, state: Sequence, fault: _Fault) -> None:
        self._outputs.append(SequenceFailed(state.seq, *fault))
        state.num_published = len(state.keys)  # what it has is not to be trusted
        self._end(state)

    def _end(self, state: Sequence) -> None:
        if state.state is State.WAITING:
            self._dequeue(self._waiting.index((state.order, state.seq)))
            state.state = State.ENDED
            self._forget(state)
            return
        if state.state is State.DECODING:
            self._batch.leave(state)
            if self._stepping:
                state.in_step = True
                self._departed.append(state)
            else:
                self._publish(state)
        else:
            self._leave_loading(state)
            del self._others[state.seq]
        state.state = State.ENDED
        self._release_if_idle(state)

    def _release_if_idle(self, state: Sequence) -> None:
        if state.state is State.ENDED and not state.busy and state.seq in self._seqs:
            self.pool.free(state.seq)
            self._forget(state)

    def _forget(self, state: Sequence) -> None:
        del self._seqs[state.seq]
        self._outputs.append(SequenceReleased(state.seq))


def _by_order(state: Sequence) -> Order:
    return state.order
