"""Fitting time models to measured steps."""

from __future__ import annotations

import pytest

from mooncake.core.costs import fit_decode, fit_prefill
from mooncake.core.types import NANOS_PER_MS, CostModel

SIZES = [(64, 0), (256, 0), (256, 256), (512, 0), (256, 768)]
BATCHES = [(1, 64), (1, 512), (4, 1024), (8, 512)]


def test_exact_times_give_back_their_coefficients() -> None:
    model = CostModel((29.6, 92.3, 1.86), (17.75, 0.058, 26.1))
    prefill = [(n, p, model.prefill_ns(n, p) / NANOS_PER_MS) for n, p in SIZES]
    decode = [(b, c, model.decode_ns(b, c) / NANOS_PER_MS) for b, c in BATCHES]
    assert fit_prefill(prefill) == pytest.approx(model.prefill, rel=1e-3)
    assert fit_decode(decode) == pytest.approx(model.decode, rel=1e-3)


def test_no_coefficient_is_negative_and_the_rest_fit_as_well_as_they_can() -> None:
    a, b, c = fit_prefill([(100, 0, 10.0), (200, 0, 20.0), (400, 0, 30.0)])
    assert (min(a, b, c), c) == (0.0, 0.0)
    assert a > 0 and b > 0
    assert fit_decode([(1, 100, 5.0), (2, 200, 4.0), (4, 400, 3.0)])[1:] == (0.0, 0.0)


def test_a_few_samples_or_none_are_enough() -> None:
    assert fit_prefill([]) == (0.0, 0.0, 0.0)
    a, b, c = fit_decode([(1, 64, 20.0)])
    assert a + b + c * 64 / 1e6 == pytest.approx(20.0)


def test_short_steps_count_as_much_as_long_ones() -> None:
    a, b, _ = fit_prefill([(10, 0, 1.0), (1000, 0, 100.0), (1000, 0, 110.0)])
    assert a + b * 0.01 == pytest.approx(1.0, rel=0.05)
