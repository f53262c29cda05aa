"""Rotations that no seed tells: measured, learned or read, and kept as matrices beside the output."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from anequant.calibration.rotation_choice import RotationChoice, Rotations, choose_rotations
from anequant.checkpoints.rotation_files import ROTATIONS, read_rotations, write_rotations
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import (
    FLOAT32,
    FLOAT64,
    Facts,
    count_advancing_bytes,
    count_forward_work,
    count_state_bytes,
    count_table_weights,
)
from anequant.rotation.rotation_plan import list_matrix_sizes, plan_rotations


@dataclass(frozen=True, eq=False)
class ChooseRotations(Step[Quantizing, RotationChoice]):
    """Choose R1 and R2 by what the whole recipe makes of them."""

    stage = "quantize"
    kind = "rotations"
    result = RotationChoice

    facts: Facts
    file: Path | None

    @property
    def moves(self) -> tuple[int, int]:
        return (self.facts.source_size if self._measures else 0), 0

    @property
    def holds(self) -> int:
        """The float model's states beside the embedding; with restarts or learning a rotated layer and its
        codes, the head, and the states between layers that gradients need."""
        if not self._measures:
            return 0
        spec, recipe, windows = self.facts.spec, self.facts.recipe, self.facts.windows
        measured = count_state_bytes(spec, windows) + self.facts.source_bytes * count_table_weights(spec)
        measured += FLOAT64 * spec.hidden_size**2
        if recipe.restarts == 1 and not recipe.learn:
            return measured + count_advancing_bytes(spec, windows)
        kept = FLOAT32 * math.prod(windows) * spec.hidden_size * (spec.num_layers if recipe.learn else 1)
        layer = (FLOAT64 + 3 * FLOAT32) * spec.layer_weights
        return measured + kept + 3 * FLOAT32 * count_table_weights(spec) + layer

    @property
    def cost(self) -> Work:
        if not self._measures:
            return Work()
        recipe = self.facts.recipe
        passes = 2 + recipe.restarts + 4 * recipe.learn
        return count_forward_work(self.facts.spec, self.facts.windows, passes)

    @property
    def _measures(self) -> bool:
        recipe = self.facts.recipe
        return recipe.r1 == "pca" or recipe.restarts > 1 or bool(recipe.learn)

    def run(self, state: Quantizing, progress: Progress) -> RotationChoice:
        chosen = choose_rotations(self.facts.checkpoint, self.facts.recipe, state.tokens, self.file, progress)
        assert chosen.matrices is not None and chosen.choice is not None
        write_rotations(state.journal.folder, chosen.matrices)
        return chosen.choice

    def accept(self, state: Quantizing, result: RotationChoice) -> None:
        spec, recipe = self.facts.spec, self.facts.recipe
        matrices = read_rotations(state.journal.folder / ROTATIONS, list_matrix_sizes(spec, recipe))
        r1, r2 = ("none" if kind == "none" else "file" for kind in (recipe.r1, recipe.r2))
        plan = plan_rotations(spec, replace(recipe, r1=r1, r2=r2), matrices=matrices)
        state.rotations = Rotations(plan, result, matrices)
