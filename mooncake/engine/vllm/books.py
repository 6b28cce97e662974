"""What an engine of vLLM runs, and what it tells of it: sequences between `submit` and `SequenceReleased`. Sans-IO."""

from __future__ import annotations

from collections import Counter

import msgspec

from mooncake.core.noise import noise
from mooncake.core.types import FinishReason, Job, ReusedTokens, TokenLogprobs, bytes_to_tokens
from mooncake.engine.base import EngineLimits
from mooncake.engine.core import (
    Drawn,
    EngineLoad,
    KvLoaded,
    SequenceFailed,
    SequenceReleased,
    SequenceStarted,
    ServiceOutput,
)


class Tokens(msgspec.Struct, frozen=True):
    """New tokens of one choice, as vLLM tells them. index: of the choice, among those of the sequence."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class _Sequence:
    __slots__ = ("has_reader", "job", "num_tokens", "one_token", "ssd_tokens", "started")

    def __init__(self, job: Job, one_token: bool, has_reader: bool, ssd_tokens: int) -> None:
        self.job = job
        self.ssd_tokens = ssd_tokens
        self.one_token = one_token
        self.has_reader = has_reader
        self.num_tokens = job.num_tokens
        self.started = False

    def reused(self, cached: int) -> ReusedTokens:
        """vLLM does not tell its own pages from what the connector loaded: where there was a source, it is taken for that."""
        loaded = cached if self.has_reader else 0
        ssd = min(loaded, self.ssd_tokens)
        return ReusedTokens(self.job.num_prompt_tokens, cached - loaded, loaded - ssd, ssd)


class SequenceBooks:
    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self._longest = min(limits.max_context, limits.num_pages * limits.page_tokens)
        self._sequences: dict[int, _Sequence] = {}
        self._num_loaded = 0
        self._num_computed = 0
        self._reused = ReusedTokens()

    def __contains__(self, seq: int) -> bool:
        return seq in self._sequences

    def refusal(self, job: Job) -> str | None:
        if job.num_tokens >= self._longest:
            return f"{job.num_tokens} tokens do not fit: a sequence holds at most {self._longest} here"
        return None

    def add(self, seq: int, job: Job, *, one_token: bool, has_reader: bool, ssd_tokens: int = 0) -> None:
        """ssd_tokens: of what can be read, those that came from SSD for it."""
        self._sequences[seq] = _Sequence(job, one_token, has_reader, ssd_tokens)

    def max_tokens(self, seq: int) -> int:
        """How many tokens it draws at most."""
        state = self._sequences[seq]
        return 1 if state.one_token else max(1, self._end(state.job) - state.job.num_tokens)

    def drawn(self, seq: int, tokens: Tokens, num_cached: int) -> list[ServiceOutput]:
        """num_cached: tokens of the prompt that were not computed."""
        state = self._sequences.get(seq)
        if state is None or not tokens.token_ids:
            return []
        outputs: list[ServiceOutput] = []
        cached = None
        if not state.started:
            state.started = True
            cached = min(num_cached, state.job.num_prompt_tokens)
            self._num_loaded += num_cached
            self._num_computed += state.job.num_tokens - num_cached
            if state.job.num_tokens == state.job.num_prompt_tokens:
                self._reused += state.reused(cached)
            outputs.append(SequenceStarted(seq))
            if state.has_reader:
                outputs.append(KvLoaded(seq, True))
        position = state.job.num_tokens if state.job.joint else state.num_tokens
        state.num_tokens = position + len(tokens.token_ids)
        finish = self._finish(state, tokens.token_ids[-1])
        choice = state.job.key.choice + tokens.index
        outputs.append(Drawn(seq, position, tokens.token_ids, finish, tokens.logprobs, cached, choice))
        return outputs

    def ended(self, seq: int) -> list[ServiceOutput]:
        """vLLM has nothing of it any more."""
        return [SequenceReleased(seq)] if self._sequences.pop(seq, None) is not None else []

    def failed(self, seq: int, reason: str, detail: str) -> list[ServiceOutput]:
        if seq not in self._sequences:
            return []
        return [SequenceFailed(seq, reason, detail), *self.ended(seq)]

    @property
    def load(self) -> EngineLoad:
        """Pages are counted as if sequences shared none."""
        waiting = [each for each in self._sequences.values() if not each.started]
        running = [each for each in self._sequences.values() if each.started]
        waiting_tokens = sum(each.num_tokens for each in waiting)
        context = sum(each.num_tokens for each in running)
        held = sum(-(-each.num_tokens // self.limits.page_tokens) for each in running)
        return EngineLoad(
            len(waiting),
            waiting_tokens,
            len(running),
            context,
            max(0, self.limits.num_pages - held),
            0,
            self._num_computed,
            self._num_loaded,
            waiting_tokens,
            self._reused,
        )

    def _end(self, job: Job) -> int:
        return min(job.num_prompt_tokens + job.max_tokens, self._longest)

    def _finish(self, state: _Sequence, token: int) -> FinishReason | None:
        job = state.job
        if token in job.sampling.stop_token_ids and state.num_tokens - job.num_prompt_tokens > job.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if state.num_tokens >= self._end(job) else None


def seed_of(job: Job) -> int:
    """vLLM draws from a generator of each request. A sequence that goes on elsewhere must not get the same numbers again."""
    return noise(job.sampling.seed, job.key.choice, job.num_tokens) >> 1


def bias_of(job: Job) -> dict[int, float]:
    """What is added to logits from the first token on: logit_bias, and the penalties of what other attempts have generated,
    which vLLM takes for a part of the prompt."""
    sampling = job.sampling
    found = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        generated = Counter(bytes_to_tokens(job.token_ids)[job.num_prompt_tokens :])
        for token, count in generated.items():
            penalty = sampling.presence_penalty + sampling.frequency_penalty * count
            found[token] = found.get(token, 0.0) - penalty
    return found
