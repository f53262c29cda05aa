"""Matrix products of float32, by the BLAS that numpy comes with where that is faster.

numpy's OpenBLAS chooses its kernels by what a processor can do, torch's MKL by who made it: on an AMD EPYC
the former is up to 1.3 times as fast (`tools/measure/bench_pipeline.py` says by how much here). It gets as
many threads as torch has, since the last digits of a product depend on that. What is added to goes through
torch, which adds while it multiplies. Of the product of a matrix with its own transpose, only the blocks on
and below the diagonal are computed: numpy would find half the work too, but fill the other half element by
element at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

import torch
from llvmlite.binding import get_host_cpu_name
from threadpoolctl import threadpool_limits
from torch import Tensor

SQUARE_BLOCK = 512
PROBE = 256
"""Products of a few rows and columns do not go to oneDNN."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left [m, k] @ right [k, n], float32."""
    _share(torch.get_num_threads())
    return torch.from_numpy(left.numpy() @ right.numpy())


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [m, k] @ right [k, n] to total [m, n], float32."""
    total.addmm_(left, right)


def add_square(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of rows.T @ rows, for rows [n, k], to that of total [k, k], float32. What is
    above it is of no use until `mirror`."""
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
def allow_bfloat16() -> Iterator[None]:
    """In here torch's products of float32, `add_product` and `add_square` among them, are oneDNN's where that
    is faster: because it rounds factors to bfloat16 and adds up in float32 (`has_bfloat16`), or because its
    float32 kernels, which take over where it does not round, outrun the BLAS (`has_slow_blas`). `product` is
    left as it is."""
    if has_bfloat16() or has_slow_blas():
        with _precision("medium"):
            yield
    else:
        yield


@cache
def has_bfloat16() -> bool:
    """Return whether torch rounds the factors of a float32 product to bfloat16 here once it may, which oneDNN
    does for some instructions (AMX) and not for others (AVX-512's). Found out by a product: 1 + 2**-12 takes
    12 bits behind the point, bfloat16 has 7."""
    above_one = torch.full((PROBE, PROBE), 1 + 2.0**-12, dtype=torch.float32)
    with _precision("medium"):
        return bool((above_one @ torch.eye(PROBE, dtype=torch.float32) == 1).all())


@cache
def has_slow_blas() -> bool:
    """Return whether torch's BLAS is slow here, as MKL is on processors of AMD: oneDNN's float32 kernels take
    half its time there. Nothing is timed, so a machine gives the same digits every day."""
    mkl: bool = torch.backends.mkl.is_available()
    return mkl and str(get_host_cpu_name()).startswith("znver")


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """torch's precision of float32 products, in here only."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def _share(threads: int) -> None:
    threadpool_limits(threads, user_api="blas")
