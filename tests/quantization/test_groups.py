"""Scales of groups: against a literal loop, by gptq, in a file, and on a trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Quantized
from rounding import descended, gptq_codes
from safetensors.torch import load_file
from torch import Tensor

from anequant.checkpoints.layers import load_layer, open_quantized
from anequant.checkpoints.quantized import load, store
from anequant.errors import InputError, UsageError
from anequant.quantization.calibrated import Rounding, quantize_calibrated
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.scales import group_scale, spread
from anequant.quantization.statistics import InputStatistics, Moments
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe_files import load_recipe

NAME = "layer.some_proj"


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Every group of 32 columns and every row has a size of its own."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, columns // 32, generator=generator).exp().repeat_interleave(32, 1)
    return 0.2 * sizes * torch.randn(rows, columns, generator=generator)


def in_groups(weight: Tensor, group: int, codebook: str = "uniform", bits: int = 4) -> QuantizedLinear:
    return quantize_linear(weight, None, WeightFormat(bits, codebook, "group", group), NAME)


def inputs_statistics(inputs: Tensor) -> InputStatistics:
    hessian = inputs.T @ inputs / len(inputs)
    moments = Moments(hessian, len(inputs), hessian)
    return InputStatistics(moments, moments)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_uniform_codes_are_the_literal_absmax_ones(group: int, bits: int) -> None:
    weight = random_weight(24, 256)
    result = in_groups(weight, group, bits=bits)
    assert result.output_scale.shape == (24, 256 // group)
    largest = 2 ** (bits - 1) - 1
    for row in range(24):
        for start in range(0, 256, group):
            part = weight[row, start : start + group]
            scale = (part.abs().max() / largest).half().float()
            assert result.output_scale[row, start // group] == scale
            codes = (part / scale).round().clamp(-largest - 1, largest)
            assert torch.equal(result.codes[row, start : start + group].float() - largest - 1, codes)
            assert torch.equal(result.dequantize()[row, start : start + group], codes * scale)


@pytest.mark.parametrize("codebook", ["uniform", "lut"])
def test_smaller_groups_are_closer(codebook: str) -> None:
    weight = random_weight(64, 256)
    errors = [
        float((in_groups(weight, group, codebook).dequantize() - weight).norm()) for group in (32, 64, 128)
    ]
    whole = quantize_linear(weight, None, WeightFormat(4, codebook, "output"), NAME)
    assert errors == sorted(errors) and errors[-1] < float((whole.dequantize() - weight).norm())


def test_a_group_that_does_not_divide_the_columns_is_refused() -> None:
    with pytest.raises(UsageError, match="groups of 64 do not divide 96 columns"):
        in_groups(random_weight(4, 96), 64)


@pytest.mark.parametrize("codebook", ["uniform", "lut"])
def test_zeros_have_scales_that_divide(codebook: str) -> None:
    weight = random_weight(8, 128)
    weight[:, :32] = 0
    weight[3] = 0
    result = in_groups(weight, 32, codebook)
    assert bool((result.output_scale > 0).all()) and bool(result.dequantize().isfinite().all())
    step = result.codebook.abs().min() * result.output_scale.max()
    assert bool((result.dequantize()[:, :32].abs() <= step + 1e-3).all())
    assert bool((in_groups(torch.zeros(4, 64), 32, codebook).dequantize().abs() < 1e-3).all())


def test_spread_repeats_scales_over_their_columns() -> None:
    assert torch.equal(spread(torch.tensor([2.0, 3.0]), 4), torch.tensor([[2.0], [3.0]]))
    groups = spread(torch.tensor([[1.0, 2.0]]), 6)
    assert torch.equal(groups, torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]]))
    assert torch.equal(
        group_scale(torch.tensor([[3.0, -4.0, 0.5, 0.25]]), "absmax", 2), torch.tensor([[4.0, 0.5]])
    )


@pytest.mark.parametrize("codebook", ["uniform", "lut"])
def test_gptq_keeps_the_groups_and_lowers_the_output_error(codebook: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(128, 128, generator=generator) * torch.logspace(0, -2, 128)[:, None]
    inputs = torch.randn(2048, 128, generator=generator) @ mixing
    weight = random_weight(48, 128)
    rounding = Rounding(WeightFormat(4, codebook, "group", 32), 0.0, 1, 1)
    result, damping = quantize_calibrated(weight, None, inputs_statistics(inputs), rounding, NAME)
    nearest = in_groups(weight, 32, codebook)

    def output_error(linear: QuantizedLinear) -> float:
        return float((inputs @ (linear.dequantize() - weight).T).norm())

    assert damping is not None and torch.equal(result.output_scale, nearest.output_scale)
    assert output_error(result) < 0.5 * output_error(nearest)


def test_rows_with_steps_are_rounded_as_each_row_alone_in_its_own_core() -> None:
    """The Hessian of row r's core is diag(s_r) H diag(s_r); H's diagonal grows faster than s falls, so that
    the order of the columns is the same."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(8, 8, generator=generator) + torch.eye(8)
    size = 3.0 ** torch.arange(8)
    hessian = (mixing @ mixing.T + torch.eye(8)) * size[:, None] * size
    step = (1 + torch.rand(16, 2, generator=generator)).repeat_interleave(4, 1)
    weight = 3 * torch.randn(16, 8, generator=generator)
    codebook = torch.arange(-8.0, 8.0)
    codes = gptq_codes(weight, codebook, hessian, step)
    after = descended(weight, codebook, hessian, codes, step)
    for row in range(16):
        own, core = step[row][:, None] * hessian * step[row], (weight[row] / step[row])[None]
        assert torch.equal(codes[row], gptq_codes(core, codebook, own)[0])
        assert torch.equal(after[row], descended(core, codebook, own, codes[row][None])[0])
    assert not torch.equal(codes.float() - 8, (weight / step).round().clamp(-8, 7))


@pytest.mark.parametrize("codebook", ["uniform", "lut"])
def test_a_file_returns_the_groups(codebook: str) -> None:
    linear = in_groups(random_weight(16, 128), 64, codebook)
    tensors = store(NAME, linear, bias=True)
    assert tensors[f"{NAME}.output_scales"].shape == (16, 2)
    back = load(NAME, tensors.__getitem__, tensors)
    for ours, theirs in ((back.codes, linear.codes), (back.output_scale, linear.output_scale)):
        assert torch.equal(ours, theirs)
    tensors[f"{NAME}.output_scales"] = torch.ones(16, 3)
    with pytest.raises(InputError, match=r"output_scales' must be \[16, 1\]"):
        load(NAME, tensors.__getitem__, tensors)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_checkpoint_in_groups(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], rounding: str
) -> None:
    made = quantize_model(tiny_qwen2, "w4-nearest", scales="group", codebook="uniform", rounding=rounding)
    checkpoint = open_quantized(made.folder)
    stored = load_file(made.folder / "model.safetensors")
    for layer in range(checkpoint.spec.num_layers):
        for name, linear in load_layer(checkpoint, layer).linears.items():
            full = f"model.layers.{layer}.{name}"
            chosen = made.chosen[full]
            assert linear.output_scale.shape == (linear.codes.shape[0], linear.codes.shape[1] // 32)
            assert torch.equal(linear.codes, chosen.codes)
            assert torch.equal(stored[f"{full}.weight"], chosen.dequantize().half())


def test_what_groups_do_not_go_with() -> None:
    for key, value in (("tune", 5), ("fold_input_scales", True), ("premultiply_scales", True)):
        with pytest.raises(UsageError):
            load_recipe("w4-nearest", {"scales": "group", key: value})
