"""The simulated engine in real time: exact tokens, verified KV, the cost model's time."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from mooncake.config import load_config
from mooncake.core.types import NANOS_PER_MS, CostModel, SamplingParams, TokenLogprobs
from mooncake.engine.base import EngineLimits, StepItem, StepPlan
from mooncake.engine.simulated import (
    FIRST_TOKEN,
    HARDWARE,
    NUM_TOKENS,
    SimulatedEngine,
    build_simulated,
    draw_token,
    scaled,
    step_ns,
    token_logprobs,
)

LIMITS = EngineLimits(num_pages=64, page_tokens=4, block_tokens=8, max_batch=8, max_step_tokens=32, max_context=128)
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]


def engine(cost: CostModel = HARDWARE["zero"]) -> SimulatedEngine:
    return SimulatedEngine(LIMITS, cost)


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def prefill(target: SimulatedEngine, seq: int, at: np.ndarray, tokens: list[int] = PROMPT) -> int:
    target.add_sequence(seq, tokens, len(tokens), SamplingParams(seed=3), 0)
    result = target.run(StepPlan((StepItem(seq, 0, len(tokens), at, sample=True),)), None, {})
    assert not result.failed
    [[token]] = result.tokens
    return token


def test_a_grammar_is_refused() -> None:
    target, at = engine(), pages(0, 1, 2)
    target.add_sequence(1, PROMPT, len(PROMPT), SamplingParams(grammar='start: "a"'), 0)
    result = target.run(StepPlan((StepItem(1, 0, len(PROMPT), at, sample=True),)), None, {})
    assert result.faults() == {1: ("grammar", "the simulated engine follows no grammar")}


def test_every_word_is_as_likely_as_any_other() -> None:
    target = engine()
    for seq, wanted in enumerate((None, 0, 2)):
        target.add_sequence(seq, PROMPT, len(PROMPT), SamplingParams(seed=3, num_logprobs=wanted), 0)
    items = [StepItem(seq, 0, len(PROMPT), pages(3 * seq, 3 * seq + 1, 3 * seq + 2), sample=True) for seq in range(3)]
    result = target.run(StepPlan(tuple(items)), None, {})
    [[token], _, _] = result.tokens
    each = -math.log(NUM_TOKENS)
    top = ((token, each), (FIRST_TOKEN, each))
    assert result.logprobs == ((), (TokenLogprobs(each),), (TokenLogprobs(each, top),))
    assert token_logprobs(FIRST_TOKEN, 2).top == ((FIRST_TOKEN, each), (FIRST_TOKEN + 1, each))


def move(
    source: SimulatedEngine, from_pages: np.ndarray, target: SimulatedEngine, to_pages: np.ndarray, count: int
) -> None:
    for layer in range(source.layout.num_layers):
        data = memoryview(bytearray(count * source.layout.token_bytes))
        source.read_pages(layer, from_pages, 0, count, data)
        target.write_pages(layer, to_pages, 0, count, data)


class Load:
    def __init__(self, ok: bool) -> None:
        self.ok = ok
        self.layers: list[int] = []

    def wait(self, layer: int) -> bool:
        self.layers.append(layer)
        return self.ok


def test_tokens_are_a_pure_function_within_a_small_vocabulary() -> None:
    drawn = {draw_token(seed, choice, position) for seed in range(5) for choice in range(2) for position in range(50)}
    assert len(drawn) > 450
    assert all(FIRST_TOKEN <= token < FIRST_TOKEN + NUM_TOKENS for token in drawn)
    assert draw_token(1, 0, 5) != draw_token(1, 1, 5)


def test_another_engine_continues_on_moved_kv_with_the_same_tokens() -> None:
    one, other = engine(), engine()
    here, there = pages(3, 9, 1), pages(7, 2, 30)
    first = prefill(one, 1, here)
    move(one, here, other, there, len(PROMPT))
    other.add_sequence(8, [*PROMPT, first], len(PROMPT), SamplingParams(seed=3), 0)
    decode = (StepItem(8, len(PROMPT), 1, there, sample=True),)
    tokens = [first]
    tokens += other.run(StepPlan(decode), None, {}).tokens[0]
    assert tokens == [draw_token(3, 0, len(PROMPT)), draw_token(3, 0, len(PROMPT) + 1)]


def test_a_joint_sequence_draws_the_token_of_each_choice() -> None:
    one = engine()
    one.add_sequence(1, PROMPT, len(PROMPT), SamplingParams(seed=3), 0, 3)
    result = one.run(StepPlan((StepItem(1, 0, len(PROMPT), pages(3, 9, 1), sample=True),)), None, {})
    assert result.tokens == (tuple(draw_token(3, choice, len(PROMPT)) for choice in range(3)),)


@pytest.mark.parametrize("what", ["missing", "other_tokens", "other_position", "one_bit"])
def test_wrong_kv_fails_the_sequence(what: str) -> None:
    one, other = engine(), engine()
    here, there = pages(3, 9, 1), pages(7, 2, 30)
    first = prefill(one, 1, here, PROMPT if what != "other_tokens" else [99, *PROMPT[1:]])
    if what != "missing":
        move(one, here if what != "other_position" else pages(9, 3, 1), other, there, len(PROMPT))
    if what == "one_bit":
        data = memoryview(bytearray(other.layout.token_bytes))
        other.read_pages(3, there, 10, 1, data)
        data[17] ^= 1
        other.write_pages(3, there, 10, 1, data)
    other.add_sequence(8, [*PROMPT, first], len(PROMPT), SamplingParams(seed=3), 0)
    result = other.run(StepPlan((StepItem(8, len(PROMPT), 1, there, sample=True),)), None, {})
    assert result.failed == (8,)
    assert result.tokens == ((),)


def test_a_step_waits_for_its_load_layer_by_layer_and_reports_its_failure() -> None:
    one, other = engine(), engine()
    here, there = pages(3, 9, 1), pages(7, 2, 30)
    prefill(one, 1, here)
    move(one, here, other, there, 8)
    other.add_sequence(8, PROMPT, len(PROMPT), SamplingParams(seed=3), 0)
    plan = StepPlan((StepItem(8, 8, 3, there, sample=True, num_loading=8),))
    seen: list[int] = []
    load = Load(ok=True)
    result = other.run(plan, seen.append, {8: load})
    assert (result.failed, seen, load.layers) == ((), [0, 1, 2, 3], [0, 1, 2, 3])
    assert result.tokens == ((draw_token(3, 0, len(PROMPT)),),)
    assert other.run(plan, None, {8: Load(ok=False)}).failed == (8,)


def test_a_step_takes_the_time_of_the_cost_model() -> None:
    cost = CostModel((4.0, 1000.0, 0.0), (3.0, 1.0, 0.0))
    chunk, single = StepItem(1, 0, 8, pages(0, 1), False), StepItem(2, 5, 1, pages(2, 3), True)
    assert step_ns(cost, (chunk,)) == 12 * NANOS_PER_MS
    assert step_ns(cost, (chunk, chunk)) == 20 * NANOS_PER_MS
    assert step_ns(cost, (single, single)) == 5 * NANOS_PER_MS
    assert step_ns(cost, (single, chunk)) == 16 * NANOS_PER_MS
    slow = engine(cost)
    began = time.monotonic_ns()
    prefill(slow, 1, pages(0, 1, 2))
    assert time.monotonic_ns() - began >= 15 * NANOS_PER_MS


def test_built_from_the_configuration() -> None:
    flags = {"engine": "simulated", "simulated.hardware": "h100", "simulated.speed": "2", "kv_tokens": "4096"}
    built = build_simulated(load_config(flags=flags, environ={}), 4)
    assert built.measure() == scaled(HARDWARE["h100"], 2.0)
    assert built.measure().prefill == (3.1, 19.3, 0.2445)
    assert built.limits.max_batch == 4
    assert built.limits.num_pages * built.limits.page_tokens == 4096
