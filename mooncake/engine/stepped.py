"""A StepEngine and the EngineCore that plans its steps, run by a thread of their own: together they are an Engine.

The thread drains its inbox, plans, runs the step, applies the outcome and passes on what happened; it sleeps when there is
nothing to compute. The service's event loop is never waited for.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable

from mooncake.core.types import Job, bytes_to_tokens
from mooncake.engine.attempts import EngineProgress
from mooncake.engine.base import KvReader, KvWriter, StepEngine, StepPlan, StepResult
from mooncake.engine.core import EngineCore, EngineOutput, LoadKv, SequenceReleased, ServiceOutput, StoreKv
from mooncake.engine.kv_mover import Interval, KvMover, LoadTask, StoreTask
from mooncake.engine.threads import start_thread

log = logging.getLogger(__name__)

_Call = Callable[[], None]


class SteppedEngine:
    """on_progress and on_failure are called from the engine thread. on_failure(error): the engine is broken and will not
    run again; the process should end and be restarted.

    record: keeps the intervals in which layers were loaded, computed and stored; None: not kept."""

    def __init__(
        self,
        core: EngineCore,
        step_engine: StepEngine,
        on_progress: Callable[[EngineProgress], None],
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
        self._step_stores: list[StoreTask] = []
        self._busy = False
        self.mover = KvMover(step_engine, core.limits.block_tokens, self._load_ended, self._store_ended, record)
        self._thread = start_thread("engine", self._run)

    # ------------------------------------------------------------------ from any thread

    def submit(
        self, seq: int, job: Job, *, one_token: bool, reader: KvReader | None = None, writer: KvWriter | None = None
    ) -> None:
        self._inbox.put(lambda: self._submit(seq, job, one_token, reader, writer))

    def abort(self, seq: int) -> None:
        self._inbox.put(lambda: self.core.abort(seq))

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()
        self.mover.close()
        self._engine.close()

    # ------------------------------------------------------------------ in the engine thread

    def _submit(self, seq: int, job: Job, one_token: bool, reader: KvReader | None, writer: KvWriter | None) -> None:
        tokens = bytes_to_tokens(job.token_ids)
        self._engine.add_sequence(seq, tokens, job.num_prompt_tokens, job.sampling, job.key.choice, job.num_choices)
        if reader is not None:
            self._readers[seq] = reader
        if writer is not None:
            self._writers[seq] = writer
        source_tokens = 0 if reader is None else reader.num_tokens
        self.core.submit(seq, job, source_tokens=source_tokens, one_token=one_token, store=writer is not None)

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
        result = self._engine.run(plan, self._layer_hook(stores), self._loads)
        for task in stores:
            self.mover.finish_store(task, task.seq not in result.failed)
        self.core.update(plan, _one_step(plan, result))
        return result.step_ns or time.monotonic_ns() - began

    def _layer_hook(self, stores: list[StoreTask]) -> Callable[[int], None] | None:
        record = self._record
        if record is None and not stores:
            return None
        began = time.monotonic_ns()

        def hook(layer: int) -> None:
            nonlocal began
            for task in stores:
                self.mover.store_layer(task, layer)
            if record is not None:
                now = time.monotonic_ns()
                record(Interval("compute", -1, layer, began, now))
                began = now

        return hook

    def _perform(self, outputs: list[EngineOutput]) -> list[ServiceOutput]:
        """Start the copies that the core asked for; return what is the service's business."""
        rest: list[ServiceOutput] = []
        for output in outputs:
            if isinstance(output, LoadKv):
                task = LoadTask(output.seq, output.start, output.end, output.pages, self._readers[output.seq])
                self._loads[output.seq] = task
                self.mover.load(task)
            elif isinstance(output, StoreKv):
                self._start_store(output)
            else:
                if isinstance(output, SequenceReleased):
                    self._forget(output.seq)
                rest.append(output)
        return rest

    def _start_store(self, output: StoreKv) -> None:
        task = StoreTask(output.seq, output.start, output.end, output.pages, self._writers[output.seq])
        if output.during_step:
            self._step_stores.append(task)
        else:
            self.mover.store(task)

    def _forget(self, seq: int) -> None:
        self._engine.remove_sequence(seq)
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
        self._inbox.put(lambda: self.core.stored(task.seq, task.start, task.end, task.ok))


def _one_step(plan: StepPlan, result: StepResult) -> StepResult:
    """Check what a StepEngine returned: its result must fit the plan, or tokens would go to the wrong sequence."""
    if len(result.tokens) != len(plan.items):
        raise RuntimeError(f"the engine returned {len(result.tokens)} results for {len(plan.items)} items")
    return result
