"""Loads, computation and stores of a prefill run at the same time, layer by layer, and copy each byte once."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mooncake.core.types import AttemptKey, Job, tokens_to_bytes
from mooncake.engine.attempts import EngineProgress
from mooncake.engine.base import KvLayout
from mooncake.engine.core import Drawn, EngineCore, SequenceReleased
from mooncake.engine.kv_mover import Interval
from mooncake.engine.stepped import SteppedEngine
from tests.engine.tiny_models import GREEDY, LIMITS, SUPPORTED, prompts, reference, save_model, tiny_engine

NUM_LAYERS = 8
COPY_S = 0.002
"""Of one layer of one object, as over a slow link; a tiny model's layer takes less."""
NUM_LOADED = 48
PROMPT = prompts(71)[0]
Span = tuple[int, int]


class Objects:
    """One store's objects of one sequence, both `KvReader` and `KvWriter`; num_bytes: copied in or out."""

    def __init__(self, data: list[memoryview], num_tokens: int, copy_s: float = 0.0) -> None:
        self.num_tokens = num_tokens
        self.num_bytes = 0
        self.data = data
        self._copy_s = copy_s

    def wants(self, index: int) -> bool:
        return True

    def use(self, index: int, offset: int, size: int, use: Callable[[memoryview], None]) -> None:
        time.sleep(self._copy_s)
        use(self.data[index][offset : offset + size])
        self.num_bytes += size

    fill = use


def empty(layout: KvLayout, copy_s: float = 0.0) -> Objects:
    """Room for the prompt."""
    block = LIMITS.block_tokens
    sizes = [min(block, len(PROMPT) - first) for first in range(0, len(PROMPT), block)]
    return Objects([memoryview(bytearray(layout.object_bytes(size))) for size in sizes], len(PROMPT), copy_s)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, words = SUPPORTED["llama"]
    return save_model((name, {**words, "num_hidden_layers": NUM_LAYERS}), tmp_path_factory.mktemp("deep"))


@contextmanager
def running(path: Path) -> Iterator[tuple[SteppedEngine, queue.Queue[EngineProgress], list[Interval]]]:
    """max_step_tokens is one prompt, so that one step loads, computes and stores."""
    limits = msgspec.structs.replace(LIMITS, max_step_tokens=96)
    progress: queue.Queue[EngineProgress] = queue.Queue()
    trace: list[Interval] = []

    def fail(error: BaseException) -> None:
        raise AssertionError from error

    engine = SteppedEngine(
        EngineCore(limits, overlap_loads=True), tiny_engine(path, limits), progress.put, fail, trace.append
    )
    try:
        yield engine, progress, trace
    finally:
        engine.close()


def run(
    path: Path, reader: Objects | None, writer: Objects | None, tokens: list[int] = PROMPT
) -> tuple[int, list[Interval], tuple[int, int]]:
    """The token drawn, the trace, and (bytes loaded, bytes stored) that the mover counted."""
    with running(path) as (engine, progress, trace):
        job = Job(AttemptKey("t", 1), len(tokens), len(PROMPT), 9, (), tokens_to_bytes(tokens), GREEDY)
        engine.submit(1, job, one_token=True, reader=reader, writer=writer)
        token = -1
        while True:
            for output in progress.get(timeout=10).outputs:
                if isinstance(output, Drawn):
                    [token] = output.token_ids
                elif isinstance(output, SequenceReleased):
                    return token, trace, (engine.mover.bytes_loaded, engine.mover.bytes_stored)


def spans(trace: list[Interval], kind: str) -> list[Span]:
    """The first interval of each layer: what the step itself stores comes before what it had loaded."""
    found: dict[int, Span] = {}
    for interval in trace:
        if interval.kind == kind:
            found.setdefault(interval.layer, (interval.start_ns, interval.end_ns))
    assert list(found) == list(range(NUM_LAYERS))
    return list(found.values())


def overlap(one: Span, other: Span) -> bool:
    return min(one[1], other[1]) > max(one[0], other[0])


def test_a_layer_is_computed_while_the_next_is_loaded_and_the_one_before_is_stored(path: Path) -> None:
    layout = tiny_engine(path).layout
    stored = empty(layout)
    expected = reference(path, PROMPT, 1)[0]
    assert run(path, None, stored)[0] == expected
    token, trace, _ = run(path, Objects(stored.data, NUM_LOADED, COPY_S), empty(layout, COPY_S))
    assert token == expected
    loads, computes, stores = spans(trace, "load"), spans(trace, "compute"), spans(trace, "store")
    later = range(1, NUM_LAYERS)
    assert all(loads[layer][1] <= computes[layer][1] for layer in range(NUM_LAYERS)), "computed before it was loaded"
    assert all(loads[layer][1] <= stores[layer][0] for layer in range(NUM_LAYERS)), "stored before it was loaded"
    assert all(overlap(loads[layer], computes[layer]) for layer in later), "computing waits for the whole load"
    # A busy machine may hold up a copy, so not each one need overlap.
    assert sum(overlap(stores[layer - 1], loads[layer]) for layer in later) > NUM_LAYERS // 2
    assert sum(overlap(stores[layer - 1], computes[layer]) for layer in later) > NUM_LAYERS // 2


def test_each_byte_is_loaded_and_stored_once(path: Path) -> None:
    layout = tiny_engine(path).layout
    whole, part = layout.object_bytes(len(PROMPT)), layout.object_bytes(NUM_LOADED)
    first = empty(layout)
    token, _, moved = run(path, None, first)
    assert moved == (0, first.num_bytes) == (0, whole)
    source, second = Objects(first.data, NUM_LOADED), empty(layout)
    again, _, moved = run(path, source, second)
    assert again == token
    assert moved == (source.num_bytes, second.num_bytes) == (part, whole)
    source = Objects(second.data, len(PROMPT))
    following, _, moved = run(path, source, None, [*PROMPT, token])
    assert [token, following] == reference(path, PROMPT, 2)
    assert moved == (source.num_bytes, 0) == (whole, 0), "a hand-over copies the KV of the prompt once"
