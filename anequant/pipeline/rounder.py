"""One linear or table after the other: rounded, stored, written, and its error kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, INPUT_SCALES
from anequant.checkpoints.quantized import store
from anequant.checkpoints.writer import CheckpointWriter
from anequant.errors import UnsupportedError
from anequant.quantization.calibrated import Rounding, quantize_calibrated
from anequant.quantization.codebook import round_to_integers
from anequant.quantization.fold_scales import premultiply_scales
from anequant.quantization.linear import relative_error
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.statistics import InputStatistics
from anequant.quantization.weight_format import linear_format, table_format
from anequant.recipe import Recipe


@dataclass(frozen=True)
class TensorError:
    """How far one quantized weight is from its float original: ||W - W'|| / ||W||.

    `weights` counts its entries; `damping` is the one that gptq chose, None for nearest rounding;
    `dead_inputs` counts inputs that no calibration token used, None without calibration.
    """

    name: str
    bits: int
    weights: int
    relative_error: float
    damping: float | None
    dead_inputs: int | None


@dataclass(frozen=True)
class PassResult:
    """`equivalence` is the largest relative logit change by folding and rotation, before rounding;
    `static_scales` are those of activations, by the linear's name."""

    equivalence: float
    bits_per_weight: float
    tensors: tuple[TensorError, ...]
    static_scales: Mapping[str, float]

    def summary(self) -> dict[str, float]:
        errors = [tensor.relative_error for tensor in self.tensors] or [0.0]
        return {
            "relative_logit_error_of_rotation": self.equivalence,
            "bits_per_weight": self.bits_per_weight,
            "mean_relative_weight_error": sum(errors) / len(errors),
            "largest_relative_weight_error": max(errors),
        }


@dataclass(frozen=True, eq=False)
class RoundingTask:
    """A linear or table `name` to be rounded to `bits`: weight [out, in] and bias [out] float32; statistics
    of its input where rounding is calibrated, and input_scale [in] where that is fixed."""

    recipe: Recipe
    bits: int
    name: str
    weight: Tensor
    bias: Tensor | None
    statistics: InputStatistics | None
    input_scale: Tensor | None


@dataclass(frozen=True, eq=False)
class RoundedLinear:
    """The tensors that are stored, by name, the input scale [in], and the weight's error."""

    tensors: Mapping[str, Tensor]
    input_scale: Tensor
    error: TensorError


class Rounder:
    """Writes weights as the recipe says; `bits` are the widths by full name, 16 for what stays in `dtype`."""

    def __init__(
        self, recipe: Recipe, bits: Mapping[str, int], writer: CheckpointWriter, dtype: torch.dtype
    ) -> None:
        self._errors: list[TensorError] = []
        self._recipe = recipe
        self._bits_of = bits
        self._writer = writer
        self._dtype = dtype
        self.bits = self.weights = 0

    def hand_over_errors(self) -> tuple[TensorError, ...]:
        """Return the errors since the last time, and forget them."""
        errors = tuple(self._errors)
        self._errors.clear()
        return errors

    def count_on(self, bits: int, weights: int) -> None:
        """Count on from what an earlier run had counted."""
        self.bits, self.weights = bits, weights

    def keeps(self, name: str) -> bool:
        """Return whether the linear or table of that name stays as it is."""
        return self._bits_of[name] == 16

    def keep(
        self, name: str, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Write a weight [rows, in] (some rows after the other), its bias and input scale as they are."""
        self.write(f"{name}.weight", weight)
        self._count(weight.numel(), 16)
        if bias is not None:
            self.write(f"{name}.bias", bias)
        if scale is not None:
            self._writer.write(f"{name}.{INPUT_SCALES}", scale[None])

    def write(self, tensor: str, values: Tensor) -> None:
        """Write a tensor in `dtype`; raises UnsupportedError naming it when a value does not fit."""
        largest, end = max(abs(float(end)) for end in values.aminmax()), torch.finfo(self._dtype).max
        if largest > end:
            raise UnsupportedError(f"'{tensor}' holds {largest:.3g}, {self._dtype} ends at {end:.5g}")
        self._writer.write(tensor, values.to(self._dtype))

    def task(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None = None,
        statistics: InputStatistics | None = None,
        input_scale: Tensor | None = None,
    ) -> RoundingTask:
        """Return what rounding one linear or table needs."""
        return RoundingTask(self._recipe, self._bits_of[name], name, weight, bias, statistics, input_scale)

    def take(self, rounded: RoundedLinear) -> None:
        """Write what a task came to."""
        self._errors.append(rounded.error)
        self._count(rounded.error.weights, rounded.error.bits)
        for name, tensor in rounded.tensors.items():
            self._writer.write(name, tensor)

    def _count(self, weights: int, bits: int) -> None:
        self.bits += weights * bits
        self.weights += weights


def round_linear(task: RoundingTask) -> RoundedLinear:
    """Quantize one linear or table."""
    recipe, projection = task.recipe, task.name not in (EMBEDDING, HEAD)
    format_ = (linear_format if projection else table_format)(recipe, task.bits)
    damping: float | None = None
    if task.statistics is None:
        quantized = quantize_linear(task.weight, task.bias, format_, task.name, task.input_scale)
    else:
        rounding = Rounding(format_, recipe.correction, recipe.descent, recipe.refinement)
        quantized, damping = quantize_calibrated(
            task.weight, task.bias, task.statistics, rounding, task.name, task.input_scale
        )
    if recipe.premultiply_scales and projection:
        quantized = premultiply_scales(quantized, task.name)
    if recipe.static_activations and projection:
        quantized = replace(quantized, codebook=round_to_integers(quantized.codebook))
    tensors = store(task.name, quantized, bias=projection)
    relative = relative_error(tensors[f"{task.name}.weight"], task.weight)
    dead = None if task.statistics is None else task.statistics.dead_inputs
    error = TensorError(task.name, task.bits, task.weight.numel(), relative, damping, dead)
    return RoundedLinear(tensors, quantized.input_scale, error)


def tell_errors(errors: Sequence[TensorError]) -> tuple[str, ...]:
    """Return what is worth showing of errors: their mean, and the worst of several."""
    if not errors:
        return ("not quantized",)
    mean = sum(error.relative_error for error in errors) / len(errors)
    if len(errors) == 1:
        return (f"error {mean:.2%}",)
    worst = max(errors, key=lambda error: error.relative_error)
    return f"error {mean:.2%}", f"worst {worst.name.rpartition('.')[2]} {worst.relative_error:.2%}"
