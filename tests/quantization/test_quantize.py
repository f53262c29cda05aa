"""quantize_linear against literal implementations and on tensors that nobody expects."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe_files import load_recipe

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
CHOICES = list(itertools.product(("uniform", "lut"), ("tensor", "output", "balanced"), (4, 6, 8)))
each_choice = pytest.mark.parametrize(
    ("codebook", "scales", "bits"), CHOICES, ids=["-".join(map(str, choice)) for choice in CHOICES]
)


def quantized(
    weight: Tensor,
    codebook: str = "lut",
    scales: str = "balanced",
    bits: int = 4,
    bias: Tensor | None = None,
) -> QuantizedLinear:
    return quantize_linear(weight, bias, WeightFormat(bits, codebook, scales), "layer.some_proj")


def by_recipe(weight: Tensor, name: str) -> QuantizedLinear:
    recipe = load_recipe(name)
    return quantized(weight, recipe.codebook, recipe.scales, recipe.bits)


def random_weight(rows: int, columns: int, seed: int = 0, size: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    row_sizes = (0.3 * torch.randn(rows, 1, generator=generator)).exp()
    return size * row_sizes * torch.randn(rows, columns, generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_sound(result: QuantizedLinear, weight: Tensor, bits: int) -> None:
    assert result.codes.dtype == torch.uint8 and result.codes.shape == weight.shape
    assert result.codebook.shape == (2**bits,) and int(result.codes.max()) < 2**bits
    assert result.bits == bits
    assert result.input_scale.shape == (weight.shape[1],) and result.output_scale.shape == (weight.shape[0],)
    assert bool((result.codebook.diff() > 0).all())
    for values in (result.codebook, result.input_scale, result.output_scale):
        assert values.dtype == torch.float32
        assert bool(torch.isfinite(values).all())
        assert torch.equal(values, values.half().float())
    assert float(result.input_scale.min()) > 0 and float(result.output_scale.min()) > 0
    assert bool(torch.isfinite(result.dequantize()).all())


# --- what the words mean ------------------------------------------------------------------------------


@few
@given(st.integers(1, 40), st.integers(1, 40), seeds, st.floats(-3, 1))
@pytest.mark.parametrize(("name", "bits"), [("w_int4_per_tensor", 4), ("w_int8_per_tensor", 8)])
def test_the_published_scheme(name: str, bits: int, rows: int, columns: int, seed: int, size: float) -> None:
    """scale = absmax / 7 (or 127), codes = clamp(round(w / scale), -8, 7); the scale is kept as float16."""
    weight = random_weight(rows, columns, seed, 10.0**size)
    half = 2 ** (bits - 1)
    scale = (weight.abs().max() / (half - 1)).half().float().clamp_min(2.0**-14)
    codes = (weight / scale).round().clamp(-half, half - 1)
    result = by_recipe(weight, name)
    assert_sound(result, weight, bits)
    assert torch.equal(result.output_scale, scale.expand(rows))
    assert torch.equal(result.input_scale, torch.ones(columns))
    assert torch.equal(result.codes.int() - half, codes.int())
    torch.testing.assert_close(result.dequantize(), codes * scale, rtol=1e-6, atol=0)


def test_uniform_with_a_scale_per_row() -> None:
    weight = random_weight(24, 40)
    scale = (weight.abs().amax(1) / 7).half().float()
    codes = (weight / scale[:, None]).round().clamp(-8, 7)
    result = quantized(weight, "uniform", "output")
    assert torch.equal(result.output_scale, scale)
    assert torch.equal(result.codes.int() - 8, codes.int())


def test_dequantize_is_scale_times_entry_times_scale() -> None:
    result = quantized(random_weight(6, 5))
    weight = result.dequantize()
    for row, column in itertools.product(range(6), range(5)):
        entry = float(result.codebook[int(result.codes[row, column])])
        expected = float(result.output_scale[row]) * entry * float(result.input_scale[column])
        assert float(weight[row, column]) == pytest.approx(expected, rel=1e-6)


@each_choice
def test_every_code_is_the_nearest(codebook: str, scales: str, bits: int) -> None:
    weight = random_weight(32, 48)
    result = quantized(weight, codebook, scales, bits)
    assert_sound(result, weight, bits)
    size = result.output_scale.double()[:, None] * result.input_scale.double()
    candidates = result.codebook.double()[:, None, None] * size
    least = (candidates - weight.double()).abs().amin(0)
    chosen = (result.dequantize().double() - weight.double()).abs()
    assert float(((chosen - least) / size).max()) < 1e-5


@pytest.mark.parametrize("scales", ["tensor", "output", "balanced"])
def test_more_freedom_is_better(scales: str) -> None:
    weight = random_weight(128, 192)
    errors = {
        (codebook, bits): relative_error(quantized(weight, codebook, scales, bits).dequantize(), weight)
        for codebook in ("uniform", "lut")
        for bits in (4, 6, 8)
    }
    for codebook in ("uniform", "lut"):
        assert errors[codebook, 4] > 2 * errors[codebook, 6] > 4 * errors[codebook, 8]
    for bits in (4, 6, 8):
        assert errors["lut", bits] <= errors["uniform", bits]


def test_a_gaussian_weight_loses_9_77_percent() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    result = by_recipe(weight, "w4-nearest")
    assert relative_error(result.dequantize(), weight) == pytest.approx(0.0977, rel=0.01)


# --- quantizing twice ---------------------------------------------------------------------------------


@each_choice
def test_quantizing_twice_changes_next_to_nothing(codebook: str, scales: str, bits: int) -> None:
    """Integers with absmax scales find themselves again exactly (up to float16 in the scale). Fitted scales
    see slightly different sizes the second time; the change stays small against that of the first."""
    weight = random_weight(96, 128)
    first = quantized(weight, codebook, scales, bits)
    second = quantized(first.dequantize(), codebook, scales, bits)
    change = relative_error(second.dequantize(), first.dequantize())
    if codebook == "uniform" and scales != "balanced":
        assert torch.equal(second.codes, first.codes)
        assert torch.equal(second.output_scale, first.output_scale)
    elif scales == "tensor":
        assert torch.equal(second.codes, first.codes)
        assert change <= 2.0**-10
    else:
        assert change <= 0.5 * relative_error(first.dequantize(), weight)


# --- unexpected tensors -------------------------------------------------------------------------------


@each_choice
def test_all_zero(codebook: str, scales: str, bits: int) -> None:
    weight = torch.zeros(16, 24)
    result = quantized(weight, codebook, scales, bits)
    assert_sound(result, weight, bits)
    assert float(result.dequantize().abs().max()) <= 1e-9


@each_choice
@pytest.mark.parametrize("value", [0.37, -1.0, 60000.0])
def test_constant(codebook: str, scales: str, bits: int, value: float) -> None:
    weight = torch.full((16, 24), value)
    result = quantized(weight, codebook, scales, bits)
    assert_sound(result, weight, bits)
    assert relative_error(result.dequantize(), weight) <= 0.01


@each_choice
@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (2, 2)], ids=str)
def test_few_rows_or_columns(codebook: str, scales: str, bits: int, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape, seed=3)
    result = quantized(weight, codebook, scales, bits)
    assert_sound(result, weight, bits)
    assert relative_error(result.dequantize(), weight) <= {4: 0.15, 6: 0.04, 8: 0.015}[bits]


@each_choice
@pytest.mark.parametrize("outlier", [5.0, 1000.0, 60000.0])
def test_one_huge_outlier(codebook: str, scales: str, bits: int, outlier: float) -> None:
    """The outlier is most of the weight's norm, so it has to survive. (Not with integers on balanced scales:
    there the outlier is a few units among ones, and a step fitted to the ones may clip it.)"""
    weight = random_weight(32, 48)
    weight[3, 5] = outlier
    result = quantized(weight, codebook, scales, bits)
    assert_sound(result, weight, bits)
    if (codebook, scales) != ("uniform", "balanced"):
        assert float(result.dequantize()[3, 5]) == pytest.approx(outlier, rel=0.05)


@each_choice
@pytest.mark.parametrize("axis", ["row", "column"])
def test_one_zero_row_or_column(codebook: str, scales: str, bits: int, axis: str) -> None:
    """It stays near zero, and the rest is as good as it is alone."""
    weight = random_weight(64, 64)
    keep = [k for k in range(64) if k != 3]
    rest: Any = (keep, slice(None)) if axis == "row" else (slice(None), keep)
    dead: Any = (3, slice(None)) if axis == "row" else (slice(None), 3)
    weight[dead] = 0
    result = quantized(weight, codebook, scales, bits)
    assert_sound(result, weight, bits)
    values = result.dequantize()
    alone = relative_error(
        quantized(weight[rest].contiguous(), codebook, scales, bits).dequantize(), weight[rest]
    )
    assert relative_error(values[rest], weight[rest]) <= 1.2 * alone
    assert float(values[dead].abs().max()) <= float(weight.abs().max()) / 20


@pytest.mark.parametrize("dead", [16, 32, 48, 63], ids=lambda count: f"{count}-of-64")
@pytest.mark.parametrize("codebook", ["uniform", "lut"])
def test_zero_columns_do_not_spoil_the_others(codebook: str, dead: int) -> None:
    weight = random_weight(64, 64)
    weight[:, :dead] = 0
    result = quantized(weight, codebook, "balanced", 4)
    assert_sound(result, weight, 4)
    alone = quantized(weight[:, dead:].contiguous(), codebook, "balanced", 4).dequantize()
    error = float((result.dequantize()[:, dead:] - weight[:, dead:]).norm())
    assert error <= 1.2 * float((alone - weight[:, dead:]).norm()) + 1e-3 * float(weight.norm())


@each_choice
def test_tiny_values(codebook: str, scales: str, bits: int) -> None:
    """Far below float16's smallest normal number: nothing is gained, but nothing grows either."""
    weight = random_weight(32, 48, size=1e-6)
    result = quantized(weight, codebook, scales, bits)
    assert_sound(result, weight, bits)
    assert relative_error(result.dequantize(), weight) <= 1.0
    products = result.output_scale.double()[:, None] * result.input_scale.double()
    assert float(products.min()) >= 2.0**-14 * (1 - 2.0**-10)


