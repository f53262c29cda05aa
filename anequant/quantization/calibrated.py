"""Quantizing one linear so that its outputs, rather than its weights, stay close.

Target correction. The quantized model feeds the linear x where the float model feeds x_float. The weight
that best turns x into W x_float is W + W (C - H) H^-1, with H = E[x x^T] and C = E[x_float x^T]: to round
it instead of W makes up for errors made upstream (asymmetric calibration, GPTAQ: Li et al. 2025,
section 3). With few tokens the whole step overfits, so only a part of it is taken.

Damping. Few tokens per input channel make the Hessian noisy and error feedback overfit, so every tensor
chooses among dampings, and no feedback at all, by the output error on held-out windows.

Refinement. In turn, least squares give codebook and scales for the codes (refine.py), and a pass of
coordinate descent gives codes for those; it ends when the layer's error no longer falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anequant.errors import UnsupportedError
from anequant.quantization.codebook import nearest_codes
from anequant.quantization.gptq import damped, descend, gptq_codes
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.quantize import FittedCore, bound_bias, checked_bias, fit_core
from anequant.quantization.refine import refit
from anequant.quantization.statistics import InputStatistics, Moments, output_loss

DAMPINGS = (0.05, 0.2, 1.0)
TARGET_DAMPING = 0.2
TRIAL_ROWS = 256


@dataclass(frozen=True)
class Rounding:
    """A recipe's choices for calibrated rounding.

    correction  share of the target correction
    descent     passes of coordinate descent after gptq
    refinement  rounds of least squares and another pass, at most
    group       columns that share a scale where scales is group
    """

    bits: int
    codebook: str
    scales: str
    correction: float
    descent: int
    refinement: int
    group: int = 0


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
    bias = checked_bias(bias, name)
    moments = statistics.everything
    if not bool(moments.hessian.isfinite().all() and moments.cross.isfinite().all()):
        raise UnsupportedError(
            f"the inputs of '{name}' during calibration are not all finite",
            remedy="check the checkpoint for a damaged tensor",
        )
    target = corrected_target(weight, moments, rounding.correction)
    fitted = fit_core(
        target,
        rounding.bits,
        rounding.codebook,
        rounding.scales,
        name,
        group=rounding.group,
        input_scale=input_scale,
    )
    damping = _choose_damping(weight, fitted, statistics, rounding)
    codes = _round(target, fitted, moments, damping, rounding.descent)
    if damping is not None:
        if input_scale is not None and rounding.scales == "balanced":
            rounding = replace(rounding, scales="output")
        fitted, codes = _refine(target, fitted, codes, moments, damping, rounding)
    return bound_bias(fitted.linear(codes, bias), name), damping


def corrected_target(weight: Tensor, moments: Moments, share: float) -> Tensor:
    """W + share * W (C - H) (H + damping)^-1 for weight [out, in], float32."""
    if share == 0:
        return weight
    hessian, _ = damped(moments.hessian.double(), TARGET_DAMPING)
    missing = weight.double() @ (moments.cross - moments.hessian).double()
    step: Tensor = torch.linalg.solve(hessian, missing.T).T
    return weight + (share * step).float()


def _choose_damping(
    weight: Tensor, fitted: FittedCore, statistics: InputStatistics, rounding: Rounding
) -> float | None:
    """The damping with the least output error on held-out windows, tried with the fit windows' moments."""
    rows = slice(0, None, max(1, weight.shape[0] // TRIAL_ROWS))
    weight, trial = weight[rows], fitted.rows(rows)
    target = corrected_target(weight, statistics.fit, rounding.correction)

    def loss(damping: float | None) -> float:
        codes = _round(target, trial, statistics.fit, damping, rounding.descent)
        return output_loss(weight, trial.linear(codes, None).dequantize(), statistics.held_out)

    return min((None, *DAMPINGS), key=loss)


def _round(
    target: Tensor, fitted: FittedCore, moments: Moments, damping: float | None, descent: int
) -> Tensor:
    """Codes of target [out, in]; its core's input has the Hessian diag(d) H diag(d)."""
    if damping is None:
        return nearest_codes(fitted.core(target), fitted.codebook)
    hessian = _core_hessian(fitted, moments, damping)
    wanted = fitted.target(target)
    codes = gptq_codes(wanted, fitted.codebook, hessian, fitted.step)
    for _ in range(descent):
        codes = descend(wanted, fitted.codebook, hessian, codes, fitted.step)
    return codes


def _core_hessian(fitted: FittedCore, moments: Moments, damping: float) -> Tensor:
    scale = fitted.input_scale
    hessian, _ = damped(scale[:, None] * moments.hessian * scale, damping)
    return hessian


def _refine(
    target: Tensor, fitted: FittedCore, codes: Tensor, moments: Moments, damping: float, rounding: Rounding
) -> tuple[FittedCore, Tensor]:
    """Better scales and codebook and codes, for the damped Hessian that gptq saw."""
    scale = fitted.input_scale
    hessian = _core_hessian(fitted, moments, damping) / scale[:, None] / scale
    least = weighted_loss(target, fitted, codes, hessian)
    for _ in range(rounding.refinement):
        refitted = refit(target, codes, fitted, hessian, codebook=rounding.codebook, scales=rounding.scales)
        scale = refitted.input_scale
        seen = scale[:, None] * hessian * scale
        moved = descend(refitted.target(target), refitted.codebook, seen, codes, refitted.step)
        loss = weighted_loss(target, refitted, moved, hessian)
        if loss >= least:
            break
        least, fitted, codes = loss, refitted, moved
    return fitted, codes


def weighted_loss(weight: Tensor, fitted: FittedCore, codes: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) of the error E [out, in] that the codes leave."""
    error = weight - fitted.linear(codes, None).dequantize()
    return float((error * (error @ hessian)).sum(dtype=torch.float64))
