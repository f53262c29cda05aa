"""Which orthogonal matrix turns which space of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anequant.architectures.spec import ModelSpec, Space
from anequant.errors import UsageError
from anequant.recipe import Recipe
from anequant.rotation.orthogonal import (
    Rotation,
    block_hadamard_rotation,
    hadamard_rotation,
    plain_hadamard,
    random_rotation,
)


@dataclass(frozen=True)
class RotationPlan:
    """R1 turns the residual stream and R2 every value head, one matrix per layer; both go into the weights
    on either side. R4 turns down's input while the model runs; only its inverse goes into a weight."""

    r1: Rotation | None = None
    r2: tuple[Rotation, ...] = ()
    r4: Rotation | None = None

    def written(self, space: Space, layer: int | None) -> Rotation | None:
        """How the output of a linear that writes to `space` turns; None where nothing does."""
        if space is Space.RESIDUAL:
            return self.r1
        if space is Space.VALUE and layer is not None and self.r2:
            return self.r2[layer]
        return None

    def read(self, space: Space, layer: int | None) -> Rotation | None:
        """How the input of a linear that reads `space` turns."""
        return self.r4 if space is Space.FFN else self.written(space, layer)


def plan_rotations(spec: ModelSpec, recipe: Recipe) -> RotationPlan:
    """Draw the recipe's rotations from its seed.

    Raises UnsupportedError where a width has no Hadamard matrix, UsageError where the block does not
    divide the width, or for an R1 or R2 that no seed tells (pca, file).
    """
    if "file" in (recipe.r1, recipe.r2) or recipe.r1 == "pca":
        raise UsageError(
            f"r1 is '{recipe.r1}' and r2 '{recipe.r2}', which no seed tells",
            remedy="name the rotations with --rotations",
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    return RotationPlan(
        r1=_residual_rotation(spec.hidden_size, recipe, generator),
        r2=tuple(hadamard_rotation(spec.head_dim, generator) for _ in range(spec.num_layers))
        if recipe.r2 == "hadamard"
        else (),
        r4=online_rotation(spec.intermediate_size, recipe.r4, recipe.r4_block),
    )


def online_rotation(size: int, kind: str, block: int) -> Rotation | None:
    """R3 or R4 of the recipe's word `kind`: a Hadamard matrix without signs, over the width or blocks.

    Raises as `plan_rotations`.
    """
    if kind == "none":
        return None
    return plain_hadamard(size, block if kind == "block-hadamard" else size)


def _residual_rotation(size: int, recipe: Recipe, generator: torch.Generator) -> Rotation | None:
    if recipe.r1 == "hadamard":
        return hadamard_rotation(size, generator)
    if recipe.r1 == "block-hadamard":
        return block_hadamard_rotation(size, recipe.r1_block, generator)
    if recipe.r1 == "random":
        return random_rotation(size, generator)
    return None
