"""The widths of projections, chosen by how much rounding each of them costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from anequant.architectures.spec import EMBEDDING, HEAD, layer_prefix
from anequant.calibration.sensitivity import FloatModel, Formats, measure_rounding_losses
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import (
    CORE_AND_CODES,
    FLOAT32,
    Facts,
    count_forward_work,
    count_table_weights,
)
from anequant.quantization.bit_allocation import allocate_bits
from anequant.quantization.weight_format import linear_format, table_format
from anequant.recipe import CHOSEN
from anequant.reference.head_loss import PIECE

SENSITIVITY_TOKENS = 128

PASSES = 6
"""Times that the windows go through the model, on their way back as two."""


@dataclass(frozen=True, eq=False)
class ChooseWidths(Step[Quantizing, Mapping[str, int]]):
    """Give every projection, and tables that ask for it, the width that target_bits leaves it, by what
    rounding it costs in the end."""

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
        """Both tables, states before every layer, and some logits or a layer with squares of its inputs."""
        spec = self.facts.spec
        count, length = self.facts.windows
        states = FLOAT32 * count * min(length, SENSITIVITY_TOKENS) * spec.hidden_size * (spec.num_layers + 2)
        tables = 2 * FLOAT32 * count_table_weights(spec)
        squares = [spec.width(linear.input) ** 2 for linear in spec.architecture.linears]
        layer = 4 * FLOAT32 * spec.layer_weights + FLOAT32 * (sum(squares) + 5 * max(squares))
        logits = 4 * FLOAT32 * PIECE * spec.vocab_size
        if self._tables:
            logits += CORE_AND_CODES * count_table_weights(spec)
        return states + tables + max(layer, logits)

    @property
    def cost(self) -> Work:
        count, length = self.facts.windows
        windows = (count, min(length, SENSITIVITY_TOKENS))
        todo = count_forward_work(self.facts.spec, windows, passes=PASSES)
        for linear in self.facts.spec.architecture.linears:
            rows, width = self.facts.spec.shape(linear)
            todo += Work(self.facts.spec.num_layers * (count * rows * width**2 + 2 * width**3))
        return todo

    @property
    def _tables(self) -> list[str]:
        """The tables whose widths are chosen."""
        recipe = self.facts.recipe
        asked = {EMBEDDING: recipe.embedding_bits, HEAD: recipe.head_bits}
        return [name for name, bits in asked.items() if bits == CHOSEN]

    def run(self, state: Quantizing, progress: Progress) -> Mapping[str, int]:
        spec, recipe, model = self.facts.spec, self.facts.recipe, state.model
        assert state.tokens is not None
        weights = state.token_weights and {
            name: values[:, :SENSITIVITY_TOKENS] for name, values in state.token_weights.items()
        }
        losses = measure_rounding_losses(
            FloatModel(
                spec,
                model.float_layer,
                torch.cat([rotated.float() for _, rotated in model.head()]),
                model.embed,
                lambda: torch.cat([rotated.float() for rotated in model.embedding()]),
                model.online.rotations,
            ),
            state.tokens[:, :SENSITIVITY_TOKENS],
            Formats(
                [linear_format(recipe, bits) for bits in recipe.widths],
                {name: [table_format(recipe, bits) for bits in recipe.widths] for name in self._tables},
                recipe.feeds_back,
            ),
            seed=recipe.seed,
            weights=weights,
            progress=progress,
        )
        sizes = dict.fromkeys(self._tables, count_table_weights(spec))
        for layer in range(spec.num_layers):
            sizes |= {layer_prefix(layer) + name: count for name, count in spec.linear_weights.items()}
        return allocate_bits(losses, sizes, recipe.target_bits)

    def accept(self, state: Quantizing, result: Mapping[str, int]) -> None:
        state.bits = {**state.bits, **result}
