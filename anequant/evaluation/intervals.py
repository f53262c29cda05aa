"""Means over windows, with their standard errors and 95% intervals.

Predictions within a window depend on each other, so the spread is that of the means x_1 ... x_n of n windows:

    standard error   s / sqrt(n), with s^2 = sum (x_i - mean)^2 / (n - 1)
    interval         mean ± t s / sqrt(n), with t the 97.5% quantile of Student's t with n - 1 degrees

Two models that were measured on the same windows are compared by the differences x_i - y_i. What makes a
window hard for both cancels in them, so their interval is narrower than those of the two models suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over windows, its standard error, and the ends of its interval of CONFIDENCE; one window tells
    neither, and they are None."""

    value: float
    error: float | None
    interval: tuple[float, float] | None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside of the interval, so that the sign of the mean is no accident of the text."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def average(values: Sequence[float]) -> Mean:
    """Return the mean of one value for each window, of which there is at least one."""
    found = np.asarray(values, dtype=np.float64)
    mean, count = float(found.mean()), len(found)
    if count == 1:
        return Mean(mean, None, None)
    error = float(found.std(ddof=1)) / math.sqrt(count)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return Mean(mean, error, (mean - reach, mean + reach))


def average_differences(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    """Return the mean of ours less theirs, window by window; both are of the same windows."""
    return average([own - other for own, other in zip(ours, theirs, strict=True)])
