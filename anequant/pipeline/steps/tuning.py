"""Tuning: the rounded model is read again, distilled, and written to its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from anequant.calibration.distill import LearnResult
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import (
    FLOAT16,
    FLOAT32,
    Facts,
    forward_work,
    states_bytes,
    table_size,
)
from anequant.pipeline.tune_pass import tune_checkpoint

PASSES = 3
"""Times that a step goes through the model: forward, and back through what is tuned."""


@dataclass(frozen=True, eq=False)
class Tune(Step[Quantizing, LearnResult]):
    """Distil scales, codebooks, biases and norms from the float model."""

    stage = "quantize"
    kind = "tuning"
    result = LearnResult

    facts: Facts

    @property
    def id(self) -> str:
        return "tuning"

    @property
    def title(self) -> str:
        return "tune"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.written_size + self.facts.source_size, self.facts.written_size

    @property
    def holds(self) -> int:
        """What is tuned as codes, a layer with its gradients, both heads, and states between layers."""
        spec, windows = self.facts.spec, self.facts.windows
        kept = states_bytes(spec, windows) + FLOAT32 * math.prod(windows) * spec.hidden_size
        heads = (self.facts.source_bytes + FLOAT16 + FLOAT32) * table_size(spec)
        return spec.num_layers * spec.layer_weights + kept + heads + 3 * FLOAT32 * spec.layer_weights

    @property
    def cost(self) -> Work:
        return forward_work(self.facts.spec, self.facts.windows, PASSES * self.facts.recipe.tune)

    def run(self, state: Quantizing, progress: Progress) -> LearnResult:
        steps, calibration = self.facts.recipe.tune, self.facts.calibration
        with state.new_writer(state.folder) as writer:
            return tune_checkpoint(state.untuned, self.facts.checkpoint, writer, steps, calibration, progress)

    def accept(self, state: Quantizing, result: LearnResult) -> None:
        state.tuning = result

    def tell(self, result: LearnResult) -> Sequence[str]:
        return (f"held-out KL {result.held_out_before:.4f} to {result.held_out_after:.4f}",)
