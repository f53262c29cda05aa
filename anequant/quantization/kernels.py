"""The inner loops of rounding, compiled: one column after the other of a block, all rows at once. A loop over
rows does one thing to one array, so that the compiler makes vectors of it.

Matrices are transposed, [columns, rows], so that the values of a column lie side by side. Rows of two tiles
do not depend on each other, so threads take tiles, and results are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

Kernel = Callable[..., None]

inline_kernel: Callable[[Callable[..., T]], Callable[..., T]] = numba.njit(inline="always")


def compile_kernel(kernel: Kernel) -> Kernel:
    """Compile the kernel to machine code, which later runs find again where numba has a folder to keep it in.

    Of what fastmath allows, only that a product and a sum are rounded once.
    """
    machine: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(kernel)
    with suppress(RuntimeError):  # numba's word for folders that cannot be written to; see `cache_folder`
        machine.enable_caching()
    return cast(Kernel, machine)


TILE = 256
"""Rows that are taken together."""
MOST_COUNTED = 31
"""Up to so many boundaries, comparing with all of them is faster than a search."""


def count_tiles(rows: int) -> int:
    """Return the tiles that so many rows take."""
    return -(-rows // TILE)


class Block(NamedTuple):
    """A block of columns while it is rounded; torch's tensors outside of the kernels, numpy's arrays inside.

    target    float32 [b, rows]  what codebook entries times `step` are to meet
    step      float32 [b, rows]
    codebook  float32 [K]        ascending
    codes     uint8 [b, rows]    overwritten with the entries that were chosen
    error     float32 [b, rows]  overwritten with target minus what the codes stand for

    All are contiguous.
    """

    target: Any
    step: Any
    codebook: Any
    codes: Any
    error: Any


def feed_back(wanted: Tensor, unit: Tensor, block: Block) -> None:
    """Round the columns of a block from the last to the first, each with the errors of those after it.

    wanted  float32 [b, rows]  target plus the feedback from beyond the block
    unit    float32 [b, b]     unit upper triangular: what a column takes of the errors of those after it
    """
    _run(_feed_back, wanted, unit, block)


def descend(pull: Tensor, hessian: Tensor, block: Block) -> None:
    """Give the columns of a block from the first to the last the entries that are best while all others stay.

    pull     float32 [b, rows]  Hessian times error
    hessian  float32 [b, b]     of the block's columns

    Codes and error of the block are those of before, and overwritten with those of after.
    """
    _run(_descend, pull, hessian, block)


def descend_coupled(pull: Tensor, hessian: Tensor, coupling: Tensor, block: Block) -> None:
    """Do what `descend` does where the errors of rows of a tile count together: one row after the other.

    coupling  float32 [tiles, TILE, TILE]  symmetric, positive on the diagonal of every row that there is
    """
    _run(_descend_coupled, pull, hessian, block, coupling.numpy())


def _run(kernel: Kernel, values: Tensor, matrix: Tensor, block: Block, *more: Any) -> None:
    """Run the kernel on all rows."""
    arrays = Block(*(part.numpy() for part in block))
    given = values.numpy(), matrix.numpy(), arrays, find_boundaries(arrays.codebook), *more
    run_on_threads(lambda begin, end: kernel(begin, end, *given), arrays.error.shape[1])


def find_boundaries(codebook: Any) -> Any:
    """Return the values at which one entry of codebook [K], ascending, is as near as the next: [K - 1]."""
    return (codebook[1:] + codebook[:-1]) / 2


def run_on_threads(run: Callable[[int, int], T], size: int) -> list[T]:
    """Call run(begin, end) for every share of 0 to `size`, in whole tiles, on as many threads as torch
    uses."""
    threads = torch.get_num_threads()
    share = -(-size // (threads * TILE)) * TILE
    if share >= size:
        return [run(0, size)]
    starts = range(0, size, share)
    return list(_pool(threads).map(lambda start: run(start, min(size, start + share)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@inline_kernel
def find_nearest(values: Any, count: int, boundaries: Any, codes: Any) -> None:
    """Set each code to the number of boundaries below its value, the index of the nearest entry."""
    if len(boundaries) <= MOST_COUNTED:
        for row in range(count):
            codes[row] = 0
        for boundary in boundaries:
            for row in range(count):
                codes[row] += values[row] > boundary
    else:
        for row in range(count):
            codes[row] = np.searchsorted(boundaries, values[row])


@inline_kernel
def find_entry(value: Any, boundaries: Any) -> int:
    """Return the index of the nearest entry of one value."""
    if len(boundaries) <= MOST_COUNTED:
        code = 0
        for boundary in boundaries:
            code += value > boundary
        return code
    return int(np.searchsorted(boundaries, value))


@inline_kernel
def subtract_rounded(values: Any, count: int, target: Any, step: Any, codebook: Any, chosen: Any) -> None:
    """Set values to target - step * codebook[chosen]."""
    for row in range(count):
        values[row] = codebook[chosen[row]]
    for row in range(count):
        values[row] = target[row] - values[row] * step[row]


@inline_kernel
def add_up(values: Any, count: int, shares: Any, rows: Any, begin: int, end: int) -> None:
    """Add shares[begin:end] @ rows[begin:end] to values, four rows at once, to load and store each value
    less."""
    at = begin
    while at + 4 <= end:
        one, two, three, four = shares[at], shares[at + 1], shares[at + 2], shares[at + 3]
        for row in range(count):
            values[row] += (one * rows[at, row] + two * rows[at + 1, row]) + (
                three * rows[at + 2, row] + four * rows[at + 3, row]
            )
        at += 4
    for last in range(at, end):
        share = shares[last]
        for row in range(count):
            values[row] += share * rows[last, row]


@compile_kernel
def _feed_back(begin: int, end: int, wanted: Any, unit: Any, block: Block, boundaries: Any) -> None:
    target, step, codebook, codes, error = block
    columns = len(wanted)
    for start in range(begin, end, TILE):
        count = min(TILE, end - start)
        value, chosen = np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
        errors = np.empty((columns, TILE), np.float32)
        for column in range(columns - 1, -1, -1):
            for row in range(count):
                value[row] = wanted[column, start + row]
            add_up(value, count, unit[column], errors, column + 1, columns)
            for row in range(count):
                value[row] /= step[column, start + row]
            find_nearest(value, count, boundaries, chosen)
            subtract_rounded(value, count, target[column, start:], step[column, start:], codebook, chosen)
            for row in range(count):
                errors[column, row] = value[row]
            for row in range(count):
                error[column, start + row] = value[row]
            for row in range(count):
                codes[column, start + row] = chosen[row]


@compile_kernel
def _descend(begin: int, end: int, pull: Any, hessian: Any, block: Block, boundaries: Any) -> None:
    target, step, codebook, codes, error = block
    columns = len(pull)
    for start in range(begin, end, TILE):
        count = min(TILE, end - start)
        value, chosen = np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
        moves = np.empty((columns, TILE), np.float32)
        for column in range(columns):
            for row in range(count):
                value[row] = pull[column, start + row]
            add_up(value, count, hessian[column], moves, 0, column)
            weight = hessian[column, column]
            for row in range(count):
                at = start + row
                wanted = value[row] / weight + target[column, at] - error[column, at]
                value[row] = wanted / step[column, at]
            find_nearest(value, count, boundaries, chosen)
            subtract_rounded(value, count, target[column, start:], step[column, start:], codebook, chosen)
            for row in range(count):
                moves[column, row] = value[row] - error[column, start + row]
            for row in range(count):
                error[column, start + row] = value[row]
            for row in range(count):
                codes[column, start + row] = chosen[row]


@compile_kernel
def _descend_coupled(
    begin: int, end: int, pull: Any, hessian: Any, block: Block, boundaries: Any, coupling: Any
) -> None:
    target, step, codebook, codes, error = block
    columns = len(pull)
    for start in range(begin, end, TILE):
        count = min(TILE, end - start)
        rows = coupling[start // TILE]
        value, mixed = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        moves = np.zeros((columns, TILE), np.float32)
        for column in range(columns):
            for row in range(count):
                value[row] = pull[column, start + row]
            add_up(value, count, hessian[column], moves, 0, column)
            for row in range(count):
                mixed[row] = 0
            add_up(mixed, count, value, rows, 0, count)
            weight = hessian[column, column]
            for row in range(count):
                at = start + row
                wanted = target[column, at] - error[column, at] + mixed[row] / (weight * rows[row, row])
                chosen = find_entry(wanted / step[column, at], boundaries)
                if chosen != codes[column, at]:
                    left = target[column, at] - codebook[chosen] * step[column, at]
                    move = left - error[column, at]
                    for other in range(row + 1, count):
                        mixed[other] += move * weight * rows[row, other]
                    codes[column, at], error[column, at], moves[column, row] = chosen, left, move


def cache_folder() -> str | None:
    """Return where machine code is kept for later runs; None where numba can write to no folder."""
    folder: str | None = cast(Any, _feed_back).stats.cache_path
    return folder
