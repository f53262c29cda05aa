"""Convolutions of integers: inputs and weight are both integers, each with its scale.

    conv(dequantize(q, s), t * w) = s * t * conv(q, w)

A machine that multiplies integers adds up whole numbers and scales once: the float16 values of
dequantize(q, s), and their rounding, never exist there. So such a convolution is computed on q and w. Its
sums are exact: a product of two 8-bit integers is below 2^16, and float32 holds every whole number up to
2^24, so 256 products at a time are added in float32, and the parts in float64.

Only what has no zero point and no offset, one scale for the inputs, and one for the weight or for each of
its output channels, is such a convolution. Any other is computed as it is written, on the float16 values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anequant.targets.coreml.interpreter.constant_store import Constant, Constants
from anequant.targets.coreml.interpreter.operators import conv

INTEGERS = ("int8", "uint8", "int4", "uint4")
EXACT_PRODUCTS = 256


def integer_conv(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, **form: Any
) -> Tensor:
    """Compute `conv` of x_scale * x and weight_scale * weight; x and weight are integers as float32."""
    by_channel = (-1, *[1] * (x.ndim - 2))
    result = _sums(x, weight, form) * (x_scale.double() * weight_scale.double().reshape(by_channel))
    if bias is not None:
        result = result + bias.reshape(by_channel)
    return result.float()


def find_integer_operands(
    operation: Any, producers: Mapping[str, Any], known: Mapping[str, Constant], constants: Constants
) -> tuple[Any, dict[str, Constant]] | None:
    """Find what stands in for the `x` and `weight` of a MIL operation, if it is a convolution of integers.

    The binding of the codes that are its x, and x_scale, weight and weight_scale. `producers` are a block's
    operations by output, `known` its constants by name.
    """
    if operation.type != "conv":
        return None
    rounded = producers.get(operation.inputs["x"].arguments[0].name)
    weight = constants.find_bound(operation.inputs["weight"].arguments[0], known)
    if rounded is None or rounded.type != "dequantize" or weight is None or not _is_integer(weight):
        return None
    scale = constants.find_bound(rounded.inputs["scale"].arguments[0], known)
    if scale is None or scale.spec.shape or "zero_point" in rounded.inputs:
        return None
    parts = {"x_scale": scale, "weight": weight.parts["data"], "weight_scale": weight.parts["scale"]}
    return rounded.inputs["input"].arguments[0], parts


def skip_rounding(binding: Any, producers: Mapping[str, Any]) -> Any:
    """Return the binding of what a dequantized value was before it was quantized; any other as it is."""
    dequantize = producers.get(binding.name)
    if dequantize is None or dequantize.type != "dequantize":
        return binding
    codes = dequantize.inputs["input"].arguments[0]
    quantize = producers.get(codes.name)
    if quantize is None or quantize.type != "quantize":
        return binding
    return skip_rounding(quantize.inputs["input"].arguments[0], producers)


def _is_integer(weight: Constant) -> bool:
    """Tell whether a weight is integers times one scale, or one for each output channel."""
    if weight.kind != "constexpr_blockwise_shift_scale" or "offset" in weight.parts:
        return False
    rows, *others = weight.parts["scale"].spec.shape
    fits = rows in (1, weight.spec.shape[0]) and all(size == 1 for size in others)
    return fits and weight.parts["data"].spec.dtype in INTEGERS


def _sums(x: Tensor, weight: Tensor, form: Mapping[str, Any]) -> Tensor:
    """Compute the convolution itself, in float64."""
    channels = EXACT_PRODUCTS // math.prod(weight.shape[2:])
    if form.get("groups", 1) > 1 or not channels:
        sums: Tensor = conv(x.double(), weight.double(), **form)
        return sums
    pairs = zip(torch.split(x, channels, 1), torch.split(weight, channels, 1), strict=True)
    return sum((conv(part, columns, **form).double() for part, columns in pairs), torch.zeros(()))
