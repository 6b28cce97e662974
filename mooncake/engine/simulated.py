"""The simulated engine: time by a cost model, tokens by a pure function, KV bytes by another one.

A token depends on (seed, choice, absolute position) alone, so whoever continues a sequence continues it exactly. All words are
equally likely, and log probabilities say so. The KV of a token depends on its id, its position and the layer; an engine that
meets KV it has not computed checks it before it goes on, so that a test which moves KV moves the right KV. The simulator
(`mooncake.sim`) uses the same tokens and the same step times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mooncake.config import Config
from mooncake.core.noise import noise
from mooncake.core.types import NANOS_PER_S, CostModel, SamplingParams, TokenLogprobs
from mooncake.engine.base import EngineLimits, KvLayout, LayerHook, LayerLoad, StepItem, StepPlan, StepResult
from mooncake.engine.build import engine_limits

HARDWARE = {
    "zero": CostModel(),
    "a800-paper": CostModel((0.0, 116.2, 1.428), (17.75, 0.058, 26.1)),
    "a100": CostModel((29.6, 92.3, 1.860), (17.75, 0.058, 26.1)),
    "h100": CostModel((6.2, 38.6, 0.489), (10.17, 0.022, 13.2)),
    "h200": CostModel((4.8, 37.8, 0.507), (8.28, 0.023, 9.5)),
    "b200": CostModel((6.4, 21.2, 0.289), (7.39, 0.017, 6.2)),
}
"""LLaMA-3.1-70B in bf16 on eight GPUs (FACTS section 3)."""

FIRST_TOKEN = 1000
NUM_TOKENS = 4096
"""Drawn tokens are words in the middle of any byte-pair vocabulary: no special, no single byte."""
LAYOUT = KvLayout(num_layers=4, token_bytes=64, dtype="uint64", name="simulated.8")
MODEL_CONTEXT = 131_072
DEFAULT_KV_TOKENS = 131_072
_NO_GRAMMAR = "the simulated engine follows no grammar"
_WORDS = LAYOUT.token_bytes // 8
_LOGPROB = -math.log(NUM_TOKENS)


def draw_token(seed: int, choice: int, position: int, *, first: int = FIRST_TOKEN, count: int = NUM_TOKENS) -> int:
    """The token at that position of that output: see `mooncake.core.noise`."""
    return first + noise(seed, choice, position) % count


def token_logprobs(token: int, num_top: int) -> TokenLogprobs:
    """Of a token that was drawn: it, then others, as none is likelier."""
    others = [other for other in range(FIRST_TOKEN, FIRST_TOKEN + num_top) if other != token]
    return TokenLogprobs(_LOGPROB, tuple([(each, _LOGPROB) for each in [token, *others][:num_top]]))


def step_ns(cost: CostModel, items: Iterable[StepItem]) -> int:
    """Duration of one step: the decode part of its single tokens plus the prefill part of its chunks, whose fixed part is paid
    once."""
    num_decode = num_context = total = 0
    for item in items:
        if item.count == 1:
            num_decode += 1
            num_context += item.start + 1
        elif not total:
            total = cost.prefill_ns(item.count, item.start)
        else:
            total += cost.prefill_ns(item.count, item.start) - cost.prefill_ns(0, 0)
    return total + (cost.decode_ns(num_decode, num_context) if num_decode else 0)


def scaled(cost: CostModel, speed: float) -> CostModel:
    a, b, c = (value / speed for value in cost.prefill)
    d, e, f = (value / speed for value in cost.decode)
    return CostModel((a, b, c), (d, e, f))


class _Sequence:
    __slots__ = ("choices", "guided", "num_logprobs", "seed", "tokens", "trusted")

    def __init__(self, token_ids: Sequence[int], sampling: SamplingParams, choices: range) -> None:
        self.tokens = list(token_ids)
        self.seed = sampling.seed
        self.guided = bool(sampling.grammar)
        self.num_logprobs = sampling.num_logprobs
        self.choices = choices
        self.trusted = 0
        """Tokens whose KV this engine computed or checked, for this sequence in its present pages."""


class SimulatedEngine:
    """A `StepEngine`. Sleeps as long as the cost model says, layer by layer."""

    layout = LAYOUT

    def __init__(self, limits: EngineLimits, cost: CostModel) -> None:
        self.limits = limits
        self.vocab_size = FIRST_TOKEN + NUM_TOKENS
        self._cost = cost
        self._page_tokens = limits.page_tokens
        self._kv = np.zeros((LAYOUT.num_layers, limits.num_pages * limits.page_tokens, _WORDS), dtype=np.uint64)
        self._sequences: dict[int, _Sequence] = {}

    def add_sequence(
        self,
        seq: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        choice: int,
        num_choices: int = 1,
    ) -> None:
        self._sequences[seq] = _Sequence(token_ids, sampling, range(choice, choice + num_choices))

    def remove_sequence(self, seq: int) -> None:
        del self._sequences[seq]

    def run(self, plan: StepPlan, after_layer: LayerHook | None, loads: Mapping[int, LayerLoad]) -> StepResult:
        began = time.monotonic_ns()
        duration = step_ns(self._cost, plan.items)
        failed: dict[int, None] = {}
        for layer in range(LAYOUT.num_layers):
            for item in plan.items:
                if item.num_loading and item.seq not in failed and not loads[item.seq].wait(layer):
                    failed[item.seq] = None
            self._compute_layer(layer, plan.items)
            _sleep_until(began + duration * (layer + 1) // LAYOUT.num_layers)
            if after_layer is not None:
                after_layer(layer)
        for item in plan.items:
            if item.seq not in failed and not self._is_right(item):
                failed[item.seq] = None
        tokens = tuple(self._draw(item) if item.sample and item.seq not in failed else () for item in plan.items)
        lost = tuple((item.seq, _NO_GRAMMAR) for item in plan.items if self._sequences[item.seq].guided)
        return StepResult(tokens, self._logprobs(plan.items, tokens), tuple(failed), duration, lost=lost)

    def read_pages(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None:
        target = np.frombuffer(out, dtype=np.uint64).reshape(count, _WORDS)
        target[:] = self._kv[layer, self._slots(pages, start, count)]

    def write_pages(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None:
        self._kv[layer, self._slots(pages, start, count)] = np.frombuffer(data, dtype=np.uint64).reshape(count, _WORDS)

    def measure(self) -> CostModel:
        return self._cost

    def close(self) -> None:
        pass

    def _slots(self, pages: np.ndarray, start: int, count: int) -> np.ndarray:
        positions = np.arange(start, start + count)
        slots: np.ndarray = pages[positions // self._page_tokens] * self._page_tokens + positions % self._page_tokens
        return slots

    def _compute_layer(self, layer: int, items: Sequence[StepItem]) -> None:
        for item in items:
            tokens = self._sequences[item.seq].tokens[item.start : item.start + item.count]
            self._kv[layer, self._slots(item.pages, item.start, item.count)] = kv_words(tokens, item.start, layer)

    def _is_right(self, item: StepItem) -> bool:
        """Whether the KV before the item is what its tokens make; what was seen before is not looked at again."""
        sequence = self._sequences[item.seq]
        if item.start < sequence.trusted:
            sequence.trusted = 0  # preempted: it has other pages now
        unseen = item.start - sequence.trusted
        if unseen:
            slots = self._slots(item.pages, sequence.trusted, unseen)
            tokens = sequence.tokens[sequence.trusted : item.start]
            for layer in range(LAYOUT.num_layers):
                if not np.array_equal(self._kv[layer, slots], kv_words(tokens, sequence.trusted, layer)):
                    return False
        sequence.trusted = item.start + item.count
        return True

    def _draw(self, item: StepItem) -> tuple[int, ...]:
        sequence = self._sequences[item.seq]
        tokens = tuple(draw_token(sequence.seed, choice, item.start + item.count) for choice in sequence.choices)
        sequence.tokens.append(tokens[0])  # a joint sequence never computes it
        return tokens

    def _logprobs(
        self, items: Sequence[StepItem], tokens: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[TokenLogprobs, ...], ...]:
        wanted = [self._sequences[item.seq].num_logprobs for item in items]
        if all(num_top is None for num_top in wanted):
            return ()
        return tuple(
            () if num_top is None else tuple([token_logprobs(token, num_top) for token in drawn])
            for num_top, drawn in zip(wanted, tokens, strict=True)
        )


def kv_words(token_ids: Sequence[int], start: int, layer: int) -> np.ndarray:
    """KV of tokens at positions start, start + 1, ...: uint64 of shape (tokens, words)."""
    tokens = np.asarray(token_ids, dtype=np.uint64)
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    base = (tokens << np.uint64(40)) ^ (positions << np.uint64(8)) ^ np.uint64(layer)
    mixed: np.ndarray = (base[:, np.newaxis] + np.arange(1, _WORDS + 1, dtype=np.uint64)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    return mixed


def _sleep_until(time_ns: int) -> None:
    left = time_ns - time.monotonic_ns()
    if left > 0:
        time.sleep(left / NANOS_PER_S)


def build_simulated(config: Config, max_batch: int) -> SimulatedEngine:
    limits = engine_limits(config, max_batch, MODEL_CONTEXT, DEFAULT_KV_TOKENS)
    cost = scaled(HARDWARE[config.simulated.hardware], config.simulated.speed)
    return SimulatedEngine(limits, cost)
