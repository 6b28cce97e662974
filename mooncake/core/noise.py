"""Noise that anyone can compute again: a pure function of (seed, choice, absolute position).

So a sequence draws the same tokens in every process, in every batch, and when it is continued elsewhere.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def noise(seed: int, choice: int, position: int) -> int:
    """64 bits, by SplitMix64's finaliser (Steele, Lea and Flood 2014) over a weighted sum of the three."""
    x = (seed * 0x9E3779B97F4A7C15 + choice * 0xD1B54A32D192ED03 + position * 0x8CB92BA72F3D8DD7) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniforms(base: int, indices: np.ndarray) -> np.ndarray:
    """A number in (0, 1) for each index, float64: SplitMix64's stream from `base`, at those places."""
    with np.errstate(over="ignore"):
        x = np.uint64(base) + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
