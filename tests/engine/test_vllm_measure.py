"""Calibration against an engine of known cost, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from mooncake.core.types import CostModel
from mooncake.engine.base import EngineLimits
from mooncake.engine.vllm.measure import measure

LIMITS = EngineLimits(
    num_pages=1024, page_tokens=16, block_tokens=64, max_batch=16, max_step_tokens=4096, max_context=4096
)


class Engine:
    """Steps of the cost model, one after the other: all new prompts, then all that decode. What a prompt has in common with an
    earlier one of its salt is not computed, in whole pages."""

    def __init__(self, cost: CostModel) -> None:
        self.now = 0
        self.longest = 0
        self._cost = cost
        self._new: list[tuple[int, int, asyncio.Event]] = []
        self._running: dict[asyncio.Event, int] = {}
        self._cached: dict[str, list[list[int]]] = {}

    async def generate(self, prompt: Sequence[int], num_tokens: int, salt: str) -> AsyncIterator[int]:
        known = self._cached.setdefault(salt, [])
        cached = min(len(prompt) - 1, max((_common(prompt, other) for other in known), default=0)) // 16 * 16
        known.append(list(prompt))
        self.longest = max(self.longest, len(prompt))
        event = asyncio.Event()
        self._new.append((len(prompt) - cached, cached, event))
        for drawn in range(num_tokens):
            await event.wait()
            event.clear()
            yield drawn + 1
            if drawn + 1 < num_tokens:
                self._running[event] = len(prompt) + drawn + 1

    async def run(self) -> None:
        while True:
            for _ in range(100):  # whoever can ask now, does
                await asyncio.sleep(0)
            if self._new:
                count, cached, event = self._new.pop(0)
                self.now += self._cost.prefill_ns(count, cached)
                event.set()
            elif self._running:
                self.now += self._cost.decode_ns(len(self._running), sum(self._running.values()))
                running, self._running = self._running, {}
                for event in running:
                    event.set()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def measured(engine: Engine, limits: EngineLimits) -> CostModel:
    async def scenario() -> CostModel:
        running = asyncio.create_task(engine.run())
        try:
            return await measure(engine.generate, limits, lambda: engine.now)
        finally:
            running.cancel()

    return asyncio.run(scenario())


def test_the_fitted_model_is_the_engines() -> None:
    engine = Engine(CostModel((10.0, 40.0, 900.0), (8.0, 0.5, 300.0)))
    found = measured(engine, LIMITS)
    assert found.prefill == pytest.approx((10.0, 40.0, 900.0), rel=0.02)
    assert found.decode == pytest.approx((8.0, 0.5, 300.0), rel=0.15)  # contexts grow while it is timed
    assert engine.longest == 1024


def test_a_slow_engine_is_measured_with_short_prompts() -> None:
    engine = Engine(CostModel((50.0, 20_000.0, 0.0), (100.0, 1.0, 0.0)))
    found = measured(engine, LIMITS)
    assert found.prefill == pytest.approx((50.0, 20_000.0, 0.0), rel=0.05, abs=1e-6)
    assert engine.longest == 256 and engine.now < 60e9


def test_limits_are_kept() -> None:
    engine = Engine(CostModel((10.0, 40.0, 900.0), (8.0, 0.5, 300.0)))
    small = EngineLimits(
        num_pages=16, page_tokens=16, block_tokens=64, max_batch=2, max_step_tokens=64, max_context=200
    )
    found = measured(engine, small)
    assert engine.longest <= 128 and found.prefill[1] > 0 and found.decode[0] > 0
