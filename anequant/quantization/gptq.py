"""Rounding a whole matrix against a Hessian: GPTQ on a codebook, and coordinate descent on its codes.

Let W [out, in] be the weight to be met, q(W) = step * codebook[codes] its rounded form with a step [out, in]
made of scales, E = W - q(W), and H [in, in] the second moment of the linear's input. The error of the output
is tr(E H E^T). With H = L L^T (L lower triangular) and U = L / diag(L), unit lower triangular,

    tr(E H E^T) = sum_j L_jj^2 ||E_j + sum_{k>j} U_kj E_k||^2          (E_j a column),

so going from the last column to the first, the best value for column j given the columns after it is
the step times the entry nearest to (W_j + sum_{k>j} U_kj E_k) / step_j: error feedback. This is GPTQ (Frantar
et al. 2022) in the LDL form of QuIP (Chee et al. 2023, theorem 6 proves them equal); it needs one Cholesky
factor and no inverse. Columns are taken in the order of descending H_jj (act-order): those that matter
most are rounded first, while the others can still make up for them. Neither the order nor the factor depends
on the weight: all linears that read one input share them.

Coordinate descent afterwards revisits every column with all others fixed: the best value is then the
step times the entry nearest to (W_j + sum_{k!=j} H_jk E_k / H_jj) / step_j. No step raises the error.

Where errors of different outputs count together, by a matrix C [out, out] with a diagonal of about one, the
error is tr(C E H E^T). C is known for tiles of rows and zero between them. Descent then goes through a column
row by row: with all else fixed the best value of one weight is the step times the entry nearest to

    (W_ij + (C E H)_ij / (C_ii H_jj) - E_ij) / step_ij.

Everything works on transposed matrices [in, out], whose columns are contiguous, in blocks of columns with
one matrix product between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.quantization import kernels
from anequant.quantization.codebook_kernels import look_up
from anequant.quantization.products import add_product, product

BLOCK = 256
DAMPING_GROWTH = 10.0
SMALLEST_DAMPING = 1e-9


@dataclass(frozen=True, eq=False)
class Factor:
    """The Cholesky factor of a damped Hessian [in, in] whose columns are in the order of their diagonal.

    order    int64 [in]        ascending
    lower    float32 [in, in]  L of (hessian + ridge I)[order][:, order]
    ridge    what was added to the diagonal: `damping` times its mean
    """

    order: Tensor
    lower: Tensor
    ridge: float
    damping: float

    def solve(self, right: Tensor) -> Tensor:
        """(hessian + ridge I)^-1 @ right, for right [in, n]."""
        solved = torch.empty_like(right)
        solved[self.order] = torch.cholesky_solve(right[self.order], self.lower)
        return solved


def factorize(hessian: Tensor, damping: float = 0.0) -> Factor:
    """Factorize hessian [in, in] with the least damping, of `damping` times a power of ten, that makes it
    positive definite.

    Inputs that never fired have a zero diagonal; damping makes them independent of all others, so they
    are rounded to the nearest entry.
    """
    order = hessian.diagonal().argsort(stable=True)
    mean = float(hessian.diagonal().mean()) or 1.0
    ordered = hessian[order].index_select(1, order)
    ridge = 0.0
    while True:
        ordered.diagonal().add_(damping * mean - ridge)
        ridge = damping * mean
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            return Factor(order, lower, ridge, damping)
        damping = damping * DAMPING_GROWTH or SMALLEST_DAMPING


def damp(hessian: Tensor, ridge: float) -> Tensor:
    """Return hessian [in, in] with `ridge` added to its diagonal."""
    result = hessian.clone()
    result.diagonal().add_(ridge)
    return result


@dataclass(frozen=True, eq=False)
class Grid:
    """What target [in, out] is rounded to: the entries of codebook [K], ascending, times step [in, out]."""

    target: Tensor
    step: Tensor
    codebook: Tensor


@dataclass(frozen=True, eq=False)
class Rounded:
    """codes uint8, the error that they leave and pull, the Hessian times that error: all [in, out]."""

    codes: Tensor
    error: Tensor
    pull: Tensor

    def loss(self, coupling: Tensor | None = None) -> float:
        """tr(C E H E^T), with C the identity where there is no coupling [tiles, TILE, TILE]."""
        if coupling is None:
            return float((self.error * self.pull).sum(dtype=torch.float64))
        total = 0.0
        errors, pulls = (matrix.split(kernels.TILE, dim=1) for matrix in (self.error, self.pull))
        for tile, error, pull in zip(coupling, errors, pulls, strict=True):
            rows = slice(error.shape[1])
            total += float((product(error, tile[rows, rows]) * pull).sum(dtype=torch.float64))
        return total


def gptq(grid: Grid, factor: Factor) -> Tensor:
    """Round with error feedback: codes uint8 [in, out]."""
    target, step = grid.target[factor.order], grid.step[factor.order]
    codes, error = torch.empty(target.shape, dtype=torch.uint8), torch.empty_like(target)
    diagonal = factor.lower.diagonal()
    for end in range(len(target), 0, -BLOCK):
        block = slice(max(0, end - BLOCK), end)
        wanted = target[block].clone()
        if end < len(target):
            wanted += product(factor.lower[end:, block].T, error[end:]) / diagonal[block, None]
        unit = (factor.lower[block, block] / diagonal[block]).T.contiguous()
        kernels.feed_back(
            wanted, unit, kernels.Block(target[block], step[block], grid.codebook, codes[block], error[block])
        )
    return codes[factor.order.argsort()]


def evaluate_codes(grid: Grid, hessian: Tensor, codes: Tensor) -> Rounded:
    """Return codes uint8 [in, out] with the error that they leave and its product with hessian [in, in]."""
    error = grid.target - look_up(grid.codebook, codes) * grid.step
    return Rounded(codes.clone(), error, product(hessian, error))


def descend(grid: Grid, hessian: Tensor, current: Rounded, coupling: Tensor | None = None) -> None:
    """Improve `current` in place by one pass of coordinate descent over the columns; `coupling` [tiles, TILE,
    TILE] says how errors of rows count together."""
    for start in range(0, len(grid.target), BLOCK):
        block = slice(start, start + BLOCK)
        before = current.error[block].clone()
        codes, error = current.codes[block], current.error[block]
        part = kernels.Block(grid.target[block], grid.step[block], grid.codebook, codes, error)
        own = hessian[block, block].contiguous()
        if coupling is None:
            kernels.descend(current.pull[block], own, part)
        else:
            kernels.descend_coupled(current.pull[block], own, coupling, part)
        add_product(current.pull, hessian[:, block], current.error[block] - before)
