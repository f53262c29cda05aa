"""Rounding a linear's input to a few integers, and back: what an integer machine would have seen.

What is rounded is what enters the product: y = o * (core @ round(d * x)) + b, with the linear's scales o and
d. Symmetric codes are s * q with q from -2^(b-1) to 2^(b-1) - 1, as Core ML's `quantize` stores them;
asymmetric ones are low + s * q with q from 0 to 2^b - 1. A static s holds for all tokens and comes from
calibration; a dynamic one is the token's own (QuaRot, Ashkboos et al. 2024, section 4).

A static scale that covers the largest magnitude wastes codes on outliers. Over a histogram of magnitudes,
`percentile` leaves out one in a hundred thousand, and `mse` takes the scale with the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 8192
PERCENTILE = 0.99999
CANDIDATES = torch.linspace(0.05, 1.0, 96)
SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class ActivationFormat:
    """How one linear's input is rounded; `scale` is the static one, None for a scale per token."""

    bits: int
    symmetric: bool = True
    clip: float = 1.0
    scale: float | None = None


def round_activations(x: Tensor, format_: ActivationFormat) -> Tensor:
    """Round x [..., in] and return it in its dtype; gradients pass straight through."""
    with torch.no_grad():
        if format_.scale is not None:
            result = _static(x, format_.scale, format_.bits)
        elif format_.symmetric:
            result = _symmetric(x, format_)
        else:
            result = _asymmetric(x, format_)
    return x + (result - x).detach() if x.requires_grad else result


def choose_static_scale(histogram: Tensor, largest: float, bits: int, kind: str) -> float:
    """Choose the scale for magnitudes counted in histogram [BINS], bins of equal width up to `largest`.

    `kind` is absmax, percentile or mse. The scale is a normal number of float16.
    """
    top = 2 ** (bits - 1) - 1
    if kind == "percentile":
        share = histogram.double().cumsum(0) / histogram.sum().clamp_min(1)
        kept = int(torch.searchsorted(share, PERCENTILE)) + 1
        largest *= min(kept, BINS) / BINS
    elif kind == "mse":
        largest *= _best_share(histogram, top)
    return max(float(torch.tensor(largest / top).half()), SMALLEST_SCALE)


def _best_share(histogram: Tensor, top: int) -> float:
    """Return the share of the largest magnitude whose scale rounds the histogram with the least squared
    error."""
    middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    steps = CANDIDATES.double()[:, None] / top
    rounded = (middles / steps).round().clamp(max=top) * steps
    losses = ((rounded - middles).square() * histogram.double()).sum(1)
    return float(CANDIDATES[losses.argmin()])


def _static(x: Tensor, scale: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (x / scale).round_().clamp_(-half, half - 1).mul_(scale)


def _symmetric(x: Tensor, format_: ActivationFormat) -> Tensor:
    half = 2 ** (format_.bits - 1)
    scale: Tensor = x.abs().amax(-1, keepdim=True) * (format_.clip / (half - 1))
    rounded: Tensor = (x / scale.clamp_min(torch.finfo(x.dtype).tiny)).round_()
    return rounded.clamp_(-half, half - 1).mul_(scale)


def _asymmetric(x: Tensor, format_: ActivationFormat) -> Tensor:
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    low, high = low.clamp(max=0) * format_.clip, high.clamp(min=0) * format_.clip
    levels = 2**format_.bits - 1
    scale = ((high - low) / levels).clamp_min(torch.finfo(x.dtype).tiny)
    zero: Tensor = (-low / scale).round()
    rounded: Tensor = (x / scale).round_()
    return rounded.add_(zero).clamp_(0, levels).sub_(zero).mul_(scale)
