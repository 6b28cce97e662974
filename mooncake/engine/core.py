"""Continuous batching, decided apart from computing: which tokens of which sequences run in the next step.

    submit --> waiting --admit (pages all or nothing)--> loading --> running --> ended
                  ^                                        |            |
                  +------------ preempted <----------------+------------+

Rules:
* Every running sequence whose known tokens are all computed but the last is a *decode* item of one token in each step.
* Up to max_step_tokens prefill tokens come on top, oldest sequence first, in chunks that end on block boundaries, except the
  last of a sequence.
* Waiting sequences hold no pages and are admitted oldest first. The only one that may be overtaken is one whose next block an
  active sequence is loading just now: it waits for that load, and shares the block's pages.
* When a decode item finds no page, the youngest sequence loses its pages and waits again with the tokens it has; so the oldest
  always finishes.
* A joint sequence draws the first tokens of several choices from its last logits and ends.
* Pages belong to whoever still reads or writes them (a step, a load, a store); an aborted sequence frees them after that.

`schedule` makes a plan and `update` applies its outcome; between them sequences may come and go. No clock is read: times are
the caller's business, and the same object runs under the live engine thread and in virtual time.
"""

from __future__ import annotations

import enum
from bisect import insort
from collections.abc import Sequence

import msgspec
import numpy as np

from mooncake.core.types import FinishReason, Job, TokenLogprobs
from mooncake.engine.base import EngineLimits, StepItem, StepPlan, StepResult
from mooncake.engine.page_pool import PagePool


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
    """Copy tokens [start, end) of the sequence's source into its pages; answer with `loaded`."""

    seq: int
    start: int
    end: int
    pages: np.ndarray


class StoreKv(msgspec.Struct, frozen=True):
    """Copy tokens [start, end) from the pages to the sequence's sink; answer with `stored`. during_step: the running step
    computes them, and each layer may be copied as soon as it is there; otherwise all may be copied at once."""

    seq: int
    start: int
    end: int
    pages: np.ndarray
    during_step: bool


class KvLoaded(msgspec.Struct, frozen=True, tag=True):
    """The sequence's source is not needed any more; not ok: it will compute its tokens itself, unless aborted."""

    seq: int
    ok: bool


class KvStored(msgspec.Struct, frozen=True, tag=True):
    """The sink has tokens [start, end)."""

    seq: int
    start: int
    end: int


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


ServiceOutput = Drawn | KvLoaded | KvStored | SequenceStarted | SequenceFailed | SequenceReleased
EngineOutput = LoadKv | StoreKv | ServiceOutput
"""Copies are the engine shell's business; the rest goes on to the service."""


class _State(enum.IntEnum):
    WAITING = 0
    LOADING = 1
    RUNNING = 2
    ENDED = 3


class _Sequence:
    __slots__ = (
        "cached_tokens", "computed", "in_step", "job", "keys", "loading", "loading_keys", "num_published", "num_tokens",
        "one_token", "order", "page_array", "seq", "source_tokens", "started", "state", "storing", "told", "wants_store",
    )  # fmt: skip

    def __init__(
        self, seq: int, job: Job, order: tuple[int, int], source_tokens: int, one_token: bool, store: bool
    ) -> None:
        self.seq = seq
        self.job = job
        self.order = order
        self.source_tokens = source_tokens
        self.one_token = one_token
        self.wants_store = store
        self.keys = job.block_keys
        self.num_tokens = job.num_tokens
        self.state = _State.WAITING
        self.computed = 0
        self.num_published = 0
        self.cached_tokens = 0
        self.started = False
        self.told = False
        self.in_step = False
        self.loading = False
        self.loading_keys: tuple[bytes, ...] = ()
        self.storing = 0
        self.page_array: np.ndarray | None = None

    @property
    def busy(self) -> bool:
        return self.in_step or self.loading or self.storing > 0

    @property
    def remaining(self) -> int:
        """Known tokens that are not computed."""
        return self.num_tokens - self.computed

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.job.num_prompt_tokens


def _by_order(state: _Sequence) -> tuple[int, int]:
    return state.order


class EngineLoad(msgspec.Struct, frozen=True):
    """What there is now; the last three count since the start."""

    num_waiting: int
    waiting_tokens: int
    num_running: int
    context_tokens: int
    free_pages: int
    num_preempted: int = 0
    num_computed_tokens: int = 0
    num_loaded_tokens: int = 0


