"""The two scale vectors of W ~ diag(output_scale) . core . diag(input_scale).

For machines that can afford it, an output scale per row and group of columns takes their place: a matrix
[out, groups] whose every entry counts for in / groups consecutive columns.

Balanced scales make every row and every column of the core have a root mean square of one: divide rows
by theirs, then columns by theirs, and repeat. On the squares W**2 this is the Sinkhorn-Knopp iteration
(1967), which converges to the one pair of scalings with unit row and column means. The gauge
(output_scale * s, input_scale / s) is fixed by giving input_scale a geometric mean of one.

Why balance: with one codebook of fixed shape, the error of column j is d_j**2 * D(sigma_j / d_j), least
at d_j proportional to the column's own spread, whatever the input's second moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.errors import UsageError

SINKHORN_ROUNDS = 12
SMALLEST_PRODUCT = 2.0**-14
SMALLEST_INPUT_SCALE = 2.0**-5
NEGLIGIBLE = 2.0**-40


def tensor_scale(weight: Tensor, measure: str) -> Tensor:
    """Return one size for the whole tensor, repeated per row: float32 [out]. `measure` is absmax or rms."""
    size = weight.abs().max() if measure == "absmax" else weight.square().mean().sqrt()
    return size.expand(weight.shape[0]).clone()


def output_scale(weight: Tensor, measure: str) -> Tensor:
    """Return one size per row: float32 [out]. `measure` is absmax or rms."""
    order, divisor = (torch.inf, 1.0) if measure == "absmax" else (2, weight.shape[1] ** 0.5)
    size: Tensor = torch.linalg.vector_norm(weight, ord=order, dim=1) / divisor
    return size


def group_scale(weight: Tensor, measure: str, group: int) -> Tensor:
    """Return one size per row and `group` consecutive columns: float32 [out, in / group].

    Raises UsageError where the groups do not cover the columns.
    """
    rows, columns = weight.shape
    if columns % group:
        raise UsageError(
            f"groups of {group} do not divide {columns} columns", remedy="use a smaller group_size"
        )
    parts = output_scale(weight.reshape(-1, group), measure).view(rows, -1)
    return parts.clamp_min(float(parts.max()) * NEGLIGIBLE or SMALLEST_PRODUCT)


def spread(scale: Tensor, columns: int) -> Tensor:
    """Return an output scale [out] or [out, groups] as it multiplies a weight: [out, 1] or [out, columns]."""
    if scale.ndim == 1:
        return scale[:, None]
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)


def balance_scales(weight: Tensor, rounds: int = SINKHORN_ROUNDS) -> tuple[Tensor, Tensor]:
    """Sinkhorn scales of weight [out, in]: (output_scale [out], input_scale [in]), float32, positive.

    Rows and columns of zeros (columns of a millionth of the largest, too) take no part: a dead column
    gets an input scale of one, a dead row the smallest output scale.
    """
    squares = weight.square()
    sums = squares.sum(dim=0)
    live = sums > float(sums.max()) * NEGLIGIBLE
    if not bool(live.any()):
        return torch.full((weight.shape[0],), SMALLEST_PRODUCT), torch.ones(weight.shape[1])
    columns = live.float()
    for _ in range(rounds):
        rows = _inverse(squares @ columns)
        columns = _inverse(rows @ squares) * live
    log_scale = -0.5 * columns.clamp_min(torch.finfo(torch.float32).tiny).log()
    input_scale = (log_scale - log_scale[live].mean()).exp().clamp_min(SMALLEST_INPUT_SCALE)
    input_scale[~live] = 1.0
    mean_squares = squares @ input_scale.square().reciprocal() / live.sum()
    dead = mean_squares == 0
    return mean_squares.sqrt().masked_fill_(dead, SMALLEST_PRODUCT), input_scale


def round_scales(output: Tensor, input_: Tensor) -> tuple[Tensor, Tensor]:
    """Round both vectors to numbers float16 holds exactly; outputs and products stay at 2**-14 or more.

    The floor keeps `output_scale` and `output_scale * input_scale` normal float16 numbers, so that a
    reader that divides in float16 recovers the codes.
    """
    input_ = input_.half().float()
    floor = SMALLEST_PRODUCT / input_.min().clamp_max(1.0)
    if floor.half() < floor:
        floor = floor * (1 + 2.0**-10)
    return output.clamp_min(floor).half().float(), input_


def _inverse(sums: Tensor) -> Tensor:
    """1 / sums, scaled to a largest value of one; zeros count as tiny."""
    inverse = sums.clamp_min(float(sums.max()) * NEGLIGIBLE).reciprocal()
    return inverse / inverse.min()
