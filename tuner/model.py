"""A Gaussian process over the enumerated configs: which of the untried ones promises most.

Times are modelled by their logarithm. Two configs are alike by the fields in which they agree, or
nearly do (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equations 2.25,
2.26 and 2.30; a product of exponential kernels, one per field). What is chosen has the largest
expected improvement (Jones, Schonlau and Welch, Journal of Global Optimization 13, 1998).
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Floats = npt.NDArray[np.floating[Any]]

# How fast likeness falls off with a field's distance, and the noise of a time beside its spread;
# those with the largest likelihood are taken.
_DECAYS = (0.3, 0.7, 1.5, 3.0)
_NOISES = (1e-3, 1e-2, 1e-1)
# More measured configs than this tell little more, and cost their cube.
_MOST_MEASURED = 256


def coordinates(points: Sequence[Sequence[int]], ordered: Sequence[bool]) -> Floats:
    """Configs as vectors whose absolute differences are distances, field by field from 0 to 1.

    Args:
        points: for each config the index of each field's value among its sorted values.
        ordered: of each field, whether near indices are alike; else only equal ones are.

    Returns:
        [configs, columns].
    """
    columns = []
    for values, is_ordered in zip(np.array(points).T, ordered, strict=True):
        if is_ordered:
            columns.append(values / max(values.max(), 1))
        else:  # one column for each value; two that differ lie 1 apart in sum
            columns += [0.5 * (values == value) for value in range(values.max() + 1)]
    return np.stack(columns, axis=1).astype(np.float64)


def distances(a: Floats, b: Floats) -> Floats:
    """Sum of absolute differences: [rows of a, rows of b]."""
    total = np.zeros((len(a), len(b)))
    for column in range(a.shape[1]):
        total += np.abs(a[:, None, column] - b[None, :, column])
    return total


def most_promising(between: Floats, times_ns: Sequence[float], across: Floats) -> int:
    """Which untried config has the largest expected improvement over the best time.

    Args:
        between: distances of the measured configs, [n, n], n >= 2.
        times_ns: n; that of a failed config is a time that nobody wants.
        across: distances of the measured configs to the untried ones, [n, m], m >= 1.
    """
    if len(between) > _MOST_MEASURED:
        best = np.argsort(times_ns, kind="stable")[:_MOST_MEASURED]
        between, across = between[np.ix_(best, best)], across[best]
        times_ns = [times_ns[index] for index in best]
    logs = np.log(np.array(times_ns))
    spread = max(float(logs.std()), 1e-6)
    target = (logs - logs.mean()) / spread
    fits = (
        _fit(between, target, decay, noise) for decay, noise in itertools.product(_DECAYS, _NOISES)
    )
    _, decay, factor, half = max(fits, key=lambda fit: fit[0])
    weights = np.linalg.solve(factor.T, half)
    covariance = np.exp(-decay * across)
    mean = covariance.T @ weights
    explained = np.linalg.solve(factor, covariance)
    deviation = np.sqrt(np.maximum(1 - (explained**2).sum(axis=0), 1e-12))
    gain = target.min() - mean
    score = gain / deviation
    density = np.exp(-(score**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in score])
    return int(np.argmax(gain * below + deviation * density))


def _fit(
    between: Floats, target: Floats, decay: float, noise: float
) -> tuple[float, float, Floats, Floats]:
    """Log likelihood, the decay, the Cholesky factor and the target divided by it."""
    factor: Floats = np.linalg.cholesky(np.exp(-decay * between) + noise * np.eye(len(target)))
    half: Floats = np.linalg.solve(factor, target)
    likelihood = -0.5 * float(half @ half) - float(np.log(np.diag(factor)).sum())
    return likelihood, decay, factor, half
