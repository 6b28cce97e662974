"""Fits time models (FACTS section 3) to measured steps, by least squares with coefficients that are not negative."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Coefficients = tuple[float, float, float]


def fit_prefill(samples: Sequence[tuple[int, int, float]]) -> Coefficients:
    """samples: (new tokens n, cached prefix P, milliseconds) -> a, b, c of a + b n/1000 + c n (P + n/2)/1e6."""
    rows = [(1.0, n / 1e3, n * (prefix + n / 2) / 1e6) for n, prefix, _ in samples]
    return _fit(rows, [ms for _, _, ms in samples])


def fit_decode(samples: Sequence[tuple[int, int, float]]) -> Coefficients:
    """samples: (sequences B, context tokens of all together, milliseconds) -> a, b, c of a + b B + c context/1e6."""
    rows = [(1.0, float(batch), context / 1e6) for batch, context, _ in samples]
    return _fit(rows, [ms for _, _, ms in samples])


def _fit(rows: Sequence[tuple[float, float, float]], times: Sequence[float]) -> Coefficients:
    """Least squares over the columns that stay; a coefficient that comes out negative is set to 0 and the rest fitted again."""
    matrix, target = np.array(rows, dtype=float).reshape(-1, 3), np.array(times, dtype=float)
    columns = list(range(3)) if len(target) else []
    found = np.zeros(3)
    while columns:
        # Relative errors count, or the longest step would decide alone.
        weights = 1.0 / np.maximum(target, 1e-6)
        solution, *_ = np.linalg.lstsq(matrix[:, columns] * weights[:, None], target * weights, rcond=None)
        if (solution >= 0).all():
            found[columns] = solution
            break
        columns.pop(int(np.argmin(solution)))
    a, b, c = (float(value) for value in found)
    return a, b, c
