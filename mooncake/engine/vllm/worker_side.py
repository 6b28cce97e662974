"""The connector in a worker of vLLM: copies KV between its pages and objects in the store, in threads of their own.

    load plan --fetched, checked, copied layer by layer--> told: done, and the pages that nothing came for
    save plan --each layer as the step has computed it--> committed when whole --> told: done, once the request has ended

Pages of a load are nobody else's until it is told as done; those of a save until the request has ended and all its saves are
done. A preempted request gives its pages up at once: what was not copied by then is not committed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Protocol

import msgspec
import numpy as np

from mooncake.core.errors import StoreError
from mooncake.core.keys import object_keys
from mooncake.engine.kv_mover import KvMover, LoadTask, PageAccess, StoreTask
from mooncake.engine.vllm.layout import Geometry
from mooncake.engine.vllm.objects import ObjectReader, ObjectWriter
from mooncake.engine.vllm.plans import LoadPlan, SavePlan, StepPlans
from mooncake.store.api import Store

log = logging.getLogger(__name__)


class MarkedPages(PageAccess, Protocol):
    def mark(self, layer: int) -> None: ...


class Finished(msgspec.Struct, frozen=True):
    """saved, loaded: requests. failed_pages: of those loaded, where nothing came."""

    saved: frozenset[str] = frozenset()
    loaded: frozenset[str] = frozenset()
    failed_pages: frozenset[int] = frozenset()


class _Load:
    def __init__(self, plan: LoadPlan, reader: ObjectReader, pages: np.ndarray) -> None:
        self.plan = plan
        self.reader = reader
        self.pages = pages


class _Saves:
    """Of one request. tasks: those under way, with their writers."""

    def __init__(self) -> None:
        self.tasks: dict[int, StoreTask] = {}
        self.ended = False


class WorkerSide:
    """store: of this worker alone. shard: of its objects."""

    def __init__(self, store: Store, pages: MarkedPages, shape: Geometry, shard: bytes) -> None:
        self.failure: BaseException | None = None
        self._store = store
        self._pages = pages
        self._shape = shape
        self._shard = shard
        self._num_layers = pages.layout.num_layers
        self._mover = KvMover(pages, shape.block_tokens, self._load_ended, self._save_ended, self._failed)
        self._lock = threading.Lock()
        self._next = 0
        self._loads: dict[int, _Load] = {}
        self._saves: dict[str, _Saves] = {}
        self._saving: dict[int, tuple[_Saves, ObjectWriter]] = {}
        """By the number of each task under way."""
        self._step: list[StoreTask] = []
        self._step_layers = 0
        """How many leading layers of this step are known to be computed."""
        self._loaded: dict[str, None] = {}
        self._failed_pages: dict[int, None] = {}

    # ------------------------------------------------------------------ from vLLM's thread

    def begin_step(self, plans: StepPlans) -> None:
        self._step_layers = 0
        self._step = [self._begin_save(plan) for plan in plans.saves]

    def start_loads(self, plans: StepPlans) -> None:
        for plan in plans.loads:
            self._start_load(plan)

    def layer_computed(self, layer: int) -> None:
        if not self._step:
            return
        for each in range(self._step_layers, layer + 1):
            self._pages.mark(each)
            for task in self._step:
                self._mover.store_layer(task, each)
        self._step_layers = max(self._step_layers, layer + 1)

    def end_step(self) -> None:
        """All layers are computed, also those that nobody told of."""
        self.layer_computed(self._num_layers - 1)
        for task in self._step:
            self._mover.finish_store(task, True)
        self._step = []

    def give_up(self, requests: Iterable[str]) -> None:
        """Their pages are about to be overwritten."""
        with self._lock:
            for request in requests:
                saves = self._saves.get(request)
                for task in () if saves is None else saves.tasks.values():
                    task.ok = False

    def take_finished(self, ended: Iterable[str]) -> Finished:
        """What is done since the last call. ended: requests that vLLM is done with."""
        if self.failure is not None:
            raise RuntimeError("a copying thread of the KV connector broke") from self.failure
        with self._lock:
            for request in ended:
                if request in self._saves:
                    self._saves[request].ended = True
            saved = [request for request, saves in self._saves.items() if saves.ended and not saves.tasks]
            for request in saved:
                del self._saves[request]
            loaded, self._loaded = self._loaded, {}
            failed, self._failed_pages = self._failed_pages, {}
        return Finished(frozenset(saved), frozenset(loaded), frozenset(failed))

    def close(self) -> None:
        self._mover.close()
        self._store.close()

    # ------------------------------------------------------------------ inside

    def _sizes(self, num_tokens: int, num_objects: int) -> list[int]:
        """In bytes, of the objects of so many tokens; the last may be a tail."""
        size = self._pages.layout.object_bytes(self._shape.block_tokens)
        sizes = [size] * num_objects
        rest = num_tokens - (num_objects - 1) * self._shape.block_tokens
        if sizes and rest < self._shape.block_tokens:
            sizes[-1] = self._pages.layout.object_bytes(self._shape.whole_pages(rest))
        return sizes

    def _objects(self, start: int, end: int) -> tuple[int, int, int]:
        """The end of the pages of tokens [start, end), and the range of objects that they are in."""
        end = self._shape.whole_pages(end)
        return end, start // self._shape.block_tokens, -(-end // self._shape.block_tokens)

    def _start_load(self, plan: LoadPlan) -> None:
        end, first, last = self._objects(plan.start, plan.end)
        sizes = self._sizes(plan.num_tokens, len(plan.keys))[first:last]
        whole = self._shape.whole_pages(plan.num_tokens)
        reader = ObjectReader(self._store, object_keys(plan.keys, self._shard)[first:last], first, sizes, whole)
        load = _Load(plan, reader, np.array(plan.pages, dtype=np.int64))
        self._load(load, plan.start, end)

    def _load(self, load: _Load, start: int, end: int) -> None:
        self._next += 1
        self._loads[self._next] = load
        self._mover.load(LoadTask(self._next, start, end, load.pages, load.reader))

    def _begin_save(self, plan: SavePlan) -> StoreTask:
        end, first, last = self._objects(plan.start, plan.end)
        sizes = self._sizes(plan.num_tokens, len(plan.keys))[first:last]
        whole = self._shape.whole_pages(plan.num_tokens)
        writer = ObjectWriter(self._store, object_keys(plan.keys, self._shard)[first:last], first, sizes, whole)
        with self._lock:
            self._next += 1
            task = StoreTask(self._next, plan.start, end, np.array(plan.pages, dtype=np.int64), writer)
            saves = self._saves.setdefault(plan.request, _Saves())
            saves.tasks[task.seq] = task
            self._saving[task.seq] = saves, writer
        return task

    # ------------------------------------------------------------------ from the copying threads

    def _load_ended(self, task: LoadTask) -> None:
        """What there is of a load that failed is loaded all the same."""
        load = self._loads.pop(task.seq)
        plan, came = load.plan, task.end
        if not task.ok:
            num_objects = plan.start // self._shape.block_tokens + (load.reader.num_read or 0)
            came = num_objects * self._shape.block_tokens
            if plan.start < came < task.end:
                self._load(load, plan.start, came)
                return
            came = plan.start
        load.reader.close()
        with self._lock:
            self._loaded[plan.request] = None
            self._failed_pages.update(dict.fromkeys(plan.pages[came // self._shape.page_tokens :]))

    def _save_ended(self, task: StoreTask) -> None:
        """Commit before anybody hears of it. What is not committed is a miss for whoever wants it."""
        with self._lock:
            saves, writer = self._saving.pop(task.seq)
        try:
            if task.ok:
                writer.commit()
        except StoreError as error:
            log.warning("KV of a request is not saved: %s", error)
        writer.close()
        with self._lock:
            del saves.tasks[task.seq]

    def _failed(self, error: BaseException) -> None:
        self.failure = error
