"""The rotations that a written checkpoint was made with, found again from what lies in its folder."""

from __future__ import annotations

from dataclasses import replace

from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotations import ROTATIONS, read_rotations
from anequant.errors import InputError
from anequant.recipe import Recipe
from anequant.rotation.plan import R1, RotationPlan, matrix_sizes, plan_rotations


def written_rotations(checkpoint: Checkpoint, recipe: Recipe) -> RotationPlan:
    """The plan of a checkpoint that anequant wrote with `recipe`: read from its rotations.safetensors, or
    drawn again where the seed tells it.

    Raises InputError when a file that no seed replaces is missing, and what `read_rotations` raises.
    """
    sizes = matrix_sizes(checkpoint.spec, recipe)
    if (checkpoint.folder / ROTATIONS).is_file():
        matrices = read_rotations(checkpoint.folder / ROTATIONS, sizes)
        r1, r2 = ("none" if kind == "none" else "file" for kind in (recipe.r1, recipe.r2))
        return plan_rotations(checkpoint.spec, replace(recipe, r1=r1, r2=r2), matrices=matrices)
    drawn = {recipe.r1, recipe.r2}.isdisjoint({"pca", "file"}) and recipe.restarts == 1 and not recipe.learn
    if sizes and not drawn:
        what = "R1" if R1 in sizes else "R2"
        raise InputError(f"'{ROTATIONS}' is missing, which holds {what}", where=str(checkpoint.folder))
    return plan_rotations(checkpoint.spec, recipe)