# --- biases and ranges --------------------------------------------------------------------------------


@each_choice
@pytest.mark.parametrize("largest", [1.0, 500.0, 3000.0])
def test_a_big_bias_fits_float16_after_division(
    codebook: str, scales: str, bits: int, largest: float
) -> None:
    weight = random_weight(32, 48)
    bias = torch.linspace(-largest, largest, 32)
    plain = quantized(weight, codebook, scales, bits)
    result = quantized(weight, codebook, scales, bits, bias)
    assert_sound(result, weight, bits)
    assert result.bias is not None
    assert torch.equal(result.bias, bias.half().float())
    assert float((result.bias / result.output_scale).abs().max()) < 65504
    assert torch.equal(result.codes, plain.codes)
    assert torch.equal(result.dequantize(), plain.dequantize())


def test_a_small_bias_leaves_the_scales_alone() -> None:
    weight = random_weight(32, 48)
    plain, result = quantized(weight), quantized(weight, bias=torch.full((32,), 0.1))
    assert torch.equal(result.output_scale, plain.output_scale)
    assert torch.equal(result.codebook, plain.codebook)
    assert plain.bias is None


def test_a_bias_that_no_scale_can_hold_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"bias of 'layer\.some_proj'"):
        quantized(random_weight(32, 48, size=1e-3), bias=torch.full((32,), 65000.0))


@pytest.mark.parametrize("value", [65505.0, -1e6, float("inf"), float("nan")])
def test_what_float16_cannot_hold_is_refused(value: float) -> None:
    weight, bias = random_weight(32, 48), torch.zeros(32)
    weight[1, 2] = value
    with pytest.raises(UnsupportedError, match=r"'layer\.some_proj'.*float16") as caught:
        quantized(weight)
    assert caught.value.exit_code == 4
    bias[5] = value
    with pytest.raises(UnsupportedError, match=r"'layer\.some_proj'.*float16"):
        quantized(random_weight(32, 48), bias=bias)


def test_the_same_input_gives_the_same_output() -> None:
    weight = random_weight(64, 64)
    first, second = quantized(weight), quantized(weight)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.codebook, second.codebook)
    assert torch.equal(first.input_scale, second.input_scale)
    assert torch.equal(first.output_scale, second.output_scale)
