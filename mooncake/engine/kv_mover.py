"""Copies KV between an engine's pages and objects in the store, layer by layer, beside the computation.

One thread stores and one loads, so that neither waits for the other. Both copy straight between pages and the store's
segment where it is mapped (`mooncake.store.handles`); over a network a staging buffer stands between. Pages belong to a task
until its end is reported.

An object holds [layer][token][token_bytes] of its tokens (`KvLayout`); object `i` of a sequence is its block `i`, the last one
may be partial.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np

from mooncake.core.errors import MooncakeError
from mooncake.engine.base import KvLayout, KvReader, KvWriter
from mooncake.engine.threads import WorkThread

LOAD_TIMEOUT_S = 10.0
"""A layer that has not arrived after this makes the load fail."""


class PageAccess(Protocol):
    """The part of a StepEngine that copies."""

    layout: KvLayout

    def read_pages(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None: ...

    def write_pages(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None: ...


class Interval(msgspec.Struct, frozen=True):
    """When one layer of one sequence was loaded, computed or stored: monotonic nanoseconds. What was not copied has none.

    kind `compute` is of a whole step (seq is -1), up to where the layer's KV is in the pages; a wait for a load is a gap
    between two of them."""

    kind: str
    seq: int
    layer: int
    start_ns: int
    end_ns: int


class _Piece(msgspec.Struct, frozen=True):
    """Tokens [start, start + count) of a sequence, within object `index`, and where one layer of them lies there."""

    index: int
    start: int
    count: int
    layer_bytes: int
    offset: int


def _pieces(start: int, end: int, num_tokens: int, block_tokens: int, token_bytes: int) -> Iterator[_Piece]:
    while start < end:
        index = start // block_tokens
        first = index * block_tokens
        size = min(block_tokens, num_tokens - first)
        count = min(end, first + size) - start
        yield _Piece(index, start, count, size * token_bytes, (start - first) * token_bytes)
        start += count


class LoadTask:
    """A load under way (`LayerLoad`). store: what copies each layer on when it is there."""

    def __init__(
        self,
        seq: int,
        start: int,
        end: int,
        pages: np.ndarray,
        reader: KvReader,
        store: StoreTask | None = None,
    ) -> None:
        self.seq, self.start, self.end = seq, start, end
        self.pages = pages
        self.reader = reader
        self.store = store
        self._layers_done = 0
        self._failed = False
        self._changed = threading.Condition()

    def wait(self, layer: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._layers_done > layer, LOAD_TIMEOUT_S)
            if self._layers_done <= layer:
                self._failed = True
            return not self._failed

    def advance(self) -> None:
        """One more layer is there."""
        with self._changed:
            self._layers_done += 1
            self._changed.notify_all()

    def fail(self) -> None:
        """It cannot be loaded, or nobody wants it any more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    @property
    def ok(self) -> bool:
        return not self._failed


class StoreTask:
    """A store under way; its layers are released one by one by `KvMover.store_layer`."""

    def __init__(self, seq: int, start: int, end: int, pages: np.ndarray, writer: KvWriter) -> None:
        self.seq, self.start, self.end = seq, start, end
        self.pages = pages
        self.writer = writer
        self.ok = True


class KvMover:
    """on_loaded(task) and on_stored(task) are called from the copying threads, once for each task. So is on_failure(error), if
    one breaks by something else than a copy that fails: its tasks will never end then."""

    def __init__(
        self,
        pages: PageAccess,
        block_tokens: int,
        on_loaded: Callable[[LoadTask], None],
        on_stored: Callable[[StoreTask], None],
        on_failure: Callable[[BaseException], None],
        record: Callable[[Interval], None] | None = None,
    ) -> None:
        self.bytes_loaded = 0
        self.bytes_stored = 0
        self._pages = pages
        self._layout = pages.layout
        self._block_tokens = block_tokens
        self._on_loaded = on_loaded
        self._on_stored = on_stored
        self._record = record
        # Bounded by the engine's batch: a sequence has one load and one store per chunk under way.
        self._loads = WorkThread("kv-load", on_failure)
        self._stores = WorkThread("kv-store", on_failure)

    def load(self, task: LoadTask) -> None:
        self._loads.put(lambda: self.run_load(task))

    def store(self, task: StoreTask) -> None:
        """Store all layers of tokens that are computed already."""
        self._stores.put(lambda: self._store_all(task))

    def store_layer(self, task: StoreTask, layer: int) -> None:
        """Layer `layer` of a task is computed, or loaded."""
        self._stores.put(lambda: self._store_layer(task, layer))

    def finish_store(self, task: StoreTask, ok: bool) -> None:
        """The step or the load is over; not ok: what it brought for this sequence is void."""
        self._stores.put(lambda: self._finish(task, ok))

    def close(self) -> None:
        """Ends the threads after the work queued so far."""
        self._loads.close()
        self._stores.close()

    # ------------------------------------------------------------------ in the copying threads

    def run_load(self, task: LoadTask) -> None:
        """What `load` has its thread do, in the caller's."""
        try:
            for layer in range(self._layout.num_layers):
                if not task.ok:
                    break
                began = time.monotonic_ns()
                for piece in self._each_piece(task.start, task.end, task.reader.num_tokens):
                    self._load_piece(task, layer, piece)
                self._note("load", task.seq, layer, began)
                task.advance()
                if task.store is not None:
                    self.store_layer(task.store, layer)
        except MooncakeError:
            task.fail()
        if task.store is not None:
            self.finish_store(task.store, task.ok)
        self._on_loaded(task)

    def _load_piece(self, task: LoadTask, layer: int, piece: _Piece) -> None:
        size = piece.count * self._layout.token_bytes
        offset = layer * piece.layer_bytes + piece.offset

        def use(data: memoryview) -> None:
            self._pages.write_pages(layer, task.pages, piece.start, piece.count, data)

        task.reader.use(piece.index, offset, size, use)
        self.bytes_loaded += size

    def _store_all(self, task: StoreTask) -> None:
        for layer in range(self._layout.num_layers):
            self._store_layer(task, layer)
        self._finish(task, True)

    def _store_layer(self, task: StoreTask, layer: int) -> None:
        began, bytes_before = time.monotonic_ns(), self.bytes_stored
        try:
            for piece in self._each_piece(task.start, task.end, task.writer.num_tokens):
                if task.ok and task.writer.wants(piece.index):
                    self._store_piece(task, layer, piece)
            if self.bytes_stored > bytes_before:
                self._note("store", task.seq, layer, began)
        except MooncakeError:
            task.ok = False

    def _store_piece(self, task: StoreTask, layer: int, piece: _Piece) -> None:
        size = piece.count * self._layout.token_bytes
        offset = layer * piece.layer_bytes + piece.offset

        def fill(out: memoryview) -> None:
            self._pages.read_pages(layer, task.pages, piece.start, piece.count, out)

        task.writer.fill(piece.index, offset, size, fill)
        self.bytes_stored += size

    def _finish(self, task: StoreTask, ok: bool) -> None:
        task.ok = task.ok and ok
        self._on_stored(task)

    def _each_piece(self, start: int, end: int, num_tokens: int) -> Iterator[_Piece]:
        return _pieces(start, min(end, num_tokens), num_tokens, self._block_tokens, self._layout.token_bytes)

    def _note(self, kind: str, seq: int, layer: int, began: int) -> None:
        if self._record is not None:
            self._record(Interval(kind, seq, layer, began, time.monotonic_ns()))
