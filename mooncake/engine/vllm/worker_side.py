"""The connector in a worker of vLLM: copies KV between its pages and objects in the store, in threads of their own.

    fetch plan --leased or fetched, checked--> told: up to which token --load plan, or dropped--> gone
    load plan --copied layer by layer, while the step computes--> gone with the step
    load plan, ahead --copied, while other steps go on--> told: loaded
    save plan --each layer as the step has computed it--> committed when whole --> told: done, once the request has ended

A fetch takes no pages, and whatever can go wrong goes wrong then; a load copies bytes that are at hand and were compared. A
layer waits for its own part of the loads. What a step computes goes into a load's last page, too, and may do so before that
layer waits: so this page is loaded, in all layers, before the step begins.

Pages of a save belong to it until the request has ended and all its saves are done. A preempted request gives its pages up at
once: what was not copied by then is not committed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import numpy as np

from mooncake.core.errors import StoreError
from mooncake.core.keys import object_keys
from mooncake.engine.kv_mover import KvMover, LoadTask, PageAccess, StoreTask
from mooncake.engine.threads import WorkThread
from mooncake.engine.vllm.layout import Geometry
from mooncake.engine.vllm.objects import ObjectReader, ObjectWriter
from mooncake.engine.vllm.plans import FetchPlan, LoadPlan, SavePlan, StepPlans
from mooncake.store.api import Store

log = logging.getLogger(__name__)


class MarkedPages(PageAccess, Protocol):
    def mark(self, layer: int) -> None: ...

    def mark_loads(self) -> None: ...


class Finished(msgspec.Struct, frozen=True):
    """saved, loaded: requests. fetched: numbers of fetches, with the token up to which each came."""

    saved: frozenset[str] = frozenset()
    loaded: frozenset[str] = frozenset()
    fetched: tuple[tuple[int, int], ...] = ()


class _Fetch:
    """num_loads: load tasks under way. tell: the request to tell as loaded when they are done; empty: its step waits."""

    def __init__(self, plan: FetchPlan, reader: ObjectReader) -> None:
        self.plan = plan
        self.reader = reader
        self.dropped = False
        self.num_loads = 0
        self.tell = ""


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
        self._fetcher = WorkThread("kv-fetch", self._failed)
        self._ahead = WorkThread("kv-ahead", self._failed)  # its own, as steps wait for the mover's loads
        self._lock = threading.Lock()
        self._next = 0
        self._fetches: dict[int, _Fetch] = {}
        """By number, until they are loaded or dropped."""
        self._fetched: list[tuple[int, int]] = []
        self._loaded: list[str] = []
        self._loading: dict[int, _Fetch] = {}
        """By the number of each load task under way."""
        self._step_loads: list[LoadTask] = []
        self._saves: dict[str, _Saves] = {}
        self._saving: dict[int, tuple[_Saves, ObjectWriter]] = {}
        """By the number of each task under way."""
        self._step: list[StoreTask] = []
        self._step_layers = 0
        """How many leading layers of this step are known to be computed."""

    # ------------------------------------------------------------------ from vLLM's thread

    def begin_step(self, plans: StepPlans) -> None:
        for fetch in plans.fetches:
            self._begin_fetch(fetch)
        for number in plans.dropped:
            self._drop(self._fetches.pop(number))
        self._step_layers = 0
        self._step = [self._begin_save(plan) for plan in plans.saves]

    def start_loads(self, plans: StepPlans) -> None:
        """Returns when the last pages are there of all that this step computes on."""
        if not plans.loads:
            return
        self._pages.mark_loads()
        for plan in plans.loads:
            if plan.ahead:
                task = self._load_task(plan, plan.start, self._shape.whole_pages(plan.end))
                self._ahead.put(partial(self._mover.run_load, task))
        overlapped = [plan for plan in plans.loads if not plan.ahead]
        last_pages = [self._load_task(plan, *self._last_page(plan)) for plan in overlapped]
        self._step_loads = [self._load_task(plan, plan.start, self._last_page(plan)[0]) for plan in overlapped]
        for each in (*last_pages, *self._step_loads):
            self._mover.load(each)
        self._await(last_pages, self._num_layers - 1)
        for plan in plans.loads:
            del self._fetches[plan.number]

    def wait_layer(self, layer: int) -> None:
        """Until that layer of this step's loads is in the pages."""
        if self._step_loads:
            self._await(self._step_loads, layer)

    def layer_computed(self, layer: int) -> None:
        if not self._step:
            return
        for each in range(self._step_layers, layer + 1):
            self._pages.mark(each)
            for task in self._step:
                self._mover.store_layer(task, each)
        self._step_layers = max(self._step_layers, layer + 1)

    def end_step(self) -> None:
        """All layers are computed, also those that nobody told of or waited for."""
        self.wait_layer(self._num_layers - 1)
        self._step_loads = []
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
            fetched, self._fetched = self._fetched, []
            loaded, self._loaded = self._loaded, []
        return Finished(frozenset(saved), frozenset(loaded), tuple(fetched))

    def close(self) -> None:
        for fetch in self._fetches.values():
            self._drop(fetch)
        self._fetcher.close()
        self._ahead.close()
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

    def _objects(self, plan: FetchPlan | SavePlan) -> tuple[tuple[bytes, ...], int, list[int], int]:
        """Those that the plan's tokens are in: keys, the number of the first one, sizes; and up to where all pages go."""
        first = plan.start // self._shape.block_tokens
        last = -(-self._shape.whole_pages(plan.end) // self._shape.block_tokens)
        sizes = self._sizes(plan.num_tokens, len(plan.keys))[first:last]
        keys = object_keys(plan.keys, self._shard)[first:last]
        return keys, first, sizes, self._shape.whole_pages(plan.num_tokens)

    def _begin_fetch(self, plan: FetchPlan) -> None:
        reader = ObjectReader(self._store, *self._objects(plan))
        fetch = self._fetches[plan.number] = _Fetch(plan, reader)
        self._fetcher.put(lambda: self._fetch(fetch))

    def _drop(self, fetch: _Fetch) -> None:
        """After the fetch itself, if that is still under way."""
        fetch.dropped = True
        self._fetcher.put(fetch.reader.close)

    def _last_page(self, plan: LoadPlan) -> tuple[int, int]:
        """The tokens of the page that the load does not fill; none if it fills all."""
        start = max(plan.start, plan.end // self._shape.page_tokens * self._shape.page_tokens)
        return start, self._shape.whole_pages(plan.end)

    def _load_task(self, plan: LoadPlan, start: int, end: int) -> LoadTask:
        fetch = self._fetches[plan.number]
        with self._lock:
            self._next += 1
            fetch.num_loads += 1
            fetch.tell = plan.request if plan.ahead else ""
            self._loading[self._next] = fetch
        return LoadTask(self._next, start, end, np.array(plan.pages, dtype=np.int64), fetch.reader)

    def _await(self, tasks: Sequence[LoadTask], layer: int) -> None:
        for task in tasks:
            if not task.wait(layer):
                raise RuntimeError(f"tokens [{task.start}, {task.end}) of a request were not copied into its pages")

    def _begin_save(self, plan: SavePlan) -> StoreTask:
        writer = ObjectWriter(self._store, *self._objects(plan))
        end = self._shape.whole_pages(plan.end)
        with self._lock:
            self._next += 1
            task = StoreTask(self._next, plan.start, end, np.array(plan.pages, dtype=np.int64), writer)
            saves = self._saves.setdefault(plan.request, _Saves())
            saves.tasks[task.seq] = task
            self._saving[task.seq] = saves, writer
        return task

    # ------------------------------------------------------------------ from the copying threads

    def _fetch(self, fetch: _Fetch) -> None:
        if fetch.dropped:
            return
        plan, end = fetch.plan, fetch.reader.num_tokens
        num_read = fetch.reader.open()
        if num_read < fetch.reader.num_objects:
            end = max(plan.start, (plan.start // self._shape.block_tokens + num_read) * self._shape.block_tokens)
        with self._lock:
            self._fetched.append((plan.number, min(plan.end, end)))

    def _load_ended(self, task: LoadTask) -> None:
        with self._lock:
            fetch = self._loading.pop(task.seq)
            fetch.num_loads -= 1
            is_last = not fetch.num_loads
        if is_last:
            fetch.reader.close()
        if fetch.tell and not task.ok:
            raise RuntimeError(f"the KV of {fetch.tell} was not copied into its pages")
        if fetch.tell:
            with self._lock:
                self._loaded.append(fetch.tell)

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
