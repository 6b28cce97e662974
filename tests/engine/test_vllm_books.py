"""What an engine of vLLM tells of its sequences, as our services expect it of every engine."""

from __future__ import annotations

from mooncake.core.types import FinishReason, ReusedTokens, SamplingParams, TokenLogprobs, tokens_to_bytes
from mooncake.engine.base import EngineLimits
from mooncake.engine.core import (
    Drawn,
    EngineLoad,
    KvLoaded,
    SequenceFailed,
    SequenceReleased,
    SequenceStarted,
)
from mooncake.engine.vllm.books import SequenceBooks, Tokens, bias_of, seed_of
from tests.engine.jobs import make_job

LIMITS = EngineLimits(num_pages=8, page_tokens=4, block_tokens=8, max_batch=4, max_step_tokens=16, max_context=64)


def books() -> SequenceBooks:
    return SequenceBooks(LIMITS)


def test_a_sequence_that_continues_tells_its_tokens_and_its_end() -> None:
    found = books()
    job = make_job(1, num_tokens=11, num_prompt_tokens=10, max_tokens=4)
    found.add(7, job, one_token=False, has_reader=True)
    assert found.max_tokens(7) == 3
    assert found.load == EngineLoad(1, 11, 0, 0, 8, waiting_context=11)
    assert found.drawn(7, Tokens(0, (5,)), num_cached=10) == [
        SequenceStarted(7), KvLoaded(7, True), Drawn(7, 11, (5,), None, cached_tokens=10)
    ]  # fmt: skip
    assert found.load == EngineLoad(0, 0, 1, 12, 5, 0, 1, 10)
    logprobs = (TokenLogprobs(-0.5), TokenLogprobs(-0.1))
    assert found.drawn(7, Tokens(0, (6, 8), logprobs), 10) == [Drawn(7, 12, (6, 8), FinishReason.LENGTH, logprobs)]
    assert found.ended(7) == [SequenceReleased(7)] and found.ended(7) == []
    assert found.drawn(7, Tokens(0, (9,)), 0) == [] and 7 not in found
    assert found.load == EngineLoad(0, 0, 0, 0, 8, 0, 1, 10)


def test_reused_tokens_of_a_request_with_a_source_are_taken_for_loaded_ones() -> None:
    found = books()
    found.add(1, make_job(1), one_token=True, has_reader=True, ssd_tokens=8)
    found.drawn(1, Tokens(0, (5,)), num_cached=16)
    assert found.load.reused == ReusedTokens(prompt=20, dram=8, ssd=8)
    found.add(2, make_job(2), one_token=True, has_reader=False)
    found.drawn(2, Tokens(0, (5,)), num_cached=16)
    found.add(3, make_job(3, num_prompt_tokens=19), one_token=False, has_reader=True)
    found.drawn(3, Tokens(0, (5,)), num_cached=19)
    assert found.load.reused == ReusedTokens(prompt=40, hbm=16, dram=8, ssd=8), "a hand-over is no reuse"


def test_the_first_of_two_pools_draws_one_token_that_ends_nothing_but_a_finished_sequence() -> None:
    found = books()
    found.add(1, make_job(1), one_token=True, has_reader=False)
    assert found.max_tokens(1) == 1
    assert found.drawn(1, Tokens(0, (5,)), 0)[-1] == Drawn(1, 20, (5,), None, cached_tokens=0)
    found.add(2, make_job(2, max_tokens=1), one_token=True, has_reader=False)
    assert found.drawn(2, Tokens(0, (5,)), 0)[-1] == Drawn(2, 20, (5,), FinishReason.LENGTH, cached_tokens=0)
    stops = SamplingParams(stop_token_ids=(5,))
    found.add(3, make_job(3, sampling=stops), one_token=True, has_reader=False)
    assert found.drawn(3, Tokens(0, (5,)), 0)[-1] == Drawn(3, 20, (5,), FinishReason.STOP, cached_tokens=0)
    later = SamplingParams(stop_token_ids=(5,), min_tokens=2)
    found.add(4, make_job(4, sampling=later), one_token=True, has_reader=False)
    assert found.drawn(4, Tokens(0, (5,)), 0)[-1] == Drawn(4, 20, (5,), None, cached_tokens=0)


def test_a_joint_sequence_draws_first_tokens_of_all_its_choices_at_one_position() -> None:
    found = books()
    found.add(1, make_job(1, num_choices=2), one_token=True, has_reader=False)
    outputs = [*found.drawn(1, Tokens(1, (6,)), 0), *found.drawn(1, Tokens(0, (5,)), 0)]
    drawn = [(each.position, each.choice, each.token_ids) for each in outputs if isinstance(each, Drawn)]
    assert drawn == [(20, 1, (6,)), (20, 0, (5,))]


def test_what_fails_is_told_and_released() -> None:
    found = books()
    found.add(1, make_job(1), one_token=True, has_reader=False)
    assert found.failed(1, "grammar", "why") == [SequenceFailed(1, "grammar", "why"), SequenceReleased(1)]
    assert found.failed(1, "grammar", "again") == []


def test_what_never_fits_is_refused_and_a_sequence_ends_where_the_pages_do() -> None:
    found = books()
    assert found.refusal(make_job(1, num_tokens=31)) is None
    assert found.refusal(make_job(1, num_tokens=32)) == "32 tokens do not fit: a sequence holds at most 32 here"
    found.add(1, make_job(1, num_tokens=30, max_tokens=100), one_token=False, has_reader=False)
    assert found.max_tokens(1) == 2


def test_a_sequence_that_goes_on_elsewhere_draws_other_numbers() -> None:
    sampled = SamplingParams(seed=3)
    seeds = {seed_of(make_job(1, num_tokens=count, num_prompt_tokens=20, sampling=sampled)) for count in range(20, 30)}
    assert len(seeds) == 10 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert seed_of(make_job(1, sampling=sampled)) == seed_of(make_job(2, sampling=sampled))


def test_what_other_attempts_have_generated_is_penalised_though_vllm_takes_it_for_prompt() -> None:
    token_ids = tokens_to_bytes([7, 7, 8, 9, 8, 8])
    sampled = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((8, 2.0), (3, 1.0)))
    known = {"num_tokens": 6, "token_ids": token_ids, "sampling": sampled}
    assert bias_of(make_job(1, **known, num_prompt_tokens=2)) == {8: 2.0 - 0.5 - 0.75, 9: -0.75, 3: 1.0}
    assert bias_of(make_job(1, **known, num_prompt_tokens=6)) == {8: 2.0, 3: 1.0}
    assert bias_of(make_job(1, num_tokens=6, token_ids=token_ids, num_prompt_tokens=2)) == {}
