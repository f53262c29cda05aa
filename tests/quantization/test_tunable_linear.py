"""TunableLinear against torch's own differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anequant.quantization.codebook import find_nearest_codes
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.tunable_linear import START, TunableLinear, finish_tuning, start_tuning
from anequant.quantization.weight_format import WeightFormat

ROWS, COLUMNS = 12, 20


def make_weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, COLUMNS, generator=generator) * (torch.rand(COLUMNS, generator=generator) + 0.3)


def make_linear(scales: str = "balanced", codebook: str = "lut", bias: bool = True) -> QuantizedLinear:
    """The weight rounded to nearest, and some of its codes pushed to a neighbour, as feedback does."""
    values = torch.randn(ROWS, generator=torch.Generator().manual_seed(3)) if bias else None
    linear = quantize_linear(make_weight(), values, WeightFormat(4, codebook, scales), "p")
    linear.codes[:, ::3] = (linear.codes[:, ::3].int() + 1).clamp(0, 15).to(torch.uint8)
    return linear


def train(scales: str = "balanced", bias: bool = True) -> TunableLinear:
    return start_tuning(make_linear(scales, bias=bias), make_weight())


def list_leaves(training: TunableLinear) -> list[Tensor]:
    return [*training.leaves.values()]


def move(training: TunableLinear, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in list_leaves(training):
            leaf += size * torch.randn(leaf.shape, generator=generator)


@pytest.mark.parametrize("scales", ["tensor", "output", "balanced"])
@pytest.mark.parametrize("swapped", [False, True], ids=["ascending", "swapped"])
def test_gradients_are_those_of_autograd(scales: str, swapped: bool) -> None:
    """The latent value's is that of the entry it chose, which autograd finds by adding what is zero."""
    training = train(scales)
    move(training)
    if swapped:
        with torch.no_grad():
            training.codebook[[3, 4]] = training.codebook[[4, 3]]
    inputs = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(2))

    leaves = [leaf.detach().double().requires_grad_() for leaf in list_leaves(training)]
    latent, codebook, log_output = leaves[:3]
    log_input = leaves[3] if training.log_input_scale is not None else torch.zeros(COLUMNS).double()
    nearest = (latent.detach()[..., None] - codebook.detach()).abs().argmin(-1)
    weight = log_output.exp()[:, None] * (codebook[nearest] + latent - latent.detach()) * log_input.exp()
    weight.retain_grad()
    outputs = inputs.double() @ weight.T + leaves[-1]
    (outputs**3).sum().backward()

    assert weight.grad is not None and leaves[-1].grad is not None
    training.set_gradients(training.current(), weight.grad.float(), leaves[-1].grad.float())
    for ours, expected in zip(list_leaves(training), leaves, strict=True):
        assert ours.grad is not None and expected.grad is not None
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-4, atol=1e-5 * scale)


def test_training_starts_where_rounding_ended() -> None:
    """No code differs, though a third of them is not the nearest to its weight; latent values are on the way
    to the weight, and none leaves its cell."""
    linear, weight = make_linear(), make_weight()
    training = start_tuning(linear, weight)
    core = weight / linear.output_scale[:, None] / linear.input_scale
    assert not torch.equal(find_nearest_codes(core, linear.codebook), linear.codes)
    assert torch.equal(training.current().codes, linear.codes)
    torch.testing.assert_close(training.current().dequantize(), linear.dequantize(), rtol=1e-6, atol=0)
    entries = linear.codebook[linear.codes.int()]
    inside = find_nearest_codes(core, linear.codebook) == linear.codes
    torch.testing.assert_close(training.latent[inside], torch.lerp(entries, core, START)[inside])
    moved = (training.latent - entries)[~inside]
    assert bool((moved.sign() == (core - entries)[~inside].sign()).all())


def test_a_latent_value_that_passes_the_middle_changes_the_code() -> None:
    training = train()
    codebook, codes = training.codebook.detach(), training.current().codes
    middle = (codebook[5] + codebook[6]) / 2
    with torch.no_grad():
        training.latent[0, 0], training.latent[0, 1] = middle - 1e-4, middle + 1e-4
    assert training.current().codes[0, :2].tolist() == [5, 6]
    assert torch.equal(training.current().codes[1:], codes[1:])


def test_input_scales_of_one_stay() -> None:
    training = train("output")
    assert training.log_input_scale is None and len(training.leaves) == 4
    move(training)
    assert bool((finish_tuning(training.current(), "p").input_scale == 1).all())


def test_nothing_moved_is_nothing_changed() -> None:
    start = make_linear()
    result = finish_tuning(start_tuning(start, make_weight()).current(), "p")
    assert torch.equal(result.codes, start.codes)
    assert torch.equal(result.dequantize(), start.dequantize())
    assert result.bias is not None and start.bias is not None and torch.equal(result.bias, start.bias)


def test_finished_rounds_to_float16_and_sorts_the_codebook() -> None:
    training = train()
    move(training)
    with torch.no_grad():
        training.codebook[[3, 4]] = training.codebook[[4, 3]]
        training.codebook[9] = training.codebook[11] + 0.05
    before = training.current().dequantize()
    result = finish_tuning(training.current(), "p")
    assert bool((result.codebook.diff() > 0).all())
    for value in (result.codebook, result.output_scale, result.input_scale, result.bias):
        assert value is not None and torch.equal(value, value.half().float())
    torch.testing.assert_close(result.dequantize(), before, rtol=1.01 * 3 * 2.0**-11, atol=1e-6)


def test_entries_that_met_are_kept_apart() -> None:
    training = train()
    with torch.no_grad():
        training.codebook[10] = training.codebook[11]
    before = training.current().dequantize()
    result = finish_tuning(training.current(), "p")
    assert bool((result.codebook.diff() > 0).all())
    torch.testing.assert_close(result.dequantize(), before, rtol=2.0**-7, atol=1e-6)


def test_a_linear_without_bias_has_none_to_train() -> None:
    training = train(bias=False)
    assert training.bias is None
    training.set_gradients(training.current(), torch.ones(ROWS, COLUMNS), None)
    assert all(leaf.grad is not None for leaf in list_leaves(training))
    assert finish_tuning(training.current(), "p").bias is None
