"""An engine in virtual time: the real `EngineCore`, steps as long as the cost model says, tokens by a pure function.

It goes round as the live engine thread does (`mooncake.engine.stepped`): take all calls, plan, copy, compute, apply,
tell. When a plan holds for several steps, they are run as one event; a call that comes meanwhile ends the run at the
end of the step that it falls into, where the live thread would have taken it. So every token's time is that of one step
at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import msgspec

from mooncake.core.types import CostModel, Job
from mooncake.engine.attempts import EngineProgress
from mooncake.engine.base import StepItem, StepPlan, StepResult
from mooncake.engine.core import EngineCore, EngineOutput, LoadKv, SequenceReleased, ServiceOutput, StoreKv
from mooncake.engine.simulated import step_ns
from mooncake.sim.loop import Call, Loop

Done = Callable[[bool], None]


class Oracle(Protocol):
    """What the simulated model says, which no policy may know."""

    def token(self, job: Job, choice: int, position: int) -> int: ...

    def num_left(self, job: Job, position: int) -> int:
        """Tokens from `position` to the one that stops the job's own choice, that one included."""
        ...


class Copies(Protocol):
    """Where the engine's KV comes from and goes to."""

    def load(self, command: LoadKv, done: Done) -> None: ...

    def store(self, command: StoreKv, done: Done) -> None: ...


class EngineConfig(msgspec.Struct, frozen=True):
    """one_step: run every plan for a single step, as live. fault: share of steps in which one sequence cannot be computed."""

    cost: CostModel
    one_step: bool = False
    fault: float = 0.0


class _Run:
    """Steps under way. `ends`: when each of them is computed. `waits`: loads that the step cannot end without."""

    __slots__ = ("ends", "failed", "num_steps", "outputs", "plan", "started", "stores", "waits")

    def __init__(self, plan: StepPlan, started: int, ends: list[int], outputs: list[ServiceOutput]) -> None:
        self.plan = plan
        self.started = started
        self.ends = ends
        self.num_steps = len(ends)
        self.outputs = outputs
        self.waits: dict[int, None] = {}
        self.failed: dict[int, None] = {}
        self.stores: list[Call] = []


