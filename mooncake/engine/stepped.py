"""A StepEngine and the EngineCore that plans its steps, run by a thread of their own: together they are an Engine.

The thread drains its inbox, plans, runs the step, applies the outcome and passes on what happened; it sleeps when there is
nothing to compute. The service's event loop is never waited for.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Mapping

from mooncake.core.types import CostModel, Job, Role, bytes_to_tokens
from mooncake.engine.attempts import EngineProgress, KvStored
from mooncake.engine.base import (
    EngineLimits,
    KvReader,
    KvWriter,
    LayerLoad,
    SourceKvReader,
    StepEngine,
    StepPlan,
    StepResult,
)
from mooncake.engine.core import (
    AheadEnded,
    Behind,
    EngineCore,
    EngineOutput,
    LeftBatch,
    LoadKv,
    SequenceReleased,
    ServiceOutput,
    StoreKv,
)
from mooncake.engine.host import EngineCounts, OnFailure, OnProgress
from mooncake.engine.kv_mover import Interval, KvMover, LoadTask, StoreTask
from mooncake.engine.threads import start_thread

log = logging.getLogger(__name__)

_Call = Callable[[], None]


class SteppedHost:
    """An `EngineHost` of a StepEngine."""

    stores_itself = False

    def __init__(self, step_engine: StepEngine) -> None:
        self.layout = step_engine.layout
        self.limits = step_engine.limits
        self._step_engine = step_engine
        self._core: EngineCore | None = None
        self._engine: SteppedEngine | None = None

    def measure(self) -> CostModel:
        return self._step_engine.measure()

    def start(self, role: Role, limits: EngineLimits, on_progress: OnProgress, on_failure: OnFailure) -> SteppedEngine:
        self._core = _core(role, limits)
        self._engine = SteppedEngine(self._core, self._step_engine, on_progress, on_failure)
        return self._engine

    def counts(self) -> EngineCounts:
        engine = self._engine
        assert engine is not None
        mover = engine.mover
        return EngineCounts(engine.core.load, engine.num_steps, engine.steps_ns, mover.bytes_loaded, mover.bytes_stored)

    def refusal(self, job: Job) -> str | None:
        assert self._core is not None
        return self._core.refusal(job)

    def take_role(self, role: Role, limits: EngineLimits, on_replaced: Callable[[], None]) -> None:
        assert self._engine is not None
        self._core = _core(role, limits)
        self._engine.replace_core(self._core, on_replaced)


def _core(role: Role, limits: EngineLimits) -> EngineCore:
    row_pages = max(1, limits.num_pages // limits.max_batch)
    return EngineCore(limits, overlap_loads=role is Role.PREFILL, row_pages=row_pages)


class SteppedEngine:
    """on_progress and on_failure are called from the engine thread or a copying one. on_failure(error): the engine is
    broken and will not run again; the process should end and be restarted.

    record: keeps the intervals in which layers were loaded, computed and stored; None: not kept."""

    def __init__(
        self,
        core: EngineCore,
        step_engine: StepEngine,
        on_progress: Callable[[EngineProgress | KvStored], None],
        on_failure: Callable[[BaseException], None],
        record: Callable[[Interval], None] | None = None,
    ) -> None:
        self.core = core
        self._engine = step_engine
        self._on_progress = on_progress
        self._on_failure = on_failure
        self._record = record
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._readers: dict[int, KvReader] = {}
        self._writers: dict[int, KvWriter] = {}
        self._loads: dict[int, LoadTask] = {}
        self.num_steps = 0
        self.steps_ns = 0
        self._step_stores: list[StoreTask] = []
        self._load_stores: dict[int, StoreTask] = {}
        """Of loads that begin in a moment."""
        self._busy = False
        self.mover = KvMover(
            step_engine, core.limits.block_tokens, self._load_ended, self._store_ended, on_failure, record
        )
        self._thread = start_thread("engine", self._run)

    # ------------------------------------------------------------------ from any thread

    def submit(
        self,
        seq: int,
        job: Job,
        *,
        one_token: bool,
        reader: SourceKvReader | None = None,
        writer: KvWriter | None = None,
        turn: int = 0,
    ) -> None:
        self._inbox.put(lambda: self._submit(seq, job, one_token, reader, writer, turn))

    def load_ahead(self, seq: int, block_keys: tuple[bytes, ...], start: int, reader: KvReader) -> None:
        self._inbox.put(lambda: self._load_ahead(seq, block_keys, start, reader))

    def list_blocks(self) -> None:
        self._inbox.put(self._list_blocks)

    def abort(self, seq: int) -> None:
        self._inbox.put(lambda: self._abort(seq))
        self._drop_load(seq)  # a step may be waiting for it

    def replace_core(self, core: EngineCore, on_replaced: Callable[[], None]) -> None:
        """Go on with another core, when all sequences have been released; what their pages hold is forgotten. on_replaced is
        called from the engine thread, after all that was told of the old core."""
        self._inbox.put(lambda: self._replace_core(core, on_replaced))

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()
        self.mover.close()
        self._engine.close()

    # ------------------------------------------------------------------ in the engine thread

    def _submit(
        self, seq: int, job: Job, one_token: bool, reader: SourceKvReader | None, writer: KvWriter | None, turn: int
    ) -> None:
        tokens = bytes_to_tokens(job.token_ids)
        self._engine.add_sequence(seq, tokens, job.num_prompt_tokens, job.sampling, job.key.choice, job.num_choices)
        if reader is not None:
            self._readers[seq] = reader
        if writer is not None:
            self._writers[seq] = writer
        self.core.submit(
            seq,
            job,
            source_tokens=0 if reader is None else reader.num_tokens,
            ssd_tokens=0 if reader is None else reader.ssd_tokens,
            one_token=one_token,
            store=writer is not None,
            stored_tokens=0 if writer is None else writer.num_stored * self.core.limits.block_tokens,
            turn=turn,
        )

    def _load_ahead(self, seq: int, block_keys: tuple[bytes, ...], start: int, reader: KvReader) -> None:
        self._readers[seq] = reader
        self.core.load_ahead(seq, block_keys, start)

    def _list_blocks(self) -> None:
        added, removed = self.core.pool.drain_changes()
        self._on_progress(EngineProgress((), self.core.load, 0, added, removed, self.core.pool.cached_keys()))

    def _abort(self, seq: int) -> None:
        self.core.abort(seq)
        self._drop_load(seq)  # it may have begun since `abort` looked

    def _replace_core(self, core: EngineCore, on_replaced: Callable[[], None]) -> None:
        assert self.core.idle
        core.continue_counts(self.core)
        self.core = core
        on_replaced()

    def _drop_load(self, seq: int) -> None:
        """Nobody wants it any more, but it would hold the sequence's pages and keep the loads behind it waiting."""
        task = self._loads.get(seq)
        if task is not None:
            task.fail()

    def _run(self) -> None:
        try:
            while self._drain():
                plan = self.core.schedule()
                outputs = self._perform(self.core.take_outputs())
                step_ns = 0
                if plan is not None:
                    step_ns = self._step(plan)
                    outputs += self._perform(self.core.take_outputs())
                self._tell(outputs, step_ns)
                self._busy = plan is not None
        except BaseException as error:  # the boundary of the thread: whoever owns the process must hear of it
            log.exception("the engine failed")
            self._on_failure(error)

    def _drain(self) -> bool:
        """Do all that came in; wait for something if the last round computed nothing. False: close."""
        block = not self._busy
        while True:
            try:
                call = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()
            block = False

    def _step(self, plan: StepPlan) -> int:
        began = time.monotonic_ns()
        stores, self._step_stores = self._step_stores, []
        trace = None if self._record is None else _ComputeTrace(self._record)
        loads = self._loads if trace is None else trace.around(self._loads)
        result = self._engine.run(plan, self._layer_hook(stores, trace), loads)
        for task in stores:
            self.mover.finish_store(task, task.seq not in result.failed)
        self.core.update(plan, _one_step(plan, result))
        step_ns = result.step_ns or time.monotonic_ns() - began
        self.num_steps += 1
        self.steps_ns += step_ns
        return step_ns

    def _layer_hook(self, stores: list[StoreTask], trace: _ComputeTrace | None) -> Callable[[int], None] | None:
        if trace is None and not stores:
            return None

        def hook(layer: int) -> None:
            for task in stores:
                self.mover.store_layer(task, layer)
            if trace is not None:
                trace.pause(layer)
                trace.go_on()

        return hook

    def _perform(self, outputs: list[EngineOutput]) -> list[ServiceOutput]:
        """Start the copies that the core asked for; return what is the service's business."""
        rest: list[ServiceOutput] = []
        for output in outputs:
            if isinstance(output, LoadKv):
                self._start_load(output)
            elif isinstance(output, StoreKv):
                self._start_store(output)
            elif not isinstance(output, LeftBatch):
                if isinstance(output, SequenceReleased):
                    self._engine.remove_sequence(output.seq)
                    self._forget(output.seq)
                elif isinstance(output, AheadEnded):
                    self._forget(output.seq)
                rest.append(output)
        return rest

    def _start_load(self, output: LoadKv) -> None:
        seq = output.seq
        store = self._load_stores.pop(seq, None)
        task = LoadTask(seq, output.start, output.end, output.pages, self._readers[seq], store)
        self._loads[seq] = task
        self.mover.load(task)

    def _start_store(self, output: StoreKv) -> None:
        task = StoreTask(output.seq, output.start, output.end, output.pages, self._writers[output.seq])
        if output.behind is Behind.STEP:
            self._step_stores.append(task)
        elif output.behind is Behind.LOAD:
            self._load_stores[output.seq] = task
        else:
            self.mover.store(task)

    def _forget(self, seq: int) -> None:
        self._readers.pop(seq, None)
        self._writers.pop(seq, None)
        self._loads.pop(seq, None)

    def _tell(self, outputs: list[ServiceOutput], step_ns: int) -> None:
        added, removed = self.core.pool.drain_changes()
        if outputs or step_ns or added or removed:
            self._on_progress(EngineProgress(tuple(outputs), self.core.load, step_ns, added, removed))

    # ------------------------------------------------------------------ from the copying threads

    def _load_ended(self, task: LoadTask) -> None:
        self._inbox.put(lambda: self.core.loaded(task.seq, task.ok))

    def _store_ended(self, task: StoreTask) -> None:
        if task.ok:
            self._on_progress(KvStored(task.seq, task.start, task.end))
        self._inbox.put(lambda: self.core.stored(task.seq))


class _ComputeTrace:
    """Records the computing of one step: all its time up to the last layer's KV but the waits for loads."""

    def __init__(self, record: Callable[[Interval], None]) -> None:
        self._record = record
        self.go_on()

    def go_on(self) -> None:
        self._began = time.monotonic_ns()

    def pause(self, layer: int) -> None:
        self._record(Interval("compute", -1, layer, self._began, time.monotonic_ns()))

    def around(self, loads: Mapping[int, LayerLoad]) -> dict[int, LayerLoad]:
        return {seq: _TracedLoad(load, self) for seq, load in loads.items()}


class _TracedLoad:
    """A load that the step's trace pauses for."""

    def __init__(self, load: LayerLoad, trace: _ComputeTrace) -> None:
        self._load = load
        self._trace = trace

    def wait(self, layer: int) -> bool:
        self._trace.pause(layer)
        ok = self._load.wait(layer)
        self._trace.go_on()
        return ok


def _one_step(plan: StepPlan, result: StepResult) -> StepResult:
    """Check what a StepEngine returned: its result must fit the plan, or tokens would go to the wrong sequence."""
    if len(result.tokens) != len(plan.items):
        raise RuntimeError(f"the engine returned {len(result.tokens)} results for {len(plan.items)} items")
    return result
