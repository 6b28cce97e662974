"""Loads, computation and stores of a prefill run at the same time, layer by layer, and copy each byte once."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import msgspec
import pytest

from mooncake.core.types import AttemptKey, Job, tokens_to_bytes
from mooncake.engine.attempts import EngineProgress, KvStored
from mooncake.engine.base import KvLayout
from mooncake.engine.core import Drawn, EngineCore, SequenceReleased
from mooncake.engine.kv_mover import Interval
from mooncake.engine.stepped import SteppedEngine
from tests.engine.fakes import Objects, do_nothing
from tests.engine.tiny_models import GREEDY, LIMITS, SUPPORTED, prompts, reference, save_model, tiny_engine

pytestmark = pytest.mark.quiet

NUM_LAYERS = 8
COPY_S = 0.002
"""Of one layer of one object, as over a slow link; a tiny model's layer takes less."""
NUM_LOADED = 32
"""Less than what is stored, so that stores lag behind."""
PROMPT = prompts(71)[0]
Span = tuple[int, int]


def slow(number: int) -> None:
    time.sleep(COPY_S)


def empty(layout: KvLayout, before: Callable[[int], None] = do_nothing) -> Objects:
    """Room for the prompt."""
    block = LIMITS.block_tokens
    sizes = [min(block, len(PROMPT) - first) for first in range(0, len(PROMPT), block)]
    return Objects([bytes(layout.object_bytes(size)) for size in sizes], len(PROMPT), before=before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, words = SUPPORTED["llama"]
    return save_model((name, {**words, "num_hidden_layers": NUM_LAYERS}), tmp_path_factory.mktemp("deep"))


@contextmanager
def running(
    path: Path, overlap_loads: bool
) -> Iterator[tuple[SteppedEngine, queue.Queue[EngineProgress | KvStored], list[Interval]]]:
    """max_step_tokens is one prompt, so that one step loads, computes and stores."""
    limits = msgspec.structs.replace(LIMITS, max_step_tokens=96)
    progress: queue.Queue[EngineProgress | KvStored] = queue.Queue()
    trace: list[Interval] = []

    def fail(error: BaseException) -> None:
        raise AssertionError from error

    engine = SteppedEngine(
        EngineCore(limits, overlap_loads=overlap_loads), tiny_engine(path, limits), progress.put, fail, trace.append
    )
    try:
        yield engine, progress, trace
    finally:
        engine.close()


def run(
    path: Path,
    reader: Objects | None,
    writer: Objects | None,
    tokens: list[int] = PROMPT,
    *,
    overlap_loads: bool = True,
) -> tuple[int, list[Interval], tuple[int, int]]:
    """The token drawn, the trace, and (bytes loaded, bytes stored) that the mover counted."""
    with running(path, overlap_loads) as (engine, progress, trace):
        job = Job(AttemptKey("t", 1), len(tokens), len(PROMPT), 9, (), tokens_to_bytes(tokens), GREEDY)
        engine.submit(1, job, one_token=True, reader=reader, writer=writer)
        token = -1
        while True:
            event = progress.get(timeout=10)
            for output in () if isinstance(event, KvStored) else event.outputs:
                if isinstance(output, Drawn):
                    [token] = output.token_ids
                elif isinstance(output, SequenceReleased):
                    return token, trace, (engine.mover.bytes_loaded, engine.mover.bytes_stored)


def spans(trace: list[Interval], kind: str) -> list[Span]:
    """The first interval of each layer. Of computing that is all up to the wait for the layer's load."""
    found: dict[int, Span] = {}
    for interval in trace:
        if interval.kind == kind:
            found.setdefault(interval.layer, (interval.start_ns, interval.end_ns))
    assert list(found) == list(range(NUM_LAYERS))
    return list(found.values())


def num_at_once(trace: list[Interval]) -> int:
    """Layers, but for the first, that the engine computed towards at a time when another was loaded and another stored."""
    loads, computes = spans(trace, "load"), spans(trace, "compute")
    stores = [(interval.start_ns, interval.end_ns) for interval in trace if interval.kind == "store"]
    return sum(any(meet(*three) for three in product([computed], loads, stores)) for computed in computes[1:])


def meet(*several: Span) -> bool:
    return max(start for start, _ in several) < min(end for _, end in several)


def test_layers_are_loaded_computed_and_stored_at_the_same_time(path: Path) -> None:
    layout = tiny_engine(path).layout
    stored = empty(layout)
    expected = reference(path, PROMPT, 1)[0]
    assert run(path, None, stored)[0] == expected
    token, trace, _ = run(path, Objects(stored.data, NUM_LOADED, before=slow), empty(layout, slow))
    assert token == expected
    assert {interval.seq for interval in trace if interval.kind != "compute"} == {1}
    loads, stores = spans(trace, "load"), spans(trace, "store")
    assert all(load[1] <= store[0] for load, store in zip(loads, stores, strict=True)), "stored before it was loaded"
    computed = {interval.layer: interval.end_ns for interval in trace if interval.kind == "compute"}
    assert all(load[1] <= computed[layer] for layer, load in enumerate(loads)), "computed before it was loaded"
    # On a busy machine a thread may be held up, so not each one need be so.
    assert num_at_once(trace) > NUM_LAYERS // 2


def test_a_load_that_comes_before_computing_does_not_look_like_overlap(path: Path) -> None:
    layout = tiny_engine(path).layout
    stored = empty(layout)
    run(path, None, stored)
    source = Objects(stored.data, NUM_LOADED, before=slow)
    _, trace, _ = run(path, source, empty(layout, slow), overlap_loads=False)
    assert spans(trace, "load")[-1][1] <= spans(trace, "compute")[0][0]
    assert num_at_once(trace) == 0


def test_each_byte_is_loaded_and_stored_once(path: Path) -> None:
    layout = tiny_engine(path).layout
    whole, part = layout.object_bytes(len(PROMPT)), layout.object_bytes(NUM_LOADED)
    first = empty(layout)
    token, _, moved = run(path, None, first)
    assert moved == (0, whole) and times_copied(first) == [1] * 5
    source, second = Objects(first.data, NUM_LOADED), empty(layout)
    again, _, moved = run(path, source, second)
    assert again == token
    assert moved == (part, whole)
    assert times_copied(source) == [1, 1, 0, 0, 0] and times_copied(second) == [1] * 5
    source = Objects(second.data, len(PROMPT))
    following, _, moved = run(path, source, None, [*PROMPT, token])
    assert [token, following] == reference(path, PROMPT, 2)
    assert moved == (whole, 0) and times_copied(source) == [1] * 5, "a hand-over copies the KV of the prompt once"


def times_copied(objects: Objects) -> list[int]:
    """Of each object, whose bytes are all copied equally often."""
    assert all(each.min() == each.max() for each in objects.copies)
    return [int(each.max()) for each in objects.copies]
