"""One float weight becomes one QuantizedLinear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.quantization.codebook import (
    find_nearest_codes,
    find_uniform_step,
    lloyd_max,
    make_uniform_codebook,
)
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.scales import (
    balance_scales,
    group_scale,
    output_scale,
    round_scales,
    spread,
    tensor_scale,
)
from anequant.quantization.weight_format import WeightFormat

LARGEST_FLOAT16 = 65504.0
BIAS_BOUND = LARGEST_FLOAT16 / 2


@dataclass(frozen=True)
class FittedCore:
    """Everything of a QuantizedLinear except its codes: codebook [K], input_scale [in], output_scale [out]
    or [out, groups].

    The scales are numbers float16 holds exactly.
    """

    codebook: Tensor
    input_scale: Tensor
    output_scale: Tensor

    def core(self, weight: Tensor) -> Tensor:
        """Return weight [out, in] divided by both scales."""
        return divide_by_scales(weight, self.output_scale, self.input_scale)

    @property
    def step(self) -> Tensor:
        """What multiplies each entry: [out, in]."""
        return spread(self.output_scale, len(self.input_scale)) * self.input_scale

    def rows(self, rows: slice) -> FittedCore:
        return FittedCore(self.codebook, self.input_scale, self.output_scale[rows])

    def linear(self, codes: Tensor, bias: Tensor | None) -> QuantizedLinear:
        return QuantizedLinear(codes, self.codebook, self.input_scale, self.output_scale, bias)


def quantize_linear(
    weight: Tensor,
    bias: Tensor | None,
    format_: WeightFormat,
    name: str,
    input_scale: Tensor | None = None,
) -> QuantizedLinear:
    """Round weight [out, in] (float32) to the nearest entries, with codebook and scales as `fit_core`.

    Raises UnsupportedError, naming the tensor, when a weight or bias does not fit float16.
    """
    bias = round_bias(bias, name)
    fitted = fit_core(weight, format_, name, input_scale)
    codes = find_nearest_codes(fitted.core(weight), fitted.codebook)
    return bound_bias(fitted.linear(codes, bias), name)


def fit_core(
    weight: Tensor, format_: WeightFormat, name: str, input_scale: Tensor | None = None
) -> FittedCore:
    """Fit codebook and scales to weight [out, in].

    The uniform codebook with one scale per tensor, row or group of `group` columns uses
    absmax / (2**(bits-1) - 1), the published meaning of `w_int4_per_tensor`; with balanced scales its step
    is found by a line search. The lut codebook divides by root mean squares and fits the rest.
    `input_scale` [in] fixes that vector; the output scales are then fitted to what it leaves.

    Raises UnsupportedError, naming the tensor, when a weight does not fit float16.
    """
    _check_range(weight, name)
    if input_scale is None:
        rows, columns = _fit_scales(weight, format_)
    else:
        rows, columns = output_scale(weight / input_scale, "rms"), input_scale
    if format_.codebook == "uniform" and format_.scales == "balanced":
        rows = rows * find_uniform_step(divide_by_scales(weight, rows, columns), format_.bits)
    rows, columns = round_scales(rows, columns)
    if format_.codebook == "uniform":
        return FittedCore(make_uniform_codebook(format_.bits), columns, rows)
    return FittedCore(lloyd_max(divide_by_scales(weight, rows, columns), format_.bits), columns, rows)


def divide_by_scales(weight: Tensor, output_scale: Tensor, input_scale: Tensor) -> Tensor:
    """Return weight [out, in] divided by its output scales [out] or [out, groups] and input scales [in]."""
    return (weight / spread(output_scale, weight.shape[1])).div_(input_scale)


def round_bias(bias: Tensor | None, name: str) -> Tensor | None:
    """Round the bias to what float16 holds, in float32; raises UnsupportedError when it does not fit."""
    if bias is None:
        return None
    _check_range(bias, name)
    return bias.half().float()


def _fit_scales(weight: Tensor, format_: WeightFormat) -> tuple[Tensor, Tensor]:
    uniform = format_.codebook == "uniform"
    if format_.scales == "balanced":
        return balance_scales(weight)
    measure = "absmax" if uniform else "rms"
    if format_.scales == "group":
        rows = group_scale(weight, measure, format_.group)
    else:
        rows = (tensor_scale if format_.scales == "tensor" else output_scale)(weight, measure)
    return rows / (2 ** (format_.bits - 1) - 1 if uniform else 1), torch.ones(weight.shape[1])


def bound_bias(quantized: QuantizedLinear, name: str) -> QuantizedLinear:
    """Keep |bias / output_scale| inside float16 by moving a power of two from codebook to scale.

    Powers of two are exact in float16, so the dequantized weight does not change. A bias beside scales of
    groups is not divided by them.
    """
    if quantized.bias is None or quantized.output_scale.ndim == 2:
        return quantized
    largest = float((quantized.bias / quantized.output_scale).abs().max())
    if largest < BIAS_BOUND:
        return quantized
    factor = 2.0 ** torch.tensor(largest / BIAS_BOUND).log2().ceil().item()
    codebook, scale = quantized.codebook / factor, quantized.output_scale * factor
    if not torch.equal(codebook, codebook.half().float()) or float(scale.max()) > LARGEST_FLOAT16:
        raise UnsupportedError(
            f"the bias of '{name}' is {largest:.3g} times its output scale, float16 cannot hold both",
            remedy="keep this model in float16, or scale its residual stream down first",
        )
    return QuantizedLinear(quantized.codes, codebook, quantized.input_scale, scale, quantized.bias)


def _check_range(values: Tensor, name: str) -> None:
    largest = max(abs(float(end)) for end in values.aminmax())
    if not largest <= LARGEST_FLOAT16:
        raise UnsupportedError(
            f"'{name}' holds {largest:.3g} after folding, more than float16 can (65504)",
            remedy="check the checkpoint for a damaged tensor",
        )
