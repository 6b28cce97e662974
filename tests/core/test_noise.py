"""Noise is a contract between processes and versions: these numbers may never change."""

from __future__ import annotations

import pytest

from mooncake.core.noise import noise, uniform

VECTORS = [
    ((0, 0, 0), 0),
    ((0, 0, 1), 4151391468963925352),
    ((1, 0, 0), 16294208416658607535),
    ((0, 1, 0), 9370218965779684112),
    ((42, 3, 4095), 8953181428095983221),
    ((9223372036854775807, 7, 131072), 14150494107951952235),
]


@pytest.mark.parametrize(("arguments", "expected"), VECTORS)
def test_vectors(arguments: tuple[int, int, int], expected: int) -> None:
    assert noise(*arguments) == expected
    assert uniform(*arguments) == (expected >> 11) / 2**53


def test_uniform_numbers_are_spread_evenly() -> None:
    numbers = [uniform(seed, choice, position) for seed in range(10) for choice in range(10) for position in range(100)]
    assert min(numbers) >= 0.0 and max(numbers) < 1.0
    tenths = [sum(1 for number in numbers if int(number * 10) == tenth) for tenth in range(10)]
    assert all(900 < count < 1100 for count in tenths)
    assert len(set(numbers)) == len(numbers)


def test_each_argument_matters() -> None:
    assert len({noise(1, 2, 3), noise(2, 1, 3), noise(1, 3, 2), noise(3, 2, 1), noise(2, 3, 1), noise(3, 1, 2)}) == 6
