"""What the Conductor has learnt of output lengths. Policies see this and max_tokens, never the truth."""

from __future__ import annotations

import msgspec


class Lengths(msgspec.Struct):
    """Moving moments of the output lengths of completed requests. The first ones are a guess: memoryless around 256
    tokens."""

    mean: float = 256.0
    mean_square: float = 2 * 256.0**2
    weight: float = 0.02

    def learn(self, num_output: int) -> None:
        self.mean += self.weight * (num_output - self.mean)
        self.mean_square += self.weight * (num_output * num_output - self.mean_square)

    def expect(self, max_tokens: int | None, num_generated: int) -> int:
        """Output tokens still to come."""
        left = max(1, int(self.mean) - num_generated)
        return left if max_tokens is None else max(1, min(left, max_tokens - num_generated))

    @property
    def mean_left(self) -> float:
        """Tokens still to come of a sequence met in a running batch. Long ones are met more often, and at any point of
        theirs with equal chance: E[x^2] / 2 E[x]."""
        return max(1.0, self.mean_square / (2.0 * max(1.0, self.mean)))
