"""A synthetic trace, like a real one or from parameters. Everything is a pure function of the options and a generator.

lengths     of a source: its steps (input, output and sharing of one request together) dealt out again near their place;
            else log-normal, input and output apart
sharing     of a source with prefixes: its steps, repeated in a new tree (`prefix_tree`); or a hit rate: a share of each
            prompt, usually little or nearly all, is that of an earlier one; or none
arrivals    of a source: its gaps or counts, dealt out again (`arrivals`); or gamma distributed gaps; on a coarse clock or not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import msgspec
import numpy as np

from mooncake.core.errors import ConfigError
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.trace.arrivals import WINDOW, ArrivalModel, dealt, fit_arrivals, gamma, on_clock, resampled
from mooncake.trace.options import DEFAULT_INPUT, DEFAULT_OUTPUT, DEFAULT_RATE, DEFAULT_REQUESTS, SynthOptions
from mooncake.trace.prefix_tree import PrefixTree, Step, steps_of
from mooncake.trace.types import TOKENS_MAX, TraceFormat, TraceRequest

SOURCE_REQUESTS_MAX = 1_000_000
"""Of a source: the first ones are its model, about 1 GB with their blocks."""
BLOCK_TOKENS = 512
"""Of traces whose source has no blocks, as in Mooncake's."""
CONCENTRATION = 1.0
"""Of the beta distribution of a prompt's shared part, alpha + beta: at 1 most prompts share little or nearly all."""
CORRECTION_REQUESTS = 50
"""What the hit rate is behind, because nobody had blocks enough to share, is made up for over so many requests."""


class Source(msgspec.Struct, frozen=True):
    """What a real trace gives: of its first SOURCE_REQUESTS_MAX requests."""

    format: TraceFormat
    steps: list[Step]
    arrivals: ArrivalModel


def read_source(requests: Iterable[TraceRequest], trace_format: TraceFormat) -> Source | None:
    """None without requests."""
    arrivals: list[int] = []

    def noted() -> Iterator[TraceRequest]:
        for request in islice(requests, SOURCE_REQUESTS_MAX):
            arrivals.append(request.arrival_ns)
            yield request

    steps = list(steps_of(noted()))
    return Source(trace_format, steps, fit_arrivals(arrivals)) if steps else None


def written_format(source: Source | None) -> tuple[str, int]:
    """Name and block size of the synthetic trace: the source's, or Mooncake's if that has no prefixes."""
    if source is not None and source.format.block_tokens is not None:
        return source.format.name, source.format.block_tokens
    return "mooncake", BLOCK_TOKENS


def synthesise(options: SynthOptions, source: Source | None, rng: np.random.Generator) -> Iterator[TraceRequest]:
    for name in ("input_mean", "input_cv", "output_mean", "output_cv"):
        if source is not None and getattr(options, name) is not None:
            raise ConfigError(f"{name}: lengths are those of the source; leave the file out to draw them")
    for_steps, for_arrivals, for_sharing = rng.spawn(3)  # so that another arrival process leaves the prompts alone
    _, block_tokens = written_format(source)
    steps = _drawn_steps(options, for_steps) if source is None else _dealt_steps(source.steps, for_steps)
    if options.hit_rate is None:
        sharing: _AsIs | _ToHitRate = _AsIs()
    else:
        sharing = _ToHitRate(options.hit_rate, options.reuse_lag, block_tokens, for_sharing)
    number = options.requests or (DEFAULT_REQUESTS if source is None else len(source.steps))
    return islice(_grown(steps, _arrivals(options, source, for_arrivals), sharing, block_tokens), number)


def _grown(
    steps: Iterator[Step], arrivals: Iterator[int], sharing: _AsIs | _ToHitRate, block_tokens: int
) -> Iterator[TraceRequest]:
    tree = PrefixTree()
    for step, arrival_ns in zip(steps, arrivals, strict=True):
        step = sharing.applied(msgspec.structs.replace(step, num_blocks=-(-step.input_length // block_tokens)))
        path, num_shared = tree.grow(step)
        sharing.settle(step, num_shared)
        yield TraceRequest(arrival_ns, step.input_length, step.output_length, path)


def _arrivals(options: SynthOptions, source: Source | None, rng: np.random.Generator) -> Iterator[int]:
    if source is not None and options.cv is None:
        arrivals = resampled(source.arrivals, options.rate or source.arrivals.rate, rng)
    else:
        rate = options.rate or (DEFAULT_RATE if source is None else source.arrivals.rate)
        arrivals = gamma(rate, 1.0 if options.cv is None else options.cv, rng)
    return on_clock(arrivals, round(options.step_s * NANOS_PER_S) if options.step_s else NANOS_PER_MS)


def _dealt_steps(steps: Sequence[Step], rng: np.random.Generator) -> Iterator[Step]:
    """All of them near their place, and again. The first stays the first: often it is the root of all others. In later rounds
    without those of the cold start, in which sharing is rare."""
    yield steps[0]
    yield from (steps[1 + at] for at in dealt(len(steps) - 1, rng).tolist())
    warm = steps[int(WINDOW * len(steps)) :]
    while True:
        yield from (warm[at] for at in dealt(len(warm), rng).tolist())


def _drawn_steps(options: SynthOptions, rng: np.random.Generator) -> Iterator[Step]:
    draw_input = _log_normal(options.input_mean or DEFAULT_INPUT, options.input_cv, rng)
    draw_output = _log_normal(options.output_mean or DEFAULT_OUTPUT, options.output_cv, rng)
    while True:
        yield Step(draw_input(), draw_output(), 0)


def _log_normal(mean: float, cv: float | None, rng: np.random.Generator) -> Callable[[], int]:
    variance = math.log(1 + (1.0 if cv is None else cv) ** 2)
    return lambda: min(TOKENS_MAX, max(1, round(rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance)))))


class _AsIs:
    """Sharing as the steps have it."""

    def applied(self, step: Step) -> Step:
        return step

    def settle(self, step: Step, num_shared: int) -> None:
        pass


class _ToHitRate:
    """Sharing to a hit rate. It aims higher after it fell short, as at the beginning, when there is nothing to share."""

    def __init__(self, hit_rate: float, lag: float, block_tokens: int, rng: np.random.Generator) -> None:
        self._hit_rate = hit_rate
        self._lag = lag
        self._block_tokens = block_tokens
        self._rng = rng
        self._num_requests = 0
        self._input_tokens = 0
        self._hit_tokens = 0

    def applied(self, step: Step) -> Step:
        share = self._draw_share()
        depth = int(share * step.input_length / self._block_tokens + self._rng.uniform())
        depth = min(depth, (step.input_length - 1) // self._block_tokens)
        lag = max(1, round(self._rng.exponential(self._lag)))
        # The donor is a prompt that this one continues: hardly longer than what is shared, half of it shared before.
        return msgspec.structs.replace(
            step, depth=depth, lag=lag, donor_blocks=depth + 1, donor_depth=depth // 2, num_fresher=0
        )

    def settle(self, step: Step, num_shared: int) -> None:
        self._num_requests += 1
        self._input_tokens += step.input_length
        self._hit_tokens += num_shared * self._block_tokens

    def _draw_share(self) -> float:
        aim = self._hit_rate
        if self._num_requests:
            behind = self._hit_rate * self._input_tokens - self._hit_tokens
            aim += behind / (self._input_tokens / self._num_requests * CORRECTION_REQUESTS)
        if not 0 < aim < 1:
            return min(1.0, max(0.0, aim))
        return float(self._rng.beta(CONCENTRATION * aim, CONCENTRATION * (1 - aim)))
