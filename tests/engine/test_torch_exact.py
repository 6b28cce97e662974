"""Greedy tokens of the packed, paged forward are those of transformers' generate, in float32, for many architectures."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from mooncake.core.errors import ModelError
from mooncake.engine.base import StepItem, StepPlan
from mooncake.engine.torch.step_engine import TorchStepEngine
from tests.engine.tiny_models import (
    GREEDY,
    LIMITS,
    REFUSED,
    SUPPORTED,
    Run,
    generate,
    prompts,
    reference,
    save_model,
    scatter,
    tiny_engine,
)

NUM_TOKENS = 6
PROMPTS = prompts(5, 40, 23, 71)
"""The longest takes three chunks; two decode while others are still prefilled."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(SUPPORTED["llama"], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(SUPPORTED["deepseek_v3"], tmp_path_factory.mktemp("mla"))


@pytest.fixture(params=["llama", "mla"])
def either(request: pytest.FixtureRequest) -> Path:
    """A model of each form of KV."""
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("kind", SUPPORTED)
def test_batched_mixed_lengths_in_chunks_are_what_generate_says(kind: str, tmp_path: Path) -> None:
    path = save_model(SUPPORTED[kind], tmp_path)
    engine = tiny_engine(path)
    expected = [reference(path, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert generate(engine, PROMPTS, NUM_TOKENS) == expected
    assert [generate(engine, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS[:2]] == expected[:2]


@pytest.mark.parametrize("kind", ["llama", "mistral", "deepseek_v3"])
def test_a_chunk_of_several_pieces_is_what_generate_says(kind: str, tmp_path: Path) -> None:
    path = save_model(SUPPORTED[kind], tmp_path)
    limits = msgspec.structs.replace(LIMITS, num_pages=128, max_step_tokens=352, max_context=512)
    [prompt, other] = prompts(440, 300, seed=2)
    engine = tiny_engine(path, limits)
    assert generate(engine, [prompt], 3) == [reference(path, prompt, 3)]
    assert generate(engine, [other, prompt], 3) == [reference(path, other, 3), reference(path, prompt, 3)]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_come_out_wrong_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = save_model(REFUSED[kind], tmp_path)
    with pytest.raises(ModelError, match=f"model type '{kind}' is not supported: "):
        tiny_engine(path)


def test_rows_of_a_common_stride_and_scattered_pages_give_the_same(either: Path) -> None:
    engine = tiny_engine(either)
    expected = [reference(either, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert generate(engine, PROMPTS, NUM_TOKENS, row_pages=10) == expected
    run = Run(engine)
    scatter(run)
    for prompt in PROMPTS:
        run.submit(prompt, NUM_TOKENS)
    assert run.finish() == expected


def test_preempted_sequences_go_on_as_if_nothing_had_been(either: Path) -> None:
    limits = msgspec.structs.replace(LIMITS, num_pages=12)
    run = Run(tiny_engine(either, limits))
    given = prompts(30, 28, 25, seed=3)
    for prompt in given:
        run.submit(prompt, 20)
    assert run.finish() == [reference(either, prompt, 20) for prompt in given]
    assert run.core.num_preempted > 0


def test_kv_copied_to_another_engine_and_other_pages_is_continued_exactly(either: Path) -> None:
    source, target = tiny_engine(either), tiny_engine(either)
    prompt = PROMPTS[1]
    here, there = np.array([3, 4, 9, 1, 30, 31, 32]), np.array([20, 7, 8, 9, 2, 50, 51])
    first = _step(source, 0, prompt, here, 0)
    _copy(source, here, target, there, len(prompt))
    tokens = [first]
    while len(tokens) < NUM_TOKENS:
        known = [*prompt, *tokens]
        tokens.append(_step(target, 0, known, there, len(known) - 1))
    assert tokens == reference(either, prompt, NUM_TOKENS)


def test_read_and_write_of_any_range_are_opposites(either: Path) -> None:
    engine = tiny_engine(either)
    pages = np.array([5, 6, 2, 60, 61])
    size = engine.layout.token_bytes
    for start, count in ((0, 40), (3, 1), (7, 2), (8, 8), (13, 27)):
        data = np.random.default_rng(start).integers(0, 256, count * size, dtype=np.uint8).tobytes()
        engine.write_pages(1, pages, start, count, memoryview(data))
        found = bytearray(count * size)
        engine.read_pages(1, pages, start, count, memoryview(found))
        assert found == data


def test_the_layout_names_the_form_of_the_kv(llama: Path, mla: Path) -> None:
    layouts = [tiny_engine(path).layout for path in (llama, mla)]
    assert [(found.name, found.num_layers, found.token_bytes) for found in layouts] == [
        ("kv.2x8", 3, 2 * 2 * 8 * 4),
        ("mla.24+8", 3, (24 + 8) * 4),
    ]
    assert {found.dtype for found in layouts} == {"float32"}


def test_calibration_gives_times_and_leaves_no_sequence_behind(llama: Path) -> None:
    engine = tiny_engine(llama)
    cost = engine.measure()
    assert cost.prefill_ns(64, 0) > 0 and cost.decode_ns(4, 100) > 0
    assert generate(engine, PROMPTS[:1], 3) == [reference(llama, PROMPTS[0], 3)]


def _step(engine: TorchStepEngine, seq: int, tokens: list[int], pages: np.ndarray, start: int) -> int:
    engine.add_sequence(seq, tokens, len(tokens), GREEDY, 0)
    result = engine.run(StepPlan((StepItem(seq, start, len(tokens) - start, pages, sample=True),)), None, {})
    return result.tokens[0][0]


def _copy(source: TorchStepEngine, here: np.ndarray, target: TorchStepEngine, there: np.ndarray, count: int) -> None:
    data = memoryview(bytearray(count * source.layout.token_bytes))
    for layer in range(source.layout.num_layers):
        source.read_pages(layer, here, 0, count, data)
        target.write_pages(layer, there, 0, count, data)