class SimEngine:
    def __init__(
        self,
        core: EngineCore,
        config: EngineConfig,
        loop: Loop,
        copies: Copies,
        oracle: Oracle,
        tell: Callable[[EngineProgress, list[int]], None],
        chance: Callable[[float], bool],
    ) -> None:
        self.core = core
        self.alive = True
        self._config = config
        self._loop = loop
        self._copies = copies
        self._oracle = oracle
        self._tell = tell
        self._chance = chance
        self._jobs: dict[int, Job] = {}
        self._inbox: list[Call] = []
        self._loads: dict[int, bool | None] = {}
        """How the load of a sequence ended, or None while it is under way."""
        self._run: _Run | None = None
        self._woken = False

    # ------------------------------------------------------------------ calls

    def submit(self, seq: int, job: Job, *, source_tokens: int, one_token: bool, store: bool) -> None:
        self._jobs[seq] = job
        self._call(lambda: self.core.submit(seq, job, source_tokens=source_tokens, one_token=one_token, store=store))

    def abort(self, seq: int) -> None:
        self._call(lambda: self.core.abort(seq))

    def _call(self, call: Call) -> None:
        self._inbox.append(call)
        if self._run is None:
            self._wake()
        else:
            self._cut(self._run)

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.after(0, self._go_round)

    # ------------------------------------------------------------------ one round

    def _go_round(self) -> None:
        self._woken = False
        if not self.alive or self._run is not None:
            return
        calls, self._inbox = self._inbox, []
        for call in calls:
            call()
        plan = self.core.schedule()
        during: list[StoreKv] = []
        outputs = self._perform(self.core.take_outputs(), during)
        if plan is None:
            self._report(outputs, [], 0)
            return
        run = self._run = _Run(plan, self._loop.now, self._step_ends(plan), outputs)
        for item in plan.items:
            if item.num_loading:
                self._wait_for_load(run, item.seq)
        for command in during:
            self._store_during(run, command)
        self._await_end(run)

    def _step_ends(self, plan: StepPlan) -> list[int]:
        """When each step of the run ends. Nobody draws its last token before the last of them."""
        now = self._loop.now
        items, cost = plan.items, self._config.cost
        ends = [now + step_ns(cost, items)]
        if self._config.one_step or plan.horizon == 1:
            return ends
        steps = min(plan.horizon, *(self._oracle.num_left(self._jobs[i.seq], i.start + 1) for i in items))
        context = sum(item.start + 1 for item in items)
        for step in range(1, steps):
            ends.append(ends[-1] + cost.decode_ns(len(items), context + step * len(items)))
        return ends

    def _cut(self, run: _Run) -> None:
        """A call came: the run ends with the step that is being computed."""
        steps = bisect_left(run.ends, self._loop.now, 0, run.num_steps) + 1
        if steps < run.num_steps:
            run.num_steps = steps
            self._await_end(run)

    def _await_end(self, run: _Run) -> None:
        steps = run.num_steps
        self._loop.at(run.ends[steps - 1], lambda: self._end(run, steps))

    def _end(self, run: _Run, steps: int) -> None:
        if self.alive and self._run is run and run.num_steps == steps and not run.waits:
            self._finish(run)

    def _finish(self, run: _Run) -> None:
        self._run = None
        items, steps = run.plan.items, run.num_steps
        if self._chance(self._config.fault):
            run.failed[items[0].seq] = None
        times = run.ends[:steps] if steps > 1 else [self._loop.now]
        tokens = tuple(self._draw(item, steps) if item.sample else () for item in items)
        self.core.update(run.plan, StepResult(tokens, failed=tuple(run.failed)))
        for end_store in run.stores:
            end_store()
        outputs = run.outputs + self._perform(self.core.take_outputs(), [])
        self._report(outputs, times, (self._loop.now - run.started) // steps or 1)
        self._wake()

    def _draw(self, item: StepItem, num_steps: int) -> tuple[int, ...]:
        job, position = self._jobs[item.seq], item.start + item.count
        first = job.key.choice
        if job.joint:
            return tuple(self._oracle.token(job, first + index, position) for index in range(job.num_choices))
        return tuple(self._oracle.token(job, first, position + step) for step in range(num_steps))

    # ------------------------------------------------------------------ copies

    def _perform(self, outputs: list[EngineOutput], during: list[StoreKv]) -> list[ServiceOutput]:
        rest: list[ServiceOutput] = []
        for output in outputs:
            if isinstance(output, LoadKv):
                self._start_load(output)
            elif not isinstance(output, StoreKv):
                rest.append(output)
                if isinstance(output, SequenceReleased):
                    del self._jobs[output.seq]
                    self._loads.pop(output.seq, None)
            elif output.during_step:
                during.append(output)
            else:
                self._copies.store(output, self._stored(output))
        return rest

    def _stored(self, command: StoreKv) -> Done:
        return lambda ok: self._call(lambda: self.core.stored(command.seq, command.start, command.end, ok))

    def _start_load(self, command: LoadKv) -> None:
        seq = command.seq
        self._loads[seq] = None

        def done(ok: bool) -> None:
            self._loads[seq] = ok
            if self._run is not None:
                self._load_ended(self._run, seq, ok)
            self._call(lambda: self.core.loaded(seq, ok))

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
            self._loop.after(0, lambda: self._end(run, 1))

    def _store_during(self, run: _Run, command: StoreKv) -> None:
        """The copy follows the computation layer by layer; it ends when both have, and is void if the computation is."""
        stored = self._stored(command)
        ends: list[bool] = []

        def one_ended(ok: bool) -> None:
            ends.append(ok)
            if len(ends) == 2:
                stored(all(ends))

        self._copies.store(command, one_ended)
        run.stores.append(lambda: one_ended(command.seq not in run.failed))

    # ------------------------------------------------------------------ telling

    def _report(self, outputs: list[ServiceOutput], times: list[int], duration: int) -> None:
        """times: when each step since the last report was computed."""
        added, removed = self.core.pool.drain_changes()
        if outputs or duration or added or removed:
            self._tell(EngineProgress(tuple(outputs), self.core.load, duration, added, removed), times)
