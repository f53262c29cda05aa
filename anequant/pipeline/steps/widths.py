"""The widths of projections, chosen by how much rounding each of them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from anequant.architectures.spec import layer_prefix
from anequant.calibration.sensitivity import FloatModel, measure_rounding_losses
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import FLOAT32, Facts, count_forward_work, count_table_weights
from anequant.quantization.bit_allocation import allocate_bits
from anequant.quantization.weight_format import linear_format

SENSITIVITY_TOKENS = 128


@dataclass(frozen=True, eq=False)
class ChooseWidths(Step[Quantizing, Mapping[str, int]]):
    """Give every projection the width that target_bits leaves it, by the loss that rounding it brings."""

    stage = "quantize"
    kind = "bits"
    result = Mapping[str, int]

    facts: Facts

    @property
    def title(self) -> str:
        return "sensitivity"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.source_size, 0

    @property
    def holds(self) -> int:
        """The whole head, the states before every layer, a layer and what rounds it."""
        spec = self.facts.spec
        states = FLOAT32 * math.prod(self.facts.windows) * spec.hidden_size * (spec.num_layers + 2)
        return states + 2 * FLOAT32 * count_table_weights(spec) + 4 * FLOAT32 * spec.layer_weights

    @property
    def cost(self) -> Work:
        return count_forward_work(self.facts.spec, self.facts.windows, passes=4)

    def run(self, state: Quantizing, progress: Progress) -> Mapping[str, int]:
        spec, recipe, model = self.facts.spec, self.facts.recipe, state.model
        assert state.tokens is not None
        head = torch.cat([rotated.float() for _, rotated in model.head()])
        losses = measure_rounding_losses(
            FloatModel(spec, model.float_layer, head, model.online.rotations),
            model.embed(state.tokens[:, :SENSITIVITY_TOKENS]),
            [linear_format(recipe, bits) for bits in recipe.widths],
            seed=recipe.seed,
            progress=progress,
        )
        sizes = {
            layer_prefix(layer) + name: weights
            for layer in range(spec.num_layers)
            for name, weights in spec.linear_weights.items()
        }
        return allocate_bits(losses, sizes, recipe.target_bits)

    def accept(self, state: Quantizing, result: Mapping[str, int]) -> None:
        state.bits = result
