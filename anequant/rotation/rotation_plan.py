"""Which orthogonal matrix rotates which space of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec, Space
from anequant.errors import UsageError
from anequant.recipe import Recipe
from anequant.rotation.orthogonal import (
    Rotation,
    draw_block_hadamard,
    draw_hadamard,
    draw_random_rotation,
    make_plain_hadamard,
)

R1, R2 = "r1", "r2"
"""What their matrices are called; a layer's R2 has its number after a dot."""


@dataclass(frozen=True)
class RotationPlan:
    """R1 rotates the residual stream and R2 every value head, one matrix per layer; both go into the weights
    on either side. R4 rotates down's input while the model runs; only its inverse goes into a weight."""

    r1: Rotation | None = None
    r2: tuple[Rotation, ...] = ()
    r4: Rotation | None = None

    def output_rotation(self, space: Space, layer: int | None) -> Rotation | None:
        """Return the rotation of the output of a linear that writes to `space`; None where there is none."""
        if space is Space.RESIDUAL:
            return self.r1
        if space is Space.VALUE and layer is not None and self.r2:
            return self.r2[layer]
        return None

    def input_rotation(self, space: Space, layer: int | None) -> Rotation | None:
        """Return the rotation of the input of a linear that reads `space`; None where there is none."""
        return self.r4 if space is Space.FFN else self.output_rotation(space, layer)

    def matrices(self) -> dict[str, Tensor]:
        """R1 and every R2 by the names of `list_matrix_sizes`, float64 [size, size]."""
        rotations = {} if self.r1 is None else {R1: self.r1}
        rotations |= {f"{R2}.{layer}": rotation for layer, rotation in enumerate(self.r2)}
        return {name: rotation.dense() for name, rotation in rotations.items()}

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> RotationPlan:
        """Return the same plan with dense R1 and R2 in the place of its own, by name."""
        r1 = Rotation(len(matrices[R1]), matrix=matrices[R1]) if R1 in matrices else self.r1
        names = [f"{R2}.{layer}" for layer in range(len(self.r2))]
        r2 = [
            Rotation(len(matrices[name]), matrix=matrices[name]) if name in matrices else rotation
            for name, rotation in zip(names, self.r2, strict=True)
        ]
        return replace(self, r1=r1, r2=tuple(r2))

    def dense(self) -> RotationPlan:
        """Return the same rotations, R1 and R2 as matrices."""
        return self.with_matrices(self.matrices())


def list_matrix_sizes(spec: ModelSpec, recipe: Recipe) -> dict[str, int]:
    """Return the matrices that the recipe's words r1 and r2 stand for, r1 and r2.0, r2.1, ..., with their
    sizes."""
    sizes = {} if recipe.r1 == "none" else {R1: spec.hidden_size}
    if recipe.r2 != "none":
        sizes |= {f"{R2}.{layer}": spec.head_dim for layer in range(spec.num_layers)}
    return sizes


def is_drawn(recipe: Recipe) -> bool:
    """Whether the seed alone tells the rotations: none is measured, learned or read from a file."""
    return {recipe.r1, recipe.r2}.isdisjoint({"pca", "file"}) and recipe.restarts == 1 and not recipe.learn


def plan_rotations(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    matrices: Mapping[str, Tensor] = MappingProxyType({}),
    basis: Tensor | None = None,
) -> RotationPlan:
    """Draw the recipe's rotations from its seed.

    What no seed tells is handed in: `matrices` by the names of `list_matrix_sizes` where r1 or r2 is file,
    and for pca the `basis` float64 [hidden_size, hidden_size] that a random Hadamard matrix follows.

    Raises UnsupportedError where a width has no Hadamard matrix, UsageError where the block does not
    divide the width, or for an R1 or R2 that is not handed in.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    r1 = _residual_rotation(spec.hidden_size, recipe, generator, basis)
    r2: tuple[Rotation, ...] = ()
    if recipe.r2 == "hadamard":
        r2 = tuple(draw_hadamard(spec.head_dim, generator) for _ in range(spec.num_layers))
    given = [
        name for name in list_matrix_sizes(spec, recipe) if getattr(recipe, name.partition(".")[0]) == "file"
    ]
    if not all(name in matrices for name in given):
        raise UsageError(
            f"r1 is '{recipe.r1}' and r2 '{recipe.r2}', which no seed tells",
            remedy="name the rotations with --rotations",
        )
    if R1 in given:
        r1 = Rotation(spec.hidden_size, matrix=matrices[R1])
    if recipe.r2 == "file":
        names = (f"{R2}.{layer}" for layer in range(spec.num_layers))
        r2 = tuple(Rotation(spec.head_dim, matrix=matrices[name]) for name in names)
    return RotationPlan(r1, r2, make_online_rotation(spec.intermediate_size, recipe.r4, recipe.r4_block))


def make_online_rotation(size: int, kind: str, block: int) -> Rotation | None:
    """R3 or R4 of the recipe's word `kind`: a Hadamard matrix without signs, over the width or blocks.

    Raises as `plan_rotations`.
    """
    if kind == "none":
        return None
    return make_plain_hadamard(size, block if kind == "block-hadamard" else size)


def _residual_rotation(
    size: int, recipe: Recipe, generator: torch.Generator, basis: Tensor | None
) -> Rotation | None:
    if recipe.r1 == "pca":
        if basis is None:
            raise UsageError("r1 is 'pca', which no seed tells", remedy="quantize or rotate, which calibrate")
        return Rotation(size, matrix=draw_hadamard(size, generator).apply(basis))
    if recipe.r1 == "hadamard":
        return draw_hadamard(size, generator)
    if recipe.r1 == "block-hadamard":
        return draw_block_hadamard(size, recipe.r1_block, generator)
    if recipe.r1 == "random":
        return draw_random_rotation(size, generator)
    return None
