"""Matrix products of float32, by the BLAS that numpy comes with.

numpy's OpenBLAS chooses its kernels by what a processor can do, torch's MKL by who made it: on an AMD EPYC
the former is 1.3 times as fast (`tools/bench_pipeline.py` says by how much here). And numpy takes the product
of a matrix with its own transpose as one, half the work. It gets as many threads as torch has, since
the last digits of a product depend on that.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right [k, n], float32."""
    _share(torch.get_num_threads())
    return torch.from_numpy(left.numpy() @ right.numpy())


def add_square(total: Tensor, rows: Tensor) -> None:
    """total [k, k] += rows.T @ rows, for rows [n, k]."""
    _share(torch.get_num_threads())
    values = rows.numpy()
    total += torch.from_numpy(values.T @ values)


@lru_cache(maxsize=1)
def _share(threads: int) -> None:
    threadpool_limits(threads, user_api="blas")
