"""Drawing tokens: each filter on a vocabulary of six, and the same draw in any company."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from mooncake.core.types import SamplingParams, TokenLogprobs
from mooncake.engine.torch.sampling import SequenceState, draw_tokens
from tests.engine.tiny_models import GREEDY, SUPPORTED, Run, generate, prompts, save_model, tiny_engine

SHARES = [0.05, 0.4, 0.1, 0.25, 0.15, 0.05]
LOGITS = np.log(np.array(SHARES, dtype=np.float32))
NUM_DRAWS = 4000


def counts(params: SamplingParams, *, known: list[int] | None = None, num_prompt: int = 0) -> dict[int, float]:
    """Share of each token over many choices."""
    drawn = Counter(
        SequenceState(known or [], num_prompt, params, choice).draw(LOGITS.copy())[0] for choice in range(NUM_DRAWS)
    )
    return {token: count / NUM_DRAWS for token, count in sorted(drawn.items())}


def greedy(known: list[int], num_prompt: int, **words: object) -> int:
    params = msgspec.structs.replace(GREEDY, **words)
    return SequenceState(known, num_prompt, params, 0).draw(LOGITS.copy())[0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), dict(enumerate(SHARES))),
        (SamplingParams(top_k=1), {1: 1.0}),
        (SamplingParams(top_k=3), {1: 0.5, 3: 0.3125, 4: 0.1875}),
        (SamplingParams(top_p=0.39), {1: 1.0}),
        (SamplingParams(top_p=0.5), {1: 0.4 / 0.65, 3: 0.25 / 0.65}),
        (SamplingParams(top_p=0.79), {1: 0.5, 3: 0.3125, 4: 0.1875}),
        (SamplingParams(min_p=0.3), {1: 0.5, 3: 0.3125, 4: 0.1875}),
        (SamplingParams(top_k=3, top_p=0.6), {1: 0.4 / 0.65, 3: 0.25 / 0.65}),
        (SamplingParams(temperature=0.5, min_p=0.1), {1: 0.16 / 0.245, 3: 0.0625 / 0.245, 4: 0.0225 / 0.245}),
        (SamplingParams(logit_bias=((1, -100.0), (3, -100.0), (4, -100.0))), {0: 0.25, 2: 0.5, 5: 0.25}),
    ],
)
def test_filters_leave_exactly_these_tokens_in_these_shares(params: SamplingParams, expected: dict[int, float]) -> None:
    found = counts(params)
    assert list(found) == list(expected)
    assert all(abs(found[token] - share) < 0.03 for token, share in expected.items())


def test_a_nucleus_of_a_large_vocabulary_needs_no_guess_to_be_right() -> None:
    flat = np.zeros(5000, dtype=np.float32)
    flat[7] = 0.001
    peaked = np.linspace(0, 400, 5000, dtype=np.float32)
    params = SamplingParams(top_p=0.5)
    assert len(set(SequenceState([], 0, params, 0, 300).draw(flat.copy()))) > 250
    drawn = set(SequenceState([], 0, params, 0, 300).draw(peaked.copy()))
    weights = np.exp(peaked.astype(np.float64) - 400)[::-1]
    size = int(np.searchsorted(np.cumsum(weights), 0.5 * weights.sum())) + 1
    assert drawn == set(range(5000 - size, 5000))


def test_penalties_look_at_the_right_tokens() -> None:
    assert greedy([], 0) == 1
    assert greedy([1], 1, presence_penalty=2.0) == 1, "the prompt does not count as output"
    assert greedy([1], 0, presence_penalty=0.46) == 1
    assert greedy([1], 0, presence_penalty=0.48) == 3, "log(0.4 / 0.25) = 0.470"
    assert greedy([1, 1], 0, frequency_penalty=0.24) == 3
    assert greedy([1, 0], 0, frequency_penalty=0.24) == 1
    assert greedy([1], 1, repetition_penalty=1.6) == 3, "the prompt counts here"
    assert greedy([0, 2], 1, repetition_penalty=0.1) == 2, "a penalty below one rewards: 0.1 * log(0.1) is the greatest"


@pytest.mark.parametrize("params", [SamplingParams(seed=9, presence_penalty=0.5, num_logprobs=1), GREEDY])
def test_a_joint_sequence_draws_for_each_choice_what_it_would_alone(params: SamplingParams) -> None:
    logits = torch.tensor(np.stack([LOGITS] * 6))
    joint, alone = SequenceState([1, 4], 1, params, 0, 5), [SequenceState([1, 4], 1, params, c) for c in range(5)]
    (together, *tokens), (found, *logprobs) = draw_tokens(logits, [joint, *alone])
    assert together == tuple(token for (token,) in tokens)
    assert found == tuple(entry for entries in logprobs for entry in entries)
    assert (len(set(together)) > 1) is not params.greedy


def test_the_end_is_hidden_until_min_tokens_are_there() -> None:
    words = {"stop_token_ids": (1, 3), "min_tokens": 2}
    assert [greedy([5] * num, 1, **words) for num in (1, 2, 3)] == [4, 4, 1]


def test_log_probabilities_are_the_models_own() -> None:
    params = SamplingParams(temperature=0.0, num_logprobs=2, logit_bias=((2, 100.0),))
    states = [SequenceState([0], 1, params, 0), SequenceState([0], 1, GREEDY, 0)]
    tokens, logprobs = draw_tokens(torch.tensor(np.stack([LOGITS + 3.0] * 2)), states)
    assert (tokens, logprobs[1]) == ([(2,), (1,)], ())
    [found] = logprobs[0]
    assert math.isclose(found.logprob, math.log(0.1), abs_tol=1e-6)
    assert [token for token, _ in found.top] == [1, 3]
    assert [round(math.exp(value), 5) for _, value in found.top] == [0.4, 0.25]
    plain = msgspec.structs.replace(GREEDY, num_logprobs=0)
    _, [[only]] = draw_tokens(torch.tensor(LOGITS[None]), [SequenceState([], 0, plain, 0)])
    assert only == TokenLogprobs(only.logprob, ()) and math.isclose(math.exp(only.logprob), 0.4, abs_tol=1e-6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(SUPPORTED["llama"], tmp_path_factory.mktemp("llama"))


def test_seeded_text_is_the_same_in_any_batch_and_continued_elsewhere(path: Path) -> None:
    given = prompts(30, 9, 17, 50)
    params = [
        SamplingParams(seed=1, temperature=0.9, top_p=0.9, presence_penalty=0.5, num_logprobs=1),
        SamplingParams(seed=2, temperature=1.3, top_k=20, frequency_penalty=0.3),
        GREEDY,
        SamplingParams(seed=1, temperature=0.9, min_p=0.02, repetition_penalty=1.2),
    ]
    engine = tiny_engine(path)
    alone = [generate(engine, [prompt], 10, own)[0] for prompt, own in zip(given, params, strict=True)]
    assert generate(engine, given, 10, *params) == alone
    assert generate(engine, given[::-1], 10, *params[::-1], row_pages=10) == alone[::-1]
    elsewhere = Run(tiny_engine(path))
    for prompt, own, tokens in zip(given, params, alone, strict=True):
        elsewhere.submit([*prompt, *tokens[:4]], 10, own, num_prompt=len(prompt))
    assert elsewhere.finish() == [tokens[4:] for tokens in alone]


def test_log_probabilities_come_with_each_token(path: Path) -> None:
    run = Run(tiny_engine(path))
    run.submit(prompts(12)[0], 4, SamplingParams(temperature=0.0, num_logprobs=3))
    run.submit(prompts(8)[0], 4)
    [tokens, _] = run.finish()
    assert [entry.top[0][0] for entry in run.logprobs[0]] == tokens
    assert all(len(entry.top) == 3 and entry.logprob == entry.top[0][1] for entry in run.logprobs[0])
    assert run.logprobs[1] == []
