"""Small fakes of what the engine's parts work on: pages, objects, an engine that computes nothing, a core that only listens.

KV of a token is one byte that tells its layer and position, twice, so that whatever moved can be checked by eye.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mooncake.core.types import CostModel, SamplingParams
from mooncake.engine.base import EngineLimits, KvLayout, LayerHook, LayerLoad, StepItem, StepPlan, StepResult

LAYOUT = KvLayout(num_layers=3, token_bytes=2, dtype="uint8", name="fake.2")
LIMITS = EngineLimits(num_pages=20, page_tokens=4, block_tokens=8, max_batch=4, max_step_tokens=32, max_context=64)
BLOCK = LIMITS.block_tokens
WAIT_S = 10.0
"""Nothing here takes long; a test that waits for so much longer fails."""


def do_nothing(*_: Any) -> None:
    pass


def kv(layer: int, start: int, end: int) -> np.ndarray:
    """What tokens [start, end) have in that layer."""
    values = 80 * layer + np.arange(start, end, dtype=np.uint8) + 1
    return np.repeat(values[:, np.newaxis], LAYOUT.token_bytes, axis=1)


def contents(num_tokens: int) -> list[bytes]:
    """The objects of a sequence."""
    ends = [min(first + BLOCK, num_tokens) for first in range(0, num_tokens, BLOCK)]
    return [
        b"".join(kv(layer, index * BLOCK, end).tobytes() for layer in range(LAYOUT.num_layers))
        for index, end in enumerate(ends)
    ]


class Objects:
    """Objects of one sequence, both `KvReader` and `KvWriter`, full or (to be written) empty.

    before(n): called before copy n, to hold it up or to let it fail. missing: the only ones that a writer wants, or all.
    calls: (index, offset, size) of each copy. copies[i]: how often each byte of object i was copied."""

    def __init__(
        self,
        data: Sequence[bytes | bytearray],
        num_tokens: int,
        *,
        before: Callable[[int], None] = do_nothing,
        missing: Sequence[int] | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.num_stored = self.ssd_tokens = 0
        self.data = [bytearray(each) for each in data]
        self.calls: list[tuple[int, int, int]] = []
        self.copies = [np.zeros(len(each), dtype=np.uint8) for each in data]
        self._before = before
        self._missing = missing

    def wants(self, index: int) -> bool:
        return self._missing is None or index in self._missing

    def use(self, index: int, offset: int, size: int, use: Callable[[memoryview], None]) -> None:
        self.calls.append((index, offset, size))
        self._before(len(self.calls) - 1)
        use(memoryview(self.data[index])[offset : offset + size])
        self.copies[index][offset : offset + size] += 1

    fill = use


def full(num_tokens: int, **more: Any) -> Objects:
    return Objects(contents(num_tokens), num_tokens, **more)


def empty(num_tokens: int, **more: Any) -> Objects:
    return Objects([bytes(len(each)) for each in contents(num_tokens)], num_tokens, **more)


class Pages:
    """Pages of an engine. written: (layer, start, count) of each copy into them."""

    layout = LAYOUT

    def __init__(self) -> None:
        self.kv = np.zeros((LAYOUT.num_layers, LIMITS.num_pages * LIMITS.page_tokens, LAYOUT.token_bytes), np.uint8)
        self.written: list[tuple[int, int, int]] = []

    def read_pages(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None:
        np.frombuffer(out, np.uint8)[:] = self.at(layer, pages, start, start + count).reshape(-1)

    def write_pages(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None:
        self.written.append((layer, start, count))
        self.put(layer, pages, start, np.frombuffer(data, np.uint8).reshape(count, LAYOUT.token_bytes))

    def at(self, layer: int, pages: np.ndarray, start: int, end: int) -> np.ndarray:
        found: np.ndarray = self.kv[layer, self._slots(pages, start, end)]
        return found

    def put(self, layer: int, pages: np.ndarray, start: int, values: np.ndarray) -> None:
        self.kv[layer, self._slots(pages, start, start + len(values))] = values

    def holds(self, pages: np.ndarray, start: int, end: int) -> bool:
        """Whether tokens [start, end) have their KV in all layers."""
        return all((self.at(layer, pages, start, end) == kv(layer, start, end)).all() for layer in range(3))

    @staticmethod
    def _slots(pages: np.ndarray, start: int, end: int) -> np.ndarray:
        positions = np.arange(start, end)
        slots: np.ndarray = pages[positions // LIMITS.page_tokens] * LIMITS.page_tokens
        return slots + positions % LIMITS.page_tokens


class FakeStepEngine(Pages):
    """A `StepEngine` that draws the position as token and fails a sequence whose context is not in its pages.

    during(layer): called in each layer of each step, to hold it up or to let it fail. known: tokens of the sequences that were
    added and not removed. steps: (seq, start, count) of the items of each."""

    limits = LIMITS
    vocab_size = 1000

    def __init__(self, during: Callable[[int], None] = do_nothing) -> None:
        super().__init__()
        self.known: dict[int, list[int]] = {}
        self.steps: list[list[tuple[int, int, int]]] = []
        self.closed = False
        self._during = during

    def add_sequence(
        self,
        seq: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        choice: int,
        num_choices: int = 1,
    ) -> None:
        self.known[seq] = list(token_ids)

    def remove_sequence(self, seq: int) -> None:
        del self.known[seq]

    def run(self, plan: StepPlan, after_layer: LayerHook | None, loads: Mapping[int, LayerLoad]) -> StepResult:
        self.steps.append([(item.seq, item.start, item.count) for item in plan.items])
        failed: dict[int, None] = {}
        for layer in range(LAYOUT.num_layers):
            for item in plan.items:
                if item.num_loading and item.seq not in failed and not loads[item.seq].wait(layer):
                    failed[item.seq] = None
                self.put(layer, item.pages, item.start, kv(layer, item.start, item.start + item.count))
            self._during(layer)
            if after_layer is not None:
                after_layer(layer)
        failed |= {item.seq: None for item in plan.items if not self.holds(item.pages, 0, item.start + item.count)}
        tokens = tuple(self._draw(item) if item.seq not in failed else () for item in plan.items)
        return StepResult(tokens, failed=tuple(failed), step_ns=7)

    def _draw(self, item: StepItem) -> tuple[int, ...]:
        return (item.start + item.count,) if item.sample else ()

    def measure(self) -> CostModel:
        return CostModel()

    def close(self) -> None:
        self.closed = True


class ListeningCore:
    """Keeps the events that it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def handle(self, event: Any, now: int) -> list[Any]:
        self.events.append(event)
        return []

    def deadline(self) -> int | None:
        return None