class EngineCore:
    """overlap_loads: whether a step may run while the load it depends on is under way (layer by layer); true for prefill."""

    def __init__(self, limits: EngineLimits, *, overlap_loads: bool, row_pages: int = 1) -> None:
        if limits.max_step_tokens < limits.block_tokens:
            raise ValueError(f"max_step_tokens {limits.max_step_tokens} is below block_tokens {limits.block_tokens}")
        self.limits = limits
        self.pool = PagePool(limits.num_pages, limits.page_tokens, limits.block_tokens, row_pages)
        self.num_preempted = 0
        self.num_computed_tokens = 0
        self.num_loaded_tokens = 0
        self._longest = min(limits.max_context, limits.num_pages * limits.page_tokens)
        """Tokens of a sequence: one that outgrew all pages would wait for ever, and all others behind it."""
        self._overlap = overlap_loads
        self._seqs: dict[int, _Sequence] = {}
        self._waiting: list[tuple[tuple[int, int], int]] = []
        self._active: dict[int, _Sequence] = {}
        self._loading_blocks: dict[bytes, None] = {}
        """Keys of the full blocks that sequences in state LOADING wait for."""
        self._num_submitted = 0
        self._outputs: list[EngineOutput] = []

    # ------------------------------------------------------------------ coming and going

    def refusal(self, job: Job) -> str | None:
        """Why this engine could never run the job, or None."""
        if job.num_tokens >= self._longest:
            return f"{job.num_tokens} tokens do not fit: a sequence holds at most {self._longest} here"
        return None

    def submit(
        self, seq: int, job: Job, *, source_tokens: int = 0, one_token: bool = False, store: bool = False
    ) -> None:
        """Queue a sequence under a number of the caller's choice. source_tokens: how many leading tokens can be loaded.
        one_token: draw one token, or one for each choice of a joint job, and end (prefill role). store: pass all KV of the
        known tokens to the sink."""
        order = (-job.priority, self._num_submitted)
        self._num_submitted += 1
        self._seqs[seq] = _Sequence(seq, job, order, min(source_tokens, job.num_tokens - 1), one_token, store)
        insort(self._waiting, (order, seq))

    def abort(self, seq: int) -> None:
        """End a sequence without further tokens. Unknown and ended ones are ignored."""
        state = self._seqs.get(seq)
        if state is not None and state.state is not _State.ENDED:
            self._end(state)

    def loaded(self, seq: int, ok: bool) -> None:
        """The load of `LoadKv` ended. A failed one makes the sequence compute its tokens itself."""
        state = self._seqs[seq]
        state.loading = False
        self._outputs.append(KvLoaded(seq, ok))
        if state.state is _State.ENDED:
            self._release_if_idle(state)
        elif not ok:
            if state.state is _State.LOADING:
                self._forget_load(state)
        else:
            self._take_load(state)
            if state.state is _State.LOADING:
                self._run(state)
                state.computed = state.source_tokens
            self._publish(state)

    def stored(self, seq: int, start: int, end: int, ok: bool) -> None:
        """One copy of `StoreKv` ended."""
        state = self._seqs[seq]
        state.storing -= 1
        if ok:
            self._outputs.append(KvStored(seq, start, end))
        self._release_if_idle(state)

    # ------------------------------------------------------------------ steps

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now. Not called again before `update`."""
        self._admit()
        items = self._decode_items()
        num_decode = len(items)
        self._add_prefill_items(items)
        if not items:
            return None
        horizon = self._horizon(items) if num_decode == len(items) and not self._waiting else 1
        for item in items:
            state = self._active[item.seq]
            state.in_step = True
            self._store(state, item.start, min(item.start + item.count, state.job.num_tokens), during_step=True)
        return StepPlan(tuple(items), horizon)

    def update(self, plan: StepPlan, result: StepResult) -> None:
        """Apply the outcome of a step: tokens drawn, ends reached, blocks computed."""
        for index, item in enumerate(plan.items):
            state = self._seqs[item.seq]
            state.in_step = False
            if state.state is _State.ENDED:
                self._release_if_idle(state)
            elif item.num_loading and (item.seq in result.failed or not state.source_tokens):
                self._forget_load(state)
            elif item.seq in result.failed:
                self._outputs.append(
                    SequenceFailed(item.seq, "engine_error", "the engine could not compute this sequence")
                )
                self._end(state)
            else:
                if item.num_loading:
                    self._take_load(state)
                self._run(state)
                tokens = result.tokens[index]
                num_steps = 1 if state.one_token else max(1, len(tokens))
                state.computed = item.start + item.count + num_steps - 1
                self.num_computed_tokens += state.computed - item.start
                self._publish(state)
                if tokens:
                    draw = self._draw_joint if state.job.joint else self._draw
                    draw(state, tokens, result.logprobs[index] if result.logprobs else ())

    def take_outputs(self) -> list[EngineOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    @property
    def load(self) -> EngineLoad:
        waiting = [self._seqs[seq] for _, seq in self._waiting]
        active = self._active.values()
        to_compute = sum(s.num_tokens - s.source_tokens for s in waiting)
        to_compute += sum(s.remaining for s in active if s.remaining > 1)
        return EngineLoad(
            len(waiting),
            to_compute,
            len(active),
            sum(s.num_tokens for s in active),
            self.pool.num_free,
            self.num_preempted,
            self.num_computed_tokens,
            self.num_loaded_tokens,
        )

    @property
    def idle(self) -> bool:
        return not self._seqs

    def check_integrity(self) -> None:
        """Raises AssertionError: pages are held by exactly the active sequences and those still read or written."""
        self.pool.check_integrity()
        expected = {s.seq for s in self._seqs.values() if s.seq in self._active or s.busy}
        assert self.pool.holders() == expected, f"pages held by {self.pool.holders()}, expected {expected}"
        assert all(self._seqs[seq].state is _State.WAITING for _, seq in self._waiting)
        loading = [key for s in self._active.values() if s.state is _State.LOADING for key in s.loading_keys]
        assert sorted(self._loading_blocks) == sorted(loading), "blocks are loaded twice, or waited for in vain"

    # ------------------------------------------------------------------ inside: admission and planning

    def _admit(self) -> None:
        at = 0
        while at < len(self._waiting) and len(self._active) < self.limits.max_batch:
            state = self._seqs[self._waiting[at][1]]
            # At least one token is left to compute: its logits give the next token.
            keys = state.keys[: (state.num_tokens - 1) // self.limits.block_tokens]
            matched = self.pool.match(keys)
            if matched < len(keys) and keys[matched] in self._loading_blocks:
                at += 1
                continue
            if not self.pool.allocate(state.seq, keys[:matched], state.num_tokens):
                return
            del self._waiting[at]
            self._start(state, matched)

    def _start(self, state: _Sequence, num_matched: int) -> None:
        self._active[state.seq] = state
        if not state.started:
            state.started = True
            self._outputs.append(SequenceStarted(state.seq))
        state.page_array = None
        state.num_published = num_matched
        state.computed = state.cached_tokens = num_matched * self.limits.block_tokens
        state.state = _State.RUNNING
        self._store(state, 0, state.computed, during_step=False)
        if state.source_tokens > state.computed:
            state.state = _State.LOADING
            state.loading = True
            state.loading_keys = state.keys[num_matched : state.source_tokens // self.limits.block_tokens]
            self._loading_blocks.update(dict.fromkeys(state.loading_keys))
            self._outputs.append(LoadKv(state.seq, state.computed, state.source_tokens, self._pages(state)))
        elif state.source_tokens:
            state.source_tokens = 0
            self._outputs.append(KvLoaded(state.seq, True))

    def _run(self, state: _Sequence) -> None:
        """To state RUNNING from wherever it is."""
        self._leave_loading(state)
        state.state = _State.RUNNING

    def _leave_loading(self, state: _Sequence) -> None:
        """Whoever waits for its blocks finds them published next time, or else loads them itself."""
        if state.state is _State.LOADING:
            for key in state.loading_keys:
                del self._loading_blocks[key]

    def _take_load(self, state: _Sequence) -> None:
        """The source's tokens are in the pages. A step that waited for them may learn so, and even end the sequence, before
        `loaded` tells."""
        start, end = state.cached_tokens, state.source_tokens
        if start < end:
            self.num_loaded_tokens += end - start
            state.cached_tokens = end
            self._store(state, start, end, during_step=False)

    def _forget_load(self, state: _Sequence) -> None:
        """What cannot be loaded is computed."""
        self._run(state)
        state.source_tokens = 0
        state.computed = state.cached_tokens

    def _decode_items(self) -> list[StepItem]:
        # Oldest first: whoever is preempted on the way comes later in the list and is waiting by then.
        return [
            StepItem(state.seq, state.computed, 1, self._pages(state), sample=True)
            for state in sorted(self._active.values(), key=_by_order)
            if state.state is _State.RUNNING and state.remaining == 1 and self._make_room(state)
        ]

    def _make_room(self, state: _Sequence) -> bool:
        """Pages for all known tokens. The youngest gives way; False if that is `state` itself, or a sequence whose pages
        are being read or written right now (then this step goes on without `state`)."""
        while not self.pool.extend(state.seq, state.num_tokens):
            youngest = max(self._active.values(), key=_by_order)
            if youngest.busy:
                return False
            self._preempt(youngest)
            if youngest is state:
                return False
        return True

    def _preempt(self, state: _Sequence) -> None:
        self.num_preempted += 1
        del self._active[state.seq]
        self.pool.free(state.seq)
        state.state = _State.WAITING
        state.source_tokens = 0
        insort(self._waiting, (state.order, state.seq))

    def _add_prefill_items(self, items: list[StepItem]) -> None:
        budget = self.limits.max_step_tokens
        for state in sorted(self._active.values(), key=_by_order):
            loading = state.state is _State.LOADING
            if (loading and not self._overlap) or (not loading and state.remaining == 1):
                continue
            start = state.source_tokens if loading else state.computed
            count = self._chunk(start, state.num_tokens, budget)
            if count <= 0:
                return
            budget -= count
            sample = start + count == state.num_tokens
            items.append(StepItem(state.seq, start, count, self._pages(state), sample, start if loading else 0))

    def _chunk(self, start: int, end: int, budget: int) -> int:
        """How many tokens from `start` fit into the budget, so that all chunks but the last end on block boundaries."""
        if end - start <= budget:
            return end - start
        boundary = (start + budget) // self.limits.block_tokens * self.limits.block_tokens
        return max(0, boundary - start)

    def _horizon(self, items: Sequence[StepItem]) -> int:
        """Steps until some decode sequence needs another page or must end."""
        horizon = self._longest
        for item in items:
            state = self._active[item.seq]
            if state.one_token:
                return 1
            room = len(self.pool.pages(item.seq)) * self.limits.page_tokens - state.num_tokens + 1
            horizon = min(horizon, room, state.job.max_tokens - state.num_output, self._longest - state.num_tokens)
        return max(1, horizon)

    # ------------------------------------------------------------------ inside: effects on one sequence

    def _pages(self, state: _Sequence) -> np.ndarray:
        pages = self.pool.pages(state.seq)
        if state.page_array is None or len(state.page_array) != len(pages):
            state.page_array = np.array(pages, dtype=np.int64)
        return state.page_array

    def _store(self, state: _Sequence, start: int, end: int, *, during_step: bool) -> None:
        if state.wants_store and end > start:
            state.storing += 1
            self._outputs.append(StoreKv(state.seq, start, end, self._pages(state), during_step))

    def _publish(self, state: _Sequence) -> None:
        num_blocks = min(state.computed // self.limits.block_tokens, len(state.keys))
        for index in range(state.num_published, num_blocks):
            self.pool.publish(state.seq, index, state.keys[index])
        state.num_published = max(state.num_published, num_blocks)

    def _draw(self, state: _Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Tokens at successive positions."""
        position = state.num_tokens
        finish: FinishReason | None = None
        for count, token in enumerate(tokens, start=1):
            state.num_tokens += 1
            finish = self._finish(state, token)
            if finish is not None:
                tokens = tokens[:count]
                break
        choice = state.job.key.choice
        self._outputs.append(
            Drawn(state.seq, position, tokens, finish, logprobs[: len(tokens)], self._tell_cached(state), choice)
        )
        if finish is not None or state.one_token:
            self._end(state)

    def _draw_joint(self, state: _Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Tokens at one position, one for each choice."""
        position = state.num_tokens
        state.num_tokens += 1
        for index, token in enumerate(tokens):
            finish, cached = self._finish(state, token), self._tell_cached(state)
            choice = state.job.key.choice + index
            self._outputs.append(
                Drawn(state.seq, position, (token,), finish, logprobs[index : index + 1], cached, choice)
            )
        self._end(state)

    def _finish(self, state: _Sequence, token: int) -> FinishReason | None:
        """Whether the last of its known tokens, drawn just now, ends the sequence."""
        sampling = state.job.sampling
        if token in sampling.stop_token_ids and state.num_output > sampling.min_tokens:
            return FinishReason.STOP
        if state.num_output >= state.job.max_tokens or state.num_tokens >= self._longest:
            return FinishReason.LENGTH
        return None

    def _tell_cached(self, state: _Sequence) -> int | None:
        """Once for each sequence."""
        if state.told:
            return None
        state.told = True
        return min(state.cached_tokens, state.job.num_prompt_tokens)

    def _end(self, state: _Sequence) -> None:
        if state.state is _State.WAITING:
            self._waiting.remove((state.order, state.seq))
        self._leave_loading(state)
        state.state = _State.ENDED
        if self._active.pop(state.seq, None) is None:
            self._forget(state)
        else:
            self._release_if_idle(state)

    def _release_if_idle(self, state: _Sequence) -> None:
        if state.state is _State.ENDED and not state.busy and state.seq in self._seqs:
            self.pool.free(state.seq)
            self._forget(state)

    def _forget(self, state: _Sequence) -> None:
        del self._seqs[state.seq]
        self._outputs.append(SequenceReleased(state.seq))
