"""One float weight becomes one QuantizedLinear."""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.quantization.codebook import best_uniform_step, lloyd_max, uniform_codebook
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.rounding import ROUNDINGS
from anequant.quantization.scales import balanced_scales, float16_scales, output_scale, tensor_scale

BIAS_BOUND = 65504.0 / 2
LARGEST_FLOAT16 = 65504.0


def quantize_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    codebook: str,
    scales: str,
    rounding: str,
    name: str,
) -> QuantizedLinear:
    """Quantize weight [out, in] (float32) with one codebook, as the recipe's words say.

    The uniform codebook with one scale per tensor or row uses absmax / (2**(bits-1) - 1), the published
    meaning of `w_int4_per_tensor`; with balanced scales its step is found by a line search. The lut
    codebook divides by root mean squares and fits the rest.

    Raises UnsupportedError, naming the tensor, when a weight or bias does not fit float16.
    """
    _check_range(weight, name)
    if bias is not None:
        _check_range(bias, name)
        bias = bias.half().float()
    rows, columns = _fit_scales(weight, codebook, scales, bits)
    if codebook == "uniform" and scales == "balanced":
        core = weight / rows[:, None] / columns
        rows = rows * best_uniform_step(core, bits)
    rows, columns = float16_scales(rows, columns)
    core = (weight / rows[:, None]).div_(columns)
    entries = uniform_codebook(bits) if codebook == "uniform" else lloyd_max(core, bits)
    codes = ROUNDINGS[rounding](core, entries)
    return _bound_bias(QuantizedLinear(codes, entries, columns, rows, bias), name)


def _fit_scales(weight: Tensor, codebook: str, scales: str, bits: int) -> tuple[Tensor, Tensor]:
    if scales == "balanced":
        return balanced_scales(weight)
    fit = tensor_scale if scales == "tensor" else output_scale
    ones = torch.ones(weight.shape[1])
    if codebook == "uniform":
        return fit(weight, "absmax") / (2 ** (bits - 1) - 1), ones
    return fit(weight, "rms"), ones


def _bound_bias(quantized: QuantizedLinear, name: str) -> QuantizedLinear:
    """Keep |bias / output_scale| inside float16 by moving a power of two from codebook to scale.

    Powers of two are exact in float16, so the dequantized weight does not change.
    """
    if quantized.bias is None:
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
