"""Synthetic traces: what is asked for comes out, a source's likeness is kept, and a seed is a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import ConfigError
from mooncake.sim.hit_rate import hit_rate
from mooncake.store.eviction import Lru
from mooncake.trace import prefix_tree
from mooncake.trace.arrivals import WINDOW, dealt, fit_arrivals, gamma, resampled
from mooncake.trace.files import open_trace
from mooncake.trace.formats import FORMATS
from mooncake.trace.options import SynthOptions
from mooncake.trace.prefix_tree import PrefixTree, Step, steps_of
from mooncake.trace.stats import TraceStats, trace_stats
from mooncake.trace.synth import read_source, synthesise
from mooncake.trace.types import TraceFormat, TraceRequest
from tests.trace.helpers import real_trace, requests_of

SECOND = 1_000_000_000
TENS = TraceFormat("mooncake", 10)


def made(options: SynthOptions, source: Sequence[TraceRequest] = (), form: TraceFormat = TENS) -> list[TraceRequest]:
    fitted = read_source(source, form) if source else None
    return list(synthesise(options, fitted, np.random.default_rng(options.seed)))


def stats_of(requests: Sequence[TraceRequest], block_tokens: int) -> TraceStats:
    stats = trace_stats(iter(requests), block_tokens)
    assert stats is not None
    return stats


def infinite_hit_rate(requests: Sequence[TraceRequest], block_tokens: int) -> float:
    reuse = stats_of(requests, block_tokens).reuse
    assert reuse is not None
    return reuse.hit_rate_by_token


# ------------------------------------------------------------ the tree


def test_steps() -> None:
    assert list(steps_of(requests_of("ab", "abc", "axy", "abcd", "z", "axz"))) == [
        Step(20, 1, 2),
        Step(30, 1, 3, 2, 1, 2, 0, 0),
        Step(30, 1, 3, 1, 1, 3, 2, 0),
        Step(40, 1, 4, 3, 2, 3, 2, 1),  # a was used by axy since
        Step(10, 1, 1),
        Step(30, 1, 3, 2, 3, 3, 1, 1),
    ]


def test_steps_without_prefixes_share_nothing() -> None:
    assert list(steps_of([TraceRequest(0, 5, 2), TraceRequest(0, 5, 2)])) == [Step(5, 2, 0)] * 2


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=30))
def test_a_tree_grown_by_the_steps_of_a_trace_shares_as_deep(prompts: list[str]) -> None:
    source = requests_of(*prompts)
    steps = list(steps_of(source))
    tree = PrefixTree()
    paths = [tree.grow(step)[0] for step in steps]
    again = [TraceRequest(0, request.input_length, 1, path) for request, path in zip(source, paths, strict=True)]
    assert [step.depth for step in steps_of(again)] == [step.depth for step in steps]
    parents: dict[int, int | None] = {}
    for path in paths:
        for parent, block in zip((None, *path), path, strict=False):
            assert parents.setdefault(block, parent) == parent


def test_a_tree_shares_less_where_nobody_has_as_much() -> None:
    tree = PrefixTree()
    assert tree.grow(Step(50, 1, 5, depth=3, lag=1, donor_blocks=4)) == ((0, 1, 2, 3, 4), 0)
    assert tree.grow(Step(90, 1, 9, depth=8, lag=1, donor_blocks=9)) == ((0, 1, 2, 3, 4, 5, 6, 7, 8), 5)


def test_a_tree_remembers_the_latest_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "HISTORY_MAX", 4)
    tree = PrefixTree()
    for number in range(100):
        path, num_shared = tree.grow(Step(20, 1, 2, depth=1 if number else 0, lag=50, donor_blocks=2))
        assert num_shared == (1 if number else 0) and path[0] == 0
        assert len(tree._paths) < 8
        assert set(tree._latest_use) == {block for kept in tree._paths for block in kept}


# ------------------------------------------------------------ arrivals


@given(st.integers(0, 200), st.integers(0, 5))
def test_dealing_out_again_keeps_everything_near_its_place(number: int, seed: int) -> None:
    order = dealt(number, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(number))
    assert all(abs(place - at) <= WINDOW * number + 1 for at, place in enumerate(order.tolist()))


def test_resampled_gaps_are_those_of_the_source() -> None:
    times = np.cumsum(np.random.default_rng(1).exponential(SECOND, 200).astype(np.int64)).tolist()
    model = fit_arrivals(times)
    assert model.step_ns is None
    found = list(islice(resampled(model, model.rate, np.random.default_rng(2)), 200))
    assert found[0] == 0 and sorted(np.diff(found)) == sorted(np.diff(times)) and found != times
    twice = list(islice(resampled(model, 2 * model.rate, np.random.default_rng(2)), 200))
    assert max(abs(fast - slow / 2) for fast, slow in zip(twice, found, strict=True)) <= 1


def test_a_coarse_clock_keeps_its_step_and_its_counts() -> None:
    counts = np.random.default_rng(1).poisson(5, 100)
    times = np.repeat(np.arange(100) * 3 * SECOND, counts).tolist()
    model = fit_arrivals(times)
    assert model.step_ns == 3 * SECOND
    for rate in (model.rate, 2 * model.rate):
        found = list(islice(resampled(model, rate, np.random.default_rng(2)), len(times)))
        assert all(at % (3 * SECOND) == 0 for at in found)
        if rate == model.rate:
            assert sorted(np.bincount(np.array(found) // (3 * SECOND))) == sorted(
                np.bincount(np.array(times) // (3 * SECOND))
            )


def test_arrivals_of_one_request_and_of_all_at_once() -> None:
    one = fit_arrivals([5 * SECOND])
    assert list(islice(resampled(one, 2 * one.rate, np.random.default_rng(0)), 3)) == [0, SECOND // 2, SECOND]
    at_once = fit_arrivals([SECOND] * 3)
    assert list(islice(resampled(at_once, at_once.rate, np.random.default_rng(0)), 9)) == [0] * 9


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gamma_arrivals_have_the_rate_and_spread_asked_for(cv: float) -> None:
    gaps = np.diff(list(islice(gamma(4.0, cv, np.random.default_rng(1)), 20_000)))
    assert gaps.mean() == pytest.approx(SECOND / 4, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


# ------------------------------------------------------------ whole traces


def test_from_parameters() -> None:
    options = SynthOptions(
        requests=4000, rate=2.0, cv=2.0, input_mean=3000, input_cv=0.5, output_mean=100, output_cv=0, hit_rate=0.5
    )
    found = stats_of(made(options), 512)
    assert found.num_requests == 4000
    assert found.arrivals.requests_per_s == pytest.approx(2, rel=0.1)
    assert found.arrivals.cv == pytest.approx(2, rel=0.1)
    assert found.input_length.mean == pytest.approx(3000, rel=0.05)
    assert (found.output_length.p50, found.output_length.max) == (100, 100)
    assert found.reuse is not None and found.reuse.hit_rate_by_token == pytest.approx(0.5, abs=0.01)


def test_a_step_of_the_clock() -> None:
    requests = made(SynthOptions(requests=200, rate=4, step_s=1.5))
    assert {request.arrival_ns % (3 * SECOND // 2) for request in requests} == {0}
    assert all(request.arrival_ns % 1_000_000 == 0 for request in made(SynthOptions(requests=200)))


def test_blocks_fit_the_lengths() -> None:
    for hit_rate_wanted in (None, 0.0, 0.9):
        for request in made(SynthOptions(requests=300, input_mean=700, hit_rate=hit_rate_wanted)):
            assert request.hash_ids is not None
            assert len(request.hash_ids) == len(set(request.hash_ids)) == -(-request.input_length // 512)


def test_without_prefixes_nothing_is_shared_unless_asked_for() -> None:
    source = [TraceRequest(at * SECOND, 2000 + at, 5) for at in range(400)]
    azure = FORMATS["azure"].format
    plain = made(SynthOptions(), source, azure)
    assert sorted(request.input_length for request in plain) == [request.input_length for request in source]
    assert infinite_hit_rate(plain, 512) == 0
    assert infinite_hit_rate(made(SynthOptions(hit_rate=0.3), source, azure), 512) == pytest.approx(0.3, abs=0.02)


def test_lengths_are_of_the_source_or_drawn() -> None:
    with pytest.raises(
        ConfigError, match="input_mean: lengths are those of the source; leave the file out to draw them"
    ):
        made(SynthOptions(input_mean=5.0), requests_of("ab"))


def test_more_requests_than_the_source_has() -> None:
    source = requests_of(*["abc", "abd", "x", "abcde"] * 10)
    requests = made(SynthOptions(requests=1000), source)
    assert len(requests) == 1000
    assert infinite_hit_rate(requests, 10) == pytest.approx(infinite_hit_rate(source, 10), abs=0.1)
    assert made(SynthOptions(requests=1), requests_of("abc"))[0].hash_ids == (0, 1, 2)


def test_another_arrival_process_leaves_the_prompts_alone() -> None:
    source = requests_of(*["abc", "abd", "x", "abcde"] * 10)
    one, other = made(SynthOptions(), source), made(SynthOptions(cv=3.0), source)
    assert [request.hash_ids for request in one] == [request.hash_ids for request in other]
    assert [request.arrival_ns for request in one] != [request.arrival_ns for request in other]


SCRIPT = """
import hashlib
import numpy as np
from mooncake.trace.options import SynthOptions
from mooncake.trace.synth import read_source, synthesise
from mooncake.trace.types import TraceFormat
from tests.trace.helpers import requests_of
prompts = ["abc", "abd", "x", "abcde", "abdxx"] * 20
digest = hashlib.blake2b()
for options in (SynthOptions(requests=200), SynthOptions(requests=200, hit_rate=0.5, cv=2.0)):
    for source in (None, read_source(requests_of(*prompts), TraceFormat("mooncake", 10))):
        for request in synthesise(options, source, np.random.default_rng(7)):
            digest.update(repr(request).encode())
