"""Least squares for codebook and scales, given the codes.

With W [out, in] the weight to be met, B = codebook[codes], H [in, in] the second moment of the input, and
o, d, T the output scales, input scales and codebook, the error of the linear's output is

    L(o, d, T) = sum_r e_r H e_r^T,   e_r = w_r - o_r (b_r * d)                      (* is entrywise).

It is quadratic in each of the three while the other two stay, so each has its least value where a linear
system says; GANQ (Zhao et al. 2025, section 3) solves the codebook of one row so:

    o_r = <w_r, b_r * d> / <b_r * d, b_r * d>                                        <a, b> = a H b^T
    d   solves (H * F^T F) d = diag(F^T W H)                                         F = diag(o) B
    T   solves A T = y,  A_kl = sum_r <m_rk, m_rl>,  y_k = sum_r <m_rk, w_r>

with m_rk [in] equal to o_r d where row r has code k, else 0. None of the steps raises L. W H stays the same,
and coordinate descent leaves E H, so one product with H serves <w_r, .> and another <o_r b_r * d, .>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.quantization.codebook import separate
from anequant.quantization.codebook_kernels import look_up
from anequant.quantization.nearest import FittedCore
from anequant.quantization.products import add_square, product
from anequant.quantization.scales import SMALLEST_INPUT_SCALE, round_scales, spread
from anequant.quantization.weight_format import WeightFormat

RIDGE = 1e-6
CODEBOOK_WEIGHTS = 1 << 16
CODEBOOK_ROWS = 256
LARGEST_CODEBOOK = 16


def refit(
    weight_pull: Tensor,
    error_pull: Tensor,
    codes: Tensor,
    fitted: FittedCore,
    hessian: Tensor,
    format_: WeightFormat,
) -> FittedCore:
    """Take one round of the three steps for codes [out, in] of a weight, with hessian [in, in].

    weight_pull [out, in] is the weight times hessian, and error_pull [out, in] that of the weight minus the
    rounded one.

    The format says what is free: a uniform codebook stays, and so do input scales that are not
    balanced and a scale shared by all rows or by a group. A codebook of more than 16 entries stays too: its
    system takes a product with H for every entry, and its error is small already. Numbers come back as
    float16 holds them, so L can rise by its rounding.
    """
    rows, columns, entries = fitted.output_scale, fitted.input_scale, fitted.codebook
    if format_.scales not in ("tensor", "group"):
        rounded = fitted.linear(codes, None).dequantize()
        rows = refit_output_scale(rounded, weight_pull - error_pull, weight_pull, rows)
    free = format_.codebook == "lut"
    if free and len(entries) <= LARGEST_CODEBOOK:
        entries = refit_codebook(codes, entries, rows, columns, hessian, weight_pull)
    if format_.scales == "balanced":
        columns = refit_input_scale(rows[:, None] * look_up(entries, codes), columns, hessian, weight_pull)
        gauge = columns.log().mean().exp()
        columns = (columns / gauge).clamp_min(SMALLEST_INPUT_SCALE)
        rows = rows * gauge
    rows, columns = round_scales(rows, columns)
    return FittedCore(separate(entries.double()) if free else entries, columns, rows)


def refit_output_scale(
    rounded: Tensor, rounded_pull: Tensor, weight_pull: Tensor, output_scale: Tensor
) -> Tensor:
    """Return the best o [out] where `output_scale` gave rounded [out, in]; the pulls [out, in] are products
    with H. Rows whose best scale is not positive keep theirs."""
    best = output_scale * (rounded * weight_pull).sum(1) / (rounded * rounded_pull).sum(1)
    return torch.where(best > 0, best, output_scale)


def refit_input_scale(scaled: Tensor, input_scale: Tensor, hessian: Tensor, weight_pull: Tensor) -> Tensor:
    """Return the best d [in] for scaled = diag(o) codebook[codes] [out, in]. Where the system leaves it free
    it stays; all of it does if an entry would not be positive."""
    matrix = torch.zeros_like(hessian)
    add_square(matrix, scaled)
    matrix *= hessian
    ridge = RIDGE * matrix.diagonal().mean()
    matrix.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return input_scale
    wanted = (scaled * weight_pull).sum(0) + ridge * input_scale
    best = torch.cholesky_solve(wanted[:, None], factor)[:, 0]
    return best if bool((best > 0).all()) else input_scale


def refit_codebook(
    codes: Tensor,
    codebook: Tensor,
    output_scale: Tensor,
    input_scale: Tensor,
    hessian: Tensor,
    weight_pull: Tensor,
) -> Tensor:
    """Return the T [K] that is best for some evenly spaced rows. Entries that no code uses stay, and all of
    them do where their order would change."""
    most = min(CODEBOOK_ROWS, max(1, CODEBOOK_WEIGHTS // codes.shape[1]))
    rows = slice(0, None, -(-codes.shape[0] // most))
    codes, scale = codes[rows], spread(output_scale[rows], codes.shape[1]) * input_scale
    members = torch.stack([((codes == k) * scale).flatten() for k in range(len(codebook))])
    pulls = product(members.view(-1, len(hessian)), hessian).view_as(members)
    matrix = product(pulls, members.T).double()
    wanted = product(members, weight_pull[rows].flatten()[:, None])[:, 0].double()
    ridge = RIDGE * matrix.diagonal().mean()
    matrix.diagonal().add_(ridge)
    best = torch.linalg.solve(matrix, wanted + ridge * codebook.double()).float()
    return best if bool((best.diff() > 0).all()) else codebook
