"""Calibrates an engine of vLLM: times a few prompts and decode batches, and fits the time model to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from mooncake.core.costs import fit_decode, fit_prefill
from mooncake.core.types import NANOS_PER_MS, CostModel
from mooncake.engine.base import EngineLimits

Generate = Callable[[Sequence[int], int, str], AsyncIterator[int]]
"""Token ids of a prompt, number of tokens to draw, salt of its cached pages: gives how many tokens have been drawn."""

_PROMPT_TOKENS_MAX = 1024
_PROMPTS = ((0.125, 0.0), (0.5, 0.0), (1.0, 0.0), (0.25, 0.5), (0.125, 0.75))
"""(new, prefix) as shares of the longest prompt that is measured."""
_BATCHES = ((1, 0.125), (1, 0.5), (4, 0.125), (4, 0.5), (8, 0.25))
"""(sequences, context of each)"""
_DECODED = 8
_TOKEN = 1


async def measure(generate: Generate, limits: EngineLimits) -> CostModel:
    pages = limits.num_pages * limits.page_tokens
    longest = min(_PROMPT_TOKENS_MAX, limits.max_context - _DECODED - 1, pages // 2)
    await _prefill(generate, limits, longest // 4, 0, "warm")
    prefill, decode = [], []
    for at, (new, prefix) in enumerate(_PROMPTS):
        prefix_tokens = int(prefix * longest) // limits.block_tokens * limits.block_tokens
        new_tokens = max(1, int(new * longest))
        prefill.append(
            (new_tokens, prefix_tokens, await _prefill(generate, limits, new_tokens, prefix_tokens, f"p{at}"))
        )
    for at, (batch, share) in enumerate(_BATCHES):
        context = max(1, int(share * longest))
        if batch <= limits.max_batch and batch * (context + _DECODED) <= pages:
            decode.append((batch, batch * context, await _decode(generate, batch, context, f"d{at}")))
    return CostModel(fit_prefill(prefill), fit_decode(decode))


async def _prefill(generate: Generate, limits: EngineLimits, new: int, prefix: int, salt: str) -> float:
    """Milliseconds to the first token."""
    if prefix:
        await _last(generate([_TOKEN] * (prefix + 1), 1, salt))
    began = time.monotonic_ns()
    await _last(generate([_TOKEN] * (prefix + new), 1, salt))
    return (time.monotonic_ns() - began) / NANOS_PER_MS


async def _decode(generate: Generate, batch: int, context: int, salt: str) -> float:
    """Milliseconds of a step, from when all have their first token."""
    first = [asyncio.Event() for _ in range(batch)]

    async def run(at: int) -> None:
        async for _ in generate([_TOKEN] * context, _DECODED, f"{salt}.{at}"):
            first[at].set()

    tasks = [asyncio.create_task(run(at)) for at in range(batch)]
    await asyncio.gather(*(each.wait() for each in first))
    began = time.monotonic_ns()
    await asyncio.gather(*tasks)
    return (time.monotonic_ns() - began) / NANOS_PER_MS / (_DECODED - 1)


async def _last(outputs: AsyncIterator[int]) -> None:
    async for _ in outputs:
        pass
