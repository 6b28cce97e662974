"""When the requests of a synthetic trace arrive: endless streams of nanoseconds since its beginning.

From a trace, what happened is dealt out again in another order, but near its place, so that slow swings of the load stay: gaps
between requests where the clock is fine; where it is coarse, how many requests each step of it has. Either keeps the mean rate
and the spread; that one burst brings the next, within minutes, is lost. Without a trace, gaps are gamma distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import msgspec
import numpy as np

from mooncake.core.types import NANOS_PER_S
from mooncake.trace.stats import clock_step

WINDOW = 0.05
"""How far something moves when it is dealt out again, as a share of the whole: short beside the swings of a day or an hour,
and long enough that a trace of some thousand requests comes out different."""


class ArrivalModel(msgspec.Struct, frozen=True):
    """Of a trace: gaps in nanoseconds; or, with a coarse clock, its step and the number of requests at each."""

    gaps: np.ndarray
    counts: np.ndarray
    step_ns: int | None
    rate: float


def fit_arrivals(arrivals_ns: Sequence[int]) -> ArrivalModel:
    """Of at least one arrival."""
    times = np.asarray(arrivals_ns, dtype=np.int64) - arrivals_ns[0]
    gaps = np.diff(times)
    span_ns = int(times[-1])
    step_ns = clock_step(gaps[gaps > 0], span_ns / max(1, len(gaps)))
    counts = np.bincount(np.round(times / step_ns).astype(np.int64)) if step_ns is not None else np.zeros(0, np.int64)
    return ArrivalModel(gaps, counts, step_ns, len(times) * NANOS_PER_S / span_ns if span_ns else 1.0)


def resampled(model: ArrivalModel, rate: float, rng: np.random.Generator) -> Iterator[int]:
    """Like the trace, but faster or slower: time is stretched, the clock's step is not."""
    stretch = model.rate / rate
    own = _gap_by_gap(model.gaps, rng) if model.step_ns is None else _step_by_step(model.counts, model.step_ns, rng)
    stretched = (round(at * stretch) for at in own)
    return stretched if model.step_ns is None else on_clock(stretched, model.step_ns)


def gamma(rate: float, cv: float, rng: np.random.Generator) -> Iterator[int]:
    """Gaps of this coefficient of variation: 0 is a metronome, 1 a Poisson process, more comes in bursts."""
    at = 0.0
    shape = 1 / cv**2 if cv else None
    while True:
        yield round(at)
        at += NANOS_PER_S / rate * (rng.gamma(shape, 1 / shape) if shape is not None else 1.0)


def on_clock(arrivals: Iterator[int], step_ns: int) -> Iterator[int]:
    """As a clock that only moves every step_ns shows them."""
    return (at // step_ns * step_ns for at in arrivals)


def dealt(number: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of [0, number) in which nothing moves further than WINDOW of it."""
    return np.argsort(np.arange(number) + rng.uniform(0, WINDOW * number, number), kind="stable")


def _gap_by_gap(gaps: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    at = 0
    yield at
    while True:
        for gap in gaps[dealt(len(gaps), rng)].tolist() or [NANOS_PER_S]:
            at += gap
            yield at


def _step_by_step(counts: np.ndarray, step_ns: int, rng: np.random.Generator) -> Iterator[int]:
    at = 0
    while True:
        for count in counts[dealt(len(counts), rng)].tolist():
            yield from repeat(at, count)
            at += step_ns
