"""The pass over a float checkpoint: fold, rotate, check, calibrate, round, write; one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.equivalence import EquivalenceProbe
from anequant.calibration.statistics import Walkers
from anequant.checkpoints.layout import norm_names
from anequant.checkpoints.quantized import store
from anequant.checkpoints.writer import CheckpointWriter
from anequant.errors import UnsupportedError
from anequant.pipeline.turned import ROWS, TurnedModel
from anequant.progress import Progress
from anequant.quantization.calibrated import Rounding, quantize_calibrated
from anequant.quantization.premultiply import premultiply_scales
from anequant.quantization.quantize import LARGEST_FLOAT16, quantize_linear
from anequant.quantization.statistics import InputStatistics
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
    """`equivalence` is the largest relative logit change by folding and rotation, before rounding."""

    equivalence: float
    bits_per_weight: float
    tensors: tuple[TensorError, ...]

    def summary(self) -> dict[str, float]:
        errors = [tensor.relative_error for tensor in self.tensors]
        return {
            "relative_logit_error_of_rotation": self.equivalence,
            "bits_per_weight": self.bits_per_weight,
            "mean_relative_weight_error": sum(errors) / len(errors),
            "largest_relative_weight_error": max(errors),
        }


class QuantizePass:
    """The pass itself: what it reads and writes, and what it has measured so far.

    `bits` are the widths of the projections by full name; `tokens` [n, length] calibrate, None without.
    """

    def __init__(
        self,
        model: TurnedModel,
        recipe: Recipe,
        bits: Mapping[str, int],
        writer: CheckpointWriter,
        progress: Progress,
        tokens: Tensor | None,
    ) -> None:
        self._model = model
        self._spec = model.spec
        self._recipe = recipe
        self._bits_of = {**bits, EMBEDDING: recipe.embedding_bits, HEAD: recipe.head_bits}
        self._writer = writer
        self._progress = progress
        self._tokens = tokens if recipe.rounding == "gptq" else None
        self._walkers: Walkers | None = None
        self._probe = EquivalenceProbe(model.checkpoint, model.plan)
        self._errors: list[TensorError] = []
        self._bits = self._weights = 0

    def run(self) -> PassResult:
        layers = self._spec.num_layers
        self._progress("embedding", 0.0)
        stored = self._write_table(EMBEDDING, self._model.embedding(), None)
        if self._tokens is not None:
            self._walkers = self._start_walkers(self._tokens, stored)
        for layer in range(layers):
            self._progress(f"layer {layer + 1} of {layers}", (layer + 0.5) / (layers + 1))
            self._write_layer(layer)
        self._progress("head", layers / (layers + 1))
        gain = torch.ones(self._spec.hidden_size)
        self._writer.write(f"{FINAL_NORM}.weight", gain.half())
        statistics = None
        if self._walkers is not None and self._recipe.head_bits < 16:
            statistics = self._walkers.head_statistics(gain)
        self._write_table(HEAD, self._head_blocks(), statistics)
        return PassResult(self._probe.relative_error(), self._bits / self._weights, tuple(self._errors))

    def _write_layer(self, layer: int) -> None:
        original, turned = self._model.layer(layer)
        self._probe.layer(layer, original, turned)
        prefix = layer_prefix(layer)
        for name in norm_names(self._spec):
            self._writer.write(prefix + name, float16(turned[name], prefix + name))
        floats = {name: tensor.float() for name, tensor in turned.items()}
        del original, turned
        current = {name: tensor.half() for name, tensor in floats.items()}
        for group in self._spec.input_groups:
            statistics = None
            if self._walkers is not None:
                statistics = self._walkers.input_statistics(layer, floats, current, group[0].name)
            for linear in group:
                weight, bias = floats[f"{linear.name}.weight"], floats.get(f"{linear.name}.bias")
                stored = self._quantize(prefix + linear.name, weight, bias, statistics)
                current[f"{linear.name}.weight"] = stored
        if self._walkers is not None:
            self._walkers.advance(layer, floats, current)

    def _quantize(
        self, name: str, weight: Tensor, bias: Tensor | None, statistics: InputStatistics | None
    ) -> Tensor:
        """Quantize and write one linear or table; returns the weight as it was stored, float16."""
        recipe, bits, projection = self._recipe, self._bits_of[name], name not in (EMBEDDING, HEAD)
        codebook, scales = recipe.codebook, recipe.linear_scales if projection else "output"
        damping: float | None = None
        if statistics is None:
            quantized = quantize_linear(weight, bias, bits=bits, codebook=codebook, scales=scales, name=name)
        else:
            rounding = Rounding(bits, codebook, scales, recipe.correction, recipe.descent, recipe.refinement)
            quantized, damping = quantize_calibrated(weight, bias, statistics, rounding, name)
        if recipe.premultiply_scales and projection:
            quantized = premultiply_scales(quantized, name)
        tensors = store(name, quantized, bias=projection)
        stored = tensors[f"{name}.weight"]
        dead = None if statistics is None else statistics.dead_inputs
        self._errors.append(
            TensorError(name, bits, weight.numel(), _relative_error(stored, weight), damping, dead)
        )
        self._count(weight, bits)
        for tensor_name, tensor in tensors.items():
            self._writer.write(tensor_name, tensor)
        return stored

    def _write_table(
        self, name: str, blocks: Iterable[Tensor], statistics: InputStatistics | None
    ) -> Tensor | None:
        """Embedding or head from float64 row blocks: as float16, or with one codebook and row scales.

        Returns the table as it was stored if it was quantized.
        """
        if self._bits_of[name] == 16:
            for block in blocks:
                self._writer.write(f"{name}.weight", float16(block, f"{name}.weight"))
                self._count(block, 16)
            return None
        table = torch.empty(self._spec.vocab_size, self._spec.hidden_size)
        for start, block in zip(range(0, table.shape[0], ROWS), blocks, strict=True):
            table[start : start + ROWS] = block
        return self._quantize(name, table, None, statistics)

    def _start_walkers(self, tokens: Tensor, stored: Tensor | None) -> Walkers:
        """Embed the tokens as the float model does and as the written one does (`stored` [vocab, hidden])."""
        embedded = self._model.embed(tokens)
        return Walkers(self._spec, embedded, embedded.half() if stored is None else stored[tokens])

    def _head_blocks(self) -> Iterable[Tensor]:
        self._probe.final_norm(self._model.checkpoint.final_gain())
        for rows, turned in self._model.head():
            self._probe.head(rows, turned)
            yield turned

    def _count(self, weight: Tensor, bits: int) -> None:
        self._bits += weight.numel() * bits
        self._weights += weight.numel()


def _relative_error(stored: Tensor, weight: Tensor) -> float:
    """||stored - weight|| / ||weight||, squares summed in float64 over row blocks."""
    difference = size = 0.0
    for ours, original in zip(torch.split(stored, ROWS), torch.split(weight, ROWS), strict=True):
        difference += float((ours.float() - original).square_().sum(dtype=torch.float64))
        size += float(original.square().sum(dtype=torch.float64))
    return math.sqrt(difference / max(size, 1e-60))


def float16(values: Tensor, name: str) -> Tensor:
    """Narrow to float16; raises UnsupportedError naming the tensor when a value does not fit."""
    largest = max(abs(float(end)) for end in values.aminmax())
    if largest > LARGEST_FLOAT16:
        raise UnsupportedError(f"'{name}' holds {largest:.3g}, float16 ends at 65504")
    return values.half()
