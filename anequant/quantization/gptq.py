"""Rounding a whole matrix against a Hessian: GPTQ on a codebook, and coordinate descent on its codes.

Let C [out, in] be the core of a weight (the weight divided by both scale vectors), q(C) its rounded
form, E = C - q(C), and H [in, in] the second moment of the core's input. The error of the linear's output
is tr(E H E^T). With H = L L^T (L lower triangular) and U = L / diag(L), unit lower triangular,

    tr(E H E^T) = sum_j L_jj^2 ||E_j + sum_{k>j} U_kj E_k||^2          (E_j a column),

so going from the last column to the first, the best value for column j given the columns after it is
the codebook entry nearest to C_j + sum_{k>j} U_kj E_k: error feedback. This is GPTQ (Frantar et al.
2022) in the LDL form of QuIP (Chee et al. 2023, theorem 6 proves them equal); it needs one Cholesky
factor and no inverse. Columns are taken in the order of descending H_jj (act-order): those that matter
most are rounded first, while the others can still make up for them.

Coordinate descent afterwards revisits every column with all others fixed: the best value is then the
entry nearest to C_j + sum_{k!=j} H_jk E_k / H_jj. No step raises the error.

Everything works on transposed matrices [in, out], whose columns are contiguous, in blocks of columns with
one matrix product between blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
DAMPING_GROWTH = 10.0


def gptq_codes(core: Tensor, codebook: Tensor, hessian: Tensor) -> Tensor:
    """Round core [out, in] to codes uint8 [out, in] with error feedback.

    codebook float32 [K], ascending; hessian float32 [in, in], positive definite (see `damped`).
    """
    order = hessian.diagonal().argsort(stable=True)
    feedback = _feedback(hessian[order][:, order])
    target = core.T[order]
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.empty(target.shape, dtype=torch.uint8)
    error = torch.empty_like(target)
    for end in range(target.shape[0], 0, -BLOCK):
        start = max(0, end - BLOCK)
        wanted = torch.addmm(target[start:end], feedback[end:, start:end].T, error[end:])
        for column in range(end - 1, start - 1, -1):
            inside = slice(column + 1, end)
            value = wanted[column - start]
            value.addmv_(error[inside].T, feedback[inside, column])
            chosen = torch.bucketize(value, boundaries)
            codes[column] = chosen
            torch.sub(target[column], codebook[chosen], out=error[column])
    return codes[order.argsort()].T.contiguous()


def descend(core: Tensor, codebook: Tensor, hessian: Tensor, codes: Tensor) -> Tensor:
    """One pass of coordinate descent over the columns of `codes`; shapes as in `gptq_codes`."""
    target = core.T.contiguous()
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    result = codes.T.contiguous()
    error = target - codebook[result.int()]
    for start in range(0, target.shape[0], BLOCK):
        rows = hessian[start : start + BLOCK]
        pull = rows @ error
        for offset in range(rows.shape[0]):
            column = start + offset
            weight = rows[offset, column]
            wanted = pull[offset].div_(weight).add_(target[column]).sub_(error[column])
            chosen = torch.bucketize(wanted, boundaries)
            moved = target[column] - codebook[chosen]
            change = moved - error[column]
            later = slice(offset + 1, rows.shape[0])
            pull[later].addr_(rows[later, column], change)
            result[column] = chosen
            error[column] = moved
    return result.T.contiguous()


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """hessian + damping * mean(diagonal) on the diagonal, and the damping that made it positive definite.

    Inputs that never fired have a zero diagonal; damping makes them independent of all others, so they
    are rounded to the nearest entry.
    """
    mean = float(hessian.diagonal().mean()) or 1.0
    while True:
        result = hessian.clone()
        result.diagonal().add_(damping * mean)
        if int(torch.linalg.cholesky_ex(result).info) == 0:
            return result, damping
        damping *= DAMPING_GROWTH


def _feedback(hessian: Tensor) -> Tensor:
    """U of the derivation: unit lower triangular [in, in]."""
    factor: Tensor = torch.linalg.cholesky(hessian)
    unit: Tensor = factor / factor.diagonal()
    return unit
