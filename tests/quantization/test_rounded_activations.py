"""Rounded activations against the nearest of all codes, found by trying each one in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anequant.quantization.activations import (
    BINS,
    SMALLEST_SCALE,
    ActivationFormat,
    choose_static_scale,
    round_activations,
)


def values(seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64) * scale
    x[0, 0, 3] *= 20
    return x


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """The distance of every x [..., n] to the closest number of its row's grid [..., codes]."""
    return (x[..., :, None] - grid[..., None, :]).abs().amin(-1)


seeds = st.integers(0, 1000)
scales = st.sampled_from([1e-6, 1e-2, 1.0, 3e3])


@given(seeds, scales, st.sampled_from([4, 8]))
def test_a_static_scale_rounds_to_the_nearest_code(seed: int, scale: float, bits: int) -> None:
    x, half = values(seed, scale), 2 ** (bits - 1)
    step = float(x.abs().max()) / half / 2
    result = round_activations(x, ActivationFormat(bits, scale=step))
    grid = torch.arange(-half, half, dtype=torch.float64) * step
    torch.testing.assert_close(
        (x - result).abs(), nearest(x, grid.expand(3, 5, -1)), rtol=1e-9, atol=1e-12 * scale
    )
    assert float(result.max()) <= (half - 1) * step * (1 + 1e-12)


@given(seeds, scales, st.sampled_from([4, 8]), st.sampled_from([1.0, 0.9]))
def test_a_token_has_a_scale_of_its_own(seed: int, scale: float, bits: int, clip: float) -> None:
    x, half = values(seed, scale), 2 ** (bits - 1)
    result = round_activations(x, ActivationFormat(bits, clip=clip))
    steps = x.abs().amax(-1, keepdim=True) * clip / (half - 1)
    grid = torch.arange(-half, half, dtype=torch.float64) * steps
    torch.testing.assert_close((x - result).abs(), nearest(x, grid), rtol=1e-7, atol=1e-12 * scale)
    alone = torch.stack([round_activations(token, ActivationFormat(bits, clip=clip)) for token in x[1]])
    assert torch.equal(alone, result[1])


@given(seeds, scales, st.sampled_from([4, 8]), st.sampled_from([1.0, 0.9]), st.sampled_from([-1.0, 0.0, 4.0]))
def test_asymmetric_codes_cover_the_range_and_hold_zero(
    seed: int, scale: float, bits: int, clip: float, shift: float
) -> None:
    x = values(seed, scale) + shift * scale
    result = round_activations(x, ActivationFormat(bits, symmetric=False, clip=clip))
    low = x.amin(-1, keepdim=True).clamp(max=0) * clip
    high = x.amax(-1, keepdim=True).clamp(min=0) * clip
    step = (high - low) / (2**bits - 1)
    grid = (torch.arange(2**bits, dtype=torch.float64) - (-low / step).round()) * step
    torch.testing.assert_close((x - result).abs(), nearest(x, grid), rtol=1e-7, atol=1e-12 * scale)
    assert bool((nearest(torch.zeros(3, 5, 1, dtype=torch.float64), grid) == 0).all())


@pytest.mark.parametrize("format_", [ActivationFormat(4), ActivationFormat(8, symmetric=False)])
def test_a_token_of_zeros_stays_zero(format_: ActivationFormat) -> None:
    for dtype in (torch.float16, torch.float32):
        x = torch.zeros(2, 8, dtype=dtype)
        assert torch.equal(round_activations(x, format_), x)


def test_gradients_pass_straight_through() -> None:
    x = values(0, 1.0).requires_grad_()
    (round_activations(x, ActivationFormat(4)) * 3).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3))


def histogram(x: Tensor) -> Tensor:
    return torch.histc(x.abs().float(), BINS, 0, float(x.abs().max()))


def test_absmax_covers_the_largest() -> None:
    x = values(1, 2.0)
    largest = float(x.abs().max())
    scale = choose_static_scale(histogram(x), largest, 8, "absmax")
    assert scale == float(torch.tensor(largest / 127).half())
    assert choose_static_scale(torch.zeros(BINS), 0.0, 8, "absmax") == SMALLEST_SCALE


def test_a_percentile_leaves_out_one_in_a_hundred_thousand() -> None:
    x = torch.linspace(-1, 1, 1_000_000, dtype=torch.float64)
    x[:5] = 80.0
    scale = choose_static_scale(histogram(x), 80.0, 8, "percentile")
    assert 1.0 <= scale * 127 <= 1.0 + 2 * 80 / BINS
    x[:50] = 80.0
    assert choose_static_scale(histogram(x), 80.0, 8, "percentile") * 127 == pytest.approx(80, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_the_best_of_all_ranges(bits: int) -> None:
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(1e-5, 1 - 1e-5, 20001)).double()
    largest = float(x.abs().max())

    def loss(scale: float) -> float:
        return float((round_activations(x, ActivationFormat(bits, scale=scale)) - x).square().mean())

    found = loss(choose_static_scale(histogram(x), largest, bits, "mse"))
    best = min(loss(largest * share / (2 ** (bits - 1) - 1)) for share in torch.linspace(0.02, 1, 400))
    assert best <= found < 1.02 * best
