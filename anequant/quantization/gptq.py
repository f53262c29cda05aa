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

Scales of groups differ by row within a column, and then no core has one Hessian for all rows. The same steps
hold for the weight itself: C is the weight, and q(C) = step * codebook entry with a step [out, in].

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


def gptq_codes(core: Tensor, codebook: Tensor, hessian: Tensor, step: Tensor | None = None) -> Tensor:
    """Round core [out, in] to codes uint8 [out, in] with error feedback.

    codebook float32 [K], ascending; hessian float32 [in, in], positive definite (see `damped`); step
    [out, in], positive, multiplies the entries where scales are of groups.
    """
    order = hessian.diagonal().argsort(stable=True)
    feedback = _feedback(hessian[order][:, order])
    target, steps = core.T[order], None if step is None else step.T[order]
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
            codes[column], entry = _nearest(value, boundaries, codebook, steps, column)
            torch.sub(target[column], entry, out=error[column])
    return codes[order.argsort()].T.contiguous()


def descend(
    core: Tensor, codebook: Tensor, hessian: Tensor, codes: Tensor, step: Tensor | None = None
) -> Tensor:
    """One pass of coordinate descent over the columns of `codes`; shapes as in `gptq_codes`."""
    target, steps = core.T.contiguous(), None if step is None else step.T.contiguous()
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    result = codes.T.contiguous()
    error = target - (codebook[result.int()] if steps is None else codebook[result.int()] * steps)
    for start in range(0, target.shape[0], BLOCK):
        rows = hessian[start : start + BLOCK]
        pull = rows @ error
        for offset in range(rows.shape[0]):
            column = start + offset
            weight = rows[offset, column]
            wanted = pull[offset].div_(weight).add_(target[column]).sub_(error[column])
            result[column], entry = _nearest(wanted, boundaries, codebook, steps, column)
            moved = target[column] - entry
            change = moved - error[column]
            later = slice(offset + 1, rows.shape[0])
            pull[later].addr_(rows[later, column], change)
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


def _nearest(
    wanted: Tensor, boundaries: Tensor, codebook: Tensor, steps: Tensor | None, column: int
) -> tuple[Tensor, Tensor]:
    """Codes [out] of the entries nearest to `wanted` [out], and the values they stand for."""
    if steps is None:
        chosen = torch.bucketize(wanted, boundaries)
        return chosen, codebook[chosen]
    chosen = torch.bucketize(wanted / steps[column], boundaries)
    return chosen, codebook[chosen] * steps[column]


def _feedback(hessian: Tensor) -> Tensor:
    """U of the derivation: unit lower triangular [in, in]."""
    factor: Tensor = torch.linalg.cholesky(hessian)
    unit: Tensor = factor / factor.diagonal()
    return unit
