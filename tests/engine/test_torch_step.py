"""One step: when KV is in the pages, what a failed load touches, and what is copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mooncake.engine.base import StepItem, StepPlan, StepResult
from mooncake.engine.torch.step_engine import TorchStepEngine
from tests.engine.tiny_models import GREEDY, SUPPORTED, prompts, reference, save_model, tiny_engine

FIRST, SECOND = prompts(40, 21, seed=1)
RUN, OTHER_RUN, BROKEN = np.arange(10, 18), np.arange(20, 26), np.array([3, 1, 2, 9, 40, 41, 42])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(SUPPORTED["llama"], tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine(path: Path) -> TorchStepEngine:
    return tiny_engine(path)


class Load:
    """Writes the layers of `data` when it is waited for them; fails from layer `fails_at` on."""

    def __init__(
        self, engine: TorchStepEngine, pages: np.ndarray, data: list[bytes], fails_at: int | None = None
    ) -> None:
        self.engine, self.pages, self.data, self.fails_at = engine, pages, data, fails_at
        self.waited: list[int] = []

    def wait(self, layer: int) -> bool:
        self.waited.append(layer)
        if self.fails_at is not None and layer >= self.fails_at:
            return False
        data = self.data[layer]
        self.engine.write_pages(layer, self.pages, 0, len(data) // self.engine.layout.token_bytes, memoryview(data))
        return True


def run(engine: TorchStepEngine, *items: StepItem, loads: dict[int, Load] | None = None) -> StepResult:
    return engine.run(StepPlan(items), None, loads or {})


def add(engine: TorchStepEngine, seq: int, tokens: list[int]) -> None:
    engine.add_sequence(seq, tokens, len(tokens), GREEDY, 0)


def read(engine: TorchStepEngine, layer: int, pages: np.ndarray, count: int) -> bytes:
    out = bytearray(count * engine.layout.token_bytes)
    engine.read_pages(layer, pages, 0, count, memoryview(out))
    return bytes(out)


def test_the_hook_comes_once_per_layer_when_its_kv_is_in_the_pages(engine: TorchStepEngine) -> None:
    add(engine, 1, FIRST)
    seen: list[tuple[int, bytes]] = []
    plan = StepPlan((StepItem(1, 0, len(FIRST), BROKEN, sample=True),))
    engine.run(plan, lambda layer: seen.append((layer, read(engine, layer, BROKEN, len(FIRST)))), {})
    assert [layer for layer, _ in seen] == [0, 1, 2]
    assert all(any(found) and found == read(engine, layer, BROKEN, len(FIRST)) for layer, found in seen)


def test_a_step_waits_for_each_layer_of_a_load(path: Path, engine: TorchStepEngine) -> None:
    data = _computed(engine, FIRST[:32])
    add(engine, 1, FIRST)
    load = Load(engine, BROKEN, data)
    result = run(engine, StepItem(1, 32, len(FIRST) - 32, BROKEN, sample=True, num_loading=32), loads={1: load})
    assert load.waited == [0, 1, 2]
    assert (result.failed, result.tokens) == ((), (tuple(reference(path, FIRST, 1)),))


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_failed_load_fails_its_sequence_and_no_other(path: Path, engine: TorchStepEngine, fails_at: int) -> None:
    data = _computed(engine, FIRST[:32])
    add(engine, 1, FIRST)
    add(engine, 2, SECOND)
    load = Load(engine, BROKEN, data, fails_at)
    result = run(
        engine,
        StepItem(1, 32, len(FIRST) - 32, BROKEN, sample=True, num_loading=32),
        StepItem(2, 0, len(SECOND), OTHER_RUN, sample=True),
        loads={1: load},
    )
    assert result.failed == (1,)
    assert load.waited == list(range(fails_at + 1))
    assert result.tokens[1] == tuple(reference(path, SECOND, 1))
    again = run(engine, StepItem(1, 0, len(FIRST), BROKEN, sample=True))
    assert again.tokens == (tuple(reference(path, FIRST, 1)),)


def test_contiguous_sequences_are_not_copied_and_a_broken_one_exactly_once(engine: TorchStepEngine) -> None:
    add(engine, 1, FIRST)
    add(engine, 2, SECOND)
    run(engine, StepItem(1, 0, len(FIRST), RUN, sample=True), StepItem(2, 0, len(SECOND), OTHER_RUN, sample=True))
    assert engine.gathered_bytes == 0
    run(engine, StepItem(1, len(FIRST), 1, RUN, sample=True), StepItem(2, len(SECOND), 1, OTHER_RUN, sample=True))
    assert engine.gathered_bytes == 0
    add(engine, 3, FIRST)
    run(engine, StepItem(3, 0, len(FIRST), BROKEN, sample=True))
    run(
        engine, StepItem(3, len(FIRST), 1, BROKEN, sample=True), StepItem(2, len(SECOND) + 1, 1, OTHER_RUN, sample=True)
    )
    assert engine.gathered_bytes == engine.layout.object_bytes(len(FIRST) + 1)


def test_latents_are_copied_once_when_several_sequences_share_a_step(tmp_path: Path) -> None:
    engine = tiny_engine(save_model(SUPPORTED["deepseek_v3"], tmp_path))
    add(engine, 1, FIRST)
    add(engine, 2, SECOND)
    run(engine, StepItem(1, 0, len(FIRST), RUN, sample=True))
    assert engine.gathered_bytes == 0
    run(engine, StepItem(2, 0, len(SECOND), OTHER_RUN, sample=True), StepItem(1, len(FIRST), 1, RUN, sample=True))
    assert engine.gathered_bytes == engine.layout.object_bytes(len(FIRST) + 1 + len(SECOND))


def test_a_window_is_not_looked_at_further_back_than_it_reaches(tmp_path: Path) -> None:
    engine = tiny_engine(save_model(SUPPORTED["mistral"], tmp_path))
    add(engine, 1, FIRST)
    run(engine, StepItem(1, 0, len(FIRST), BROKEN, sample=True))
    run(engine, StepItem(1, len(FIRST), 1, BROKEN, sample=True))
    assert engine.gathered_bytes == engine.layout.object_bytes(11)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_sick_kv_of_one_sequence_reaches_no_other(path: Path, engine: TorchStepEngine, junk: float) -> None:
    """Two rows of one call, one of which looks through its mask at the other's pages and at pages that are nobody's."""
    add(engine, 1, FIRST)
    add(engine, 2, SECOND)
    near = np.arange(18, 24)
    run(engine, StepItem(1, 0, len(FIRST), RUN, sample=True), StepItem(2, 0, len(SECOND), near, sample=True))
    engine.memory.kv[:, near[-1] * 8 :] = junk
    healthy = run(engine, StepItem(1, len(FIRST), 1, RUN, sample=True), StepItem(2, len(SECOND), 1, near, sample=True))
    assert healthy.failed == ()
    assert healthy.tokens == ((reference(path, FIRST, 2)[1],), (reference(path, SECOND, 2)[1],))
    engine.memory.kv[1, near[0] * 8 + 3] = junk
    result = run(
        engine, StepItem(1, len(FIRST) + 1, 1, RUN, sample=True), StepItem(2, len(SECOND) + 1, 1, near, sample=True)
    )
    assert result.failed == (2,)
    assert result.tokens[0] == (reference(path, FIRST, 3)[2],)


def _computed(engine: TorchStepEngine, tokens: list[int]) -> list[bytes]:
    add(engine, 99, tokens)
    run(engine, StepItem(99, 0, len(tokens), RUN, sample=False))
    return [read(engine, layer, RUN, len(tokens)) for layer in range(engine.layout.num_layers)]
