"""One linear or table after the other: rounded, stored, written, and its error kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, INPUT_SCALES
from anequant.checkpoints.quantized import store
from anequant.checkpoints.writer import CheckpointWriter
from anequant.errors import UnsupportedError
from anequant.quantization.calibrated import Rounding, quantize_calibrated
from anequant.quantization.codebook import integer_codebook
from anequant.quantization.premultiply import premultiply_scales
from anequant.quantization.quantize import quantize_linear
from anequant.quantization.statistics import InputStatistics
from anequant.recipe import Recipe

ROWS = 1024


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


class Rounder:
    """Writes weights as the recipe says; `bits` are the widths by full name, 16 for what stays in `dtype`."""

    def __init__(
        self, recipe: Recipe, bits: Mapping[str, int], writer: CheckpointWriter, dtype: torch.dtype
    ) -> None:
        self.errors: list[TensorError] = []
        self._recipe = recipe
        self._bits_of = bits
        self._writer = writer
        self._dtype = dtype
        self._bits = self._weights = 0

    @property
    def bits_per_weight(self) -> float:
        return self._bits / self._weights

    def state(self, known: int) -> dict[str, Any]:
        """What is counted, and the errors after the first `known` of them, for `restore`."""
        errors = [asdict(error) for error in self.errors[known:]]
        return {"errors": errors, "bits": self._bits, "weights": self._weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` whose first errors are here."""
        self.errors += [TensorError(**error) for error in state["errors"]]
        self._bits, self._weights = state["bits"], state["weights"]

    def keeps(self, name: str) -> bool:
        """Whether the linear or table of that name stays as it is."""
        return self._bits_of[name] == 16

    def keep(
        self, name: str, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Write a weight [rows, in] (some rows after the other), its bias and input scale as they are."""
        self.write(f"{name}.weight", weight)
        self._count(weight, 16)
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

    def quantize(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        statistics: InputStatistics | None,
        input_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Quantize and write one linear or table; its weight as it was stored, float16, and input scale."""
        recipe, bits, projection = self._recipe, self._bits_of[name], name not in (EMBEDDING, HEAD)
        codebook, scales = recipe.codebook, recipe.linear_scales if projection else "output"
        damping: float | None = None
        if statistics is None:
            quantized = quantize_linear(
                weight,
                bias,
                bits=bits,
                codebook=codebook,
                scales=scales,
                group=recipe.group_size,
                name=name,
                input_scale=input_scale,
            )
        else:
            steps = (recipe.correction, recipe.descent, recipe.refinement)
            rounding = Rounding(bits, codebook, scales, *steps, recipe.group_size)
            quantized, damping = quantize_calibrated(
                weight, bias, statistics, rounding, name, input_scale=input_scale
            )
        if recipe.premultiply_scales and projection:
            quantized = premultiply_scales(quantized, name)
        if recipe.static_activations and projection:
            quantized = replace(quantized, codebook=integer_codebook(quantized.codebook))
        tensors = store(name, quantized, bias=projection)
        stored = tensors[f"{name}.weight"]
        dead = None if statistics is None else statistics.dead_inputs
        self.errors.append(
            TensorError(name, bits, weight.numel(), _relative_error(stored, weight), damping, dead)
        )
        self._count(weight, bits)
        for tensor_name, tensor in tensors.items():
            self._writer.write(tensor_name, tensor)
        return stored, quantized.input_scale

    def _count(self, weight: Tensor, bits: int) -> None:
        self._bits += weight.numel() * bits
        self._weights += weight.numel()


def told(state: Mapping[str, Any]) -> tuple[str, ...]:
    """What is worth showing of a unit, from its `Rounder.state`: the mean error, and the worst of several."""
    errors = [TensorError(**error) for error in state["errors"]]
    if not errors:
        return ("not quantized",)
    mean = sum(error.relative_error for error in errors) / len(errors)
    if len(errors) == 1:
        return (f"error {mean:.2%}",)
    worst = max(errors, key=lambda error: error.relative_error)
    return f"error {mean:.2%}", f"worst {worst.name.rpartition('.')[2]} {worst.relative_error:.2%}"


def _relative_error(stored: Tensor, weight: Tensor) -> float:
    """||stored - weight|| / ||weight||, squares summed in float64 over row blocks."""
    difference = size = 0.0
    for ours, original in zip(torch.split(stored, ROWS), torch.split(weight, ROWS), strict=True):
        difference += float((ours.float() - original).square_().sum(dtype=torch.float64))
        size += float(original.square().sum(dtype=torch.float64))
    return math.sqrt(difference / max(size, 1e-60))
