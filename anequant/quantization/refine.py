"""Least squares for codebook and scales, given the codes.

With W [out, in] the weight to be met, B = codebook[codes], H [in, in] the second moment of the input, and
o, d, T the output scales, input scales and codebook, the error of the linear's output is

    L(o, d, T) = sum_r e_r H e_r^T,   e_r = w_r - o_r (b_r * d)                      (* is entrywise).

It is quadratic in each of the three while the other two stay, so each has its least value where a linear
system says; GANQ (Zhao et al. 2025, section 3) solves the codebook of one row so:

    o_r = <w_r, b_r * d> / <b_r * d, b_r * d>                                        <a, b> = a H b^T
    d   solves (H * F^T F) d = diag(F^T W H)                                         F = diag(o) B
    T   solves A T = y,  A_kl = sum_r <m_rk, m_rl>,  y_k = sum_r <m_rk, w_r>

with m_rk [in] equal to o_r d where row r has code k, else 0. None of the steps raises L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.quantization.codebook import separate
from anequant.quantization.quantize import FittedCore
from anequant.quantization.scales import SMALLEST_INPUT_SCALE, float16_scales, spread

RIDGE = 1e-6
CODEBOOK_ROWS = 256
LARGEST_CODEBOOK = 16


def refit(
    weight: Tensor, codes: Tensor, fitted: FittedCore, hessian: Tensor, *, codebook: str, scales: str
) -> FittedCore:
    """One round of the three steps for weight [out, in] and codes [out, in], with hessian [in, in].

    The recipe's words say what is free: a uniform codebook stays, and so do input scales that are not
    balanced and a scale shared by all rows or by a group. A codebook of more than 16 entries stays too: its
    system takes a product with H for every entry, and its error is small already. Numbers come back as
    float16 holds them, so L can rise by its rounding.
    """
    rows, columns, entries = fitted.output_scale, fitted.input_scale, fitted.codebook
    if scales not in ("tensor", "group"):
        rows = refit_output_scale(weight, entries[codes.int()], rows, columns, hessian)
    if codebook == "lut" and len(entries) <= LARGEST_CODEBOOK:
        entries = refit_codebook(weight, codes, entries, rows, columns, hessian)
    if scales == "balanced":
        columns = refit_input_scale(weight, entries[codes.int()], rows, columns, hessian)
        gauge = columns.log().mean().exp()
        columns = (columns / gauge).clamp_min(SMALLEST_INPUT_SCALE)
        rows = rows * gauge
    rows, columns = float16_scales(rows, columns)
    return FittedCore(separate(entries.double()) if codebook == "lut" else entries, columns, rows)


def refit_output_scale(
    weight: Tensor, values: Tensor, output_scale: Tensor, input_scale: Tensor, hessian: Tensor
) -> Tensor:
    """o [out] for weight and values = codebook[codes], both [out, in]. Rows whose best scale is not
    positive keep theirs."""
    scaled = values * input_scale
    pull = scaled @ hessian
    best = (weight * pull).sum(1) / (scaled * pull).sum(1)
    return torch.where(best > 0, best, output_scale)


def refit_input_scale(
    weight: Tensor, values: Tensor, output_scale: Tensor, input_scale: Tensor, hessian: Tensor
) -> Tensor:
    """d [in]. Where the system leaves it free it stays; all of it does if an entry would not be positive."""
    scaled = output_scale[:, None] * values
    matrix = hessian * (scaled.T @ scaled)
    wanted = (scaled * (weight @ hessian)).sum(0)
    ridge = RIDGE * matrix.diagonal().mean()
    matrix.diagonal().add_(ridge)
    best: Tensor = torch.linalg.solve(matrix, wanted + ridge * input_scale)
    return best if bool((best > 0).all()) else input_scale


def refit_codebook(
    weight: Tensor,
    codes: Tensor,
    codebook: Tensor,
    output_scale: Tensor,
    input_scale: Tensor,
    hessian: Tensor,
) -> Tensor:
    """T [K], the best for evenly spaced rows, fewer than 2 CODEBOOK_ROWS. Entries that no code uses stay,
    and all of them where their order would change."""
    rows = slice(0, None, max(1, weight.shape[0] // CODEBOOK_ROWS))
    codes, scale = codes[rows], spread(output_scale[rows], codes.shape[1]) * input_scale
    members = torch.stack([(codes == k) * scale for k in range(len(codebook))])
    pulls = members @ hessian
    matrix = (pulls.flatten(1) @ members.flatten(1).T).double()
    wanted = (pulls.flatten(1) @ weight[rows].flatten()).double()
    ridge = RIDGE * matrix.diagonal().mean()
    matrix.diagonal().add_(ridge)
    best = torch.linalg.solve(matrix, wanted + ridge * codebook.double()).float()
    return best if bool((best.diff() > 0).all()) else codebook
