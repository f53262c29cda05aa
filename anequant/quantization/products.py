"""Matrix products of float32, by the BLAS that numpy comes with where that is faster.

numpy's OpenBLAS chooses its kernels by what a processor can do, torch's MKL by who made it: on an AMD EPYC
the former is up to 1.3 times as fast (`tools/bench_pipeline.py` says by how much here). It gets as many
threads as torch has, since the last digits of a product depend on that. What is added to goes through torch,
which adds while it multiplies. Of the product of a matrix with its own transpose, only the blocks on and
below the diagonal are computed: numpy would find half the work too, but fill the other half element by
element at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

SQUARE_BLOCK = 512


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right [k, n], float32."""
    _share(torch.get_num_threads())
    return torch.from_numpy(left.numpy() @ right.numpy())


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [m, n] += left [m, k] @ right [k, n], float32."""
    total.addmm_(left, right)


def add_square(total: Tensor, rows: Tensor) -> None:
    """The lower triangle of total [k, k] += that of rows.T @ rows, for rows [n, k], float32. What is above it
    is of no use until `mirror`."""
    for start in range(0, rows.shape[1], SQUARE_BLOCK):
        end = start + SQUARE_BLOCK
        add_product(total[start:, start:end], rows[:, start:].T, rows[:, start:end])


def mirror(total: Tensor) -> None:
    """Copy the lower triangle of total [k, k] to the upper one."""
    for start in range(0, len(total), SQUARE_BLOCK):
        block, after = slice(start, start + SQUARE_BLOCK), slice(start + SQUARE_BLOCK, None)
        corner = total[block, block].tril()
        total[block, block] = corner + corner.tril(-1).T
        total[block, after] = total[after, block].T


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """In here torch's products of float32, `add_product` and `add_square` among them, round their factors to
    bfloat16 and add up in float32, if the processor has instructions for that. `product` does not."""
    before = torch.get_float32_matmul_precision()
    if has_bfloat16():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 faster than of float32."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("amx_bf16") or can.get("avx512_bf16"))


@lru_cache(maxsize=1)
def _share(threads: int) -> None:
    threadpool_limits(threads, user_api="blas")
