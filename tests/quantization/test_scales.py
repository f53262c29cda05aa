from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anequant.quantization.scales import balance_scales, output_scale, round_scales, tensor_scale

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(48, 96)
SMALLEST_NORMAL = 2.0**-14


def scaled_gaussian(rows: int, columns: int, seed: int, spread: float = 0.5) -> Tensor:
    """Gaussian entries, with row and column sizes that differ log-normally."""
    generator = torch.Generator().manual_seed(seed)
    row_sizes = (spread * torch.randn(rows, 1, generator=generator)).exp()
    column_sizes = (spread * torch.randn(columns, generator=generator)).exp()
    return 0.02 * torch.randn(rows, columns, generator=generator) * row_sizes * column_sizes


def core_of(weight: Tensor, scales: tuple[Tensor, Tensor]) -> Tensor:
    output, input_ = scales
    return weight.double() / output.double()[:, None] / input_.double()


def converged(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced scales, by alternating plain division in float64 until nothing changes."""
    core = weight.double()
    output, input_ = torch.ones(core.shape[0]).double(), torch.ones(core.shape[1]).double()
    for _ in range(500):
        rows = core.square().mean(1).sqrt()
        core, output = core / rows[:, None], output * rows
        columns = core.square().mean(0).sqrt()
        core, input_ = core / columns, input_ * columns
    mean = input_.log().mean().exp()
    return output * mean, input_ / mean


@few
@given(sizes, sizes, seeds)
def test_balanced_rows_and_columns_have_unit_size(rows: int, columns: int, seed: int) -> None:
    weight = scaled_gaussian(rows, columns, seed)
    core = core_of(weight, balance_scales(weight))
    assert float((core.square().mean(1).sqrt() - 1).abs().max()) < 1e-5
    assert float((core.square().mean(0).sqrt() - 1).abs().max()) < 1e-3


@few
@given(sizes, sizes, seeds)
def test_balanced_scales_are_the_fixed_point(rows: int, columns: int, seed: int) -> None:
    weight = scaled_gaussian(rows, columns, seed)
    for actual, expected in zip(balance_scales(weight), converged(weight), strict=True):
        assert float((actual.double() / expected - 1).abs().max()) < 1e-3


@few
@given(sizes, sizes, seeds)
def test_input_scales_have_a_geometric_mean_of_one(rows: int, columns: int, seed: int) -> None:
    _, input_ = balance_scales(scaled_gaussian(rows, columns, seed))
    assert float(input_.log().mean().abs()) < 1e-4


@few
@given(seeds)
def test_known_sizes_are_found(seed: int) -> None:
    """Signs are balanced already, so the scales are the sizes that they were given."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(40, 24, generator=generator).sign()
    rows, columns = (torch.rand(n, generator=generator) + 0.1 for n in (40, 24))
    columns /= columns.log().mean().exp()
    output, input_ = balance_scales(signs * rows[:, None] * columns)
    torch.testing.assert_close(output, rows, rtol=1e-5, atol=0)
    torch.testing.assert_close(input_, columns, rtol=1e-5, atol=0)


@few
@given(seeds, st.sampled_from([2.0**-6, 2.0**6, 1e-3]))
def test_the_input_scale_does_not_depend_on_the_weights_size(seed: int, factor: float) -> None:
    weight = scaled_gaussian(48, 64, seed)
    output, input_ = balance_scales(weight)
    output_of_scaled, input_of_scaled = balance_scales(weight * factor)
    torch.testing.assert_close(input_of_scaled, input_, rtol=1e-4, atol=0)
    torch.testing.assert_close(output_of_scaled, output * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dead", [1, 16, 32, 48, 63], ids=lambda count: f"{count}-of-64")
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_dead_rows_and_columns_get_a_small_positive_scale(axis: str, dead: int) -> None:
    weight = scaled_gaussian(64, 64, 2)
    if axis == "rows":
        weight[:dead] = 0
    else:
        weight[:, :dead] = 0
    for scale in balance_scales(weight):
        assert bool(torch.isfinite(scale).all()) and float(scale.min()) > 0
    for scale in round_scales(*balance_scales(weight)):
        assert bool(torch.isfinite(scale).all()) and float(scale.min()) > 0


def test_tensor_and_output_scales() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0], [0.5, 0.5]])
    assert torch.equal(tensor_scale(weight, "absmax"), torch.full((3,), 4.0))
    torch.testing.assert_close(tensor_scale(weight, "rms"), torch.full((3,), (26.5 / 6) ** 0.5))
    assert torch.equal(output_scale(weight, "absmax"), torch.tensor([4.0, 1.0, 0.5]))
    torch.testing.assert_close(output_scale(weight, "rms"), torch.tensor([12.5, 0.5, 0.25]).sqrt())


@few
@given(seeds, st.floats(-12, 2), st.floats(-3, 3))
def test_float16_scales_keep_the_value_and_the_products_normal(
    seed: int, output_exponent: float, input_exponent: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    output = 10.0**output_exponent * torch.rand(17, generator=generator)
    input_ = 2.0**input_exponent * (torch.rand(13, generator=generator) + 0.25)
    rounded_output, rounded_input = round_scales(output, input_)
    for rounded in (rounded_output, rounded_input):
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, rounded.half().float())
    products = rounded_output.double()[:, None] * rounded_input.double()
    assert float(products.min()) >= SMALLEST_NORMAL
    assert float(rounded_output.min()) >= SMALLEST_NORMAL
    torch.testing.assert_close(rounded_input, input_, rtol=2**-11, atol=0)
    large = output * input_.min().clamp_max(1.0) > SMALLEST_NORMAL * 1.01
    torch.testing.assert_close(rounded_output[large], output[large], rtol=2**-11, atol=0)
