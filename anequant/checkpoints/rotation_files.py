"""rotations.safetensors: the matrices of R1 and R2 where no seed tells them, to be looked at and used again.

The tensors are called r1 [hidden_size, hidden_size] and r2.N [head_dim, head_dim] for layer N, float64. An
activation row x of the float model is x @ r1 in the rotated one, and a value head of layer N is v @ r2.N.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anequant.checkpoints.header import TensorInfo, read_header
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import InputError, UsageError, quote
from anequant.recipe import Recipe
from anequant.rotation.rotation_plan import R1, RotationPlan, is_drawn, list_matrix_sizes, plan_rotations

ROTATIONS = "rotations.safetensors"
METADATA = {
    "rotations": "R1 turns rows x of the residual stream, x @ r1; R2 value heads v of layer N, v @ r2.N"
}
"""A single entry: safetensors writes several in no fixed order."""

DTYPES = ("F32", "F64")
TOLERANCE = 1e-6
"""Largest entry of R.T @ R - I."""


def write_rotations(folder: Path, matrices: Mapping[str, Tensor]) -> None:
    """Write the matrices, by name, to a folder's rotations.safetensors."""
    tensors = {name: matrix.detach().double().contiguous() for name, matrix in matrices.items()}
    save_file(tensors, folder / ROTATIONS, METADATA)


def read_rotations(path: Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the matrices of those names and sizes, float64 [size, size]; others in the file are not looked
    at.

    Raises UsageError when there is no such file, InputError naming file and tensor when it is no safetensors
    file, lacks a matrix, or holds one of another size or dtype, or one that is not orthogonal to 1e-6. A
    matrix in float32, orthogonal only to its last digit, is replaced by the nearest orthogonal one.
    """
    if not os.path.isfile(path):
        raise UsageError(f"rotations file '{path}' does not exist")
    header, where = read_header(path), str(path)
    for name, size in sizes.items():
        problem = _problem(header.get(name), size)
        if problem:
            raise InputError(f"rotation {quote(name)} {problem}", where=where)
    matrices = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in sizes:
                matrices[name] = _make_orthogonal(file.get_tensor(name), name, where)
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{path.name}' cannot be read: {error}", where=where) from error
    return matrices


def _problem(info: TensorInfo | None, size: int) -> str | None:
    if info is None:
        return "is missing"
    if info.shape != (size, size):
        return f"has shape {list(info.shape)}, the model needs {[size, size]}"
    if info.dtype not in DTYPES:
        return f"is {info.dtype}, not F32 or F64"
    return None


def _make_orthogonal(stored: Tensor, name: str, where: str) -> Tensor:
    matrix: Tensor = stored.double()
    off = float((matrix.T @ matrix - torch.eye(len(matrix), dtype=torch.float64)).abs().max())
    if not off <= TOLERANCE:
        raise InputError(
            f"rotation {quote(name)} is not orthogonal, R.T @ R is off by {off:.2e}", where=where
        )
    if stored.dtype == torch.float64:
        return matrix
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest


def read_written_rotations(checkpoint: Checkpoint, recipe: Recipe) -> RotationPlan:
    """Return the plan of a checkpoint that anequant wrote with `recipe`: read from its rotations.safetensors,
    or drawn again where the seed tells it.

    Raises InputError when a file that no seed replaces is missing, and what `read_rotations` raises.
    """
    sizes = list_matrix_sizes(checkpoint.spec, recipe)
    if (checkpoint.folder / ROTATIONS).is_file():
        matrices = read_rotations(checkpoint.folder / ROTATIONS, sizes)
        r1, r2 = ("none" if kind == "none" else "file" for kind in (recipe.r1, recipe.r2))
        return plan_rotations(checkpoint.spec, replace(recipe, r1=r1, r2=r2), matrices=matrices)
    if sizes and not is_drawn(recipe):
        what = "R1" if R1 in sizes else "R2"
        raise InputError(f"'{ROTATIONS}' is missing, which holds {what}", where=str(checkpoint.folder))
    return plan_rotations(checkpoint.spec, recipe)
