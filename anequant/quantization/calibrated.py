"""Quantizing one linear so that its outputs, rather than its weights, stay close.

Target correction. The quantized model feeds the linear x where the float model feeds x_float. The weight
that best turns x into W x_float is W + W (C - H) H^-1, with H = E[x x^T] and C = E[x_float x^T]: to round
it instead of W makes up for errors made upstream (asymmetric calibration, GPTAQ: Li et al. 2025,
section 3). With few tokens the whole step overfits, so only a part of it is taken.

Damping. Few tokens per input channel make the Hessian noisy and error feedback overfit, so every tensor
chooses among dampings, and no feedback at all, by the output error on held-out windows.

Refinement. In turn, least squares give codebook and scales for the codes (refine.py), and passes of
coordinate descent give codes for those; it ends when the error no longer falls. Where it is known how errors
of outputs count together in the end loss, descent goes by that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.quantization.codebook import find_nearest_codes
from anequant.quantization.gptq import Grid, Rounded, damp, descend, evaluate_codes, gptq
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import FittedCore, bound_bias, fit_core, round_bias
from anequant.quantization.products import product
from anequant.quantization.refine import refit
from anequant.quantization.statistics import InputStatistics, Moments, measure_output_loss
from anequant.quantization.weight_format import WeightFormat

DAMPINGS = (0.2, 1.0)
TARGET_DAMPING = 0.2
TRIAL_ROWS = 256


@dataclass(frozen=True)
class Rounding:
    """A recipe's choices for calibrated rounding.

    format      what weights are rounded to
    correction  share of the target correction
    descent     passes of coordinate descent after gptq, or after every least squares
    refinement  rounds of least squares and such passes, at least one, at most
    """

    format: WeightFormat
    correction: float
    descent: int
    refinement: int


def quantize_calibrated(
    weight: Tensor,
    bias: Tensor | None,
    statistics: InputStatistics,
    rounding: Rounding,
    name: str,
    input_scale: Tensor | None = None,
) -> tuple[QuantizedLinear, float | None]:
    """GPTQ on weight [out, in]: the linear, and the damping chosen (None: plain nearest was better).

    `input_scale` [in] fixes that vector; without it the recipe's scales decide.

    Raises UnsupportedError as `quantize_linear` does, and for moments that are not finite.
    """
    bias = round_bias(bias, name)
    moments = statistics.everything
    if not moments.finite:
        raise UnsupportedError(
            f"the inputs of '{name}' during calibration are not all finite",
            remedy="check the checkpoint for a damaged tensor",
        )
    target = correct_target(weight, moments, rounding.correction)
    fitted = fit_core(target.values, rounding.format, name, input_scale)
    damping = _choose_damping(weight, fitted, statistics, rounding)
    if damping is None:
        codes = find_nearest_codes(fitted.core(target.values), fitted.codebook)
        return bound_bias(fitted.linear(codes, bias), name), None
    grid = _grid(target.values, fitted)
    factor = moments.factor(damping)
    hessian = damp(moments.hessian, factor.ridge)
    current = evaluate_codes(grid, hessian, gptq(grid, factor))
    if not rounding.refinement:
        _descend(grid, hessian, current, rounding.descent, statistics.coupling)
        return bound_bias(fitted.linear(current.codes.T.contiguous(), bias), name), damping
    if input_scale is not None and rounding.format.scales == "balanced":
        rounding = replace(rounding, format=replace(rounding.format, scales="output"))
    pull = product(weight, moments.hessian) if target.pull is None else target.pull
    weight_pull = pull.add_(target.values, alpha=factor.ridge)
    fitted, codes = _refine(grid, fitted, hessian, weight_pull, current, rounding, statistics.coupling)
    return bound_bias(fitted.linear(codes.T.contiguous(), bias), name), damping


@dataclass(frozen=True, eq=False)
class Target:
    """What is rounded, and its product with the Hessian where that is known, float32 [out, in]."""

    values: Tensor
    pull: Tensor | None


def correct_target(weight: Tensor, moments: Moments, share: float, rows: slice = slice(None)) -> Target:
    """Return W + share * S with S = W (C - H) (H + ridge)^-1, for some rows of weight [out, in].

    S H is W (C - H) - ridge * S, so the target's product with H takes only that of W.
    """
    if share == 0:
        return Target(weight[rows], None)
    pull = product(weight[rows], moments.hessian)
    missing = moments.project(weight, rows) - pull
    factor = moments.factor(TARGET_DAMPING)
    step = factor.solve(missing.T).T.mul_(share)
    pull.add_(missing, alpha=share).sub_(step, alpha=factor.ridge)
    return Target(weight[rows] + step, pull)


def _choose_damping(
    weight: Tensor, fitted: FittedCore, statistics: InputStatistics, rounding: Rounding
) -> float | None:
    """Return the damping, None for nearest rounding, with the least output error on held-out windows when
    the moments of the fit windows decide the codes."""
    rows = slice(0, None, max(1, weight.shape[0] // TRIAL_ROWS))
    target = correct_target(weight, statistics.fit, rounding.correction, rows).values
    wanted, trial = statistics.held_out.project(weight, rows), fitted.rows(rows)

    def loss(damping: float | None) -> float:
        if damping is None:
            codes = find_nearest_codes(trial.core(target), trial.codebook)
        else:
            codes = gptq(_grid(target, trial), statistics.fit.factor(damping)).T
        return measure_output_loss(
            trial.linear(codes, None).dequantize(), wanted, statistics.held_out.hessian
        )

    return min((None, *DAMPINGS), key=loss)


def _grid(target: Tensor, fitted: FittedCore) -> Grid:
    return Grid(target.T.contiguous(), fitted.step.T.contiguous(), fitted.codebook)


def _descend(grid: Grid, hessian: Tensor, current: Rounded, passes: int, coupling: Tensor | None) -> None:
    for _ in range(passes):
        descend(grid, hessian, current, coupling)


def _refine(
    grid: Grid,
    fitted: FittedCore,
    hessian: Tensor,
    weight_pull: Tensor,
    current: Rounded,
    rounding: Rounding,
    coupling: Tensor | None,
) -> tuple[FittedCore, Tensor]:
    """Improve scales, codebook and codes uint8 [in, out], for the damped Hessian that gptq saw and the
    weight's product with it [out, in]."""
    target = grid.target.T
    for _ in range(rounding.refinement):
        refitted = refit(weight_pull, current.pull.T, current.codes.T, fitted, hessian, rounding.format)
        grid = _grid(target, refitted)
        moved = evaluate_codes(grid, hessian, current.codes)
        _descend(grid, hessian, moved, max(1, rounding.descent), coupling)
        if moved.loss(coupling) >= current.loss(coupling):
            break
        fitted, current = refitted, moved
    return fitted, current.codes
