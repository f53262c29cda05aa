"""The pass over a float checkpoint: fold, rotate, check, calibrate, round, write; one layer at a time.

What is rounded or kept are the turned weights as float32 holds them, as `anequant rotate` stores them: so
rotating and quantizing in two steps gives the bytes that one step does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    INPUT_SCALES,
    Linear,
    Space,
    layer_prefix,
)
from anequant.calibration.activations import largest_magnitudes, smoothed_scale, static_scales
from anequant.calibration.equivalence import EquivalenceProbe
from anequant.calibration.statistics import Walkers
from anequant.checkpoints.layout import norm_names
from anequant.checkpoints.writer import CheckpointWriter
from anequant.pipeline.rounder import Rounder, TensorError
from anequant.pipeline.turned import ROWS, TurnedModel
from anequant.progress import Progress
from anequant.quantization.scales import balanced_scales
from anequant.quantization.statistics import InputStatistics
from anequant.recipe import Recipe


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
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self._model = model
        self._spec = model.spec
        self._recipe = recipe
        widths = {**bits, EMBEDDING: recipe.embedding_bits, HEAD: recipe.head_bits}
        self._rounder = Rounder(recipe, widths, writer, dtype)
        self._progress = progress
        self._dtype = dtype
        self._tokens = tokens if recipe.feeds_back or recipe.static_activations else None
        self._walkers: Walkers | None = None
        self._probe = EquivalenceProbe(model.checkpoint, model.plan, model.online)
        self._scales: dict[str, float] = {}

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
        self._rounder.write(f"{FINAL_NORM}.weight", gain)
        statistics = None
        if self._walkers is not None and self._recipe.head_bits < 16:
            statistics = self._walkers.head_statistics(gain)
        self._write_table(HEAD, self._head_blocks(), statistics)
        rounder = self._rounder
        return PassResult(
            self._probe.relative_error(), rounder.bits_per_weight, tuple(rounder.errors), self._scales
        )

    def _write_layer(self, layer: int) -> None:
        original, turned = self._model.layer(layer)
        self._probe.layer(layer, original, turned)
        prefix = layer_prefix(layer)
        floats = {name: tensor.float() for name, tensor in turned.items()}
        for name in norm_names(self._spec):
            self._rounder.write(prefix + name, floats[name])
        del original, turned
        current = {name: tensor.to(self._dtype) for name, tensor in floats.items()}
        for group in self._spec.input_groups:
            statistics = None
            if self._walkers is not None and self._recipe.feeds_back:
                statistics = self._walkers.input_statistics(layer, floats, current, group[0].name)
            for linear in group:
                self._write_linear(layer, linear, floats, current, statistics)
        if self._walkers is None:
            return
        if self._recipe.static_activations:
            self._measure_activations(layer, current)
        self._walkers.advance(layer, floats, current)

    def _write_linear(
        self,
        layer: int,
        linear: Linear,
        floats: Mapping[str, Tensor],
        current: dict[str, Tensor],
        statistics: InputStatistics | None,
    ) -> None:
        """Round one projection and put what was stored into `current`; at 16 bits it stays as it is."""
        name = layer_prefix(layer) + linear.name
        weight, bias = floats[f"{linear.name}.weight"], floats.get(f"{linear.name}.bias")
        input_scale = None
        if self._recipe.smooth and linear.input.space is Space.FFN and self._walkers is not None:
            inputs = self._walkers.quantized_inputs(layer, current, linear.name)
            magnitudes = largest_magnitudes(inputs, self._recipe.activation_prefix)
            _, balanced = balanced_scales(weight)
            input_scale = smoothed_scale(balanced, magnitudes, self._recipe.smooth)
        if self._rounder.keeps(name):
            self._rounder.keep(name, weight, bias, input_scale)
        else:
            stored, input_scale = self._rounder.quantize(name, weight, bias, statistics, input_scale)
            current[f"{linear.name}.weight"] = stored
        if input_scale is not None and self._recipe.static_activations:
            current[f"{linear.name}.{INPUT_SCALES}"] = input_scale[None]

    def _measure_activations(self, layer: int, current: Mapping[str, Tensor]) -> None:
        walkers, prefix = self._walkers, layer_prefix(layer)
        assert walkers is not None
        formats = self._model.online.activations
        widths = {
            linear.name: formats[prefix + linear.name].bits
            for linear in self._spec.architecture.linears
            if prefix + linear.name in formats
        }
        scales = static_scales(
            self._spec,
            current,
            lambda name: walkers.quantized_inputs(layer, current, name),
            widths,
            self._recipe.activation_range,
            self._recipe.activation_prefix,
        )
        self._scales.update({prefix + name: scale for name, scale in scales.items()})

    def _write_table(
        self, name: str, blocks: Iterable[Tensor], statistics: InputStatistics | None
    ) -> Tensor | None:
        """Embedding or head from float64 row blocks: as float16, or with one codebook and row scales.

        Returns the table as it was stored if it was quantized.
        """
        if self._rounder.keeps(name):
            for block in blocks:
                self._rounder.keep(name, block.float())
            return None
        table = torch.empty(self._spec.vocab_size, self._spec.hidden_size)
        for start, block in zip(range(0, table.shape[0], ROWS), blocks, strict=True):
            table[start : start + ROWS] = block
        return self._rounder.quantize(name, table, None, statistics)[0]

    def _start_walkers(self, tokens: Tensor, stored: Tensor | None) -> Walkers:
        """Embed the tokens as the float model does and as the written one does (`stored` [vocab, hidden])."""
        embedded = self._model.embed(tokens)
        current = embedded.to(self._dtype) if stored is None else stored[tokens]
        return Walkers(self._spec, embedded, current, self._model.online)

    def _head_blocks(self) -> Iterable[Tensor]:
        self._probe.final_norm(self._model.checkpoint.final_gain())
        for rows, turned in self._model.head():
            self._probe.head(rows, turned)
            yield turned
