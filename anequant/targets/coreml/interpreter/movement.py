"""MIL operations that only move data: they see tensors as stored, and return views where they can.

Everything said in operators.py holds: parameters are inputs under their MIL names, annotations say what
arrives.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.targets.coreml.storage import TORCH_TYPES, Palettized

Operator = Callable[..., Any]
MOVING: dict[str, Operator] = {}


def moves(function: Operator) -> Operator:
    MOVING[function.__name__] = function
    return function


def takes(group: type) -> Callable[[Operator], Operator]:
    """Have an operation take the fields of a dataclass, which is one of its parameters, as inputs of their
    own."""
    fields = inspect.signature(group).parameters

    def decorate(function: Operator) -> Operator:
        hints = typing.get_type_hints(function)
        given = inspect.signature(function).parameters.values()
        whole = next(name for name, hint in hints.items() if hint is group)

        @functools.wraps(function)
        def operate(*values: Any, **inputs: Any) -> Any:
            own = {name: inputs.pop(name) for name in fields if name in inputs}
            return function(*values, **inputs, **{whole: group(**own)})

        apart = [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in fields.values()]
        signature = inspect.Signature([*(one for one in given if one.name != whole), *apart])
        vars(operate)["__signature__"] = signature
        operate.__annotations__ = {**hints, **typing.get_type_hints(group)}
        return operate

    return decorate


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
    return torch.split(x, split_sizes or x.shape[axis] // (num_splits or 1), axis)


@moves
def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.tile(reps)


@moves
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """Reshape x: a 0 in `shape` copies the size of x's axis counted from the right; -1 is what remains."""
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
    return x.squeeze() if axes is None else x.squeeze(axes)


@moves
def gather(
    x: Tensor | Palettized,
    indices: Tensor,
    axis: int = 0,
    batch_dims: Literal[0] = 0,
    validate_indices: bool = False,
) -> Tensor:
    """Take rows: negative indices count from the end; any other index outside of x is an IndexError."""
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
    """Take a slice: a size of -1 reaches to the end of its axis."""
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@dataclass(frozen=True)
class Slices:
    """Where a slice lies: `begin`, `end` and `stride` for each axis. Masks say from or to where it is open,
    and which axes are a single index."""

    begin: list[int]
    end: list[int]
    stride: list[int] | None = None
    begin_mask: list[bool] | None = None
    end_mask: list[bool] | None = None
    squeeze_mask: list[bool] | None = None

    def index(self) -> tuple[int | slice, ...]:
        """Return what indexes a tensor so; raises UnsupportedError for a stride below one."""
        rank = len(self.begin)
        steps = self.stride or [1] * rank
        if min(steps) < 1:
            raise UnsupportedError(f"a slice with stride {steps}")
        no = [False] * rank
        open_begin, open_end, single = self.begin_mask or no, self.end_mask or no, self.squeeze_mask or no
        starts = [None if open_begin[i] else self.begin[i] for i in range(rank)]
        return tuple(
            (starts[i] or 0)
            if single[i]
            else slice(starts[i], None if open_end[i] else self.end[i], steps[i])
            for i in range(rank)
        )


@moves
@takes(Slices)
def slice_by_index(x: Tensor, place: Slices) -> Tensor:
    return x[place.index()]


@moves
@takes(Slices)
def slice_update(x: Tensor, update: Tensor, place: Slices) -> Tensor:
    """Write into x itself: whoever still needs the old x passes a copy."""
    target = x[place.index()]
    if target.shape != update.shape:
        raise IndexError(f"the slice is {tuple(target.shape)}, the update {tuple(update.shape)}")
    target.copy_(update)
    return x


@moves
def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, vector_axis: int = 0) -> Palettized:
    return Palettized(indices, lut, vector_axis)
