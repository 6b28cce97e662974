"""Noise is a contract between processes and versions: these numbers may never change."""

from __future__ import annotations

import numpy as np
import pytest

from mooncake.core.noise import noise, uniforms

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


def test_uniform_numbers_are_spread_evenly() -> None:
    numbers = uniforms(noise(1, 2, 3), np.arange(10_000))
    assert numbers.min() > 0.0 and numbers.max() < 1.0 and len(np.unique(numbers)) == len(numbers)
    assert all(900 < count < 1100 for count in np.histogram(numbers, bins=10, range=(0.0, 1.0))[0])


def test_a_number_depends_on_its_index_alone_not_on_its_neighbours() -> None:
    assert uniforms(7, np.array([3, 40]))[1] == uniforms(7, np.arange(50))[40]
    assert uniforms(7, np.array([40])).tolist() == [0.6438741852851495]


def test_each_argument_matters() -> None:
    assert len({noise(1, 2, 3), noise(2, 1, 3), noise(1, 3, 2), noise(3, 2, 1), noise(2, 3, 1), noise(3, 1, 2)}) == 6
