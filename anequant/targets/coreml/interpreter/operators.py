"""One torch function per MIL operation: the table OPERATORS.

A function's parameters are the operation's inputs, under their MIL names; an input that is not a parameter
is not supported. The annotations say what arrives: `Tensor` a tensor, `list[Tensor]` a variadic input,
`Tensor | Palettized` a table that may still be codes, `Literal[...]` one of the values that are supported,
anything else plain Python values; `takes` spreads a dataclass over its fields. The operations of COMPUTING,
here, see their fp16 tensors as float32; those of MOVING, in movement.py, see what is stored. The caller casts
results to their declared type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.targets.coreml.interpreter.movement import MOVING, Operator, takes
from anequant.targets.coreml.storage import TORCH_TYPES

COMPUTING: dict[str, Operator] = {}


def computes(function: Operator) -> Operator:
    COMPUTING[function.__name__] = function
    return function


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda x, y: function(x, y)


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "cos": torch.cos,
    "exp": torch.exp,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}
COMPUTING.update({name: _unary(function) for name, function in _UNARY.items()})
COMPUTING.update({name: _binary(function) for name, function in _BINARY.items()})


@computes
def real_div(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise UnsupportedError("real_div of integers")
    return x / y


@computes
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@computes
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@computes
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


@computes
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@computes
def gelu(
    x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT"
) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@computes
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


@computes
def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    dims = _dims(axes, x.ndim)
    shape = [size if dim in dims else 1 for dim, size in enumerate(x.shape)]
    centred = x - x.mean(dims, keepdim=True)
    result = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + epsilon)
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@computes
def reduce_sum(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.sum(_dims(axes, x.ndim), keepdim=keep_dims)


@computes
def reduce_mean(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.mean(_dims(axes, x.ndim), keepdim=keep_dims)


@computes
def reduce_max(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.amax(_dims(axes, x.ndim), keepdim=keep_dims)


@computes
def reduce_min(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return x.amin(_dims(axes, x.ndim), keepdim=keep_dims)


@computes
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmax(axis, keepdim=keep_dims).to(TORCH_TYPES[output_dtype])


def _dims(axes: list[int] | None, rank: int) -> list[int]:
    return list(range(rank)) if axes is None else [axis % rank for axis in axes]


@computes
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


@computes
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input, by spatial axis; `pad` has two ends for each."""

    strides: list[int] | None = None
    pad_type: Literal["valid", "custom"] = "valid"
    pad: list[int] | None = None
    dilations: list[int] | None = None
    groups: int = 1


@computes
@takes(Window)
def conv(x: Tensor, weight: Tensor, window: Window, bias: Tensor | None = None) -> Tensor:
    """Convolve x (N, I, *spatial) with weight (O, I / groups, *kernel); one to three spatial axes."""
    rank, pad = x.ndim - 2, window.pad
    strides = window.strides or [1] * rank
    if pad and any(pad):
        if window.pad_type != "custom":
            raise UnsupportedError(f"conv with pad {pad} and pad_type '{window.pad_type}'")
        x = F.pad(x, [n for i in reversed(range(rank)) for n in pad[2 * i : 2 * i + 2]])
    if window.groups == 1 and set(strides) == {1} and math.prod(weight.shape[2:]) == 1:
        product = torch.matmul(weight.flatten(1), x.flatten(2))
        if bias is not None:
            product += bias[:, None]
        return product.reshape(x.shape[0], -1, *x.shape[2:])
    general = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return general(x, weight, bias, strides, 0, window.dilations or [1] * rank, window.groups)


@computes
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: Literal["int8", "uint8"],
    zero_point: Tensor | None = None,
    axis: int = 0,
) -> Tensor:
    """Return clip(round(input / scale) + zero_point), ties to even, as coremltools' own evaluation."""
    codes = torch.round(input / _along(scale, axis, input.ndim))
    if zero_point is not None:
        codes = codes + _along(zero_point, axis, input.ndim)
    ends = torch.iinfo(TORCH_TYPES[output_dtype])
    return codes.clamp(ends.min, ends.max)


@computes
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = 0) -> Tensor:
    """Return scale * (input - zero_point)."""
    values = input if zero_point is None else input - _along(zero_point, axis, input.ndim)
    return values * _along(scale, axis, input.ndim)


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """Return a scalar as it is; a vector with its entries along `axis` of `rank` axes."""
    return vector if vector.ndim == 0 else vector.reshape([-1] + [1] * (rank - 1 - axis % rank))


@computes
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return scale * (data - offset), one scale a block of data; the blocks divide every axis evenly."""
    blocks = [n for size, count in zip(data.shape, scale.shape, strict=True) for n in (count, size // count)]
    each = [n for count in scale.shape for n in (count, 1)]
    values = data.reshape(blocks).float()
    if offset is not None:
        values = values - offset.reshape(each)
    return (values * scale.reshape(each)).reshape(data.shape)


OPERATORS: dict[str, Operator] = {**COMPUTING, **MOVING}
