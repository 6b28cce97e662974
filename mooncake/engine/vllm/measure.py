"""Calibrates an engine of vLLM: times a few prompts and decode batches, and fits the time model to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from mooncake.core.clock import Clock
from mooncake.core.costs import fit_decode, fit_prefill
from mooncake.core.types import NANOS_PER_MS, CostModel
from mooncake.engine.base import EngineLimits

Generate = Callable[[Sequence[int], int, str], AsyncIterator[int]]
"""Token ids of a prompt, number of tokens to draw, salt of its cached pages: gives how many tokens have been drawn."""

_PROMPT_TOKENS_MIN, _PROMPT_TOKENS_MAX = 256, 1024
"""Of the longest prompt that is measured."""
_LONGEST_S = 2.0
"""What computing it may take: a slow engine is measured with shorter ones. All together take some six times as long."""
_PROMPTS = ((0.125, 0.0), (0.5, 0.0), (1.0, 0.0), (0.125, 0.75), (0.25, 0.5))
"""(new, prefix) as shares of the longest prompt."""
_BATCHES = ((4, 0.5), (8, 0.125), (4, 0.125), (1, 0.5), (1, 0.125))
"""(sequences, context of each)"""
_DECODED = 8
_OLD, _NEW = 1, 2
"""Tokens of a prefix, and of what is computed after it."""


async def measure(generate: Generate, limits: EngineLimits, clock: Clock) -> CostModel:
    pages = limits.num_pages * limits.page_tokens
    longest = min(_PROMPT_TOKENS_MAX, limits.max_context - _DECODED - 1, pages // 2)
    warm = min(_PROMPT_TOKENS_MIN, longest)
    await _prefill(generate, clock, warm, 0, "warm")
    tokens_per_ms = warm / await _prefill(generate, clock, warm, 0, "speed")
    longest = min(longest, max(_PROMPT_TOKENS_MIN, int(tokens_per_ms * _LONGEST_S * 1000)))
    prefill, decode = [], []
    for at, (new, prefix) in enumerate(_PROMPTS):
        prefix_tokens = int(prefix * longest) // limits.block_tokens * limits.block_tokens
        new_tokens = max(1, int(new * longest))
        salt = "prefix" if prefix_tokens else f"p{at}"
        prefill.append((new_tokens, prefix_tokens, await _prefill(generate, clock, new_tokens, prefix_tokens, salt)))
    for batch, share in _BATCHES:
        context = max(1, int(share * longest))
        if batch <= limits.max_batch and batch * (context + _DECODED) <= pages:
            decode.append((batch, batch * context, await _decode(generate, clock, batch, context)))
    return CostModel(fit_prefill(prefill), fit_decode(decode))


async def _prefill(generate: Generate, clock: Clock, new: int, prefix: int, salt: str) -> float:
    """Milliseconds to the first token."""
    if prefix:
        await _last(generate([_OLD] * (prefix + 1), 1, salt))
    began = clock()
    await _last(generate([_OLD] * prefix + [_NEW] * new, 1, salt))
    return (clock() - began) / NANOS_PER_MS


async def _decode(generate: Generate, clock: Clock, batch: int, context: int) -> float:
    """Milliseconds of a step, from when all have their first token. Sequences share no pages with others of their batch, but
    with those of other batches."""
    first = [asyncio.Event() for _ in range(batch)]

    async def run(at: int) -> None:
        async for _ in generate([_OLD] * context, _DECODED, f"d{at}"):
            first[at].set()

    tasks = [asyncio.create_task(run(at)) for at in range(batch)]
    await asyncio.gather(*(each.wait() for each in first))
    began = clock()
    await asyncio.gather(*tasks)
    return (clock() - began) / NANOS_PER_MS / (_DECODED - 1)


async def _last(outputs: AsyncIterator[int]) -> None:
    async for _ in outputs:
        pass
