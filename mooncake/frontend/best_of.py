"""`best_of`: of the choices that were generated for each prompt, those whose tokens are the likeliest on the mean."""

from __future__ import annotations

from collections.abc import Sequence

from mooncake.core.types import FinishReason
from mooncake.frontend.assembly import Delta

Choice = tuple[Delta, FinishReason]


def best(choices: Sequence[Choice], per_prompt: int, n: int, *, keep_logprobs: bool) -> list[Choice]:
    """n of each prompt's per_prompt choices, the best first, numbered anew. keep_logprobs: the client asked for them."""
    chosen: list[Choice] = []
    for first in range(0, len(choices), per_prompt):
        ranked = sorted(choices[first : first + per_prompt], key=lambda choice: -_mean_logprob(choice[0]))
        chosen += ranked[:n]
    return [
        (Delta(delta.text, delta.logprobs if keep_logprobs else (), at), reason)
        for at, (delta, reason) in enumerate(chosen)
    ]


def _mean_logprob(delta: Delta) -> float:
    return sum([found.logprob for _, found in delta.logprobs]) / max(1, len(delta.logprobs))
