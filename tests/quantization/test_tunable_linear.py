"""TunableLinear against torch's own differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.tunable_linear import TunableLinear, start_tuning
from anequant.quantization.weight_format import WeightFormat


def linear(scales: str = "balanced", codebook: str = "lut", bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator) * (torch.rand(20, generator=generator) + 0.3)
    values = torch.randn(12, generator=generator) if bias else None
    return quantize_linear(weight, values, WeightFormat(4, codebook, scales), "p")


def moved(training: TunableLinear, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in training.parameters:
            leaf += size * torch.randn(leaf.shape, generator=generator)


@pytest.mark.parametrize("scales", ["tensor", "output", "balanced"])
def test_gradients_are_those_of_autograd(scales: str) -> None:
    training = start_tuning(linear(scales))
    moved(training)
    inputs = torch.randn(7, 20, generator=torch.Generator().manual_seed(2))

    leaves = [leaf.detach().double().requires_grad_() for leaf in training.parameters]
    codebook, log_output = leaves[:2]
    log_input = leaves[2] if training.log_input_scale is not None else torch.zeros(20).double()
    weight = log_output.exp()[:, None] * codebook[training.codes.long()] * log_input.exp()
    weight.retain_grad()
    outputs = inputs.double() @ weight.T + leaves[-1]
    (outputs**3).sum().backward()

    assert weight.grad is not None
    training.set_gradients(weight.grad.float(), leaves[-1].grad.float())  # type: ignore[union-attr]
    for ours, expected in zip(training.parameters, leaves, strict=True):
        assert ours.grad is not None and expected.grad is not None
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-4, atol=1e-5 * scale)


def test_input_scales_of_one_stay() -> None:
    training = start_tuning(linear("output"))
    assert training.log_input_scale is None and len(training.parameters) == 3
    moved(training)
    assert bool((training.finish("p").input_scale == 1).all())


def test_nothing_moved_is_nothing_changed() -> None:
    start = linear()
    result = start_tuning(start).finish("p")
    assert torch.equal(result.codes, start.codes)
    assert torch.equal(result.dequantize(), start.dequantize())
    assert result.bias is not None and start.bias is not None and torch.equal(result.bias, start.bias)


def weight_of(training: TunableLinear) -> Tensor:
    return training.current().dequantize()


def test_finished_rounds_to_float16_and_sorts_the_codebook() -> None:
    training = start_tuning(linear())
    moved(training)
    with torch.no_grad():
        training.codebook[[3, 4]] = training.codebook[[4, 3]]
        training.codebook[9] = training.codebook[11] + 0.05
    before = weight_of(training)
    result = training.finish("p")
    assert bool((result.codebook.diff() > 0).all())
    for value in (result.codebook, result.output_scale, result.input_scale, result.bias):
        assert value is not None and torch.equal(value, value.half().float())
    assert not torch.equal(result.codes, training.codes)
    torch.testing.assert_close(result.dequantize(), before, rtol=1.01 * 3 * 2.0**-11, atol=1e-6)


def test_entries_that_met_are_kept_apart() -> None:
    training = start_tuning(linear())
    with torch.no_grad():
        training.codebook[10] = training.codebook[11]
    before = weight_of(training)
    result = training.finish("p")
    assert bool((result.codebook.diff() > 0).all())
    torch.testing.assert_close(result.dequantize(), before, rtol=2.0**-7, atol=1e-6)


def test_a_linear_without_bias_has_none_to_train() -> None:
    training = start_tuning(linear(bias=False))
    assert training.bias is None
    training.set_gradients(torch.ones(12, 20), None)
    assert all(leaf.grad is not None for leaf in training.parameters)
    assert training.finish("p").bias is None
