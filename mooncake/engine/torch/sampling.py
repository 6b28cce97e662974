"""From logits to tokens: greedy, or the greatest of log probability plus Gumbel noise (Gumbel 1954; "Gumbel-max"), which draws
from the distribution exactly.

The noise of a token is a pure function of (seed, choice, position, token). A draw changes only where the two best sums are as
close as the last bits in which logits differ between batches of other composition; walking a cumulative distribution would be
moved by the differences of all tokens before. Filters: temperature, then top_k, top_p and min_p on what remains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mooncake.core.noise import noise, uniforms
from mooncake.core.types import SamplingParams, TokenLogprobs
from mooncake.engine.grammar import Matcher

_NUCLEUS_GUESS = 1024
"""A nucleus of no more tokens, which is the rule, is found without sorting the vocabulary."""


class SequenceState:
    """Tokens of one sequence and how to draw more; what penalties need is rebuilt from the tokens. A draw gives a token for
    each choice; only a joint sequence, which draws once, has several. matcher: at the beginning of its grammar; None: free."""

    __slots__ = ("_matcher", "choices", "num_prompt", "params", "token_ids")

    def __init__(
        self,
        token_ids: Sequence[int],
        num_prompt: int,
        params: SamplingParams,
        choice: int,
        num_choices: int = 1,
        matcher: Matcher | None = None,
    ) -> None:
        self.token_ids = list(token_ids)
        self.num_prompt = num_prompt
        self.params = params
        self.choices = range(choice, choice + num_choices)
        self._matcher = matcher
        if matcher is not None:
            for token in self.token_ids[num_prompt:]:
                matcher.advance(token)

    @property
    def fault(self) -> str:
        """Why its grammar cannot be followed, or nothing."""
        return "" if self._matcher is None else self._matcher.fault

    def append(self, token: int) -> None:
        self.token_ids.append(token)
        if self._matcher is not None:
            self._matcher.advance(token)

    @property
    def is_plain(self) -> bool:
        """Whether the greatest logit is the answer."""
        p = self.params
        return (
            p.greedy
            and self._matcher is None
            and not p.logit_bias
            and not self._penalised
            and len(self.token_ids) - self.num_prompt >= p.min_tokens
        )

    @property
    def _penalised(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    def draw(self, logits: np.ndarray) -> tuple[int, ...]:
        """logits: float32 [vocabulary]; changed in place."""
        if self.is_plain:
            return self.repeat(int(np.argmax(logits)))
        p = self.params
        num_output = len(self.token_ids) - self.num_prompt
        for token, bias in p.logit_bias:
            logits[token] += bias
        if self._penalised:
            self._penalise(logits)
        if num_output < p.min_tokens and p.stop_token_ids:
            logits[list(p.stop_token_ids)] = -np.inf
        if self._matcher is not None:
            self._matcher.forbid(logits)
        if p.greedy:
            return self.repeat(int(np.argmax(logits)))
        weights = _weights(logits, p)
        return tuple(_pick(weights, noise(p.seed, choice, len(self.token_ids))) for choice in self.choices)

    def repeat(self, token: int) -> tuple[int, ...]:
        """The same token for each choice."""
        return (token,) * len(self.choices)

    def _penalise(self, logits: np.ndarray) -> None:
        p = self.params
        if p.repetition_penalty != 1.0:
            seen = np.unique(np.asarray(self.token_ids))
            there = logits[seen]
            logits[seen] = np.where(there > 0, there / p.repetition_penalty, there * p.repetition_penalty)
        output = np.asarray(self.token_ids[self.num_prompt :], dtype=np.int64)
        if output.size:
            tokens, counts = np.unique(output, return_counts=True)
            logits[tokens] -= p.frequency_penalty * counts + p.presence_penalty


def _weights(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Unnormalised probabilities after temperature and filters, float64, in the order of the vocabulary."""
    scaled = logits.astype(np.float64) / p.temperature
    weights: np.ndarray = np.exp(scaled - scaled.max())
    if p.top_k and p.top_k < len(weights):
        weights[weights < np.partition(weights, -p.top_k)[-p.top_k]] = 0.0
    if p.top_p < 1.0:
        weights[weights < _nucleus_floor(weights, p.top_p)] = 0.0
    if p.min_p > 0.0:
        weights[weights < p.min_p * weights.max()] = 0.0
    return weights


def _nucleus_floor(weights: np.ndarray, share: float) -> float:
    """The smallest weight of the fewest, greatest ones that have `share` of the sum."""
    wanted = share * weights.sum()
    best = weights
    if len(weights) > _NUCLEUS_GUESS:
        best = np.partition(weights, -_NUCLEUS_GUESS)[-_NUCLEUS_GUESS:]
        if best.sum() < wanted:
            best = weights
    descending = np.sort(best)[::-1]
    last = int(np.searchsorted(np.cumsum(descending), wanted))
    return float(descending[min(last, len(descending) - 1)])


def _pick(weights: np.ndarray, base: int) -> int:
    left = np.flatnonzero(weights)
    gumbel = -np.log(-np.log(uniforms(base, left)))
    return int(left[np.argmax(np.log(weights[left]) + gumbel)])


def draw_tokens(
    logits: torch.Tensor, sequences: Sequence[SequenceState]
) -> tuple[list[tuple[int, ...]], list[tuple[TokenLogprobs, ...]]]:
    """logits: [sequences, vocabulary]. For each sequence, a token for each of its choices, not yet appended to it. Log
    probabilities are those of the model itself, before penalties and temperature."""
    if all(sequence.is_plain and sequence.params.num_logprobs is None for sequence in sequences):
        best = logits.argmax(-1).tolist()
        return [sequence.repeat(token) for sequence, token in zip(sequences, best, strict=True)], [()] * len(sequences)
    tokens: list[tuple[int, ...]] = []
    logprobs: list[tuple[TokenLogprobs, ...]] = []
    for row, sequence in zip(logits.float().cpu().numpy(), sequences, strict=True):
        wanted = sequence.params.num_logprobs
        raw = row.copy() if wanted is not None else row
        tokens.append(sequence.draw(row))
        logprobs.append(() if wanted is None else _logprobs(raw, tokens[-1], wanted))
    return tokens, logprobs


def _logprobs(logits: np.ndarray, tokens: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    shifted = logits.astype(np.float64) - logits.max()
    found = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-found, kind="stable")[:num_top] if num_top else ()
    top = tuple((int(other), float(found[other])) for other in best)
    return tuple(TokenLogprobs(float(found[token]), top) for token in tokens)
