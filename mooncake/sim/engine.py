"""An engine in virtual time: the real `EngineCore`, steps as long as the cost model says, tokens by a pure function.

It goes round as the live engine thread does (`mooncake.engine.stepped`): take all calls, plan, copy, compute, apply,
tell. Two things differ, and neither changes what happens when:

* When a plan holds for several steps, they are run as one event. A run stops between two steps where the live thread would
  take a call, at the end of the step that it falls into, or tell what came up before. It goes on if the plan still holds. So
  every token's time is that of one step at a time.
* Of a sequence that decodes, tokens are told when it has its first, when it ends or leaves the batch, and when somebody is
  about to miss them (`flush`), with the time of each; nobody decides anything by those in between.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from mooncake.core.types import CostModel, Job
from mooncake.engine.attempts import EngineProgress, KvStored
from mooncake.engine.base import StepItem, StepPlan, StepResult
from mooncake.engine.core import (
    AheadEnded,
    Behind,
    Drawn,
    EngineCore,
    LeftBatch,
    LoadKv,
    SequenceReleased,
    ServiceOutput,
    StoreKv,
)
from mooncake.engine.simulated import scaled
from mooncake.sim.loop import Call, Loop
from mooncake.sim.step_times import NUM_STEPS_MAX, RunTimes, StepTimes, Times

Done = Callable[[bool], None]


class Oracle(Protocol):
    """What the simulated model says, which no policy may know."""

    def tokens(self, job: Job, choice: int, first: int, last: int) -> tuple[int, ...]:
        """At the positions [first, last)."""
        ...

    def num_left(self, job: Job, position: int) -> int:
        """Tokens from `position` to the one that stops the job's own choice, that one included."""
        ...


class Copies(Protocol):
    """Where the engine's KV comes from and goes to."""

    def load(self, command: LoadKv, done: Done) -> None: ...

    def store(self, command: StoreKv, done: Done) -> None: ...


class EngineConfig(msgspec.Struct, frozen=True):
    """host_ns: what each step takes on top of the cost model, for planning and telling. one_step: run every plan for a single
    step and tell every token at once, as live. fault: share of steps in which one sequence cannot be computed."""

    cost: CostModel
    host_ns: int = 0
    one_step: bool = False
    fault: float = 0.0


class _Run:
    """Steps under way. `ends`: when each of them is computed; num_passed: how many the engine core knows of; num_steps: after
    how many it stops next. `waits`: loads that the step cannot end without. outputs and the tokens of those who joined are told
    when it stops."""

    __slots__ = (
        "ends", "failed", "joined", "num_passed", "num_steps", "outputs", "plan", "started", "stores", "times", "waits",
    )  # fmt: skip

    def __init__(self, plan: StepPlan, started: int, times: RunTimes, outputs: list[ServiceOutput]) -> None:
        self.plan = plan
        self.started = started
        self.times = times
        self.ends = times.ends
        self.num_steps = len(times.ends)
        self.num_passed = 0
        self.outputs = outputs
        self.joined = plan.joined
        self.waits: dict[int, None] = {}
        self.failed: dict[int, None] = {}
        self.stores: list[tuple[int, Done]] = []

    @property
    def last_step_ns(self) -> int:
        """Of those that have passed; at least 1."""
        before = self.ends[self.num_passed - 2] if self.num_passed > 1 else self.started
        return max(1, self.ends[self.num_passed - 1] - before)


class _Member:
    """A sequence of the decode batch. Its token at position p is drawn by step p - offset of this engine; `end`: how many steps
    there were when it has drawn its last token; told: position of the first token that was not told."""

    __slots__ = ("end", "job", "offset", "told")

    def __init__(self, job: Job, told: int, offset: int, end: int) -> None:
        self.job = job
        self.told = told
        self.offset = offset
        self.end = end


