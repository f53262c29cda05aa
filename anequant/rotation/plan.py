"""Which orthogonal matrix turns which space of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anequant.architectures.spec import ModelSpec, Space
from anequant.recipe import Recipe
from anequant.rotation.orthogonal import (
    Rotation,
    block_hadamard_rotation,
    hadamard_rotation,
    random_rotation,
)


@dataclass(frozen=True)
class RotationPlan:
    """R1 turns the residual stream; R2 turns every value head, one matrix per layer."""

    r1: Rotation | None
    r2: tuple[Rotation, ...]

    def rotation_of(self, space: Space, layer: int | None) -> Rotation | None:
        """The matrix of `space` as layer `layer` sees it; None where nothing turns."""
        if space is Space.RESIDUAL:
            return self.r1
        if space is Space.VALUE and layer is not None and self.r2:
            return self.r2[layer]
        return None


def plan_rotations(spec: ModelSpec, recipe: Recipe) -> RotationPlan:
    """Draw the recipe's rotations from its seed.

    Raises UnsupportedError where a width has no Hadamard matrix, UsageError where the block does not
    divide the width.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    return RotationPlan(
        r1=_residual_rotation(spec.hidden_size, recipe, generator),
        r2=tuple(hadamard_rotation(spec.head_dim, generator) for _ in range(spec.num_layers))
        if recipe.r2 == "hadamard"
        else (),
    )


def _residual_rotation(size: int, recipe: Recipe, generator: torch.Generator) -> Rotation | None:
    if recipe.r1 == "hadamard":
        return hadamard_rotation(size, generator)
    if recipe.r1 == "block-hadamard":
        return block_hadamard_rotation(size, recipe.r1_block, generator)
    if recipe.r1 == "random":
        return random_rotation(size, generator)
    return None