print(digest.hexdigest())
"""


def test_a_seed_is_a_trace_in_any_process() -> None:
    found = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "single_use", "lru"),
    [("conversation_trace.jsonl", 0.01, 0.012), ("synthetic_trace.jsonl", 0.02, 0.02)],
)
def test_likeness_of_a_real_trace(name: str, single_use: float, lru: float) -> None:
    reader = open_trace(real_trace(name))
    source = list(islice(reader, 5_000))
    synthetic = made(SynthOptions(seed=3), source, reader.info.format)
    wanted, found = stats_of(source, 512), stats_of(synthetic, 512)
    assert found.input_length == wanted.input_length and found.output_length == wanted.output_length
    assert found.arrivals.cv == pytest.approx(wanted.arrivals.cv, rel=0.02)
    assert found.arrivals.step_s == wanted.arrivals.step_s
    assert wanted.reuse is not None and found.reuse is not None
    assert found.reuse.hit_rate_by_token == pytest.approx(wanted.reuse.hit_rate_by_token, abs=0.002)
    assert found.reuse.single_use_share == pytest.approx(wanted.reuse.single_use_share, abs=single_use)
    for capacity in (1_000, 5_859, 20_000):
        rates = [hit_rate(requests, 512, Lru(), capacity) for requests in (source, synthetic)]
        assert rates[0] is not None and rates[1] is not None
        assert rates[1].by_token == pytest.approx(rates[0].by_token, abs=lru)