class SimEngine:
    """tell(progress, times): times of the tokens in it, by (request, choice)."""

    def __init__(
        self,
        core: EngineCore,
        config: EngineConfig,
        loop: Loop,
        copies: Copies,
        oracle: Oracle,
        tell: Callable[[EngineProgress | KvStored, dict[tuple[int, int], Times]], None],
        chance: Callable[[float], bool],
    ) -> None:
        self.core = core
        self.alive = True
        self.busy_ns = 0
        self._config = config
        self._step_times = StepTimes(config.cost, config.host_ns)
        self._loop = loop
        self._copies = copies
        self._oracle = oracle
        self._tell = tell
        self._chance = chance
        self._jobs: dict[int, Job] = {}
        self._members: dict[int, _Member] = {}
        self._ends: list[tuple[int, int]] = []
        """(member's end, sequence), earliest first; an entry counts as long as there is such a member."""
        self._step_ends: Times = array("q")
        """When each step so far was computed."""
        self._times: dict[tuple[int, int], Times] = {}
        self._inbox: list[tuple[Call, tuple[Any, ...]]] = []
        self._loads: dict[int, bool | None] = {}
        """How the load of a sequence, or one ahead of it, ended, or None while it is under way."""
        self._load_stores: dict[int, Done] = {}
        """To be told of the end of loads that begin in a moment."""
        self._run: _Run | None = None
        self._woken = False

    # ------------------------------------------------------------------ calls

    def submit(
        self,
        seq: int,
        job: Job,
        *,
        source_tokens: int,
        ssd_tokens: int,
        one_token: bool,
        store: bool,
        stored_tokens: int,
        turn: int,
    ) -> None:
        self._jobs[seq] = job
        self._call(
            lambda: self.core.submit(
                seq,
                job,
                source_tokens=source_tokens,
                ssd_tokens=ssd_tokens,
                one_token=one_token,
                store=store,
                stored_tokens=stored_tokens,
                turn=turn,
            )
        )

    def load_ahead(self, seq: int, block_keys: tuple[bytes, ...], start: int) -> None:
        self._call(self.core.load_ahead, seq, block_keys, start)

    def list_blocks(self) -> None:
        self._call(self._list_blocks)

    def abort(self, seq: int) -> None:
        self._call(self.core.abort, seq)

    def replace_core(self, core: EngineCore, on_replaced: Call) -> None:
        """As `mooncake.engine.stepped.SteppedEngine` does."""
        self._call(self._replace_core, core, on_replaced)

    def job(self, seq: int) -> Job:
        return self._jobs[seq]

    @property
    def busy_so_far_ns(self) -> int:
        """With the part of the present run that is done."""
        return self.busy_ns + (self._loop.now - self._run.started if self._run is not None else 0)

    def set_speed(self, speed: float) -> None:
        """Steps planned from now on run that many times as fast as the cost model says."""
        self._step_times = StepTimes(scaled(self._config.cost, speed), self._config.host_ns)

    def flush(self) -> None:
        """Tell what was computed so far: this process, or somebody who hears it, is about to be lost."""
        run = self._run
        if run is None or not self._members:
            return
        kept_back, self._times = self._times, {}  # of tokens that are told when the run stops
        # The last step of the run may end sequences; that is told when it ends.
        self._pass(run, min(bisect_right(run.ends, self._loop.now, 0, run.num_steps), run.num_steps - 1))
        for seq, member in self._members.items():
            self._tell_member(seq, member, len(self._step_ends))
        self._report(self._perform([]), 0)
        self._times = kept_back

    def _list_blocks(self) -> None:
        added, removed = self.core.pool.drain_changes()
        self._tell(EngineProgress((), self.core.load, 0, added, removed, self.core.pool.cached_keys()), {})

    def _replace_core(self, core: EngineCore, on_replaced: Call) -> None:
        assert self.core.idle and not self._members
        core.continue_counts(self.core)
        self.core = core
        self._ends.clear()  # the new core numbers its sequences from the beginning
        on_replaced()

    def _call(self, call: Call, *arguments: Any) -> None:
        self._inbox.append((call, arguments))
        run = self._run
        if run is None:
            self._wake()
        else:
            self._stop_after(run, max(bisect_left(run.ends, self._loop.now), run.num_passed) + 1)

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.after(0, self._woken_up)

    def _woken_up(self) -> None:
        self._woken = False
        self._go_round()

    # ------------------------------------------------------------------ one round

    def _go_round(self) -> None:
        if not self.alive or self._run is not None:
            return
        self._take_calls()
        plan = self.core.schedule()
        during: list[StoreKv] = []
        outputs = self._perform(during)
        if plan is None:
            self._report(outputs, 0)
            return
        for seq in plan.joined:
            self._join(seq)
        run = self._run = _Run(plan, self._loop.now, self._run_times(plan), outputs)
        for item in plan.items:
            if item.num_loading:
                self._wait_for_load(run, item.seq)
        for command in during:
            run.stores.append((command.seq, self._store_behind(command)))
        self._loop.at(run.ends[-1], self._end, run, run.num_steps)
        if outputs or run.joined:
            self._stop_after(run, 1)

    def _take_calls(self) -> None:
        calls, self._inbox = self._inbox, []
        for call, arguments in calls:
            call(*arguments)

    def _join(self, seq: int) -> None:
        job, num_tokens, clock = self._jobs[seq], self.core.num_tokens(seq), len(self._step_ends)
        left = min(self._oracle.num_left(job, num_tokens), self.core.steps_left(seq))
        self._members[seq] = _Member(job, num_tokens, num_tokens - clock, clock + left)
        heapq.heappush(self._ends, (clock + left, seq))

    def _run_times(self, plan: StepPlan) -> RunTimes:
        """Nobody draws its last token before the last step of a run."""
        now, steps = self._loop.now, 1
        if plan.horizon > 1 and not self._config.one_step:
            steps = min(plan.horizon, self._next_end() - len(self._step_ends), NUM_STEPS_MAX)
        if steps == 1:
            return self._step_times.one(now, plan.items, plan.num_decode, plan.num_context)
        return self._step_times.many(now, plan.num_decode, plan.num_context, steps)

    def _next_end(self) -> int:
        ends = self._ends
        while True:
            end, seq = ends[0]
            member = self._members.get(seq)
            if member is not None and member.end == end:
                return end
            heapq.heappop(ends)

    def _stop_after(self, run: _Run, num_steps: int) -> None:
        if num_steps < run.num_steps:
            run.num_steps = num_steps
            self._loop.at(run.ends[num_steps - 1], self._end, run, num_steps)

    def _stop(self, run: _Run) -> None:
        """Between two steps, tell what has come up, take calls, and go on with the run if they leave its batch as it is."""
        self._pass(run, run.num_steps)
        for seq in run.joined:
            self._tell_member(seq, self._members[seq], len(self._step_ends))
        outputs = run.outputs + self._perform([])
        run.outputs, run.joined = [], ()
        self._report(outputs, run.last_step_ns)
        self._take_calls()
        if not self.core.holds(run.plan):
            self._close(run, StepResult((), num_steps=0))
            self._go_round()
            return
        run.num_steps = len(run.ends)
        run.outputs = self._perform([])
        if run.outputs or self._inbox:
            self._stop_after(run, run.num_passed + 1)

    def _pass(self, run: _Run, num_steps: int) -> None:
        """So many steps of the run are done, and it goes on."""
        if num_steps > run.num_passed:
            self.core.pass_steps(num_steps - run.num_passed)
            self._note_passed(run, num_steps)

    def _note_passed(self, run: _Run, num_steps: int) -> None:
        self._step_ends.extend(run.ends[run.num_passed : num_steps])
        run.num_passed = num_steps

    def _end(self, run: _Run, num_steps: int) -> None:
        if self.alive and self._run is run and run.num_steps == num_steps and not run.waits:
            if num_steps < len(run.ends):
                self._stop(run)
            else:
                self._finish(run)

    def _finish(self, run: _Run) -> None:
        if run.num_steps == 1:
            run.ends = [self._loop.now]  # it may have waited for a load
        new_steps = run.num_steps - run.num_passed
        self._note_passed(run, run.num_steps)
        if self._chance(self._config.fault):
            self._fail_one(run)
        tokens = tuple([self._draw(item) if item.sample else () for item in run.plan.items])
        told = self._told_now(run) if self._members else ()
        self._close(run, StepResult(tokens, failed=tuple(run.failed), num_steps=new_steps, told=told))
        for seq, end_store in run.stores:
            end_store(seq not in run.failed)
        outputs = run.outputs + self._perform([])
        self._report(outputs, run.last_step_ns)
        self._go_round()

    def _close(self, run: _Run, result: StepResult) -> None:
        self._run = None
        self._step_times.ended(run.times, run.num_passed)
        self.busy_ns += self._loop.now - run.started
        self.core.update(run.plan, result)

    def _fail_one(self, run: _Run) -> None:
        """The last step could not compute one sequence; what it drew before is good."""
        items = run.plan.items
        seq = items[0].seq if items else next(iter(self._members), None)
        if seq is not None:
            run.failed[seq] = None
        member = self._members.get(seq) if seq is not None else None
        if seq is not None and member is not None:
            self._tell_member(seq, member, len(self._step_ends) - 1)

    # ------------------------------------------------------------------ tokens

    def _draw(self, item: StepItem) -> tuple[int, ...]:
        """Of a sequence that is not in the batch: the token after its known ones, or one for each choice."""
        job, position = self._jobs[item.seq], item.start + item.count
        key, tokens = job.key, self._oracle.tokens
        time = self._step_ends[-1:]
        for choice in range(key.choice, key.choice + job.num_choices):
            self._times[key.request, choice] = time
        if job.joint:
            choices = range(key.choice, key.choice + job.num_choices)
            return tuple([tokens(job, choice, position, position + 1)[0] for choice in choices])
        return tokens(job, key.choice, position, position + 1)

    def _told_now(self, run: _Run) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Tokens of those that end with this run, of those that have their first, and of those that failed."""
        clock = len(self._step_ends)
        if self._config.one_step:
            due = list(self._members)
        else:
            due = [seq for seq in (*run.joined, *run.failed) if seq in self._members]
            while self._ends and self._ends[0][0] <= clock:
                end, seq = heapq.heappop(self._ends)
                member = self._members.get(seq)
                if member is not None and member.end == end:
                    due.append(seq)
        return tuple([(seq, self._take_tokens(self._members[seq], clock)) for seq in dict.fromkeys(due)])

    def _take_tokens(self, member: _Member, clock: int) -> tuple[int, ...]:
        """All that were drawn by then and not told."""
        first, last = member.told, member.offset + clock
        member.told = last
        key = member.job.key
        self._times[key.request, key.choice] = self._step_ends[first - member.offset : last - member.offset]
        return self._oracle.tokens(member.job, key.choice, first, last)

    def _tell_member(self, seq: int, member: _Member, clock: int) -> None:
        tokens = self._take_tokens(member, clock)
        if tokens:
            self.core.tell(seq, tokens)

    # ------------------------------------------------------------------ copies

    def _perform(self, during: list[StoreKv]) -> list[ServiceOutput]:
        """What the core has put out: begin the copies; give what is the service's business. during: gets the stores that follow
        the next step."""
        rest: list[ServiceOutput] = []
        for output in self.core.take_outputs():
            if isinstance(output, LoadKv):
                self._start_load(output)
            elif isinstance(output, StoreKv):
                if output.behind is Behind.STEP:
                    during.append(output)
                elif output.behind is Behind.LOAD:
                    self._load_stores[output.seq] = self._store_behind(output)
                else:
                    self._copies.store(output, self._stored(output))
            elif isinstance(output, LeftBatch):
                self._leave(output)
                rest += self._perform(during)
            else:
                rest.append(output)
                if isinstance(output, SequenceReleased):
                    self._forget(output.seq)
                elif isinstance(output, AheadEnded):
                    self._loads.pop(output.seq, None)
                elif isinstance(output, Drawn) and output.finish is not None:
                    self._members.pop(output.seq, None)
        return rest

    def _leave(self, command: LeftBatch) -> None:
        member = self._members.pop(command.seq, None)
        if member is not None:  # else it had come with the same plan
            self._tell_member(command.seq, member, command.num_tokens - member.offset)

    def _forget(self, seq: int) -> None:
        del self._jobs[seq]
        self._members.pop(seq, None)
        self._loads.pop(seq, None)

    def _stored(self, command: StoreKv) -> Done:
        def stored(ok: bool) -> None:
            if ok:
                self._tell(KvStored(command.seq, command.start, command.end), {})
            self._call(self.core.stored, command.seq)

        return stored

    def _start_load(self, command: LoadKv) -> None:
        seq = command.seq
        self._loads[seq] = None
        end_store = self._load_stores.pop(seq, None)

        def done(ok: bool) -> None:
            self._loads[seq] = ok
            if end_store is not None:
                end_store(ok)
            if self._run is not None:
                self._load_ended(self._run, seq, ok)
            self._call(self.core.loaded, seq, ok)

        self._copies.load(command, done)

    def _wait_for_load(self, run: _Run, seq: int) -> None:
        ok = self._loads[seq]
        if ok is None:
            run.waits[seq] = None
        elif not ok:
            run.failed[seq] = None

    def _load_ended(self, run: _Run, seq: int, ok: bool) -> None:
        """Layer by layer, load and computation overlap; the step lasts as long as the longer of them."""
        if seq not in run.waits:
            return
        del run.waits[seq]
        if not ok:
            run.failed[seq] = None
        if not run.waits and run.ends[0] <= self._loop.now:
            self._loop.after(0, self._end, run, 1)

    def _store_behind(self, command: StoreKv) -> Done:
        """The copy follows a step or a load layer by layer: it ends when both have, and is void if the other is. To be told how
        that one ended."""
        stored = self._stored(command)
        ends: list[bool] = []

        def one_ended(ok: bool) -> None:
            ends.append(ok)
            if len(ends) == 2:
                stored(all(ends))

        self._copies.store(command, one_ended)
        return one_ended

    # ------------------------------------------------------------------ telling

    def _report(self, outputs: list[ServiceOutput], duration: int) -> None:
        added, removed = self.core.pool.drain_changes()
        if outputs or added or removed:
            times, self._times = self._times, {}
            self._tell(EngineProgress(tuple(outputs), self.core.load, duration, added, removed), times)
