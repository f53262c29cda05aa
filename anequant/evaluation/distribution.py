"""How the values of one tensor are distributed: moments, extremes and a histogram, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 20
BINS = 24


@dataclass(frozen=True)
class Distribution:
    """Statistics of the finite values; None where there are none, or where a ratio has no denominator.

    kurtosis   fourth central moment over the squared variance: 3 for normal values
    peak       max|x| / rms
    zeros      share of values that are exactly 0
    counts     values in each of BINS equally wide bins from `low` to `high`
    """

    values: int
    not_finite: int
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: float | None = None
    rms: float | None = None
    kurtosis: float | None = None
    peak: float | None = None
    zeros: float | None = None
    counts: tuple[int, ...] = ()


def measure_distribution(tensor: Tensor, bins: int = BINS) -> Distribution:
    """Measure a tensor of any shape and real dtype, in two passes over a million values at a time."""
    values, zeros = 0, 0
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    for part in _finite(tensor):
        values += len(part)
        zeros += int((part == 0).sum())
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        total += float(part.sum())
        squares += float(part.square().sum())
    missing = tensor.numel() - values
    if not values:
        return Distribution(0, missing)
    mean, rms = total / values, math.sqrt(squares / values)
    second = fourth = 0.0
    counts = torch.zeros(bins, dtype=torch.int64)
    for part in _finite(tensor):
        off = (part - mean).square()
        second += float(off.sum())
        fourth += float(off.square().sum())
        counts += torch.histc(part, bins, low, high).long() if high > low else _all_in_one(len(part), bins)
    variance = second / values
    return Distribution(
        values,
        missing,
        low,
        high,
        mean,
        math.sqrt(variance),
        rms,
        fourth / values / variance**2 if variance**2 > 0 else None,
        max(-low, high) / rms if rms > 0 else None,
        zeros / values,
        tuple(counts.tolist()),
    )


def _finite(tensor: Tensor) -> Iterator[Tensor]:
    for part in torch.split(tensor.reshape(-1), CHUNK):
        wide = part.double()
        finite = wide[wide.isfinite()]
        if len(finite):
            yield finite


def _all_in_one(count: int, bins: int) -> Tensor:
    """Count values that are all the same, in the bin in the middle."""
    counts = torch.zeros(bins, dtype=torch.int64)
    counts[bins // 2] = count
    return counts
