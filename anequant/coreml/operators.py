"""One torch function per MIL operation: the table OPERATORS.

A function's parameters are the operation's inputs, under their MIL names; an input that is not a parameter
is not supported. The annotations say what arrives: `Tensor` a tensor, `list[Tensor]` a variadic input,
`Tensor | Palettized` a table that may still be codes, `Literal[...]` one of the values that are supported,
anything else plain Python numbers. Operations in COMPUTING see their fp16 tensors as float32; the others
only move data and see what is stored. The caller casts every result to the output's declared type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anequant.coreml.storage import TORCH_TYPES, Palettized
from anequant.errors import UnsupportedError

Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}
COMPUTING: set[str] = set()


def computes(function: Operator) -> Operator:
    COMPUTING.add(function.__name__)
    return moves(function)


def moves(function: Operator) -> Operator:
    OPERATORS[function.__name__] = function
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
OPERATORS.update({name: _unary(function) for name, function in _UNARY.items()})
OPERATORS.update({name: _binary(function) for name, function in _BINARY.items()})
COMPUTING.update(_UNARY, _BINARY)


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


@computes
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: Literal["valid", "custom"] = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """x (N, I, *spatial), weight (O, I / groups, *kernel); one to three spatial axes."""
    rank = x.ndim - 2
    strides = strides or [1] * rank
    if pad and any(pad):
        if pad_type != "custom":
            raise UnsupportedError(f"conv with pad {pad} and pad_type '{pad_type}'")
        x = F.pad(x, [n for i in reversed(range(rank)) for n in pad[2 * i : 2 * i + 2]])
    if groups == 1 and set(strides) == {1} and math.prod(weight.shape[2:]) == 1:
        product = torch.matmul(weight.flatten(1), x.flatten(2))
        if bias is not None:
            product += bias[:, None]
        return product.reshape(x.shape[0], -1, *x.shape[2:])
    general = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return general(x, weight, bias, strides, 0, dilations or [1] * rank, groups)


@moves
def identity(x: Tensor) -> Tensor:
    return x


@moves
def cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(TORCH_TYPES[dtype])


@moves
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@moves
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@moves
def fill(shape: list[int], value: float = 0.0) -> Tensor:
    return torch.full(shape, value)


@moves
def range_1d(end: float, start: float, step: float) -> Tensor:
    return torch.arange(start, end, step)


@moves
def concat(values: list[Tensor], axis: int, interleave: Literal[False] = False) -> Tensor:
    return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values], axis)


@moves
def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


@moves
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    return x.split(split_sizes or x.shape[axis] // (num_splits or 1), axis)


@moves
def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.tile(reps)


@moves
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """A 0 in `shape` copies the size of x's axis counted from the right; -1 is whatever remains."""
    sizes = [1] * max(len(shape) - x.ndim, 0) + list(x.shape)
    return x.reshape([size or sizes[i - len(shape)] for i, size in enumerate(shape)])


@moves
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@moves
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@moves
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze(_dims(axes, x.ndim))


@moves
def gather(
    x: Tensor | Palettized,
    indices: Tensor,
    axis: int = 0,
    batch_dims: Literal[0] = 0,
    validate_indices: bool = False,
) -> Tensor:
    """Negative indices count from the end; any other index outside of x is an IndexError."""
    if isinstance(x, Palettized) and (axis != 0 or x.codebook.shape[-1] > 1):
        x = x.dense()
    table = x.codes if isinstance(x, Palettized) else x
    axis %= table.ndim
    index = indices.long().flatten()
    index = torch.where(index < 0, index + table.shape[axis], index)
    rows = x.rows(index).dense() if isinstance(x, Palettized) else x.index_select(axis, index)
    return rows.reshape(*table.shape[:axis], *indices.shape, *table.shape[axis + 1 :])


@moves
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """A size of -1 reaches to the end of its axis."""
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@moves
def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    return x[_slices(begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@moves
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """Writes into x itself: whoever still needs the old x passes a copy."""
    target = x[_slices(begin, end, stride, begin_mask, end_mask, squeeze_mask)]
    if target.shape != update.shape:
        raise IndexError(f"the slice is {tuple(target.shape)}, the update {tuple(update.shape)}")
    target.copy_(update)
    return x


def _slices(
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> tuple[int | slice, ...]:
    rank = len(begin)
    steps = stride or [1] * rank
    if min(steps) < 1:
        raise UnsupportedError(f"a slice with stride {steps}")
    no = [False] * rank
    open_begin, open_end, single = begin_mask or no, end_mask or no, squeeze_mask or no
    return tuple(
        (0 if open_begin[i] else begin[i])
        if single[i]
        else slice(None if open_begin[i] else begin[i], None if open_end[i] else end[i], steps[i])
        for i in range(rank)
    )


@moves
def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, vector_axis: int = 0) -> Palettized:
    return Palettized(indices, lut, vector_axis)


@computes
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), one scale for each block of data; the blocks divide every axis evenly."""
    blocks = [n for size, count in zip(data.shape, scale.shape, strict=True) for n in (count, size // count)]
    each = [n for count in scale.shape for n in (count, 1)]
    values = data.reshape(blocks).float()
    if offset is not None:
        values = values - offset.reshape(each)
    return (values * scale.reshape(each)).reshape(data.shape)
